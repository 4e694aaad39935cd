"""Attention modulated by regions (ST-Modulator, arXiv 2502.17258, eq. 4 to 8), exact, with memory linear in tokens.

With scores s = scale <q, k> of a query x, hi and lo their extrema over the keys, a the strength of x and R in [0, 1]
whether x and key y share a region, s is pulled toward hi where R is 1 and toward lo where it is 0:

    s' = s + a R (hi - s) - a (1 - R) (s - lo) = (1 - a) s + a [lo + R (hi - lo)]

The softmax drops what is constant in a row, and R is of low rank, R = A B^T. So s' is the score of a stock attention
whose queries are [(1 - a) q, a (hi - lo) A / scale] and whose keys are [k, B]: no tokens x tokens tensor anywhere.

Shape letters: B batch, H heads, N queries, M keys, D head dimension, K regions, C extra channels.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from .attention_scores import Scores, kernels_for

log = logging.getLogger("spacetime_edit")

Overlap = Literal["any", "product"]
Attention = Callable[..., Tensor]
"""attention(query, key, value, scale=..., attn_mask=...) -> (B, H, N, D of value), as PyTorch's own."""

XI, XI_OF_WORDS = 0.3, 1.0
POWER = 5
MAX_WIDTH = 256
"""Head dimension, extra channels included, up to which fused kernels work."""
FAR = 3e4  # logit below the others of a hidden key: its weight is 0 in every dtype, and float16 holds it
WIDTH_STEP = 8  # fused kernels want widths that are multiples of this
TILE_ELEMENTS = {"cpu": 2**19}  # of the scores that are looked through at once: about a cache
LARGE_TILE = 2**24  # on other devices, where a call costs more than its memory
TOGETHER = 2**23  # elements of query and key that are worked on at once, without a graph: the rest waits, head by head
SMALL = 256  # rows below which some of them alone may be computed by another code path, with other rounding


def modulation_strength(t: float, size: Tensor | float, *, to_words: bool = False) -> Tensor:
    """a in [0, 1]: xi t^5 * size, with xi = 0.3, and 1 for attention to words alone.

    t: normalised time, 1 = noise, 0 = clean; size: 1 minus the share of the frame or clip that the query's region
    covers, clamped to [0, 1].
    """
    return (XI_OF_WORDS if to_words else XI) * t**POWER * torch.as_tensor(size).clamp(0, 1)


class Factors(NamedTuple):
    """Of R = of_query of_key^T: (B or 1, N, C) and (B or 1, M, C). None, both, where C would be too large."""

    of_query: Tensor | None
    of_key: Tensor | None


def region_factors(region_query: Tensor, region_key: Tensor, overlap: Overlap = "any") -> Factors:
    """Of memberships and an overlap as `modulated_attention` takes them. A card waits for them to be found.

    Any shared region: one channel a pattern of memberships that occurs, on the side that has fewer of them.
    """
    region_query, region_key = (t if t.ndim == 3 else t[None] for t in (region_query, region_key))
    if overlap == "product":
        return Factors(region_query, region_key)
    patterns, which = region_query.flatten(0, 1).unique(dim=0, return_inverse=True)
    others, which_other = region_key.flatten(0, 1).unique(dim=0, return_inverse=True)
    if min(len(patterns), len(others)) > MAX_WIDTH:
        return Factors(None, None)
    if len(others) < len(patterns):
        return Factors(*region_factors(region_key, region_query, overlap)[::-1])
    chosen = one_hot(which, len(patterns)).unflatten(0, region_query.shape[:2]).to(region_query)
    inside = patterns.any(1)  # a pattern of no region shares none
    return Factors(chosen[..., inside], _shared(patterns[inside], region_key).mT)


def modulated_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    region_query: Tensor,
    region_key: Tensor,
    strength: Tensor | float,
    *,
    overlap: Overlap = "any",
    factors: Factors | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    blocks: Sequence[int] | None = None,
    alone: Tensor | None = None,
    attention: Attention | None = None,
    kernels: bool = True,
    tile: int | None = None,
) -> Tensor:
    """Attention whose scores are pulled together within regions and apart between them; (B, H, N, D of value).

    query (B, H, N, D), key and value (B, H, M, D). region_query (N, K) or (B, N, K) and region_key (M, K) or (B, M, K):
    membership in [0, 1]. strength: a in [0, 1], scalar, (N,), (B, N) or (B, H, N); rows of strength 0 are those of
    plain attention. overlap: R = 1 where query and key share any region (of soft memberships 1 - prod(1 - u v)), or
    the product R = sum u v, meant for a partition. factors: of them, where they are known. mask: additive,
    (B or 1, 1, 1, M), of padding or of a bias on keys; one of rows and keys (B or 1, 1, N, M) takes the tiled form.
    blocks: lengths of consecutive blocks of keys, such as text and video; hi and lo are then taken within each key's
    own block. alone: (M,) bool, keys whose scores stay as they are and do not count for hi and lo, such as those of a
    reference picture; with them rows of strength above 0 take the tiled form. attention: the stock attention to use.
    kernels: on a card a fused kernel may compute it instead, where no gradient is recorded. tile: elements of the
    largest temporary tensor of scores; None: by the device.

    Differentiable in query, key and value. Raises ValueError for shapes that do not fit.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    strength = _rows_of(strength, query)
    region_query, region_key = (t if t.ndim == 3 else t[None] for t in (region_query, region_key))
    _check(query, key, region_query, region_key, mask, blocks, alone)
    factors = region_factors(region_query, region_key, overlap) if factors is None else factors
    options = {"scale": scale, "mask": mask, "blocks": blocks, "alone": alone}
    if kernels and (made := _by_kernel(query, key, value, factors, strength, **options)) is not None:
        return made
    regions = _Regions(region_query, region_key, factors, overlap)
    options["tile"] = tile or TILE_ELEMENTS.get(query.device.type, LARGE_TILE)
    return _by_stock(attention or scaled_dot_product_attention, query, key, value, regions, strength, **options)


class _Regions(NamedTuple):
    """Memberships of queries and keys, with the factors of what they share."""

    of_query: Tensor
    of_key: Tensor
    factors: Factors
    overlap: Overlap

    def each(self, of_query: Callable[[Tensor], Tensor], of_key: Callable[[Tensor], Tensor]) -> _Regions:
        """With a function of whatever belongs to queries, and another of what belongs to keys."""
        factors = self.factors
        if factors.of_query is not None:
            factors = Factors(of_query(factors.of_query), of_key(factors.of_key))
        return _Regions(of_query(self.of_query), of_key(self.of_key), factors, self.overlap)


def _by_stock(
    attention: Attention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    regions: _Regions,
    strength: Tensor,
    *,
    mask: Tensor | None,
    alone: Tensor | None,
    **options,
) -> Tensor:
    """`modulated_attention` in PyTorch, strength (B, H, N): batch items and rows without strength, and the others."""
    of = partial(_by_stock, attention, alone=alone, **options)
    active = strength != 0
    if not active.any():
        return _plain(attention, query, key, value, options["scale"], mask)
    if not (batches := active.any(2).any(1)).all():

        def of_batches(chosen: Tensor) -> Tensor:
            q, k, v, a, own = (_pick(t, 0, chosen) for t in (query, key, value, strength, mask))
            return of(q, k, v, regions.each(*[partial(_pick, dim=0, chosen=chosen)] * 2), a, mask=own)

        return _in_two(of_batches, batches, 0)
    if not (rows := active.any(1).any(0)).all() and len(rows) > SMALL:

        def of_rows(chosen: Tensor) -> Tensor:
            q, a, own = (_pick(t, 2, chosen) for t in (query, strength, mask))
            there = regions.each(partial(_pick, dim=1, chosen=chosen), lambda of_key: of_key)
            return of(q, key, value, there, a, mask=own)

        return _in_two(of_rows, rows, 2, SMALL)
    if not _recorded(query, key, value) and len(parts := _heads_at_once(query, key)) > 1:
        out = value.new_empty(*query.shape[:3], value.shape[-1])
        for b, heads in parts:
            tensors = [t[b, heads] for t in (query, key, value)]
            here = regions.each(*[lambda t, b=b: t if len(t) == 1 else t[b]] * 2)
            own = mask if mask is None or len(mask) == 1 else mask[b]
            out[b, heads] = of(*tensors, here, strength[b, heads], mask=own)
        return out
    scores = Scores(query, key, mask=mask, **options)
    out = _augmented(scores, value, regions.factors, strength, attention) if alone is None else None
    if out is None:
        _say_tiled()
        return _tiled(scores, value, regions, strength, alone)
    if active.all():
        return out
    return torch.where(active[..., None], out, _plain(attention, query, key, value, options["scale"], mask))


def _recorded(*tensors: Tensor) -> bool:
    """Whether a graph is built from any of these."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _by_kernel(
    query: Tensor, key: Tensor, value: Tensor, factors: Factors, strength: Tensor, **options
) -> Tensor | None:
    """The same by a fused kernel; None where there is none that takes these tensors."""
    mask = options["mask"]
    if factors.of_query is None or _recorded(query, key, value) or (mask is not None and mask.shape[2] > 1):
        return None
    kernels = kernels_for(query, value)
    if kernels is None or factors.of_query.shape[-1] > kernels.MAX_CHANNELS:
        return None
    return kernels.region_attention(query, key, value, *factors, strength, **options)


@cache
def _say_tiled() -> None:
    """Once: it may be so in every call."""
    log.info(
        "region attention: formed in tiles, which is slower: too many channels, a mask of rows and keys, or keys that "
        "are left alone"
    )


def _rows_of(strength: Tensor | float, query: Tensor) -> Tensor:
    """strength as (B, H, N)."""
    wide = torch.promote_types(query.dtype, torch.float32)
    strength = torch.as_tensor(strength, device=query.device, dtype=wide)
    if strength.ndim == 2:
        strength = strength[:, None]
    return strength.expand(query.shape[:3])


def _check(query, key, region_query, region_key, mask, blocks, alone) -> None:
    for name, region, tokens in (("region_query", region_query, query), ("region_key", region_key, key)):
        if region.shape[0] not in (1, query.shape[0]) or region.shape[1] != tokens.shape[2]:
            raise ValueError(
                f"{name}: it has shape {tuple(region.shape)}; expected ({tokens.shape[2]}, K) or "
                f"({query.shape[0]}, {tokens.shape[2]}, K)"
            )
    if region_query.shape[2] != region_key.shape[2]:
        raise ValueError(f"region_key: it has {region_key.shape[2]} regions, region_query {region_query.shape[2]}")
    if alone is not None and alone.shape != key.shape[2:3]:
        raise ValueError(f"alone: it has shape {tuple(alone.shape)}; expected ({key.shape[2]},)")
    if blocks is not None and sum(blocks) != key.shape[2]:
        raise ValueError(f"blocks: they hold {sum(blocks)} keys, there are {key.shape[2]}")
    if mask is not None and not mask.is_floating_point():
        raise ValueError(f"mask: it is {mask.dtype}; expected an additive one, 0 where a key is seen")
    if mask is not None and (mask.ndim != 4 or mask.shape[1] != 1 or mask.shape[3] != key.shape[2]):
        raise ValueError(f"mask: it has shape {tuple(mask.shape)}; expected (B, 1, 1 or N, {key.shape[2]})")


def _heads_at_once(query: Tensor, key: Tensor) -> list[tuple[slice, slice]]:
    """(batches, heads) to work on in turn, so that copies of query and key stay small."""
    batch, heads, n, width = query.shape
    of_one = (n + key.shape[2]) * width
    if of_one * batch * heads <= TOGETHER:
        return [(slice(None), slice(None))]
    step = max(1, min(heads, TOGETHER // of_one))
    return [(slice(b, b + 1), slice(h, h + step)) for b in range(batch) for h in range(0, heads, step)]


def _plain(
    attention: Attention, query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None
) -> Tensor:
    return attention(query, key, value, scale=scale, **({} if mask is None else {"attn_mask": mask}))


def _pick(tensor: Tensor | None, dim: int, chosen: Tensor) -> Tensor | None:
    """These items of a dimension, or the tensor itself where that dimension only broadcasts."""
    return tensor if tensor is None or tensor.shape[dim] == 1 else tensor.index_select(dim, chosen)


def _in_two(compute: Callable[[Tensor], Tensor], active: Tensor, dim: int, least: int = 0) -> Tensor:
    """What `compute` gives for the active items and for the others, in their own order.

    least: items that it is asked for at once; of fewer, some of the other kind are computed beside them and dropped.
    """
    sides = active.nonzero()[:, 0], (~active).nonzero()[:, 0]
    asked = [torch.cat([own, other[: max(0, least - len(own))]]) for own, other in (sides, sides[::-1])]
    parts = [compute(chosen).narrow(dim, 0, len(own)) for chosen, own in zip(asked, sides, strict=True)]
    return torch.cat(parts, dim).index_select(dim, torch.cat(sides).argsort())


# --- exact, by extra channels of a stock attention ----------------------


def _shared(u: Tensor, v: Tensor) -> Tensor:
    """Whether rows of u (..., N, K) and of v (..., M, K) share any region: (..., N, M)."""
    apart = torch.ones(())
    for k in range(u.shape[-1]):
        apart = apart * (1 - u[..., :, None, k] * v[..., None, :, k])
    return 1 - apart


def _augmented(
    scores: Scores, value: Tensor, factors: Factors, strength: Tensor, attention: Attention
) -> Tensor | None:
    """The module's identity; None where it does not apply."""
    if factors.of_query is None or not scores.by_key:
        return None
    query, key, scale = scores.query, scores.key, scores.scale
    wide = torch.promote_types(query.dtype, torch.float32)
    on_query, on_key = (factor[:, None].to(wide) for factor in factors)
    strength, several = strength[..., None].to(wide), len(scores.slices) > 1
    halves = 1 if query.dtype == wide else 2
    channels = factors[0].shape[-1] * len(scores.slices) + several * len(scores.slices) + 2 * (scores.mask is not None)
    if query.shape[-1] + halves * channels > MAX_WIDTH:
        return None
    pairs = []  # of channels on the query (B, H, N, c) and on the key (B or 1, 1, M, c), logits being scale q k
    for keys in scores.slices:
        low, high = (bound[..., None] for bound in scores.extrema(keys))
        here = torch.zeros(key.shape[2], 1, dtype=wide, device=key.device)
        here[keys] = 1
        pairs.append((strength * (high - low) * on_query / scale, on_key * here))
        if several:  # else a lo is the same for all keys of a row
            pairs.append((strength * low / scale, here[None, None]))
    if (bias := scores.bias()) is not None:
        pairs.append(((1 - strength) / scale, bias.mT.to(wide)))
    if scores.mask is not None:
        far = (FAR / scale) ** 0.5
        pairs.append((torch.full_like(strength, far), scores.hidden().mT.to(wide) * -far))
    channels = [
        (part, of_key.to(key.dtype))
        for of_query, of_key in pairs
        for part in _rounded(of_query.expand(*query.shape[:3], -1), query.dtype)
    ]
    width = query.shape[-1] + sum(part.shape[-1] for part, _ in channels)
    width = -(-width // WIDTH_STEP) * WIDTH_STEP
    softened = ((1 - strength) * query.to(wide)).to(query.dtype)
    query, key = (_widened(t, [pair[i] for pair in channels], width) for i, t in enumerate((softened, key)))
    del softened, channels, pairs
    return attention(query, key, _widened(value, [], width), scale=scale)[..., : value.shape[-1]]


def _either(hidden: Tensor | None, alone: Tensor | None) -> Tensor | None:
    """Keys that are the one or the other."""
    if hidden is None or alone is None:
        return alone if hidden is None else hidden
    return hidden | alone


def _widened(tensor: Tensor, channels: Sequence[Tensor], width: int) -> Tensor:
    """tensor (B, H, N, D) with these channels behind its own, and zeros up to `width`."""
    rest = width - tensor.shape[-1] - sum(channel.shape[-1] for channel in channels)
    zeros = tensor.new_zeros(1).expand(*tensor.shape[:3], rest)
    return torch.cat([tensor, *(channel.expand(*tensor.shape[:3], -1) for channel in channels), zeros], -1)


def _rounded(channel: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """The channel in `dtype`; of half precision with its remainder as a second one, so that large scores keep it."""
    rounded = channel.to(dtype)
    return [rounded] if dtype == channel.dtype else [rounded, (channel - rounded).to(dtype)]


# --- exact, in tiles of rows --------------------------------------------


def _tiled(scores: Scores, value: Tensor, regions: _Regions, strength: Tensor, alone: Tensor | None) -> Tensor:
    """The definition itself, for some rows at a time; recomputed in a backward pass."""

    def of_rows(query: Tensor, key: Tensor, value: Tensor, rows: slice) -> Tensor:
        here = replace(scores, query=query, key=key).of_rows(rows)
        wide = torch.promote_types(query.dtype, torch.float32)
        raw = here.formed().to(wide)
        u, v = regions.of_query[:, rows].to(wide), regions.of_key.to(wide)
        shared = (_shared(u, v) if regions.overlap == "any" else u @ v.mT)[:, None]
        a, hidden = strength[:, :, rows, None].to(wide), here.hidden()
        left_out = _either(hidden, alone)
        pulled = []
        for keys in here.slices:
            low = high = raw[..., keys]
            if left_out is not None:
                low = low.masked_fill(left_out[..., keys], torch.inf)
                high = high.masked_fill(left_out[..., keys], -torch.inf)
            low, high = low.amin(-1, keepdim=True), high.amax(-1, keepdim=True)
            nothing = low > high  # all keys of the block are left out
            low, high = low.masked_fill(nothing, 0.0), high.masked_fill(nothing, 0.0)
            pulled.append((1 - a) * raw[..., keys] + a * (low + shared[..., keys] * (high - low)))
        moved = torch.cat(pulled, -1)
        if alone is not None:
            moved = torch.where(alone, raw, moved)
        if hidden is not None:
            moved = moved.masked_fill(hidden, -torch.inf)
        return (moved.softmax(-1) @ value.to(wide)).to(value.dtype)

    def run(rows: slice) -> Tensor:
        if torch.is_grad_enabled():
            return checkpoint(of_rows, scores.query, scores.key, value, rows, use_reentrant=False)
        return of_rows(scores.query, scores.key, value, rows)

    return torch.cat([run(rows) for rows in scores.row_tiles()], 2)
