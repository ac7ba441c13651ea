"""A run killed at any moment, in the middle of writing a checkpoint too, goes on bit-identically.

Each life of the run is a forked child, so that imports are paid once.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from safetensors.torch import load_file

from tests.train.test_loop import assert_same_run
from wordsight.train import checkpoint
from wordsight.train.loop import fit
from wordsight.train.recipe import Recipe

KILLS = 20


def live(recipe: Recipe, run: Path, *, kill_after_s: float | None = None, kill_at_write: int | None = None) -> bool:
    """One life of the run in a process of its own; True where it came to its end, False where it was killed."""
    pid = os.fork()
    if pid == 0:
        try:
            if kill_at_write is not None:
                _die_at_write(kill_at_write)
            fit(recipe, run, device="cpu", progress=False)
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
    if kill_after_s is not None:
        deadline = time.monotonic() + kill_after_s
        while time.monotonic() < deadline:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                return _ended(status)
            time.sleep(0.002)
        os.kill(pid, signal.SIGKILL)
    return _ended(os.waitpid(pid, 0)[1])


def _ended(status: int) -> bool:
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, -signal.SIGKILL), "the run failed by itself"
    return code == 0


def _die_at_write(number: int) -> None:
    """Kill this process in the middle of the n-th piece that is written into a checkpoint."""
    write: Callable[..., None] = checkpoint._HashedFile.write
    left = [number]

    def dying(self: checkpoint._HashedFile, data: bytes) -> None:
        left[0] -= 1
        if left[0] == 0:
            self.file.write(data[: len(data) // 2])
            self.file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        write(self, data)

    checkpoint._HashedFile.write = dying  # type: ignore[method-assign]


def test_killed_at_twenty_moments_it_goes_on_bit_identically(recipe: Recipe, tmp_path: Path) -> None:
    recipe = replace(recipe, steps=24)
    fit(recipe, tmp_path / "warm", device="cpu", progress=False)  # what a first run imports is imported here, once
    began = time.monotonic()
    assert live(recipe, tmp_path / "whole")
    whole_s = time.monotonic() - began
    rng = random.Random(5)
    kills = inside_a_checkpoint = runs = 0
    while kills < KILLS:
        run = tmp_path / f"run-{runs}"
        runs += 1
        finished = False
        while not finished:
            if kills >= KILLS:
                finished = live(recipe, run)
            elif kills % 3 == 2:
                finished = live(recipe, run, kill_at_write=rng.randrange(1, 400))
                inside_a_checkpoint += any((run / "checkpoints").glob(".tmp-*"))
            else:
                finished = live(recipe, run, kill_after_s=rng.uniform(0, 0.5 * whole_s))
            kills += not finished
        assert_same_run(tmp_path / "whole", run)
        weights = [load_file(folder / "last/model.safetensors") for folder in (tmp_path / "whole", run)]
        assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])
        assert not list(run.glob(".*-new")) + list(run.glob(".*-old")) + list((run / "checkpoints").glob(".tmp*"))
        steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert steps == list(range(1, 25))
    assert inside_a_checkpoint >= 5
