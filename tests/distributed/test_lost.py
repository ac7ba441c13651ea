"""A process that is killed, frozen or fails ends the others within a minute, with a sentence that says which one it was.

Each process is a forked child, so that imports are paid once; the commands themselves are in test_commands.py.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch._dynamo  # once here instead of once in each child

from wordsight.train import watch
from wordsight.train.distributed import World, join
from wordsight.train.watch import LostProcessError

LIMIT_S = 60.0
GRACE_S = watch.GRACE_S


@pytest.fixture(autouse=True)
def _little_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "GRACE_S", 0.5)


class Children:
    """Processes that find each other as under torchrun; what they say goes to `said-RANK`."""

    def __init__(self, size: int, function: Callable[[World], None], folder: Path) -> None:
        self.folder, self.size = folder, size
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.pids = []
        for rank in range(size):
            pid = os.fork()
            if pid == 0:
                self._live(rank, port, function)
            self.pids.append(pid)

    def _live(self, rank: int, port: int, function: Callable[[World], None]) -> None:
        code = 1
        try:
            said = os.open(self.folder / f"said-{rank}", os.O_WRONLY | os.O_CREAT)
            os.dup2(said, 2)
            sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
            place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(self.size)}
            os.environ.update({**place, "LOCAL_WORLD_SIZE": str(self.size), "RANK": str(rank), "LOCAL_RANK": str(rank)})
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            world = World.from_environment()
            with join(world, torch.device("cpu")):
                world.wait()
                (self.folder / f"ready-{rank}").touch()
                function(world)
            code = 0
        except LostProcessError as error:
            print(f"raised: {error}", file=sys.stderr)
            code = 3
        except SystemExit as error:
            code = int(error.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + LIMIT_S
        while len(list(self.folder.glob("ready-*"))) < self.size:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(0.2)

    def codes(self) -> tuple[list[int], float]:
        """How they ended, and after how many seconds; -9 for those that had to be killed."""
        began = time.monotonic()
        left = dict(enumerate(self.pids))
        codes = [-9] * self.size
        while left and time.monotonic() - began < LIMIT_S:
            for rank, pid in list(left.items()):
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[rank] = os.waitstatus_to_exitcode(status)
                    del left[rank]
            time.sleep(0.02)
        took = time.monotonic() - began
        for pid in left.values():
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        return codes, took

    def said(self, rank: int) -> str:
        return (self.folder / f"said-{rank}").read_text()


def gather_for_ever(world: World) -> None:
    while True:
        world.gather_objects("x" * 1000)


def compute_for_ever(world: World) -> None:
    while True:
        time.sleep(0.01)


def wait_for_the_main_one(world: World) -> None:
    if world.is_main:
        compute_for_ever(world)
    world.wait()


@pytest.mark.parametrize("lost", [0, 1, 2])
@pytest.mark.parametrize("work", [gather_for_ever, compute_for_ever, wait_for_the_main_one])
def test_a_killed_process_ends_the_others(work: Callable[[World], None], lost: int, tmp_path: Path) -> None:
    children = Children(3, work, tmp_path)
    children.wait_until_ready()
    os.kill(children.pids[lost], signal.SIGKILL)
    codes, took = children.codes()
    assert codes.pop(lost) == -9
    assert set(codes) <= {1, 3}, [children.said(rank) for rank in range(3)]
    assert took < 10, took
    speaker = 1 if lost == 0 else 0  # one says it for all of this machine: its watch, or its main thread where that notices first
    sentence = f"process {lost} of 3 is gone (its connection closed: it was killed, or its machine ran out of memory)"
    assert sentence in children.said(speaker)
    assert "give the same command again" in children.said(speaker)


def test_a_frozen_process_counts_as_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a machine that is switched off: no connection is closed."""
    monkeypatch.setattr(watch, "SILENCE_S", 2.0)
    monkeypatch.setattr(watch, "BEAT_S", 0.3)
    children = Children(2, gather_for_ever, tmp_path)
    children.wait_until_ready()
    os.kill(children.pids[1], signal.SIGSTOP)
    while "no sign of life" not in children.said(0):
        time.sleep(0.05)
    os.kill(children.pids[1], signal.SIGKILL)
    codes, took = children.codes()
    assert codes[0] in (1, 3)
    assert took < 20
    assert "process 1 of 2 is gone (no sign of life for 2 s" in children.said(0)


def test_the_sum_of_the_limits_is_below_a_minute() -> None:
    assert watch.SILENCE_S + GRACE_S + watch.LEAVING_S + 2 <= 60
    assert watch.SILENCE_S > 5 * watch.BEAT_S


def test_an_error_in_one_process_ends_the_others_and_is_told_once(tmp_path: Path) -> None:
    def fail(world: World) -> None:
        if world.rank == 1:
            raise ValueError("the disk of this one is full")
        wait_for_the_main_one(world)

    children = Children(3, fail, tmp_path)
    codes, took = children.codes()
    assert 0 not in codes
    assert took < 30
    assert "process 1 of 3 is gone (it failed with ValueError: the disk of this one is full)" in children.said(0) + children.said(
        2
    )


def test_a_terminated_process_learns_the_reason_first(tmp_path: Path) -> None:
    """As torchrun does it: SIGTERM to the others right after one was killed."""
    children = Children(2, compute_for_ever, tmp_path)
    children.wait_until_ready()
    os.kill(children.pids[1], signal.SIGKILL)
    os.kill(children.pids[0], signal.SIGTERM)
    codes, took = children.codes()
    assert codes[0] in (1, 3)
    assert took < 10
    assert "process 1 of 2 is gone" in children.said(0)


def test_processes_that_leave_in_peace_lose_nobody(tmp_path: Path) -> None:
    def leave(world: World) -> None:
        world.gather_objects(world.rank)
        time.sleep(0.3 * world.rank)  # the main one leaves first

    children = Children(3, leave, tmp_path)
    codes, _ = children.codes()
    assert codes == [0, 0, 0], [children.said(rank) for rank in range(3)]
    assert "gone" not in children.said(0) + children.said(1) + children.said(2)


def test_a_forked_worker_does_not_hold_a_dead_process_alive(tmp_path: Path) -> None:
    """Workers that read data outlive their parent for seconds, with its open files."""

    def with_worker(world: World) -> None:
        if world.rank == 1 and os.fork() == 0:
            time.sleep(8)
            os._exit(0)
        (tmp_path / f"forked-{world.rank}").touch()
        compute_for_ever(world)

    children = Children(2, with_worker, tmp_path)
    children.wait_until_ready()
    while len(list(tmp_path.glob("forked-*"))) < 2:
        time.sleep(0.02)
    os.kill(children.pids[1], signal.SIGKILL)
    codes, took = children.codes()
    assert codes[0] in (1, 3)
    assert took < 5
