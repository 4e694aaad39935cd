"""Spatio-temporal relevance (STR) between frames, and the loss that matches it (STR-Match, arXiv 2506.22868).

A spatial self-attention map S_i(p, q) says how much token p of frame i looks at token q of the same frame; a
temporal map tau_ij(p) says how much token p of frame i looks at itself in frame j. Their products along a path
p -> q -> next frame relate any token to any token of a neighbouring frame without a 3-D attention map.

The paper's equations 2 to 4 were not available in full; the form below is this project's reading. Shape letters:
F frames, H heads, N tokens a frame, D head dimension, P a block of query tokens.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

Paths = Literal["spatial-temporal", "temporal-spatial", "both", "concat"]


@dataclass(frozen=True)
class AttentionFeatures:
    """What one layer contributes: the cheap factors of its maps, never the maps.

    query, key: (F, H, N, D) of the spatial self-attention. temporal: (N, H, F, F), softmaxed over its last
    dimension. scale: factor of the logits, 1/sqrt(D) if None.
    """

    query: Tensor
    key: Tensor
    temporal: Tensor
    scale: float | None = None

    def __post_init__(self):
        frames, heads, tokens, _ = self.query.shape
        if self.key.shape != self.query.shape or self.temporal.shape != (tokens, heads, frames, frames):
            raise ValueError(
                f"attention features do not fit together: query {tuple(self.query.shape)}, key "
                f"{tuple(self.key.shape)}, temporal {tuple(self.temporal.shape)}; expected query and key of one "
                f"shape (F, H, N, D) and temporal (N, H, F, F)"
            )

    @property
    def logit_scale(self) -> float:
        return self.query.shape[-1] ** -0.5 if self.scale is None else self.scale

    def detach(self) -> "AttentionFeatures":
        return replace(self, query=self.query.detach(), key=self.key.detach(), temporal=self.temporal.detach())


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
) -> Tensor:
    """Negative cosine similarity of the STR scores of source and target (loss of eq. 5), a scalar in [-1, 0].

    The cosine runs over all entries of `str_score` with the same options. `weight` (F, N) in [0, 1] multiplies each
    term of the score by w_i(p) w_j(q); where it leaves nothing, the loss is 0 without a gradient. Gradients flow into
    the target only. Scores are formed `rows` query tokens at a time (None: as many as make blocks of about 8 MB) and
    formed again in the backward pass: saved are query, key, their log-sum-exp and the temporal map; the peak is about
    ten (F, H, rows, N) blocks. Softmax in float32 (float64 for float64 input), sums in float64.
    """
    if source.query.shape[:3] != target.query.shape[:3]:
        raise ValueError(
            f"source and target attention differ in size: {tuple(source.query.shape)} and "
            f"{tuple(target.query.shape)} (frames, heads, tokens, ...); expected the same clip size in both"
        )
    frames, heads, tokens, _ = target.query.shape
    rows = rows or max(1, BLOCK_ELEMENTS // (frames * heads * tokens))
    reach = min(radius or frames, frames - 1)
    plan = _Plan(reach, paths, bidirectional, per_pair, rows, source.logit_scale, target.logit_scale)
    given = source.detach()
    return _CosineLoss.apply(
        target.query, target.key, target.temporal, given.query, given.key, given.temporal, weight, plan
    )


BLOCK_ELEMENTS = 2**21


@dataclass(frozen=True)
class _Plan:
    reach: int
    paths: Paths
    bidirectional: bool
    per_pair: bool
    rows: int
    source_scale: float
    target_scale: float

    @property
    def distances(self) -> list[int]:
        return [d for d in range(-self.reach, self.reach + 1) if d]

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

    def rows(self, block: slice) -> Tensor:
        """S_i(p, q) of the rows p in `block`: (F, H, P, N)."""
        return (self.query[:, :, block] * self.scale @ self.key.mT).sub_(self.lse[:, :, block, None]).exp_()

    def columns(self, block: slice) -> Tensor:
        """S_i(q, p) of the columns p in `block`, as (F, H, P, N)."""
        return (self.key[:, :, block] * self.scale @ self.query.mT).sub_(self.lse[:, :, None, :]).exp_()


def _prepare(query: Tensor, key: Tensor, temporal: Tensor, scale: float, rows: int) -> _Maps:
    work = torch.promote_types(query.dtype, torch.float32)
    query, key = query.to(work), key.to(work)
    lse = torch.empty(query.shape[:-1], dtype=work, device=query.device)
    for block in _blocks(query.shape[2], rows):
        lse[:, :, block] = torch.logsumexp(query[:, :, block] * scale @ key.mT, -1)
    return _Maps(query, key, lse, temporal.to(work).permute(2, 3, 1, 0).contiguous(), scale)


def _blocks(tokens: int, rows: int) -> list[slice]:
    return [slice(start, min(start + rows, tokens)) for start in range(0, tokens, rows)]


def _scores(forth: Tensor, back: Tensor | None, tau: Tensor, block: slice, plan: _Plan, weight: Tensor | None):
    """Yields the rows `block` of the score: (F, H, P, N), or for per_pair one (pairs, H, P, N) a distance d = j - i.

    forth, back: S_i(p, q) and S_i(q, p) as (F, H, P, N). Differentiable in them and in tau.
    """
    seen = None if weight is None else weight[:, None, None, :]
    own = None if weight is None else weight[:, None, block, None]
    if plan.paths == "concat":
        yield forth if weight is None else forth * seen * own
        return
    total = None
    for d in plan.distances:
        near, far = _pairs(len(forth), d)
        score = None
        if plan.paths != "temporal-spatial":
            score = _add(score, forth[near], _at_distance(tau, d)[:, :, None, :])
            if back is not None:
                score = _add(score, back[far], _at_distance(tau, -d)[:, :, block, None])
        if plan.paths != "spatial-temporal":
            score = _add(score, forth[far], _at_distance(tau, d)[:, :, block, None])
            if back is not None:
                score = _add(score, back[near], _at_distance(tau, -d)[:, :, None, :])
        if weight is not None:
            score = score * (seen[far] * own[near])
        if plan.per_pair:
            yield score
        else:
            total = forth.new_zeros(forth.shape) if total is None else total
            total[near] += score
    if not plan.per_pair:
        yield total


def _add(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    return a * b if total is None else torch.addcmul(total, a, b)


def _pairs(frames: int, d: int) -> tuple[slice, slice]:
    """The frames i that have a frame j = i + d, and those j."""
    return slice(max(0, -d), frames - max(0, d)), slice(max(0, d), frames + min(0, d))


def _at_distance(tau: Tensor, d: int) -> Tensor:
    """tau_ij of all pairs j = i + d, in the order of i: (pairs, H, N)."""
    return tau.diagonal(d).movedim(-1, 0)


class _CosineLoss(torch.autograd.Function):
    """-<Os, Ot> / (|Os| |Ot|) accumulated over blocks; the backward forms every block again."""

    @staticmethod
    def forward(ctx, query, key, temporal, source_query, source_key, source_temporal, weight, plan):
        target = _prepare(query, key, temporal, plan.target_scale, plan.rows)
        source = _prepare(source_query, source_key, source_temporal, plan.source_scale, plan.rows)
        if weight is not None:
            weight = weight.to(target.query)
        sums = _Sums()
        for block in _blocks(query.shape[2], plan.rows):
            for omega_s, omega_t in zip(*(_scores_of(m, block, plan, weight) for m in (source, target)), strict=True):
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
        for block in _blocks(target.query.shape[2], plan.rows):
            _add_block_gradient(total, ctx.source, target, block, plan, ctx.weight, to_dot, to_square)
        if plan.paths == "concat":
            taus = (_weighted_tau(t, ctx.weight) for t in (ctx.source.tau, target.tau))
            total.tau.add_(_weighted_tau(_mix(*taus, to_dot, to_square), ctx.weight))
        _add_normaliser_gradient(total, target, plan)
        query, key, temporal = ctx.dtypes
        return total.query.to(query), total.key.to(key), total.tau.permute(3, 2, 0, 1).to(temporal), *(None,) * 5


class _Sums:
    """<Os, Ot>, |Ot|^2 and |Os|^2 in float64, and the cosine that they make."""

    def __init__(self):
        self.dot = self.square_target = self.square_source = 0.0

    def add(self, source: Tensor, target: Tensor) -> None:
        self.dot = self.dot + _dot(source, target)
        self.square_target = self.square_target + _dot(target, target)
        self.square_source = self.square_source + _dot(source, source)

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


def _scores_of(maps: _Maps, block: slice, plan: _Plan, weight: Tensor | None):
    back = maps.columns(block) if plan.looks_back else None
    return _scores(maps.rows(block), back, maps.tau, block, plan, weight)


def _weighted_tau(tau: Tensor, weight: Tensor | None) -> Tensor:
    """tau_ij(p) w_i(p) w_j(p): (F, F, H, N)."""
    return tau if weight is None else tau * (weight[:, None] * weight[None, :])[:, :, None, :]


def _mix(source: Tensor, target: Tensor, to_dot: Tensor, to_square: Tensor) -> Tensor:
    return to_square * target.detach() + to_dot * source


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Sum in float64 where the device has it; Apple's has not, there one block is summed in float32."""
    if a.device.type == "mps":
        return torch.sum(a * b).cpu().double()
    return torch.sum(a * b, dtype=torch.float64)


@dataclass(frozen=True)
class _Gradients:
    """d loss / d of a target's query, key, lse and tau."""

    query: Tensor
    key: Tensor
    lse: Tensor
    tau: Tensor

    def add_rows(self, flow: Tensor, maps: _Maps, block: slice) -> None:
        """Carries d loss / d logits of S(p, q), p in `block`: (F, H, P, N), into query and key."""
        flow.mul_(maps.scale)
        self.query[:, :, block] += flow @ maps.key
        self.key.add_(flow.mT @ maps.query[:, :, block])

    def add_columns(self, flow: Tensor, maps: _Maps, block: slice) -> None:
        """The same of S(q, p), p in `block`, as (F, H, P, N)."""
        flow.mul_(maps.scale)
        self.key[:, :, block] += flow @ maps.query
        self.query.add_(flow.mT @ maps.key[:, :, block])


def _add_block_gradient(total: _Gradients, source, target, block, plan, weight, to_dot, to_square):
    """Adds what the rows `block` of the score contribute to d loss / d (query, key, lse, tau)."""
    forth, tau = target.rows(block).requires_grad_(), target.tau.detach().requires_grad_()
    back = target.columns(block).requires_grad_() if plan.looks_back else None
    leaves = [leaf for leaf in (forth, back, tau) if leaf is not None]
    sums = [torch.zeros_like(leaf) for leaf in leaves]
    with torch.enable_grad():
        omegas_t = _scores(forth, back, tau, block, plan, weight)
        for omega_s, omega_t in zip(_scores_of(source, block, plan, weight), omegas_t, strict=True):
            flow = _mix(omega_s, omega_t, to_dot, to_square)
            for whole, part in zip(sums, torch.autograd.grad(omega_t, leaves, flow, allow_unused=True), strict=True):
                if part is not None:
                    whole.add_(part)
    total.tau.add_(sums[-1])
    flow = sums[0].mul_(forth.detach())
    total.lse[:, :, block] -= flow.sum(-1)
    total.add_rows(flow, target, block)
    if back is not None:
        flow = sums[1].mul_(back.detach())
        total.lse.sub_(flow.sum(-2))
        total.add_columns(flow, target, block)


def _add_normaliser_gradient(total: _Gradients, target: _Maps, plan: _Plan):
    """Carries the gradient of each row's log-sum-exp into query and key: d lse / d logits is the softmax."""
    for block in _blocks(target.query.shape[2], plan.rows):
        total.add_rows(target.rows(block).mul_(total.lse[:, :, block, None]), target, block)
