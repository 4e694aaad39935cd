"""Spatio-temporal relevance (STR) between frames, and the loss that matches it (STR-Match, arXiv 2506.22868).

Where frames attend to themselves, a spatial map S_i(p, q) says how much token p of frame i looks at token q of the same
frame, and a temporal map tau_ij(p) how much token p of frame i looks at itself in frame j. Their products along a path
p -> q -> next frame relate any token to any token of another frame without a 3-D attention map. Where attention spans
space and time at once, its own A(i, p -> j, q) does so.

The paper's equations 2 to 4 were not available in full; the form below is this project's reading. Shape letters:
F frames, H heads, N tokens a frame, D head dimension, E further keys, P and Q blocks of tokens.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations_with_replacement
from math import isqrt
from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .float64 import dot
from .tile_operations import HALF, SumOverFrames, frames_at, scores, working

Paths = Literal["spatial-temporal", "temporal-spatial", "both", "concat"]

TILE_ELEMENTS = {"cpu": 2**21}  # of a tile of the score: about a cache
LARGE_TILE = 2**25  # on other devices, where a call costs more than its memory


@dataclass(frozen=True)
class AttentionFeatures:
    """What one layer contributes: the cheap factors of its maps, never the maps.

    query, key: (F, H, N, D) of self-attention. temporal: (N, H, F, F), softmaxed over its last dimension, of a layer
    whose frames see themselves only; None: each token sees those of all frames, and extra_keys (H, E, D), which belong
    to no frame (the prompt's, say). scale: factor of the logits, 1/sqrt(D) if None.
    """

    query: Tensor
    key: Tensor
    temporal: Tensor | None = None
    scale: float | None = None
    extra_keys: Tensor | None = None

    def __post_init__(self):
        frames, heads, tokens, _ = self.query.shape
        fits = self.key.shape == self.query.shape
        fits &= self.temporal is None or self.temporal.shape == (tokens, heads, frames, frames)
        if not fits:
            temporal = "none" if self.temporal is None else tuple(self.temporal.shape)
            raise ValueError(
                f"attention features do not fit together: query {tuple(self.query.shape)}, key "
                f"{tuple(self.key.shape)}, temporal {temporal}; expected query and key of one "
                f"shape (F, H, N, D) and temporal (N, H, F, F)"
            )

    @property
    def logit_scale(self) -> float:
        return self.query.shape[-1] ** -0.5 if self.scale is None else self.scale

    @property
    def _given(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors that are not None."""
        return list(self._given.values())

    def map(self, function: Callable[[Tensor], Tensor]) -> "AttentionFeatures":
        """The same with `function` of each tensor."""
        return replace(self, **{name: function(tensor) for name, tensor in self._given.items()})

    def detach(self) -> "AttentionFeatures":
        return self.map(Tensor.detach)


# --- the score, dense: the reference ----------------------------------


def neighbours(frame: int, frames: int, radius: int) -> list[int]:
    """Frames at most `radius` away from `frame`, without itself. radius 0: all other frames."""
    near = range(frames) if radius == 0 else range(max(0, frame - radius), min(frames, frame + radius + 1))
    return [j for j in near if j != frame]


def str_score(
    spatial: Tensor,
    temporal: Tensor,
    *,
    radius: int = 1,
    paths: Paths = "spatial-temporal",
    bidirectional: bool = True,
    per_pair: bool = False,
) -> Tensor:
    """The dense STR score: Omega_i(p, q) = sum over neighbours j of g(I_i(p), I_j(q)).

    With paths "spatial-temporal", g = S_i(p,q) tau_ij(q), plus S_j(q,p) tau_ji(p) if bidirectional (eq. 2 as read
    here); "temporal-spatial" goes tau_ij(p) S_j(p,q) and back tau_ji(q) S_i(q,p); "both" adds the two. "concat" is the
    baseline of the paper's ablation, no score at all: the two maps side by side; the other options do not touch it.
    spatial: (F, H, N, N), temporal: (N, H, F, F), both softmaxed over the last dimension; radius in frames (0: all).
    Returns (F, H, N, N); per_pair: no sum over j, (pairs, H, N, N) in the order (i, j); "concat": (elements of both,).
    It holds N x N maps; `matching_loss` does not.
    """
    if paths == "concat":
        return torch.cat([spatial.flatten(), temporal.flatten()])
    back = spatial.transpose(-1, -2)
    tau = temporal.permute(2, 3, 1, 0)  # (F, F, H, N): tau[i, j, h, p]

    def relevance(i: int, j: int) -> Tensor:
        terms = []
        if paths != "temporal-spatial":
            terms += [spatial[i] * tau[i, j, :, None, :], back[j] * tau[j, i, :, :, None]]
        if paths != "spatial-temporal":
            terms += [tau[i, j, :, :, None] * spatial[j], tau[j, i, :, None, :] * back[i]]
        return sum(terms if bidirectional else terms[::2])

    return _over_neighbours(relevance, len(spatial), radius, per_pair)


def full_str_score(
    features: AttentionFeatures, *, radius: int = 1, bidirectional: bool = True, per_pair: bool = False
) -> Tensor:
    """The dense score of attention that spans space and time: A(i, p -> j, q), plus A(j, q -> i, p) if bidirectional.

    Shapes and options as in `str_score`; it holds a map of all tokens.
    """
    frames, heads, tokens, _ = features.query.shape
    query, key = (t.transpose(0, 1).flatten(1, 2) for t in (features.query, features.key))
    keys = key if features.extra_keys is None else torch.cat([key, features.extra_keys], 1)
    attention = (query * features.logit_scale @ keys.mT).softmax(-1)[..., : frames * tokens]
    of = attention.unflatten(1, (frames, tokens)).unflatten(3, (frames, tokens)).permute(1, 3, 0, 2, 4)

    def relevance(i: int, j: int) -> Tensor:
        return of[i, j] + of[j, i].mT if bidirectional else of[i, j]

    return _over_neighbours(relevance, frames, radius, per_pair)


def _over_neighbours(relevance: Callable[[int, int], Tensor], frames: int, radius: int, per_pair: bool) -> Tensor:
    pairs = [[relevance(i, j) for j in neighbours(i, frames, radius)] for i in range(frames)]
    return torch.stack([g for of_i in pairs for g in of_i] if per_pair else [sum(of_i) for of_i in pairs])


# --- the loss, in tiles -------------------------------------------------


def matching_loss(
    source: AttentionFeatures,
    target: AttentionFeatures,
    *,
    radius: int = 1,
    paths: Paths = "spatial-temporal",
    bidirectional: bool = True,
    per_pair: bool = False,
    rows: int | None = None,
    weight: Tensor | None = None,
    on_tile: Callable[[], object] = lambda: None,
) -> Tensor:
    """Negative cosine similarity of the STR scores of source and target (loss of eq. 5), a scalar in [-1, 0].

    The cosine runs over all entries of `str_score` with the same options, or of `full_str_score`, which has no paths,
    where the features have no temporal map. `weight` (F, N) in [0, 1] multiplies each term of the score by w_i(p)
    w_j(q); where it leaves nothing, loss and gradient are 0. Gradients flow into the target only. Scores are formed in
    tiles of `rows` x `rows` tokens (None: `tile_rows`); several tiles are formed again in the backward pass, so that
    memory is linear in tokens. Softmax and sums of a row in float32 (float64 for float64 input), of all rows in
    float64. on_tile is called before each tile, in the backward pass too: what it raises stops the computation.
    """
    if len(target.query) < 2:
        raise ValueError("target attention is of one frame, which has no neighbours to score; expected 2 or more")
    if source.query.shape[:3] != target.query.shape[:3]:
        raise ValueError(
            f"source and target attention differ in size: {tuple(source.query.shape)} and "
            f"{tuple(target.query.shape)} (frames, heads, tokens, ...); expected the same clip size in both"
        )
    frames, _, tokens, _ = target.query.shape
    form = _Form(min(radius or frames, frames - 1), paths, bidirectional, per_pair)
    tiles = _Tiles(frames, tokens, rows or tile_rows(target), on_tile)
    maps = _JointMaps if target.temporal is None else _SeparateMaps
    theirs, ours = (maps.of(features, tiles) for features in (source.detach(), target))
    weight = None if weight is None else weight.to(ours.query)

    def of_tile(places: list[Pair], *tensors: Tensor) -> Tensor:
        on_tile()
        scores = (clip.scores(places, form, weight) for clip in (theirs, ours.with_tensors(*tensors)))
        return sum(_products(a, b) for a, b in zip(*scores, strict=True))

    sums = sum(tiles.formed(partial(of_tile, places), *ours.tensors) for places in tiles.pairs)
    if paths == "concat":
        sums = sums + _products(theirs.weighted_tau(weight), ours.weighted_tau(weight))
    norms = sums[1] * sums[2]
    return -sums[0] / torch.where(norms > 0, norms, 1.0).sqrt()


def tile_rows(features: AttentionFeatures, smaller: int = 1) -> int:
    """Tokens along a tile of the score; smaller: how many times fewer elements than usual it has."""
    frames, heads = features.query.shape[:2]
    return max(1, isqrt(tile_elements(features.query.device.type) // (smaller * frames * heads)))


def tile_elements(device_type: str) -> int:
    return TILE_ELEMENTS.get(device_type, LARGE_TILE)


def _products(a: Tensor, b: Tensor) -> Tensor:
    """<a, b>, |b|^2 and |a|^2 in float64."""
    return torch.stack([dot(a, b), dot(b, b), dot(a, a)])


Pair = tuple[slice, slice]


@dataclass(frozen=True)
class _Form:
    """The options of a score. reach: frames, at least 1."""

    reach: int
    paths: Paths
    bidirectional: bool
    per_pair: bool

    @property
    def sums_over(self) -> list[list[int]]:
        """The distances j - i over which one score sums, in their order: all of them, or each by itself."""
        distances = [d for d in range(-self.reach, self.reach + 1) if d]
        return [[d] for d in distances] if self.per_pair and self.paths != "concat" else [distances]


@dataclass(frozen=True)
class _Tiles:
    """How maps of F x N tokens are cut, and the host's hook before each tile."""

    frames: int
    tokens: int
    rows: int
    on_tile: Callable[[], object]

    @property
    def is_one(self) -> bool:
        return self.rows >= self.tokens

    @property
    def pairs(self) -> list[list[Pair]]:
        """The tiles (p, q) of a map, each with its mirror image (q, p): a score needs maps at both."""
        pairs = combinations_with_replacement(_blocks(self.tokens, self.rows), 2)
        return [[(p, q)] if p == q else [(p, q), (q, p)] for p, q in pairs]

    def formed(self, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        """function(*tensors), of which a backward pass keeps the tensors only where there are several tiles."""
        if self.is_one or not torch.is_grad_enabled() or not any(t.requires_grad for t in tensors):
            return function(*tensors)
        return checkpoint(function, *tensors, use_reentrant=False, preserve_rng_state=False)

    def log_sums(self, query: Tensor, key: Tensor, scale: float, exact: bool) -> Tensor:
        """Log-sum-exp (B, H, N) of the logits of each query, query (B, H, N, D), key (B, H, M, D)."""

        def of_rows(query: Tensor, key: Tensor) -> Tensor:
            self.on_tile()
            return torch.logsumexp(scores(query, key, scale, exact), -1)

        at_once = max(1, self.frames * self.rows**2 // (len(key) * key.shape[2]))  # logits as large as a tile
        return torch.cat([self.formed(of_rows, query[:, :, p], key) for p in _blocks(query.shape[2], at_once)], 2)


def _blocks(tokens: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]


@dataclass(frozen=True)
class _SeparateMaps:
    """One clip's factors in the working precision, of frames that attend to themselves, and a temporal map.

    query and key (F, H, N, D), tau (F, F, H, N), lse (F, H, N) of each query's logits; None: a tile holds whole rows.
    exact: see `tile_operations.scores`.
    """

    query: Tensor
    key: Tensor
    tau: Tensor
    lse: Tensor | None
    scale: float
    exact: bool

    @classmethod
    def of(cls, features: AttentionFeatures, tiles: _Tiles) -> "_SeparateMaps":
        query, key, scale = working(features.query), working(features.key), features.logit_scale
        exact = features.query.dtype in HALF
        lse = None if tiles.is_one else tiles.log_sums(query, key, scale, exact)
        return cls(query, key, working(features.temporal).permute(2, 3, 1, 0), lse, scale, exact)

    @property
    def tensors(self) -> list[Tensor]:
        return [t for t in (self.query, self.key, self.tau, self.lse) if t is not None]

    def with_tensors(self, query: Tensor, key: Tensor, tau: Tensor, lse: Tensor | None = None) -> "_SeparateMaps":
        return replace(self, query=query, key=key, tau=tau, lse=lse)

    def spatial(self, p: slice, q: slice) -> Tensor:
        """S_i(p, q): (F, H, P, Q)."""
        less = None if self.lse is None else self.lse[:, :, p]
        logits = scores(self.query[:, :, p], self.key[:, :, q], self.scale, self.exact, less)
        return logits.softmax(-1) if less is None else logits.exp_()

    def scores(self, places: list[Pair], form: _Form, weight: Tensor | None) -> Iterator[Tensor]:
        """Omega_i(p, q) at these places, a tile and its mirror image: each (F, H, P, Q)."""
        maps = [self.spatial(*place) for place in places]
        for own, mirrored, place in zip(maps, reversed(maps), places, strict=True):
            for distances in form.sums_over:
                yield self._score(own, mirrored.mT, place, distances, form, weight)

    def _score(
        self, ahead: Tensor, back: Tensor, place: Pair, distances: list[int], form: _Form, weight: Tensor | None
    ) -> Tensor:
        """From S_i(p, q) and S_i(q, p), both as (F, H, P, Q)."""
        p, q = place
        if form.paths == "concat":
            return ahead if weight is None else ahead * weight[:, None, None, q] * weight[:, None, p, None]
        total, back_and_forth = 0, ((ahead, 1), (back, -1)) if form.bidirectional else ((ahead, 1),)
        for spatial, sign in back_and_forth:
            in_own_frame, in_the_other = form.paths != "temporal-spatial", form.paths != "spatial-temporal"
            if sign < 0:
                in_own_frame, in_the_other = in_the_other, in_own_frame
            if in_own_frame:
                links = self._links(sign, distances, q)
                links = links if weight is None else links * weight[None, :, None, q]
                total = total + spatial * links.sum(1)[:, :, None]
            if in_the_other:
                links = self._links(sign, distances, p).permute(2, 3, 0, 1).contiguous()  # (H, P, F_i, F_j)
                seen = spatial if weight is None else spatial * weight[:, None, None, q]
                total = total + (links @ seen.permute(1, 2, 0, 3)).permute(2, 0, 1, 3)
        return total if weight is None else total * weight[:, None, p, None]

    def _links(self, sign: int, distances: list[int], places: slice) -> Tensor:
        """tau_ij, or tau_ji for sign -1, at these places and distances j - i, 0 at others: (F_i, F_j, H, P)."""
        part, frames = self.tau[..., places], torch.arange(len(self.tau), device=self.tau.device)
        apart = frames[None, :] - frames[:, None]
        near = (apart >= distances[0]) & (apart <= distances[-1]) & (apart != 0)
        return (part if sign > 0 else part.transpose(0, 1)) * near[:, :, None, None]

    def weighted_tau(self, weight: Tensor | None) -> Tensor:
        """tau_ij(p) w_i(p) w_j(p): (F, F, H, N)."""
        return self.tau if weight is None else self.tau * (weight[:, None] * weight[None, :])[:, :, None, :]


@dataclass(frozen=True)
class _JointMaps:
    """One clip's factors in the working precision, of attention over all frames: query, key (F, H, N, D), lse (F, H, N)
    of each query's logits. exact: see `tile_operations.scores`."""

    query: Tensor
    key: Tensor
    lse: Tensor
    scale: float
    exact: bool

    @classmethod
    def of(cls, features: AttentionFeatures, tiles: _Tiles) -> "_JointMaps":
        query, key, scale = working(features.query), working(features.key), features.logit_scale
        exact = features.query.dtype in HALF
        asking, seen = (t.transpose(0, 1).flatten(1, 2)[None] for t in (query, key))  # (1, H, F N, D)
        if features.extra_keys is not None:
            seen = torch.cat([seen, working(features.extra_keys)[None]], 2)
        lse = tiles.log_sums(asking, seen, scale, exact)[0].unflatten(1, (tiles.frames, tiles.tokens)).transpose(0, 1)
        return cls(query, key, lse, scale, exact)

    @property
    def tensors(self) -> list[Tensor]:
        return [self.query, self.key, self.lse]

    def with_tensors(self, query: Tensor, key: Tensor, lse: Tensor) -> "_JointMaps":
        return replace(self, query=query, key=key, lse=lse)

    def attention(self, i: slice, j: slice, p: slice, q: slice) -> Tensor:
        """A(i, p -> j, q) of as many frames i as j: (frames, H, P, Q)."""
        return scores(self.query[i, :, p], self.key[j, :, q], self.scale, self.exact, self.lse[i, :, p]).exp_()

    def scores(self, places: list[Pair], form: _Form, weight: Tensor | None) -> Iterator[Tensor]:
        """As `_SeparateMaps.scores`."""
        sums: dict[tuple[int, int], SumOverFrames] = {}
        for d, place, part in self._parts(places, form):
            key = place, d if form.per_pair else 0
            if key not in sums:
                sums[key] = SumOverFrames(len(self.query), *places[place], weight)
            sums[key].add(d, part)
        for key in sorted(sums):
            yield sums.pop(key).total

    def _parts(self, places: list[Pair], form: _Form) -> Iterator[tuple[int, int, Tensor]]:
        """(d, number of the place, what is a part of g(I_i(p), I_j(q)) of all pairs j = i + d)."""
        for d in range(1, form.reach + 1):
            near, far = frames_at(len(self.query), d)
            for place, (p, q) in enumerate(places):
                ahead, back = self.attention(near, far, p, q), self.attention(far, near, p, q)
                yield d, place, ahead
                yield -d, place, back
                if form.bidirectional:  # what j says of i, at the mirrored place
                    mirrored = len(places) - 1 - place
                    yield -d, mirrored, ahead.mT
                    yield d, mirrored, back.mT
