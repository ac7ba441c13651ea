"""Comparisons: paired tests against direct computation, what must not be tested, pages and tables that keep to themselves."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from wordsight.evaluate.compare import Comparison, bootstrap_draws, compare, holm, paired_test, read_runs
from wordsight.evaluate.compare_report import FILES, latex, render_html, render_latex, render_markdown, write_comparison
from wordsight.evaluate.intervals import paired_bootstrap
from wordsight.evaluate.kept import Kept, read_kept, write_kept
from wordsight.evaluate.results import Outcomes, write_results
from wordsight.types import Metric

NASTY = "a&b_{c}<script>alert(1)</script>|$x^2~\\end{tabular}% #1"


def outcomes(values: Any, keys: Any = None, groups: Any = None, metric: str = "top1") -> Outcomes:
    values = np.asarray(values, np.float64)
    keys = tuple(keys if keys is not None else (f"k{i}" for i in range(len(values))))
    return Outcomes(metric=metric, keys=keys, values=values, groups=None if groups is None else tuple(groups))


def keep(folder: Path, values: Any, *, item: str = "one", name: str | None = None, **more: Any) -> Kept:
    """A measurement on disk, `folder/item/`."""
    outcome = values if isinstance(values, Outcomes) else outcomes(values)
    value = float(outcome.values.mean())
    fields: dict[str, Any] = {
        "item": item,
        "model": {
            "name": name or folder.name,
            "weights": f"w-{folder.name}",
            "gflops": 3.0 + len(folder.name),
            "num_parameters": 5,
        },
        "task": "zero_shot",
        "data": item,
        "split": "test",
        "metrics": {"top1": Metric(value, len(outcome.keys), (max(0.0, value - 0.1), min(1.0, value + 0.1)), chance=0.1)},
        "protocol": "zero-shot",
        "fingerprint": "f" * 32,
        "headline": "top1",
        "versions": {"torch": "2.6"},
        "outcomes": (outcome,),
    }
    kept = Kept(**fields | more)
    write_kept(folder / item, kept)
    return kept


def test_what_is_kept_is_read_back(tmp_path: Path) -> None:
    grouped = outcomes([0.25, 1, 0], ["a", "b", "a"], ["x", "y", "x"], metric="recall")
    odd = outcomes([1, 0], ["bad-\udcff", "ü"])
    kept = keep(tmp_path / "m", odd, notes=("a note",), table=[{"label": "x", "right": 1}])
    write_kept(
        tmp_path / "m" / "one",
        Kept(**{name: getattr(kept, name) for name in kept.__dataclass_fields__} | {"outcomes": (odd, grouped)}),
    )
    found = read_kept(tmp_path / "m" / "one")
    assert found is not None
    assert (found.metrics, found.notes, found.table, found.model) == (kept.metrics, ("a note",), kept.table, kept.model)
    assert found.outcomes[0].keys == ("bad-\\udcff", "ü")
    assert found.outcomes[1].groups == ("x", "y", "x")
    assert found.outcomes[1].values.tolist() == [0.25, 1, 0]
    assert read_kept(tmp_path / "m" / "none") is None
    for damage in ('{"format": 1}', '{"format": 2}', "[]"):
        (tmp_path / "m" / "one" / "finding.json").write_text(damage, encoding="utf-8")
        with pytest.raises(ValueError, match="measure again"):
            read_kept(tmp_path / "m" / "one")


def test_right_or_wrong_is_mcnemars_on_the_samples_of_both() -> None:
    draw = np.random.default_rng(0)
    first, second = draw.random(300) < 0.7, draw.random(300) < 0.6
    mine = outcomes(first[:280], [f"k{i}" for i in range(280)])
    order = draw.permutation(np.arange(20, 300))
    theirs = outcomes(second[order], [f"k{i}" for i in order])
    test = paired_test(mine, theirs, model="a", baseline="b")
    assert test is not None
    assert (test.count, test.only_model, test.only_baseline, test.num_groups) == (260, 20, 20, 260)
    a, b = first[20:280], second[20:280]
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    assert test.p_value == pytest.approx(stats.binomtest(only_a, only_a + only_b).pvalue)
    assert test.difference == pytest.approx((only_a - only_b) / 260)
    assert test.method == "McNemar"
    assert test.ci95[0] < test.difference < test.ci95[1]


def test_groups_and_shares_are_bootstrapped() -> None:
    draw = np.random.default_rng(1)
    groups = np.repeat(np.arange(40), 5)
    first = (np.repeat(draw.random(40), 5) < 0.6).astype(float)
    second = (np.repeat(draw.random(40), 5) < 0.5).astype(float)
    test = paired_test(outcomes(first, groups=groups), outcomes(second, groups=groups), model="a", baseline="b")
    assert test is not None
    direct = paired_bootstrap(first, second, groups, draws=5000)
    assert (test.method, test.num_groups, test.count) == ("paired bootstrap", 40, 200)
    assert (test.p_value, test.ci95) == (direct.p_value, direct.ci95)
    alone = paired_test(outcomes(first), outcomes(second), model="a", baseline="b")
    assert alone is not None
    assert alone.method == "McNemar"
    assert alone.p_value < test.p_value, "five copies of a sample are no five samples"
    shares = paired_test(outcomes(draw.random(30)), outcomes(draw.random(30)), model="a", baseline="b")
    assert shares is not None
    assert shares.method == "paired bootstrap"
    singles = paired_test(
        outcomes(first[:30], groups=range(30)), outcomes(second[:30], groups=range(30)), model="a", baseline="b"
    )
    assert singles is not None
    assert singles.method == "McNemar", "groups of one sample are no groups"


def test_samples_of_one_name_are_paired_in_turn() -> None:
    test = paired_test(
        outcomes([1, 0, 1], ["a", "a", "b"]), outcomes([1, 1, 0, 1], ["b", "a", "a", "a"]), model="m", baseline="n"
    )
    assert test is not None
    assert (test.count, test.only_baseline, test.difference) == (3, 1, 0.0)
    assert paired_test(outcomes([1], ["a"]), outcomes([1], ["b"]), model="m", baseline="n") is None


@given(st.lists(st.floats(0, 1), max_size=12))
@settings(max_examples=60, deadline=None)
def test_holm_is_the_published_procedure(p_values: list[float]) -> None:
    adjusted = holm(p_values)
    order = np.argsort(p_values, kind="stable")
    for level in (0.01, 0.05, 0.3):
        rejected = set()
        for place, i in enumerate(order):  # step down until the first that is not rejected
            if p_values[i] * (len(p_values) - place) > level:
                break
            rejected.add(int(i))
        assert {i for i, p in enumerate(adjusted) if p <= level} == rejected


def three(root: Path) -> Comparison:
    draw = np.random.default_rng(2)
    truth = draw.random((4, 200))
    for name, skill in (("good", 0.8), ("middling", 0.5), ("same", 0.5)):
        for k, item in enumerate(("first", "second", "third", "fourth")):
            keep(root / "run" / name, truth[k] < skill, item=item, order=k)
    return compare(read_runs([root / "run"]), baseline="middling")


def test_three_models_against_the_one_in_the_middle(tmp_path: Path) -> None:
    found = three(tmp_path)
    assert [run.name for run in found.runs] == ["middling", "good", "same"]
    assert [row.title for row in found.rows] == ["first", "second", "third", "fourth"]
    tests = [test for row in found.rows for test in row.tests]
    assert len(tests) == 8
    assert all(test.p_holm < 1e-4 and test.difference > 0.2 for test in tests if test.model == "good")
    assert all(test.p_holm == test.p_value == 1 and test.difference == 0 for test in tests if test.model == "same")
    assert found.means["good"].value == pytest.approx(np.mean([row.figures["good"].value for row in found.rows]))
    table = render_markdown(found)
    assert re.search(r"\| first \| top-1 accuracy \| [^|]+ \| [^|]+%\); \+\d+\.\d \(\+\d", table), "with the difference"
    assert "| mean of 4 measurements |" in table
    assert found.means["good"].ci95[1] - found.means["good"].value == pytest.approx(0.1 / 2), "four equal half-widths"


def test_what_was_measured_differently_is_not_tested(tmp_path: Path) -> None:
    hits = np.arange(50) % 2
    keep(tmp_path / "a", hits)
    keep(tmp_path / "b", hits, protocol="zero-shot with other prompts")
    keep(tmp_path / "c", hits, listing="other pictures", versions={"torch": "2.7"})
    keep(tmp_path / "d", hits[:40], listing="pictures", model={"name": "d", "weights": "w-a"})
    keep(tmp_path / "e", outcomes(hits[:1]))
    keep(tmp_path / "a", hits, listing="pictures")
    found = compare(read_runs([tmp_path / name for name in "abcde"]))
    (row,) = found.rows
    assert not row.comparable
    assert [(test.model, test.count, test.only_baseline) for test in row.tests] == [("c", 50, 0), ("d", 40, 10)]
    assert "b and a were measured differently" in row.warnings[0]
    assert row.warnings[1] == "the data of c and a differ: samples are paired by their names"
    assert "10 samples that one of them lacks" in row.warnings[2]
    assert "too few samples in common" in row.warnings[3]
    assert found.means == {}
    assert "made with different versions of torch: 2.6, 2.7" in found.notes
    assert "a and d have the same weights" in found.notes
    assert "measured differently" in render_html(found)
    assert "measured differently" in render_markdown(found)


def test_a_figure_that_is_no_mean_over_samples_is_said_to_be_untested(tmp_path: Path) -> None:
    figures = {name: Metric(0.5, 30, (0.4, 0.6), chance=0.1) for name in ("map_11_point", "top1")}
    for name in ("a", "b"):
        keep(tmp_path / name, np.arange(30) % 2, item="voc_sets", metrics=figures, headline="map_11_point")
    (row,) = compare(read_runs([tmp_path / "a", tmp_path / "b"])).rows
    assert (row.title, row.tests) == ("voc sets", ())
    assert row.warnings == ("b and a are not tested: mAP, 11-point is no mean over samples, compare the intervals",)


def test_more_tests_get_more_draws(tmp_path: Path) -> None:
    """With 5,000 draws the smallest p of 150 tests would be .06 after adjustment, and no difference could be sure."""
    assert (bootstrap_draws(3), bootstrap_draws(150), bootstrap_draws(10**6)) == (5000, 15_000, 50_000)
    groups = [str(i // 2) for i in range(400)]
    draw = np.random.default_rng(0)
    for name, share in (("a", 0.1), ("b", 0.9)):
        for k in range(80):
            keep(tmp_path / name, outcomes(draw.random(400) < share, groups=groups), item=f"set-{k}", order=k)
    found = compare(read_runs([tmp_path / "a", tmp_path / "b"]))
    assert all(test.method == "paired bootstrap" and test.p_holm < 0.05 for row in found.rows for test in row.tests)
    assert "no smaller than 0.00025 before" in render_markdown(found)


def test_results_without_outcomes_are_shown_only(tmp_path: Path) -> None:
    record = {"task": "zero_shot", "data": "one", "split": "test", "metric": "top1", "value": 0.4, "count": 9, "ci95": (0.2, 0.6)}
    record |= {"chance": 0.1, "protocol": "zero-shot", "fingerprint": "f"}
    write_results(tmp_path / "old", [record])
    keep(tmp_path / "new", [0, 1])
    found = compare(read_runs([tmp_path / "new", tmp_path / "old"]))
    assert {name: metric.value for name, metric in found.rows[0].figures.items()} == {"new": 0.5, "old": 0.4}
    assert found.rows[0].tests == ()
    assert "no sample's outcome is kept of old" in found.notes[0]


def test_names_and_the_baseline(tmp_path: Path) -> None:
    for run in ("x", "y"):
        keep(tmp_path / run / "clip", [0, 1])
    runs = read_runs([tmp_path / "x", tmp_path / "y"])
    assert [run.name for run in runs] == ["x/clip", "y/clip"]
    assert compare(runs, baseline=tmp_path / "y").baseline.name == "y/clip"
    assert compare(runs, baseline="y/clip").baseline.name == "y/clip"
    with pytest.raises(ValueError, match="is none of the runs; give one of their names: x/clip, y/clip"):
        compare(runs, baseline="z")
    with pytest.raises(ValueError, match="two models or more, got x/clip"):
        compare(runs[:1])
    with pytest.raises(ValueError, match="no measurement has a metric 'top7'"):
        compare(runs, metrics=("top7",))
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(FileNotFoundError):
            read_runs([path])


class References(HTMLParser):
    """Everything on a page that could ask for an address or run."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "link", "iframe", "object", "embed", "base", "form"):
            self.found.append(tag)
        self.found += [
            f"{name}={value}"
            for name, value in attrs
            if name.startswith("on") or (name in ("src", "href", "xlink:href", "action") and not (value or "").startswith("#"))
        ]


def test_pages_and_tables_keep_to_themselves(tmp_path: Path) -> None:
    for name in ("good", "bad"):
        keep(tmp_path / name, np.arange(30) % 2, item="x", name=NASTY + name, protocol=f"{NASTY} {name}", data=NASTY, split=NASTY)
    found = compare(read_runs([tmp_path / "good", tmp_path / "bad"]))
    files = write_comparison(tmp_path / "out", found)
    assert [path.name for path in files] == list(FILES)
    page = files[0].read_text(encoding="utf-8")
    parser = References()
    parser.feed(page)
    assert parser.found == []
    assert "<script" not in page
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org/2000/svg)", page)
    assert json.loads(files[3].read_text())["models"][0]["name"] == NASTY + "good"
    table = files[1].read_text(encoding="utf-8").splitlines()[2:5]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {6}, "names break no column"


def test_latex_is_text(tmp_path: Path) -> None:
    escaped = latex(NASTY)
    assert escaped.startswith(r"a\&b\_\{c\}$<$script$>$alert(1)")
    assert r"\textbackslash{}end\{tabular\}\% \#1" in escaped
    bare = re.sub(r"\\[&_{}%#$]|\\text[a-z]+\{\}|\$[<>]\$", "", escaped)
    assert not set("&%$#_{}~^\\") & set(bare)
    source = render_latex(three(tmp_path))
    assert source.count("$^{*}$") == 4, "one model differs, in each of four measurements"
    rows = [line for line in source.splitlines() if line.endswith(r" \\")]
    assert {len(re.findall(r"(?<!\\)&", row)) for row in rows} == {5}
    assert [line for line in source.splitlines() if line.startswith("Mean")]


def test_charts_have_every_model(tmp_path: Path) -> None:
    page = render_html(three(tmp_path))
    dots, scaling = re.findall(r"<svg.*?</svg>", page, re.S)
    assert len(re.findall("<circle", dots)) == 12
    assert len(re.findall("<circle", scaling)) == 3
    assert "torch.utils.flop_counter" in page
