"""Natural shifts on synthetic folders with a model whose answers are known; unseen drawings; the suite's items."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score
from torch import Tensor

from tests.data.test_shifts import IDS, NAMES, names_file, objectnet
from tests.evaluate.conftest import COLOURS, ColourModel, picture
from wordsight.evaluate import vendor_shift
from wordsight.evaluate.effective_robustness import ModelPoint, fit_baseline
from wordsight.evaluate.intervals import paired_bootstrap, share_interval
from wordsight.evaluate.metrics import wilson_interval
from wordsight.evaluate.robustness import BASELINE, NaturalShifts, area_under_precision, robustness_items
from wordsight.evaluate.vendor_shift import VendorShift

# three classes of ImageNet have a colour; all other names are no colours
CLASSES = {3: "red", 5: "green", 77: "blue"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """ImageNet's validation pictures of three classes (one wrong), ImageNet-A and -R of two, V2 of three; class names."""
    names_file(tmp_path / "classnames.txt")
    text = (tmp_path / "classnames.txt").read_text()
    for i, colour in CLASSES.items():
        text = text.replace(f"{IDS[i]} {NAMES[IDS[i]]}\n", f"{IDS[i]} {colour}\n")
    (tmp_path / "classnames.txt").write_text(text)

    def put(folder: str, name: str, colours: Sequence[str]) -> None:
        (tmp_path / folder / name).mkdir(parents=True)
        for k, colour in enumerate(colours):
            (tmp_path / folder / name / f"{k}.png").write_bytes(picture(COLOURS[colour], (20 + k, 16)))

    put("imagenet/images/val", IDS[3], ["red"] * 4)
    put("imagenet/images/val", IDS[5], ["green"] * 3 + ["red"])
    put("imagenet/images/val", IDS[77], ["blue"] * 4)
    put("imagenet-adversarial/imagenet-a", IDS[3], ["red", "green"])
    put("imagenet-adversarial/imagenet-a", IDS[5], ["green", "red", "red", "red"])
    put("imagenet-rendition/imagenet-r", IDS[3], ["red", "red"])
    put("imagenet-rendition/imagenet-r", IDS[77], ["blue", "blue"])
    put("imagenet-o", IDS[3], ["yellow"] * 2)
    put("imagenet-o", IDS[5], ["grey"] * 3)
    return tmp_path


def test_subsets_are_classified_among_themselves(model: ColourModel, root: Path) -> None:
    found = NaturalShifts(root=root, sets=("imagenet_a", "imagenet_r"), prompts="name").judge(model)
    metrics = found.metrics
    assert (metrics["imagenet_a_top1"].value, metrics["imagenet_a_top1"].count) == (2 / 6, 6)
    assert metrics["imagenet_a_top1"].chance == 1 / 2, "two classes, not 1,000"
    assert metrics["imagenet_a_top1"].ci95 == wilson_interval(2, 6)
    assert metrics["imagenet_a_in_top1"].value == 7 / 8
    assert metrics["imagenet_a_in_top1"].count == 8, "ImageNet's pictures of these two classes"
    assert metrics["imagenet_r_in_top1"].value == 1.0
    assert metrics["average_top1"].value == pytest.approx((2 / 6 + 1) / 2)
    low, high = wilson_interval(2, 6)
    low_r, _ = wilson_interval(4, 4)
    assert metrics["average_top1"].ci95[0] == pytest.approx(2 / 3 - np.hypot(1 / 3 - low, 1 - low_r) / 2)
    assert metrics["average_top1"].ci95[1] == pytest.approx(2 / 3 + (high - 1 / 3) / 2)
    assert found.table[0] == {
        "set": "ImageNet-A", "classes": 2, "count shift": 6, "top1 shift": 2 / 6, "count in": 8, "top1 in": 7 / 8,
    }  # fmt: skip
    assert found.outcomes[0].values.mean() == pytest.approx(2 / 6)
    alone = NaturalShifts(root=root, sets=("imagenet_a",), prompts="name").run(model)
    assert alone["imagenet_a_top1"] == metrics["imagenet_a_top1"]
    assert "average_top1" not in alone


def test_effective_robustness_against_a_table(model: ColourModel, root: Path) -> None:
    table = root / "models.csv"
    rows = [("m0", 0.5, 0.3), ("m1", 0.7, 0.45), ("m2", 0.8, 0.6), ("m3", 0.9, 0.7)]
    lines = [f"{name},imagenet_a,{inside},{shifted}\n" for name, inside, shifted in rows]
    table.write_text("model,shift,accuracy_in,accuracy_shift\n" + "".join(lines) + "m0,imagenet_r,0.5,0.5\n")
    found = NaturalShifts(root=root, sets=("imagenet_a",), prompts="name", baseline=table).judge(model)
    line = fit_baseline([ModelPoint(model=n, shift="imagenet_a", accuracy_in=a, accuracy_shift=b) for n, a, b in rows])
    rho = found.metrics["imagenet_a_effective_robustness"]
    assert rho.value == pytest.approx(2 / 6 - line.predict(7 / 8))
    assert rho.ci95[0] <= rho.value <= rho.ci95[1]
    assert "baseline models.csv" in found.protocol
    assert found.table[0]["baseline"] == [list(row) for row in rows], "to be drawn"
    suite = {item.name: item for item in robustness_items(root)}
    assert suite["imagenet-a"].evaluator.baseline is None
    (root / BASELINE).write_text(table.read_text())
    suite = {item.name: item for item in robustness_items(root)}
    assert (root / BASELINE) in dict(suite["imagenet-a"].needs), "another table is another measurement"
    again = suite["imagenet-a"].judge(model)
    assert again.metrics["imagenet_a_effective_robustness"].value != 0
    (root / BASELINE).write_text("".join(line for line in table.read_text().splitlines(True) if "imagenet_r" not in line))
    unknown = suite["imagenet-r"].judge(model)
    assert "imagenet_r: no model of the baseline was measured on it" in unknown.notes
    assert "imagenet_r_effective_robustness" not in unknown.metrics
    with pytest.raises(ValueError, match="has 1 models of imagenet_r; a line needs 3"):
        NaturalShifts(root=root, sets=("imagenet_r",), prompts="name", baseline=table).judge(model)


def test_anomalies_are_told_by_doubt(model: ColourModel, root: Path) -> None:
    found = NaturalShifts(root=root, sets=("imagenet_o",), prompts="name").judge(model)
    aupr = found.metrics["imagenet_o_aupr"]
    assert aupr.chance == 5 / 13
    assert aupr.count == 13
    assert aupr.chance < aupr.value <= 1.0, "yellow and grey are less surely red or green than red and green are"
    assert found.table[0]["top1 shift"] is None


def test_area_under_precision_is_sklearns_and_at_chance_for_noise() -> None:
    draw = np.random.default_rng(0)
    anomalies, ordinary = draw.normal(1, 1, 60).round(1), draw.normal(0, 1, 200).round(1)
    found = area_under_precision(anomalies, ordinary)
    truth = np.repeat([1, 0], [60, 200])
    assert found.value == average_precision_score(truth, np.concatenate([anomalies, ordinary]))
    assert found.ci95[0] < found.value < found.ci95[1]
    noise = area_under_precision(draw.normal(size=400), draw.normal(size=1200))
    assert noise.ci95[0] < 0.25 * 1.05
    assert noise.value == pytest.approx(0.25, abs=0.04)


def test_objectnet_under_its_own_names(model: ColourModel, tmp_path: Path) -> None:
    objectnet(tmp_path)  # pictures are blue in a red frame; classes "alarm clock" and "mug", no colours
    for i in (7, 11, 12):
        folder = tmp_path / "imagenet" / "images" / "val" / IDS[i]
        folder.mkdir(parents=True)
        (folder / "0.png").write_bytes(picture(COLOURS["red"]))
    names_file(tmp_path / "classnames.txt")
    found = NaturalShifts(root=tmp_path, sets=("objectnet",), prompts="name").judge(model)
    assert found.metrics["objectnet_top1"].count == 2
    assert found.metrics["objectnet_in_top1"].count == 3
    assert found.metrics["objectnet_top1"].chance == 1 / 2


def test_clips_names_stand_in_where_there_is_no_list(model: ColourModel, tmp_path: Path) -> None:
    for identity in ("n01440764", "n01443537"):
        for folder in ("imagenet/images/val", "imagenet-rendition/imagenet-r"):
            (tmp_path / folder / identity).mkdir(parents=True)
            (tmp_path / folder / identity / "0.png").write_bytes(picture(COLOURS["red"]))
    found = NaturalShifts(root=tmp_path, sets=("imagenet_r",)).judge(model)
    assert found.metrics["imagenet_r_top1"].chance == 1 / 2
    assert "prompts imagenet80 (80)" in found.protocol


def test_what_is_missing_or_wrong(model: ColourModel, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="ImageNet-Sketch is not complete"):
        NaturalShifts(root=tmp_path, sets=("imagenet_sketch",)).judge(model)
    with pytest.raises(ValueError, match="no natural shift 'sketch'"):
        NaturalShifts(root=tmp_path, sets=("sketch",))
    with pytest.raises(ValueError, match="one or more different ones"):
        NaturalShifts(root=tmp_path, sets=("imagenet_a", "imagenet_a"))


# -------------------------------------------------------------------------------------------------------- unseen drawings


class Knower(ColourModel):
    """Knows every word by a vector of its own, and every picture by the mean of its pixels: at chance on drawings."""

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        return torch.tensor([[sum(map(ord, text)) % 9973] for text in texts])

    def encode_text(self, tokens: Tensor, *, normalize: bool = True) -> Tensor:
        return torch.stack([torch.randn(3, generator=torch.Generator().manual_seed(int(token))) for token in tokens[:, 0]])


def test_drawings_are_compared_by_concept(monkeypatch: pytest.MonkeyPatch, colour_folder: Callable[..., Path]) -> None:
    """Two seen vendors and an unseen one, in small: what is drawn by one vendor only counts with that one."""
    rights = [{"a": True, "b": True, "c": False}, {"a": True, "b": False}, {"a": False, "b": True, "c": False, "d": True}]
    groups = {"a": "g1", "b": "g2", "c": "g2", "d": "g3"}
    found = vendor_shift._compare("trained", ["noto", "fluent"], rights, groups, 4)
    assert found.metrics["trained_seen_drawing_top1"].value == pytest.approx((1 + 0.5 + 0) / 3)
    assert found.metrics["trained_unseen_drawing_top1"].value == pytest.approx(1 / 3)
    assert found.metrics["trained_drop"].value == pytest.approx(1 / 6)
    assert found.metrics["trained_drop"].count == 3, "d has no seen drawing"
    assert found.metrics["trained_fluent_top1"].count == 2
    assert found.outcomes[0].groups == ("g1", "g2", "g2")
    seen, unseen = np.array([1, 0.5, 0]), np.array([0.0, 1, 0])
    assert found.metrics["trained_drop"].ci95 == paired_bootstrap(seen, unseen, ("g1", "g2", "g2")).ci95
    assert found.metrics["trained_unseen_drawing_top1"].ci95 == share_interval(unseen, ("g1", "g2", "g2"))


def test_a_model_that_knows_no_drawing_is_at_chance_in_all() -> None:
    found = VendorShift(prompts="name").judge(Knower())
    for name, metric in found.metrics.items():
        if not name.endswith("_drop"):
            assert metric.chance is not None
            assert metric.ci95[0] <= metric.chance * 3, name
            assert metric.value < 0.02, name
    for name in ("trained_drop", "heldout_drop"):
        assert found.metrics[name].ci95[0] <= 0 <= found.metrics[name].ci95[1]
    assert found.metrics["trained_drop"].count == 1607
    assert any("this side is no test" in note for note in found.notes)
    assert [row["concepts"] for row in found.table] == ["trained", "heldout"]


# -------------------------------------------------------------------------------------------------------------- the suite


def test_items_say_what_they_need(tmp_path: Path) -> None:
    assert [item.name for item in robustness_items(None)] == ["corruptions-sample", "vendor-shift"]
    items = robustness_items(tmp_path)
    assert [item.name for item in items[2:]] == [
        "imagenetv2", "imagenet-sketch", "imagenet-a", "imagenet-r", "objectnet", "imagenet-o", "natural-shifts", "geode",
        "dollar-street",
    ]  # fmt: skip
    assert not any(item.needs for item in items[:2])
    for item in items[2:-2]:
        assert item.needs[0][0] == tmp_path / "imagenet" / "images" / "val"
    for item in items[2:]:
        assert all(not path.exists() and what for path, what in item.needs)


def test_an_item_judges(model: ColourModel, root: Path) -> None:
    item = next(item for item in robustness_items(root) if item.name == "imagenet-a")
    assert all(path.exists() for path, _ in item.needs)
    found = item.judge(model, batch_size=3)
    assert found.task == "natural_shifts"
    assert found.metrics["imagenet_a_top1"].value == 2 / 6


def test_geography_is_an_item(model: ColourModel, tmp_path: Path) -> None:
    folder = tmp_path / "geode"
    (folder / "images").mkdir(parents=True)
    rows = ["file_path,object,region"]
    for i in range(24):
        colour = ("red", "green")[i % 2]
        (folder / "images" / f"{i}.png").write_bytes(picture(COLOURS["red" if i > 17 else colour], (20 + i, 16)))
        rows.append(f"{i}.png,{colour},{('Africa', 'Europe')[i >= 12]}")
    (folder / "index.csv").write_text("\n".join(rows) + "\n")
    item = next(item for item in robustness_items(tmp_path) if item.name == "geode")
    found = item.judge(model)
    assert found.metrics["top1"].value == 21 / 24
    assert found.metrics["region_worst"].value == 9 / 12
    assert found.metrics["region_gap"].value == 3 / 12
    street = next(item for item in robustness_items(tmp_path) if item.name == "dollar-street")
    with pytest.raises(FileNotFoundError, match="Dollar Street is not complete"):
        street.judge(model)
