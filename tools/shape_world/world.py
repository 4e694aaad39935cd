"""Scenes of the shape world: sampling, captions, edits and anti-aliased rendering with exact masks.

Lengths are pixels; x runs to the right, y downwards, the centre of the top left pixel is (0.5, 0.5).
Shape letters: F frames, K objects.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, product
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

SIZE = 64
FRAMES = 8
RGB = tuple[float, float, float]

COLOURS: dict[str, RGB] = {
    "red": (0.92, 0.10, 0.10),
    "green": (0.08, 0.75, 0.15),
    "blue": (0.12, 0.25, 0.98),
    "yellow": (0.98, 0.90, 0.08),
    "purple": (0.68, 0.12, 0.88),
    "cyan": (0.08, 0.85, 0.92),
}
BACKGROUNDS: dict[str, RGB] = {
    "gray": (0.50, 0.50, 0.50),
    "white": (0.95, 0.95, 0.95),
    "black": (0.05, 0.05, 0.05),
    "brown": (0.45, 0.28, 0.14),
    "pink": (0.98, 0.70, 0.76),
    "navy": (0.05, 0.08, 0.38),
}
SHAPES = ("circle", "square", "triangle")
STRIPES: dict[str, RGB] = {"white": (0.97, 0.97, 0.97), "black": (0.03, 0.03, 0.03)}
"""Colours of the band that an object may carry across its middle."""
TEXTURES = ("plain", "striped", "checked")
DARK = ("black", "navy")
"""Backgrounds on which no texture would be seen."""
Places = Literal["sides", "heights", "none"]
EDIT_KINDS = ("colour", "shape", "background", "stripe")

MAX_TRAVEL = 24.0
STILL_SHARE = 0.1
GRADIENT_SHARE = 0.4
TWO_OBJECT_SHARE = 0.45
RADII_OF_TWO = (9, 12.3)
JITTER = 0.02
EDGE_SHARPNESS = 2.5  # logistic edge: a mask falls from 0.92 to 0.08 within 2 px
STRIPE_HALF_WIDTH = 0.3  # of an object's band, in radii


class Pair(NamedTuple):
    """What a caption says of one object. stripe: a key of `STRIPES`, or "" for none."""

    colour: str
    shape: str
    stripe: str = ""


HELD_OUT = frozenset({Pair("purple", "triangle"), Pair("cyan", "square"), Pair("green", "circle")})
"""Pairs that the embedded model never saw in training."""


class Description(NamedTuple):
    """What a caption says of a scene.

    places: how it tells two objects apart: "sides", from left to right as they stand in the first frame; "heights",
    from top to bottom; "none", in any order, as it is for three objects.
    """

    background: str
    objects: tuple[Pair, ...]
    places: Places = "sides"
    texture: str = "plain"


@dataclass(frozen=True)
class Object:
    """A shape in motion. radius: px, in the middle of the clip; centres: F points (x, y); jitter: added to its colour;
    stripe: as in `Pair`; growth: the radius at the end over that at the start, an equal factor a frame."""

    colour: str
    shape: str
    radius: float
    centres: tuple[tuple[float, float], ...]
    jitter: RGB = (0.0, 0.0, 0.0)
    stripe: str = ""
    growth: float = 1.0

    @property
    def radii(self) -> Tensor:
        """Of each frame, (F, 1, 1)."""
        return self.radius * self.growth ** torch.linspace(-0.5, 0.5, len(self.centres))[:, None, None]


@dataclass(frozen=True)
class Scene:
    """One clip.

    gradient: in [0, 1), how much darker the background's far side is; direction: 0 to 3, where that side lies
    (right, bottom, left, top); jitter: added to the background's colour. places: as in `Description`.
    texture: one of `TEXTURES`, whose dark parts are `contrast` darker and repeat every `pitch` px; stripes stand
    upright where direction is even, else they lie.
    """

    background: str
    objects: tuple[Object, ...]
    gradient: float = 0.0
    direction: int = 0
    jitter: RGB = (0.0, 0.0, 0.0)
    places: Places = "sides"
    texture: str = "plain"
    contrast: float = 0.2
    pitch: float = 16.0

    @property
    def description(self) -> Description:
        """The scene's attributes, as its caption states them."""
        pairs = tuple(Pair(o.colour, o.shape, o.stripe) for o in self.objects)
        return Description(self.background, pairs, self.places if len(pairs) == 2 else "none", self.texture)

    @property
    def travel_px(self) -> float:
        """Distance between an object's first and last centre, mean over the objects."""
        return float(np.mean([math.dist(o.centres[0], o.centres[-1]) for o in self.objects]))


NUMBERS = {1: "a", 2: "two", 3: "three"}
PLACE_WORDS = {"sides": ("left", "right"), "heights": ("top", "bottom")}
_PHRASE = re.compile(
    rf"(?P<number>a|two|three) (?P<colour>{'|'.join(COLOURS)}) (?P<shape>{'|'.join(SHAPES)})(?P<plural>s?)"
    rf"(?: with a (?P<stripe>{'|'.join(STRIPES)}) stripe)?(?: on the (?P<place>left|right|top|bottom))?"
)
_BACKGROUND = re.compile(
    rf"(?:(?P<texture>{'|'.join(TEXTURES[1:])}) )?(?P<background>{'|'.join(BACKGROUNDS)}) background$"
)


def caption(scene: Scene | Description) -> str:
    """The sentence of one to three objects that the embedded model was trained on.

    Equal objects in a row are counted: "two red circles". Raises ValueError for more than three.
    """
    description = scene.description if isinstance(scene, Scene) else scene
    texture = "" if description.texture == "plain" else f"{description.texture} "
    background = f"{texture}{description.background} background"
    if len(description.objects) == 2 and description.places != "none":
        words = PLACE_WORDS[description.places]
        placed = [f"{_phrase(pair, 1)} on the {w}" for pair, w in zip(description.objects, words, strict=True)]
        return f"{' and '.join(placed)}, {background}"
    if not 1 <= len(description.objects) <= max(NUMBERS):
        raise ValueError(f"a caption is of 1 to {max(NUMBERS)} objects, not of {len(description.objects)}")
    phrases = [_phrase(pair, len(list(equal))) for pair, equal in groupby(description.objects)]
    listed = " and ".join(filter(None, (", ".join(phrases[:-1]), phrases[-1])))
    return f"{listed} on a {background}"


def _phrase(pair: Pair, number: int) -> str:
    stripe = f" with a {pair.stripe} stripe" if pair.stripe else ""
    return f"{NUMBERS[number]} {pair.colour} {pair.shape}{'s' if number > 1 else ''}{stripe}"


def parse_caption(text: str) -> Description:
    """The inverse of `caption`. Raises ValueError for any other sentence."""
    found, behind = list(_PHRASE.finditer(text)), _BACKGROUND.search(text)
    numbers = {word: number for number, word in NUMBERS.items()}
    pairs = [Pair(m["colour"], m["shape"], m["stripe"] or "") for m in found for _ in range(numbers[m["number"]])]
    place = next((m["place"] for m in found), None)
    places = next((name for name, words in PLACE_WORDS.items() if place in words), "none")
    if behind and 1 <= len(pairs) <= max(NUMBERS):
        description = Description(behind["background"], tuple(pairs), places, behind["texture"] or "plain")
        if caption(description) == text:
            return description
    raise ValueError(f"not a shape-world caption: {text!r}; expected for example 'a red circle on a gray background'")


def pixel_grid() -> tuple[Tensor, Tensor]:
    """x and y of the pixel centres, each (64, 64)."""
    y, x = torch.meshgrid(torch.arange(SIZE) + 0.5, torch.arange(SIZE) + 0.5, indexing="ij")
    return x, y


def signed_distance(shape: str, x: Tensor, y: Tensor, radius: float | Tensor) -> Tensor:
    """Distance in px to the outline of a shape centred at the origin, negative inside (exact along faces).

    The shapes have about the same area at equal radius. Circle and square have their centroid at the
    origin, the triangle (equilateral, apex up) 0.14 radius below it.
    """
    if shape == "circle":
        return torch.hypot(x, y) - 0.95 * radius
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.84 * radius
    if shape == "triangle":
        y = y - 0.14 * radius
        return torch.maximum(y, math.sqrt(0.75) * x.abs() - 0.5 * y) - 0.625 * radius
    raise ValueError(f"unknown shape {shape!r}; expected one of {', '.join(SHAPES)}")


def object_mask(obj: Object) -> Tensor:
    """Anti-aliased coverage in [0, 1], (F, 64, 64)."""
    x, y = pixel_grid()
    centres = torch.tensor(obj.centres)[:, :, None, None]
    return torch.sigmoid(-EDGE_SHARPNESS * signed_distance(obj.shape, x - centres[:, 0], y - centres[:, 1], obj.radii))


def stripe_mask(obj: Object) -> Tensor:
    """The part of `object_mask` that is the object's band, (F, 64, 64)."""
    _, y = pixel_grid()
    height = y - torch.tensor(obj.centres)[:, 1, None, None]
    return object_mask(obj) * torch.sigmoid(-EDGE_SHARPNESS * (height.abs() - STRIPE_HALF_WIDTH * obj.radii))


def background_image(scene: Scene) -> Tensor:
    """The scene without its objects, (3, 64, 64) in [0, 1]."""
    x, y = pixel_grid()
    ramp = (x, y, SIZE - x, SIZE - y)[scene.direction] / SIZE
    colour = torch.tensor(BACKGROUNDS[scene.background]) + torch.tensor(scene.jitter)
    shade = (1 - scene.gradient * ramp) * (1 - scene.contrast * _texture(scene, x, y))
    return (colour[:, None, None] * shade).clamp(0, 1)


def _texture(scene: Scene, x: Tensor, y: Tensor) -> Tensor:
    """(64, 64) in [0, 1]: 1 where the background's texture is dark."""
    if scene.texture == "plain":
        return torch.zeros_like(x)
    turn = 2 * math.pi / scene.pitch
    across, along = (x, y) if scene.direction % 2 == 0 else (y, x)
    wave = torch.sin(turn * across) * (torch.sin(turn * along) if scene.texture == "checked" else 1)
    return torch.sigmoid(EDGE_SHARPNESS / turn * wave)


def render(scene: Scene) -> tuple[Tensor, Tensor]:
    """Clip (F, 3, 64, 64) and object masks (K, F, 64, 64), both in [0, 1]; later objects lie in front.

    A mask is the whole object, also where another hides it: see `visible_masks`.
    """
    masks = torch.stack([object_mask(o) for o in scene.objects])
    frames = background_image(scene).expand(masks.shape[1], -1, -1, -1)
    for obj, mask in zip(scene.objects, masks, strict=True):
        colour = (torch.tensor(COLOURS[obj.colour]) + torch.tensor(obj.jitter)).clamp(0, 1)
        frames = torch.lerp(frames, colour[:, None, None].expand_as(frames), mask[:, None])
        if obj.stripe:
            band = torch.tensor(STRIPES[obj.stripe])[:, None, None].expand_as(frames)
            frames = torch.lerp(frames, band, stripe_mask(obj)[:, None])
    return frames, masks


def visible_masks(masks: Tensor) -> Tensor:
    """(K, F, 64, 64) of `render` -> the same less what lies in front of each object, that is the later ones."""
    seen_through = torch.cat([(1 - masks).flip(0).cumprod(0).flip(0)[1:], torch.ones_like(masks[:1])])
    return masks * seen_through


def _choose(generator: np.random.Generator, options: Iterable):
    options = list(options)
    return options[int(generator.integers(len(options)))]


def sample_jitter(generator: np.random.Generator) -> RGB:
    """What is added to a colour."""
    return tuple(generator.uniform(-JITTER, JITTER, 3).tolist())


def _sample_pairs(generator: np.random.Generator, objects: int, held_out: bool) -> tuple[Pair, ...]:
    """Uniform over the pairs that are (or are not) held out; two objects never share a colour."""
    pairs = [Pair(*p) for p in product(COLOURS, SHAPES) if (Pair(*p) in HELD_OUT) == held_out]
    first = _choose(generator, pairs)
    if objects == 1:
        return (first,)
    return first, _choose(generator, (p for p in pairs if p.colour != first.colour))


def _sample_motion(
    generator: np.random.Generator, box: Sequence[float], radius: float, frames: int
) -> tuple[tuple[float, float], ...]:
    """A straight, even motion of at most 24 px in box (left, right, top, bottom); one in ten stands still."""
    left, right, top, bottom = box
    low = np.array([left + radius, top + radius])
    high = np.maximum(low, [right - radius, bottom - radius])
    start, end = generator.uniform(low, high), generator.uniform(low, high)
    step = np.zeros(2) if generator.random() < STILL_SHARE else end - start
    step *= min(1.0, MAX_TRAVEL / max(float(np.hypot(*step)), 1e-9))
    return _straight(start, start + step, frames)


def sample_scene(
    generator: np.random.Generator,
    objects: int | None = None,
    *,
    held_out: bool = False,
    frames: int = FRAMES,
) -> Scene:
    """A scene of the training distribution; the same generator state gives the same scene.

    objects: 1 (radius 10 to 15 px), 2 (radius 9 to 12.3 px, each in its half), or None: 2 in 45 % of scenes.
    held_out: draw only the pairs that the model never saw, instead of only those that it saw.
    """
    if objects is None:
        objects = 2 if generator.random() < TWO_OBJECT_SHARE else 1
    boxes = [(0, SIZE, 0, SIZE)] if objects == 1 else [(1, 31.5, 1, SIZE - 1), (32.5, SIZE - 1, 1, SIZE - 1)]
    radii = (10, 15) if objects == 1 else RADII_OF_TWO
    members = []
    for pair, box in zip(_sample_pairs(generator, objects, held_out), boxes, strict=True):
        radius = float(generator.uniform(*radii))
        members.append(
            Object(
                pair.colour,
                pair.shape,
                radius,
                _sample_motion(generator, box, radius, frames),
                sample_jitter(generator),
            )
        )
    return _on_background(generator, members)


def _on_background(generator: np.random.Generator, members: Iterable[Object]) -> Scene:
    gradient = float(generator.uniform(0.1, 0.25)) if generator.random() < GRADIENT_SHARE else 0.0
    direction = int(generator.integers(4))
    return Scene(_choose(generator, BACKGROUNDS), tuple(members), gradient, direction, sample_jitter(generator))


def sample_crossing(generator: np.random.Generator, *, frames: int = FRAMES) -> Scene:
    """Two objects that exchange sides, the one from the right in front; no scene of the training distribution.

    They start and end at least 6 px apart, each on its side, and travel 24 px or more. Where they meet, one is half a
    radius above the other, so that some of the rear one stays visible.
    """
    pairs, radii = _sample_pairs(generator, 2, held_out=False), generator.uniform(*RADII_OF_TWO, 2)
    size = float(radii.max())
    low, high = [1 + size, 1 + 1.5 * size], [SIZE / 2 - 3 - size, SIZE - 1 - 1.5 * size]
    left, right = generator.uniform(low, high), np.array([SIZE, 0]) + [-1, 1] * generator.uniform(low, high)
    lift = np.array([0, _choose(generator, (-0.5, 0.5)) * size])
    paths = (left, right), (right + lift, left + lift)
    members = [
        Object(pair.colour, pair.shape, float(radius), _straight(*path, frames), sample_jitter(generator))
        for pair, radius, path in zip(pairs, radii, paths, strict=True)
    ]
    return _on_background(generator, members)


def _straight(start: np.ndarray, end: np.ndarray, frames: int) -> tuple[tuple[float, float], ...]:
    """An even motion from point to point."""
    path = start + np.linspace(0, 1, frames)[:, None] * (end - start)
    return tuple((float(x), float(y)) for x, y in path)


def sample_edit(scene: Scene, kind: str, generator: np.random.Generator, index: int = 0) -> Scene:
    """The scene with one attribute changed; motion, sizes and jitter stay.

    kind: "colour", "shape" or "stripe" of object `index`, or "background". The new pair is never a held-out one, and
    the object's new colour is no other object's.
    """
    if kind == "background":
        return replace(scene, background=_choose(generator, (b for b in BACKGROUNDS if b != scene.background)))
    obj = scene.objects[index]
    if kind == "colour":
        taken = {o.colour for o in scene.objects}
        options = [Pair(c, obj.shape) for c in COLOURS if c not in taken]
    elif kind == "shape":
        options = [Pair(obj.colour, s) for s in SHAPES if s != obj.shape]
    elif kind == "stripe":
        stripes = list(scene.objects)
        stripes[index] = replace(obj, stripe=_choose(generator, (name for name in STRIPES if name != obj.stripe)))
        return replace(scene, objects=tuple(stripes))
    else:
        raise ValueError(f"unknown edit {kind!r}; expected one of {', '.join(EDIT_KINDS)}")
    pair = _choose(generator, (p for p in options if p not in HELD_OUT))
    objects = list(scene.objects)
    objects[index] = replace(obj, colour=pair.colour, shape=pair.shape)
    return replace(scene, objects=tuple(objects))
