"""The compact CNN: shapes, gradients, checkpointing that changes nothing, embeddings that are spread at the start."""

import copy

import pytest
import torch
import torch.nn.functional as F

from wordsight.nn.convnet import ConvNet, ConvNetConfig

TINY = ConvNetConfig(image_size_px=16, patch_size_px=2, widths=(8, 16, 16), layers=(0, 1, 1))


def pixels(count: int = 6, side: int = 16) -> torch.Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("pool", ["mean", "flat"])
def test_shapes_and_gradients(pool):
    torch.manual_seed(0)
    model = ConvNet(ConvNetConfig(image_size_px=16, widths=(8, 16), layers=(0, 1), pool=pool), embed_dim=12)
    out = model(pixels())
    assert out.shape == (6, 12)
    assert model.config.grid == (2, 2)
    assert model.forward_map(pixels()).shape == (6, 16, *model.config.grid)
    out.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


def test_checkpointing_gives_the_same_gradients_and_statistics():
    torch.manual_seed(0)
    plain = ConvNet(TINY, embed_dim=12)
    saving = copy.deepcopy(plain)
    saving.set_activation_checkpointing()
    for model in (plain, saving):
        model(pixels()).square().sum().backward()
    for a, b in zip(plain.parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    for a, b in zip(plain.buffers(), saving.buffers(), strict=True):
        torch.testing.assert_close(a, b)


def test_embeddings_are_spread_at_the_start():
    torch.manual_seed(0)
    embeddings = F.normalize(ConvNet(TINY, embed_dim=32)(pixels(64)), dim=-1)
    assert (embeddings @ embeddings.T).mean() < 0.1


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"widths": (8, 16), "layers": (1,)}, "width and a depth"),
        ({"image_size_px": 36}, "divisible by 8"),
        ({"patch_size_px": 0}, "patch_size_px"),
        ({"pool": "max"}, "pool"),
    ],
)
def test_impossible_configs_are_refused(options, word):
    with pytest.raises(ValueError, match=word):
        ConvNetConfig(**options)
