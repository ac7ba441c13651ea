"""Run a function in several connected processes of this machine, forked so that imports are paid once."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch._dynamo  # noqa: F401 - DDP imports it, once here instead of once in each child

LIMIT_S = 300.0  # on a machine that does much else; the tests take seconds


def in_processes(size: int, function: Callable[[], Any], folder: Path) -> list[Any]:
    """What `function()` returns in each of `size` processes that torchrun's environment variables connect."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = []
    for rank in range(size):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                shared = {
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                    "WORLD_SIZE": str(size),
                    "LOCAL_WORLD_SIZE": str(size),
                }
                os.environ.update({**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
                (folder / f"result-{rank}").write_bytes(pickle.dumps(function()))
                code = 0
            except BaseException:
                traceback.print_exc()
            os._exit(code)
        pids.append(pid)
    assert _exit_codes(pids) == [0] * size
    return [pickle.loads((folder / f"result-{rank}").read_bytes()) for rank in range(size)]


def _exit_codes(pids: list[int]) -> list[int]:
    """Of all children, which are killed (-9) where they hang, so that a test never does."""
    codes: dict[int, int] = {}
    deadline = time.monotonic() + LIMIT_S
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    codes[pid] = os.waitstatus_to_exitcode(status)
                elif time.monotonic() > deadline:
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return [codes[pid] for pid in pids]
