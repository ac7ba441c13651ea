"""Common corruptions beside the published programs' output, and what every kind must hold."""

import json
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from wordsight.evaluate.corruption_kinds import KINDS
from wordsight.evaluate.corruptions import _SETTINGS, COMMON, EXTRA, SEVERITIES, corrupt, frost_pictures, severity_size

# what make_imagenet_c.py, make_tinyimagenet_c.py and make_cifar_c.py give for `drawn`, np.random.seed(7); the motion blur is
# that of imagecorruptions 1.1.2, as ImageMagick's can't be had
PUBLISHED = json.loads((Path(__file__).parent / "published_corruptions.json").read_text())
HERE = tuple(kind for kind in (*COMMON, *EXTRA) if kind != "frost")


class Legacy(np.random.RandomState):
    """The published programs' random numbers by the names of a Generator."""

    def integers(self, low: int, high: int, size: tuple[int, ...]) -> np.ndarray:
        return self.randint(low, high, size=size)


def drawn(side: int) -> np.ndarray:
    y, x = np.mgrid[:side, :side] / (side - 1)
    disc = (x - 0.4) ** 2 + (y - 0.55) ** 2 < 0.09
    return np.clip(np.stack([255 * x, 200 * y + 30 * disc, 255 * (1 - x) * (1 - y) + 120 * disc], -1), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("case", PUBLISHED)
def test_as_published(case: str) -> None:
    kind, side, severity = re.fullmatch(r"(\w+) (\d+) (\d)", case).groups()  # type: ignore[union-attr]
    size = int(side)
    ours = KINDS[kind](drawn(size), _SETTINGS[kind][size][int(severity) - 1], Legacy(7))
    pixels = [ours[int(size * a), int(size * b)] for a, b in ((0.1, 0.1), (0.3, 0.6), (0.5, 0.5), (0.7, 0.3), (0.9, 0.8))]
    water = kind == "spatter" and severity != "5"  # OpenCV's distances are approximate
    assert ours.mean() == pytest.approx(PUBLISHED[case]["mean"], abs=0.5)
    np.testing.assert_allclose(np.array(pixels, int), PUBLISHED[case]["pixels"], atol=30 if water else 1)


@pytest.mark.parametrize("kind", HERE)
def test_bytes_in_and_out_whatever_the_picture(kind: str) -> None:
    for picture in (
        drawn(40)[:, :25],
        drawn(33)[..., 0],  # grey
        np.zeros((1, 1, 3), np.uint8),
        np.full((2, 7, 3), 255, np.uint8),
        drawn(70)[:, :50][::-1],  # a view
    ):
        before = picture.copy()
        for severity in (1, 5):
            found = corrupt(picture, kind, severity, seed=3)
            assert found.dtype == np.uint8
            assert found.shape == (*picture.shape[:2], 3)
            np.testing.assert_array_equal(found, corrupt(picture, kind, severity, seed=3))
            np.testing.assert_array_equal(picture, before)


def test_random_numbers_are_of_seed_picture_kind_and_severity() -> None:
    picture = drawn(32)
    first = corrupt(picture, "gaussian_noise", 2, seed=0).astype(int) - picture
    other_seed = corrupt(picture, "gaussian_noise", 2, seed=1).astype(int) - picture
    other_picture = corrupt(picture[::-1], "gaussian_noise", 2, seed=0).astype(int) - picture[::-1]
    for other in (other_seed, other_picture):
        assert abs(np.corrcoef(first.ravel(), other.ravel())[0, 1]) < 0.2


NO_LUCK = tuple("gaussian_noise shot_noise speckle_noise gaussian_blur defocus_blur contrast brightness".split())


@pytest.mark.parametrize("size", [32, 64, 224])
@pytest.mark.parametrize("kind", [*NO_LUCK, "impulse_noise", "pixelate", "jpeg_compression", "zoom_blur"])
def test_severer_is_farther(kind: str, size: int) -> None:
    rough = np.random.default_rng(0).normal(0, 40, (size, size, 3)).repeat(5, 0).repeat(5, 1)[:size, :size]
    picture = np.clip(drawn(size) + rough, 0, 255).astype(np.uint8)
    errors = [((corrupt(picture, kind, severity).astype(float) - picture) ** 2).mean() for severity in SEVERITIES]
    assert errors[0] < errors[-1]
    if kind in NO_LUCK:  # where two grids meet, a coarser one may fit better
        assert all(low < high for low, high in pairwise(errors)), errors


def test_settings_are_those_of_the_nearest_published_size() -> None:
    assert [severity_size(side, side) for side in (8, 32, 45, 46, 64, 119, 120, 224, 448)] == [
        32,
        32,
        32,
        64,
        64,
        64,
        224,
        224,
        224,
    ]
    assert severity_size(300, 40) == 32
    assert all(len(rows) == 5 for sizes in _SETTINGS.values() for rows in sizes.values())
    assert set(_SETTINGS) == {*KINDS, "frost"} == {*COMMON, *EXTRA}


def test_what_is_refused() -> None:
    picture = drawn(32)
    with pytest.raises(ValueError, match="no corruption 'rain': use one of gaussian_noise"):
        corrupt(picture, "rain", 1)
    with pytest.raises(ValueError, match="severity is 1 to 5, got 6"):
        corrupt(picture, "fog", 6)
    for wrong in (picture / 255, picture[..., :2], np.zeros((0, 4, 3), np.uint8), picture[None]):
        with pytest.raises(ValueError, match="uint8"):
            corrupt(wrong, "fog", 1)
    with pytest.raises(ValueError, match="frost needs its photographs"):
        corrupt(picture, "frost", 1)


def test_frost_is_laid_from_the_photographs(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no frost1.png, no frost2.png"):
        frost_pictures(tmp_path)
    for i, name in enumerate(("frost1.png", "frost2.png", "frost3.png", "frost4.jpg", "frost5.jpg")):
        Image.new("RGB", (400, 300), (100 + 4 * i,) * 3).save(tmp_path / name, quality=100)
    frost = frost_pictures(tmp_path)
    for side, severity, (weight, of_frost) in ((32, 1, (1, 0.2)), (64, 3, (0.8, 0.45)), (224, 5, (0.6, 0.75))):
        found = corrupt(np.full((side, side, 3), 60, np.uint8), "frost", severity, frost=frost)
        assert len(np.unique(found)) == 1
        assert any(abs(int(found[0, 0, 0]) - (weight * 60 + of_frost * (100 + 4 * i))) <= 1 for i in range(5))
    with pytest.raises(ValueError, match="400 x 300 px is too small for 350 x 350"):
        corrupt(np.zeros((350, 350, 3), np.uint8), "frost", 1, frost=frost)
