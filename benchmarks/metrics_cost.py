"""What the metrics of an edit cost that need no model: time, and memory by the number of frames.

    python benchmarks/metrics_cost.py [--frames 100] [--size 512]

A textured clip that moves, its edit a recoloured square in a mask. Targets: under 20 s for 100 frames of 512 x 512 on
two cores, wall time; no more memory for 24 frames than for 6 (of 64 x 64), but for the clips themselves.
"""
# ruff: noqa: E402 (the pack is loaded before it is imported)

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import interpolate

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
from pack import load_pack

load_pack()

from spacetime_edit.benchmarks._figures import verdict
from spacetime_edit.benchmarks._timing import peak_bytes
from spacetime_edit.host.video_metrics import measure

SECONDS, GROWTH = 20, 1.1


def clips(frames: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Clip, edit (F, H, W, 3) and mask (1, H, W)."""
    texture = torch.rand(1, 3, size // 8, size // 4, generator=torch.Generator().manual_seed(0))
    wide = interpolate(texture, (size, 2 * size), mode="bicubic")[0].movedim(0, -1).clamp(0, 1)
    source = torch.stack([wide[:, i : i + size] for i in range(frames)])
    mask = torch.zeros(1, size, size)
    mask[:, size // 4 : size // 2, size // 4 : size // 2] = 1
    return source, torch.where(mask[..., None] > 0, source.flip(-1), source), mask


def peak_of(source: Tensor, edit: Tensor, mask: Tensor) -> int:
    return peak_bytes(lambda: measure(source, edit, mask=mask))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=100)
    parser.add_argument("--size", type=int, default=512)
    arguments = parser.parse_args()
    frames, size = arguments.frames, arguments.size
    with torch.inference_mode():
        source, edit, mask = clips(frames, size)
        start = time.perf_counter()
        measure(source, edit, mask=mask)
        seconds = time.perf_counter() - start
        text = f"{frames} frames of {size} x {size}: {seconds:.1f} s, under {SECONDS}"
        print(verdict(seconds < SECONDS, text), flush=True)
        peak = [peak_of(*clips(count, 64)) for count in (6, 24)]
    text = f"memory beside the clips: {peak[1] / 1e6:.2f} MB for 24 frames, {peak[0] / 1e6:.2f} MB for 6"
    print(verdict(peak[1] <= GROWTH * peak[0], text))
    return 0


if __name__ == "__main__":
    sys.exit(main())
