"""The prompt study on models whose answers are known: what each row says, and where it goes."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import wordsight
from tests.evaluate.conftest import COLOURS, ColourModel, picture
from wordsight.cli.evaluate import command
from wordsight.evaluate import ZeroShot, embed_source
from wordsight.evaluate.intervals import bootstrap_interval, share_interval
from wordsight.evaluate.prompt_study import PromptStudy, steps
from wordsight.evaluate.prompt_study_report import study_charts

Folder = Callable[..., Path]
TEMPLATES = ("{label}", "{label} and yellow", "grey {label}", "blue {label}", "{label} and red")
COUNTS = {"red": 5, "green": 4, "blue": 3, "grey": 2}


def test_every_row_is_what_zero_shot_measures(model: ColourModel, colour_folder: Folder) -> None:
    embedded = embed_source(model, str(colour_folder(COUNTS, wrong=1)))
    found = PromptStudy(prompts=TEMPLATES, orders=3).judge(model, embedded)
    for template in TEMPLATES:
        alone = ZeroShot(prompts=[template]).run(model, embedded)["top1"]
        assert found.metrics[f'template "{template}"'] == alone
    for kind in ("embeddings", "probabilities"):
        whole = ZeroShot(prompts=TEMPLATES, ensemble=kind).run(model, embedded)["top1"]  # type: ignore[arg-type]
        assert found.metrics[f"ensemble_of_{kind}"] == whole
    singles = [found.metrics[f'template "{template}"'].value for template in TEMPLATES]
    one, most = found.metrics["one_template"], found.metrics["5_templates"]
    assert one.value == pytest.approx(np.mean(singles))
    assert most == found.metrics["ensemble_of_embeddings"]
    assert found.metrics["gain_of_embeddings"].value == pytest.approx(most.value - one.value)
    assert [row["value"] for row in found.table if row["kind"] == "template"] == sorted(singles, reverse=True)
    assert len({tuple(row) for row in found.table}) == 1, "the same fields in every row"
    steps_taken = [row for row in found.table if row["kind"] == "templates"]
    assert [row["templates"] for row in steps_taken] == [1, 2, 3, 4, 5]
    gains = sum(row["per_added_template"] for row in steps_taken[1:])
    assert gains == pytest.approx(most.value - one.value), "what the steps gain adds up"
    for row in found.table:
        assert row["low"] <= row["value"] <= row["high"]


def test_intervals_are_over_pictures_and_wider_by_the_draw_of_orders(model: ColourModel, colour_folder: Folder) -> None:
    embedded = embed_source(model, str(colour_folder(COUNTS, wrong=2)))
    found = PromptStudy(prompts=TEMPLATES, orders=4, seed=1).judge(model, embedded)
    right_TN = np.stack([ZeroShot(prompts=[one]).judge(model, embedded).outcomes[0].values for one in TEMPLATES])
    assert found.metrics["one_template"].ci95 == pytest.approx(share_interval(right_TN.mean(0)))
    whole_N = ZeroShot(prompts=TEMPLATES).judge(model, embedded).outcomes[0].values
    assert found.metrics["gain_of_embeddings"].ci95 == pytest.approx(bootstrap_interval(whole_N - right_TN.mean(0)))
    # by hand for two templates: the orders of the seed, each an ensemble of its first two
    draw = np.random.default_rng(1)
    firsts = [[TEMPLATES[i] for i in draw.permutation(5)[:2]] for _ in range(4)]
    right_RN = np.stack([ZeroShot(prompts=two).judge(model, embedded).outcomes[0].values for two in firsts])
    two = found.metrics["2_templates"]
    assert two.value == pytest.approx(right_RN.mean())
    error = 1.959964 * right_RN.mean(1).std(ddof=1) / 2
    low, high = share_interval(right_RN.mean(0))
    assert two.ci95[0] == pytest.approx(max(0, two.value - np.hypot(two.value - low, error)))
    assert two.ci95[1] == pytest.approx(min(1, two.value + np.hypot(high - two.value, error)))
    again = PromptStudy(prompts=TEMPLATES, orders=4, seed=1).judge(model, embedded)
    assert (again.metrics, again.table, again.fingerprint) == (found.metrics, found.table, found.fingerprint)


def test_glosses_have_rows_with_and_without(model: ColourModel, colour_folder: Folder) -> None:
    embedded = embed_source(model, str(colour_folder({"red": 4, "green": 4})))
    found = PromptStudy(prompts=TEMPLATES[:2], glosses={"red": "blue", "green": "{label}, plain"}, orders=2).judge(
        model, embedded
    )
    expected = ZeroShot(prompts=TEMPLATES[:2], glosses={"red": "blue", "green": "{label}, plain"}).run(model, embedded)["top1"]
    assert found.metrics["glosses_in_parentheses"] == expected
    assert "glosses_after_a_comma" in found.metrics
    gain = found.metrics["gain_of_glosses_in_parentheses"].value
    assert gain == pytest.approx(expected.value - found.metrics["ensemble_of_embeddings"].value)
    assert "glosses for 2 classes" in found.protocol
    assert found.fingerprint != PromptStudy(prompts=TEMPLATES[:2], orders=2).judge(model, embedded).fingerprint


def test_templates_of_a_study() -> None:
    assert PromptStudy(classes="mnist").templates() == ('a photo of the number: "{label}".', "a photo of a {label}.", "{label}")
    assert len(PromptStudy().templates()) == 81
    assert PromptStudy(prompts="cifar10").templates()[0] == "a photo of a {label}."
    with pytest.raises(ValueError, match="a study compares templates, and there is only"):
        PromptStudy(prompts="mnist").templates()
    with pytest.raises(ValueError, match="at least 2, so that they can differ, got 1"):
        PromptStudy(orders=1)
    assert [steps(count) for count in (1, 2, 5, 80)] == [
        [1],
        [1, 2],
        [1, 2, 3, 4, 5],
        [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 80],
    ]


def test_charts_are_drawn_of_what_is_there() -> None:
    row = {"prompt": "x", "low": 0.1, "value": 0.2, "high": 0.3}
    assert study_charts([row | {"kind": "template", "templates": 1}]) == []
    two = [row | {"kind": "templates", "templates": number} for number in (1, 2)]
    (chart,) = study_charts(two)
    assert (chart["name"], chart["svg"].count("<polyline")) == ("templates", 3)


def test_the_command_writes_records_plots_and_a_section_of_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    wordsight.save(wordsight.create("clip-tiny"), "tiny")
    rows = []
    for i, colour in enumerate(list(COLOURS) * 2):
        Path(f"{i}.png").write_bytes(picture(COLOURS[colour]))
        rows.append(json.dumps({"path": f"{i}.png", "label": colour}))
    Path("toys-val.jsonl").write_text("\n".join(rows))
    Path("prompts.txt").write_text("a <b>{label}</b> [x]\nthe {label}\n{label}\n")
    Path("glosses.tsv").write_text("red\tcolour\n")
    words = ["tiny", "--data", "toys-val.jsonl", "--run", "run", "--prompts", "study:prompts.txt", "--glosses", "glosses.tsv"]
    done = CliRunner().invoke(command, words)
    assert done.exit_code == 0, done.output
    assert "ensemble of probabilities" in done.stdout
    records = json.loads(Path("run/results.json").read_text())
    assert {record["task"] for record in records} == {"prompt_study"}
    assert 'template "a <b>{label}</b> [x]"' in {record["metric"] for record in records}
    page = Path("run/report.html").read_text()
    assert '<h2 id="prompts">Prompt study</h2>' in page
    assert page.count('<svg class="chart"') >= 2
    assert "a &lt;b&gt;{label}&lt;/b&gt; [x]" in page
    assert "<b>{label}" not in page
    assert len(list(Path("run").glob("prompt-study-*.svg"))) == 2
    more = ["--ensemble", "probabilities", "--run", "other"]
    assert CliRunner().invoke(command, [*words, *more]).exit_code == 2
    words[-3:] = ["prompts.txt", "--glosses", "glosses.tsv"]
    done = CliRunner().invoke(command, [*words, *more, "--classes", "absent"])
    assert done.exit_code == 2
    assert "no classes 'absent'" in done.output
    assert CliRunner().invoke(command, [*words, *more]).exit_code == 0
    protocol = json.loads(Path("other/results.json").read_text())[0]["protocol"]
    assert "prompts prompts.txt (3), ensemble of probabilities, names of 1 classes given" in protocol
