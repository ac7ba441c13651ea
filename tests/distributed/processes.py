"""Run a function in several connected processes of this machine, forked so that imports are paid once."""

from __future__ import annotations

import os
import pickle
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch._dynamo  # noqa: F401 - DDP imports it, once here instead of once in each child


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
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    assert codes == [0] * size
    return [pickle.loads((folder / f"result-{rank}").read_bytes()) for rank in range(size)]
