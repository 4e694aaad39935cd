"""Run the U-Net's trainer on a card that is lent for minutes, so that nothing is lost by a failure.

    python tools/train_emoji/card.py RUN --out FOLDER --seconds 580 --init FOLDER
    python tools/train_emoji/card.py RUN --out FOLDER --seconds 130 --finish

The second call goes on from the first, on the same machine. RUN holds all state, --out gets the best weights about
every two minutes. Where the trainer fails, it goes on from its last checkpoint without CUDA graphs, or at a lower rate
if the loss was not finite. Other options, --init among them, are those of `train_unet`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

STARTED = time.monotonic()
NOT_FINITE = 3
LEAST = 40.0
"""Seconds below which no other try begins."""
TRIES = 2
"""After the first."""


def left(arguments: argparse.Namespace) -> float:
    """Seconds until the end of this call."""
    return arguments.seconds - (time.monotonic() - STARTED)


def run(arguments: argparse.Namespace, *options: str) -> int:
    """The trainer's exit status."""
    script, seconds = str(Path(__file__).with_name("train_unet.py")), f"{left(arguments):.1f}"
    place = (str(arguments.run), "--out", str(arguments.out))
    command = [sys.executable, script, *place, "--seconds", seconds, *arguments.rest, *options]
    return subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}).returncode


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of the run, of all calls")
    parser.add_argument("--out", type=Path, required=True, help="folder of what is kept")
    parser.add_argument("--seconds", type=float, default=580.0, help="of this call")
    arguments, arguments.rest = parser.parse_known_args()
    return arguments


def main() -> int:
    arguments = parse_arguments()
    status, careful = run(arguments), []
    for _ in range(TRIES):
        if status and left(arguments) > LEAST:
            careful += ["--rate", "0.008"] if status == NOT_FINITE else ["--eager"]
            print(f"the trainer ended with status {status}: again with {' '.join(careful)}", flush=True)
            status = run(arguments, *careful)
    return status


if __name__ == "__main__":
    sys.exit(main())
