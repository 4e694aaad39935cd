"""What the self-similarity losses cost, forward and backward, against their direct form with tokens x tokens maps.

    python benchmarks/ssm_cost.py [--frames 8 16] [--n 7] [--json PATH]

The sizes are those of the keys in Zeroscope's way up at 576 x 320: 180 tokens of 1280 channels, 720 of 640, 2880 of
320. Time as user CPU seconds on one thread, the median of n runs in turn; memory as the most bytes of tensors that
lived at once beyond the keys.
"""
# ruff: noqa: E402 (the pack is loaded before it is imported)

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
from pack import load_pack

load_pack(host=False)

from spacetime_edit.benchmarks._timing import RUNS, interleaved, medians, peak_bytes
from spacetime_edit.core.self_similarity import spatial_self_similarity_loss, temporal_self_similarity_loss

SIZES = ((180, 1280), (720, 640), (2880, 320))
SPATIAL, DIRECT, TEMPORAL = "S-SSM", "S-SSM, direct", "T-SSM"


def direct(source: Tensor, target: Tensor) -> Tensor:
    """The definition, by autograd."""
    maps = [normalize(keys, dim=-1) @ normalize(keys, dim=-1).mT for keys in (source, target)]
    return (maps[1] - maps[0]).square().mean()


FORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    SPATIAL: spatial_self_similarity_loss,
    DIRECT: direct,
    TEMPORAL: temporal_self_similarity_loss,
}


def both_ways(loss: Callable[[Tensor, Tensor], Tensor], source: Tensor, target: Tensor) -> Tensor:
    leaf = target.clone().requires_grad_()
    return torch.autograd.grad(loss(source, leaf), leaf)[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--n", type=int, default=RUNS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows, generator = [], torch.Generator().manual_seed(arguments.seed)
    print(f"{'frames':>7} {'tokens':>7} {'channels':>9} {'form':16} {'s':>8} {'x direct':>9} {'MB':>8} {'x direct':>9}")
    for frames, (tokens, channels) in product(arguments.frames, SIZES):
        source, target = (torch.randn(frames, tokens, channels, generator=generator) for _ in range(2))
        functions = {name: partial(both_ways, loss, source, target) for name, loss in FORMS.items()}
        seconds = medians(interleaved(functions, arguments.n))
        peaks = {name: peak_bytes(function) for name, function in functions.items()}
        for name in functions:
            row = {"frames": frames, "tokens": tokens, "channels": channels, "form": name}
            row |= {"seconds": seconds[name].user, "bytes": peaks[name]}
            row |= {"time": row["seconds"] / seconds[DIRECT].user, "memory": row["bytes"] / peaks[DIRECT]}
            rows.append(row)
            shown = f"{row['seconds']:8.3f} {row['time']:9.2f} {row['bytes'] / 1e6:8.1f} {row['memory']:9.2f}"
            print(f"{frames:7} {tokens:7} {channels:9} {name:16} {shown}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({"rows": rows}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
