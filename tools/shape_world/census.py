"""What each frame of a clip shows, wherever it stands: for captions that name no place, and for up to three objects.

`instruments` looks for an object in its half of the image or by its colour; here every connected region is an object.
Clips are (F, 3, 64, 64) in [0, 1].
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.ndimage import binary_closing, label
from torch import Tensor

from .instruments import (
    BORDER,
    MIN_COMPONENT,
    PALETTE,
    background_name,
    centroids,
    segment,
    template_overlap,
    without_specks,
)
from .world import COLOURS, SHAPES, SIZE, TEXTURES, Description, Pair, pixel_grid

STRIPE_SHARE = 0.12  # of an object's pixels; a true band covers 0.25 to 0.4
FLAT = 0.04  # spread of the background's shade where there is no texture; a texture's is at least 0.07
ONE_WAY = 0.5  # of that variance, in rows alone or in columns alone: stripes


@dataclass(frozen=True)
class Found:
    """A region of one frame: what it is, and its centre (x, y) in px."""

    pair: Pair
    centre: tuple[float, float]


def census(frames: Tensor, description: Description) -> list[list[Found]]:
    """The regions of at least 25 px of each frame.

    Of `description` it takes only whether bands are to be looked for: then whatever touches is one object, of the
    colour that most of its pixels have; else each colour's regions are objects of their own.
    """
    bands = _bands(description)
    labels = segment(frames, background_name(frames), bands)
    return [_regions(of_frame, bands) for of_frame in labels]


def _bands(description: Description) -> list[str]:
    return sorted({pair.stripe for pair in description.objects} - {""})


def _regions(labels: Tensor, bands: Sequence[str]) -> list[Found]:
    """labels (64, 64) -> its objects, the largest first."""
    if bands:
        masks = _components(torch.from_numpy(binary_closing((labels >= 0).numpy(), iterations=2)))
    else:
        masks = [m for colour in labels.unique() if colour >= 0 for m in _components(labels == colour)]
    return [_found(labels, mask, bands) for mask in sorted(masks, key=lambda mask: -int(mask.sum()))]


def _components(mask: Tensor) -> list[Tensor]:
    numbered, n = label(without_specks(mask[None])[0].numpy())
    parts = [torch.from_numpy(numbered == i + 1) for i in range(n)]
    return [part for part in parts if part.sum() >= MIN_COMPONENT]


def _found(labels: Tensor, mask: Tensor, bands: Sequence[str]) -> Found:
    counts = labels[mask & (labels >= 0)].bincount(minlength=len(PALETTE) + len(bands))
    colour = int(counts[: len(PALETTE)].argmax())
    stripes = {name: int(n) for name, n in zip(bands, counts[len(PALETTE) :], strict=True)}
    stripe = max(stripes, key=stripes.get, default="")
    if not stripe or stripes[stripe] < STRIPE_SHARE * int(mask.sum()):
        stripe = ""
    shape = max(SHAPES, key=lambda name: template_overlap(mask, name))
    return Found(Pair(list(COLOURS)[colour], shape, stripe), tuple(centroids(mask[None])[0].tolist()))


def texture_name(frames: Tensor, bands: Sequence[str] = ()) -> str:
    """One of `TEXTURES`: how the shade of the first frame's background varies, a linear gradient aside.

    bands: colours of stripes that objects may have.
    """
    labels = segment(frames[:1], background_name(frames), bands)[0]
    seen = labels < 0
    seen &= torch.nn.functional.avg_pool2d(seen[None].float(), 5, 1, 2)[0] > 0.99  # no soft edges of objects
    seen[:BORDER], seen[-BORDER:] = False, False
    if seen.sum() < SIZE:
        return TEXTURES[0]
    shade = frames[0].mean(0)
    x, y = pixel_grid()
    plane = torch.stack([torch.ones_like(x), x / SIZE, y / SIZE], -1)
    fitted = plane @ torch.linalg.lstsq(plane[seen], shade[seen][:, None]).solution
    rest = torch.where(seen, (shade - fitted[..., 0]) / shade[seen].mean(), 0.0)
    variance = rest.square().sum() / seen.sum()
    if variance.sqrt() < FLAT:
        return TEXTURES[0]
    explained = [(rest.sum(axis).square() / seen.sum(axis).clamp(min=1)).sum() / seen.sum() for axis in (0, 1)]
    return "striped" if float(max(explained) / variance) > ONE_WAY else "checked"


def attributes(frames: Tensor, description: Description) -> dict[str, float]:
    """Shares in [0, 1] of what the caption asks for that the clip shows.

    colour, shape (colour and shape together), stripe (colour and stripe; only where one is asked for): of the objects,
    those that at least half of the frames show, two equal ones where two are asked for. places: 1 if the placed
    objects stand as told in at least half of the frames that show each once. background, texture: 0 or 1. all: 1 if
    all of these are 1. count: 1 if every frame shows the right number of objects.
    """
    found = census(frames, description)
    wanted = description.objects
    result = {
        "colour": _shown(found, wanted, lambda pair: pair.colour),
        "shape": _shown(found, wanted, lambda pair: (pair.colour, pair.shape)),
        "background": float(background_name(frames) == description.background),
        "texture": float(texture_name(frames, _bands(description)) == description.texture),
    }
    if any(pair.stripe for pair in wanted):
        result["stripe"] = _shown(found, wanted, lambda pair: (pair.colour, pair.stripe))
    if len(wanted) == 2 and description.places != "none":
        result["places"] = _in_order(found, wanted, axis=0 if description.places == "sides" else 1)
    result["all"] = float(all(value == 1 for value in result.values()))
    result["count"] = float(all(len(of_frame) == len(wanted) for of_frame in found))
    return result


def _shown(found: Sequence[Sequence[Found]], wanted: Sequence[Pair], key: Callable[[Pair], object]) -> float:
    frames = [Counter(key(f.pair) for f in of_frame) for of_frame in found]
    asked = Counter(map(key, wanted))
    shown = sum(
        np.mean([counts[name] >= number for counts in frames]) >= 0.5
        for name, times in asked.items()
        for number in range(1, times + 1)
    )
    return shown / len(wanted)


def _in_order(found: Sequence[Sequence[Found]], wanted: Sequence[Pair], axis: int) -> float:
    verdicts = []
    for of_frame in found:
        places = [[f.centre[axis] for f in of_frame if f.pair.colour == pair.colour] for pair in wanted]
        if all(len(of_one) == 1 for of_one in places):
            verdicts.append(places[0][0] < places[1][0])
    return float(len(verdicts) > 0 and np.mean(verdicts) >= 0.5)
