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

Paths = Literal["spatial-temporal", "temporal-spatial", "both"]


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
) -> Tensor:
    """The dense STR score: Omega_i(p, q) = sum over neighbours j of g(I_i(p), I_j(q)).

    With paths "spatial-temporal", g = S_i(p,q) tau_ij(q), plus S_j(q,p) tau_ji(p) if bidirectional (eq. 2 as read
    here); "temporal-spatial" goes tau_ij(p) S_j(p,q) and back tau_ji(q) S_i(q,p); "both" adds the two.
    spatial: (F, H, N, N), temporal: (N, H, F, F), both softmaxed over the last dimension; radius in frames (0: all).
    Returns (F, H, N, N). This is the reference: it holds N x N maps; `matching_loss` does not.
    """
    frames = spatial.shape[0]
    back = spatial.transpose(-1, -2)
    tau = temporal.permute(2, 3, 1, 0)  # (F, F, H, N): tau[i, j, h, p]
    score = torch.zeros_like(spatial)
    for i in range(frames):
        for j in neighbours(i, frames, radius):
            if paths != "temporal-spatial":
                score[i] += spatial[i] * tau[i, j, :, None, :]
                if bidirectional:
                    score[i] += back[j] * tau[j, i, :, :, None]
            if paths != "spatial-temporal":
                score[i] += tau[i, j, :, :, None] * spatial[j]
                if bidirectional:
                    score[i] += tau[j, i, :, None, :] * back[i]
    return score


def matching_loss(
    source: AttentionFeatures,
    target: AttentionFeatures,
    *,
    radius: int = 1,
    paths: Paths = "spatial-temporal",
    bidirectional: bool = True,
    rows: int = 128,
    weight: Tensor | None = None,
) -> Tensor:
    """Negative cosine similarity of the STR scores of source and target (loss of eq. 5), a scalar in [-1, 0].

    The cosine runs over all (i, h, p, q) of the layer. `weight` (F, N) in [0, 1] multiplies each term of the score
    by w_i(p) w_j(q). Gradients flow into the target only. Scores are formed `rows` query tokens at a time and
    formed again in the backward pass: saved are query, key, their log-sum-exp and the temporal map; the peak is a
    few (H, rows, N) blocks for each frame within the radius. Softmax in float32 (float64 for float64 input), sums in
    float64.
    """
    if source.query.shape[:3] != target.query.shape[:3]:
        raise ValueError(
            f"source and target attention differ in size: {tuple(source.query.shape)} and "
            f"{tuple(target.query.shape)} (frames, heads, tokens, ...); expected the same clip size in both"
        )
    plan = _Plan(radius, paths, bidirectional, rows, source.logit_scale, target.logit_scale)
    given = source.detach()
    return _CosineLoss.apply(
        target.query, target.key, target.temporal, given.query, given.key, given.temporal, weight, plan
    )


@dataclass(frozen=True)
class _Plan:
    radius: int
    paths: Paths
    bidirectional: bool
    rows: int
    source_scale: float
    target_scale: float


@dataclass(frozen=True)
class _Maps:
    """One clip's factors in the working precision: query (F,H,N,D) scaled, key, lse (F,H,N), tau (F,F,H,N)."""

    query: Tensor
    key: Tensor
    lse: Tensor
    tau: Tensor

    def leaves(self) -> "_Maps":
        return _Maps(*(t.detach().requires_grad_() for t in (self.query, self.key, self.lse, self.tau)))

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.query, self.key, self.lse, self.tau


def _prepare(query: Tensor, key: Tensor, temporal: Tensor, scale: float, rows: int) -> _Maps:
    work = torch.promote_types(query.dtype, torch.float32)
    query, key = query.to(work) * scale, key.to(work)
    lse = torch.empty(query.shape[:-1], dtype=work, device=query.device)
    for i in range(query.shape[0]):
        for block in _blocks(query.shape[2], rows):
            lse[i, :, block] = torch.logsumexp(query[i, :, block] @ key[i].mT, -1)
    return _Maps(query, key, lse, temporal.to(work).permute(2, 3, 1, 0).contiguous())


def _blocks(tokens: int, rows: int) -> list[slice]:
    return [slice(start, min(start + rows, tokens)) for start in range(0, tokens, rows)]


def _relevance_rows(maps: _Maps, i: int, block: slice, plan: _Plan, weight: Tensor | None) -> Tensor:
    """Rows p of Omega_i: (H, P, N). Differentiable in every tensor of `maps`."""

    def spatial(j: int) -> Tensor:  # S_j(p, q)
        return torch.exp(maps.query[j, :, block] @ maps.key[j].mT - maps.lse[j, :, block, None])

    def reverse(j: int) -> Tensor:  # S_j(q, p) as (H, P, N)
        return torch.exp(maps.key[j, :, block] @ maps.query[j].mT - maps.lse[j, :, None, :])

    frames = maps.query.shape[0]
    near = neighbours(i, frames, plan.radius)
    seen = [1.0 if weight is None else weight[j] for j in near]  # w_j(q): (N,)
    parts = []
    if plan.paths != "temporal-spatial":
        arriving = sum(maps.tau[i, j] * w for j, w in zip(near, seen, strict=True))  # (H, N)
        parts.append(spatial(i) * arriving[:, None, :])
        if plan.bidirectional:
            parts += [reverse(j) * maps.tau[j, i, :, block, None] * w for j, w in zip(near, seen, strict=True)]
    if plan.paths != "spatial-temporal":
        parts += [maps.tau[i, j, :, block, None] * spatial(j) * w for j, w in zip(near, seen, strict=True)]
        if plan.bidirectional:
            leaving = sum(maps.tau[j, i] * w for j, w in zip(near, seen, strict=True))
            parts.append(leaving[:, None, :] * reverse(i))
    score = sum(parts)
    return score if weight is None else score * weight[i, block, None]


class _CosineLoss(torch.autograd.Function):
    """-<Os, Ot> / (|Os| |Ot|) accumulated over blocks; the backward forms every block again."""

    @staticmethod
    def forward(ctx, query, key, temporal, source_query, source_key, source_temporal, weight, plan):
        target = _prepare(query, key, temporal, plan.target_scale, plan.rows)
        source = _prepare(source_query, source_key, source_temporal, plan.source_scale, plan.rows)
        if weight is not None:
            weight = weight.to(target.query)
        dot = square_target = square_source = 0.0
        for i in range(query.shape[0]):
            for block in _blocks(query.shape[2], plan.rows):
                omega_s = _relevance_rows(source, i, block, plan, weight).flatten()
                omega_t = _relevance_rows(target, i, block, plan, weight).flatten()
                dot = dot + _dot(omega_s, omega_t)
                square_target = square_target + _dot(omega_t, omega_t)
                square_source = square_source + _dot(omega_s, omega_s)
        ctx.save_for_backward(*target.tensors(), *source.tensors())
        ctx.plan, ctx.weight, ctx.sums = plan, weight, (dot, square_target, square_source)
        ctx.dtypes = query.dtype, key.dtype, temporal.dtype
        return -dot / (square_target * square_source).sqrt().clamp_min(torch.finfo(torch.float64).tiny)

    @staticmethod
    def backward(ctx, grad):
        target, source = _Maps(*ctx.saved_tensors[:4]), _Maps(*ctx.saved_tensors[4:])
        dot, square_target, square_source = ctx.sums
        norm = (square_target * square_source).sqrt().clamp_min(torch.finfo(torch.float64).tiny)
        to_dot = (-grad / norm).to(target.query)
        to_square = (grad * dot / (norm * square_target)).to(target.query)
        total = _Maps(*(torch.zeros_like(t) for t in target.tensors()))
        for i in range(target.query.shape[0]):
            for block in _blocks(target.query.shape[2], ctx.plan.rows):
                _add_block_gradient(total, source, target, i, block, ctx.plan, ctx.weight, to_dot, to_square)
        _add_normaliser_gradient(total, target, ctx.plan)
        query, key, temporal = ctx.dtypes
        return (
            (total.query * ctx.plan.target_scale).to(query),
            total.key.to(key),
            total.tau.permute(3, 2, 0, 1).to(temporal),
            *(None,) * 5,
        )


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Sum in float64 where the device has it; Apple's has not, there one block is summed in float32."""
    if a.device.type == "mps":
        return torch.sum(a * b).cpu().double()
    return torch.sum(a * b, dtype=torch.float64)


def _add_block_gradient(total, source, target, i, block, plan, weight, to_dot, to_square):
    """Adds d loss / d (query, key, lse, tau) of the rows `block` of frame i to `total`."""
    omega_s = _relevance_rows(source, i, block, plan, weight)
    frames = [i, *neighbours(i, target.query.shape[0], plan.radius)]
    local = _Maps(target.query[frames], target.key[frames], target.lse[frames], target.tau[frames][:, frames]).leaves()
    near = replace(plan, radius=0)  # the gathered frames are exactly frame i and its neighbours
    seen = weight if weight is None else weight[frames]
    with torch.enable_grad():
        omega_t = _relevance_rows(local, 0, block, near, seen)
    gradient = to_dot * omega_s + to_square * omega_t.detach()
    parts = torch.autograd.grad(omega_t, local.tensors(), gradient, allow_unused=True)
    for whole, part in zip(total.tensors()[:3], parts[:3], strict=True):
        if part is not None:
            whole[frames] += part
    rows = torch.tensor(frames, device=target.query.device)
    total.tau[rows[:, None], rows[None, :]] += parts[3]


def _add_normaliser_gradient(total: _Maps, target: _Maps, plan: _Plan):
    """Carries the gradient of each row's log-sum-exp into query and key: d lse / d logits is the softmax."""
    for i in range(target.query.shape[0]):
        for block in _blocks(target.query.shape[2], plan.rows):
            query, key = target.query[i, :, block], target.key[i]
            flow = torch.exp(query @ key.mT - target.lse[i, :, block, None]) * total.lse[i, :, block, None]
            total.query[i, :, block] += flow @ key
            total.key[i] += flow.mT @ query
