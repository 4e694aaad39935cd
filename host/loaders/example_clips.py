"""The example clips of the pack: 8 frames of 64 x 64 pixels with masks, captions and edits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import numpy
import torch
from PIL import Image

CLIPS_PATH = Path(__file__).resolve().parents[2] / "assets" / "tiny_clips"
FPS = 8.0


class ExampleClip(NamedTuple):
    """images [F,64,64,3] and masks [F,64,64] in 0..1, zero where the clip has no such object; prompts, fps.

    A mask is what is seen of its object. stripe_mask: of the band that one object carries.
    """

    images: torch.Tensor
    mask_1: torch.Tensor
    mask_2: torch.Tensor
    source_prompt: str
    edit_prompt: str
    fps: float
    mask_3: torch.Tensor
    stripe_mask: torch.Tensor


def clip_names() -> list[str]:
    """Entries such as "clip_00 - a red circle on a gray background"."""
    return [f"{entry['clip']} - {entry['caption']}" for entry in _entries()]


def load_clip(name: str, edit: int = 1) -> ExampleClip:
    """One clip. name: an entry of `clip_names`. edit: 1..3, which of its edit captions to return.

    Raises ValueError for another name or number.
    """
    entries = dict(zip(clip_names(), _entries(), strict=True))
    if name not in entries:
        raise ValueError(f"clip is {name!r}; expected one of the list, such as {clip_names()[0]!r}: choose one there")
    entry = entries[name]
    if not 1 <= edit <= len(entry["edits"]):
        raise ValueError(f"edit is {edit}; {name!r} has edits 1 to {len(entry['edits'])}: choose one of them")
    folder = CLIPS_PATH / entry["clip"]
    images = _read(folder, "frame_%02d.png", entry["frames"], "RGB")
    masks = [_read(folder, thing["mask"], entry["frames"], "L") for thing in entry["objects"]]
    stripes = [thing["stripe_mask"] for thing in entry["objects"] if "stripe_mask" in thing]
    none = torch.zeros_like(masks[0])
    mask_1, mask_2, mask_3 = [*masks, none, none][:3]
    return ExampleClip(
        images,
        mask_1,
        mask_2,
        entry["caption"],
        entry["edits"][edit - 1]["caption"],
        FPS,
        mask_3,
        _read(folder, stripes[0], entry["frames"], "L") if stripes else none,
    )


def _entries() -> list[dict]:
    return json.loads((CLIPS_PATH / "captions.json").read_text(encoding="utf-8"))


def _read(folder: Path, pattern: str, frames: int, mode: str) -> torch.Tensor:
    pixels = [numpy.asarray(Image.open(folder / (pattern % index)).convert(mode)) for index in range(frames)]
    return torch.from_numpy(numpy.stack(pixels)).float() / 255.0
