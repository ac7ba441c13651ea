"""Captions, labels, weights and hard negatives over processes: every system's loss and gradients are those of one process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.distributed.processes import in_processes
from tests.models.rich import SYSTEMS, make, rich_batch
from wordsight.train.distributed import World, join
from wordsight.train.step import Stepper
from wordsight.types import Batch

SHARES = {2: [([5, 4], None), ([8, 1], 3), ([9, 0], 4)], 3: [([3, 3, 3], None), ([2, 0, 7], 2)]}


def rows(batch: Batch, start: int, stop: int) -> Batch:
    return replace(batch, keys=batch.keys[start:stop], **{name: value[start:stop] for name, value in batch.tensors().items()})


def one_step(name: str, sizes: list[int], micro: int | None, exchange: str) -> tuple[float, dict[str, torch.Tensor]]:
    world = World.from_environment()
    system = make(name).train()
    start = sum(sizes[: world.rank])
    mine = rows(rich_batch(system, rows=9), start, start + sizes[world.rank])
    with join(world, torch.device("cpu")):
        stepper = Stepper(system, world=world, micro_batch_size=micro, exchange=exchange)
        loss = stepper.backward(mine, 2, sizes)
    return loss.total.item(), {name: p.grad.clone() for name, p in system.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_give_the_loss_and_gradients_of_one(processes: int, tmp_path: Path) -> None:
    """Around a ring and gathered, with micro-batches, unequal shares and a process without rows, to 1e-12 in float64."""
    cases = [
        (name, sizes, micro, exchange)
        for name in SYSTEMS
        for sizes, micro in SHARES[processes]
        for exchange in ("ring", "gather")
    ]

    def run() -> list[tuple[float, dict[str, torch.Tensor]]]:
        with join(World.from_environment(), torch.device("cpu")):
            return [one_step(*case) for case in cases]

    alone = {name: one_step(name, [9], None, "ring") for name in SYSTEMS}
    for results in in_processes(processes, run, tmp_path):
        for case, (loss, found) in zip(cases, results, strict=True):
            right_loss, right = alone[case[0]]
            assert abs(loss - right_loss) < 1e-12, case
            assert max((found[name] - right[name]).abs().max().item() for name in right) < 1e-12, case
