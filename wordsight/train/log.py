"""What a run leaves to be read: metrics.jsonl (and TensorBoard), speed.jsonl, environment.json, the progress bar."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wordsight.train.distributed import World, num_cores

if TYPE_CHECKING:
    from wordsight.train.speed import Speed

PACKAGES = ("wordsight", "torch", "numpy", "pillow", "safetensors", "tokenizers", "simplejpeg", "pyarrow")


class MetricsLog:
    """metrics.jsonl: one JSON object a line, whose bytes depend on the training alone (times are in speed.jsonl).

    Opened at a checkpoint's step, it forgets the lines after it, so that a resumed run has none twice and none missing.
    """

    def __init__(self, run_dir: Path, step: int) -> None:
        self._path = run_dir / "metrics.jsonl"
        self._cut(step)
        self._file = open(self._path, "ab")  # noqa: SIM115 - it stays open as long as the run
        self._board = _open_tensorboard(run_dir, step)

    def _cut(self, step: int) -> None:
        end = 0
        if self._path.exists():
            with open(self._path, "rb") as file:
                for line in file:
                    try:
                        record_step = json.loads(line)["step"] if line.endswith(b"\n") else None
                    except (ValueError, KeyError, TypeError):
                        record_step = None
                    if record_step is None or record_step > step:
                        break
                    end += len(line)
            os.truncate(self._path, end)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Add the line of `step`; it is with the operating system when this returns, so that a killed process loses none."""
        line = json.dumps({"step": step, **values}, allow_nan=False)
        self._file.write(line.encode() + b"\n")
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, int | float) and not isinstance(value, bool):
                    self._board.add_scalar(name, value, step)

    def sync(self) -> None:
        """Through to the disk: no checkpoint may be newer than its lines."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """No more lines."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def _open_tensorboard(run_dir: Path, step: int) -> Any:
    """A writer that hides events after `step`, or None where TensorBoard is not installed (`pip install
    wordsight[tensorboard]`)."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1)


class Progress:
    """A bar with loss, samples/s and time left on a terminal, a line now and then elsewhere; speed.jsonl beside it."""

    LINE_EVERY_S = 20.0

    def __init__(self, run_dir: Path | None, *, total_steps: int, batch_size: int, start_step: int, show: bool = True) -> None:
        self._batch_size, self._total, self._show = batch_size, total_steps, show
        self._began = self._last_line = self._last_speed = time.monotonic()
        self._start = self._last_step = start_step
        self.speed: Speed | None = None  # set once the run is old enough
        self._speed = open(run_dir / "speed.jsonl", "a") if run_dir else None  # noqa: SIM115 - it stays open as long as the run
        self._bar: Any = None
        if show and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=total_steps * batch_size, initial=start_step * batch_size, unit=" samples", unit_scale=True, desc="training"
            )

    def step(self, step: int, loss: float) -> None:
        """Update `step` is done."""
        now = time.monotonic()
        if self._speed is not None and (now - self._last_speed >= 1 or step == self._total):
            rate = (step - self._last_step) * self._batch_size / max(now - self._last_speed, 1e-9)
            record = {
                "step": step,
                "time": round(time.time(), 3),
                "elapsed_s": round(now - self._began, 3),
                "samples_per_s": round(rate, 1),
            }
            if self.speed is not None:
                record |= self.speed.describe(rate)
            self._speed.write(json.dumps(record) + "\n")
            self._speed.flush()
            self._last_speed, self._last_step = now, step
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
            self._bar.update(self._batch_size)
        elif self._show and (now - self._last_line >= self.LINE_EVERY_S or step == self._total):
            self._last_line = now
            pace = (step - self._start) / max(now - self._began, 1e-9)
            left = (self._total - step) / max(pace, 1e-9)
            text = f"step {step}/{self._total}  loss {loss:.4f}  {pace * self._batch_size:.0f} samples/s  {left:.0f} s left"
            print(text, file=sys.stderr, flush=True)

    def elapsed_s(self) -> float:
        """Seconds since this start of the run."""
        return time.monotonic() - self._began

    def say(self, text: str) -> None:
        """A line for the user that leaves the bar whole."""
        if not self._show:
            return
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """The last of the bar."""
        if self._bar is not None:
            self._bar.close()
        if self._speed is not None:
            self._speed.close()


def describe_environment(world: World, device: Any, seed: int) -> dict[str, Any]:
    """Versions, machine, git state of the working directory and command line, for environment.json."""
    import torch

    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "seed": seed,
        "python": platform.python_version(),
        "versions": versions,
        "machine": {
            "system": platform.platform(),
            "processor": _processor(),
            "cores": num_cores(),
            "device": str(device),
            "gpu": gpu,
            "processes": world.size,
            "threads": torch.get_num_threads(),
        },
        "git": _git_state(),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _git_state() -> dict[str, Any] | None:
    """Commit, branch and changed files of the repository that the user stands in; None outside of one."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=10, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.rstrip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    if commit is None:
        return None
    changed = [line[3:] for line in (git("status", "--porcelain") or "").splitlines()]
    return {
        "commit": commit,
        "branch": git("rev-parse", "--abbrev-ref", "HEAD"),
        "changed": changed[:100],
        "num_changed": len(changed),
    }
