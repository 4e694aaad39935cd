"""Regions from what people have: a batch of masks, a coloured layout video."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d

from .regions import Region

BITS = 4  # of a channel within which two colours are the same one
SMALLEST = 5e-4  # of the clip's pixels
RIM = 0.2  # span of a channel over a pixel and its neighbours, above which it is a rim
MIXED = 0.2  # share of two colours' areas below which one between them is their rim
SAME = 0.2  # distance of two colours in RGB below which they are one


def regions_of_masks(masks: Tensor, phrases: Sequence[str]) -> list[Region]:
    """masks (K F, H, W), those of one region after those of another -> one Region a phrase.

    Raises ValueError where the number of masks is no multiple of the number of phrases.
    """
    masks = masks.reshape(-1, *masks.shape[-2:])
    if len(masks) % len(phrases):
        raise ValueError(
            f"masks: there are {len(masks)} for {len(phrases)} lines of phrases; expected the same number of masks "
            f"for each line, one or one a frame"
        )
    return [Region(p.strip(), m) for p, m in zip(phrases, masks.chunk(len(phrases)), strict=True)]


def regions_of_colours(video: Tensor, phrases: Sequence[str]) -> list[Region]:
    """video (F, H, W, 3) in [0, 1] of flat colours -> one Region a phrase, the colour of the largest area first.

    Black is no region. Every pixel counts to the nearest of the colours that lie flat in at least 1 in 2000 pixels, so
    soft rims and compression do no harm. Raises ValueError where there are not as many colours as phrases.
    """
    pixels = video[..., :3].float().clamp(0, 1)
    colours = _flat_colours(pixels)
    if len(colours) - 1 != len(phrases):
        found = ", ".join("#" + bytes((c * 255).round().byte().tolist()).hex() for c in colours[1:]) or "none"
        raise ValueError(
            f"colours: the video has {len(colours) - 1} colours besides black ({found}), there are {len(phrases)} "
            f"lines of phrases; expected one line a colour"
        )
    nearest = torch.cdist(pixels.flatten(0, 2), colours).argmin(1).view(pixels.shape[:3])
    masks = torch.stack([(nearest == i).float() for i in range(1, len(colours))])
    order = masks.flatten(1).sum(1).argsort(descending=True, stable=True).tolist()
    return [Region(phrase.strip(), masks[i]) for phrase, i in zip(phrases, order, strict=True)]


def _flat_colours(pixels: Tensor) -> Tensor:
    """(colours, 3): black, then what covers enough, the most frequent first."""
    channels_first = pixels.movedim(-1, 1)
    span = max_pool2d(channels_first, 3, 1, 1) + max_pool2d(-channels_first, 3, 1, 1)
    flat = pixels[span.amax(1) < RIM]
    levels = (flat * (2**BITS - 1)).round().long()
    codes = (levels * torch.tensor([2 ** (2 * BITS), 2**BITS, 1])).sum(1)
    kinds, which, counts = codes.unique(return_inverse=True, return_counts=True)
    sums = torch.zeros(len(kinds), 3).index_add_(0, which, flat)
    kept, areas = [torch.zeros(3)], [len(codes)]
    for i in counts.argsort(descending=True).tolist():
        colour, area = sums[i] / counts[i], int(counts[i])
        is_new = area >= SMALLEST * pixels[..., 0].numel() and all(float((colour - c).norm()) > SAME for c in kept)
        if is_new and not _is_mixture(colour, area, kept, areas):
            kept.append(colour)
            areas.append(area)
    return torch.stack(kept)


def _is_mixture(colour: Tensor, area: int, kept: Sequence[Tensor], areas: Sequence[int]) -> bool:
    """Whether a colour lies between two others of far larger areas, as on a soft rim."""
    for (a, area_a), (b, area_b) in combinations(zip(kept, areas, strict=True), 2):
        along = ((colour - a) @ (b - a) / (b - a).square().sum()).clamp(0, 1)
        if float((a + along * (b - a) - colour).norm()) < SAME / 2 and area < MIXED * min(area_a, area_b):
            return True
    return False
