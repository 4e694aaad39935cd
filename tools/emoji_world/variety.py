"""Scenes of every kind that the model is trained on: one or two things, in all forms of caption, in all motions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np

from .backdrops import LANDS, SIZE
from .world import BACKGROUNDS, FRAMES, THINGS, Object, Pose, Scene

KINDS: dict[str, float] = {
    "one": 0.28,  # a cat
    "sides": 0.18,  # a cat on the left and a dog on the right
    "heights": 0.10,  # a cat at the top and a dog at the bottom
    "pair": 0.20,  # a cat and a dog, anywhere
    "same": 0.18,  # two cats
    "crossing": 0.06,  # two that change sides, one before the other
}
"""Share of each kind in training."""

PATHS: dict[str, float] = {
    "straight": 0.28,
    "curved": 0.14,
    "hop": 0.16,
    "still": 0.10,
    "near": 0.12,
    "swing": 0.08,
    "fast": 0.08,
    "leaving": 0.04,
}
MANNERS: dict[str, float] = {"plain": 0.62, "tilt": 0.16, "squash": 0.12, "flip": 0.10}
"""What a thing does on its way."""
FREE = ("straight", "curved", "still", "near", "fast")
"""Paths that have a manner besides; the others are plain."""

BACKDROP_SHARES = {name: 0.15 if name not in ("blue", "green", "pink", "gray") else 0.10 for name in BACKGROUNDS}
SIZES = {1: (25.0, 37.0), 2: (21.0, 27.5)}
"""Px of a thing's picture: of one, of two."""
HORIZONS = (0.22, 0.42)
TRAVEL, FAST_TRAVEL = 24.0, (24.0, 42.0)
LEAN = 8.0
"""Degrees to either side that a thing stands aslant."""
AIRBORNE = frozenset({"rocket"})
ROUND = frozenset({"football"})
ROLL_SHARE = 0.6
"""Of the ways of a round thing."""
EQUAL_SHARE = 0.12
"""Of equal things where the caption tells places."""
APART = 1.06
GAP = 1.5
TRIES = 40
EDGE_ON = 0.4
"""Of its width that a thing shows at least while it flips."""
SMALLEST = 17.0
"""Px of a thing that is far."""


class Box(NamedTuple):
    """Px between which a thing stays."""

    left: float = 0.0
    right: float = SIZE
    top: float = 0.0
    bottom: float = SIZE

    def within(self, radius: float) -> tuple[np.ndarray, np.ndarray]:
        """Lowest and highest centre (2,) of a thing of this radius."""
        low, high = np.array([self.left, self.top]) + radius, np.array([self.right, self.bottom]) - radius
        middle = (low + high) / 2
        return np.minimum(low, middle), np.maximum(high, middle)


def sample(
    generator: np.random.Generator,
    kind: str | None = None,
    *,
    frames: int = FRAMES,
    background: str | None = None,
    things: Sequence[str] | None = None,
    path: str | None = None,
    manner: str | None = None,
) -> Scene:
    """A scene of one of `KINDS`; None: drawn by their shares. The same generator state gives the same scene.

    background, things, path (of `PATHS`, or "roll") and manner (of `MANNERS`): instead of any. Raises ValueError for
    an unknown kind.
    """
    kind = kind or _draw(generator, KINDS)
    if kind not in KINDS:
        raise ValueError(f"unknown kind of scene {kind!r}; expected one of {', '.join(KINDS)}")
    background = background or _draw(generator, BACKDROP_SHARES)
    horizon = float(generator.uniform(*HORIZONS))
    names = tuple(things or _sample_things(generator, kind))
    sizes = [float(generator.uniform(*SIZES[len(names)])) for _ in names]
    if kind == "crossing":
        ways = _crossing(generator, names, sizes, frames)
    else:
        boxes = [_box(kind, i, name, background, horizon) for i, name in enumerate(names)]
        ways = _apart_ways(generator, names, sizes, boxes, frames, path, manner, stays=kind in ("sides", "heights"))
    objects = tuple(Object(name, way) for name, way in zip(names, ways, strict=True))
    places = kind if kind in ("sides", "heights") else "none"
    return Scene(background, objects, places, horizon, int(generator.integers(2**31)))


def _draw(generator: np.random.Generator, shares: dict[str, float]) -> str:
    chances = np.array(list(shares.values()))
    return str(generator.choice(list(shares), p=chances / chances.sum()))


def _sample_things(generator: np.random.Generator, kind: str) -> list[str]:
    """In the order of their caption."""
    first, second = (THINGS[i] for i in generator.choice(len(THINGS), 2, replace=False))
    if kind == "one":
        return [first]
    equal = kind == "same" or (kind in ("sides", "heights") and generator.random() < EQUAL_SHARE)
    return [first, first if equal else second]


def _box(kind: str, index: int, thing: str, background: str, horizon: float) -> Box:
    """Where a thing may be: its half of the picture, and on land not high up in the sky."""
    middle = SIZE / 2
    if kind == "heights":
        return Box(1, SIZE - 1, 0, middle) if index == 0 else Box(1, SIZE - 1, middle, SIZE)
    top = horizon * SIZE - 6 if background in LANDS and thing not in AIRBORNE else 0.0
    if kind == "sides":
        return Box(1, middle - 0.5, top, SIZE - 1) if index == 0 else Box(middle + 0.5, SIZE - 1, top, SIZE - 1)
    return Box(0, SIZE, top, SIZE)


# --- ways ---------------------------------------------------------------


def _apart_ways(generator, names, sizes, boxes, frames, path, manner, stays) -> list[tuple[Pose, ...]]:
    """One way a thing, of which no two touch; things with places keep to their boxes."""

    def ways(boxes: Sequence[Box], path: str | None) -> list[tuple[Pose, ...]]:
        of_all = zip(names, sizes, boxes, strict=True)
        return [sample_way(generator, *of_one, frames, path, manner, stays) for of_one in of_all]

    for _ in range(1 if stays else TRIES):
        found = ways(boxes, path)
        if stays or _apart(found):
            return found
    edges = np.linspace(0, SIZE, len(names) + 1)
    order = generator.permutation(len(names))
    return ways([boxes[i]._replace(left=edges[j], right=edges[j + 1]) for i, j in enumerate(order)], path or "straight")


def _apart(ways: Sequence[Sequence[Pose]]) -> bool:
    def clear(p: Pose, q: Pose) -> bool:
        radii = (max(abs(p.width), p.height) + max(abs(q.width), q.height)) / 2
        return math.hypot(p.x - q.x, p.y - q.y) > APART * radii + GAP

    return all(clear(p, q) for a, b in combinations(ways, 2) for p, q in zip(a, b, strict=True))


def sample_way(
    generator: np.random.Generator,
    thing: str,
    size: float,
    box: Box,
    frames: int = FRAMES,
    path: str | None = None,
    manner: str | None = None,
    stays: bool = False,
) -> tuple[Pose, ...]:
    """Poses of a thing of about `size` px inside the box, from which "leaving" departs unless it stays."""
    shares = {name: share for name, share in PATHS.items() if not (stays and name == "leaving")}
    if path is None:
        path = "roll" if thing in ROUND and generator.random() < ROLL_SHARE else _draw(generator, shares)
    if manner is None:
        manner = _draw(generator, MANNERS) if path in FREE else "plain"
    time = np.linspace(0, 1, frames)
    lean = float(generator.uniform(-LEAN, LEAN))
    centres, turn, scale = _PATHS[path](generator, size, box, time)
    if path != "leaving":
        low, high = box.within(size / 2)
        centres = np.clip(centres, low, high)
    wide, tall, tilt = _manner(generator, manner, path, time)
    mirrored = -1.0 if _faces_right(generator, thing, centres) else 1.0
    columns = (*centres.T, mirrored * size * scale * wide, size * scale * tall, lean + turn + tilt)
    return tuple(Pose(*row) for row in np.stack(np.broadcast_arrays(*columns), 1).tolist())


def _faces_right(generator: np.random.Generator, thing: str, centres: np.ndarray) -> bool:
    """Whether a picture is mirrored: vehicles look where they go, the others either way."""
    across = centres[-1, 0] - centres[0, 0]
    if abs(across) < 2 or thing not in ("car", "rocket"):
        return bool(generator.random() < 0.5)
    return bool(across > 0) if thing == "car" else bool(across < 0)  # the rocket's own picture flies to the right


def _ends(generator: np.random.Generator, size: float, box: Box) -> np.ndarray:
    """Two points (2, 2) inside the box."""
    return generator.uniform(*box.within(size / 2), (2, 2))


def _limited(points: np.ndarray, travel: float) -> np.ndarray:
    """The curve (F, 2), shrunk around its middle to at most this length."""
    length = float(np.hypot(*np.diff(points, axis=0).T).sum())
    middle = points.mean(0)
    return middle + (points - middle) * min(1.0, travel / max(length, 1e-9))


# A path is a function of (generator, size, box, time (F,)): centres (F, 2), turn in degrees (F,) or 0, scale (F,) or 1.


def _still(generator, size, box, time):
    return np.repeat(_ends(generator, size, box)[:1], len(time), 0), 0.0, 1.0


def _straight(generator, size, box, time, travel=TRAVEL):
    start, end = _ends(generator, size, box)
    return _limited(start + time[:, None] * (end - start), travel), 0.0, 1.0


def _fast(generator, size, box, time):
    for _ in range(TRIES):
        start, end = _ends(generator, size, box)
        if math.dist(start, end) >= FAST_TRAVEL[0]:
            break
    return _limited(start + time[:, None] * (end - start), FAST_TRAVEL[1]), 0.0, 1.0


def _curved(generator, size, box, time):
    start, end = _ends(generator, size, box)
    by, t = _ends(generator, size, box)[0], time[:, None]
    return _limited((1 - t) ** 2 * start + 2 * t * (1 - t) * by + t**2 * end, 1.4 * TRAVEL), 0.0, 1.0


def _hop(generator, size, box, time):
    """Leaps under gravity, from the ground to a height that the box has room for."""
    low, high = box.within(size / 2)
    start, end = _ends(generator, size, box)
    ground = generator.uniform((low[1] + high[1]) / 2, high[1])
    leaps, phase = generator.uniform(0.9, 1.8), generator.uniform(0, 1)
    height = min(generator.uniform(7, 15), ground - low[1])
    part = (leaps * time + phase) % 1
    across = _limited(np.stack([start[0] + time * (end[0] - start[0]), np.zeros_like(time)], 1), TRAVEL)[:, 0]
    return np.stack([across, ground - height * 4 * part * (1 - part)], 1), 0.0, 1.0


def _near(generator, size, box, time):
    """It comes near, or goes away: from `SMALLEST` px to `size`."""
    centres, _, _ = _straight(generator, size, box, time, 12.0)
    scale = np.geomspace(min(1.0, max(generator.uniform(0.55, 0.75), SMALLEST / size)), 1.0, len(time))
    return centres, 0.0, scale[::-1] if generator.random() < 0.4 else scale


def _swing(generator, size, box, time):
    """A pendulum that hangs from a point above the thing."""
    middle = _ends(generator, size, box)[0]
    rope, reach = generator.uniform(22, 34), generator.uniform(14, 24)
    angle = reach * np.sin(2 * np.pi * (generator.uniform(0.6, 1.1) * time + generator.uniform(0, 1)))
    around = np.radians(angle)
    return middle + rope * np.stack([np.sin(around), np.cos(around) - 1], 1), -angle, 1.0


def _roll(generator, size, box, time):
    """Along the ground, turned as far as it goes."""
    start, end = _ends(generator, size, box)
    slope = np.clip(end[1] - start[1], -5, 5)
    centres = _limited(start + time[:, None] * np.array([end[0] - start[0], slope]), 30.0)
    return centres, np.degrees((centres[:, 0] - centres[0, 0]) / (size / 2)), 1.0


def _leaving(generator, size, box, time):
    start, end = _ends(generator, size, box)
    end[0] = -0.2 * size if start[0] < SIZE / 2 else SIZE + 0.2 * size
    return start + time[:, None] * (end - start) * min(1.0, FAST_TRAVEL[1] / math.dist(start, end)), 0.0, 1.0


_PATHS = {
    "still": _still,
    "straight": _straight,
    "fast": _fast,
    "curved": _curved,
    "hop": _hop,
    "near": _near,
    "swing": _swing,
    "roll": _roll,
    "leaving": _leaving,
}


def _manner(generator, manner: str, path: str, time: np.ndarray):
    """Factors of width and height, and degrees (each (F,) or a number)."""
    wave = np.sin(2 * np.pi * (generator.uniform(0.6, 1.3) * time + generator.uniform(0, 1)))
    if manner == "tilt":
        return 1.0, 1.0, generator.uniform(10, 20) * wave
    if manner == "squash":
        return 1 + 0.14 * np.minimum(wave, 0), 1 - 0.14 * np.maximum(wave, 0), 0.0
    if manner == "flip":  # once around its upright axis, seen from the side for a moment
        around = np.cos(np.pi * np.clip((time - generator.uniform(0.2, 0.45)) / 0.5, 0, 1))
        return np.copysign(np.maximum(np.abs(around), EDGE_ON), around), 1.0, 0.0
    return 1.0, 1.0, 0.0


def _crossing(generator, names, sizes, frames) -> list[tuple[Pose, ...]]:
    """Two that exchange sides, the second before the first; one passes a little above the other."""
    size, time = max(sizes), np.linspace(0, 1, frames)[:, None]
    low, high = np.array([size / 2, 0.75 * size]), np.array([SIZE / 2 - 2 - size / 2, SIZE - 0.75 * size])
    low, high = np.minimum(low, high), np.maximum(low, high)
    left, right = generator.uniform(low, high), np.array([SIZE, 0]) + [-1, 1] * generator.uniform(low, high)
    lift = np.array([0, generator.choice([-0.3, 0.3]) * size])
    ways = []
    for name, own, (start, end) in zip(names, sizes, ((left, right), (right + lift, left + lift)), strict=True):
        centres = start + time * (end - start)
        mirrored, lean = -1 if _faces_right(generator, name, centres) else 1, generator.uniform(-LEAN, LEAN)
        ways.append(tuple(Pose(float(x), float(y), mirrored * own, own, float(lean)) for x, y in centres))
    return ways
