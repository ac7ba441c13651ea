"""What a piece of work costs: seconds, processor seconds, peak memory, energy, carbon.

Energy is read from the processor's own counters (RAPL, `/sys/class/powercap`) where this user may read them; they count
everything that runs on the machine meanwhile. Elsewhere it is an estimate, which says so: processor seconds times a usual power
of one busy core. A GPU's is read from its driver's counter (NVML, Volta and newer), which counts all that runs on that GPU; where
there is none, the words say that it is not in it. Carbon is energy times a stated intensity. Nothing is sent anywhere.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from wordsight.train.speed import peak_memory

WATTS_A_CORE = 10.0  # of a server's processor under load: thermal design power over cores, with memory, is 5 to 15
COUNTERS = Path("/sys/class/powercap")
ESTIMATE = f"an estimate: {WATTS_A_CORE:.0f} W for each busy processor core"
MEASURED = "RAPL counters of the processor: all that ran on the machine meanwhile"
WITH_GPU = "; with the GPU's by its NVML counter: all that ran on it meanwhile"
WITHOUT_GPU = "; the GPU's is not in it"
CARBON_G_PER_KWH = 480.0  # the world's electricity in 2023 (Ember, Global Electricity Review 2024)


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


def carbon(joules: float) -> float:
    """Grams of CO2 (equivalents) for an energy, at CARBON_G_PER_KWH."""
    return joules / 3.6e6 * CARBON_G_PER_KWH


def with_carbon(cost: Cost) -> dict[str, Any]:
    """A cost as plain values, with its carbon."""
    return cost.to_json() | {"carbon_g": carbon(cost.energy_joules)}


def in_all(cost: Mapping[str, Any]) -> str:
    """What `with_carbon` gave of a whole run, in a sentence for the terminal."""
    return (
        f"In all {cost['seconds']:,.0f} s, at most {cost['peak_memory_bytes'] / 1e6:,.0f} MB, {cost['energy_joules']:,.0f} J "
        f"({cost['energy_source']}), {cost['carbon_g']:,.3f} g of CO2 at {CARBON_G_PER_KWH:.0f} g/kWh."
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
        self._counters, self._gpu = _read_counters(), _read_gpu(self._device)
        self._cpu, self._clock = time.process_time(), time.perf_counter()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        seconds, cpu = time.perf_counter() - self._clock, time.process_time() - self._cpu
        measured, gpu = _used(self._counters, _read_counters()), _read_gpu(self._device)
        joules, source = (cpu * WATTS_A_CORE, ESTIMATE) if measured is None else (measured, MEASURED)
        if self._gpu is not None and gpu is not None:
            joules, source = joules + (gpu - self._gpu) / 1e3, source + WITH_GPU
        elif self._device.type == "cuda":
            source += WITHOUT_GPU
        self.cost = Cost(
            seconds=round(seconds, 3),
            cpu_seconds=round(cpu, 3),
            peak_memory_bytes=peak_memory(self._device),
            energy_joules=round(joules, 1),
            energy_source=source,
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


@cache
def _nvml() -> Any:
    """The driver's library, begun; None where there is none."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    return None if library.nvmlInit_v2() else library


def _read_gpu(device: torch.device) -> int | None:
    """Millijoules that a GPU has used since its driver was loaded; None where nothing says so (a slice of a GPU, an old one)."""
    library = _nvml() if device.type == "cuda" else None
    if library is None:
        return None
    name = str(torch.cuda.get_device_properties(device).uuid)
    handle, used = ctypes.c_void_p(), ctypes.c_ulonglong()
    if library.nvmlDeviceGetHandleByUUID(f"GPU-{name.removeprefix('GPU-')}".encode(), ctypes.byref(handle)):
        return None
    return None if library.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(used)) else used.value


# ----------------------------------------------------------------------------------------------------------------- memory


def _reset_peak() -> None:
    """Set the process's high-water mark to what it holds now, where the system can (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return  # the mark is then of the whole process so far
