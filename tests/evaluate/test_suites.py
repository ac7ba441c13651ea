"""The suites that have names: what they need, what they judge in each layout, and a random model at chance in all of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from scipy import stats
from sklearn.metrics import f1_score

import wordsight
from tests.data.test_evaluation_layouts import clip_benchmark, npy, saved
from tests.evaluate.conftest import COLOURS, ColourModel, picture
from tests.evaluate.failures.test_readers import MAKERS
from wordsight.data.layouts import LAYOUTS
from wordsight.evaluate import ZeroShot, embed_source
from wordsight.evaluate.failures import generated
from wordsight.evaluate.prompt_sets import prompt_set
from wordsight.evaluate.published import Published, macro_f1
from wordsight.evaluate.suite import Candidate, SuiteItem, run_suite
from wordsight.evaluate.suites import CLIP27, DATACOMP, SUITES, clip27, datacomp38, failures, quick
from wordsight.evaluate.task_metrics import published as published_metrics
from wordsight.types import Metric


def run(items: list[SuiteItem], model: object, folder: Path) -> dict[str, dict[str, Metric]]:
    outcome = run_suite(items, [Candidate(name="model", load=lambda: model)], folder)
    assert outcome.failed == ()
    return {kept.item: kept.metrics for _, kept in outcome.measured}


def test_every_suite_opens_and_says_what_it_needs(tmp_path: Path) -> None:
    for name, suite in SUITES.items():
        items = suite(tmp_path)
        assert len({item.name for item in items}) == len(items)
        missing = [item for item in items if item.missing]
        assert all(what for item in missing for _, what in item.missing)
        assert bool(missing) == (name in ("clip27", "datacomp38", "robustness"))
    assert (len(clip27(tmp_path)), len(datacomp38(tmp_path))) == (27, 36)
    assert (len(set(CLIP27)), len(set(DATACOMP))) == (27, 34)


def test_the_metrics_are_the_published_ones(tmp_path: Path) -> None:
    table = published_metrics()
    for suite, name in ((clip27, "clip27"), (datacomp38, "datacomp38")):
        told = sorted(one["metric"] for one in table[name])
        ours = [item.metric for item in suite(tmp_path)]
        ours = [
            "worst_group_top1" if one == "region_worst" else "worst_group_top5" if one == "income_worst" else one for one in ours
        ]
        left_out = ["jaccard", "worst_region_top1"] if name == "datacomp38" else []
        assert sorted([*ours, *left_out]) == told  # type: ignore[list-item]
    for item in clip27(tmp_path):
        assert item.evaluator.prompts is not None
        prompt_set(item.evaluator.prompts)


# A random model


def at_chance(metrics: dict[str, Metric], tests: int) -> list[str]:
    """The figures whose interval, widened for so many tests, leaves chance out."""
    wider = stats.norm.isf(0.025 / tests) / stats.norm.isf(0.025)
    return [
        name
        for name, metric in metrics.items()
        if metric.chance is not None
        and not metric.value - wider * (metric.value - metric.ci95[0]) - 1e-9
        <= metric.chance
        <= metric.value + wider * (metric.ci95[1] - metric.value) + 1e-9
    ]


def test_a_random_model_is_at_chance_everywhere(tmp_path: Path) -> None:
    """Scores of a random network all lean one way, so Winoground's text, image and group scores can only be below their chance,
    which is that of scores without any leaning."""
    items = [item for item in quick(tmp_path) if item.name.endswith("unseen")]
    items += [SuiteItem(name=mode.name, evaluator=mode) for mode in generated(80, seed=3)]
    found = run(items, wordsight.create("clip-tiny", seed=0), tmp_path / "run")
    assert len(found) == 12
    tests = sum(len(metrics) for metrics in found.values())
    assert tests > 40
    for item, metrics in found.items():
        leaning = {name for name in ("text", "image", "group") if name in metrics}
        assert at_chance({name: metric for name, metric in metrics.items() if name not in leaning}, tests) == [], item
        for name in leaning:
            assert metrics[name].ci95[0] <= metrics[name].chance, (item, name)  # type: ignore[operator]
    honest = found["zero-shot-unseen"]["top5"]
    assert at_chance(
        {"top5": Metric(honest.value + 0.1, honest.count, (honest.ci95[0] + 0.1, honest.ci95[1] + 0.1), "", honest.chance)}, tests
    )


def test_published_tests_are_in_the_failures_where_they_lie(tmp_path: Path) -> None:
    assert [item.name for item in failures(tmp_path)] == [mode.name for mode in generated()]
    places = {"aro-relation": "aro", "aro-attribution": "aro", "aro-order": "aro", "clevr-counts": "CLEVR_v1.0"}
    for name, make in MAKERS.items():
        make(tmp_path / places.get(name, name))
    items = failures(tmp_path)[len(generated()) :]
    found = run(items, wordsight.create("clip-tiny", seed=0), tmp_path / "run")
    files = {"aro-order": "aro-order-coco_order", "valse": "valse-actant-swap", "nlvr2": "nlvr2-dev"}
    assert sorted(found) == sorted(files.get(name, name) for name in MAKERS)
    assert set(found["winoground"]) == {"accuracy", "text", "image", "group"}


# Published sets in their layouts


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Small stand-ins of published sets, each in another layout."""
    root = tmp_path / "data"
    colours = list(COLOURS)
    cifar = clip_benchmark(root / "wds_cifar10", [0, 1, 2, 1, 0, 2], names="red\ngreen\nblue\n")
    assert (cifar / "test" / "0.tar").exists()
    for label in range(3):  # MNIST in class folders, by number
        (root / "mnist" / "test" / str(label)).mkdir(parents=True)
        for i in range(4):
            (root / "mnist" / "test" / str(label) / f"{i}.png").write_bytes(picture(COLOURS[colours[label]], (20 + i, 16)))
    images = [{"bytes": picture(COLOURS[colour]), "path": None} for colour in colours[:2] * 3]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = pa.table({"image": pa.array(images, kind), "label": pa.array([0, 1] * 3)})
    saved(root / "renderedsst2" / "test", rows)
    (root / "renderedsst2" / "test" / "dataset_info.json").write_text(
        json.dumps(
            {"features": {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["negative", "positive"]}}}
        )
    )
    clip_benchmark(
        root / "wds_voc2007_multilabel", [npy([1, 0, 1]), npy([0, 1, 0]), npy([1, 1, 0])], suffix="npy", kind="multilabel"
    )
    clip_benchmark(
        root / "wds_flickr30k", ["a red one\nsome red", "a green one", "a blue one"], suffix="txt", kind="retrieval", names=""
    )
    clip_benchmark(root / "wds_wilds-iwildcam_test", [0, 1, 1, 2, 0], names="cat\ndog\nowl\n")
    folder = root / LAYOUTS["eurosat"].folder
    split: dict[str, list[list[object]]] = {"train": [], "val": [], "test": []}
    for number, name in enumerate(("Forest", "River")):
        (folder / "2750" / name).mkdir(parents=True)
        for part, rows_of in split.items():
            (folder / "2750" / name / f"{part}.png").write_bytes(picture(COLOURS["green"]))
            rows_of.append([f"{name}/{part}.png", number, name])
    (folder / "split_zhou_EuroSAT.json").write_text(json.dumps(split))
    return root


def test_sets_are_judged_in_whatever_layout_they_lie(root: Path, model: ColourModel, tmp_path: Path) -> None:
    wanted = ("cifar10", "mnist", "renderedsst2", "voc2007_multilabel", "eurosat")
    items = [item for item in clip27(root) if not item.missing]
    assert sorted(item.name for item in items) == sorted(wanted)
    found = run(items, model, tmp_path / "run")
    assert found["cifar10"]["top1"].count == 6
    assert found["mnist"]["top1"].chance == pytest.approx(1 / 10), "all ten digits, though three have pictures"
    assert found["renderedsst2"]["top1"].count == 6
    assert list(found["voc2007_multilabel"]) == ["map", "map_11_point", "top1_any"]
    more = [item for item in datacomp38(root) if item.name in ("iwildcam", "flickr30k")]
    found = run(more, model, tmp_path / "more")
    assert found["iwildcam"]["macro_f1"].count == 5
    both = found["flickr30k"]
    assert both["mean_recall@1"].value == (both["image_to_text_R@1"].value + both["text_to_image_R@1"].value) / 2


def test_a_sets_own_names_and_templates_are_taken_first(root: Path, model: ColourModel) -> None:
    (item,) = [item for item in clip27(root) if item.name == "cifar10"]
    assert isinstance(item.evaluator, Published)
    found = item.evaluator.judge(model)
    assert found.protocol.endswith("names and templates: the data's own")
    embedded = embed_source(model, root / "wds_cifar10" / "test")
    plain = ZeroShot(classes=("red", "green", "blue"), prompts=("a photo of a {label}.", "a {label}")).judge(model, embedded)
    assert found.metrics == plain.metrics
    (digits,) = [item for item in clip27(root) if item.name == "mnist"]
    assert "source" not in digits.evaluator.judge(model).protocol
    assert digits.evaluator.judge(model).metrics["top1"].count == 12


def test_a_set_without_classes_of_its_own_is_named(tmp_path: Path, model: ColourModel) -> None:
    (tmp_path / "svhn" / "test" / "0").mkdir(parents=True)
    (tmp_path / "svhn" / "test" / "0" / "a.png").write_bytes(picture(COLOURS["red"]))
    (item,) = [item for item in datacomp38(tmp_path) if item.name == "svhn"]
    with pytest.raises(ValueError, match="brings no class names and templates, and none are known for SVHN"):
        item.evaluator.judge(model)


def test_macro_f1_is_scikit_learns() -> None:
    draw = np.random.default_rng(0)
    targets = draw.integers(0, 5, 300)
    predicted = np.where(draw.random(300) < 0.6, targets, draw.integers(0, 6, 300))
    found = macro_f1(targets, predicted, 6)
    assert found.value == pytest.approx(f1_score(targets, predicted, average="macro", labels=np.unique(targets)))
    assert found.ci95[0] < found.value < found.ci95[1]
    guesses = [macro_f1(targets, draw.integers(0, 6, 300), 6).value for _ in range(30)]
    assert np.mean(guesses) == pytest.approx(found.chance, abs=0.015)
