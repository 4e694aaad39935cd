"""Spatio-temporal relevance of models whose attention spans space and time at once (STR-Match on video transformers).

There is no need to go along a path through two maps: A(i, p -> j, q) says how much token p of frame i looks at token q
of frame j. Its softmax runs over the tokens of all frames and over whatever else they see, such as the prompt's.

Shape letters: F frames, H heads, N tokens a frame, D head dimension, E further keys, P and Q blocks of tokens.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import product
from math import isqrt

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from .attention_features import AttentionFeatures, blocks_of, dot, neighbours, pairs_at

TILE_ELEMENTS = 2**21
SMALLEST = torch.finfo(torch.float64).tiny


def full_str_score(
    features: AttentionFeatures, *, radius: int = 1, bidirectional: bool = True, per_pair: bool = False
) -> Tensor:
    """The dense score: Omega_i(p, q) = sum over neighbours j of A(i, p -> j, q), plus A(j, q -> i, p) if bidirectional.

    Shapes and options as in `relevance.str_score`. This is the reference: it holds a map of all tokens;
    `full_matching_loss` does not.
    """
    frames, heads, tokens, _ = features.query.shape
    maps = _Maps.of(features, rows=tokens)
    attention = torch.stack([maps.tile(i, slice(None), slice(None)) for i in _all_pairs(frames)])
    of = {pair: attention[n] for n, pair in enumerate(_all_pairs(frames))}

    def relevance(i: int, j: int) -> Tensor:
        return of[i, j] + of[j, i].mT if bidirectional else of[i, j]

    pairs = [[relevance(i, j) for j in neighbours(i, frames, radius)] for i in range(frames)]
    return torch.stack([g for of_i in pairs for g in of_i] if per_pair else [sum(of_i) for of_i in pairs])


def full_matching_loss(
    source: AttentionFeatures,
    target: AttentionFeatures,
    *,
    radius: int = 1,
    bidirectional: bool = True,
    per_pair: bool = False,
    rows: int | None = None,
    weight: Tensor | None = None,
    on_tile: Callable[[], object] = lambda: None,
) -> Tensor:
    """Negative cosine similarity of `full_str_score` of source and target, a scalar in [-1, 0]; see `matching_loss`.

    Tiles of the score, and the normalisers of the softmax, are formed again in the backward pass, so that memory is
    linear in tokens. Where weights leave nothing, the loss is 0 without a gradient.
    """
    frames, heads, tokens, _ = target.query.shape
    rows = rows or max(1, isqrt(TILE_ELEMENTS // (frames * heads)))
    given, own = (_Maps.of(f, rows, on_tile) for f in (source.detach(), target))
    weight = None if weight is None else weight.to(own.query)
    reach = min(radius or frames, frames - 1)
    distances = [d for d in range(-reach, reach + 1) if d]
    scores = [[d] for d in distances] if per_pair else [distances]
    sums = 0
    for p, q in product(blocks_of(tokens, rows), repeat=2):

        def of_tile(*tensors: Tensor, p=p, q=q) -> Tensor:
            on_tile()
            here = own.with_tensors(*tensors)
            total = 0
            for of_score in scores:
                a, b = (_score(maps, p, q, of_score, bidirectional, weight) for maps in (given, here))
                total = total + torch.stack([dot(a, b), dot(b, b), dot(a, a)])
            return total

        sums = sums + _formed_again(of_tile, own.query, own.key, own.lse)
    if sums[1] == 0 or sums[2] == 0:
        return sums[0].detach() * 0 + (0 * target.query).sum().to(sums)
    return -sums[0] / (sums[1] * sums[2]).sqrt().clamp_min(SMALLEST)


@dataclass(frozen=True)
class _Maps:
    """One clip's factors in the working precision: query, key (F, H, N, D), lse (F, H, N) of each query's logits."""

    query: Tensor
    key: Tensor
    lse: Tensor
    scale: float

    @classmethod
    def of(cls, features: AttentionFeatures, rows: int, on_tile: Callable[[], object] = lambda: None) -> "_Maps":
        work = torch.promote_types(features.query.dtype, torch.float32)
        query, key, scale = features.query.to(work), features.key.to(work), features.logit_scale
        extra = query.new_zeros(query.shape[1], 0, query.shape[3])
        extra = extra if features.extra_keys is None else features.extra_keys.to(work)

        def normaliser(query: Tensor, key: Tensor, extra: Tensor) -> Tensor:
            on_tile()
            seen = torch.cat([key.transpose(0, 1).flatten(1, 2), extra], 1)  # (H, F N + E, D)
            asking = query.transpose(0, 1).flatten(1, 2)  # (H, F P, D)
            found = torch.logsumexp(asking * scale @ seen.mT, -1)
            return found.unflatten(1, (len(query), -1)).transpose(0, 1)

        keys = query.shape[0] * query.shape[2] + extra.shape[1]
        together = max(1, rows * rows // keys)  # queries, so that their logits are as large as a tile
        parts = [_formed_again(normaliser, query[:, :, p], key, extra) for p in blocks_of(query.shape[2], together)]
        return cls(query, key, torch.cat(parts, 2), scale)

    def with_tensors(self, query: Tensor, key: Tensor, lse: Tensor) -> "_Maps":
        return _Maps(query, key, lse, self.scale)

    def tile(self, pair: tuple[int | slice, int | slice], p: slice, q: slice) -> Tensor:
        """A(i, p -> j, q) of frames i and j, one each or as many of each: (frames, H, P, Q)."""
        i, j = pair
        logits = self.query[i][..., p, :] * self.scale @ self.key[j][..., q, :].mT
        return (logits - self.lse[i][..., p, None]).exp()


def _score(
    maps: _Maps, p: slice, q: slice, distances: Iterable[int], bidirectional: bool, weight: Tensor | None
) -> Tensor:
    """Omega_i(p, q) over these distances j - i: (F, H, P, Q)."""
    frames, total = len(maps.query), 0
    for d in distances:
        near, far = pairs_at(frames, d)
        part = maps.tile((near, far), p, q)
        if bidirectional:
            part = part + maps.tile((far, near), q, p).mT
        if weight is not None:
            part = part * weight[far, None, None, q]
        total = total + pad(part, (0, 0, 0, 0, 0, 0, max(0, -d), max(0, d)))
    return total if weight is None else total * weight[:, None, p, None]


def _formed_again(function, *tensors: Tensor) -> Tensor:
    """function(*tensors), of which a backward pass keeps the arguments only."""
    if not torch.is_grad_enabled() or not any(t.requires_grad for t in tensors):
        return function(*tensors)
    return checkpoint(function, *tensors, use_reentrant=False, preserve_rng_state=False)


def _all_pairs(frames: int) -> list[tuple[int, int]]:
    return list(product(range(frames), repeat=2))
