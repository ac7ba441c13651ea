"""Batches to the device one step ahead: pinned memory, and a stream of its own that copies while the model computes.

On a CUDA device batch k + 1 is drawn and its copy sent off before batch k is handed out, so that reading and copying hide behind
the step's computation. On every other device a batch is simply moved when it is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Protocol

import torch

from wordsight.types import Batch


class Mover(Protocol):
    """How a batch gets to a device beside what the device computes."""

    def send(self, batch: Batch) -> Batch:
        """Begin to copy; the batch may not be used before `arrive`."""

    def arrive(self, batch: Batch) -> Batch:
        """Make what is computed from now on wait for the copy."""


class CudaMover:
    """Copies on a side stream from pinned memory.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def send(self, batch: Batch) -> Batch:
        """Begin to copy a batch; torch's allocator keeps its pinned memory until the copy is done."""
        pinned: dict[str, Any] = {}
        for name, tensor in batch.tensors().items():
            pinned[name] = tensor if tensor.is_pinned() or tensor.device.type != "cpu" else tensor.pin_memory()
        with torch.cuda.stream(self._stream):
            return replace(batch, **pinned).to(self._device)

    def arrive(self, batch: Batch) -> Batch:
        """Let the current stream wait for the copies, and tell the allocator that it uses their memory."""
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        for tensor in batch.tensors().values():
            tensor.record_stream(current)
        return batch


def on_device(
    batches: Iterator[Batch], device: torch.device, *, count: int | None = None, mover: Mover | None = None
) -> Iterator[Batch]:
    """The batches on a device, each copied while the one before is used.

    Args:
        batches: from a loader.
        device: where they go.
        count: how many are drawn at most (the steps that are left), so that none is drawn in vain; None: all.
        mover: how they get there; None: `CudaMover` for a CUDA device, else `Batch.to` when each is asked for.

    Yields:
        the same batches, in order; an error of `batches` comes when its batch is asked for, after those before it.
    """
    left = -1 if count is None else count
    if mover is None and device.type != "cuda":
        while left != 0:
            left -= 1
            try:
                batch = next(batches)
            except StopIteration:
                return
            yield batch.to(device)
        return
    mover = mover or CudaMover(device)
    waiting: Batch | None = None
    failure: Exception | None = None
    ended = False
    while True:
        following: Batch | None = None
        if not ended and left != 0:
            left -= 1
            try:
                following = mover.send(next(batches))
            except StopIteration:
                ended = True
            except Exception as error:  # whatever a source or a worker raises: it belongs to the batch that could not be made
                failure, ended = error, True
        if waiting is not None:
            yield mover.arrive(waiting)
        elif following is None:
            if failure is not None:
                raise failure
            return
        waiting = following
