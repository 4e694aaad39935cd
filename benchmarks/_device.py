"""Time and memory of a piece of code on the host's device: a card, or the CPU."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from time import perf_counter

import comfy.model_management as management
import torch

from ._timing import peak_bytes

GIB = 2**30


def on_card() -> bool:
    return management.get_torch_device().type == "cuda"


def wait() -> None:
    if on_card():
        torch.cuda.synchronize()


def seconds_of(function: Callable[[], object]) -> tuple[object, float]:
    wait()
    start = perf_counter()
    result = function()
    wait()
    return result, perf_counter() - start


def typical_seconds(function: Callable[[], object], runs: int = 7, most: float = 0.6) -> float:
    """Median of up to `runs` runs that take `most` seconds in all, after one that does not count."""
    function()
    times: list[float] = []
    while len(times) < runs and (not times or sum(times) < most):
        times.append(seconds_of(function)[1])
    return median(times)


def extra_bytes(function: Callable[[], object]) -> int:
    """Most bytes that were allocated at once, beyond those before."""
    if not on_card():
        return peak_bytes(function)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def peak_of(function: Callable[[], float]) -> tuple[float, float]:
    """Seconds that `function` returns, and GiB of all that was allocated at once, weights included."""
    if on_card():
        torch.cuda.reset_peak_memory_stats()
    return function(), torch.cuda.max_memory_allocated() / GIB if on_card() else 0.0
