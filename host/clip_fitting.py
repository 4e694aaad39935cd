"""A clip in the sizes and frame counts of a model's family, and in words what that took."""

import re
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ..core.fitting import Mode, Placement, fit_frames, fit_size, place_images, place_mask
from ..core.masks import as_frames
from .families import family_of
from .loaders.example_clips import clip_names, load_clip


class FittedClip(NamedTuple):
    """images (F, height, width, 3); mask (F or 1, height, width), 1 = edit; frames; what changed, in plain English."""

    images: Tensor
    mask: Tensor
    frames: int
    note: str


def size_multiple(model) -> int:
    """Pixels that both sides of a clip must be a multiple of: one cell of the network's coarsest level."""
    pattern = re.compile(family_of(model).downsamplers)
    levels = sum(bool(pattern.fullmatch(path)) for path, _ in model.model.diffusion_model.named_modules())
    return model.model.latent_format.spacial_downscale_ratio * 2**levels


def fit_clip(
    images: Tensor,
    model,
    mask: Tensor | None = None,
    *,
    max_frames: int,
    max_side: int,
    mode: Mode,
    every_nth: int = 1,
) -> FittedClip:
    """Pick frames, scale, and cut or pad a clip so that `model` takes it.

    images: (F, H, W, 3 or 4) in [0, 1]; alpha is dropped. mask: (H, W), (1, H, W) or (F, H, W), of any H and W; without
    one the whole picture is 1. In the border of pad the mask is 0.
    Raises ValueError naming the input that does not fit, before anything is resampled.
    """
    family, multiple = family_of(model), size_multiple(model)
    total, height, width, channels = images.shape
    usable = range(0, total, every_nth)
    _check_usable(total, every_nth)
    picked = usable[: fit_frames(len(usable), maximum=max_frames, pattern=family.frames)]
    placement = fit_size(width, height, multiple=multiple, max_side=max_side, mode=mode)
    mask = torch.ones(1, height, width) if mask is None else _of_picked(mask, total, picked)
    images = images[picked.start : picked.stop : picked.step, ..., :3]
    _check_numbers(images, mask)
    changes = _changes((total, height, width, channels), picked, placement)
    note = f"{changes} {family.name}: sides in steps of {multiple} pixels."
    return FittedClip(place_images(images, placement), place_mask(mask, placement), len(picked), note)


EXAMPLE_FRAMES, EXAMPLE_SIDE = 17, 512
PATCHES, COARSEST_CELLS = 16, 4
"""Along a side of the example, for a transformer and at the coarsest level of a U-Net."""


def example_for(model) -> Tensor:
    """(F, side, side, 3): the first example clip, for transformers there and back, at a size that a ModelPatcher has
    something to see in, and at most 512 pixels."""
    images = load_clip(clip_names()[0]).images
    there_and_back, joined = [*range(len(images)), *range(len(images) - 2, 0, -1)], family_of(model).patched is not None
    count = EXAMPLE_FRAMES if joined else len(images)
    shown = images[[there_and_back[i % len(there_and_back)] for i in range(count)]]
    side = (PATCHES if joined else COARSEST_CELLS) * size_multiple(model)
    side = max(images.shape[1], min(side, EXAMPLE_SIDE))
    shown = interpolate(shown.movedim(-1, 1), (side, side), mode="nearest-exact").movedim(1, -1)
    fits = {"max_frames": count, "max_side": side, "mode": "crop"}
    return fit_clip(shown, model, **fits).images


def _check_usable(total: int, every_nth: int) -> None:
    if total < 2:
        raise ValueError(f"images: a clip of {total} frame; expected at least 2, one image a frame in one batch")
    if total <= every_nth:
        raise ValueError(
            f"every_nth: it is {every_nth}, which leaves 1 of {total} frames; expected at most {total - 1}"
        )


def _check_numbers(images: Tensor, mask: Tensor) -> None:
    for name, values in (("images", images), ("mask", mask)):
        if values.isnan().any():
            raise ValueError(f"{name}: it holds NaN; expected numbers from 0 to 1, so check the node it comes from")


def _of_picked(mask: Tensor, total: int, picked: range) -> Tensor:
    """The masks of the picked frames, or the one mask for all."""
    frames = as_frames(mask, total)
    one = mask.ndim == 2 or mask.shape[0] == 1
    return (frames[:1] if one else frames[picked.start : picked.stop : picked.step]).clamp(0, 1)


def _changes(shape: tuple[int, int, int, int], picked: range, placement: Placement) -> str:
    """One sentence on what becomes of a clip (F, H, W, C)."""
    total, height, width, channels = shape
    was, now = _described(total, (width, height)), _described(len(picked), placement.size)
    changes = _frame_changes(total, picked) + _size_changes((width, height), placement)
    if channels == 4:
        changes.append("dropped the alpha channel")
    return f"{was} -> {now}: {', '.join(changes)}." if changes else f"{now}: it fits, nothing changed."


def _described(frames: int, size: tuple[int, int]) -> str:
    return f"{frames} frames of {size[0]} x {size[1]}"


def _frame_changes(total: int, picked: range) -> list[str]:
    if len(picked) == total:
        return []
    if picked.step == 1:
        return [f"took frames 1 to {len(picked)}"]
    numbers = ", ".join(str(index + 1) for index in picked[:2])
    rest = f", ... {picked[-1] + 1}" if len(picked) > 2 else ""
    return [f"took frames {numbers}{rest} (save it at 1/{picked.step} of the frame rate)"]


def _size_changes(source: tuple[int, int], placement: Placement) -> list[str]:
    changes = []
    if placement.scaled != source:
        across, down = (new / old for new, old in zip(placement.scaled, source, strict=True))
        changes.append(f"scaled by {(across * down) ** 0.5:.2f}")
    sides = [(abs(n), side) for n, side in zip(placement.border, ("left", "right", "top", "bottom"), strict=True) if n]
    if sides:
        verb = "cut" if min(placement.border) < 0 else "added"
        changes.append(verb + " " + " and ".join(f"{n} pixel{'s' * (n > 1)} at the {side}" for n, side in sides))
    return changes
