"""Regions in colour over a clip."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage
from torch import Tensor
from torch.nn.functional import interpolate

from ..core.frames import FramePattern
from ..core.regions import MASKS, Region, partition, same_frames

PALETTE = "tab10"


def overlay(images: Tensor, regions: Sequence[Region], opacity: float) -> tuple[Tensor, Tensor, str]:
    """images (F, H, W, 3) -> the same under the colours of the regions, their union (F, H, W), and a legend.

    Raises ValueError where there are no regions, or their masks have another number of frames.
    """
    from matplotlib import colormaps

    if not regions:
        raise ValueError("regions: there are none; connect Region Prompt or Regions from Masks")
    palette = torch.tensor(colormaps[PALETTE].colors)
    time = FramePattern().of(len(images))
    masks = [time.in_clip(mask, MASKS) for mask in same_frames(regions)]
    shares = partition(torch.stack(masks))
    shares = interpolate(shares, images.shape[1:3], mode="bilinear", antialias=True).clamp(0, 1)  # (K + 1, F, H, W)
    colours = palette[torch.arange(len(regions)) % len(palette)]
    union = 1 - shares[-1]
    tinted = torch.einsum("kfhw,kc->fhwc", shares[:-1], colours)
    weight = opacity * union[..., None]
    shown = images[..., :3] * (1 - weight) + opacity * tinted
    covered = shares.flatten(1).mean(1)
    lines = [
        f"{number} #{bytes((colour * 255).round().byte().tolist()).hex()}: "
        f"{region.phrase or 'no words'} ({100 * float(share):.1f} % of the clip)"
        for number, (region, colour, share) in enumerate(zip(regions, colours, covered, strict=False), start=1)
    ]
    return shown.clamp(0, 1), union, "\n".join(lines)


def numbered(images: Tensor, regions: Sequence[Region]) -> Tensor:
    """images (F, H, W, 3) with the number of each region, from 1, at its innermost place in every frame."""
    height = max(8, round(images.shape[1] / 12))
    font = ImageFont.load_default(height)
    drawn = []
    for frame, image in enumerate(images):
        picture = Image.fromarray((image.clamp(0, 1) * 255).round().byte().cpu().numpy())
        pen = ImageDraw.Draw(picture)
        for number, region in enumerate(regions, start=1):
            inside = np.pad(region.mask[frame].numpy() > 0.5, 1)
            if inside.any():
                y, x = np.unravel_index(ndimage.distance_transform_edt(inside)[1:-1, 1:-1].argmax(), image.shape[:2])
                outline = dict(fill="white", stroke_width=max(1, height // 8), stroke_fill="black")
                pen.text((int(x), int(y)), str(number), font=font, anchor="mm", **outline)
        drawn.append(torch.from_numpy(np.array(picture)).float() / 255)
    return torch.stack(drawn)
