"""Muon against torch's own for matrices, its orthogonalisation in closed form, convolutions as matrices, AdamW beside it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from wordsight.train.muon import MuonAdamW, hidden_weights, orthogonalize


@pytest.mark.parametrize("shape", [(8, 8), (5, 40), (40, 5)])
def test_orthogonalize_keeps_directions_and_levels_singular_values(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, dtype=torch.float64)
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    got = orthogonalize(matrix)
    in_its_own_basis = u.T @ got @ v.T
    levels = in_its_own_basis.diagonal()
    assert (in_its_own_basis - levels.diag()).abs().max() < 1e-10
    large = s > 0.05 * s.max()
    assert levels[large].min() > 0.6
    assert levels.max() < 1.25


def test_orthogonalize_does_not_see_the_scale() -> None:
    matrix = torch.randn(6, 9, dtype=torch.float64)
    torch.testing.assert_close(orthogonalize(matrix * 1e4), orthogonalize(matrix), rtol=1e-6, atol=1e-9)
    assert torch.equal(orthogonalize(torch.zeros(3, 4)), torch.zeros(3, 4))


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")
@pytest.mark.parametrize("shape", [(12, 30), (30, 12)])
def test_updates_equal_torchs_muon(shape: tuple[int, int]) -> None:
    """torch computes the orthogonalisation in bfloat16: equal to its precision, over five updates."""
    ours, theirs = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.empty(shape))
    theirs.data.copy_(ours.data)
    start = ours.detach().clone()
    mine = MuonAdamW([{"params": [ours], "muon": True, "weight_decay": 0.1, "lr": 0.02}])
    reference = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, momentum=0.95, nesterov=True, adjust_lr_fn="original")
    for _ in range(5):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        mine.step()
        reference.step()
    assert (ours - theirs).norm() < 0.02 * (ours - start).norm()


def test_a_convolution_is_a_matrix_of_its_outputs() -> None:
    weight = torch.randn(6, 3, 2, 2)
    conv, matrix = nn.Parameter(weight.clone()), nn.Parameter(weight.flatten(1).clone())
    gradient = torch.randn_like(weight)
    for parameter, grad in ((conv, gradient), (matrix, gradient.flatten(1))):
        parameter.grad = grad
        MuonAdamW([{"params": [parameter], "muon": True, "weight_decay": 0.0, "lr": 0.1}]).step()
    torch.testing.assert_close(conv.flatten(1), matrix)


def test_other_groups_get_adamw_and_gradients_stay() -> None:
    a, b, c = (nn.Parameter(torch.randn(4, 5)) for _ in range(3))
    c.data.copy_(b.data)
    mixed = MuonAdamW([{"params": [a], "muon": True, "lr": 0.1}, {"params": [b]}], lr=1e-2, weight_decay=0.3)
    plain = torch.optim.AdamW([c], lr=1e-2, weight_decay=0.3)
    for _ in range(3):
        a.grad, b.grad = torch.randn(4, 5), torch.randn(4, 5)
        c.grad = b.grad.clone()
        mixed.step()
        plain.step()
    torch.testing.assert_close(b, c)
    assert a.grad is not None
    assert set(mixed.state[a]) == {"momentum"}


def test_embeddings_and_vectors_are_not_hidden() -> None:
    model = nn.ModuleDict(
        {"table": nn.Embedding(5, 4), "norm": nn.LayerNorm(4), "fc": nn.Linear(4, 3), "conv": nn.Conv2d(3, 2, 1)}
    )
    assert hidden_weights(model) == {model["fc"].weight, model["conv"].weight}
