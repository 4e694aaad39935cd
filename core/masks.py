"""Masks on the latent grid. 1 = edit, 0 = keep, everywhere."""

import torch
from torch import Tensor
from torch.nn.functional import adaptive_max_pool2d, interpolate, max_pool2d

from .frames import FrameMap


def as_frames(mask: Tensor, frames: int, name: str = "mask") -> Tensor:
    """(H, W), (1, H, W) or (F, H, W) -> (F, H, W) for `frames` frames; anything else is an error."""
    mask = mask.reshape(-1, *mask.shape[-2:])
    if mask.shape[0] not in (1, frames):
        raise ValueError(
            f"{name}: it has {mask.shape[0]} frames, the clip has {frames}; connect one mask for the whole "
            f"clip or exactly one a frame"
        )
    return mask.expand(frames, -1, -1)


def dilate(mask: Tensor, radius: int | tuple[int, int]) -> Tensor:
    """Grow a mask (F, H, W) by `radius` of its own pixels up, down, left and right; a pair: (vertical, horizontal)."""
    tall, wide = (radius, radius) if isinstance(radius, int) else radius
    grown = max_pool2d(mask[:, None], (2 * tall + 1, 1), stride=1, padding=(tall, 0))
    return max_pool2d(grown, (1, 2 * wide + 1), stride=1, padding=(0, wide))[:, 0]


def to_latent_grid(mask: Tensor, height: int, width: int) -> Tensor:
    """Resample (F, H, W) in [0, 1] to (F, height, width): the maximum under each cell, so thin parts survive."""
    pooled = adaptive_max_pool2d(mask[:, None], (min(height, mask.shape[-2]), min(width, mask.shape[-1])))
    return interpolate(pooled, (height, width), mode="nearest-exact")[:, 0]


def latent_mask(
    mask: Tensor, time: FrameMap, height: int, width: int, *, dilation: float = 0.0, cell: int = 8
) -> Tensor:
    """A mask of any size on the latent grid: (latent frames, height, width) in [0, 1].

    mask: (H, W) for all frames, or (F, H, W) for the clip's or the latent's. dilation: growth in source pixels; cell:
    source pixels a latent cell. The growth happens at the mask's own resolution, before pooling, so the result covers
    every pixel of the grown mask.
    """
    mask = time.in_latents(mask.float().clamp(0, 1).reshape(-1, *mask.shape[-2:]), "maximum")
    tall, wide = (round(dilation * m / (n * cell)) for m, n in zip(mask.shape[-2:], (height, width), strict=True))
    return to_latent_grid(dilate(mask, (tall, wide)), height, width)


def redraw_inside(latent: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
    """`latent` with the cells inside `mask` replaced by cells drawn at random from outside it, at the same noise level.

    latent: (..., F, h, w); mask: (F, h, w), inside where it is above 0. A cell is drawn for all frames at once, from
    where no frame is masked, so what the noise holds of motion over time stays whole. Without such a place the latent
    comes back as it is.
    """
    inside = mask > 0
    outside = (~inside.any(0)).flatten().nonzero()[:, 0]
    if len(outside) == 0:
        return latent
    drawn = torch.randint(len(outside), inside.shape[1:], generator=generator).to(outside.device)
    return torch.where(inside.to(latent.device), latent.flatten(-2)[..., outside[drawn].to(latent.device)], latent)


def blend(source: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Target where mask is 1, source where it is 0 (both bit-exact), linear between. mask broadcasts."""
    return torch.lerp(source, target, mask.to(target))
