"""Batches of the emoji world for training, and its vocabulary."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from multiprocessing.sharedctypes import Synchronized

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from ..emoji_world import variety, world
from ..train_tiny.parts import ids_of
from ..train_tiny.train_unet import EMPTY_SHARE, coarse_masks
from ..train_tiny.words import Vocabulary

_PHRASES = (
    *world.NUMBERS.values(),
    *(place for places in world.PLACE_WORDS.values() for place in places),
    "and ,",
    *world.BACKGROUNDS.values(),
    *world.THINGS,
    *world.PLURALS.values(),
)
VOCABULARY = Vocabulary(tuple(dict.fromkeys(word for phrase in _PHRASES for word in phrase.split())))
"""Each word of the world's captions is one token."""


def sample_clip(
    generator: np.random.Generator, frames: int = world.FRAMES, kind: str | None = None
) -> tuple[str, Tensor, Tensor]:
    """Caption, frames (F, 3, 64, 64) and the union of the objects (F, 64, 64); one frame: any of a clip's."""
    scene = variety.sample(generator, kind, frames=max(frames, world.FRAMES))
    if frames == 1:
        i = int(generator.integers(world.FRAMES))
        scene = replace(scene, objects=tuple(replace(o, poses=o.poses[i : i + 1]) for o in scene.objects))
    clip, masks = world.render(scene)
    return world.caption(scene), clip, masks.amax(0)


def sample_batch(
    generator: np.random.Generator, clips: int, frames: int = world.FRAMES, kinds: Sequence[str | None] | None = None
) -> tuple[list[str], Tensor, Tensor]:
    """Captions, frames (B, F, 3, 64, 64), masks (B, F, 64, 64). kinds: of the clips, B of `variety.KINDS`."""
    kinds = [None] * clips if kinds is None else kinds
    captions, images, masks = zip(*(sample_clip(generator, frames, kind) for kind in kinds), strict=True)
    return list(captions), torch.stack(images), torch.stack(masks)


def frames_of(generator: np.random.Generator, n: int) -> tuple[Tensor, Tensor]:
    """Single frames (B, 3, 64, 64) and the union of their objects (B, 1, 64, 64)."""
    _, frames, masks = sample_batch(generator, n, 1)
    return frames[:, 0], masks


def to_bytes(values: Tensor) -> Tensor:
    """[0, 1] -> 0 to 255."""
    return (values * 255).round().byte()


class Clips(IterableDataset):
    """Endless batches for one step of the U-Net each, other ones in each worker.

    image_share: of the steps that get single images, in [0, 1]; the trainer may change its value meanwhile.
    """

    def __init__(self, seed: int, clips: int, images: int, image_share: Synchronized):
        self.seed, self.clips, self.images, self.image_share = seed, clips, images, image_share

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        generator = worker_generator(self.seed)
        while True:
            if generator.random() < self.image_share.value:
                yield draw(generator, self.images, 1)
            else:
                yield draw(generator, self.clips)


def worker_generator(seed: int) -> np.random.Generator:
    """Of a data loader's process, which is set to one thread."""
    torch.set_num_threads(1)
    worker = get_worker_info()
    return np.random.default_rng([seed, worker.id if worker else 0])


def draw(generator: np.random.Generator, clips: int, frames: int = world.FRAMES) -> tuple[Tensor, Tensor, Tensor]:
    """ids (B, 24); images (B, F, 3, 64, 64) and masks (B, 1, F, 16, 16), in 0 to 255. Some captions are empty."""
    captions, images, masks = sample_batch(generator, clips, frames)
    ids = ids_of(("" if generator.random() < EMPTY_SHARE else caption for caption in captions), VOCABULARY)
    return ids, to_bytes(images), to_bytes(coarse_masks(masks))
