"""EfficientNet: scaling and padding in closed form, running statistics under checkpointing, drop connect by row."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from wordsight.nn.efficientnet import SCALES, EfficientNet, EfficientNetConfig, StridedConv, efficientnet
from wordsight.nn.random import number_streams, numbered_rows

TINY = EfficientNetConfig(
    image_size_px=32,
    width_factor=0.25,
    channels=(16, 48, 64),
    repeats=(1, 2, 2),
    kernel_sizes=(3, 5, 3),
    strides=(1, 2, 2),
    expansions=(1, 4, 4),
    head_channels=96,
    drop_connect=0.5,
)


@pytest.mark.parametrize(
    ("wanted", "rounded"),
    [(32, 32), (35.2, 32), (36, 40), (4.3 * 16, 72), (1.1 * 24, 24), (3, 8), (12.3, 16), (19.2, 24), (10, 16)],
)
def test_channels_are_multiples_of_eight_and_never_a_tenth_less(wanted: float, rounded: int) -> None:
    found = EfficientNetConfig(width_factor=wanted / 32).round_channels(32)
    assert found == rounded
    assert found % 8 == 0
    assert found >= 0.9 * wanted


def test_published_widths_and_depths() -> None:
    """Tables of the published code: B7's stages and Lite4's, whose ends are not scaled."""
    b7, lite4, l2 = efficientnet("b7"), efficientnet("lite4"), efficientnet("l2")
    assert [b7.round_channels(c) for c in b7.channels] == [32, 48, 80, 160, 224, 384, 640]
    assert (b7.stem_width, b7.num_blocks, b7.num_features) == (64, (4, 7, 7, 10, 10, 13, 4), 2560)
    assert (lite4.stem_width, lite4.num_blocks, lite4.num_features) == (32, (1, 4, 4, 6, 6, 8, 1), 1280)
    assert (l2.stem_width, sum(l2.num_blocks), l2.num_features) == (136, 88, 5504)
    assert {name: efficientnet(name).image_size_px for name in SCALES} == {name: scale[2] for name, scale in SCALES.items()}
    with pytest.raises(ValueError, match="no EfficientNet 'b8'; there are b0"):
        efficientnet("b8")


@pytest.mark.parametrize("size", [7, 8, 9, 12])
@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_same_padding_is_tensorflows(size: int, kernel: int) -> None:
    """ceil(n / 2) outputs; of the padding that they need, max((ceil(n / 2) - 1) 2 + k - n, 0), half rounded down comes first."""
    conv = StridedConv(1, 1, kernel, stride=2).double()
    x = torch.randn(1, 1, size, size + 1, dtype=torch.float64)
    padded = x
    for dim, n in ((2, size), (3, size + 1)):
        needed = max((-(-n // 2) - 1) * 2 + kernel - n, 0)
        sides = (needed // 2, needed - needed // 2)
        padded = F.pad(padded, (*sides, 0, 0) if dim == 3 else (0, 0, *sides))
    expected = F.conv2d(padded, conv.weight, stride=2)
    assert expected.shape[2:] == (-(-size // 2), -(-(size + 1) // 2))
    torch.testing.assert_close(conv(x), expected, rtol=0, atol=1e-12)


def test_even_padding_does_not_look_at_the_size() -> None:
    same, even = (StridedConv(2, 3, 5, stride=2, padding_kind=kind) for kind in ("same", "even"))
    even.load_state_dict(same.state_dict())
    x = torch.randn(1, 2, 8, 8)
    assert torch.equal(same(x), even(x))
    odd = torch.randn(1, 2, 9, 9)
    assert (same(odd).shape[2], even(odd).shape[2]) == (5, 4)


def test_checkpointing_changes_nothing_running_statistics_included() -> None:
    pixels, found = torch.randn(4, 3, 32, 32), []
    start = EfficientNet(TINY, 8).train()
    for enabled in (False, True):
        tower = copy.deepcopy(start)
        tower.set_activation_checkpointing(enabled)
        torch.manual_seed(1)
        out = tower(pixels)
        out.square().sum().backward()
        found.append((out, {n: p.grad for n, p in tower.named_parameters()}, dict(tower.named_buffers())))
    (out, gradients, buffers), (out2, gradients2, buffers2) = found
    assert torch.equal(out, out2)
    assert all(torch.equal(gradients[name], gradients2[name]) for name in gradients)
    assert all(torch.equal(buffers[name], buffers2[name]) for name in buffers)
    assert buffers["stem.norm.num_batches_tracked"] == 1


def test_drop_connect_skips_whole_rows_and_grows_with_the_depth() -> None:
    tower = EfficientNet(TINY, 8).train()
    assert [block.drop_rate for block in tower.blocks] == pytest.approx([0.5 * i / 5 for i in range(5)])
    block = tower.blocks[-1]
    x = torch.randn(256, 16, 4, 4)
    skipped = (block(x) == x).flatten(1).all(1).float().mean().item()
    assert skipped == pytest.approx(0.4, abs=0.1)
    assert not (block.eval()(x) == x).flatten(1).all(1).any()


def test_draws_belong_to_the_row() -> None:
    """With batch norm's statistics held still, two halves of a batch drop what the whole drops."""
    tower = EfficientNet(TINY, 8).train()
    number_streams(tower)
    for module in tower.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    pixels = torch.randn(6, 3, 32, 32)
    with torch.no_grad():
        with numbered_rows(3, 0, "cpu"):
            whole = tower(pixels)
        halves = []
        for start in (0, 3):
            with numbered_rows(3, start, "cpu"):
                halves.append(tower(pixels[start : start + 3]))
        assert not torch.allclose(whole, tower.eval()(pixels))
    torch.testing.assert_close(torch.cat(halves), whole, rtol=1e-4, atol=1e-5)


def test_without_a_projection_the_embedding_is_the_features() -> None:
    config = EfficientNetConfig(**{**vars(TINY), "project": False})
    tower = EfficientNet(config, config.num_features).eval()
    pixels = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(tower(pixels), tower.forward_map(pixels).mean((2, 3)))
    with pytest.raises(ValueError, match=r"24 features without a projection can't give 8"):
        EfficientNet(config, 8)


@pytest.mark.parametrize(
    "bad",
    [
        {"channels": (16, 24)},
        {"kernel_sizes": (3, 3, 4, 3, 5, 5, 3)},
        {"strides": (1, 2, 3, 2, 1, 2, 1)},
        {"width_factor": 0.0},
        {"activation": "gelu"},
        {"padding": "valid"},
        {"drop_connect": 1.0},
        {"image_size_px": 0},
        {"repeats": (0, 2, 2, 3, 3, 4, 1)},
    ],
)
def test_impossible_configs_are_refused(bad: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(bad)).split("_")[0]):
        EfficientNetConfig(**bad)
