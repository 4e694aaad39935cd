"""Scenes of every kind that the embedded model is trained on: one to three objects, in all forms of caption.

`world.sample_scene` draws the two plainest kinds only ("one" on a plain background, and "sides").
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations, product

import numpy as np

from .world import (
    BACKGROUNDS,
    COLOURS,
    DARK,
    FRAMES,
    GRADIENT_SHARE,
    HELD_OUT,
    MAX_TRAVEL,
    SHAPES,
    SIZE,
    STILL_SHARE,
    STRIPES,
    TEXTURES,
    Object,
    Pair,
    Scene,
    sample_crossing,
    sample_jitter,
)

KINDS: dict[str, float] = {
    "one": 0.20,  # a red circle
    "part": 0.09,  # a red circle with a white stripe, also beside a second object
    "sides": 0.17,  # a red circle on the left and a green square on the right
    "heights": 0.10,  # ... on the top and ... on the bottom
    "pair": 0.14,  # a red circle and a green square, anywhere
    "same": 0.14,  # two red circles, three red circles
    "three": 0.11,  # a red circle, a green square and a blue triangle; two red circles and a blue square
    "crossing": 0.05,  # two that change sides
}
"""Share of each kind in training."""

TEXTURE_SHARE = 0.35
FAST_TRAVEL = (24.0, 44.0)
FAST_SHARE, CURVED_SHARE, LEAVING_SHARE = 0.15, 0.2, 0.06
RADII = {1: (10, 15), 2: (8.5, 12.3), 3: (8, 10.5)}
REACH = 1.1  # of corners, in radii: two of one colour that touch would be one
GAP = 2.0  # px between two objects that do not cross
TRIES = 40

Path = np.ndarray


def sample(
    generator: np.random.Generator,
    kind: str | None = None,
    *,
    held_out: bool = False,
    frames: int = FRAMES,
    motion: str | None = None,
) -> Scene:
    """A scene of one of `KINDS`; None: drawn by their shares. The same generator state gives the same scene.

    held_out: only of the pairs that the model never saw. motion: "straight", "fast", "curved", "leaving" for every
    object, instead of any.
    """
    kind = kind or str(generator.choice(list(KINDS), p=np.array(list(KINDS.values())) / sum(KINDS.values())))
    if kind not in KINDS:
        raise ValueError(f"unknown kind of scene {kind!r}; expected one of {', '.join(KINDS)}")
    if kind == "crossing":
        scene = sample_crossing(generator, frames=frames)
        pairs = [Pair(o.colour, o.shape) for o in scene.objects]
        paths, radii = [np.array(o.centres) for o in scene.objects], [o.radius for o in scene.objects]
    else:
        pairs = _sample_pairs(generator, kind, held_out)
        radii = [float(generator.uniform(*RADII[len(pairs)])) for _ in pairs]
        paths = _sample_paths(generator, kind, radii, frames, motion)
    places = kind if kind in ("sides", "heights") else "none"
    return _scene(generator, pairs, radii, paths, places)


def _scene(generator: np.random.Generator, pairs: Sequence[Pair], radii, paths: Sequence[Path], places: str) -> Scene:
    background = str(generator.choice(list(BACKGROUNDS)))
    striped = [STRIPES[pair.stripe] for pair in pairs if pair.stripe]
    while any(math.dist(BACKGROUNDS[background], stripe) < 0.4 for stripe in striped):  # else the band is a hole
        background = str(generator.choice(list(BACKGROUNDS)))
    textured = background not in DARK and generator.random() < TEXTURE_SHARE
    graded = not textured and generator.random() < GRADIENT_SHARE
    objects = tuple(
        Object(pair.colour, pair.shape, radius, tuple(map(tuple, path.tolist())), sample_jitter(generator), pair.stripe)
        for pair, radius, path in zip(pairs, radii, paths, strict=True)
    )
    return Scene(
        background,
        objects,
        float(generator.uniform(0.1, 0.25)) if graded else 0.0,
        int(generator.integers(4)),
        sample_jitter(generator),
        places,
        str(generator.choice(TEXTURES[1:])) if textured else TEXTURES[0],
        float(generator.uniform(0.17, 0.24)),
        float(generator.choice([12.8, 16.0, 64 / 3])),
    )


# --- what ---------------------------------------------------------------


def _sample_pairs(generator: np.random.Generator, kind: str, held_out: bool) -> list[Pair]:
    """The objects of a kind in the order of their caption. Beside each other: of other colours, except that "pair" has
    one in five of one colour and two shapes."""

    def draw(*, colours=(), without: Sequence[str] = ()) -> Pair:
        pairs = (Pair(*p) for p in product(COLOURS, SHAPES))
        options = [p for p in pairs if (p in HELD_OUT) == held_out and p.colour not in without]
        options = [p for p in options if p.colour in colours] or options
        return options[int(generator.integers(len(options)))]

    first = draw()
    if kind == "one":
        return [first]
    if kind == "part":
        first = first._replace(stripe=str(generator.choice(list(STRIPES))))
        beside = [draw(without=[first.colour])] if generator.random() < 0.3 else []
        pairs = [first, *beside]
        return pairs[::-1] if generator.random() < 0.5 else pairs
    if kind == "same":
        return [first] * (3 if generator.random() < 0.2 else 2)
    second = draw(without=[first.colour])
    if kind in ("sides", "heights"):
        return [first, second]
    if kind == "pair":
        one_colour = [Pair(first.colour, s) for s in SHAPES if s != first.shape]
        one_colour = [p for p in one_colour if (p in HELD_OUT) == held_out]
        if one_colour and generator.random() < 0.2:
            second = one_colour[int(generator.integers(len(one_colour)))]
        return [first, second]
    if generator.random() < 0.3:  # three, two of them equal
        return [first, first, second] if generator.random() < 0.5 else [second, first, first]
    return [first, second, draw(without=[first.colour, second.colour])]


# --- where --------------------------------------------------------------


def _sample_paths(
    generator: np.random.Generator, kind: str, radii: Sequence[float], frames: int, motion: str | None
) -> list[Path]:
    """One path (F, 2) an object, of which no two touch. Objects with places keep to their half of the image."""
    if kind in ("sides", "heights"):
        halves = [(1, 31.5), (32.5, SIZE - 1)]
        boxes = [(*half, 1, SIZE - 1) if kind == "sides" else (1, SIZE - 1, *half) for half in halves]
        return [_path(generator, box, r, frames, motion, stays=True) for box, r in zip(boxes, radii, strict=True)]
    box = (0, SIZE, 0, SIZE)
    for _ in range(TRIES):
        paths = [_path(generator, box, radius, frames, motion) for radius in radii]
        if _apart(paths, radii):
            return paths
    return _in_a_row(generator, radii, frames)


def _apart(paths: Sequence[Path], radii: Sequence[float]) -> bool:
    both = combinations(zip(paths, radii, strict=True), 2)
    return all(np.hypot(*(p - q).T).min() > REACH * (r + s) + GAP for (p, r), (q, s) in both)


def _in_a_row(generator: np.random.Generator, radii: Sequence[float], frames: int) -> list[Path]:
    """Side by side in random order, each moving up or down: always possible."""
    edges = np.linspace(0, SIZE, len(radii) + 1)
    boxes = [(edges[i], edges[i + 1], 0, SIZE) for i in generator.permutation(len(radii))]
    return [_path(generator, box, r, frames, "straight") for box, r in zip(boxes, radii, strict=True)]


def _path(
    generator: np.random.Generator,
    box: Sequence[float],
    radius: float,
    frames: int,
    motion: str | None,
    stays: bool = False,
) -> Path:
    """(F, 2) centres inside box (left, right, top, bottom), from which "leaving" departs unless it stays."""
    low = np.array([box[0] + radius, box[2] + radius])
    high = np.maximum(low, [box[1] - radius, box[3] - radius])
    start, end = generator.uniform(low, high), generator.uniform(low, high)
    shares = [1 - FAST_SHARE - CURVED_SHARE - LEAVING_SHARE, FAST_SHARE, CURVED_SHARE, LEAVING_SHARE]
    motion = motion or str(generator.choice(["straight", "fast", "curved", "leaving"], p=shares))
    time = np.linspace(0, 1, frames)[:, None]
    if motion == "leaving" and not stays:
        side = int(generator.integers(4))
        end[side % 2] = -0.3 * radius if side < 2 else SIZE + 0.3 * radius
        return start + time * (end - start) * min(1.0, FAST_TRAVEL[1] / max(math.dist(start, end), 1e-9))
    if motion == "fast":
        for _ in range(TRIES):
            if FAST_TRAVEL[0] <= math.dist(start, end) <= FAST_TRAVEL[1]:
                return start + time * (end - start)
            start, end = generator.uniform(low, high), generator.uniform(low, high)
    if motion == "curved":
        by = generator.uniform(low, high)
        curve = (1 - time) ** 2 * start + 2 * time * (1 - time) * by + time**2 * end
        centre = curve.mean(0)
        length = float(np.hypot(*np.diff(curve, axis=0).T).sum())
        return centre + (curve - centre) * min(1.0, 1.4 * MAX_TRAVEL / max(length, 1e-9))
    step = np.zeros(2) if generator.random() < STILL_SHARE else end - start
    return start + time * step * min(1.0, MAX_TRAVEL / max(float(np.hypot(*step)), 1e-9))
