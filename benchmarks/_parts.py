"""A benchmark in parts that do not depend on each other: figures with targets, limits in time, failures reported."""

from __future__ import annotations

import contextlib
import signal
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from time import perf_counter

from ._figures import verdict

FAILURES = (RuntimeError, ValueError, OSError)
"""What a part may fail with; out of memory is a RuntimeError, a limit that has run out an OSError."""


@dataclass(frozen=True)
class Row:
    """One figure. target: in words, with whether it was met; "" where there is none."""

    what: str
    value: float
    unit: str
    target: str = ""
    met: bool = True

    def __str__(self) -> str:
        text = f"{self.what}: {self.value:.4g} {self.unit}"
        return verdict(self.met, f"{text}, {self.target}") if self.target else f"         {text}"


Rows = Iterator[Row]


def at_least(what: str, value: float, unit: str, target: float) -> Row:
    return Row(what, value, unit, f"at least {target:.4g}", value >= target)


def at_most(what: str, value: float, unit: str, target: float) -> Row:
    return Row(what, value, unit, f"at most {target:.4g}", value <= target)


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """TimeoutError within, once they are over. Main thread only."""

    def over(*_) -> None:
        raise TimeoutError(f"its {seconds:.0f} s are over")

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run_part(name: str, part: Callable[[], Rows], seconds: float) -> dict:
    """Its rows, printed as they come, and its error, if it failed."""
    print(f"\n{name}", flush=True)
    rows, error, start = [], "", perf_counter()
    try:
        with limited(seconds):
            for row in part():
                rows.append(row)
                print(row, flush=True)
    except FAILURES:
        error = traceback.format_exc(limit=-6)  # the innermost calls
        print(error, flush=True)
    spent = perf_counter() - start
    print(f"  ({spent:.1f} s)", flush=True)
    return {"rows": [asdict(row) for row in rows], "error": error, "seconds": spent}
