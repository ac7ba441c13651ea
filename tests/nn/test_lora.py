"""LoRA and AdaptFormer start as nothing, give the gradients of their equations, and leave what they stand beside alone."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wordsight.nn.adaptformer import AdaptFormer, adapter_width, add_adaptformer
from wordsight.nn.convnet import ConvNet, ConvNetConfig
from wordsight.nn.lora import LoRAQueriesKeysValues, add_lora
from wordsight.nn.transformer import Block
from wordsight.nn.tuning import behind, last_projection, projection_names, share_tower, tower_parts
from wordsight.nn.vit import VisionTransformer, ViTConfig

CONFIG = ViTConfig(image_size_px=8, patch_size_px=4, width=12, num_layers=3, num_heads=2)


def vit(**changes: object) -> VisionTransformer:
    torch.manual_seed(0)
    tower = VisionTransformer(ViTConfig(**{**CONFIG.__dict__, **changes}), 6, "quick_gelu").double()
    for parameter in tower.parameters():  # biases that start at nothing would hide mistakes
        nn.init.normal_(parameter, std=0.4)
    return tower


def adapted(kind: str, tower: VisionTransformer) -> VisionTransformer:
    twin = share_tower(tower, lambda name: False)
    add_lora(twin, 3, 1.5) if kind == "lora" else add_adaptformer(twin, 10, 3)
    return twin  # type: ignore[return-value]


def pixels(count: int = 4) -> Tensor:
    return torch.randn(count, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def stir(tower: nn.Module) -> None:
    """Move what learns away from its start."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in tower.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, dtype=parameter.dtype, generator=generator))


@pytest.mark.parametrize("kind", ["lora", "adaptformer"])
@pytest.mark.parametrize("pool", ["class", "map"])
def test_the_start_is_the_tower_itself(kind: str, pool: str) -> None:
    tower = vit(pool=pool)
    twin = adapted(kind, tower)
    torch.testing.assert_close(twin(pixels()), tower(pixels()), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(twin.forward_tokens(pixels()), tower.forward_tokens(pixels()), rtol=1e-12, atol=1e-12)
    stir(twin)
    assert float((twin(pixels()) - tower(pixels())).detach().abs().max()) > 1e-2


@pytest.mark.parametrize("kind", ["lora", "adaptformer"])
def test_only_what_is_added_learns(kind: str) -> None:
    tower = vit()
    before = copy.deepcopy(tower.state_dict())
    twin = adapted(kind, tower)
    stir(twin)
    twin(pixels()).square().sum().backward()
    learned = [name for name, parameter in twin.named_parameters() if parameter.requires_grad]
    assert len(learned) == 3 * (2 if kind == "lora" else 7)
    assert all(("up" in name or "down" in name or "adapter" in name) for name in learned)
    for name, parameter in twin.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad == (name in learned), name
    assert all(parameter.grad is None and parameter.requires_grad for parameter in tower.parameters())
    assert all(torch.equal(value, before[name]) for name, value in tower.state_dict().items())


def test_lora_merged_is_lora() -> None:
    twin = adapted("lora", vit()).float()
    stir(twin)
    apart = twin(pixels().float())
    with torch.no_grad():
        together = twin(pixels().float())
    assert apart.requires_grad
    torch.testing.assert_close(apart, together, rtol=1e-5, atol=1e-6)


def test_lora_is_its_equation_in_value_and_gradient() -> None:
    """Against a linear layer whose whole matrix is W + alpha / R up down, each of q, k and v alone."""
    torch.manual_seed(0)
    linear = nn.Linear(6, 18).double()
    lora = LoRAQueriesKeysValues(linear, 2, 3.0)
    nn.init.normal_(lora.up)
    x = torch.randn(5, 4, 6, dtype=torch.float64)
    changes = [1.5 * lora.up[i] @ lora.down[i] for i in range(3)]
    expected = F.linear(x, linear.weight + torch.cat(changes), linear.bias)
    torch.testing.assert_close(lora(x), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lora.weight, linear.weight + torch.cat(changes), rtol=1e-12, atol=1e-12)
    target = torch.randn_like(expected)
    for one, other in zip(
        torch.autograd.grad((lora(x) * target).sum(), [lora.up, lora.down]),
        torch.autograd.grad((expected * target).sum(), [lora.up, lora.down]),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kind", ["lora", "adaptformer"])
def test_gradients_through_a_whole_tower(kind: str) -> None:
    """Against finite differences, in float64, of every number that learns."""
    twin = adapted(kind, vit(num_layers=1, width=4))
    stir(twin)
    learned = {name: parameter for name, parameter in twin.named_parameters() if parameter.requires_grad}

    def output(*values: Tensor) -> Tensor:
        return torch.func.functional_call(twin, dict(zip(learned, values, strict=True)), (pixels(2),))

    assert torch.autograd.gradcheck(output, tuple(learned.values()))


def test_lora_starts_as_its_paper_says() -> None:
    torch.manual_seed(0)
    lora = LoRAQueriesKeysValues(nn.Linear(100, 300), 8, 8.0)
    assert not lora.up.any()
    assert float(lora.down.abs().max()) <= 0.1
    assert float(lora.down.std()) == pytest.approx(0.1 / 3**0.5, rel=0.05)


def test_adaptformer_is_its_equation() -> None:
    adapter = AdaptFormer(6, 2)
    assert adapter.scale.item() == 1
    assert not adapter.up.weight.any()
    x = torch.randn(4, 6)
    assert not adapter(x).any()
    nn.init.normal_(adapter.up.weight)
    nn.init.constant_(adapter.scale, 0.7)
    hidden = F.relu(F.layer_norm(x, (6,)) @ adapter.down.weight.T)
    torch.testing.assert_close(adapter(x), 0.7 * hidden @ adapter.up.weight.T)
    big = AdaptFormer(1000, 64)
    assert float(big.down.weight.std()) == pytest.approx((2 / 6 / 1000) ** 0.5, rel=0.05)


def test_an_adapter_reads_the_stream_before_the_norm() -> None:
    tower = vit(num_layers=1)
    twin = adapted("adaptformer", tower)
    stir(twin)
    own, other = tower.blocks[0], twin.blocks[0]
    assert isinstance(own, Block)
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    middle = x + own.attn(own.norm1(x))
    expected = middle + own.mlp(own.norm2(middle)) + other.mlp.adapter(middle)  # type: ignore[union-attr, operator]
    torch.testing.assert_close(other(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("classes", "layers", "width"), [(1000, 12, 32), (8142, 12, 256), (365, 12, 8), (10, 12, 1), (48, 24, 1)]
)
def test_adapters_are_as_wide_as_lifts_rule(classes: int, layers: int, width: int) -> None:
    assert adapter_width(classes, layers) == width


# Parts of a tower


def test_what_learns_is_copied_and_the_rest_shared() -> None:
    tower = vit()
    twin = share_tower(tower, behind(tower, 1))
    own = dict(tower.named_parameters())
    for name, parameter in twin.named_parameters():
        learns = name.startswith(("blocks.2.", "norm_post", "projection"))
        assert parameter.requires_grad == learns, name
        assert (parameter.data_ptr() == own[name].data_ptr()) == (not learns), name
        assert torch.equal(parameter, own[name])


def test_parts_of_convolutional_towers_are_stages() -> None:
    convnet = ConvNet(ConvNetConfig(image_size_px=16, widths=(8, 8), layers=(0, 1)), 4)
    assert tower_parts(convnet) == [("stages.0.",), ("stages.1.",)]
    learns = behind(convnet, 1)
    assert {name.split(".")[0] + "." + name.split(".")[1] for name, _ in convnet.named_parameters() if not learns(name)} == {
        "stages.0"
    }
    twin = share_tower(convnet, lambda name: True)
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(twin.buffers(), convnet.buffers(), strict=True))
    assert projection_names(convnet) == ("projection",)
    matrix, offset = last_projection(convnet.eval())
    with torch.no_grad():
        torch.testing.assert_close(convnet.features(torch.ones(2, 3, 16, 16)) @ matrix, convnet(torch.ones(2, 3, 16, 16)))
    assert offset is None


def test_bad_settings_are_named() -> None:
    tower, convnet = vit(), ConvNet(ConvNetConfig(image_size_px=16), 4)
    for rank in (0, 13, 1.5):
        with pytest.raises(ValueError, match=f"rank must be a whole number of 1 to the tower's width 12, got {rank}"):
            add_lora(tower, rank, 1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="alpha must be a number above 0, got 0"):
        add_lora(tower, 2, 0)
    with pytest.raises(ValueError, match="adapter_dim must be a whole number of at least 1, or None for LIFT's rule, got 0"):
        add_adaptformer(tower, 5, 0)
    with pytest.raises(
        ValueError, match="LoRA changes the blocks of a vision transformer, and this image tower, of type ConvNet"
    ):
        add_lora(convnet, 2, 1.0)
    with pytest.raises(ValueError, match=r"AdaptFormer changes the blocks .* has none: use part='full' or 'last'"):
        add_adaptformer(convnet, 5)
    for num in (0, 4):
        with pytest.raises(ValueError, match=f"last_blocks must be 1 to 3, the blocks or stages of this image tower, got {num}"):
            behind(tower, num)
    with pytest.raises(ValueError, match="a Linear has no known parts to fine-tune"):
        tower_parts(nn.Linear(2, 2))
