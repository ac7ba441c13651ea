"""The vision transformer: patch dropout, sizes, the class token."""

import pytest
import torch

from wordsight.nn.vit import VisionTransformer, ViTConfig, drop_patches

CONFIG = ViTConfig(image_size_px=32, patch_size_px=8, width=16, num_layers=2, num_heads=2)


def tower(**changes: float) -> VisionTransformer:
    from dataclasses import replace

    return VisionTransformer(replace(CONFIG, **changes), 8, "quick_gelu")


def test_the_embedding_is_the_class_tokens_output() -> None:
    vit, pixels = tower(), torch.randn(3, 3, 32, 32)
    tokens = vit.forward_tokens(pixels)
    assert tokens.shape == (3, 17, 16)
    torch.testing.assert_close(vit(pixels), vit.norm_post(tokens[:, 0]) @ vit.projection, rtol=0, atol=1e-6)


def test_patch_dropout_keeps_the_class_token_and_a_share_of_the_patches() -> None:
    vit, pixels = tower(patch_dropout=0.5), torch.randn(3, 3, 32, 32)
    assert vit.train().forward_tokens(pixels).shape == (3, 1 + 8, 16)
    assert vit.eval().forward_tokens(pixels).shape == (3, 1 + 16, 16)
    torch.testing.assert_close(vit._embed(pixels)[:, 0], vit.train()._embed(pixels)[:, 0])


@pytest.mark.parametrize(("rate", "kept"), [(0.0, 16), (0.5, 8), (0.75, 4), (0.9, 1), (0.99, 1)])
def test_dropped_patches_are_a_subset_each_sample_its_own(rate: float, kept: int) -> None:
    patches = torch.arange(5 * 16 * 2.0).reshape(5, 16, 2)
    draw = torch.rand(5, 16)
    out = drop_patches(patches, draw, rate)
    assert out.shape == (5, kept, 2)
    for sample, chosen, drawn in zip(patches, out, draw, strict=True):
        expected = sample[drawn.argsort()[:kept]]
        assert {tuple(v) for v in chosen.tolist()} == {tuple(v) for v in expected.tolist()}
    if kept == 4:
        assert len({tuple(sorted((s - p[0, 0]).flatten().tolist())) for s, p in zip(out, patches, strict=True)}) > 1


def test_dropping_makes_a_patch_weightless() -> None:
    """A patch that is left out gets no gradient."""
    vit = tower(patch_dropout=0.75).train()
    pixels = torch.randn(1, 3, 32, 32, requires_grad=True)
    vit(pixels).sum().backward()
    touched = pixels.grad.abs().sum(1).unfold(1, 8, 8).unfold(2, 8, 8).sum((-1, -2)) > 0
    assert touched.sum() == 4


@pytest.mark.parametrize("bad", [{"patch_size_px": 64}, {"patch_size_px": 0}, {"patch_dropout": 1.0}, {"patch_dropout": -0.1}])
def test_impossible_configs_are_refused(bad: dict) -> None:
    with pytest.raises(ValueError, match=str(next(iter(bad.values())))):
        ViTConfig(**{"image_size_px": 32, **bad})


MAP = {"pool": "map", "patch_bias": True, "norm_pre": False, "norm_eps": 1e-6}


def test_a_probe_asks_the_normed_patches_and_there_is_no_class_token() -> None:
    vit, pixels = tower(**MAP), torch.randn(3, 3, 32, 32)
    tokens = vit.forward_tokens(pixels)
    assert tokens.shape == (3, 16, 16)
    assert vit.class_token is None
    assert "class_token" not in vit.state_dict()
    assert vit.position_embedding.shape == (16, 16)
    torch.testing.assert_close(vit(pixels), vit.pool(vit.norm_post(tokens)) @ vit.projection, rtol=0, atol=1e-6)
    assert tower(**MAP, patch_dropout=0.5).train().forward_tokens(pixels).shape == (3, 8, 16)


def test_map_towers_start_as_in_big_vision() -> None:
    torch.manual_seed(0)
    vit = VisionTransformer(ViTConfig(image_size_px=32, patch_size_px=8, width=128, num_layers=1, num_heads=2, **MAP), 8, "gelu")
    glorot = (6 / (128 + 128)) ** 0.5
    for weight in (*vit.blocks[0].attn.qkv.weight.chunk(3), vit.blocks[0].attn.proj.weight, *vit.pool.attn.qkv.weight.chunk(3)):
        assert weight.abs().max().item() == pytest.approx(glorot, rel=0.01)
    assert vit.pool.mlp.fc1.weight.abs().max().item() == pytest.approx((6 / (128 + 512)) ** 0.5, rel=0.01)
    assert 0 < vit.blocks[0].mlp.fc2.bias.abs().max().item() < 1e-5
    assert vit.pool.probe.abs().max().item() == pytest.approx((6 / 129) ** 0.5, rel=0.05)
    assert vit.patch_embed.weight.std().item() == pytest.approx((3 * 8 * 8) ** -0.5, rel=0.02)
    assert not vit.patch_embed.bias.any()
    assert vit.position_embedding.std().item() == pytest.approx(128**-0.5, rel=0.05)


def test_an_unknown_pool_is_named() -> None:
    with pytest.raises(ValueError, match="pool must be one of class, map, got 'mean'"):
        ViTConfig(pool="mean")
