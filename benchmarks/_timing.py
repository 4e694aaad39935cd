"""Time and memory of a piece of code: user CPU seconds of interleaved runs, bytes of live tensors."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from statistics import median
from typing import NamedTuple

from ..core.live_memory import PeakMemory

RUNS = 7


class CpuSeconds(NamedTuple):
    """CPU time of this process: in its own code, and in the system's (fresh memory, files)."""

    user: float
    system: float


def cpu_seconds(function: Callable[[], object]) -> tuple[object, CpuSeconds]:
    """What `function` returns, and the CPU seconds that it took: other processes do not count."""
    start = os.times()
    result = function()
    end = os.times()
    return result, CpuSeconds(end.user - start.user, end.system - start.system)


def interleaved(functions: Mapping[str, Callable[[], object]], runs: int = RUNS) -> dict[str, list[CpuSeconds]]:
    """CPU seconds of `runs` runs of each function, one of each in turn after one of each that does not count."""
    seconds: dict[str, list[CpuSeconds]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(runs):
        for name, function in functions.items():
            seconds[name].append(cpu_seconds(function)[1])
    return seconds


def medians(seconds: Mapping[str, list[CpuSeconds]]) -> dict[str, CpuSeconds]:
    """The median of each function's runs, of user and system seconds apart."""
    return {name: CpuSeconds(*map(median, zip(*runs, strict=True))) for name, runs in seconds.items()}


def peak_bytes(function: Callable[[], object]) -> int:
    """Most bytes of tensors that lived at once within `function`, beyond those that lived before."""
    with PeakMemory() as memory:
        function()
    return memory.peak
