"""Two and three gloo processes give the loss and gradients of one: with micro-batches, unequal shares, patch dropout, and a
process without rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.distributed.processes import in_processes
from tests.train.systems import Normed, TwoTerms, tiny_batch, tiny_clip
from wordsight.train.distributed import World, join
from wordsight.train.step import Stepper, average_running_statistics
from wordsight.types import Batch


def rows(batch: Batch, start: int, stop: int) -> Batch:
    return replace(batch, keys=batch.keys[start:stop], **{name: value[start:stop] for name, value in batch.tensors().items()})


def one_step(
    make: Callable[[], nn.Module], sizes: list[int], micro: int | None, dtype: torch.dtype, exchange: str = "ring"
) -> Callable[[], tuple]:
    def run() -> tuple[float, dict[str, torch.Tensor]]:
        world = World.from_environment()
        torch.manual_seed(0)
        system = make().to(dtype)
        start = sum(sizes[: world.rank])
        mine = rows(tiny_batch(rows=sum(sizes), dtype=dtype), start, start + sizes[world.rank])
        with join(world, torch.device("cpu")):
            stepper = Stepper(system, world=world, micro_batch_size=micro, exchange=exchange)
            for step in (1, 2):  # DDP rebuilds its buckets after the first
                system.zero_grad(set_to_none=True)
                loss = stepper.backward(mine, step, sizes)
        return loss.total.item(), {name: p.grad.clone() for name, p in system.named_parameters()}

    return run


def dropping_clip() -> nn.Module:
    return tiny_clip(patch_dropout=0.5, stochastic_depth=0.3, duplicates="multi_positive")


SHARES = {
    2: [
        (dropping_clip, [6, 6], None),
        (dropping_clip, [7, 5], 3),
        (dropping_clip, [10, 2], 5),
        (dropping_clip, [12, 0], 5),
        (TwoTerms, [6, 6], None),
        (TwoTerms, [9, 3], 2),
        (TwoTerms, [0, 12], None),
    ],
    3: [(dropping_clip, [4, 4, 4], None), (dropping_clip, [5, 1, 6], 2), (dropping_clip, [0, 12, 0], 5)],
}


@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_give_the_gradients_of_one(processes: int, tmp_path: Path) -> None:
    cases = [
        (*share, dtype, exchange)
        for share in SHARES[processes]
        for dtype in (torch.float64, torch.float32)
        for exchange in (("ring", "gather") if share[0] is dropping_clip else ("ring",))
    ]

    def run() -> list[tuple[float, dict[str, torch.Tensor]]]:
        with join(World.from_environment(), torch.device("cpu")):
            return [one_step(*case)() for case in cases]

    alone = [one_step(case[0], [12], None, case[3])() for case in cases]
    for results in in_processes(processes, run, tmp_path):
        for case, (loss, gradients), (other_loss, other) in zip(cases, alone, results, strict=True):
            tolerance = 1e-10 if case[3] == torch.float64 else 1e-5
            largest = max(1.0, max(g.abs().max().item() for g in gradients.values()))
            assert abs(loss - other_loss) < tolerance, case
            assert max((gradients[name] - other[name]).abs().max().item() for name in gradients) < tolerance * largest, case


def test_running_statistics_are_the_average_of_the_processes(tmp_path: Path) -> None:
    def run() -> tuple[torch.Tensor, torch.Tensor]:
        world = World.from_environment()
        torch.manual_seed(0)
        system = Normed()
        with join(world, torch.device("cpu")):
            batch = rows(tiny_batch(12), 6 * world.rank, 6 * world.rank + 6)
            Stepper(system, world=world, exchange="gather").backward(batch, 1, [6, 6])
            before = system.tower[1].running_mean.clone()
            average_running_statistics(system, world)
        return before, system.tower[1].running_mean

    (mine, both), (other, both_there) = in_processes(2, run, tmp_path)
    assert not torch.equal(mine, other)
    assert torch.equal(both, both_there)
    assert torch.equal(both, (mine + other) / 2)


@pytest.mark.timeout(60)
def test_a_row_left_over_under_batch_norm_hangs_nobody(tmp_path: Path) -> None:
    """Shares of 5 rows in fours are one micro-batch, of 7 and 9 two: all come to DDP on the same side of the gathering."""
    shares, numbers = ([5, 7], [9, 5], [5, 4]), ([1, 2], [2, 1], [1, 1])

    def run() -> list[tuple[float, int]]:
        world, found = World.from_environment(), []
        with join(world, torch.device("cpu")):
            for sizes in shares:
                torch.manual_seed(0)
                system = Normed(vectors=True)
                stepper = Stepper(system, world=world, exchange="gather", micro_batch_size=4)
                first = sum(sizes[: world.rank])
                loss = stepper.backward(rows(tiny_batch(sum(sizes)), first, first + sizes[world.rank]), 1, sizes)
                found.append((loss.total.item(), int(system.tower[1].num_batches_tracked)))
        return found

    first, second = in_processes(2, run, tmp_path)
    assert [loss for loss, _ in first] == [loss for loss, _ in second]
    assert [[a, b] for (_, a), (_, b) in zip(first, second, strict=True)] == [*numbers]
