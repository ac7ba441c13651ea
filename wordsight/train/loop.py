"""The training loop, the only one: draw, move, augment, normalise, loss, backward, clip, update, average; log, evaluate, save.

Everything random in step k is seeded from (seed, k), the learning rate is a function of k and the batch of step k is asked for
by k. So
a run's state is its weights, the optimizer's moments, the average and k, and a run that goes on from a checkpoint is
bit-identical.
"""

from __future__ import annotations

import itertools
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wordsight.data.prefetch import on_device
from wordsight.train import checkpoint as checkpoints
from wordsight.train import distributed, optim, speed
from wordsight.train.checkpoint import Checkpoint, DiskFullError
from wordsight.train.distributed import World
from wordsight.train.interrupt import Interrupts
from wordsight.train.log import MetricsLog, Progress
from wordsight.train.recipe import Recipe
from wordsight.train.rundir import RunFolder
from wordsight.train.setup import Evaluator, Parts, build, compile_parts
from wordsight.train.sharded import Sharded, split_like
from wordsight.train.sharded import check as check_parallel
from wordsight.train.share import EvaluationTime
from wordsight.train.step import (
    StepLoss,
    Stepper,
    average_running_statistics,
    copy_buffers,
    put_buffers,
    recalibrate,
    tracked_norms,
)
from wordsight.types import Batch

MAX_SKIPS = 50  # updates in a row that on_nonfinite="skip" passes over before it gives up


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended.

    Attributes:
        step, total_steps: updates done, and those of the whole run.
        signal: the signal that stopped it (SIGINT, SIGTERM), None where it is complete.
        metrics: the last evaluation's figures.
        best: the step and figure of the best model, where something was evaluated.
    """

    step: int
    total_steps: int
    signal: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    best: dict[str, Any] | None = None

    @property
    def complete(self) -> bool:
        return self.signal is None


class NonFiniteError(ValueError):
    """The loss or the gradients are not finite; nothing was updated with them."""


def fit(
    recipe: Recipe,
    run_dir: str | os.PathLike[str],
    *,
    device: str = "auto",
    origin: dict[str, Any] | None = None,
    progress: bool = True,
    build_parts: Callable[[Recipe, torch.device, World], Parts] = build,
) -> Outcome:
    """Train by a recipe into a run folder, from its last checkpoint where it has one.

    Under torchrun (or `wordsight train --processes N`) each process calls this. Ctrl-C and SIGTERM save and return.

    Args:
        recipe: what to train, on what, how.
        run_dir: made if it is not there. One that holds a run goes on, bit-identically; the recipe must be equal.
        device: "auto", "cpu", "cuda" or "mps".
        origin: the command's own words for the recipe (`{"recipe": name, "set": [...]}`), written down beside it.
        progress: show a bar and say what happens, on stderr.
        build_parts: makes the model and the loader.

    Returns:
        how it ended.

    Raises:
        ValueError: the recipe can't be run, differs from the run folder's, every checkpoint is damaged, or a loss is not finite.
        DiskFullError: there was no room to save; the last good checkpoint is named.
    """
    world = World.from_environment()
    distributed.share_cores(world)
    where = distributed.pick_device(device, world)
    with distributed.join(world, where), _deterministic(recipe.deterministic, where), Interrupts() as interrupts:
        folder = RunFolder(Path(run_dir), recipe, world, origin)
        with folder.locked():
            return Trainer(recipe, folder, where, world, interrupts, progress, build_parts).run()


class Trainer:
    """The state of a run between two steps, and what a step does to it."""

    def __init__(
        self,
        recipe: Recipe,
        folder: RunFolder,
        device: torch.device,
        world: World,
        interrupts: Interrupts,
        progress: bool,
        build_parts: Callable[[Recipe, torch.device, World], Parts],
    ) -> None:
        self.recipe, self.folder, self.device, self.world, self.interrupts = recipe, folder, device, world, interrupts
        check_parallel(recipe)
        self.parts = build_parts(recipe, device, world)
        self.evaluator = Evaluator(recipe.evaluations)
        system = self.parts.system
        self.total_steps = recipe.num_steps(self.parts.loader.samples_per_epoch)
        self.sharded: Sharded | None = None
        if recipe.parallel == "fsdp" and world.size > 1:
            self.sharded = Sharded(system, world, device, precision=recipe.precision)
        self.optimizer = optim.make_optimizer(system, recipe.optim, device)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.average = optim.Averaged(system, recipe.ema_decay, self.sharded) if recipe.ema_decay is not None else None
        self.best: dict[str, Any] | None = None
        self.last_metrics: dict[str, float] = {}
        self.skipped = 0
        self.skipped_in_a_row = 0
        self.show = progress and world.is_main
        self.step = self._restore(folder.newest_checkpoint(self._say_early))
        self.saved_step = self.step
        self.saved_at = time.monotonic()
        self.evaluation_time = EvaluationTime(recipe.evaluate_max_share)
        if recipe.compile:
            compile_parts(system)
        self.stepper = Stepper(
            system,
            world=world,
            micro_batch_size=recipe.micro_batch_size,
            precision=recipe.precision,
            exchange=recipe.exchange,
            seed=recipe.seed,
            prepare=self.parts.prepare,
            sharded=self.sharded,
        )

    def run(self) -> Outcome:
        """From the step that was restored to the end, or to a signal."""
        main = self.world.is_main
        if main:
            self.folder.describe(self.device, self.step)
        run_dir = self.folder.path if main else None
        self.progress = Progress(
            run_dir, total_steps=self.total_steps, batch_size=self.recipe.batch_size, start_step=self.step, show=self.show
        )
        if self.step:
            self.progress.say(f"Going on from step {self.step} of {self.total_steps} in {self.folder.path}.")
        self.log = MetricsLog(self.folder.path, self.step) if main else None
        self.parts.system.train()
        try:
            outcome = self._train()
        except OSError as error:
            if error.errno not in checkpoints.DISK_FULL:
                raise
            raise DiskFullError(error.errno, f"The disk is full at step {self.step}: {error}. {self._last_good()}") from error
        finally:
            self.progress.close()
            if self.log is not None:
                self.log.close()
        return outcome

    def _train(self) -> Outcome:
        batches = on_device(self.parts.loader.batches(self.step), self.device, count=self.total_steps - self.step)
        while self.step < self.total_steps:
            batch = self._draw(batches)
            mine = (
                0 if batch is None else len(batch),
                self.interrupts.noted,
                self._checkpoint_time(),
                self.evaluation_time.allows_one(),
            )
            everyone = self.world.gather_ints(mine, self.device)
            interrupt = max(one[1] for one in everyone)
            if interrupt:
                return self._leave(interrupt)
            assert batch is not None
            unmeasured = self.world.is_main and self.progress.speed is None and len(batch) > 0
            if unmeasured and self.progress.elapsed_s() >= speed.MEASURED_AFTER_S:
                self.progress.speed = self._measure_speed(batch)
            self._update(batch, self.step + 1, [one[0] for one in everyone])
            self.step += 1
            if self._evaluation_due(by_time=bool(everyone[0][3])):  # by the main one's clock: all take part
                with self.evaluation_time.spending():
                    self._evaluate()
            if self._checkpoint_due(by_time=bool(everyone[0][2])):
                self._save()
        self._finish()
        return Outcome(self.step, self.total_steps, None, self.last_metrics, self.best)

    def _measure_speed(self, batch: Batch) -> speed.Speed:
        """What a sample costs and what this device can do, once a start."""
        system, again = self.parts.system, self.recipe.activation_checkpointing
        if self.sharded is not None:  # which computes with all processes alone
            system = self.sharded.zeros()
        if again:  # what is computed again for memory is no work of the model's
            system.set_activation_checkpointing(False)
        flops = self.stepper.flops_per_sample(batch, self.step + 1, system)
        if again:
            system.set_activation_checkpointing(True)
        rate = speed.matmul_rate(self.device, torch.bfloat16 if self.recipe.precision == "bf16" else torch.float32)
        return speed.Speed(flops, rate * self.world.size, lambda: speed.peak_memory(self.device))

    def _draw(self, batches: Iterator[Batch]) -> Batch | None:
        """The next batch; None where a signal has ended the worker processes with us."""
        try:
            return next(batches)
        except (RuntimeError, OSError):
            if self.interrupts.noted:
                return None
            raise

    def _update(self, batch: Batch, step: int, sizes: list[int]) -> None:
        """One optimizer update, and its line in the log."""
        recipe, system = self.recipe, self.parts.system
        lr = optim.learning_rate(step, self.total_steps, recipe.optim)
        if sum(sizes) == 0:
            self.progress.say(f"Step {step}: no sample of the batch could be read; there is no update.")
            return
        self.optimizer.zero_grad(set_to_none=True)
        buffers = copy_buffers(system) if recipe.on_nonfinite == "skip" else []
        loss = self.stepper.backward(batch, step, sizes)
        norm = optim.clip_gradients(self.parameters, recipe.optim.grad_clip)
        # the one wait for the device in a step: a loss that is not finite must not reach the weights
        total, gradient_norm, *terms = torch.stack([v.float() for v in (loss.total, norm, *loss.terms.values())]).tolist()
        if not (math.isfinite(total) and math.isfinite(gradient_norm)):
            self._not_finite(batch, step, total, gradient_norm)
            put_buffers(system, buffers)
            return
        self.skipped_in_a_row = 0
        optim.set_learning_rate(self.optimizer, lr, recipe.optim)
        self.optimizer.step()
        if hasattr(system, "clamp_"):
            system.clamp_()
        average_running_statistics(system, self.world)
        if self.average is not None:
            self.average.update(system, step)
        if self.log is not None and (step % recipe.log_every_steps == 0 or step in (1, self.total_steps)):
            self.log.write(step, self._line(loss, total, gradient_norm, terms, lr, step))
        self.progress.step(step, total)

    def _line(self, loss: StepLoss, total: float, norm: float, terms: list[float], lr: float, step: int) -> dict[str, Any]:
        """What metrics.jsonl keeps of an update."""
        line: dict[str, Any] = {"samples": step * self.recipe.batch_size, "rows": loss.rows, "loss": total}
        if len(terms) > 1:
            line |= {f"loss/{name}": value for name, value in zip(loss.terms, terms, strict=True)}
        line |= {"lr": lr, "grad_norm": norm}
        seen = self.parts.loader.seen(step)
        if len(seen) > 1:  # of one source it is `samples`
            line |= {f"seen/{name}": count for name, count in seen.items()}
        scale = getattr(self.parts.system, "log_scale", None)
        if isinstance(scale, Tensor):
            line["log_scale"] = scale.item()
        return line

    def _not_finite(self, batch: Batch, step: int, total: float, norm: float) -> None:
        """Stop with all that helps to find the cause, or skip the update and say so."""
        keys = [key for part in self.world.gather_objects(batch.keys) for key in part]
        what = f"the loss is {total}" if not math.isfinite(total) else f"the gradients' norm is {norm} (the loss is {total:.4g})"
        self.optimizer.zero_grad(set_to_none=True)
        if self.recipe.on_nonfinite == "skip":
            self.skipped += 1
            self.skipped_in_a_row += 1
            if self.skipped_in_a_row <= MAX_SKIPS:
                self.progress.say(
                    f"Step {step}: {what}; the update is skipped (on_nonfinite=skip). First samples: {', '.join(keys[:4])}"
                )
                if self.log is not None:
                    self.log.write(step, {"samples": step * self.recipe.batch_size, "loss": None, "skipped": True})
                return
            what = f"{what}, as in the {MAX_SKIPS} updates before"
        names = self.folder.write_text(f"nonfinite-step-{step}.txt", "\n".join(keys) + "\n") if self.world.is_main else None
        more = f" and {len(keys) - 10} more (all in {names})" if len(keys) > 10 else ""
        raise NonFiniteError(
            f"Step {step}: {what}. Nothing was updated with it. The batch's samples: {', '.join(keys[:10])}{more}. "
            f"{self._last_good()} Look at these samples; a lower optim.lr, optim.grad_clip=1 or a longer optim.warmup_steps "
            "often helps (in a new --run), and on_nonfinite=skip passes over such batches."
        )

    def _evaluation_due(self, by_time: bool) -> bool:
        """Whether the model is measured after this step; what is due and takes too much of the time waits."""
        every, clock = self.recipe.evaluate_every_steps, self.evaluation_time
        clock.waiting = clock.waiting or bool(every and self.step % every == 0)
        return self.step == self.total_steps or (clock.waiting and by_time)

    def _checkpoint_time(self) -> bool:
        """Whether a checkpoint is due by this process's clock."""
        every_s = self.recipe.checkpoint_every_s
        return every_s is not None and time.monotonic() - self.saved_at >= every_s

    def _checkpoint_due(self, by_time: bool) -> bool:
        recipe = self.recipe
        by_step = recipe.checkpoint_every_steps is not None and self.step % recipe.checkpoint_every_steps == 0
        return by_step or by_time or self.step == self.total_steps

    def _save(self) -> None:
        """A checkpoint of this step, by the main process; the others give their shares of what is split."""
        self.saved_step, self.saved_at = self.step, time.monotonic()
        system = self.parts.system
        tensors = {"model": system.state_dict(), "optimizer": dict(optim.optimizer_tensors(system, self.optimizer))}
        if self.average is not None:
            tensors["average"] = self.average.system.state_dict()
        if not self.world.is_main:
            checkpoints.take_part(tensors)
            return
        assert self.log is not None
        self.log.sync()
        state = {
            "total_steps": self.total_steps,
            "samples": self.step * self.recipe.batch_size,
            "processes": self.world.size,
            "parallel": self.recipe.parallel,
            "best": self.best,
            "metrics": self.last_metrics,
            "skipped": self.skipped,
        }
        self.folder.save_checkpoint(self.step, state, tensors)

    def _restore(self, found: Checkpoint | None) -> int:
        """Take a checkpoint's state over; its step."""
        if found is None:
            return 0
        system = self.parts.system
        _load_exactly(system, found.tensors("model"), found.folder)
        if self.average is not None:
            _load_exactly(self.average.system, found.tensors("average"), found.folder)
        optim.restore_optimizer(system, self.optimizer, found.tensors("optimizer"))
        self.best, self.last_metrics, self.skipped = found.state["best"], found.state["metrics"], found.state["skipped"]
        if found.state["processes"] != self.world.size:
            self._say_early(
                f"The run was trained by {found.state['processes']} processes until here, now by {self.world.size}: the "
                "gradients are the same but for rounding, so it goes on, though not bit-identically."
            )
        elif self.world.size > 1 and found.state.get("parallel", "ddp") != self.recipe.parallel:
            self._say_early(
                f"The run was trained with parallel={found.state.get('parallel', 'ddp')} until here, now with "
                f"{self.recipe.parallel}: the gradients are the same but for rounding, so it goes on, though not bit-identically."
            )
        return found.step

    def _evaluate(self) -> None:
        """Measure the averaged weights (or the weights) by the evaluations, all processes together; keep the best."""
        if not self.recipe.evaluations:
            return
        from wordsight.evaluate.results import write_results

        system = self._evaluated()
        figures, records = self.evaluator.run(system, self.world)
        if self.log is not None:
            self.log.write(self.step, figures)
        self.last_metrics = figures
        chosen = self.recipe.best_metric or next(iter(figures))
        figures = {**figures, "step": float(self.step)}
        if chosen not in figures:
            raise ValueError(f"best_metric {chosen!r} is not measured; the evaluations give {', '.join(figures)}")
        sign = 1 if self.recipe.best_mode == "max" else -1
        if self.best is None or sign * figures[chosen] > sign * self.best["value"]:
            self.best = {"step": self.step, "metric": chosen, "value": figures[chosen]}
            if self.world.is_main:
                self.folder.save_model(system, "best", self.step)
                write_results(self.folder.path, records)

    def _evaluated(self) -> nn.Module:
        """The model that is measured and kept: the averaged weights, or the weights."""
        holder: nn.Module = self.average.system if self.average is not None else self.parts.system
        system = holder if self.sharded is None else self.sharded.whole(holder)
        if self.recipe.recalibrate_batches:
            first = itertools.islice(self.parts.loader.batches(), self.recipe.recalibrate_batches)
            recalibrate(system, (self.parts.plain(batch.to(self.device)) for batch in first if len(batch)))
            share_statistics(system, self.world)  # each process has seen its own rows
            if system is not holder:
                put_buffers(holder, copy_buffers(system))
        return system

    def _finish(self) -> None:
        """The last model, the report, what was drawn and what could not be read."""
        reports = [text for texts in self.world.gather_objects(self._data_reports()) for text in texts]
        system = self._evaluated()
        if self.world.is_main:
            self.folder.save_model(system, "last", self.step)
            self.folder.write_report()
            for text in reports:
                self.progress.say(text)
        self.world.wait()

    def _data_reports(self) -> list[str]:
        """In words: how much came from each source (by the main process), what this one could not read or had to read again."""
        loader, texts = self.parts.loader, []
        seen = loader.seen(self.step)
        if self.world.is_main and len(seen) > 1:
            total = max(1, sum(seen.values()))
            texts.append("samples seen: " + ", ".join(f"{name} {count:,} ({count / total:.1%})" for name, count in seen.items()))
        process = f"process {self.world.rank}: " if self.world.size > 1 else ""
        texts += [process + str(loader.bad)] if len(loader.bad) else []
        texts += [process + str(loader.reads)] if loader.reads else []
        return texts

    def _leave(self, number: int) -> Outcome:
        """A signal came: save, and say how to go on."""
        if self.saved_step != self.step or self.step == 0:
            self._save()
        self.progress.say(
            f"Stopped by {signal.Signals(number).name}. Step {self.step} of {self.total_steps} is saved; the same command goes "
            f"on from there: {self.folder.resume_command()}"
        )
        self.world.wait()
        return Outcome(self.step, self.total_steps, number, self.last_metrics, self.best)

    def _last_good(self) -> str:
        last = self.folder.last_checkpoint()
        if last is None:
            return "No checkpoint has been written yet."
        return f"The last good checkpoint is {last}; the same command goes on from it: {self.folder.resume_command()}"

    def _say_early(self, text: str) -> None:
        if self.show:
            Progress(None, total_steps=0, batch_size=1, start_step=0, show=True).say(text)


def _load_exactly(system: nn.Module, tensors: dict[str, Tensor], folder: Path) -> None:
    """Load a state dict whose names and shapes must all fit."""
    try:
        own = system.state_dict()
        shares = {name: split_like(value, own[name]) if name in own else value for name, value in tensors.items()}
        system.load_state_dict(shares, strict=True)
    except RuntimeError as error:
        raise ValueError(f"the checkpoint {folder} does not fit the recipe's model: {error}") from error


def share_statistics(system: nn.Module, world: World) -> None:
    """Make running statistics that each process took anew from batches of its own the mean over all of these batches."""
    for norm in tracked_norms(system) if world.size > 1 else ():
        assert norm.running_mean is not None
        assert norm.running_var is not None
        assert norm.num_batches_tracked is not None
        own = norm.num_batches_tracked.to(norm.running_mean.dtype)
        sums = torch.cat([norm.running_mean * own, norm.running_var * own, own[None]])
        mean, variance, count = world.add(sums).split([len(norm.running_mean), len(norm.running_var), 1])
        if count > 0:
            norm.running_mean.copy_(mean / count)
            norm.running_var.copy_(variance / count)
        norm.num_batches_tracked.fill_(int(count))


@contextmanager
def _deterministic(active: bool, device: torch.device) -> Iterator[None]:
    """Ask a GPU for kernels that give the same bits each time (the CPU's do); an operation that has none warns."""
    if not active or device.type != "cuda":
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.benchmark = benchmark
