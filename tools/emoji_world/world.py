"""Scenes of the emoji world: captions, their parser, and rendering with exact masks.

Lengths are pixels; x runs to the right, y downwards, the centre of the top left pixel is (0.5, 0.5).
Shape letters: F frames, K objects.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from itertools import groupby
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .backdrops import BACKDROPS, LANDS, PLAIN, SIZE, backdrop
from .sprites import level

FRAMES = 8
THINGS = ("cat", "dog", "fox", "panda", "penguin", "car", "rocket", "football")
PLURALS = {thing: f"{thing}es" if thing.endswith("x") else f"{thing}s" for thing in THINGS}
BACKGROUNDS: dict[str, str] = {
    "meadow": "on a meadow",
    "beach": "on a beach",
    "snow": "in the snow",
    "night sky": "in the night sky",
    **{colour: f"on a {colour} background" for colour in PLAIN},
}
"""Name of a backdrop to how a caption says it."""
assert set(BACKGROUNDS) == set(BACKDROPS)

Places = Literal["sides", "heights", "none"]
PLACE_WORDS = {"sides": ("on the left", "on the right"), "heights": ("at the top", "at the bottom")}
NUMBERS = {1: "a", 2: "two", 3: "three"}


class Description(NamedTuple):
    """What a caption says of a scene.

    background: a key of `BACKGROUNDS`; objects: of `THINGS`; places: how it tells two objects apart: "sides", from left
    to right as they stand in the first frame; "heights", from top to bottom; "none", in any order.
    """

    background: str
    objects: tuple[str, ...]
    places: Places = "none"


class Pose(NamedTuple):
    """Where a thing is in one frame: its centre, width and height of its square picture (a negative width mirrors it),
    and degrees that it is turned clockwise."""

    x: float
    y: float
    width: float
    height: float
    angle: float = 0.0


@dataclass(frozen=True)
class Object:
    """A thing in motion: one pose a frame."""

    thing: str
    poses: tuple[Pose, ...]

    @property
    def centres(self) -> tuple[tuple[float, float], ...]:
        """F points (x, y)."""
        return tuple((pose.x, pose.y) for pose in self.poses)


@dataclass(frozen=True)
class Scene:
    """One clip; later objects lie in front. horizon and seed: as in `backdrops.backdrop`."""

    background: str
    objects: tuple[Object, ...]
    places: Places = "none"
    horizon: float = 0.35
    seed: int = 0

    @property
    def description(self) -> Description:
        """The scene's attributes, as its caption states them."""
        things = tuple(o.thing for o in self.objects)
        return Description(self.background, things, self.places if len(things) == 2 else "none")

    @property
    def on_land(self) -> bool:
        """Whether the backdrop has a ground."""
        return self.background in LANDS


# --- captions -----------------------------------------------------------

_PHRASE = re.compile(
    rf"(?P<number>a|two|three) (?P<thing>{'|'.join((*PLURALS.values(), *THINGS))})"
    rf"(?: (?P<place>{'|'.join(word for words in PLACE_WORDS.values() for word in words)}))?\b"
)
_BACKGROUND = re.compile(rf" (?P<phrase>{'|'.join(BACKGROUNDS.values())})$")


def caption(scene: Scene | Description) -> str:
    """The sentence of one to three objects that the model is trained on: "a cat and a dog on a meadow".

    Equal objects in a row that no place tells apart are counted: "two cats". Raises ValueError for more than three.
    """
    description = scene.description if isinstance(scene, Scene) else scene
    background = BACKGROUNDS[description.background]
    if len(description.objects) == 2 and description.places != "none":
        words = PLACE_WORDS[description.places]
        placed = [f"a {thing} {place}" for thing, place in zip(description.objects, words, strict=True)]
        return f"{' and '.join(placed)} {background}"
    if not 1 <= len(description.objects) <= max(NUMBERS):
        raise ValueError(f"objects: {len(description.objects)}, expected 1 to {max(NUMBERS)} in a caption")
    phrases = [_phrase(thing, len(list(equal))) for thing, equal in groupby(description.objects)]
    listed = " and ".join(filter(None, (", ".join(phrases[:-1]), phrases[-1])))
    return f"{listed} {background}"


def _phrase(thing: str, number: int) -> str:
    return f"{NUMBERS[number]} {PLURALS[thing] if number > 1 else thing}"


def parse_caption(text: str) -> Description:
    """The inverse of `caption`. Raises ValueError for any other sentence."""
    behind = _BACKGROUND.search(text)
    if behind:
        found = list(_PHRASE.finditer(text[: behind.start()]))
        numbers = {word: number for number, word in NUMBERS.items()}
        singular = {plural: thing for thing, plural in PLURALS.items()}
        things = [singular.get(m["thing"], m["thing"]) for m in found for _ in range(numbers[m["number"]])]
        place = next((m["place"] for m in found), None)
        places = next((name for name, words in PLACE_WORDS.items() if place in words), "none")
        background = next(name for name, phrase in BACKGROUNDS.items() if phrase == behind["phrase"])
        description = Description(background, tuple(things), places)
        if 1 <= len(things) <= max(NUMBERS) and caption(description) == text:
            return description
    raise ValueError(f"not an emoji-world caption: {text!r}; expected for example 'a cat and a dog on a meadow'")


# --- pictures -----------------------------------------------------------


def draw_thing(thing: str, pose: Pose) -> np.ndarray:
    """(64, 64, 4) uint8: the thing's premultiplied colour and its coverage (alpha)."""
    side, picture = level(thing, max(abs(pose.width), pose.height))
    cos, sin = math.cos(math.radians(pose.angle)), math.sin(math.radians(pose.angle))
    wide, tall = side / pose.width, side / pose.height
    a, b, d, e = cos * wide, sin * wide, -sin * tall, cos * tall
    middle = picture.width / 2
    matrix = (a, b, middle - a * pose.x - b * pose.y, d, e, middle - d * pose.x - e * pose.y)
    return np.asarray(picture.transform((SIZE, SIZE), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR))


def backdrop_image(scene: Scene) -> Tensor:
    """The scene without its objects, (3, 64, 64) in [0, 1]."""
    return torch.from_numpy(backdrop(scene.background, scene.horizon, scene.seed)).movedim(-1, 0)


def render(scene: Scene) -> tuple[Tensor, Tensor]:
    """Clip (F, 3, 64, 64) and object masks (K, F, 64, 64), both in [0, 1]; later objects lie in front.

    A mask is the whole object, also where another hides it: `shape_world.world.visible_masks` takes that away.
    """
    frames = backdrop(scene.background, scene.horizon, scene.seed)
    masks = []
    for obj in scene.objects:
        drawn = np.stack([draw_thing(obj.thing, pose) for pose in obj.poses]).astype(np.float32) / 255
        frames = frames * (1 - drawn[..., 3:]) + drawn[..., :3]
        masks.append(drawn[..., 3])
    return torch.from_numpy(frames.clip(0, 1)).movedim(-1, 1).contiguous(), torch.from_numpy(np.stack(masks))
