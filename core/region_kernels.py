"""Region attention and the extrema of scores as Triton kernels: exact, without a tensor of queries x keys, and nothing
is copied. For cards; `region_attention` has the same in PyTorch, and imports this where Triton is there.

One program computes some rows of one head. For each block of keys it goes over them twice: for the highest and lowest
score of each row, and as flash attention (arXiv 2205.14135) does, with the modulated score. Head widths are split in
two powers of two, so that 40 is computed as 48 channels and not as 64.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache, lru_cache
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import OutOfResources

from .attention_scores import HIDDEN

log = logging.getLogger("spacetime_edit")

OLDEST = (8, 0)
"""Least compute capability: older cards have no bfloat16, and little shared memory."""
LEAST_WIDTH, MAX_WIDTH = 16, 256
MAX_CHANNELS = 64
"""Of the memberships."""
CONFIGS = {  # (rows, keys, warps, stages) of a program by the widest head, the first that the card has room for
    64: ((128, 64, 8, 3), (64, 64, 4, 2), (32, 32, 4, 1)),
    128: ((128, 64, 8, 3), (128, 64, 8, 2), (64, 32, 4, 2), (32, 32, 4, 1)),
    MAX_WIDTH: ((64, 64, 8, 2), (64, 32, 4, 1), (32, 16, 4, 1)),
}
DTYPES = (torch.float16, torch.bfloat16)
"""Not float32, whose products take a minute to compile for wide heads, and which few run on a card."""


@triton.jit
def _channels(tensor, tokens, stride, valid, WIDTH: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """(COUNT, tokens): channels from FIRST of these tokens, 0 from WIDTH on."""
    channels = FIRST + tl.arange(0, COUNT)
    at = tensor + tokens[None, :] * stride + channels[:, None]
    return tl.load(at, mask=valid[None, :] & (channels[:, None] < WIDTH), other=0.0)


@triton.jit
def _scores(
    query, rest, keys, tokens, stride, valid, WIDTH: tl.constexpr, WIDE: tl.constexpr, REST: tl.constexpr
):  # fmt: skip
    """(rows, tokens): inner products."""
    found = tl.dot(query, _channels(keys, tokens, stride, valid, WIDTH, 0, WIDE))
    if REST > 0:
        others = _channels(keys, tokens, stride, valid, WIDTH, WIDE, REST)
        found = tl.dot(rest, others, found)
    return found


@triton.jit
def _query(tensor, rows, stride, valid, WIDTH: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """(rows, COUNT), as `_channels`."""
    channels = FIRST + tl.arange(0, COUNT)
    at = tensor + rows[:, None] * stride + channels[None, :]
    return tl.load(at, mask=valid[:, None] & (channels[None, :] < WIDTH), other=0.0)


@triton.jit
def _program(
    Query, Key, query_b, query_h, query_n, key_b, key_h, heads, count,
    WIDTH: tl.constexpr, WIDE: tl.constexpr, REST: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Of one program: batch item, head, rows, which of them there are, their queries in two parts, the keys."""
    batch, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < count
    queries = Query + batch * query_b + head * query_h
    query = _query(queries, rows, query_n, inside, WIDTH, 0, WIDE)
    rest = query
    if REST > 0:
        rest = _query(queries, rows, query_n, inside, WIDTH, WIDE, REST)
    return batch, head, rows, inside, query, rest, Key + batch * key_b + head * key_h


@triton.jit
def _region_attention(
    Query, Key, Value, Out, OfQuery, OfKey, Strength, Mask, Alone, Ends,
    query_b, query_h, query_n, key_b, key_h, key_n, value_b, value_h, value_n, out_b, out_h, out_n,
    of_query_b, of_key_b, strength_b, strength_h, strength_n, mask_b,
    heads, count, scale, hidden,
    WIDTH: tl.constexpr, WIDE: tl.constexpr, REST: tl.constexpr, CHANNELS: tl.constexpr, BLOCKS: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_ALONE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    batch, head, rows, inside, query, rest, keys = _program(
        Query, Key, query_b, query_h, query_n, key_b, key_h, heads, count, WIDTH, WIDE, REST, ROWS
    )
    values = Value + batch * value_b + head * value_h
    of_query = _query(OfQuery + batch * of_query_b, rows, CHANNELS, inside, CHANNELS, 0, CHANNELS)
    strength = tl.load(Strength + batch * strength_b + head * strength_h + rows * strength_n, mask=inside, other=0.0)
    strength = strength.to(tl.float32)
    acts = tl.max(strength) > 0  # else these rows are those of plain attention, and need no extrema

    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, WIDE], tl.float32)
    out_rest = tl.zeros([ROWS, REST if REST > 0 else 16], tl.float32)
    for block in range(BLOCKS):
        first, end = tl.load(Ends + block), tl.load(Ends + block + 1)
        high = tl.full([ROWS], float("-inf"), tl.float32)
        low = tl.full([ROWS], float("inf"), tl.float32)
        for start in range(first, tl.where(acts, end, first), KEYS):
            tokens = tl.minimum(start + tl.arange(0, KEYS), end - 1)  # the last key again, which changes no extremum
            seen = tokens < end
            score = _scores(query, rest, keys, tokens, key_n, seen, WIDTH, WIDE, REST) * scale
            above, below = score, score
            if HAS_MASK:
                bias = tl.load(Mask + batch * mask_b + tokens).to(tl.float32)
                seen = bias > hidden
                above = score + bias[None, :]
                below = above
            if HAS_ALONE:
                seen = seen & (tl.load(Alone + tokens) == 0)
            if HAS_MASK or HAS_ALONE:
                above = tl.where(seen[None, :], above, float("-inf"))
                below = tl.where(seen[None, :], below, float("inf"))
            high = tl.maximum(high, tl.max(above, 1))
            low = tl.minimum(low, tl.min(below, 1))
        nothing = low > high
        high = tl.where(nothing, 0.0, high)
        low = tl.where(nothing, 0.0, low)
        gap, floor = strength * (high - low), strength * low
        for start in range(first, end, KEYS):
            tokens = start + tl.arange(0, KEYS)
            seen = tokens < end
            plain = _scores(query, rest, keys, tokens, key_n, seen, WIDTH, WIDE, REST) * scale
            if HAS_MASK:
                bias = tl.load(Mask + batch * mask_b + tokens, mask=seen, other=0.0).to(tl.float32)
                plain = plain + bias[None, :]
                seen = seen & (bias > hidden)
            of_key = _channels(OfKey + batch * of_key_b, tokens, CHANNELS, tokens < end, CHANNELS, 0, CHANNELS)
            shared = tl.dot(of_query, of_key)
            score = (1 - strength[:, None]) * plain + floor[:, None] + gap[:, None] * shared
            if HAS_ALONE:
                alone = tl.load(Alone + tokens, mask=tokens < end, other=0) != 0
                score = tl.where(alone[None, :], plain, score)
            score = tl.where(seen[None, :], score * 1.4426950408889634, float("-inf"))
            then = tl.maximum(top, tl.max(score, 1))
            base = tl.where(then == float("-inf"), 0.0, then)
            weight = tl.math.exp2(score - base[:, None])
            fade = tl.math.exp2(top - base)
            total = total * fade + tl.sum(weight, 1)
            top = then
            value = _query(values, tokens, value_n, tokens < end, WIDTH, 0, WIDE)
            out = tl.dot(weight.to(value.dtype), value, out * fade[:, None])
            if REST > 0:
                value = _query(values, tokens, value_n, tokens < end, WIDTH, WIDE, REST)
                out_rest = tl.dot(weight.to(value.dtype), value, out_rest * fade[:, None])
    total = tl.where(total == 0, 1.0, total)
    outs = Out + batch * out_b + head * out_h + rows[:, None] * out_n
    channels = tl.arange(0, WIDE)
    kind = Out.dtype.element_ty
    tl.store(
        outs + channels[None, :], (out / total[:, None]).to(kind), mask=inside[:, None] & (channels[None, :] < WIDTH)
    )
    if REST > 0:
        channels = WIDE + tl.arange(0, REST)
        ok = inside[:, None] & (channels[None, :] < WIDTH)
        tl.store(outs + channels[None, :], (out_rest / total[:, None]).to(kind), mask=ok)


@triton.jit
def _extrema(
    Query, Key, Low, High, LowAt, HighAt, Mask,
    query_b, query_h, query_n, key_b, key_h, key_n, mask_b,
    heads, count, first, end, scale, hidden,
    WIDTH: tl.constexpr, WIDE: tl.constexpr, REST: tl.constexpr, HAS_MASK: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    batch, head, rows, inside, query, rest, keys = _program(
        Query, Key, query_b, query_h, query_n, key_b, key_h, heads, count, WIDTH, WIDE, REST, ROWS
    )
    high = tl.full([ROWS], float("-inf"), tl.float32)
    low = tl.full([ROWS], float("inf"), tl.float32)
    high_at = tl.zeros([ROWS], tl.int32) + first
    low_at = tl.zeros([ROWS], tl.int32) + first
    for start in range(first, end, KEYS):
        tokens = start + tl.arange(0, KEYS)
        seen = tokens < end
        score = _scores(query, rest, keys, tokens, key_n, seen, WIDTH, WIDE, REST) * scale
        if HAS_MASK:
            bias = tl.load(Mask + batch * mask_b + tokens, mask=seen, other=0.0).to(tl.float32)
            score = score + bias[None, :]
            seen = seen & (bias > hidden)
        most, most_at = tl.max(tl.where(seen[None, :], score, float("-inf")), 1, return_indices=True)
        least, least_at = tl.min(tl.where(seen[None, :], score, float("inf")), 1, return_indices=True)
        high_at = tl.where(most > high, start + most_at, high_at)
        low_at = tl.where(least < low, start + least_at, low_at)
        high = tl.maximum(high, most)
        low = tl.minimum(low, least)
    nothing = low > high
    at = tl.program_id(1).to(tl.int64) * count + rows
    tl.store(Low + at, tl.where(nothing, 0.0, low), mask=inside)
    tl.store(High + at, tl.where(nothing, 0.0, high), mask=inside)
    tl.store(LowAt + at, low_at, mask=inside)
    tl.store(HighAt + at, high_at, mask=inside)


# --- from PyTorch -----------------------------------------------------


def fits(query: Tensor, value: Tensor) -> bool:
    """Whether the kernels take tensors of this device, dtype and widths; they are tried out once for each."""
    width = query.shape[-1]
    return (
        query.device.type == "cuda"
        and query.dtype in DTYPES
        and width == value.shape[-1] <= MAX_WIDTH
        and works(query.device, query.dtype, width)
    )


def region_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    of_query: Tensor,
    of_key: Tensor,
    strength: Tensor,
    *,
    scale: float,
    mask: Tensor | None = None,
    blocks: Sequence[int] | None = None,
    alone: Tensor | None = None,
) -> Tensor:
    """`region_attention.modulated_attention` with R = of_query of_key^T: (B, H, N, D), without a gradient.

    of_query (B or 1, N, C), of_key (B or 1, M, C); strength (B, H, N); the rest as there. Rows of strength 0 are those
    of plain attention to rounding.
    """
    batch, heads, count, width = query.shape
    out = torch.empty(batch, count, heads, width, dtype=query.dtype, device=query.device).transpose(1, 2)
    query, key, value = map(_rows_together, (query, key, value))
    channels = max(LEAST_WIDTH, triton.next_power_of_2(of_query.shape[-1]))
    kind = torch.float32 if query.dtype == torch.float32 else torch.float16  # memberships are at most 1
    of_query, of_key = (
        torch.nn.functional.pad(t.to(kind), (0, channels - t.shape[-1])).contiguous() for t in (of_query, of_key)
    )
    mask = None if mask is None else mask[:, 0, 0].contiguous()
    alone = None if alone is None else alone.to(torch.int8)
    ends = _ends(tuple(blocks or [key.shape[2]]), query.device)
    wide, rest = _split(width)
    given = (query, key, value, out, of_query, of_key, strength, mask, alone, ends)
    numbers = (
        *(stride for t in (query, key, value, out) for stride in t.stride()[:3]),
        *(t.stride(0) if len(t) > 1 else 0 for t in (of_query, of_key)),
        *strength.stride(),
        mask.stride(0) if mask is not None and len(mask) > 1 else 0,
        *(heads, count, scale, HIDDEN),
    )
    fixed = {"WIDTH": width, "WIDE": wide, "REST": rest, "CHANNELS": channels, "BLOCKS": len(ends) - 1}
    fixed |= {"HAS_MASK": mask is not None, "HAS_ALONE": alone is not None}
    _launch(_region_attention, query, *given, *numbers, **fixed)
    return out


def extrema(
    query: Tensor, key: Tensor, keys: slice, *, scale: float, mask: Tensor | None = None
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Lowest and highest score of each row over these keys, and where they are among all keys: each (B, H, N)."""
    batch, heads, count, width = query.shape
    query, key = map(_rows_together, (query, key))
    low, high = torch.empty(2, batch, heads, count, device=query.device)
    low_at, high_at = torch.empty(2, batch, heads, count, dtype=torch.int64, device=query.device)
    mask = None if mask is None else mask[:, 0, 0].contiguous()
    first, end, _ = keys.indices(key.shape[2])
    wide, rest = _split(width)
    numbers = (
        *(stride for t in (query, key) for stride in t.stride()[:3]),
        mask.stride(0) if mask is not None and len(mask) > 1 else 0,
        *(heads, count, first, end, scale, HIDDEN),
    )
    fixed = {"WIDTH": width, "WIDE": wide, "REST": rest, "HAS_MASK": mask is not None}
    _launch(_extrema, query, query, key, low, high, low_at, high_at, mask, *numbers, **fixed)
    return (low, high), (low_at, high_at)


@lru_cache(maxsize=64)
def _ends(blocks: tuple[int, ...], device: torch.device) -> Tensor:
    """Where the blocks of keys begin, and where the last one ends; kept, since a copy to a card waits for the card."""
    return torch.tensor([0, *accumulate(blocks)], dtype=torch.int32, device=device)


def _rows_together(tensor: Tensor) -> Tensor:
    """With the channels of a token side by side in memory, and the tokens of a head within 32 bits."""
    near = tensor.stride(2) * tensor.shape[2] < 2**31
    return tensor if tensor.stride(3) == 1 and near else tensor.contiguous()


def _split(width: int) -> tuple[int, int]:
    """Two powers of two, of which the first may be all, that hold so many channels."""
    wide = max(LEAST_WIDTH, 1 << (width.bit_length() - 1))
    return wide, max(LEAST_WIDTH, triton.next_power_of_2(width - wide)) if width > wide else 0


def _launch(kernel, query: Tensor, *arguments, **fixed) -> None:
    """Runs a kernel over all rows and heads, with the largest tiles that the card has room for."""
    batch, heads, count, width = query.shape
    configs = next(configs for widest, configs in CONFIGS.items() if width <= widest)
    for place, (rows, keys, warps, stages) in enumerate(configs):
        grid = triton.cdiv(count, rows), batch * heads
        try:
            with torch.cuda.device_of(query):  # Triton runs on the current card, wherever the tensors are
                kernel[grid](*arguments, **fixed, ROWS=rows, KEYS=keys, num_warps=warps, num_stages=stages)
            return
        except OutOfResources:
            if place + 1 == len(configs):
                raise


@cache
def works(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Whether both kernels compile on this device for such heads, and agree with the definition; says so once."""
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < OLDEST:
        return False
    try:
        error = _error(device, dtype, width)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, OSError, triton.TritonError) as reason:  # no C compiler, another driver, no room
        log.warning("region attention: its kernel does not run here (%s), PyTorch's attention is used", reason)
        return False
    if not error <= MOST_ERROR[dtype]:  # nor if it is no number
        log.warning("region attention: its kernel errs by %.1g here, PyTorch's attention is used", error)
        return False
    log.info("region attention: runs as a Triton kernel (heads of %d, %s)", width, dtype)
    return True


MOST_ERROR = {torch.float16: 5e-3, torch.bfloat16: 3e-2}
"""Of the kernels against float64, relative to its largest value."""


def _error(device: torch.device, dtype: torch.dtype, width: int) -> float:
    """Of both kernels on small inputs against float64."""
    generator, count = torch.Generator().manual_seed(0), 77
    query, key, value = torch.randn(3, 1, 2, count, width, generator=generator).to(device, dtype)
    region = torch.nn.functional.one_hot(torch.arange(count) % 3).to(device, torch.float32)[None]
    strength = torch.full((1, 2, count), 0.3, device=device)
    scale = width**-0.5
    out = region_attention(query, key, value, region, region, strength, scale=scale)
    (low, high), _ = extrema(query, key, slice(0, count), scale=scale)
    query, key, value = (t.double() for t in (query, key, value))
    scores, shared = query @ key.mT * scale, (region @ region.mT).double()
    bounds = scores.amin(-1, keepdim=True), scores.amax(-1, keepdim=True)
    moved = 0.7 * scores + 0.3 * (bounds[0] + shared * (bounds[1] - bounds[0]))
    pairs = [(out, moved.softmax(-1) @ value), (low, bounds[0][..., 0]), (high, bounds[1][..., 0])]
    return float(torch.stack([(a - b).abs().max() / b.abs().max() for a, b in pairs]).max())
