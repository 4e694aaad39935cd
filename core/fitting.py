"""Sizes and frame counts that a video model takes, and clips brought to them. Image and mask move together."""

from dataclasses import dataclass
from itertools import product
from math import log
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from .frames import FramePattern

Mode = Literal["crop", "pad"]


@dataclass(frozen=True)
class Placement:
    """How a picture comes to `size`: scaled to `scaled`, then cut or given a border. All (width, height) in pixels."""

    size: tuple[int, int]
    scaled: tuple[int, int]

    @property
    def border(self) -> tuple[int, int, int, int]:
        """Pixels added at the left, right, top and bottom of the scaled picture; negative: cut there."""
        across, down = (whole - part for whole, part in zip(self.size, self.scaled, strict=True))
        return across // 2, across - across // 2, down // 2, down - down // 2


def fit_size(width: int, height: int, *, multiple: int, max_side: int, mode: Mode) -> Placement:
    """The size in multiples of `multiple`, at most `max_side`, that loses least of a clip of width x height pixels.

    A clip with a side above max_side is first scaled down to it; no other clip changes but by rounding. Then each side
    is rounded down or up, whichever pair has the aspect ratio nearest to the clip's: what crop cuts away, and what of
    the result pad leaves to the border, depends on the ratio alone. Among equal ratios the nearest area is taken.
    crop: the scaled picture covers the size; pad: all of it lies inside. Either enlarges as far as the rounding asks.
    Raises ValueError where max_side is smaller than one multiple.
    """
    limit = max_side // multiple * multiple
    if limit < multiple:
        raise ValueError(
            f"max_side: it is {max_side}, but the sides must be multiples of {multiple}; expected at least {multiple}"
        )
    shrink = min(1.0, limit / max(width, height))
    sides = ({_rounded(shrink * side, multiple, limit, up) for up in (False, True)} for side in (width, height))

    def loss(size: tuple[int, int]) -> tuple[float, float]:
        across, down = log(size[0] / (shrink * width)), log(size[1] / (shrink * height))
        return round(abs(across - down), 9), abs(across + down)

    size = min(product(*map(sorted, sides)), key=loss)
    return _placement(width, height, size, mode)


def _rounded(side: float, multiple: int, limit: int, up: bool) -> int:
    count = int(round(side, 6) // multiple)  # rounded: 0.3 x 1920 is no multiple by 1e-13
    exact = count * multiple == round(side, 6)
    return min(limit, max(multiple, (count + (up and not exact)) * multiple))


def _placement(width: int, height: int, size: tuple[int, int], mode: Mode) -> Placement:
    outermost = max if mode == "crop" else min
    scale = outermost(size[0] / width, size[1] / height)
    scaled = (max(1, outermost(whole, round(scale * side))) for whole, side in zip(size, (width, height), strict=True))
    return Placement(size, tuple(scaled))


def fit_frames(frames: int, *, maximum: int, pattern: FramePattern) -> int:
    """The longest clip of at least 2 frames that a VAE keeps whole, of at most `frames` and `maximum`.

    Raises ValueError naming max_frames, or images, where there is none.
    """
    step, shortest = pattern.step, pattern.shortest
    least = shortest + step * max(0, -((shortest - 2) // step))
    for name, count in (("max_frames", maximum), ("images", frames)):
        if count < least:
            raise ValueError(f"{name}: {count} frames to use; expected at least {least}, the model's shortest clip")
    most = min(frames, maximum)
    return most - (most - shortest) % step


def place_images(images: Tensor, placement: Placement) -> Tensor:
    """(F, H, W, C) in [0, 1] -> (F, height, width, C); bicubic with antialiasing, border by repeating the edge.

    A picture that needs no scaling keeps its values bit by bit.
    """
    frames = (_place(frame.movedim(-1, 0), placement, "bicubic", "replicate") for frame in images)
    return torch.stack([frame.movedim(0, -1) for frame in frames])


def place_mask(mask: Tensor, placement: Placement) -> Tensor:
    """(F, H, W) in [0, 1] of any size -> (F, height, width), aligned with the images; the border is 0.

    Bilinear with antialiasing: every pixel of the mask keeps its share, so a thin part grows fainter but never ends.
    """
    return torch.stack([_place(frame[None], placement, "bilinear", "constant")[0] for frame in mask])


def _place(picture: Tensor, placement: Placement, kernel: str, border: str) -> Tensor:
    """(C, H, W) -> (C, height, width)."""
    width, height = placement.scaled
    picture = picture[None]
    if picture.shape[-2:] != (height, width):
        scaled = interpolate(picture.float(), (height, width), mode=kernel, antialias=True).clamp(0, 1)
        picture = scaled.to(picture.dtype)
    return pad(picture, placement.border, mode=border)[0]
