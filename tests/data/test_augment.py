"""Batched augmentation: fixed by its generator, bounded, white stays white, each change can be turned off."""

import pytest
import torch

from wordsight.data.augment import Augment

OFF = dict(
    rotate_deg=0.0,
    scale=0.0,
    translate=0.0,
    shear=0.0,
    hue=0.0,
    saturation=0.0,
    gray_prob=0.0,
    channel_gain=0.0,
    brightness=0.0,
    gamma=0.0,
    cutout_prob=0.0,
)


def pictures(count: int = 8) -> torch.Tensor:
    return torch.rand(count, 3, 24, 32, generator=torch.Generator().manual_seed(5))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_shape_range_and_input_untouched():
    pixels = pictures()
    before = pixels.clone()
    changed = Augment()(pixels, generator())
    assert changed.shape == pixels.shape
    assert changed.dtype == pixels.dtype
    assert changed.min() >= 0
    assert changed.max() <= 1
    assert torch.equal(pixels, before)
    assert not torch.equal(changed, pixels)


def test_the_seed_fixes_everything():
    pixels = pictures()
    assert torch.equal(Augment()(pixels, generator(1)), Augment()(pixels, generator(1)))
    assert not torch.equal(Augment()(pixels, generator(1)), Augment()(pixels, generator(2)))


def test_all_off_changes_nothing():
    pixels = pictures().clamp(min=1e-3)
    torch.testing.assert_close(Augment(**OFF)(pixels, generator()), pixels, atol=1e-5, rtol=0)


def test_white_stays_white_under_geometry_and_kept_colour():
    white = torch.ones(16, 3, 32, 32)
    strong = dict(rotate_deg=40.0, translate=0.3, hue=1.0, saturation=1.0, channel_gain=0.5, gamma=0.5, gray_prob=0.3)
    torch.testing.assert_close(Augment(**{**OFF, **strong})(white, generator()), white, atol=1e-5, rtol=0)


def test_flip_mirrors():
    pixels = pictures().clamp(min=1e-3)
    flipped = Augment(**{**OFF, "flip_prob": 1.0})(pixels, generator())
    torch.testing.assert_close(flipped, pixels.flip(-1), atol=1e-4, rtol=0)


def test_gray_has_no_colour():
    gray = Augment(**{**OFF, "gray_prob": 1.0})(pictures(), generator())
    torch.testing.assert_close(gray[:, 0], gray[:, 1], atol=5e-3, rtol=0)
    torch.testing.assert_close(gray[:, 1], gray[:, 2], atol=5e-3, rtol=0)


def test_translate_moves_by_at_most_its_share():
    pixels = torch.ones(64, 3, 32, 32)
    pixels[:, :, 16, 16] = 0
    moved = Augment(**{**OFF, "translate": 0.25})(pixels, generator())
    where = (1 - moved[:, 0]).flatten(1).argmax(1)
    distance = torch.stack([where // 32 - 16, where % 32 - 16]).abs()
    assert 4 <= distance.max() <= 9


def test_cutout_paints_one_rectangle_of_bounded_size():
    pixels = torch.full((64, 3, 40, 40), 0.5)
    cut = Augment(**{**OFF, "cutout_prob": 1.0, "cutout_size": 0.4})(pixels, generator())
    changed = ((cut - pixels).abs() > 1e-4).any(1)
    assert changed.any(2).sum(1).max() <= 17
    assert changed.any(1).sum(1).max() <= 17
    assert (changed.flatten(1).any(1)).float().mean() > 0.8
    for picture, mask in zip(cut, changed, strict=True):
        if mask.any():
            colours = picture[:, mask]
            torch.testing.assert_close(colours, colours[:, :1].expand_as(colours))


@pytest.mark.parametrize("bad", [torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.zeros(2, 1, 8, 8), torch.zeros(3, 8, 8)])
def test_other_inputs_are_refused(bad):
    with pytest.raises(ValueError, match="B, 3, H, W"):
        Augment()(bad, generator())
