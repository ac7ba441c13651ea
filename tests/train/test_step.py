"""The gradients of one update: equal for every split into micro-batches, with replayed random numbers and untouched
statistics."""

import math

import pytest
import torch
from torch import nn

import wordsight
from tests.train.systems import Normed, TwoTerms, tiny_batch, tiny_clip
from wordsight.nn.random import numbered_rows
from wordsight.train.step import Stepper, derive_seed, recalibrate
from wordsight.types import Batch


def gradients(system: nn.Module, micro: int | None, **kwargs: object) -> tuple[float, dict[str, torch.Tensor]]:
    system.zero_grad()
    loss = Stepper(system, micro_batch_size=micro, **kwargs).backward(tiny_batch(dtype=torch.float64), step=3)
    return loss.total.item(), {n: p.grad.clone() for n, p in system.named_parameters() if p.grad is not None}


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    assert a
    return max((a[n] - b[n]).abs().max().item() for n in a)


@pytest.mark.parametrize("micro", [12, 6, 5, 1])
@pytest.mark.parametrize("duplicates", ["plain", "multi_positive"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_micro_batches_give_the_gradients_of_one_batch(micro: int, duplicates: str, checkpointing: bool) -> None:
    model = tiny_clip(patch_dropout=0.5, stochastic_depth=0.3, duplicates=duplicates).double()
    # the same step by plain autograd, one batch, one graph
    with numbered_rows(derive_seed(0, 3), 0, "cpu"):
        term = model.loss(tiny_batch(dtype=torch.float64))["contrastive"]
    term.value.backward()
    plain = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.set_activation_checkpointing(checkpointing)
    loss, found = gradients(model, micro)
    assert abs(loss - term.value.item()) < 1e-12
    assert largest_difference(plain, found) < 1e-12


def test_the_dropped_patches_are_those_of_the_step() -> None:
    model = tiny_clip(patch_dropout=0.5).double()
    stepper = Stepper(model, micro_batch_size=4)
    losses = [stepper.backward(tiny_batch(dtype=torch.float64), step=step).total.item() for step in (3, 4, 3)]
    assert losses[0] == losses[2]
    assert losses[0] != losses[1]


def test_draws_from_torchs_own_generator_are_replayed() -> None:
    class Noisy(Normed):
        def embeddings(self, batch):  # type: ignore[no-untyped-def]
            out = super().embeddings(batch)
            self.drawn.append(torch.rand(1).item())
            return {**out, "image": nn.functional.dropout(out["image"], 0.5)}

    model = Noisy().double()
    model.drawn = []
    Stepper(model, micro_batch_size=4).backward(tiny_batch(dtype=torch.float64), step=1)
    assert len(model.drawn) == 5  # 3 micro-batches, two of them twice
    assert model.drawn[3:] == model.drawn[:2]
    assert len(set(model.drawn)) == 3


@pytest.mark.parametrize("micro", [12, 5, 1])
def test_terms_keep_their_own_denominators(micro: int) -> None:
    torch.manual_seed(0)
    model = TwoTerms().double()
    terms = model.loss(tiny_batch(dtype=torch.float64))
    total = 0.3 * terms["bright"].value + terms["mean"].value
    total.backward()
    plain = {n: p.grad.clone() for n, p in model.named_parameters()}
    loss, found = gradients(model, micro)
    assert abs(loss - total.item()) < 1e-12
    assert largest_difference(plain, found) < 1e-12


@pytest.mark.parametrize("micro", [12, 4])
def test_running_statistics_move_once_a_micro_batch(micro: int) -> None:
    torch.manual_seed(0)
    model = Normed().double()
    expected = nn.BatchNorm2d(4).double()
    parts = tiny_batch(dtype=torch.float64).split(micro)
    for part in [parts[-1], *parts[:-1]]:  # the last one's graph is kept and goes first
        expected(model.tower[0](part.pixels))
    gradients(model, micro)
    assert model.tower[1].num_batches_tracked == len(parts)
    assert (model.tower[1].running_mean - expected.running_mean).abs().max() < 1e-12
    assert (model.tower[1].running_var - expected.running_var).abs().max() < 1e-12


def test_a_row_left_over_joins_the_micro_batch_before_it_where_batch_norm_needs_two() -> None:
    torch.manual_seed(0)
    model, batch = Normed(vectors=True).double(), tiny_batch(9, dtype=torch.float64)
    expected = nn.BatchNorm1d(3 * 16 * 16).double()
    for rows in (slice(4, 9), slice(0, 4)):  # the last one's graph is kept and goes first
        expected(batch.pixels[rows].flatten(1))
    Stepper(model, micro_batch_size=4).backward(batch, step=3)
    assert model.tower[1].num_batches_tracked == 2
    assert (model.tower[1].running_mean - expected.running_mean).abs().max() < 1e-12
    assert (model.tower[1].running_var - expected.running_var).abs().max() < 1e-12
    assert [len(part) for part in batch.split(4)] == [4, 4, 1]
    assert [part.keys for part in batch.split(8, least=2)] == [batch.keys]
    assert [len(part) for part in batch.split(3, least=2)] == [3, 3, 3]


@pytest.mark.parametrize(("rows", "micro"), [(1, None), (1, 4), (3, 1)])
def test_a_row_alone_under_batch_norm_is_a_clear_error(rows: int, micro: int | None) -> None:
    with pytest.raises(ValueError, match=r"sample 'sample-0' alone in a micro-batch.* batch_size to two samples a process"):
        Stepper(Normed(vectors=True), micro_batch_size=micro).backward(tiny_batch(rows), step=1)


@pytest.mark.parametrize("rows", [1, 2])
def test_a_batch_of_one_and_of_copies_of_one_have_their_closed_forms(rows: int) -> None:
    """A choice among equals costs log B, whether the copies count as right ones or not, and pulls at no scale."""
    for duplicates in ("plain", "multi_positive"):
        model, batch = tiny_clip(duplicates=duplicates).double(), tiny_batch(1, dtype=torch.float64)
        copies = Batch(**{name: value.repeat_interleave(rows, 0) for name, value in batch.tensors().items()}, keys=("a",) * rows)
        loss = Stepper(model, micro_batch_size=1).backward(copies, step=1)
        assert loss.total.item() == pytest.approx(math.log(rows), abs=1e-12)
        assert max(p.grad.abs().max().item() for p in model.parameters() if p.grad is not None) < 1e-12


def test_bf16_gradients_reach_every_parameter_in_both_passes() -> None:
    model = tiny_clip()
    model.zero_grad()
    Stepper(model, micro_batch_size=4, precision="bf16").backward(tiny_batch(), step=1)
    exact = tiny_clip()
    Stepper(exact).backward(tiny_batch(), step=1)
    for (name, p), q in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert p.grad is not None, name
        assert (p.grad - q.grad).norm() <= 0.05 * q.grad.norm() + 1e-4, name


def test_frozen_parts_get_no_gradient() -> None:
    model = tiny_clip().double()
    model.image_tower.requires_grad_(False)
    _, found = gradients(model, 5)
    assert all(name.startswith(("text_tower", "log_scale")) for name in found)
    _, whole = gradients(model, None)
    assert largest_difference(found, whole) < 1e-12


def test_what_cannot_be_trained_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Linear can't be trained: it has no method `loss"):
        Stepper(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="micro_batch_size must be at least 1"):
        Stepper(tiny_clip(), micro_batch_size=0)


def test_recalibrated_statistics_are_the_mean_over_batches() -> None:
    model = wordsight.create("clip-tiny-resnet").train()
    norm = model.image_tower.stem.bn1
    inputs: list[torch.Tensor] = []
    norm.register_forward_pre_hook(lambda _, args: inputs.append(args[0].double()))
    size = model.preprocessor.image_size_px
    tokens = model.tokenize(["a", "b", "c", "d"])
    ids = torch.arange(4)
    batches = [Batch(torch.randn(4, 3, size, size), tokens, ids, ids, ("a", "b", "c", "d")) for _ in range(3)]
    weights = {name: value.clone() for name, value in model.named_parameters()}
    momentum = norm.momentum
    recalibrate(model, batches)
    means = torch.stack([x.mean((0, 2, 3)) for x in inputs])
    variances = torch.stack([x.var((0, 2, 3)) for x in inputs])
    torch.testing.assert_close(norm.running_mean.double(), means.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(norm.running_var.double(), variances.mean(0), rtol=1e-5, atol=1e-6)
    assert model.training
    assert norm.momentum == momentum
    assert all(torch.equal(value, weights[name]) for name, value in model.named_parameters())
