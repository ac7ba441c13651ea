"""Charts of findings: what they show, and that a suite's report and a comparison have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from tests.evaluate.conftest import COLOURS, ColourModel, picture
from tests.evaluate.test_report import check_page
from wordsight.evaluate.charts import own_file
from wordsight.evaluate.compare import compare, read_runs
from wordsight.evaluate.compare_report import render_html
from wordsight.evaluate.few_shot_curve import FewShotCurve
from wordsight.evaluate.finding_charts import finding_charts, shift_charts, shot_chart
from wordsight.evaluate.kept import Kept, read_kept, write_kept
from wordsight.evaluate.prompt_study import PromptStudy
from wordsight.evaluate.suite import Candidate, SuiteItem, run_suite
from wordsight.types import Metric


def titles(svg: str) -> str:
    return " ".join(element.text or "" for element in ElementTree.fromstring(svg).iter() if element.tag.endswith("title"))


def kept(**fields: Any) -> Kept:
    given: dict[str, Any] = {
        "item": "one",
        "model": {"name": "m", "weights": "w"},
        "data": "d",
        "split": "test",
        "protocol": "p",
        "fingerprint": "f",
        "headline": next(iter(fields["metrics"])),
    }
    return Kept(**given | fields)


def test_the_few_shot_curve_stands_over_the_zero_shot_line() -> None:
    metrics = {"top1_zero_shot": Metric(0.72, 600, (0.68, 0.76))}
    curve = {1: 0.5, 4: 0.7, 16: 0.8}
    metrics |= {f"top1_{k}_shot": Metric(value, 600, (value - 0.05, value + 0.05)) for k, value in curve.items()}
    never = shot_chart(metrics, label="probe & zero-shot")
    assert ElementTree.fromstring(never).get("aria-label") == "probe & zero-shot"
    assert {"zero-shot: 72.0%", "16 shots: 80.0% (75.0% to 85.0%)"} <= {
        element.text for element in ElementTree.fromstring(never).iter() if element.tag == "title"
    }
    assert 'class="s2"' not in never, "it does not pass within so many shots, or no interval could be told"
    metrics["shots_to_pass_zero_shot"] = Metric(5.0, 3, (4.0, 7.0), "shots")
    notes = ("the probe passes zero-shot at 5 <shots>",)
    (chart,) = finding_charts(kept(task="few_shot_curve", metrics=metrics, notes=notes))
    assert notes[0] in titles(chart["svg"])
    dots = [float(dot.get("cx", "nan")) for dot in ElementTree.fromstring(chart["svg"]).findall("circle")]
    assert dots[1] < dots[3] < dots[2], "5 lies between 4 and 16"
    ElementTree.fromstring(own_file(chart["svg"]).split("\n", 1)[1])


def shifted(name: str, inside: float, under: float, baseline: list[list[Any]]) -> Kept:
    metrics = {
        "imagenet_a_top1": Metric(under, 100, (under - 0.1, under + 0.1)),
        "imagenet_a_in_top1": Metric(inside, 100, (inside - 0.1, inside + 0.1)),
    }
    table = [{"set": "ImageNet-A", "baseline": baseline}]
    return kept(task="natural_shifts", metrics=metrics, table=table, model={"name": name, "weights": name})


def test_models_stand_over_the_line_of_others(tmp_path: Path) -> None:
    others = [["m0", 0.5, 0.3], ["m1", 0.7, 0.45], ["m2", 0.8, 0.6]]
    measured = [("one", shifted("one", 0.6, 0.5, others)), ("two", shifted("two", 0.7, 0.3, others))]
    (chart,) = shift_charts(measured)
    assert "ImageNet-A" in chart["title"]
    for name in ("one", "two", "m0", "baseline of 3 models"):
        assert name in titles(chart["svg"])
    assert len(ElementTree.fromstring(chart["svg"]).findall("circle")) == 5
    (alone,) = finding_charts(shifted("one", 0.6, 0.5, []))
    assert len(ElementTree.fromstring(alone["svg"]).findall("circle")) == 1
    assert finding_charts(kept(task="counting", metrics={"imagenet_a_top1": Metric(0.5, 9, (0.4, 0.6))})) == []
    for name, found in measured:
        write_kept(tmp_path / name / "imagenet-a", found)
    page = render_html(compare(read_runs([tmp_path / "one", tmp_path / "two"])))
    assert "Natural shifts" in page
    check_page(page)


def test_a_suites_report_draws_them(model: ColourModel, tmp_path: Path) -> None:
    for part, size in (("train", 12), ("test", 5)):
        for name in list(COLOURS)[:2]:
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(size):
                wide = (20 + i, 16 if part == "train" else 17)
                (tmp_path / part / name / f"{i}.png").write_bytes(picture(COLOURS[name], wide))
    curve = FewShotCurve(shots=(1, 2), seeds=(1, 2), lambdas=[1.0], layer="projected", prompts="name")
    items = [
        SuiteItem(name="curve", evaluator=curve, data={"train": tmp_path / "train", "test": tmp_path / "test"}),
        SuiteItem(name="wording", evaluator=PromptStudy(prompts=["a {label}", "the {label}"], orders=2), data=tmp_path / "test"),
    ]
    outcome = run_suite(items, [Candidate(name="colours", load=lambda: model)], tmp_path / "run")
    assert outcome.failed == ()
    found = read_kept(tmp_path / "run" / "colours" / "curve")
    assert found is not None
    assert found.headline == "top1_2_shot"
    page = (tmp_path / "run" / "colours" / "report.html").read_text(encoding="utf-8")
    check_page(page)
    assert "Labelled pictures a class against zero-shot" in page
    assert "<title>linear probe</title>" in page
    assert "Prompt study" in page
