"""The gradients of one update, exact however the global batch is split into micro-batches and processes.

A contrastive loss couples all samples, so its gradients go in two passes (gradient caching, arXiv 2101.06983): embed every
micro-batch without a graph, take the loss of all processes' embeddings and its gradients there (around a ring, or gathered), then
embed each micro-batch again with the same random numbers and send its rows of those gradients through. The last micro-batch keeps
the graph of its first pass, so that one micro-batch costs one pass. Systems that are no ContrastiveSystem go the same way, with
the terms' counts gathered
instead of the embeddings.

Batch normalisation in training mode sees one micro-batch of one process at a time: its statistics are those of the micro-batch,
and
k micro-batches are not one batch. Running statistics are updated once a micro-batch, never by the pass without a graph. One row
alone has no variance, so a last micro-batch of one row joins the one before it.

Shape legend: B rows of this process, N rows of the global batch.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from wordsight.losses.ring import Ring
from wordsight.nn.random import number_streams, numbered_rows, uniform
from wordsight.system import ContrastiveSystem, System
from wordsight.train.distributed import World
from wordsight.train.speed import flops_per_sample
from wordsight.types import Batch, Term

if TYPE_CHECKING:
    from wordsight.train.sharded import Sharded

Draws = Callable[[int, int], Tensor]
Prepare = Callable[[Batch, Draws], Batch]


@dataclass(frozen=True, slots=True)
class StepLoss:
    """The loss of one update over the global batch, the same on every process.

    Attributes:
        total: the sum over terms of weight * sum / count.
        terms: each term's sum / count, unweighted.
        rows: samples in the global batch (bad ones are not among them).
    """

    total: Tensor
    terms: dict[str, Tensor]
    rows: int


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that is a hash of `parts`: neighbours (step 1 of rank 2, step 2 of rank 1) share nothing."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_everything(seed: int, device: torch.device) -> None:
    """Seed every generator that a system could draw from: torch's of the CPU and the device, numpy's and Python's global ones."""
    # not torch.manual_seed, which on a machine without a GPU keeps a growing list of calls for the day that it has one
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def row_draws(device: torch.device) -> Draws:
    """A function (count, B) -> [count, B] uniform in [0, 1), whose numbers belong to the rows of the global batch at hand."""
    stream = 0

    def draw(count: int, rows: int) -> Tensor:
        nonlocal stream
        stream -= 1  # the model's own streams are above 0
        return uniform(rows, count, stream=stream, device=device).T

    return draw


class _Forward(nn.Module):
    """A system's half of the step as a module's forward, which is what DistributedDataParallel wraps."""

    def __init__(self, system: nn.Module) -> None:
        super().__init__()
        self.system = system

    def forward(self, batch: Batch) -> dict[str, Any]:
        if isinstance(self.system, ContrastiveSystem):
            return self.system.embeddings(batch)
        assert isinstance(self.system, System)
        return self.system.loss(batch)


class Stepper:
    """Puts the gradients of the global batch's loss into the parameters of a system, on every process the same."""

    def __init__(
        self,
        system: nn.Module,
        *,
        world: World | None = None,
        micro_batch_size: int | None = None,
        precision: Literal["fp32", "bf16"] = "fp32",
        exchange: Literal["ring", "gather"] = "ring",
        seed: int = 0,
        prepare: Prepare | None = None,
        sharded: Sharded | None = None,
    ) -> None:
        """Wrap `system`, which must be on its device already.

        Args:
            system: an nn.Module that is a System, or a ContrastiveSystem.
            world: the processes that train together; each has its own rows of the global batch.
            micro_batch_size: rows of this process that are in memory at once (None: all of them).
            precision: "bf16" runs the towers under autocast; the contrastive loss stays outside of it.
            exchange: how a contrastive loss sees the other processes' embeddings: around a ring, block by block, or all gathered.
            seed: of the run; the random numbers of a step are a function of (seed, step, row), or where a module draws from
            torch's own
                generator, of (seed, step, rank, micro-batch).
            prepare: what is done to a micro-batch on the device first (augment, normalise), with random numbers by row, see
            `row_draws`.
            sharded: `system` as FSDP2 has split it; None: every process has all weights (DDP).
        """
        if micro_batch_size is not None and micro_batch_size < 1:
            raise ValueError(f"micro_batch_size must be at least 1, or None for the whole batch; got {micro_batch_size}")
        if not isinstance(system, System):
            raise ValueError(f"{type(system).__name__} can't be trained: it has no method `loss(batch) -> dict[str, Term]`")
        self.system, self.world, self.seed = system, world or World(), seed
        self.exchange, self.sharded = exchange, sharded
        self.micro_batch_size, self.precision, self.prepare = micro_batch_size, precision, prepare
        self.device = next(system.parameters()).device
        self._wide = torch.float32 if self.device.type == "mps" else torch.float64  # that device has no double
        number_streams(system)
        self._forward = _Forward(system)
        self._parallel: nn.Module = self._forward
        if self.world.size > 1 and sharded is None:
            self._parallel = nn.parallel.DistributedDataParallel(
                self._forward, broadcast_buffers=False, gradient_as_bucket_view=True
            )

    def backward(self, batch: Batch, step: int, sizes: Sequence[int] | None = None) -> StepLoss:
        """Put the gradients of step `step` into `.grad` (which must be empty before).

        Args:
            batch: this process's rows of the global batch, on the device.
            step: the update's number, for the random numbers.
            sizes: rows of every process, in rank order.
        """
        sizes = [len(batch)] if sizes is None else sizes
        offset = sum(sizes[: self.world.rank])
        parts, rows = self._parts(batch, sizes)
        starts = [offset + sum(rows[:i]) for i in range(len(parts))]
        last = len(parts) - 1
        outputs = []
        with torch.no_grad(), _buffers_kept(self.system, active=last > 0):
            for i in range(last):
                outputs.append(self._run(parts[i], step, i, starts[i], self._forward))
        # DDP's forward waits for the other processes, so all must come to it on the same side of the gathering: before it where
        # everyone has one micro-batch, after it otherwise, when a process with a single one has to run that again
        together = self.sharded is not None or max(sizes) <= (self.micro_batch_size or max(sizes))
        again = last == 0 and not together
        with _buffers_kept(self.system, active=rows[last] == 0 or again):
            module = self._parallel if together else self._forward
            outputs.append(self._run(parts[last], step, last, starts[last], module))

        if isinstance(self.system, ContrastiveSystem):
            loss, gradients = self._contrast(outputs, sizes, rows)
        else:
            loss, gradients = self._sum_terms(outputs, sum(sizes), rows)
        for place, i in enumerate([last, *range(last)]):  # the kept graph first, so that two are never alive at once
            final = place == last  # DDP averages over processes in this one's backward, FSDP in each
            if place or again:
                with _buffers_kept(self.system, active=rows[i] == 0):
                    outputs[i] = self._run(parts[i], step, i, starts[i], self._parallel if final else self._forward)
            roots, upstream = gradients(i, outputs[i], final)
            outputs[i] = {}
            with self._rows(step, starts[i], len(parts[i])):  # activation checkpointing draws again in here
                torch.autograd.backward(roots, upstream)
        if self.sharded is not None:
            self.sharded.average_kept()
        return loss

    def _parts(self, batch: Batch, sizes: Sequence[int]) -> tuple[list[Batch], list[int]]:
        """The micro-batches of this process, and how many rows count in each.

        A process whose samples are all bad still takes part: empty rows go through, and none of them counts. Where weights are
        split every forward and backward pass is everyone's, so a process with fewer micro-batches adds such rows.
        """
        least = 2 if tracked_norms(self.system) and self.system.training else 1
        parts = list(batch.split(self.micro_batch_size or len(batch), least=least)) if len(batch) else []
        rows = [len(part) for part in parts]
        wanted = 1
        if self.sharded is not None and self.micro_batch_size is not None:
            wanted = max(1, -(-max(sizes) // self.micro_batch_size))
        missing = max(0, wanted - len(parts))
        # first, as the last one is the first to go backward: running statistics take in the others in the order of DDP
        return [_empty_rows(batch)] * missing + parts, [0] * missing + rows

    def flops_per_sample(self, batch: Batch, step: int, system: nn.Module | None = None) -> float:
        """Operations forward and backward of one sample of this batch, see `speed.flops_per_sample`; it leaves nothing behind.

        `system` is counted in the place of the stepper's own: a whole copy, where that computes with all processes alone.
        """
        counted, part = self.system if system is None else system, batch.split(2)[0]
        module = _Forward(counted)
        with _buffers_kept(counted, active=True):
            return flops_per_sample(counted, lambda: self._run(part, step, 0, 0, module), len(part))

    def _rows(self, step: int, first_row: int, num_rows: int) -> AbstractContextManager[None]:
        return numbered_rows(derive_seed(self.seed, step), first_row, self.device, num_rows)

    def _run(self, part: Batch, step: int, micro: int, first_row: int, module: nn.Module) -> dict[str, Any]:
        """One micro-batch through the system with its own random numbers, the same whenever it is called."""
        seed = derive_seed(self.seed, step, self.world.rank, micro)
        seed_everything(seed, self.device)
        with self._rows(step, first_row, len(part)):
            if self.prepare is not None:
                part = self.prepare(part, row_draws(self.device))
            bf16 = self.precision == "bf16"
            # entered anew for each pass: autocast would otherwise reuse the weights that it cast without a graph
            with torch.autocast(self.device.type, torch.bfloat16) if bf16 else nullcontext(), _lone_row_named(part):
                return module(part)

    def _contrast(self, outputs: list[dict[str, Tensor]], sizes: Sequence[int], rows: list[int]) -> tuple[StepLoss, Any]:
        """The loss on everyone's embeddings, and a function that gives each micro-batch's gradients."""
        trained = [name for name, value in outputs[-1].items() if value.requires_grad]
        ring = Ring() if self.exchange == "ring" and self.world.size > 1 else None
        everyone: dict[str, Tensor] = {}
        for name in outputs[-1]:
            mine = torch.cat([output[name].detach()[:n] for output, n in zip(outputs, rows, strict=True)])
            everyone[name] = (mine if ring else self.world.gather_rows(mine, sizes)).requires_grad_(name in trained)
        system = cast(ContrastiveSystem, self.system)
        parameters = [p for p in system.loss_parameters() if p.requires_grad]
        with torch.enable_grad():
            terms = system.loss_from_embeddings(everyone, ring)
            total = torch.stack([term.weight * term.value for term in terms.values()]).sum()
        wanted = [everyone[name] for name in trained] + parameters
        raw = torch.autograd.grad(total, wanted, allow_unused=True)
        found = [torch.zeros_like(w) if g is None else g for w, g in zip(wanted, raw, strict=True)]
        at_rows, at_parameters = dict(zip(trained, found, strict=False)), found[len(trained) :]
        # each process holds the gradients of its own rows, whose sum is wanted where DDP (or FSDP) averages; a ring's are ready
        offset, copies = (0, 1) if ring else (sum(sizes[: self.world.rank]), self.world.size)

        def gradients(i: int, output: dict[str, Tensor], final: bool) -> tuple[list[Tensor], list[Tensor]]:
            start = offset + sum(rows[:i])
            roots = [output[name][: rows[i]] for name in trained]
            upstream = [at_rows[name][start : start + rows[i]] * copies for name in trained]
            if final:  # the average over processes of these is what is wanted
                roots, upstream = roots + list(parameters), upstream + at_parameters
            return roots, upstream

        values = {name: term.value.detach() for name, term in terms.items()}
        return StepLoss(total.detach(), values, sum(sizes)), gradients

    def _sum_terms(self, outputs: list[dict[str, Term]], num_rows: int, rows: list[int]) -> tuple[StepLoss, Any]:
        """The loss from everyone's sums and counts, and a function that gives each micro-batch's gradients."""
        names = sorted(outputs[-1])
        counted = torch.tensor([float(n > 0) for n in rows], dtype=self._wide, device=self.device)

        def added(values: list[Any]) -> Tensor:
            found = torch.stack([torch.as_tensor(v, dtype=self._wide, device=self.device).detach() for v in values])
            return (found * counted).sum()

        local = [added([o[n].sum for o in outputs]) for n in names] + [added([o[n].count for o in outputs]) for n in names]
        totals = self.world.add(torch.stack(local))
        sums, counts = dict(zip(names, totals, strict=False)), dict(zip(names, totals[len(names) :], strict=True))
        weights = {name: outputs[-1][name].weight for name in names}
        share = {n: torch.where(counts[n] > 0, 1 / counts[n].clamp_min(1e-30), 0.0) for n in names}

        def gradients(i: int, output: dict[str, Term], final: bool) -> tuple[list[Tensor], list[Tensor]]:
            roots = [output[name].sum for name in names if output[name].sum.requires_grad]
            used = [name for name in names if output[name].sum.requires_grad]
            scale = self.world.size if rows[i] else 0.0
            return roots, [(weights[n] * scale * share[n]).to(output[n].sum.dtype) for n in used]

        values = {name: sums[name] * share[name] for name in names}
        total = torch.stack([weights[name] * values[name] for name in names]).sum()
        return StepLoss(total, values, num_rows), gradients


@contextmanager
def _buffers_kept(system: nn.Module, active: bool) -> Iterator[None]:
    """Put buffers back afterwards, as if the block had not run."""
    before = copy_buffers(system) if active else None
    yield
    if before is not None:
        put_buffers(system, before)


@contextmanager
def _lone_row_named(part: Batch) -> Iterator[None]:
    """Say what to do where batch norm meets a single row with one value per channel, which torch refuses."""
    try:
        yield
    except ValueError as error:
        if len(part) == 1 and "more than 1 value per channel" in str(error):
            raise ValueError(
                f"a process has the sample {part.keys[0]!r} alone in a micro-batch, and batch norm in training needs two rows: "
                "set batch_size to two samples a process or more, and micro_batch_size to 2 or more"
            ) from error
        raise


def copy_buffers(system: nn.Module) -> list[Tensor]:
    """A system's buffers (running statistics) as they are now."""
    return [buffer.detach().clone() for buffer in system.buffers()]


def put_buffers(system: nn.Module, values: list[Tensor]) -> None:
    """Put back what `copy_buffers` gave."""
    for buffer, value in zip(system.buffers(), values, strict=True):
        buffer.data.copy_(value)  # past the version counter: a graph that is alive never reads running statistics


def _empty_rows(batch: Batch) -> Batch:
    """A batch of two rows of zeros, as batch norm takes no single one, in the shapes of `batch`, which may have no rows."""
    rows: dict[str, Any] = {name: value.new_zeros(2, *value.shape[1:]) for name, value in batch.tensors().items()}
    return replace(batch, keys=("", ""), **rows)


def tracked_norms(system: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """The batch norms of a system that keep running statistics."""
    return [m for m in system.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]


@torch.no_grad()
def recalibrate(system: nn.Module, batches: Iterable[Batch]) -> None:
    """Take batch norm's running statistics anew: their mean over `batches`, with the weights as they are (arXiv 2105.07576, 3.1).

    Averaged weights have no statistics of their own, and those of training are of augmented pictures, which a model does not see
    in use.
    """
    norms = tracked_norms(system)
    if not norms:
        return
    forward = system.embeddings if isinstance(system, ContrastiveSystem) else system.loss
    before = system.training, [norm.momentum for norm in norms]
    system.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over batches
        norm.train()
    for batch in batches:
        forward(batch)  # type: ignore[operator]
    system.train(before[0])
    for norm, momentum in zip(norms, before[1], strict=True):
        norm.momentum = momentum


def average_running_statistics(system: nn.Module, world: World) -> None:
    """Make batch normalisation's running statistics the average over processes, so that all save and evaluate the same model.

    In training each process normalises with its own micro-batch (there is no synchronised batch norm), so this changes no
    gradient.
    """
    if world.size == 1:
        return
    found = tracked_norms(system)
    statistics = [tensor for m in found for tensor in (m.running_mean, m.running_var) if tensor is not None]
    if statistics:
        flat = world.add(torch.cat([tensor.flatten() for tensor in statistics])) / world.size
        for tensor, value in zip(statistics, flat.split([t.numel() for t in statistics]), strict=True):
            tensor.copy_(value.view_as(tensor))
