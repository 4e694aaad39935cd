"""Figures of merit of a video edit, as functions of frames, embeddings, flow and tracks.

Frames are (F, H, W, 3) in [0, 1], masks (F or 1, H, W) with 1 = edited, flow (F - 1, 2, H, W) in pixels: what is at x
in frame i is at x + flow in frame i + 1. Functions go through a clip frame by frame: memory does not grow with its
length. Whether more is better is said of each. Not in here are the networks: embeddings (CLIP), perceptual distances
(LPIPS) and flow (RAFT) come from outside.
"""

from collections.abc import Callable, Iterator
from typing import Literal

import torch
from kornia.metrics import ssim
from torch import Tensor
from torch.nn.functional import cosine_similarity, grid_sample

SSIM_WINDOW = 11
STILL = 1e-3
"""Pixels a frame below which a track counts as standing still."""

Perceptual = Callable[[Tensor, Tensor], Tensor]
"""LPIPS of two batches (B, 3, H, W) in [-1, 1]: (B,)."""


def psnr_db(result: Tensor, reference: Tensor, mask: Tensor | None = None) -> float:
    """Peak signal-to-noise ratio in dB of frames in [0, 1], within `mask` (broadcastable, weights) if given.

    Equal frames give 100 dB. Raises ValueError if the mask selects nothing.
    """
    error = (result.double() - reference.double()).square()
    weight = torch.ones_like(error) if mask is None else mask.to(error).expand_as(error)
    if weight.sum() == 0:
        raise ValueError("mask: it selects no pixel, so there is nothing to measure; expected a non-empty mask")
    mean = (error * weight).sum() / weight.sum()
    return float(-10 * torch.log10(mean.clamp_min(1e-10)))


# --- by embeddings ------------------------------------------------------


def text_alignment(frames: Tensor, text: Tensor) -> float:
    """CLIP-T (also CS, CLIP score): mean cosine of the frames' embeddings (F, D) and the prompt's (D,). More is better.

    In [-1, 1]; the literature states it as it is, times 100, or times 2.5 with negative values cut (CLIPScore).
    """
    return float(cosine_similarity(frames.double(), text.double().reshape(1, -1)).mean())


def frame_consistency(frames: Tensor) -> float:
    """CLIP-F (also FC, Frame-Con): mean cosine of the embeddings (F, D) of consecutive frames. More is better.

    In [-1, 1]. Some take the mean over all pairs of frames instead. ValueError for one frame.
    """
    _at_least_two(len(frames))
    return float(cosine_similarity(frames[:-1].double(), frames[1:].double()).mean())


def q_edit(text: float, warp: float) -> float:
    """Q-edit (VideoGrain, arXiv 2502.17258): text alignment over warp error, both scaled by 100. More is better.

    0.3656 and 0.0142 give 25.75, as in the paper's table. ValueError for a warp error of 0.
    """
    if warp <= 0:
        raise ValueError(f"warp: it is {warp}; expected a number above 0 (frames that do not change have no Q-edit)")
    return text / warp


# --- by flow ------------------------------------------------------------


def warp_error(
    frames: Tensor, flow: Tensor, kind: Literal["l2", "l1"] = "l2", occlusion: Tensor | None = None
) -> float:
    """Warp-Err: how much each frame differs from the next one, warped back by the source's flow. Less is better.

    kind: mean square or mean absolute difference, of values in [0, 1]; the literature states it times 100 and does not
    say which. occlusion (F - 1, H, W): 1 where a pixel of frame i has no match in frame i + 1, which is left out, as is
    what moves out of the picture. ValueError for one frame, and where nothing is left.
    """
    total, count = warp_sums(frames, flow, kind, occlusion)
    if count == 0:
        raise ValueError("flow: it leads every pixel out of the picture or behind another; there is nothing to compare")
    return total / count


def warp_sums(
    frames: Tensor, flow: Tensor, kind: Literal["l2", "l1"] = "l2", occlusion: Tensor | None = None
) -> tuple[float, float]:
    """What `warp_error` is the quotient of: the sum of the differences, and how many values were compared.

    For a clip that is gone through pair by pair; a hard cut, behind which nothing is found again, counts for nothing.
    """
    _at_least_two(len(frames))
    _same_size("flow", flow.shape[-2:], "frames", frames.shape[1:3])
    total = count = 0.0
    for i in range(len(frames) - 1):
        warped, inside = _warped(frames[i + 1], flow[i])
        seen = inside if occlusion is None else inside * (1 - occlusion[i].to(inside))
        difference = (frames[i].to(warped) - warped) * seen[..., None]
        total += float((difference.square() if kind == "l2" else difference.abs()).sum(dtype=torch.float64))
        count += float(seen.sum(dtype=torch.float64)) * frames.shape[-1]
    return total, count


def motion_error(source: Tensor, edit: Tensor) -> float:
    """ME: mean end-point error in pixels between the flow of the source and that of the edit. Less is better."""
    _same_size("edit", tuple(edit.shape), "source", tuple(source.shape))
    per_frame = [(a.double() - b.double()).norm(dim=0).mean() for a, b in zip(source, edit, strict=True)]
    return float(torch.stack(per_frame).mean())


def _warped(frame: Tensor, flow: Tensor) -> tuple[Tensor, Tensor]:
    """frame (H, W, C) at x + flow (2, H, W), bilinear, and where that is inside the picture (H, W)."""
    height, width = frame.shape[:2]
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    x, y = columns.to(flow) + flow[0], rows.to(flow) + flow[1]
    inside = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
    grid = torch.stack([2 * x / max(width - 1, 1) - 1, 2 * y / max(height - 1, 1) - 1], -1)
    sampled = grid_sample(frame.to(flow).movedim(-1, 0)[None], grid[None], align_corners=True, padding_mode="border")
    return sampled[0].movedim(0, -1), inside.to(flow)


# --- outside the edit ---------------------------------------------------


def background_psnr(source: Tensor, edit: Tensor, mask: Tensor) -> float:
    """PSNR in dB of what lies outside the mask. More is better; 100 where nothing changed."""
    error = count = 0.0
    for a, b, weight in _pairs(source, edit, mask):
        error += float(((a - b).square() * weight[..., None]).sum(dtype=torch.float64))
        count += float(weight.sum(dtype=torch.float64)) * a.shape[-1]
    _something_left(count)
    return float(-10 * torch.log10(torch.tensor(max(error / count, 1e-10), dtype=torch.float64)))


def background_ssim(source: Tensor, edit: Tensor, mask: Tensor) -> float:
    """SSIM of what lies outside the mask: its map (Gaussian window of 11 pixels, sigma 1.5) averaged there.

    In [-1, 1], more is better. Windows at the mask's edge reach into it.
    """
    total = count = 0.0
    for a, b, weight in _pairs(source, edit, mask):
        images = (x.movedim(-1, 0)[None] for x in (a, b))
        similarity = ssim(*images, SSIM_WINDOW, max_val=1.0)[0].mean(0)
        total += float((similarity * weight).sum(dtype=torch.float64))
        count += float(weight.sum(dtype=torch.float64))
    _something_left(count)
    return total / count


def background_lpips(source: Tensor, edit: Tensor, mask: Tensor, lpips: Perceptual) -> float:
    """BL: LPIPS of the clips with what lies inside the mask painted black in both, mean over frames. Less is better."""
    black = [(a * w[..., None], b * w[..., None]) for a, b, w in _pairs(source, edit, mask)]
    return sum(_perceptual(a, b, lpips) for a, b in black) / len(black)


def frame_lpips(source: Tensor, edit: Tensor, lpips: Perceptual) -> float:
    """Frame-LPIPS (DreamMotion, arXiv 2403.12002): LPIPS of each frame to the source's, mean. Less is better."""
    return sum(_perceptual(a, b, lpips) for a, b, _ in _pairs(source, edit, None)) / len(source)


def _perceptual(a: Tensor, b: Tensor, lpips: Perceptual) -> float:
    first, second = (x.movedim(-1, 0)[None].float() * 2 - 1 for x in (a, b))
    return float(lpips(first, second))


def _pairs(source: Tensor, edit: Tensor, mask: Tensor | None) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Frame by frame: source, edit, and the weight of what lies outside the mask, in float32."""
    _same_size("edit", tuple(edit.shape), "source", tuple(source.shape))
    if mask is not None:
        _same_size("mask", mask.shape[-2:], "source", source.shape[1:3])
        if len(mask) not in (1, len(source)):
            raise ValueError(f"mask: it has {len(mask)} frames, the clip {len(source)}; expected 1 or as many")
    for i in range(len(source)):
        outside = torch.ones(source.shape[1:3]) if mask is None else 1 - mask[min(i, len(mask) - 1)].float().clamp(0, 1)
        yield source[i].float(), edit[i].float(), outside.to(source.device)


# --- by tracks ----------------------------------------------------------


def motion_fidelity(source: Tensor, edit: Tensor) -> float:
    """Motion fidelity (DMT, arXiv 2311.17009): how well the tracks of each clip find a track alike in the other.

    source (N, F, 2), edit (M, F, 2): points in pixels. Two tracks compare by the cosine of their steps, mean over time,
    and each takes its best partner; the mean is taken over both clips (the paper's form; its code goes one way). In
    [-1, 1], more is better. Two steps that both stand still are alike (1); of one that does, nothing is known (0).
    ValueError without tracks, for other numbers of frames and for one frame.
    """
    if not len(source) or not len(edit):
        raise ValueError("tracks: one of the clips has none; expected at least one point in each")
    _same_size("edit", edit.shape[1:], "source", source.shape[1:])
    _at_least_two(source.shape[1])
    total = torch.zeros(len(source), len(edit), dtype=torch.float64)
    for f in range(source.shape[1] - 1):
        steps = [tracks[:, f + 1].double() - tracks[:, f].double() for tracks in (source, edit)]
        lengths = [step.norm(dim=-1, keepdim=True) for step in steps]
        a, b = (step / length.clamp_min(STILL) for step, length in zip(steps, lengths, strict=True))
        still, also_still = (length[:, 0] <= STILL for length in lengths)
        alike = torch.where(still[:, None] & also_still, 1.0, a @ b.T)
        total += torch.where(still[:, None] == also_still, alike, 0.0)
    total /= source.shape[1] - 1
    return float((total.amax(1).mean() + total.amax(0).mean()) / 2)


# --- over time ----------------------------------------------------------


def flicker(frames: Tensor) -> float:
    """Mean absolute second difference over time: what changes back and forth. Less is better; 0 for steady change.

    In [0, 2]. ValueError for fewer than three frames.
    """
    if len(frames) < 3:
        raise ValueError(f"frames: there are {len(frames)}; flicker needs at least 3")
    total = 0.0
    for before, here, after in zip(frames, frames[1:], frames[2:], strict=False):
        total += float((after.float() - 2 * here.float() + before.float()).abs().mean(dtype=torch.float64))
    return total / (len(frames) - 2)


def seam(frames: Tensor, boundaries: list[int]) -> float:
    """How much more frames change where two windows meet than elsewhere: 1 is no seam, more is worse.

    boundaries: numbers of the frames that begin a window. ValueError for boundaries outside the clip, and where there
    is no other frame, or none that changes, to compare with.
    """
    _at_least_two(len(frames))
    if not boundaries or any(not 0 < b < len(frames) for b in boundaries):
        raise ValueError(f"boundaries: {boundaries}; expected frames from 1 to {len(frames) - 1}")
    changes = [
        float((b.float() - a.float()).abs().mean(dtype=torch.float64)) for a, b in zip(frames, frames[1:], strict=False)
    ]
    at = [changes[b - 1] for b in set(boundaries)]
    elsewhere = [change for i, change in enumerate(changes, 1) if i not in set(boundaries)]
    if not elsewhere or not sum(elsewhere):
        raise ValueError("frames: nothing changes but at the boundaries, so there is nothing to compare with")
    return (sum(at) / len(at)) / (sum(elsewhere) / len(elsewhere))


# --- what is asked of inputs --------------------------------------------


def _at_least_two(frames: int) -> None:
    if frames < 2:
        raise ValueError(f"frames: there is {frames}; expected a clip of at least 2")


def _same_size(name: str, size: tuple, other: str, expected: tuple) -> None:
    if tuple(size) != tuple(expected):
        raise ValueError(f"{name}: its size is {tuple(size)}, that of {other} {tuple(expected)}; expected the same")


def _something_left(count: float) -> None:
    if count == 0:
        raise ValueError("mask: it covers the whole clip, so there is no background to measure")
