"""Attention against torch's own, and the one-row form against the whole."""

import pytest
import torch
from torch import nn

from wordsight.nn.attention import Attention


@pytest.mark.parametrize("is_causal", [False, True])
def test_equals_torch_multihead_attention_with_all_gradients(is_causal: bool) -> None:
    ours, reference = Attention(24, 3).double(), nn.MultiheadAttention(24, 3, batch_first=True).double()
    nn.init.normal_(ours.qkv.bias)
    nn.init.normal_(ours.proj.bias)
    reference.load_state_dict(
        {
            "in_proj_weight": ours.qkv.weight,
            "in_proj_bias": ours.qkv.bias,
            "out_proj.weight": ours.proj.weight,
            "out_proj.bias": ours.proj.bias,
        }
    )
    x = torch.randn(2, 7, 24, dtype=torch.float64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    mask = nn.Transformer.generate_square_subsequent_mask(7, dtype=torch.float64) if is_causal else None
    out, expected = ours(x, is_causal=is_causal), reference(y, y, y, attn_mask=mask, need_weights=False)[0]
    upstream = torch.randn_like(out)
    out.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(x.grad, y.grad, rtol=0, atol=1e-12)
    torch.testing.assert_close(ours.qkv.weight.grad, reference.in_proj_weight.grad, rtol=0, atol=1e-12)
    torch.testing.assert_close(ours.proj.weight.grad, reference.out_proj.weight.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("is_causal", [False, True])
def test_one_row_equals_that_row_of_the_whole(is_causal: bool) -> None:
    attention = Attention(16, 2).double()
    x = torch.randn(3, 6, 16, dtype=torch.float64, requires_grad=True)
    rows = torch.tensor([5, 0, 2])
    whole = attention(x, is_causal=is_causal)[torch.arange(3), rows]
    whole.square().sum().backward()
    gradients = [x.grad, attention.qkv.weight.grad, attention.qkv.bias.grad]
    x.grad = None
    attention.zero_grad()
    visible = torch.arange(6) <= rows[:, None] if is_causal else None
    row = attention.forward_row(x, x[torch.arange(3), rows][:, None], visible).squeeze(1)
    row.square().sum().backward()
    torch.testing.assert_close(row, whole, rtol=0, atol=1e-12)
    for found, expected in zip([x.grad, attention.qkv.weight.grad, attention.qkv.bias.grad], gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("num_heads", [0, 5, -2])
def test_heads_that_do_not_divide_the_width_are_named(num_heads: int) -> None:
    with pytest.raises(ValueError, match=f"24 cannot be divided over {num_heads} heads"):
        Attention(24, num_heads)
