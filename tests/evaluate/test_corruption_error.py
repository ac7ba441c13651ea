"""The corruption error by closed forms, and the evaluator on a model that reads colours."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.evaluate.conftest import COLOURS, ColourModel
from wordsight.data import open_source
from wordsight.data.few_shot import label_source
from wordsight.data.transform import Preprocess
from wordsight.evaluate.corruption_error import ALEXNET, Corruptions, _at_size, baseline_of, corruption_metrics
from wordsight.evaluate.corruptions import COMMON

Folder = Callable[..., Path]
KINDS = ("fog", "contrast", "pixelate")


class Preprocessed(ColourModel):
    """The colour model with a preprocessor whose numbers are those of its `preprocess`."""

    def __init__(self) -> None:
        super().__init__()
        self.preprocessor = Preprocess(image_size_px=8, resize="squash", mean=(0.4, 0.4, 0.4), std=(1.0, 1.0, 1.0))


def rights(shares: Sequence[float], count: int = 40) -> np.ndarray:
    """bool [K, 5, count] with a share of each kind right."""
    return np.stack([np.tile(np.arange(count) < round(share * count), (5, 1)) for share in shares])


def test_a_baseline_measured_against_itself_is_100() -> None:
    right = rights((0.5, 0.25, 0.75))
    clean = np.arange(40) < 36
    errors = {"clean": 0.1} | dict(zip(KINDS, (0.5, 0.75, 0.25), strict=True))
    found = corruption_metrics(clean, right, KINDS, baseline=errors)
    assert found["mCE"].value == pytest.approx(100)
    assert found["relative_mCE"].value == pytest.approx(100)
    assert found["mCE"].ci95[0] < 100 < found["mCE"].ci95[1]
    assert found["mean_error"].value == pytest.approx(0.5)
    assert found["mean_error"].ci95 == pytest.approx(tuple(1 - x for x in reversed(found["corrupted_top1"].ci95)))


def test_corruption_error_is_the_mean_of_ratios_not_the_ratio_of_means() -> None:
    right = rights((0.9, 0.2))
    clean = np.ones(40, bool)
    found = corruption_metrics(clean, right, KINDS[:2], baseline={"clean": 0.05, "fog": 0.2, "contrast": 0.8})
    assert found["mCE"].value == pytest.approx(100 * (0.1 / 0.2 + 0.8 / 0.8) / 2)
    assert found["relative_mCE"].value == pytest.approx(100 * (0.1 / 0.15 + 0.8 / 0.75) / 2)
    assert "relative_mCE" not in corruption_metrics(clean, right, KINDS[:2], baseline={"fog": 0.2, "contrast": 0.8})
    with pytest.raises(ValueError, match="error under fog is not above"):
        corruption_metrics(clean, right, KINDS[:2], baseline={"clean": 0.2, "fog": 0.2, "contrast": 0.8})


def test_intervals_are_over_pictures_and_wider_over_groups() -> None:
    right = rights((0.5, 0.5), 60)
    clean = np.ones(60, bool)
    alone = corruption_metrics(clean, right, KINDS[:2])["corrupted_top1"].ci95
    assert alone[1] - alone[0] > 0.2, "ten looks at one picture are one sample"
    groups = [str(i // 6) for i in range(60)]
    grouped = corruption_metrics(clean, right, KINDS[:2], groups=groups)["corrupted_top1"].ci95
    assert grouped[1] - grouped[0] > 1.5 * (alone[1] - alone[0])


def test_alexnets_errors() -> None:
    assert set(ALEXNET) == {"clean", *COMMON}
    perfect = np.ones((15, 5, 30), bool)
    found = corruption_metrics(np.ones(30, bool), perfect, COMMON, baseline=ALEXNET)
    assert found["mCE"].value == 0.0
    assert np.mean([error for kind, error in ALEXNET.items() if kind != "clean"]) == pytest.approx(0.788993, abs=1e-6)


def test_evaluator_from_pictures_to_figures(colour_folder: Folder) -> None:
    root = colour_folder({"red": 6, "green": 5, "blue": 5, "grey": 4})
    model = Preprocessed()
    asked = Corruptions(kinds=("contrast", "gaussian_noise", "jpeg_compression"), prompts="name", batch_size=7)
    found = asked.judge(model, str(root))
    assert found.metrics["clean_top1"].value == 1.0
    assert found.metrics["clean_top1"].chance == 1 / 4
    assert [row["kind"] for row in found.table] == ["contrast", "gaussian_noise", "jpeg_compression"]
    assert found.table[0]["severity 1"] == 1.0, "a plain colour has no contrast to lose"
    assert found.metrics["jpeg_compression_top1"].count == 20
    assert "settings" not in found.protocol
    assert "of the set for 32 px on crops of 8 px" in found.protocol
    assert any("no settings are published for 8 px" in note for note in found.notes)
    again = asked.judge(model, label_source(open_source(str(root))))
    assert (again.metrics, again.table, again.fingerprint) == (found.metrics, found.table, found.fingerprint)
    assert found.outcomes[1].values.mean() == pytest.approx(found.metrics["corrupted_top1"].value)
    against_itself = Corruptions(
        kinds=("contrast",), prompts="name", baseline={"clean": 0.0, "contrast": 0.5}, severities=(1, 5)
    ).judge(model, str(root))
    assert against_itself.metrics["mCE"].value == pytest.approx(200 * against_itself.metrics["mean_error"].value)
    assert baseline_of(found)["clean"] == 0.0


def test_one_size_for_all_models(colour_folder: Folder) -> None:
    """Corrupted before the model's own resize, models of other sizes see the same pictures."""
    root = colour_folder({"red": 4, "green": 4, "blue": 4})
    small, large = Preprocessed(), Preprocessed()
    large.preprocessor = Preprocess(image_size_px=16, resize="squash", mean=(0.4, 0.4, 0.4), std=(1.0, 1.0, 1.0))
    asked = Corruptions(kinds=("gaussian_noise",), severities=(5,), size_px=64, prompts="name")
    first, second = (asked.judge(model, str(root)) for model in (small, large))
    assert first.protocol == second.protocol
    assert "of the set for 64 px on pictures of 64 px" in first.protocol
    assert first.notes == second.notes
    own = Corruptions(kinds=("gaussian_noise",), severities=(5,), prompts="name")
    assert own.judge(small, str(root)).protocol != own.judge(large, str(root)).protocol
    with pytest.raises(ValueError, match="a side in pixels"):
        Corruptions(size_px=0)


def test_published_views() -> None:
    """At 224 px the middle of 256, below it both sides resized: as torchvision's Resize and CenterCrop did."""
    draw = np.random.default_rng(0).integers(0, 255, (300, 500, 3), dtype=np.uint8)
    image = Image.fromarray(draw)
    expected = image.resize((426, 256), Image.Resampling.BILINEAR).crop((101, 16, 325, 240))
    np.testing.assert_array_equal(_at_size(image, 224).permute(1, 2, 0).numpy(), np.array(expected))
    assert _at_size(image, 64).shape == (3, 64, 64)


def test_classes_are_those_of_all_pictures_and_drawn_ones_are_fixed(colour_folder: Folder) -> None:
    root = colour_folder({"red": 6, "green": 5, "blue": 5, "grey": 4})
    first, second = (
        Corruptions(kinds=("fog",), severities=(2,), prompts="name", max_pictures=5, seed=seed).judge(Preprocessed(), str(root))
        for seed in (0, 0)
    )
    assert "4 classes" in first.protocol
    assert "5 of 20 pictures" in first.protocol
    assert first.outcomes[0].keys == second.outcomes[0].keys
    with pytest.raises(ValueError, match=r"labels are not among the 1 classes, e\.g\. blue"):
        Corruptions(kinds=("fog",), classes=["red"]).judge(Preprocessed(), str(root))


def test_what_is_refused(colour_folder: Folder, tmp_path: Path) -> None:
    root = colour_folder({"red": 1, "green": 1})
    for settings, told in (
        ({"kinds": ("rain",)}, "no corruption 'rain'"),
        ({"kinds": ("frost",)}, "frost needs the folder"),
        ({"kinds": ()}, "one or more different ones"),
        ({"severities": (0,)}, "different ones of 1 to 5"),
        ({"max_pictures": 0}, "1 or more"),
        ({"baseline": "alexnet", "severities": (1, 2)}, "AlexNet's errors are means over severities 1 to 5"),
    ):
        with pytest.raises(ValueError, match=told):
            Corruptions(**settings)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ColourModel has no preprocessor"):
        Corruptions().judge(ColourModel(), str(root))
    for baseline, told in (
        ({"fog": 0.5}, "no error of contrast"),
        ({"fog": 0.5, "contrast": 0}, "shares over 0"),
        ("resnet", "alexnet"),
    ):
        with pytest.raises(ValueError, match=told):
            Corruptions(kinds=("fog", "contrast"), baseline=baseline).judge(Preprocessed(), str(root))  # type: ignore[arg-type]
    loose = tmp_path / "loose"
    loose.mkdir()
    Image.new("RGB", (9, 9), COLOURS["red"]).save(loose / "0.png")
    with pytest.raises(ValueError, match="no sample of the data has a label"):
        Corruptions(kinds=("fog",), classes=["red"]).judge(Preprocessed(), str(loose))


def test_processes_change_nothing(colour_folder: Folder) -> None:
    root = colour_folder({"red": 3, "green": 3})
    asked = {"kinds": ("gaussian_noise",), "severities": (5,), "prompts": "name", "batch_size": 2}
    alone, shared = (Corruptions(**asked, num_workers=n).judge(Preprocessed(), str(root)) for n in (0, 1))  # type: ignore[arg-type]
    assert alone.table == shared.table
    np.testing.assert_array_equal(alone.outcomes[1].values, shared.outcomes[1].values)
