"""FSDP2: two and three gloo processes that split the weights give the loss, gradients, updates and runs of one process."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.fsdp  # once here instead of once in each child
from torch import nn

import wordsight

from tests.distributed.processes import in_processes
from tests.distributed.test_gradients import dropping_clip, rows
from tests.distributed.test_run import training
from tests.train.conftest import _quick_report, pairs, recipe, tokenizer_folder  # noqa: F401 - fixtures
from tests.train.systems import TwoTerms, tiny_batch, tiny_clip
from tests.train.test_loop import assert_same_run, state_of, stop_at
from wordsight.evaluate.retrieval import Retrieval
from wordsight.train import optim
from wordsight.train.distributed import World, join
from wordsight.train.loop import fit
from wordsight.train.recipe import Evaluation, OptimConfig, Recipe
from wordsight.train.sharded import Sharded, blocks, held_bytes, is_split, whole
from wordsight.train.step import Stepper

CPU = torch.device("cpu")


def checkpointing_clip() -> nn.Module:
    system = dropping_clip()
    system.set_activation_checkpointing(True)
    return system


def two_steps(
    make: Callable[[], nn.Module], sizes: list[int], micro: int | None, dtype: torch.dtype, exchange: str, split: bool
) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss and the whole gradients of the second of two steps."""
    world = World.from_environment()
    torch.manual_seed(0)
    system = make().to(dtype)
    start = sum(sizes[: world.rank])
    mine = rows(tiny_batch(rows=sum(sizes), dtype=dtype), start, start + sizes[world.rank])
    sharded = Sharded(system, world, CPU) if split else None
    stepper = Stepper(system, world=world, micro_batch_size=micro, exchange=exchange, sharded=sharded)
    for step in (1, 2):
        system.zero_grad(set_to_none=True)
        loss = stepper.backward(mine, step, sizes)
    return loss.total.item(), {name: whole(p.grad).clone() for name, p in system.named_parameters()}


SHARES: dict[int, list[tuple[Any, ...]]] = {
    2: [
        (dropping_clip, [6, 6], None),
        (checkpointing_clip, [7, 5], 3),
        (dropping_clip, [10, 2], 3),
        (checkpointing_clip, [12, 0], 5),
        (TwoTerms, [9, 3], 2),
        (TwoTerms, [0, 12], None),
    ],
    3: [(dropping_clip, [4, 4, 4], None), (checkpointing_clip, [5, 1, 6], 2), (dropping_clip, [0, 12, 0], 5)],
}


@pytest.mark.parametrize("processes", [2, 3])
def test_split_weights_give_the_gradients_of_one_process(processes: int, tmp_path: Path) -> None:
    cases = [
        (*share, dtype, exchange)
        for share in SHARES[processes]
        for dtype in (torch.float64, torch.float32)
        for exchange in (("gather",) if share[0] is TwoTerms else ("ring", "gather"))
    ]

    def run() -> list[tuple[float, dict[str, torch.Tensor]]]:
        with join(World.from_environment(), CPU):
            return [two_steps(*case, True) for case in cases]

    alone = [two_steps(case[0], [12], None, *case[3:], False) for case in cases]
    for results in in_processes(processes, run, tmp_path):
        for case, (loss, gradients), (other_loss, other) in zip(cases, alone, results, strict=True):
            tolerance = 1e-10 if case[3] == torch.float64 else 1e-5
            largest = max(g.abs().max().item() for g in gradients.values())
            assert gradients.keys() == other.keys()
            assert abs(loss - other_loss) < tolerance, case
            assert max((gradients[name] - other[name]).abs().max().item() for name in gradients) < tolerance * largest, case


def updated(
    config: OptimConfig, split: bool, steps: int = 3
) -> tuple[list[float], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The gradients' norms of a few updates, then the weights and their average."""
    world = World.from_environment()
    system = tiny_clip()
    mine = rows(tiny_batch(12), 12 * world.rank // world.size, 12 * (world.rank + 1) // world.size)
    sharded = Sharded(system, world, CPU) if split else None
    optimizer = optim.make_optimizer(system, config, CPU)
    average = optim.Averaged(system, 0.9, sharded)
    stepper = Stepper(system, world=world, sharded=sharded)
    norms = []
    for step in range(1, steps + 1):
        optimizer.zero_grad(set_to_none=True)
        stepper.backward(mine, step, [12 // world.size] * world.size)
        norms.append(optim.clip_gradients(list(system.parameters()), config.grad_clip).item())
        optimizer.step()
        average.update(system, step)
    copies = (sharded.whole(system), sharded.whole(average.system)) if sharded else (system, average.system)
    return norms, *({name: p.detach() for name, p in model.named_parameters()} for model in copies)


@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_updates_of_shares_are_those_of_one_process(name: str, tmp_path: Path) -> None:
    config = OptimConfig(name=name, lr=1e-2, eps=1e-3, grad_clip=0.5)

    def run() -> Any:
        with join(World.from_environment(), CPU):
            return updated(config, True)

    norms, weights, averages = updated(config, False)
    assert min(norms) > 0.5  # so that all are clipped
    for other_norms, other_weights, other_averages in in_processes(3, run, tmp_path):
        assert norms == pytest.approx(other_norms, rel=1e-5)
        for mine, theirs in ((weights, other_weights), (averages, other_averages)):
            assert max((mine[name] - theirs[name]).abs().max().item() for name in mine) < 1e-5


def test_a_run_is_killed_and_goes_on(recipe: Recipe, pairs: Path, tmp_path: Path) -> None:  # noqa: F811
    judged = (Evaluation(evaluator=Retrieval(), data=str(pairs)),)
    recipe = replace(recipe, parallel="fsdp", steps=6, batch_size=12, activation_checkpointing=True, evaluations=judged)
    fit(recipe, tmp_path / "one", device="cpu", progress=False)
    outcomes = in_processes(2, training(recipe, tmp_path / "two"), tmp_path)
    assert outcomes[0].metrics == outcomes[1].metrics
    assert_near(tmp_path / "one", tmp_path / "two")

    with pytest.raises(AssertionError):  # in_processes, whose children did not return
        in_processes(2, lambda: stop_at(recipe, tmp_path / "parts", 5, signal.SIGKILL), tmp_path)
    assert [p.name for p in (tmp_path / "parts/checkpoints").iterdir()] == ["step-00000003"]
    for name in ("three", "alone"):
        shutil.copytree(tmp_path / "parts", tmp_path / name)
    in_processes(2, training(recipe, tmp_path / "parts"), tmp_path)
    assert_same_run(tmp_path / "two", tmp_path / "parts")
    in_processes(3, training(recipe, tmp_path / "three"), tmp_path)
    fit(replace(recipe, parallel="ddp"), tmp_path / "alone", device="cpu", progress=False)
    assert_near(tmp_path / "one", tmp_path / "three")
    assert_near(tmp_path / "one", tmp_path / "alone")

    starts = json.loads((tmp_path / "alone/environment.json").read_text())["starts"]
    assert [(start["machine"]["processes"], start["parallel"]) for start in starts] == [(2, "fsdp"), (1, None)]
    saved = state_of(tmp_path / "two")
    model = wordsight.load(str(tmp_path / "two/last"))
    assert all(torch.equal(p, saved[f"average/{name}"]) for name, p in model.named_parameters())
    assert model.embed_texts(["a red line"]).shape == (1, 8)


def assert_near(a: Path, b: Path) -> None:
    """The same lines of the log, names and shapes, and numbers but for rounding."""
    one, two = ([json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (a, b))
    assert [line.keys() for line in one] == [line.keys() for line in two]
    assert max(abs(x["loss"] - y["loss"]) for x, y in zip(one, two, strict=True) if "loss" in x) < 1e-4
    mine, theirs = state_of(a), state_of(b)
    assert {name: t.shape for name, t in mine.items()} == {name: t.shape for name, t in theirs.items()}
    assert max((mine[name] - theirs[name]).abs().max().item() for name in mine if not name.startswith("optimizer")) < 1e-3
