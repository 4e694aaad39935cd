"""From a region of one frame to all frames: relevance by the attention that a model computes within frames.

The STR score of `relevance` reaches the neighbouring frames only, and its temporal maps stay at one place. Here the
queries of one frame meet the keys of another, as if the spatial self-attention saw both (the cross-frame attention of
Tune-A-Video, arXiv 2212.11565, without its training). It follows appearance: two objects that look alike both answer.
Shape letters: F frames, H heads, N tokens a frame, D head dimension, (h, w) token grid.
"""

import torch
from torch import Tensor
from torch.nn.functional import interpolate


def cross_frame_relevance(
    query: Tensor, key: Tensor, weight: Tensor, frame: int, *, scale: float | None = None, rows: int = 128
) -> Tensor:
    """How relevant every token q of every frame j is to a region of frame i, as a multiple of uniform attention.

    R(j, q) = N / 2 sum_p w(p) [S_ij(p, q) + S_ji(q, p)], mean over heads, with S_ij(p, q) = softmax over q of
    scale query_i(p) . key_j(q): what the region looks at, and what looks at the region. query, key: (F, H, N, D);
    weight: (N,), the region's w >= 0, which sum to 1; frame: i, from 0; scale: 1/sqrt(D) if None. Returns (F, N).
    No map of N x N is held: (H, rows, N) at a time. Softmax in float32 (float64 for float64 input).
    """
    frames, heads, tokens, width = query.shape
    work = torch.promote_types(query.dtype, torch.float32)
    scale = width**-0.5 if scale is None else scale
    weight = weight.to(query.device, work)
    region = weight.nonzero()[:, 0]
    ours, theirs = query[frame].to(work) * scale, key[frame].to(work)
    relevance = torch.zeros(frames, tokens, dtype=work, device=query.device)
    for j in range(frames):
        keys = key[j].to(work)
        for block in region.split(rows):
            relevance[j] += (weight[block] @ torch.softmax(ours[:, block] @ keys.mT, -1)).sum(0)
        for start in range(0, tokens, rows):
            block = slice(start, start + rows)
            looks = torch.softmax(query[j, :, block].to(work) * scale @ theirs.mT, -1)
            relevance[j, block] += (looks @ weight).sum(0)
    return relevance * (tokens / (2 * heads))


def region_weight(region: Tensor, height: int, width: int) -> Tensor:
    """A region (H, W) in [0, 1], not empty, as weights of the tokens of a grid: (height * width,), with sum 1."""
    share = interpolate(region[None, None].float(), (height, width), mode="area").flatten()
    return share / share.sum()


def point_region(x: int, y: int, height: int, width: int) -> Tensor:
    """The region (height, width) of one pixel; ValueError for a point outside."""
    if not (0 <= x < width and 0 <= y < height):
        raise ValueError(
            f"x, y: the point ({x}, {y}) lies outside the clip of {width} x {height} pixels; expected x from 0 to "
            f"{width - 1} and y from 0 to {height - 1}"
        )
    region = torch.zeros(height, width)
    region[y, x] = 1
    return region


def relevant_region(relevance: Tensor, threshold: float) -> Tensor:
    """Mask (F, H, W) of 0 and 1: where relevance (F, H, W) reaches `threshold` of the maximum over the whole clip."""
    return (relevance >= threshold * relevance.max()).float()
