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
from tests.models.conformance import make_batch
from tests.train.conftest import _quick_report, pairs, recipe, tokenizer_folder  # noqa: F401 - fixtures
from tests.train.systems import TwoTerms, tiny_batch, tiny_clip
from tests.train.test_loop import assert_same_run, state_of, stop_at
from wordsight import catalog
from wordsight.evaluate.retrieval import Retrieval
from wordsight.models.contrastive.clip import CLIP, CLIPConfig
from wordsight.nn.convnet import ConvNetConfig
from wordsight.nn.text import TextConfig
from wordsight.train import optim
from wordsight.train.distributed import World, join
from wordsight.train.loop import fit
from wordsight.train.recipe import Evaluation, OptimConfig, Recipe, make_recipe
from wordsight.train.sharded import Sharded, blocks, check, held_bytes, is_split, whole
from wordsight.train.step import Stepper, average_running_statistics

CPU = torch.device("cpu")


def checkpointing_clip() -> nn.Module:
    system = dropping_clip()
    system.set_activation_checkpointing(True)
    return system


def two_steps(
    make: Callable[[], nn.Module],
    sizes: list[int],
    micro: int | None,
    dtype: torch.dtype,
    exchange: str,
    split: bool,
    precision: str = "fp32",
) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss and the whole gradients of the second of two steps."""
    world = World.from_environment()
    torch.manual_seed(0)
    system = make().to(dtype)
    start = sum(sizes[: world.rank])
    mine = rows(tiny_batch(rows=sum(sizes), dtype=dtype), start, start + sizes[world.rank])
    sharded = Sharded(system, world, CPU, precision=precision) if split else None
    stepper = Stepper(system, world=world, micro_batch_size=micro, exchange=exchange, precision=precision, sharded=sharded)
    for step in (1, 2):
        system.zero_grad(set_to_none=True)
        loss = stepper.backward(mine, step, sizes)
    average_running_statistics(system, world)
    found = {name: whole(p.grad).clone() for name, p in system.named_parameters()}
    return loss.total.item(), found | {name: buffer.double() for name, buffer in system.named_buffers()}


DOUBLE, SINGLE = torch.float64, torch.float32
CASES: dict[int, list[tuple[Any, ...]]] = {
    2: [
        (dropping_clip, [6, 6], None, SINGLE, "ring"),
        (checkpointing_clip, [7, 5], 3, DOUBLE, "ring"),
        (dropping_clip, [10, 2], 3, SINGLE, "gather"),
        (checkpointing_clip, [12, 0], 5, DOUBLE, "gather"),
        (TwoTerms, [9, 3], 2, DOUBLE, "ring"),
        (TwoTerms, [0, 12], None, SINGLE, "ring"),
    ],
    3: [
        (dropping_clip, [4, 4, 4], None, DOUBLE, "gather"),
        (checkpointing_clip, [5, 1, 6], 2, DOUBLE, "ring"),
        (checkpointing_clip, [0, 12, 0], 5, SINGLE, "ring"),
    ],
}


@pytest.mark.parametrize("processes", [2, 3])
def test_split_weights_give_the_gradients_of_one_process(processes: int, tmp_path: Path) -> None:
    cases = CASES[processes]

    def run() -> list[tuple[float, dict[str, torch.Tensor]]]:
        with join(World.from_environment(), CPU):
            return [two_steps(*case, True) for case in cases]

    alone = [two_steps(case[0], [12], None, *case[3:], False) for case in cases]
    for results in in_processes(processes, run, tmp_path):
        for case, (loss, gradients), (other_loss, other) in zip(cases, alone, results, strict=True):
            tolerance = 1e-10 if case[3] == DOUBLE else 1e-5
            largest = max(g.abs().max().item() for g in gradients.values())
            assert gradients.keys() == other.keys()
            assert abs(loss - other_loss) < tolerance, case
            assert max((gradients[name] - other[name]).abs().max().item() for name in gradients) < tolerance * largest, case


def normed_clip() -> nn.Module:
    image = ConvNetConfig(image_size_px=16, patch_size_px=4, widths=(8, 16), layers=(1, 2), pool="mean")
    text = TextConfig(vocab_size=32, context_length=6, width=16, num_layers=2, num_heads=2)
    return CLIP(CLIPConfig(embed_dim=8, image=image, text=text))


def test_normed_and_bfloat16_blocks_are_as_with_whole_weights(tmp_path: Path) -> None:
    cases = [
        (normed_clip, [9, 3], DOUBLE, "fp32"),
        (normed_clip, [8, 5], SINGLE, "bf16"),
        (checkpointing_clip, [8, 5], SINGLE, "bf16"),
    ]

    def run() -> Any:
        with join(World.from_environment(), CPU):
            return [[two_steps(m, n, 3, t, "ring", split, p) for split in (False, True)] for m, n, t, p in cases]

    for results in in_processes(2, run, tmp_path):
        for case, ((loss, found), (other_loss, other)) in zip(cases, results, strict=True):
            tolerance = 1e-10 if case[2] == DOUBLE else 1e-5
            assert abs(loss - other_loss) < tolerance
            assert found.keys() == other.keys()
            assert any(name.endswith("running_mean") for name in found) == (case[0] is normed_clip)
            for name in found:
                assert (found[name] - other[name]).abs().max() < tolerance * found[name].abs().max().clamp_min(1), (case, name)


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


def test_updates_of_shares_are_those_of_one_process(tmp_path: Path) -> None:
    configs = [OptimConfig(name=name, lr=1e-2, eps=1e-3, grad_clip=0.5) for name in ("adamw", "lamb")]

    def run() -> Any:
        with join(World.from_environment(), CPU):
            return [updated(config, True) for config in configs]

    alone = [updated(config, False) for config in configs]
    assert min(alone[0][0] + alone[1][0]) > 0.5  # so that all are clipped
    assert max((alone[0][1][name] - alone[1][1][name]).abs().max().item() for name in alone[0][1]) > 1e-3
    for found in in_processes(3, run, tmp_path):
        for (norms, weights, averages), (other_norms, other_weights, other_averages) in zip(alone, found, strict=True):
            assert norms == pytest.approx(other_norms, rel=1e-5)
            for mine, theirs in ((weights, other_weights), (averages, other_averages)):
                assert max((mine[name] - theirs[name]).abs().max().item() for name in mine) < 1e-5


def test_each_process_holds_its_share(tmp_path: Path) -> None:
    def run() -> tuple[int, int, list[str], float | None]:
        world = World.from_environment()
        with join(world, CPU):
            system = tiny_clip()
            sharded = Sharded(system, world, CPU)
            optimizer = optim.make_optimizer(system, OptimConfig(), CPU)
            stepper = Stepper(system, world=world, sharded=sharded)
            stepper.backward(rows(tiny_batch(12), 0, 6), 1, [6, 6])
            optimizer.step()
            flops = stepper.flops_per_sample(tiny_batch(12), 1, sharded.zeros()) if world.is_main else None  # by one alone
            gradients = [p.grad for p in system.parameters() if p.grad is not None]
            moments = [value for state in optimizer.state.values() for key, value in state.items() if key != "step"]
            held = held_bytes([*system.parameters(), *gradients, *moments])
            with pytest.raises(ValueError, match=r"Muon needs whole matrices"):
                optim.make_optimizer(system, OptimConfig(muon_lr=1e-2), CPU)
            return held, len(list(blocks(system))), [name for name, p in system.named_parameters() if not is_split(p)], flops

    whole_bytes = 4 * 4 * sum(p.numel() for p in tiny_clip().parameters())
    counted = Stepper(tiny_clip()).flops_per_sample(tiny_batch(12), 1)
    for (held, num_blocks, kept, flops), expected in zip(in_processes(2, run, tmp_path), (counted, None), strict=True):
        assert flops == expected
        assert (num_blocks, kept) == (4, ["log_scale"])
        assert held == pytest.approx(whole_bytes / 2, rel=0.01)


def test_recipes_that_do_not_fit_are_refused(recipe: Recipe) -> None:  # noqa: F811
    split = replace(recipe, parallel="fsdp")
    check(split)
    with pytest.raises(ValueError, match=r"optim\.muon_lr=none"):
        check(replace(split, optim=replace(recipe.optim, muon_lr=1e-2)))
    with pytest.raises(ValueError, match=r"compile=false"):
        check(replace(split, compile=True))
    with pytest.raises(ValueError, match=r"ddp"):
        make_recipe("clip_tiny", ["parallel=fdsp"])


def test_a_run_is_killed_and_goes_on(recipe: Recipe, pairs: Path, tmp_path: Path) -> None:  # noqa: F811
    judged = (Evaluation(evaluator=Retrieval(), data=str(pairs)),)
    recipe = replace(recipe, parallel="fsdp", steps=6, batch_size=12, activation_checkpointing=True, evaluations=judged)
    outcomes = in_processes(2, training(recipe, tmp_path / "two"), tmp_path)
    assert outcomes[0].metrics == outcomes[1].metrics

    with pytest.raises(AssertionError):  # in_processes, whose children did not return
        in_processes(2, lambda: stop_at(recipe, tmp_path / "parts", 5, signal.SIGKILL), tmp_path)
    assert [p.name for p in (tmp_path / "parts/checkpoints").iterdir()] == ["step-00000003"]
    for name in ("three", "alone"):
        shutil.copytree(tmp_path / "parts", tmp_path / name)
    in_processes(2, training(recipe, tmp_path / "parts"), tmp_path)
    assert_same_run(tmp_path / "two", tmp_path / "parts")
    in_processes(3, training(recipe, tmp_path / "three"), tmp_path)
    fit(replace(recipe, parallel="ddp"), tmp_path / "alone", device="cpu", progress=False)
    assert_near(tmp_path / "two", tmp_path / "three")
    assert_near(tmp_path / "two", tmp_path / "alone")

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


SYSTEMS = {
    **{name: catalog.find(name).config for name in ("siglip-tiny", "align-tiny", "lit-tiny", "llip-tiny", "unicl-tiny")},
    "lit, both locked": replace(
        catalog.find("lit-tiny").config, lock_text=True, embed_dim=64, image_head="mlp", text_head="mlp", head_width=128
    ),
}


def test_every_family_is_as_with_whole_weights(tmp_path: Path) -> None:
    def one(config: Any, split: bool) -> Any:
        world = World.from_environment()
        torch.manual_seed(0)
        system = catalog.system_class(config)(config).double()
        mine = rows(make_batch(system, 8, dtype=DOUBLE), 6 * world.rank, 6 + 2 * world.rank)
        sharded = Sharded(system, world, CPU) if split else None
        loss = Stepper(system, world=world, micro_batch_size=3, sharded=sharded).backward(mine, 1, [6, 2])
        copied = sharded.whole(system) if sharded else system
        assert {name: value.shape for name, value in copied.state_dict().items()} == {
            name: value.shape for name, value in catalog.system_class(config)(config).state_dict().items()
        }
        found = {name: whole(p.grad).clone() for name, p in system.named_parameters() if p.grad is not None}
        return loss.total.item(), found | dict(copied.named_buffers())

    def run() -> Any:
        with join(World.from_environment(), CPU):
            return [[one(config, split) for split in (False, True)] for config in SYSTEMS.values()]

    for results in in_processes(2, run, tmp_path):
        for name, ((loss, found), (other_loss, other)) in zip(SYSTEMS, results, strict=True):
            assert abs(loss - other_loss) < 1e-10, name
            assert found.keys() == other.keys(), name
            largest = max(value.abs().max() for value in found.values())
            assert max((found[key] - other[key]).abs().max() for key in found) < 1e-10 * largest.clamp_min(1), name
