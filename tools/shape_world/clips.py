"""The delivered clips: PNG frames and masks in folders, described by one `captions.json`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .world import Object, Scene


@dataclass(frozen=True)
class Clip:
    """frames (F, 3, 64, 64) and masks (K, F, 64, 64) in [0, 1]; edits: captions of target scenes.

    scene: what the files record of it; of the first eight clips neither the small colour jitter nor the background
    gradient. A mask is what is seen of its object. stripe_masks: of the objects that have one, by their index.
    """

    name: str
    caption: str
    edits: tuple[str, ...]
    scene: Scene
    frames: Tensor
    masks: Tensor
    stripe_masks: dict[int, Tensor]


def read_png(path: Path) -> Tensor:
    """(3, H, W) of an RGB file or (H, W) of a greyscale one, in [0, 1]."""
    pixels = torch.from_numpy(np.array(Image.open(path))).float() / 255
    return pixels.permute(2, 0, 1)[:3] if pixels.ndim == 3 else pixels


def read_frames(paths: Sequence[Path]) -> Tensor:
    """PNG files stacked along a leading frame axis."""
    return torch.stack([read_png(path) for path in paths])


def _object(entry: dict) -> Object:
    centres = tuple((float(x), float(y)) for x, y in entry["centres"])
    return Object(entry["color"], entry["shape"], float(entry["radius"]), centres, stripe=entry.get("stripe", ""))


SCENE_FIELDS = ("gradient", "direction", "places", "texture", "contrast", "pitch")


def read_clip(folder: Path, entry: dict) -> Clip:
    """One clip of `captions.json`; `folder` holds the file and the clip's own folder."""
    home, indices = Path(folder) / entry["clip"], range(entry["frames"])

    def masks_of(pattern: str) -> Tensor:
        return read_frames([home / (pattern % i) for i in indices])

    frames = read_frames([home / f"frame_{i:02d}.png" for i in indices])
    masks = torch.stack([masks_of(o["mask"]) for o in entry["objects"]])
    stripes = {o["index"]: masks_of(o["stripe_mask"]) for o in entry["objects"] if "stripe_mask" in o}
    recorded = {name: entry[name] for name in SCENE_FIELDS if name in entry}
    scene = Scene(entry["background"], tuple(_object(o) for o in entry["objects"]), **recorded)
    edits = tuple(edit["caption"] for edit in entry["edits"])
    return Clip(entry["clip"], entry["caption"], edits, scene, frames, masks, stripes)


def read_clips(folder: Path) -> list[Clip]:
    """All clips that `folder/captions.json` lists, in its order."""
    entries = json.loads((Path(folder) / "captions.json").read_text(encoding="utf-8"))
    return [read_clip(folder, entry) for entry in entries]
