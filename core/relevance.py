"""Spatio-temporal relevance (STR) between frames, and the loss that matches it (STR-Match, arXiv 2506.22868).

A spatial self-attention map S_i(p, q) says how much token p of frame i looks at token q of the same frame; a
temporal map tau_ij(p) says how much token p of frame i looks at itself in frame j. Their products along a path
p -> q -> next frame relate any token to any token of a neighbouring frame without a 3-D attention map.

The paper's equations 2 to 4 were not available in full; the form below is this project's reading. Shape letters:
F frames, H heads, N tokens a frame, D head dimension, P a block of query tokens.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations_with_replacement, product
from math import isqrt
from typing import Literal

import torch
from torch import Tensor

from .attention_features import AttentionFeatures, blocks_of, dot, neighbours
from .full_relevance import full_matching_loss

Paths = Literal["spatial-temporal", "temporal-spatial", "both", "concat"]


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
    This is the reference: it holds N x N maps; `matching_loss` does not.
    """
    if paths == "concat":
        return torch.cat([spatial.flatten(), temporal.flatten()])
    frames = spatial.shape[0]
    back = spatial.transpose(-1, -2)
    tau = temporal.permute(2, 3, 1, 0)  # (F, F, H, N): tau[i, j, h, p]

    def relevance(i: int, j: int) -> Tensor:
        terms = []
        if paths != "temporal-spatial":
            terms += [spatial[i] * tau[i, j, :, None, :], back[j] * tau[j, i, :, :, None]]
        if paths != "spatial-temporal":
            terms += [tau[i, j, :, :, None] * spatial[j], tau[j, i, :, None, :] * back[i]]
        return sum(terms if bidirectional else terms[::2])

    pairs = [[relevance(i, j) for j in neighbours(i, frames, radius)] for i in range(frames)]
    return torch.stack([g for of_i in pairs for g in of_i] if per_pair else [sum(of_i) for of_i in pairs])


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

    The cosine runs over all entries of `str_score` with the same options. `weight` (F, N) in [0, 1] multiplies each
    term of the score by w_i(p) w_j(q); where it leaves nothing, the loss is 0 without a gradient. Gradients flow into
    the target only. Of features without a temporal map the score is that of `full_relevance.full_str_score`, which has
    no paths. Scores are formed in tiles of `rows` x `rows` tokens (None: of about 8 MB) and formed again in the
    backward pass: saved are query, key, their log-sum-exp and the temporal map; the peak is about ten
    (F, H, rows, rows) tiles. Softmax and sums of a row in float32 (float64 for float64 input), of all rows in float64.
    on_tile is called before each tile, in the backward pass too: what it raises stops the computation.
    """
    if len(target.query) < 2:
        raise ValueError("target attention is of one frame, which has no neighbours to score; expected 2 or more")
    if source.query.shape[:3] != target.query.shape[:3]:
        raise ValueError(
            f"source and target attention differ in size: {tuple(source.query.shape)} and "
            f"{tuple(target.query.shape)} (frames, heads, tokens, ...); expected the same clip size in both"
        )
    if target.temporal is None:
        form = {"radius": radius, "bidirectional": bidirectional, "per_pair": per_pair}
        return full_matching_loss(source, target, rows=rows, weight=weight, on_tile=on_tile, **form)
    frames, heads, tokens, _ = target.query.shape
    rows = rows or max(1, isqrt(TILE_ELEMENTS // (frames * heads)))
    reach = min(radius or frames, frames - 1)
    plan = _Plan(reach, paths, bidirectional, per_pair, rows, source.logit_scale, target.logit_scale, on_tile)
    given = source.detach()
    return _CosineLoss.apply(
        target.query, target.key, target.temporal, given.query, given.key, given.temporal, weight, plan
    )


TILE_ELEMENTS = 2**21


@dataclass(frozen=True)
class _Plan:
    reach: int
    paths: Paths
    bidirectional: bool
    per_pair: bool
    rows: int
    source_scale: float
    target_scale: float
    on_tile: Callable[[], object]

    @property
    def distances(self) -> list[int]:
        return [d for d in range(-self.reach, self.reach + 1) if d]

    @property
    def sums_over(self) -> list[list[int]]:
        """The distances over which one score sums: all of them, or each by itself."""
        return [[d] for d in self.distances] if self.per_pair and self.paths != "concat" else [self.distances]

    @property
    def looks_back(self) -> bool:
        """Whether a score holds S(q, p) besides S(p, q)."""
        return self.bidirectional and self.paths != "concat"


@dataclass(frozen=True)
class _Maps:
    """One clip's factors in the working precision: query and key (F,H,N,D), lse (F,H,N), tau (F,F,H,N)."""

    query: Tensor
    key: Tensor
    lse: Tensor
    tau: Tensor
    scale: float

    def tile(self, p: slice, q: slice) -> Tensor:
        """S_i(p, q): (F, H, P, Q)."""
        return (self.query[:, :, p] * self.scale @ self.key[:, :, q].mT).sub_(self.lse[:, :, p, None]).exp_()


def _prepare(query: Tensor, key: Tensor, temporal: Tensor, scale: float, plan: _Plan) -> _Maps:
    work = torch.promote_types(query.dtype, torch.float32)
    query, key = query.to(work), key.to(work)
    lse = torch.empty(query.shape[:-1], dtype=work, device=query.device)
    blocks = blocks_of(query.shape[2], plan.rows)
    for p in blocks:
        plan.on_tile()
        parts = [torch.logsumexp(query[:, :, p] * scale @ key[:, :, q].mT, -1) for q in blocks]
        lse[:, :, p] = torch.logsumexp(torch.stack(parts), 0)
    return _Maps(query, key, lse, temporal.to(work).permute(2, 3, 1, 0).contiguous(), scale)


Pair = tuple[slice, slice]


def _pairs_of_blocks(blocks: list[slice]) -> list[list[Pair]]:
    """The tiles (p, q) of a map, each with its mirror image (q, p): a score needs S at both."""
    tiles = combinations_with_replacement(blocks, 2)
    return [[(p, q)] if p == q else [(p, q), (q, p)] for p, q in tiles]


@dataclass(frozen=True)
class _Term:
    """One product in g: a spatial map times a temporal one at distance `sign` d, in frame i or in frame j = i + d.

    A map in frame i meets the temporal map of its column q, one in frame j that of its row p.
    """

    of_source: bool  # S(p, q) rather than S(q, p)
    sign: int
    in_own_frame: bool


def _terms(plan: _Plan) -> list[_Term]:
    terms = []
    if plan.paths != "temporal-spatial":
        terms += [_Term(True, 1, True), _Term(False, -1, False)]
    if plan.paths != "spatial-temporal":
        terms += [_Term(True, 1, False), _Term(False, -1, True)]
    return [term for term in terms if term.of_source or plan.bidirectional]


@dataclass(frozen=True)
class _Tile:
    """S_i(p, q) and S_i(q, p), both as (F, H, P, Q), and tau, from which a tile of the score is made.

    Also what a tile gives them back: gradients of the same shapes. backward is None where the score does not need it.
    """

    forward: Tensor
    backward: Tensor | None
    tau: Tensor

    def map_of(self, term: _Term) -> Tensor:
        return self.forward if term.of_source else self.backward


def _score(tile: _Tile, place: Pair, distances: list[int], plan: _Plan, weight: Tensor | None) -> Tensor:
    """Omega_i(p, q) over these distances j - i: (F, H, P, Q)."""
    p, q = place
    if plan.paths == "concat":
        total = tile.forward.clone()
    else:
        total = torch.zeros_like(tile.forward)
        for term in _terms(plan):
            spatial = tile.map_of(term)
            if term.in_own_frame:
                links = _of_columns(_links(tile.tau, term, distances, q), weight, q)
                total.addcmul_(spatial, links.sum(1)[:, :, None])
            else:
                links = _between_frames(_links(tile.tau, term, distances, p))
                total += _of_frames(links @ _by_row(_seen(spatial, weight, q)))
    return total if weight is None else total.mul_(_around(weight, place, plan))


def _score_gradient(
    flow: Tensor, tile: _Tile, into: _Tile, place: Pair, distances: list[int], plan: _Plan, weight: Tensor | None
) -> None:
    """The adjoint of `_score`: adds to `into` what d loss / d Omega, `flow`, means for the tile's maps."""
    p, q = place
    flow = flow if weight is None else flow * _around(weight, place, plan)
    if plan.paths == "concat":
        into.forward.add_(flow)
        return
    for term in _terms(plan):
        spatial, gradient = tile.map_of(term), into.map_of(term)
        if term.in_own_frame:
            links = _of_columns(_links(tile.tau, term, distances, q), weight, q)
            gradient.addcmul_(flow, links.sum(1)[:, :, None])
            of_links = (flow * spatial).sum(2)[:, None].expand_as(links)
            _add_links(into.tau, _of_columns(of_links, weight, q), term, distances, q)
        else:
            links, flow_by_row = _between_frames(_links(tile.tau, term, distances, p)), _by_row(flow)
            gradient += _seen(_of_frames(links.mT @ flow_by_row), weight, q)
            of_links = flow_by_row @ _by_row(_seen(spatial, weight, q)).mT
            _add_links(into.tau, of_links.permute(2, 3, 0, 1), term, distances, p)


def _links(tau: Tensor, term: _Term, distances: list[int], places: slice) -> Tensor:
    """tau_ij of a term, or tau_ji, at these places and distances j - i, 0 at others: (F_i, F_j, H, P)."""
    part = tau[..., places]
    return (part if term.sign > 0 else part.transpose(0, 1)) * _band(tau, distances)


def _add_links(tau: Tensor, of_links: Tensor, term: _Term, distances: list[int], places: slice) -> None:
    """The adjoint of `_links`."""
    part = of_links * _band(tau, distances)
    tau[..., places] += part if term.sign > 0 else part.transpose(0, 1)


def _band(tau: Tensor, distances: list[int]) -> Tensor:
    """Whether frames i and j are at one of these distances: (F, F, 1, 1)."""
    apart = torch.arange(len(tau), device=tau.device)
    apart = apart[None, :] - apart[:, None]
    return torch.isin(apart, torch.tensor(distances, device=tau.device))[:, :, None, None]


def _between_frames(links: Tensor) -> Tensor:
    """(F_i, F_j, H, P) as a matrix a row and head: (H, P, F_i, F_j)."""
    return links.permute(2, 3, 0, 1).contiguous()


def _by_row(maps: Tensor) -> Tensor:
    """(F, H, P, Q) -> (H, P, F, Q)."""
    return maps.permute(1, 2, 0, 3)


def _of_frames(rows: Tensor) -> Tensor:
    """(H, P, F, Q) -> (F, H, P, Q)."""
    return rows.permute(2, 0, 1, 3)


def _seen(spatial: Tensor, weight: Tensor | None, q: slice) -> Tensor:
    """A map (F_j, H, P, Q) of frames j times w_j(q)."""
    return spatial if weight is None else spatial * weight[:, None, None, q]


def _of_columns(links: Tensor, weight: Tensor | None, q: slice) -> Tensor:
    """Links (F_i, F_j, H, Q) times w_j(q)."""
    return links if weight is None else links * weight[None, :, None, q]


def _around(weight: Tensor, place: Pair, plan: _Plan) -> Tensor:
    """The factors of a tile that do not depend on j: w_i(p), and for concat w_i(q) too."""
    p, q = place
    own = weight[:, None, p, None]
    return own * weight[:, None, None, q] if plan.paths == "concat" else own


class _CosineLoss(torch.autograd.Function):
    """-<Os, Ot> / (|Os| |Ot|) accumulated over blocks; the backward forms every block again."""

    @staticmethod
    def forward(ctx, query, key, temporal, source_query, source_key, source_temporal, weight, plan):
        target = _prepare(query, key, temporal, plan.target_scale, plan)
        source = _prepare(source_query, source_key, source_temporal, plan.source_scale, plan)
        if weight is not None:
            weight = weight.to(target.query)
        sums = _Sums()
        for places in _pairs_of_blocks(blocks_of(query.shape[2], plan.rows)):
            plan.on_tile()
            for omega_s, omega_t in zip(*(_scores_of(m, places, plan, weight) for m in (source, target)), strict=True):
                sums.add(omega_s, omega_t)
        if plan.paths == "concat":
            sums.add(_weighted_tau(source.tau, weight), _weighted_tau(target.tau, weight))
        ctx.save_for_backward(target.query, target.key, target.lse, target.tau)
        ctx.source, ctx.plan, ctx.weight, ctx.sums = source, plan, weight, sums
        ctx.dtypes = query.dtype, key.dtype, temporal.dtype
        return -sums.cosine

    @staticmethod
    def backward(ctx, grad):
        plan, sums = ctx.plan, ctx.sums
        target = _Maps(*ctx.saved_tensors, plan.target_scale)
        to_dot, to_square = (g.to(target.query) for g in sums.gradient(-grad))
        total = _Gradients(*(torch.zeros_like(t) for t in ctx.saved_tensors))
        for places in _pairs_of_blocks(blocks_of(target.query.shape[2], plan.rows)):
            plan.on_tile()
            _add_gradient(total, ctx.source, target, places, plan, ctx.weight, to_dot, to_square)
        if plan.paths == "concat":
            given, own = (_weighted_tau(t, ctx.weight) for t in (ctx.source.tau, target.tau))
            total.tau.add_(_weighted_tau(_mix(given, own.clone(), to_dot, to_square), ctx.weight))
        _add_normaliser_gradient(total, target, plan)
        query, key, temporal = ctx.dtypes
        return total.query.to(query), total.key.to(key), total.tau.permute(3, 2, 0, 1).to(temporal), *(None,) * 5


class _Sums:
    """<Os, Ot>, |Ot|^2 and |Os|^2 in float64, and the cosine that they make."""

    def __init__(self):
        self.dot = self.square_target = self.square_source = 0.0

    def add(self, source: Tensor, target: Tensor) -> None:
        self.dot = self.dot + dot(source, target)
        self.square_target = self.square_target + dot(target, target)
        self.square_source = self.square_source + dot(source, source)

    @property
    def _norm(self) -> Tensor:
        return (self.square_target * self.square_source).sqrt().clamp_min(SMALLEST)

    @property
    def cosine(self) -> Tensor:
        return self.dot / self._norm

    def gradient(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Factors of Os and Ot in d cosine / d Ot, times `grad`; 0 where a score is all zero."""
        if self.square_target == 0 or self.square_source == 0:
            return torch.zeros_like(grad), torch.zeros_like(grad)
        return grad / self._norm, -grad * self.dot / (self._norm * self.square_target)


SMALLEST = torch.finfo(torch.float64).tiny


def _scores_of(maps: _Maps, places: list[Pair], plan: _Plan, weight: Tensor | None) -> Iterator[Tensor]:
    tiles = _tiles([maps.tile(*place) for place in places], maps.tau, plan)
    for tile, place in zip(tiles, places, strict=True):
        for distances in plan.sums_over:
            yield _score(tile, place, distances, plan, weight)


def _tiles(spatial: list[Tensor], tau: Tensor, plan: _Plan) -> list[_Tile]:
    """A tile and its mirror image, or the one that is its own: each needs the other's map, transposed."""
    mirrored = [m.mT.contiguous() if plan.looks_back else None for m in reversed(spatial)]
    return [_Tile(forward, backward, tau) for forward, backward in zip(spatial, mirrored, strict=True)]


def _weighted_tau(tau: Tensor, weight: Tensor | None) -> Tensor:
    """tau_ij(p) w_i(p) w_j(p): (F, F, H, N)."""
    return tau if weight is None else tau * (weight[:, None] * weight[None, :])[:, :, None, :]


def _mix(source: Tensor, target: Tensor, to_dot: Tensor, to_square: Tensor) -> Tensor:
    """to_square target + to_dot source, in the memory of `target`."""
    return target.mul_(to_square).addcmul_(source, to_dot)


@dataclass(frozen=True)
class _Gradients:
    """d loss / d of a target's query, key, lse and tau."""

    query: Tensor
    key: Tensor
    lse: Tensor
    tau: Tensor

    def add_logits(self, flow: Tensor, maps: _Maps, p: slice, q: slice) -> None:
        """Carries d loss / d logits of S(p, q), (F, H, P, Q), into query and key."""
        flow.mul_(maps.scale)
        self.query[:, :, p] += flow @ maps.key[:, :, q]
        self.key[:, :, q] += flow.mT @ maps.query[:, :, p]


def _add_gradient(total: _Gradients, source, target, places, plan, weight, to_dot, to_square):
    """Adds what a tile of the score and its mirror image contribute to d loss / d (query, key, lse, tau)."""
    tiles = _tiles([target.tile(*place) for place in places], target.tau, plan)
    flows = [torch.zeros_like(tile.forward) for tile in tiles]
    given = _scores_of(source, places, plan, weight)
    for tile, flow, mirrored, place in zip(tiles, flows, reversed(flows), places, strict=True):
        into = _Tile(flow, torch.zeros_like(flow) if plan.looks_back else None, total.tau)
        for distances in plan.sums_over:
            score = _score(tile, place, distances, plan, weight)
            _score_gradient(_mix(next(given), score, to_dot, to_square), tile, into, place, distances, plan, weight)
        if into.backward is not None:
            mirrored.add_(into.backward.mT)
    for tile, flow, place in zip(tiles, flows, places, strict=True):
        flow.mul_(tile.forward)
        total.lse[:, :, place[0]] -= flow.sum(-1)
        total.add_logits(flow, target, *place)


def _add_normaliser_gradient(total: _Gradients, target: _Maps, plan: _Plan):
    """Carries the gradient of each row's log-sum-exp into query and key: d lse / d logits is the softmax."""
    blocks = blocks_of(target.query.shape[2], plan.rows)
    for p, q in product(blocks, blocks):
        plan.on_tile()
        total.add_logits(target.tile(p, q).mul_(total.lse[:, :, p, None]), target, p, q)
