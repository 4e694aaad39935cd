"""Batches of the shape world for training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ..shape_world import variety, world


def at_frames(scene: world.Scene, indices: Sequence[int]) -> world.Scene:
    """Only these frames of a scene."""
    return replace(
        scene, objects=tuple(replace(o, centres=tuple(o.centres[i] for i in indices)) for o in scene.objects)
    )


def sample_clip(generator: np.random.Generator, frames: int, kind: str | None = None) -> tuple[str, Tensor, Tensor]:
    """Caption, frames (F, 3, 64, 64) and the union of the objects (F, 64, 64); one frame: any of a clip's."""
    if frames == 1:
        scene = variety.sample(generator, kind)
        scene = at_frames(scene, [int(generator.integers(world.FRAMES))])
    else:
        scene = variety.sample(generator, kind, frames=frames)
    clip, masks = world.render(scene)
    return world.caption(scene), clip, masks.amax(0)


def sample_batch(
    generator: np.random.Generator, clips: int, frames: int, kinds: Sequence[str | None] | None = None
) -> tuple[list[str], Tensor, Tensor]:
    """Captions, frames (B, F, 3, 64, 64), masks (B, F, 64, 64). kinds: of the clips, B of `variety.KINDS`."""
    kinds = [None] * clips if kinds is None else kinds
    captions, images, masks = zip(*(sample_clip(generator, frames, kind) for kind in kinds), strict=True)
    return list(captions), torch.stack(images), torch.stack(masks)
