"""BERT: padding changes nothing, rows of padding stay finite, dropout by row, bad configs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from wordsight.nn.bert import Bert, BertConfig
from wordsight.nn.random import number_streams, numbered_rows

TINY = BertConfig(vocab_size=50, context_length=16, width=24, num_layers=2, num_heads=3)


def make(**changes: object) -> Bert:
    return Bert(replace(TINY, **changes), 24).double().eval()


def texts(rows: int = 5, pad_id: int = 0) -> torch.Tensor:
    tokens = torch.randint(1, 50, (rows, 16))
    tokens[tokens == pad_id] = 2
    ends = torch.randint(2, 16, (rows, 1))
    return torch.where(torch.arange(16) < ends, tokens, pad_id)


@pytest.mark.parametrize("pool", ["cls", "mean", "pooler"])
@pytest.mark.parametrize("pad_id", [0, 7])
def test_padding_changes_nothing(pool: str, pad_id: int) -> None:
    tower, tokens = make(pool=pool, pad_id=pad_id), texts(pad_id=pad_id)
    expected = tower(tokens)
    longest = int((tokens != pad_id).sum(1).max())
    assert torch.equal(tower(tokens[:, :longest]), expected)
    alone = torch.cat([tower(row[row != pad_id][None]) for row in tokens])
    torch.testing.assert_close(alone, expected, rtol=0, atol=1e-12)


def test_every_token_before_the_padding_counts_even_a_padding_token() -> None:
    tower, tokens = make(pool="mean"), texts(1)
    tokens[0, 1] = 0
    changed = tower.token_embedding.weight.detach().clone()
    before = tower(tokens)
    changed[0] = torch.randn(24)
    tower.token_embedding.weight.data.copy_(changed)
    assert not torch.allclose(tower(tokens), before)


@pytest.mark.parametrize("pool", ["cls", "mean", "pooler"])
def test_a_row_of_padding_alone_stays_finite(pool: str) -> None:
    tower = make(pool=pool)
    tokens = torch.cat([texts(2), torch.zeros(1, 16, dtype=torch.int64)])
    tower(tokens).sum().backward()
    assert all(p.grad.isfinite().all() for p in tower.parameters())


def test_checkpointing_changes_nothing_dropout_included() -> None:
    found = []
    tower, tokens = make(dropout=0.3).train(), texts()
    number_streams(tower)
    for enabled in (False, True):
        tower.zero_grad()
        tower.set_activation_checkpointing(enabled)
        with numbered_rows(1, 0, "cpu"):
            out = tower(tokens)
            out.square().sum().backward()
        found.append((out, [p.grad.clone() for p in tower.parameters()]))
    (out, gradients), (out2, gradients2) = found
    assert torch.equal(out, out2)
    assert all(torch.equal(a, b) for a, b in zip(gradients, gradients2, strict=True))


def test_dropout_belongs_to_row_and_place() -> None:
    """Whatever the micro-batch and the padding, and only in training."""
    tower, tokens = make(dropout=0.3).train(), texts(6)
    number_streams(tower)
    with torch.no_grad():
        with numbered_rows(3, 0, "cpu"):
            whole = tower(tokens)
        parts = []
        for i in range(6):
            with numbered_rows(3, i, "cpu"):
                parts.append(tower(tokens[i : i + 1]))
        torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-12)
        plain = tower.eval()(tokens)
    assert not torch.allclose(plain, whole)
    drop = tower.drop_embed.train()
    kept = (drop(torch.ones(64, 10, 10)) > 0).float().mean().item()
    assert kept == pytest.approx(0.7, abs=0.02)


def test_only_the_first_segment_is_used() -> None:
    tower = make()
    tower(texts()).sum().backward()
    assert tower.type_embedding.grad[0].any()
    assert not tower.type_embedding.grad[1].any()


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        ({"pool": "max"}, "pool must be one of cls, mean, pooler"),
        ({"num_layers": 0}, "at least 1 layer"),
        ({"pad_id": 50}, r"pad_id must be in \[0, 50\)"),
        ({"dropout": 1.0}, "dropout"),
        ({"activation": "tanh"}, "'tanh'"),
    ],
)
def test_impossible_configs_are_refused(bad: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        replace(TINY, **bad)
    with pytest.raises(ValueError, match="width 24 without a projection can't give 8"):
        Bert(replace(TINY, project=False), 8)
