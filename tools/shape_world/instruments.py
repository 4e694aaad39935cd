"""Measure a clip of the shape world: what is in it, where it moves, and what an edit left alone.

The instruments know the world's colours and shapes, never the true masks of the clip they look at. Source
masks enter only as the reference of `trajectory_error_px` and as the border of `kept_region_psnr_db`.

Shape letters: F frames, K objects. Clips are (F, 3, 64, 64) in [0, 1]. Two objects are looked for in one
half of the image each (left, right), so an object that changes sides counts as wrong. Objects that cross are looked
for by `colours` instead: for each object the names that it may have, those before and after its edit, which are no
other object's.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.ndimage import label
from torch import Tensor
from torch.nn.functional import avg_pool2d

from ...core.masks import dilate
from ...core.metrics import psnr_db
from .world import (
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    SIZE,
    STRIPES,
    Description,
    Pair,
    pixel_grid,
    signed_distance,
    visible_masks,
)

Colours = Sequence[Collection[str]]

MISSING_PX = 32.0
"""Trajectory error of a frame in which the object is not found: half the image."""

BORDER = 3
BRIGHTNESS = torch.linspace(0.75, 1.0, 6)  # a background gradient darkens by up to a quarter
MIN_AREA = 20  # px of a frame's object; the smallest object of the world has about 225
MIN_COMPONENT = 25
MIN_VISIBLE = 60  # px of an object behind another; where less is seen of it, its place is not asked for
TOUCH = 2  # px between objects that count as touching
SCALES = torch.tensor([0.92, 1.0, 1.1])
SHIFTS = torch.tensor([-1.5, 0.0, 1.5])

PALETTE = torch.tensor(list(COLOURS.values()))
BACKDROPS = torch.tensor(list(BACKGROUNDS.values()))[:, None] * BRIGHTNESS[:, None]  # (6 backgrounds, 6, RGB)


@dataclass(frozen=True)
class Sighting:
    """One object as seen.

    colour: None if no object was found; mask: (F, 64, 64) bool; centroids: (F, 2) px, NaN for frames without.
    """

    colour: str | None
    mask: Tensor
    centroids: Tensor


def background_name(frames: Tensor) -> str:
    """The background that most pixels of the image border are nearest to, over all frames."""
    pixels = frames.movedim(1, -1)
    inner = torch.zeros(frames.shape[-2:], dtype=torch.bool)
    inner[BORDER:-BORDER, BORDER:-BORDER] = True
    nearest = torch.cdist(pixels[:, ~inner].reshape(-1, 3), BACKDROPS.reshape(-1, 3)).argmin(1)
    votes = (nearest // len(BRIGHTNESS)).bincount(minlength=len(BACKGROUNDS))
    return list(BACKGROUNDS)[int(votes.argmax())]


def segment(frames: Tensor, background: str, bands: Sequence[str] = ()) -> Tensor:
    """(F, 64, 64): the index in `COLOURS` of each pixel's nearest colour, -1 where that is the background.

    bands: colours of stripes to look for too, keys of `STRIPES`; their indices follow those of the colours.
    """
    own = torch.cat([PALETTE, torch.tensor([STRIPES[name] for name in bands]).view(-1, 3)])
    candidates = torch.cat([own, BACKDROPS[list(BACKGROUNDS).index(background)]])
    nearest = torch.cdist(frames.movedim(1, -1).reshape(-1, 3), candidates).argmin(1)
    nearest[nearest >= len(own)] = -1
    return nearest.view(len(frames), *frames.shape[-2:])


def without_specks(mask: Tensor) -> Tensor:
    """Majority of each 3 x 3 neighbourhood, within the mask (F, H, W) bool."""
    return mask & (avg_pool2d(mask[:, None].float(), 3, 1, 1)[:, 0] > 0.5)


def centroids(mask: Tensor) -> Tensor:
    """Centres of mass (F, 2) as (x, y) px of masks (F, 64, 64), bool or weights; NaN for an empty frame."""
    x, y = pixel_grid()
    mask = mask.float()
    return torch.stack([(mask * x).sum((1, 2)), (mask * y).sum((1, 2))], 1) / mask.sum((1, 2))[:, None]


def _places(labels: Tensor, objects: int, colours: Colours | None) -> list[Tensor]:
    """Where each object is looked for: the whole image, its left or right half, or all pixels of its colours."""
    if colours is not None:
        names = list(COLOURS)
        return [torch.isin(labels, torch.tensor([names.index(name) for name in of_one])) for of_one in colours]
    x, _ = pixel_grid()
    return [torch.ones_like(x, dtype=torch.bool)] if objects == 1 else [x < SIZE / 2, x >= SIZE / 2]


def _sight(labels: Tensor, place: Tensor) -> Sighting:
    """The dominant colour of a place and all its pixels there: a second copy shifts the centroid."""
    labels = torch.where(place, labels, -1)
    seen = labels[without_specks(labels >= 0)]
    if len(seen) < MIN_AREA * len(labels) / 2:
        return Sighting(None, torch.zeros_like(labels, dtype=torch.bool), torch.full((len(labels), 2), torch.nan))
    colour = int(seen.bincount(minlength=len(COLOURS)).argmax())
    mask = without_specks(labels == colour)
    mask = mask & (mask.sum((1, 2), keepdim=True) >= MIN_AREA)
    return Sighting(list(COLOURS)[colour], mask, centroids(mask))


def sightings(frames: Tensor, objects: int, colours: Colours | None = None) -> list[Sighting]:
    """What is seen of 1 object in the image, of 2 in its left and right half, or of each by its `colours`."""
    labels = segment(frames, background_name(frames))
    return [_sight(labels, place) for place in _places(labels, objects, colours)]


def _unit_template(shape: str) -> tuple[float, float]:
    """Area in px and vertical centroid offset in px of a shape of radius 10."""
    x, y = pixel_grid()
    inside = (signed_distance(shape, x - SIZE / 2, y - SIZE / 2, 10.0) < 0)[None]
    return float(inside.sum()), float(centroids(inside)[0, 1]) - SIZE / 2


TEMPLATES = {shape: _unit_template(shape) for shape in SHAPES}


def template_overlap(mask: Tensor, shape: str) -> float:
    """Best IoU of one frame's mask (64, 64) bool with a shape of about its size (10 %) and place (1.5 px)."""
    area, offset = TEMPLATES[shape]
    pixels = mask.nonzero() + 0.5  # (P, 2) as (y, x)
    radius = 10 * (len(pixels) / area) ** 0.5 * SCALES[:, None, None, None]
    y, x = (pixels - pixels.mean(0)).T
    y = y - SHIFTS[:, None, None] + offset * radius / 10
    inside = signed_distance(shape, x - SHIFTS[:, None], y, radius) < 0  # (scales, shifts, shifts, P)
    intersection = inside.sum(-1)
    union = area * (radius[..., 0] / 10) ** 2 + len(pixels) - intersection
    return float((intersection / union).max())


def shape_name(sighting: Sighting) -> str | None:
    """The shape of the highest mean template IoU over the frames with the object; None if no frame has it."""
    seen = [mask for mask in sighting.mask if mask.any()]
    if not seen:
        return None
    return max(SHAPES, key=lambda shape: np.mean([template_overlap(mask, shape) for mask in seen]))


def _apart(seen: Sequence[Sighting]) -> list[Sighting]:
    """The same without the frames in which objects touch: there neither shows its outline."""
    near = torch.stack([dilate(s.mask.float(), TOUCH) for s in seen]).sum(0).amax((1, 2)) > 1
    return [replace(s, mask=s.mask & ~near[:, None, None]) for s in seen]


def identify(frames: Tensor, objects: int, colours: Colours | None = None) -> list[Pair]:
    """Colour and shape of what is seen in each object's place; None where nothing is.

    By `colours`, only frames in which no two objects touch tell a shape.
    """
    seen = sightings(frames, objects, colours)
    outlines = seen if colours is None else _apart(seen)
    return [Pair(s.colour, shape_name(outline)) for s, outline in zip(seen, outlines, strict=True)]


def identify_in(frames: Tensor, places: Tensor) -> list[Pair]:
    """Colour and shape of what is seen in each of the places (K, F, 64, 64) bool; None where nothing is.

    Only frames in which no two objects touch tell a shape.
    """
    labels = segment(frames, background_name(frames))
    seen = [_sight(labels, place) for place in places]
    return [Pair(s.colour, shape_name(outline)) for s, outline in zip(seen, _apart(seen), strict=True)]


def background_accuracy(frames: Tensor, target: Description) -> float:
    """1 if the clip has the target's background, else 0."""
    return float(background_name(frames) == target.background)


def colour_accuracy(frames: Tensor, target: Description, colours: Colours | None = None) -> float:
    """Share of the target's objects whose place holds their colour, in [0, 1]."""
    seen = sightings(frames, len(target.objects), colours)
    return float(np.mean([s.colour == o.colour for s, o in zip(seen, target.objects, strict=True)]))


def shape_accuracy(frames: Tensor, target: Description, colours: Colours | None = None) -> float:
    """Share of the target's objects whose place holds their shape, in [0, 1]."""
    seen = identify(frames, len(target.objects), colours)
    return float(np.mean([s.shape == o.shape for s, o in zip(seen, target.objects, strict=True)]))


def trajectory_error_px(frames: Tensor, source_masks: Tensor, colours: Colours | None = None) -> float:
    """Distance between each object's centroid and its source mask's, mean over frames and objects, in px.

    source_masks: (K, F, 64, 64) in [0, 1] as `world.render` gives them, K = 1 or 2 (left, right). A frame without
    the object counts as 32 px. The object is whatever has the dominant colour in its place, so a wrong colour is no
    trajectory error, and a second copy of the same colour is one, by half the distance between the two. Of an object
    behind another the visible parts are compared, and frames that show less than 60 px of it in the source are left
    out.

    Nothing is subtracted for a change of shape. The world places shapes by their centre, and a triangle's
    centroid lies 0.14 radius below it (1.3 to 2.1 px): a perfect swap from or to a triangle scores that
    much if the edit keeps the centre, and 0 if it keeps the centroid, and nothing says which is right.
    Circle and square swap without an offset.
    """
    visible = visible_masks(source_masks)
    errors = []
    for seen, mask in zip(sightings(frames, len(visible), colours), visible, strict=True):
        distance = torch.linalg.vector_norm(seen.centroids - centroids(mask), dim=1)
        errors.append(distance.nan_to_num(nan=MISSING_PX)[mask.sum((1, 2)) >= MIN_VISIBLE])
    return float(torch.cat(errors).mean())


def kept_region(masks: Tensor, dilation_px: int = 6) -> Tensor:
    """(F, 64, 64) in {0, 1}: outside the masks (K, F, 64, 64) grown by `dilation_px` in each direction."""
    return 1 - dilate((masks.amax(0) > 0.02).float(), dilation_px)


def kept_region_psnr_db(frames: Tensor, reference: Tensor, masks: Tensor, dilation_px: int = 6) -> float:
    """PSNR in dB against `reference` outside the dilated masks (K, F, 64, 64); equal frames give 100 dB."""
    return psnr_db(frames, reference, kept_region(masks, dilation_px)[:, None])


def count(frames: Tensor) -> Tensor:
    """Objects a frame, (F,) int: connected regions of at least 25 px, of any colour but the background's."""
    masks = without_specks(segment(frames, background_name(frames)) >= 0)
    areas = [np.bincount(label(mask.numpy())[0].ravel())[1:] for mask in masks]
    return torch.tensor([int((area >= MIN_COMPONENT).sum()) for area in areas])


def count_accuracy(frames: Tensor, objects: int) -> float:
    """Share of frames that show exactly this number of objects, in [0, 1]."""
    return float((count(frames) == objects).float().mean())
