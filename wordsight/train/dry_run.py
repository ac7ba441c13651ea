"""A look at a run before it is started: its recipe, sizes, memory, and two real steps that leave nothing behind."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from wordsight.train import distributed, optim
from wordsight.train.distributed import World
from wordsight.train.recipe import Recipe, to_json
from wordsight.train.setup import build, compile_parts
from wordsight.train.sharded import blocks
from wordsight.train.sharded import check as check_parallel
from wordsight.train.step import Stepper
from wordsight.types import Batch


def dry_run(recipe: Recipe, *, device: str, processes: int, say: Callable[[str], None]) -> None:
    """Print the resolved recipe, parameter counts, a memory estimate and the samples of a step, and run two steps.

    Args:
        recipe: what would be trained.
        device: as for `fit`.
        processes: how many would train; here one does, with the rows of the first one.
        say: takes the lines.
    """
    where = distributed.pick_device(device, World())
    check_parallel(recipe)
    say(json.dumps(to_json(recipe), indent=1))
    parts = build(recipe, where, World(size=processes))
    system = parts.system.train()
    total_steps = recipe.num_steps(parts.loader.samples_per_epoch)
    rows = recipe.batch_size // processes
    micro = min(recipe.micro_batch_size or rows, rows)
    say(
        f"\nsamples a step: {recipe.batch_size} = {processes} process(es) x {rows}, {micro} in memory at once; an epoch is "
        f"{parts.loader.samples_per_epoch} samples; the run is {total_steps} steps, {total_steps * recipe.batch_size} samples, "
        f"{total_steps * recipe.batch_size / parts.loader.samples_per_epoch:.2f} epochs"
    )
    for line in _parameter_lines(system):
        say(line)
    batches = parts.loader.batches()
    first = next(batches).to(where)
    say(f"the first samples: {', '.join(first.keys[:4])}")
    optimizer = optim.make_optimizer(system, recipe.optim, where)
    average = optim.Averaged(system, recipe.ema_decay) if recipe.ema_decay is not None else None
    if recipe.compile:
        compile_parts(system)
    stepper = Stepper(system, micro_batch_size=micro, precision=recipe.precision, seed=recipe.seed, prepare=parts.prepare)
    activations = _measure_activations(stepper, first, micro)
    sharing = processes if recipe.parallel == "fsdp" else 1
    for line in _memory_lines(system, activations, average is not None, sharing):
        say(line)
    for step, batch in enumerate((first, next(batches).to(where)), start=1):
        began = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        loss = stepper.backward(batch, step)
        norm = optim.clip_gradients([p for p in system.parameters() if p.requires_grad], recipe.optim.grad_clip)
        optim.set_learning_rate(optimizer, optim.learning_rate(step, total_steps, recipe.optim), recipe.optim)
        optimizer.step()
        if average is not None:
            average.update(system, step)
        value = loss.total.item()  # waits for the device
        say(
            f"step {step}: loss {value:.4f}, gradient norm {norm.item():.3g}, "
            f"{time.perf_counter() - began:.2f} s for {loss.rows} samples"
        )
    if where.type == "cuda":
        say(f"peak on the GPU: {_bytes(torch.cuda.max_memory_allocated(where))}")


def _parameter_lines(system: nn.Module) -> Iterable[str]:
    def count(parameters: Iterable[Tensor]) -> int:
        return sum(p.numel() for p in parameters)

    yield f"parameters: {count(system.parameters()):,}, trainable {count(p for p in system.parameters() if p.requires_grad):,}"
    for name, child in system.named_children():
        yield f"  {name}: {count(child.parameters()):,}"
    own = count(p for _, p in system.named_parameters(recurse=False))
    if own:
        yield f"  itself: {own:,}"


def _measure_activations(stepper: Stepper, batch: Batch, micro: int) -> int:
    """Bytes that autograd keeps of one micro-batch, by counting them: no formula knows every model."""
    seen: dict[int, int] = {p.untyped_storage().data_ptr(): 0 for p in stepper.system.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        seen.setdefault(storage.data_ptr(), storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        stepper.backward(batch.split(micro)[0], 1)
    stepper.system.zero_grad(set_to_none=True)
    return sum(seen.values())


def _memory_lines(system: nn.Module, activations: int, averaged: bool, sharing: int) -> Iterable[str]:
    def held(parameters: Iterable[Tensor]) -> int:
        return sum(p.numel() * p.element_size() for p in parameters)

    weights = held(system.parameters()) // sharing
    trained = held(p for p in system.parameters() if p.requires_grad) // sharing
    average = weights if averaged else 0
    total = weights + 3 * trained + average + activations
    yield (
        f"memory for one process, about {_bytes(total)}: weights {_bytes(weights)}, gradients {_bytes(trained)}, "
        f"AdamW {_bytes(2 * trained)}, average {_bytes(average)}, activations of a micro-batch {_bytes(activations)}"
    )
    if sharing > 1:
        units = [set(unit.parameters()) for unit in blocks(system)]
        largest = max((held(unit) for unit in units), default=0)
        rest = held(set(system.parameters()).difference(*units))
        yield (
            f"FSDP2: each process holds 1/{sharing} of the model. The {_bytes(rest)} outside of its {len(units)} blocks, and the "
            f"block that computes ({_bytes(largest)} at most), are gathered for a while, their gradients too. Evaluations and "
            "model folders take a whole copy."
        )


def _bytes(number: int) -> str:
    for unit in ("B", "KB", "MB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000  # type: ignore[assignment]
    return f"{number:.3g} GB"
