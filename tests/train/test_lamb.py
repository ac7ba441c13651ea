"""LAMB against timm's over many updates, its closed forms, and its state through a checkpoint."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.train.systems import tiny_batch, tiny_clip
from wordsight.train.lamb import Lamb
from wordsight.train.optim import make_optimizer, optimizer_tensors, restore_optimizer, set_learning_rate
from wordsight.train.recipe import OptimConfig, make_recipe

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weight_decay", [0.0, 1e-2])
def test_updates_equal_timms(dtype: torch.dtype, weight_decay: float) -> None:
    from timm.optim import Lamb as Reference

    shapes = [(7, 5), (3, 2, 3, 3), (6,), ()]
    mine = [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]
    mine[1].data[0] = 0.0
    theirs = [nn.Parameter(p.detach().clone()) for p in mine]
    options = {"lr": 3e-2, "betas": (0.9, 0.97), "eps": 1e-6, "weight_decay": weight_decay}
    ours, reference = Lamb(mine, **options), Reference(theirs, max_grad_norm=None, **options)
    for step in range(25):
        if step == 10:  # a schedule
            for optimizer in (ours, reference):
                optimizer.param_groups[0]["lr"] = 1e-2
        for a, b in zip(mine, theirs, strict=True):
            a.grad = torch.randn_like(a) * 10.0 ** (step % 3 - 2)
            b.grad = a.grad.clone()
        ours.step()
        reference.step()
    tolerance = 1e-6 if dtype is torch.float32 else 1e-12
    assert max((a - b).abs().max().item() for a, b in zip(mine, theirs, strict=True)) < tolerance
    assert all(p.grad is not None for p in mine)


def test_the_first_step_is_the_learning_rate_times_the_weights_own_length() -> None:
    """The ratio makes every matrix move by lr |w|, whatever its gradient's scale."""
    small, large = (nn.Parameter(torch.randn(6, 4, dtype=torch.float64)) for _ in range(2))
    before = [p.detach().clone() for p in (small, large)]
    optimizer = Lamb([small, large], lr=0.01, weight_decay=0.1)
    small.grad, large.grad = torch.randn_like(small) * 1e-3, torch.randn_like(large) * 1e3
    optimizer.step()
    for parameter, start in zip((small, large), before, strict=True):
        assert (parameter - start).norm().item() == pytest.approx(0.01 * start.norm().item(), rel=1e-9)


def test_zeros_move_like_adam_and_missing_gradients_not_at_all() -> None:
    zeros, other = nn.Parameter(torch.zeros(3, 3)), nn.Parameter(torch.ones(2, 2))
    optimizer = Lamb([zeros, other], lr=0.1, weight_decay=0.5)
    zeros.grad = torch.full((3, 3), 2.0)
    optimizer.step()
    torch.testing.assert_close(zeros, torch.full((3, 3), -0.1), rtol=1e-5, atol=0)
    assert torch.equal(other, torch.ones(2, 2))
    assert other not in optimizer.state


def test_state_survives_bit_by_bit() -> None:
    config = OptimConfig(name="lamb", lr=1e-2, weight_decay=0.01)

    def steps(model: nn.Module, optimizer: torch.optim.Optimizer, seeds: range) -> None:
        for seed in seeds:
            optimizer.zero_grad()
            model.loss(tiny_batch(seed=seed))["contrastive"].value.backward()
            set_learning_rate(optimizer, 1e-2 / (1 + seed), config)
            optimizer.step()

    model = tiny_clip()
    optimizer = make_optimizer(model, config, CPU)
    assert isinstance(optimizer, Lamb)
    steps(model, optimizer, range(3))
    saved = {name: tensor.clone() for name, tensor in optimizer_tensors(model, optimizer)}
    assert {name.rpartition("|")[2] for name in saved} == {"step", "exp_avg", "exp_avg_sq"}
    other = tiny_clip(seed=9)
    other.load_state_dict(model.state_dict())
    again = make_optimizer(other, config, CPU)
    restore_optimizer(other, again, saved)
    steps(model, optimizer, range(3, 6))
    steps(other, again, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_the_recipe_chooses_it_and_decays_matrices_alone() -> None:
    config = make_recipe("clip_tiny", ["optim.name=lamb", "optim.weight_decay=0.3"]).optim
    optimizer = make_optimizer(tiny_clip(), config, CPU)
    assert isinstance(optimizer, Lamb)
    for group in optimizer.param_groups:
        assert all((p.ndim > 1) == (group["weight_decay"] == 0.3) for p in group["params"])


@pytest.mark.parametrize("bad", [{"lr": 0.0}, {"eps": 0.0}, {"weight_decay": -1.0}, {"betas": (0.9, 1.0)}])
def test_options_out_of_range_are_refused(bad: dict) -> None:
    with pytest.raises(ValueError, match=r"LAMB needs|betas must"):
        Lamb([nn.Parameter(torch.ones(2))], **bad)
    with pytest.raises(ValueError, match="no closure"):
        Lamb([nn.Parameter(torch.ones(2))]).step(lambda: 0.0)


def test_recipes_refuse_what_does_not_go_together() -> None:
    with pytest.raises(ValueError, match="Muon goes with AdamW"):
        make_optimizer(tiny_clip(), OptimConfig(name="lamb", muon_lr=0.02), CPU)
    for settings in (["optim.name=lamb", "optim.muon_lr=none"], ["optim.muon_lr=none", "optim.name=lamb"]):
        assert make_recipe("align", settings).optim.muon_lr is None
    with pytest.raises(ValueError, match="adamw or lamb"):
        OptimConfig(name="sgd")
