"""The attention pool against torch's multi-head attention over every place, of which only the first output is used."""

import torch
import torch.nn.functional as F

from wordsight.nn.pool import AttentionPool


def reference(pool: AttentionPool, x: torch.Tensor) -> torch.Tensor:
    x = x.flatten(2).permute(2, 0, 1)
    x = torch.cat([x.mean(0, keepdim=True), x]) + pool.position_embedding[:, None]
    out, _ = F.multi_head_attention_forward(
        query=x,
        key=x,
        value=x,
        embed_dim_to_check=x.shape[-1],
        num_heads=pool.num_heads,
        q_proj_weight=pool.q.weight,
        k_proj_weight=pool.k.weight,
        v_proj_weight=pool.v.weight,
        in_proj_weight=None,
        in_proj_bias=torch.cat([pool.q.bias, pool.k.bias, pool.v.bias]),
        bias_k=None,
        bias_v=None,
        add_zero_attn=False,
        dropout_p=0.0,
        out_proj_weight=pool.proj.weight,
        out_proj_bias=pool.proj.bias,
        use_separate_proj_weight=True,
        need_weights=False,
    )
    return out[0]


def test_one_query_equals_all_queries_with_all_gradients() -> None:
    pool = AttentionPool(24, 3, (2, 3), 10).double()
    x = torch.randn(4, 24, 2, 3, dtype=torch.float64, requires_grad=True)
    found = []
    for forward in (pool, lambda v: reference(pool, v)):
        pool.zero_grad()
        x.grad = None
        out = forward(x)
        out.square().sum().backward()
        found.append({"out": out, "x": x.grad, **{name: p.grad for name, p in pool.named_parameters()}})
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=0, atol=1e-11, msg=name)


def test_half_precision_scores_are_soft_maxed_in_float32() -> None:
    pool = AttentionPool(64, 2, (2, 2), 8).bfloat16()
    out = pool(torch.randn(2, 64, 2, 2, dtype=torch.bfloat16) * 20)
    assert out.dtype is torch.bfloat16
    assert out.isfinite().all()
