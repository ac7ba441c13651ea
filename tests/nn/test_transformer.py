"""Blocks and stacks: the last block's shortcut, stochastic depth, checkpointing, activations."""

import pytest
import torch

from wordsight.nn.transformer import QuickGELU, Transformer, depth_rates, drop_path, make_activation


def stack(**options: float) -> Transformer:
    return Transformer(width=16, num_layers=3, num_heads=2, mlp_width=32, activation="gelu", **options).double()


@pytest.mark.parametrize("is_causal", [False, True])
def test_one_token_equals_that_token_of_the_whole_stack(is_causal: bool) -> None:
    blocks, x, rows = stack(), torch.randn(4, 5, 16, dtype=torch.float64), torch.tensor([4, 0, 2, 2])
    whole = blocks.forward_tokens(x, is_causal=is_causal)[torch.arange(4), rows]
    whole.square().sum().backward()
    gradients = [p.grad.clone() for p in blocks.parameters()]
    blocks.zero_grad()
    one = blocks(x, rows, is_causal=is_causal)
    one.square().sum().backward()
    torch.testing.assert_close(one, whole, rtol=0, atol=1e-12)
    for parameter, expected in zip(blocks.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, expected, rtol=0, atol=1e-11)


def test_causal_tokens_see_nothing_behind_them() -> None:
    blocks, x = stack(), torch.randn(2, 6, 16, dtype=torch.float64)
    changed = x.clone()
    changed[:, 4:] = torch.randn(2, 2, 16, dtype=torch.float64)
    before, after = (blocks.forward_tokens(v, is_causal=True) for v in (x, changed))
    torch.testing.assert_close(before[:, :4], after[:, :4], rtol=0, atol=0)
    assert (before[:, 4:] - after[:, 4:]).abs().min() > 0


def test_quick_gelu_is_its_formula_and_keeps_one_tensor() -> None:
    x = torch.linspace(-12, 12, 481, dtype=torch.float64, requires_grad=True)
    y = QuickGELU()(x)
    torch.testing.assert_close(y, x * torch.sigmoid(1.702 * x), rtol=0, atol=1e-14)
    assert torch.autograd.gradcheck(QuickGELU(), torch.randn(7, dtype=torch.float64, requires_grad=True))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        QuickGELU()(x * 1.0)
    assert sum(kept) < 2 * x.numel()


def test_an_unknown_activation_is_named_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'relu6'.*quick_gelu, gelu"):
        make_activation("relu6")


def test_drop_path_drops_whole_samples_and_keeps_the_mean() -> None:
    draw = torch.linspace(0, 1, 1000)
    out = drop_path(torch.ones(1000, 2, 3), draw, 0.25)
    assert out.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert ((out == 0).all(dim=(1, 2)) == (draw < 0.25)).all()
    assert out.mean() == pytest.approx(1.0, abs=2e-3)


def test_depth_rates_grow_linearly() -> None:
    assert depth_rates(0.3, 4) == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert depth_rates(0.3, 1) == [0.0]
    with pytest.raises(ValueError, match=r"\[0, 1\), got 1.0"):
        depth_rates(1.0, 3)


def test_stochastic_depth_acts_in_training_only() -> None:
    blocks, x, rows = stack(stochastic_depth=0.5), torch.randn(8, 5, 16, dtype=torch.float64), torch.zeros(8, dtype=torch.int64)
    plain = stack()
    plain.load_state_dict(blocks.state_dict())
    assert not torch.equal(blocks.train()(x, rows), plain(x, rows))
    torch.testing.assert_close(blocks.eval()(x, rows), plain(x, rows), rtol=0, atol=0)


def test_checkpointing_changes_neither_result_nor_gradients_nor_random_numbers() -> None:
    blocks, x, rows = stack(stochastic_depth=0.5), torch.randn(8, 5, 16, dtype=torch.float64), torch.arange(8) % 5
    found = []
    for enabled in (False, True):
        blocks.activation_checkpointing = enabled
        torch.manual_seed(3)
        out = blocks(x, rows, is_causal=True)
        out.square().sum().backward()
        found.append([out.detach(), *(p.grad.clone() for p in blocks.parameters()), torch.rand(1)])
        blocks.zero_grad()
    for plain, checkpointed in zip(*found, strict=True):
        assert torch.equal(plain, checkpointed)


def test_checkpointing_keeps_less() -> None:
    blocks, x, rows = stack(), torch.randn(8, 5, 16, dtype=torch.float64), torch.zeros(8, dtype=torch.int64)
    kept = {}
    for enabled in (False, True):
        blocks.activation_checkpointing = enabled
        numbers: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, n=numbers: n.append(t.numel()) or t, lambda t: t):
            blocks(x, rows)
        kept[enabled] = sum(numbers)
    assert kept[True] < kept[False] / 3


def test_no_layers_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least 1 layer, got 0"):
        Transformer(width=16, num_layers=0, num_heads=2, mlp_width=32, activation="gelu")
