"""How much of the device a run uses: operations a sample, the device's own rate, the share of it (MFU), the memory's high-water
mark.

MFU is the share of the peak that the model's own operations take: forward and backward pass once, whatever is computed again for
memory (PaLM, arXiv 2204.02311, appendix B). The peak here is not a data sheet's but what one large matrix product reaches on this
device in the run's precision, measured at the start: on a processor nobody states it, and on a GPU it is what can be had.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

MEASURED_AFTER_S = 60.0  # counting imports torch's compiler, which takes seconds: only runs that are long enough to be asked


@dataclass(frozen=True, slots=True)
class Speed:
    """What the progress log needs to say how well a device is used.

    Attributes:
        flops_per_sample: operations forward and backward.
        peak_flops: operations a second that all processes' devices reach together in a large matrix product.
        peak_memory: bytes at this process's high-water mark.
    """

    flops_per_sample: float
    peak_flops: float
    peak_memory: Callable[[], int]

    def describe(self, samples_per_s: float) -> dict[str, float]:
        """The figures of one line of speed.jsonl."""
        achieved = self.flops_per_sample * samples_per_s
        return {
            "gflops_per_s": round(achieved / 1e9, 2),
            "mfu": round(achieved / self.peak_flops, 4),
            "peak_memory_bytes": self.peak_memory(),
        }


def flops_per_sample(system: nn.Module, forward: Callable[[], dict[str, Any]], rows: int) -> float:
    """Floating-point operations that one sample takes forward and backward through the towers.

    Matrix products, convolutions and attention are counted as they run, with what the recipe drops or has frozen left out; a
    contrastive loss, whose cost a sample grows with the batch, is not.

    Args:
        system: whose gradients are emptied afterwards.
        forward: gives the tensors (or terms) of `rows` samples.
        rows: how many.
    """
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    with counter, torch.compiler.set_stance("force_eager"):  # a compiled tower is counted as it is written
        values = [getattr(value, "sum", value) if not isinstance(value, Tensor) else value for value in forward().values()]
        roots = [value.sum() for value in values if isinstance(value, Tensor) and value.requires_grad]
        if roots:
            torch.stack([root.float() for root in roots]).sum().backward()
    system.zero_grad(set_to_none=True)
    return counter.get_total_flops() / rows


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a large square matrix product: the best of a few, in all the threads that this process has."""
    side = 8192 if device.type == "cuda" else 768
    a, b = (torch.rand(side, side, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(4):
        _wait(device)
        began = time.perf_counter()
        torch.mm(a, b)
        _wait(device)
        best = min(best, time.perf_counter() - began)
    return 2 * side**3 / best


def peak_memory(device: torch.device) -> int:
    """Bytes at the high-water mark: of the device's allocator on a GPU, of the whole process elsewhere (Windows: 0)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0  # which does not say
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would begin with what the process had that started this one
        found = re.search(r"^VmHWM:\s+(\d+) kB$", status.read_text(), re.MULTILINE)
        if found:
            return int(found[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, others kilobytes


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
