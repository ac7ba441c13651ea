"""The modified ResNet: running statistics under checkpointing, stochastic depth, starts as its shortcut."""

import copy
from contextlib import suppress

import pytest
import torch

from wordsight.nn.resnet import Bottleneck, ModifiedResNet, ResNetConfig, frozen_statistics

CONFIG = ResNetConfig(image_size_px=64, layers=(1, 2, 1, 1), width=8, num_heads=4, stochastic_depth=0.4)


def test_checkpointing_changes_nothing_running_statistics_included() -> None:
    pixels, found = torch.randn(4, 3, 64, 64), []
    start = ModifiedResNet(CONFIG, 8).train()
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
    assert buffers["stem.bn1.num_batches_tracked"] == 1


def test_frozen_statistics_holds_only_within_and_in_spite_of_errors() -> None:
    tower = ModifiedResNet(CONFIG, 8).train()
    before = tower.stem.bn1.running_mean.clone()
    with suppress(KeyError), frozen_statistics(tower):
        tower(torch.randn(2, 3, 64, 64))
        assert torch.equal(before, tower.stem.bn1.running_mean)
        raise KeyError
    tower(torch.randn(2, 3, 64, 64))
    assert not torch.equal(before, tower.stem.bn1.running_mean)
    assert tower.stem.bn1.num_batches_tracked == 1


def test_evaluation_uses_the_running_statistics() -> None:
    tower = ModifiedResNet(CONFIG, 8).eval()
    pixels = torch.randn(3, 3, 64, 64)
    torch.testing.assert_close(tower(pixels)[:1], tower(pixels[:1]), atol=1e-5, rtol=0)


def test_a_bottleneck_starts_as_its_shortcut() -> None:
    block, x = Bottleneck(16, 4, 1, 0.0).train(), torch.randn(2, 16, 5, 5).relu()
    assert block.downsample is None
    assert torch.equal(block(x), x)


def test_stochastic_depth_skips_whole_samples() -> None:
    block = Bottleneck(16, 4, 1, 0.5).train()
    torch.nn.init.ones_(block.bn3.weight)
    x = torch.randn(64, 16, 5, 5).relu()
    skipped = (block(x) == x).flatten(1).all(1).float().mean()
    assert 0.25 < skipped < 0.75
    assert not (block.eval()(x) == x).flatten(1).all(1).any()


@pytest.mark.parametrize("bad", [{"image_size_px": 100}, {"image_size_px": 0}, {"layers": (1, 2, 3)}, {"layers": (1, 0, 1, 1)}])
def test_impossible_configs_are_refused(bad: dict) -> None:
    with pytest.raises(ValueError, match=r"multiple of 32|4 stages"):
        ResNetConfig(**bad)
