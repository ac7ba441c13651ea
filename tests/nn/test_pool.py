"""The attention pools against torch's multi-head attention: one output of all places', and a probe's answer."""

import torch
import torch.nn.functional as F

from wordsight.nn.pool import AttentionPool, MAPPool


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


def test_a_probe_gets_what_torchs_attention_answers_it() -> None:
    torch.manual_seed(0)
    pool = MAPPool(16, 4, 24, "gelu_tanh", norm_eps=1e-6).double()
    torch.nn.init.normal_(pool.attn.qkv.bias)
    peer = torch.nn.MultiheadAttention(16, 4, batch_first=True).double()
    peer.load_state_dict(
        {
            "in_proj_weight": pool.attn.qkv.weight,
            "in_proj_bias": pool.attn.qkv.bias,
            "out_proj.weight": pool.attn.proj.weight,
            "out_proj.bias": pool.attn.proj.bias,
        }
    )
    x = torch.randn(3, 7, 16, dtype=torch.float64)
    answer = peer(pool.probe.expand(3, 1, 16), x, x)[0][:, 0]
    hidden = pool.mlp.fc1(F.layer_norm(answer, (16,), pool.norm.weight, pool.norm.bias, 1e-6))
    torch.testing.assert_close(pool(x), answer + pool.mlp.fc2(F.gelu(hidden, approximate="tanh")), rtol=0, atol=1e-12)
    order = torch.randperm(7)
    torch.testing.assert_close(pool(x[:, order]), pool(x), rtol=0, atol=1e-12)
