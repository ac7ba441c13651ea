"""The processes of a run: who they are, how they start each other, what they gather.

Shape legend: B rows of this process, N rows of the global batch.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PARENT = "WORDSIGHT_PARENT_PID"
DEVICES = ("auto", "cpu", "cuda", "mps")


@dataclass(frozen=True, slots=True)
class World:
    """The processes that train together, and this one's place among them."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes the run folder."""
        return self.rank == 0

    @classmethod
    def from_environment(cls) -> World:
        """The world that torchrun, or `launch`, has put into the environment; one process where there is none."""
        get = os.environ.get
        size = int(get("WORLD_SIZE", "1"))
        return cls(int(get("RANK", "0")), size, int(get("LOCAL_RANK", "0")), int(get("LOCAL_WORLD_SIZE", str(size))))

    def gather_rows(self, rows_BX: Tensor, sizes: Sequence[int]) -> Tensor:
        """Every process's rows, in rank order: [B, ...] of each -> [N, ...], where process r has sizes[r] rows. No gradient
        flows."""
        if self.size == 1:
            return rows_BX.detach()
        import torch
        import torch.distributed as dist

        longest = max(sizes)
        padded = rows_BX.new_zeros((longest, *rows_BX.shape[1:]))
        padded[: len(rows_BX)] = rows_BX.detach()
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    def gather_ints(self, values: Sequence[int], device: torch.device) -> list[list[int]]:
        """The same few integers of every process, in rank order."""
        if self.size == 1:
            return [list(values)]
        import torch
        import torch.distributed as dist

        mine = torch.tensor(list(values), dtype=torch.int64, device=device)
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(parts, mine)
        return [part.tolist() for part in parts]

    def gather_objects(self, value: Any) -> list[Any]:
        """Any small object of every process, in rank order."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def add(self, tensor: Tensor) -> Tensor:
        """The sum over processes, in place."""
        if self.size > 1:
            import torch.distributed as dist

            dist.all_reduce(tensor)
        return tensor

    def wait(self) -> None:
        """Until every process is here."""
        if self.size > 1:
            import torch.distributed as dist

            dist.barrier()


@contextmanager
def join(world: World, device: torch.device | None = None) -> Iterator[None]:
    """Connect the processes of `world` for the time of the block: nccl on GPUs, gloo elsewhere (and for what lies on the CPU).

    Where one is lost, the others end within a minute, see `train.watch`: so they may wait for the main process as long as it
    works. An error inside of the block ends the others too.

    Args:
        world: who they are; one process alone needs no connection.
        device: None, or a CPU: gloo alone.

    Raises:
        LostProcessError: another process is gone.
    """
    if world.size == 1:
        yield
        return
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    from wordsight.train import watch as watches

    if dist.is_initialized():
        yield
        return
    store, _, _ = next(rendezvous("env://", world.rank, world.size, timeout=timedelta(seconds=watches.START_S)))
    watch = watches.Watch(world, store)
    before = watches.on_terminate(watch)
    try:
        backend = "cpu:gloo,cuda:nccl" if device is not None and device.type == "cuda" else "gloo"
        # the limit on waiting is the watch's, not the collective operations'
        limit = timedelta(days=7)
        dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, timeout=limit)
        world.gather_objects(None)  # none leaves before all are connected
        yield
    except BaseException as error:
        lost = watch.explain(error)
        if lost is not None:
            raise lost from error
        if watch.tell(error):
            error.said = True  # type: ignore[attr-defined]
        raise
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)
        if dist.is_initialized():
            _keep_for_ever(dist.group.WORLD)
            dist.destroy_process_group()
        watch.close()


def _keep_for_ever(group: Any) -> None:
    """Never free a process group; the process ends soon anyway.

    DDP's reducer holds its group, and lives until Python collects it. As the last holder it would join gloo's threads without
    giving up the interpreter's lock, for which such a thread may be waiting to free its last work: neither ever ends.
    """
    import ctypes

    ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))


def pick_device(name: str, world: World) -> torch.device:
    """The device that `name` means on this machine for this process.

    Raises:
        ValueError: the name is unknown, or there is no such device here.
    """
    import torch

    if name not in DEVICES:
        raise ValueError(f"device {name!r} is not one of {', '.join(DEVICES)}")
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if cuda else "mps" if mps and world.size == 1 else "cpu"
    if (name == "cuda" and not cuda) or (name == "mps" and not mps):
        raise ValueError(f"there is no {name} device here: use --device auto or --device cpu")
    if name == "cuda":
        if world.local_size > torch.cuda.device_count():
            raise ValueError(
                f"{world.local_size} processes on {torch.cuda.device_count()} GPUs: one GPU a process, so lower --processes"
            )
        torch.cuda.set_device(world.local_rank)
        return torch.device("cuda", world.local_rank)
    return torch.device(name)


def share_cores(world: World) -> None:
    """Give each process of this machine its share of the cores, unless the user has said otherwise (OMP_NUM_THREADS)."""
    if world.local_size > 1 and "OMP_NUM_THREADS" not in os.environ:
        import torch

        torch.set_num_threads(max(1, num_cores() // world.local_size))


def num_cores() -> int:
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def orphaned() -> bool:
    """Whether the process that launched this one is gone, so that nobody would stop it."""
    parent = os.environ.get(PARENT)
    return parent is not None and os.getppid() != int(parent)


def launch(
    command: Sequence[str], num_processes: int, environment: Mapping[str, str] | None = None, grace_s: float = 10.0
) -> int:
    """Run `command` in `num_processes` processes of this machine that find each other as under torchrun; signals are passed on.

    Args:
        command: a program and its arguments.
        num_processes: how many.
        environment: further variables for them.
        grace_s: once one has failed, the others get so long to end by themselves.

    Returns:
        0, or the first exit code that was not 0.
    """
    if num_processes < 1:
        raise ValueError(f"--processes must be at least 1, got {num_processes}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(num_processes)}
    shared |= {"LOCAL_WORLD_SIZE": str(num_processes), PARENT: str(os.getpid())}
    shared.setdefault("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", str(max(1, num_cores() // num_processes))))
    received: list[int] = []  # a handler only notes a signal, so that none is lost while processes are being started
    before = {number: signal.signal(number, lambda got, _: received.append(got)) for number in (signal.SIGINT, signal.SIGTERM)}
    children: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(num_processes):
            variables = {**os.environ, **(environment or {}), **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            # own sessions: a Ctrl-C in the terminal reaches this process alone, which passes it on once
            children.append(subprocess.Popen(list(command), env=variables, start_new_session=True))
        return _wait_for(children, received, grace_s)
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
                child.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait_for(children: Sequence[subprocess.Popen[bytes]], received: list[int], grace_s: float) -> int:
    """Until all are done, or `grace_s` after the first has failed: the first exit code that is not 0. Signals go to all."""
    failed_at = None
    first_failure = 0
    while True:
        while received:
            number = received.pop(0)
            for child in children:
                if child.poll() is None:
                    child.send_signal(number)
        codes = [child.poll() for child in children]
        if failed_at is None and any(codes):
            failed_at = time.monotonic()
            first_failure = next(code for code in codes if code)
            if first_failure == -signal.SIGKILL:
                text = f"Process {codes.index(first_failure)} of {len(codes)} was killed (SIGKILL; often because memory ran out)."
                print(text, file=sys.stderr, flush=True)
        if all(code is not None for code in codes) or (failed_at is not None and time.monotonic() - failed_at > grace_s):
            return 128 - first_failure if first_failure < 0 else first_failure
        time.sleep(0.05)
