"""What a piece of work costs: seconds, processor seconds, peak memory, energy.

Energy is read from the processor's own counters (RAPL, `/sys/class/powercap`) where this user may read them; they count
everything that runs on the machine meanwhile. Elsewhere it is an estimate, which says so: processor seconds times a usual power
of one busy core. A GPU's energy is not in either.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from wordsight.train.speed import peak_memory

WATTS_A_CORE = 10.0  # of a server's processor under load: thermal design power over cores, with memory, is 5 to 15
COUNTERS = Path("/sys/class/powercap")
ESTIMATE = f"an estimate: {WATTS_A_CORE:.0f} W for each busy processor core"
MEASURED = "RAPL counters of the processor: all that ran on the machine meanwhile"
WITHOUT_GPU = "; the GPU's is not in it"


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a piece of work took.

    Attributes:
        seconds: by the clock.
        cpu_seconds: of all threads of this process.
        peak_memory_bytes: the high-water mark: of the GPU's allocator, or of the process with all that it holds.
        energy_joules: see `energy_source`.
        energy_source: where it comes from, in words.
    """

    seconds: float
    cpu_seconds: float
    peak_memory_bytes: int
    energy_joules: float
    energy_source: str

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def total(costs: list[Cost]) -> Cost:
    """Of pieces that ran one after the other: sums, and the highest peak.

    Raises:
        ValueError: no cost to add.
    """
    if not costs:
        raise ValueError("no costs to add up")
    sources = dict.fromkeys(cost.energy_source for cost in costs)
    return Cost(
        seconds=sum(cost.seconds for cost in costs),
        cpu_seconds=sum(cost.cpu_seconds for cost in costs),
        peak_memory_bytes=max(cost.peak_memory_bytes for cost in costs),
        energy_joules=sum(cost.energy_joules for cost in costs),
        energy_source="; ".join(sources),
    )


class Meter:
    """Measures what runs while it is entered; `cost` is there after it.

    Args:
        device: where the model computes.
    """

    cost: Cost

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __enter__(self) -> Meter:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            _reset_peak()
        self._counters = _read_counters()
        self._cpu, self._clock = time.process_time(), time.perf_counter()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        seconds, cpu = time.perf_counter() - self._clock, time.process_time() - self._cpu
        measured = _used(self._counters, _read_counters())
        source = ESTIMATE if measured is None else MEASURED
        self.cost = Cost(
            seconds=round(seconds, 3),
            cpu_seconds=round(cpu, 3),
            peak_memory_bytes=peak_memory(self._device),
            energy_joules=round(cpu * WATTS_A_CORE if measured is None else measured, 1),
            energy_source=source + (WITHOUT_GPU if self._device.type == "cuda" else ""),
        )


# --------------------------------------------------------------------------------------------------------------- counters


def _read_counters() -> dict[Path, tuple[int, int]]:
    """Microjoules and the value at which they begin anew, of each package of the processor; {} where they can't be read."""
    found = {}
    for folder in sorted(COUNTERS.glob("intel-rapl:*")):
        if folder.name.count(":") != 1:  # a part of a package, which is counted with it
            continue
        try:
            found[folder] = int((folder / "energy_uj").read_text()), int((folder / "max_energy_range_uj").read_text())
        except (OSError, ValueError):
            return {}
    return found


def _used(before: dict[Path, tuple[int, int]], after: dict[Path, tuple[int, int]]) -> float | None:
    """Joules between two readings; a counter that has begun anew once is seen through."""
    if not before or before.keys() != after.keys():
        return None
    used = 0
    for folder, (start, span) in before.items():
        end = after[folder][0]
        used += end - start if end >= start else end - start + span
    return used / 1e6


# ----------------------------------------------------------------------------------------------------------------- memory


def _reset_peak() -> None:
    """Set the process's high-water mark to what it holds now, where the system can (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return  # the mark is then of the whole process so far
