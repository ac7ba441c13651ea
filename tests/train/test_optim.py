"""Decay only where it belongs, the schedule in closed form, the average, state that survives."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from tests.train.systems import tiny_batch, tiny_clip
from wordsight.train.optim import (
    Averaged,
    clip_gradients,
    learning_rate,
    make_optimizer,
    optimizer_tensors,
    restore_optimizer,
    split_by_decay,
)
from wordsight.train.recipe import OptimConfig

CPU = torch.device("cpu")


def test_gains_biases_and_scale_are_not_decayed() -> None:
    model = tiny_clip()
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, free = split_by_decay(model.named_parameters())
    assert len(decayed) + len(free) == len(names)
    assert "log_scale" in {names[id(p)] for p in free}
    assert all(names[id(p)].endswith(("bias", "class_token", "log_scale")) or "norm" in names[id(p)] for p in free)
    assert not any("norm" in names[id(p)] or names[id(p)].endswith("bias") for p in decayed)


def test_decay_without_gradient_shrinks_matrices_alone() -> None:
    model = nn.Linear(3, 2)
    weight, bias = model.weight.detach().clone(), model.bias.detach().clone()
    optimizer = make_optimizer(model, OptimConfig(lr=0.1, weight_decay=0.5), CPU)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(model.weight, weight * (1 - 0.1 * 0.5))
    assert torch.equal(model.bias, bias)


def test_the_schedule() -> None:
    config = OptimConfig(lr=2.0, warmup_steps=4, final_lr_share=0.1)
    assert [learning_rate(step, 12, config) for step in (1, 2, 4)] == [0.5, 1.0, 2.0]
    assert learning_rate(5, 12, config) == 2.0
    assert learning_rate(9, 12, config) == pytest.approx(2 * (0.1 + 0.9 * 0.5))
    assert learning_rate(7, 12, config) == pytest.approx(2 * (0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2))
    assert learning_rate(13, 12, config) == pytest.approx(0.2)
    assert learning_rate(1, 1, OptimConfig(lr=1.0)) == 1.0
    assert learning_rate(9, 12, OptimConfig(lr=1.0, schedule="constant")) == 1.0
    assert learning_rate(10, 12, OptimConfig(lr=1.0, schedule="linear")) == pytest.approx(0.25)


def test_clipping_gives_the_norm_before_it() -> None:
    model = nn.Linear(3, 2)
    model.weight.grad, model.bias.grad = torch.full((2, 3), 3.0), torch.full((2,), -3.0)
    assert clip_gradients(list(model.parameters()), None).item() == pytest.approx(math.sqrt(72))
    assert clip_gradients(list(model.parameters()), 1.0).item() == pytest.approx(math.sqrt(72))
    total = math.sqrt(sum(p.grad.square().sum().item() for p in model.parameters()))
    assert total == pytest.approx(1.0, rel=1e-5)


def test_the_average_is_the_recurrence() -> None:
    model = nn.Linear(2, 1, bias=False)
    average = Averaged(model, 0.5)
    expected = model.weight.detach().clone()
    for step in range(1, 20):
        with torch.no_grad():
            model.weight.fill_(float(step))
        average.update(model, step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    torch.testing.assert_close(average.system.weight, expected)
    assert not average.system.weight.requires_grad


def test_the_average_takes_buffers_as_they_are() -> None:
    model = nn.BatchNorm1d(2)
    average = Averaged(model, 0.9)
    model(torch.randn(4, 2))
    average.update(model, 1)
    assert torch.equal(average.system.running_mean, model.running_mean)
    assert average.system.num_batches_tracked == 1
    assert not average.system.training


def test_state_survives_bit_by_bit() -> None:
    def steps(model: nn.Module, optimizer: torch.optim.Optimizer, seeds: range) -> None:
        for seed in seeds:
            optimizer.zero_grad()
            model.loss(tiny_batch(seed=seed))["contrastive"].value.backward()
            optimizer.step()

    model = tiny_clip()
    optimizer = make_optimizer(model, OptimConfig(lr=1e-2), CPU)
    steps(model, optimizer, range(3))
    saved = {name: tensor.clone() for name, tensor in optimizer_tensors(model, optimizer)}
    other = tiny_clip(seed=9)
    other.load_state_dict(model.state_dict())
    again = make_optimizer(other, OptimConfig(lr=1e-2), CPU)
    restore_optimizer(other, again, saved)
    steps(model, optimizer, range(3, 6))
    steps(other, again, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    with pytest.raises(ValueError, match="names 'else', which the model has not"):
        restore_optimizer(other, again, {"else|step": torch.tensor(1.0)})


def test_nothing_to_train_is_an_error() -> None:
    with pytest.raises(ValueError, match="no trainable parameter"):
        make_optimizer(nn.Linear(2, 2).requires_grad_(False), OptimConfig(), CPU)
