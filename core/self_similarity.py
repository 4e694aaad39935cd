"""Self-similarity of attention keys, which holds structure and motion while a clip is optimised (DreamMotion,
arXiv 2403.12002, section 3.3), without tokens x tokens maps.

With rows of unit length, D = T - S and P = T + S of target T and source S, the difference of the two similarity maps is
T T' - S S' = (D P' + P D') / 2, a product of thin factors. Its square is formed from channels x channels tensors, or
from blocks of rows where there are fewer tokens than channels. Either way a small difference of the keys is not lost
among the large terms of T T' and S S', and source = target gives exactly 0.

Shape letters: F frames, N tokens a frame, C channels (heads side by side).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .float64 import dot, in_float64

CHANNEL_SHARE = 1.5
"""Tokens over channels above which channels x channels tensors are the cheaper form."""
TILE_ELEMENTS = 2**22
"""Of the part of the difference of two maps that exists at once."""


def spatial_self_similarity_loss(source: Tensor, target: Tensor, *, paper_sum: bool = False) -> Tensor:
    """How far the spatial self-similarity of the target's keys is from the source's: a scalar >= 0, 0 where equal.

    source, target: keys (F, N, C), any float dtype. SS[n] = cos(K[n, i], K[n, j]) for all tokens i, j of frame n; the
    loss is the mean over frames of |SS_target - SS_source|^2, divided by N^2 (mean over pairs of tokens), or, with
    paper_sum, as the paper writes it. Differentiable in target; source is constant. Sums in float32 or better, float64
    for float64 keys. Memory grows with N. Raises ValueError where the shapes differ.
    """
    if source.shape != target.shape or source.ndim != 3:
        raise ValueError(
            f"keys: source {tuple(source.shape)} and target {tuple(target.shape)}; expected one shape (F, N, C)"
        )
    wide = torch.promote_types(source.dtype, torch.float32)
    total = _SquaredDifference.apply(_unit(target.to(wide)), _unit(source.detach().to(wide)))
    frames, tokens, _ = source.shape
    return total / frames if paper_sum else total / (frames * tokens**2)


def temporal_self_similarity_loss(source: Tensor, target: Tensor, *, paper_sum: bool = False) -> Tensor:
    """The same of whole frames: TS = cos(M[n], M[m]) with M[n] the mean key of frame n, over all pairs of frames.

    source, target: keys (F, N, C). |TS_target - TS_source|^2, divided by F^2 unless paper_sum.
    """
    wide = torch.promote_types(source.dtype, torch.float32)
    pooled = (keys.to(wide).mean(-2)[None] for keys in (source, target))
    return spatial_self_similarity_loss(*pooled, paper_sum=paper_sum)


def _unit(keys: Tensor) -> Tensor:
    """Rows of length 1; rows of zeros stay."""
    return normalize(keys, dim=-1, eps=torch.finfo(keys.dtype).tiny ** 0.5)


class _SquaredDifference(torch.autograd.Function):
    """Sum over frames of |T T' - S S'|^2 for unit rows T, S (F, N, C); the gradient, 4 (T T' - S S') T, comes along."""

    @staticmethod
    def forward(ctx, target: Tensor, source: Tensor) -> Tensor:
        form = _by_channels if target.shape[1] > CHANNEL_SHARE * target.shape[2] else _by_rows
        values, gradient = [], []
        for t, s in zip(target, source, strict=True):
            of_frame, slope = form(t, s, ctx.needs_input_grad[0])
            values.append(of_frame)
            gradient.append(slope)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(torch.stack(gradient))
        return torch.stack(values).sum().to(target)

    @staticmethod
    def backward(ctx, outer: Tensor):
        (gradient,) = ctx.saved_tensors
        return outer * gradient, None


def _by_channels(target: Tensor, source: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """(N, C) each; channels x channels tensors: |(D P' + P D') / 2|^2 = (<D'D, P'P> + <P'D, D'P>) / 2."""
    difference, both = target - source, target + source
    cross = both.mT @ difference
    value = (in_float64(difference.mT @ difference) * in_float64(both.mT @ both)).sum()
    value = ((value + (in_float64(cross) * in_float64(cross.mT)).sum()) / 2).clamp(min=0)
    if not with_gradient:
        return value, None
    return value, 2 * (difference @ (both.mT @ target) + both @ (difference.mT @ target))


def _by_rows(target: Tensor, source: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """(N, C) each; some rows of (D P' + P D') / 2 at a time."""
    difference, both = target - source, target + source
    values, slopes = [], []
    for rows in torch.arange(len(target), device=target.device).split(max(1, TILE_ELEMENTS // len(target))):
        apart = (difference[rows] @ both.mT + both[rows] @ difference.mT) / 2
        values.append(dot(apart, apart))
        if with_gradient:
            slopes.append(4 * apart @ target)
    return torch.stack(values).sum(), torch.cat(slopes) if with_gradient else None
