"""What region attention costs against stock attention and against its literal dense form.

    python benchmarks/attention_cost.py [--tokens 2048 4096 8192] [--regions 4 ...] [--n 7] [--backward] [--json PATH]
    python benchmarks/attention_cost.py --wan [--regions 4]

Self-attention of 8 heads of 40, float32 on one thread: time as user CPU seconds, the median of n runs in turn, as
ratios to stock attention; memory as the most bytes of tensors that lived at once beyond the arguments. The dense form
is left out where its scores would take more than 2 GB. The growth exponents are those between the smallest and the
largest number of tokens.

--wan: only the memory, at the sizes of Wan on 81 frames of 832 x 480: 32,760 tokens, heads of 128 in bfloat16, two
prompts; beyond query, key, value and the output (target: 100 MB). Two heads stand for all: one is worked on at a time.
"""
# ruff: noqa: E402 (the pack is loaded before it is imported)

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import one_hot, scaled_dot_product_attention

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
from pack import load_pack

load_pack(host=False)

from spacetime_edit.benchmarks._figures import verdict
from spacetime_edit.benchmarks._timing import RUNS, interleaved, medians, peak_bytes
from spacetime_edit.core.region_attention import modulated_attention

HEADS, WIDTH = 8, 40
AT = 8192  # tokens of the targets
MAX_TIME, MAX_MEMORY, MAX_EXPONENT = 1.8, 2.0, 1.1
MAX_DENSE = 2e9
WAN = (2, 2, 32760, 128)  # query, key and value, in bfloat16; more heads wait for their turn
WAN_MEMORY = 100  # MB
STOCK, OURS, DENSE = "stock attention", "region attention", "dense form"


def dense(query: Tensor, key: Tensor, value: Tensor, region: Tensor, strength: Tensor) -> Tensor:
    """The definition with tokens x tokens tensors."""
    scores = (query @ key.mT) * query.shape[-1] ** -0.5
    shared = (region @ region.T).clamp(max=1)
    low, high = scores.amin(-1, keepdim=True), scores.amax(-1, keepdim=True)
    a = strength[:, None]
    return (scores + a * shared * (high - scores) - a * (1 - shared) * (scores - low)).softmax(-1) @ value


def functions_of(tokens: int, regions: int, backward: bool, seed: int) -> dict[str, Callable[[], object]]:
    g = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(1, HEADS, tokens, WIDTH, generator=g) for _ in range(3))
    region = one_hot(torch.randint(regions, (tokens,), generator=g), regions).float()
    strength = 0.1 + 0.2 * torch.rand(tokens, generator=g)
    forms = {
        STOCK: lambda q, k, v: scaled_dot_product_attention(q, k, v),
        OURS: lambda q, k, v: modulated_attention(q, k, v, region, region, strength),
    }
    if 4 * HEADS * tokens**2 <= MAX_DENSE:
        forms[DENSE] = lambda q, k, v: dense(q, k, v, region, strength)

    def run(form: Callable) -> object:
        if not backward:
            with torch.inference_mode():
                return form(query, key, value)
        leaves = [t.clone().requires_grad_() for t in (query, key, value)]
        return torch.autograd.grad(form(*leaves).sum(), leaves)

    return {name: (lambda form=form: run(form)) for name, form in forms.items()}


def wan_memory(regions: int, seed: int) -> float:
    """MB beyond query, key, value and the output at the sizes of Wan 1.3B."""
    g = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(WAN, generator=g).bfloat16() for _ in range(3))
    region = one_hot(torch.randint(regions, (WAN[2],), generator=g), regions).float()
    strength = 0.1 + 0.2 * torch.rand(WAN[2], generator=g)
    with torch.inference_mode():
        peak = peak_bytes(lambda: modulated_attention(query, key, value, region, region, strength))
    return (peak - value.numel() * value.element_size()) / 1e6


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 4096, AT])
    parser.add_argument("--regions", type=int, nargs="+", default=[4])
    parser.add_argument("--n", type=int, default=RUNS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backward", action="store_true", help="forward and backward")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--wan", action="store_true", help="memory at the sizes of Wan 1.3B")
    arguments = parser.parse_args()
    if arguments.wan:
        extra = wan_memory(arguments.regions[0], arguments.seed)
        print(
            verdict(
                extra <= WAN_MEMORY, f"32,760 tokens: {extra:.0f} MB beyond q, k, v and output, at most {WAN_MEMORY}"
            )
        )
        return 0
    torch.set_num_threads(1)
    rows = []
    print(f"{'tokens':>8} {'regions':>8} {'form':18} {'s':>8} {'x stock':>8} {'MB':>8} {'x q, k, v':>10}")
    for tokens, regions in product(arguments.tokens, arguments.regions):
        functions = functions_of(tokens, regions, arguments.backward, arguments.seed)
        seconds = medians(interleaved(functions, arguments.n))
        given = 3 * 4 * HEADS * tokens * WIDTH
        for name, function in functions.items():
            row = {
                "tokens": tokens,
                "regions": regions,
                "form": name,
                "seconds": seconds[name].user,
                "bytes": peak_bytes(function),
            }
            row |= {"of_stock": row["seconds"] / seconds[STOCK].user, "of_qkv": row["bytes"] / given}
            rows.append(row)
            figures = f"{row['seconds']:8.3f} {row['of_stock']:8.2f} {row['bytes'] / 1e6:8.1f} {row['of_qkv']:10.2f}"
            print(f"{tokens:8} {regions:8} {name:18} {figures}", flush=True)
    print("\n".join(["", *verdicts(rows)]))
    if arguments.json:
        arguments.json.write_text(json.dumps({"rows": rows}, indent=1) + "\n", encoding="utf-8")
    return 0


def verdicts(rows: list[dict]) -> list[str]:
    """The targets at 8192 tokens, and how time and memory grow."""
    ours = [row for row in rows if row["form"] == OURS]
    lines = []
    for row in (row for row in ours if row["tokens"] == AT):
        at = f"{row['regions']} regions: "
        text = f"{at}time {row['of_stock']:.2f} of stock, at most {MAX_TIME}"
        lines.append(verdict(row["of_stock"] <= MAX_TIME, text))
        text = f"{at}extra memory {row['of_qkv']:.2f} of q, k and v, at most {MAX_MEMORY:g}"
        lines.append(verdict(row["of_qkv"] <= MAX_MEMORY, text))
    ours = [row for row in ours if row["regions"] == ours[0]["regions"]]
    if len(ours) > 1:
        first, last = ours[0], ours[-1]
        span = math.log(last["tokens"] / first["tokens"])
        exponent = {name: math.log(last[name] / first[name]) / span for name in ("seconds", "bytes")}
        text = (
            f"memory grows as tokens^{exponent['bytes']:.2f}, at most {MAX_EXPONENT}; time as {exponent['seconds']:.2f}"
        )
        lines.append(verdict(exponent["bytes"] <= MAX_EXPONENT, text))
    return lines


if __name__ == "__main__":
    sys.exit(main())
