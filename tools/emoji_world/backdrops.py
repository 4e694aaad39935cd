"""What is behind the things: meadow, beach, snow and night sky, smooth and of little noise, and plain colours."""

from __future__ import annotations

import numpy as np
from PIL import Image

SIZE = 64
RGB = tuple[float, float, float]

PLAIN: dict[str, RGB] = {
    "blue": (0.30, 0.48, 0.88),
    "green": (0.30, 0.66, 0.42),
    "pink": (0.95, 0.62, 0.76),
    "gray": (0.56, 0.56, 0.58),
}
LANDS = ("meadow", "beach", "snow")
"""Backdrops with a ground, on which most things stay."""
PLACES = (*LANDS, "night sky")
BACKDROPS = (*PLACES, *PLAIN)

_SKIES: dict[str, tuple[RGB, RGB]] = {  # at the top, at the horizon
    "meadow": ((0.42, 0.68, 0.96), (0.78, 0.90, 1.00)),
    "beach": ((0.38, 0.66, 0.95), (0.70, 0.88, 0.98)),
    "snow": ((0.52, 0.66, 0.84), (0.76, 0.84, 0.93)),
    "night sky": ((0.05, 0.07, 0.26), (0.24, 0.20, 0.50)),
}
_GROUNDS: dict[str, tuple[RGB, RGB]] = {  # at the horizon, at the bottom
    "meadow": ((0.45, 0.76, 0.30), (0.22, 0.56, 0.18)),
    "beach": ((0.98, 0.92, 0.74), (0.93, 0.82, 0.58)),
    "snow": ((0.90, 0.95, 1.00), (0.74, 0.84, 0.97)),
}
_SEA: tuple[RGB, RGB] = ((0.12, 0.50, 0.78), (0.30, 0.76, 0.84))
_PATCHES = {"meadow": 0.22, "beach": 0.09, "snow": 0.09, "night sky": 0.5}
"""Relative difference in brightness between the lightest and the darkest parts of a surface."""
TINT = 0.025
EDGE = 0.9
"""Px over which one surface passes into the next."""


def backdrop(name: str, horizon: float, seed: int) -> np.ndarray:
    """(64, 64, 3) float32 in [0, 1]. horizon: share of the height above the ground; seed: of tint, patches, stars."""
    generator = np.random.default_rng(seed)
    tint = generator.uniform(-TINT, TINT, 3)
    if name in PLAIN:
        shade = 1 + generator.uniform(-0.10, 0.10) * np.linspace(-1, 1, SIZE)
        turned = generator.random() < 0.5
        image = np.array(PLAIN[name]) * np.broadcast_to(shade[None, :, None], (SIZE, SIZE, 1))
        return _finished(image.swapaxes(0, 1) if turned else image, tint)
    y = (np.arange(SIZE) + 0.5)[:, None, None]
    if name == "night sky":
        image = _ramp(_SKIES[name], y / SIZE) * (1 + _PATCHES[name] * _patches(generator, 4))
        return _finished(image + _stars(generator), tint)
    if name not in LANDS:
        raise ValueError(f"unknown backdrop {name!r}; expected one of {', '.join(BACKDROPS)}")
    line = horizon * SIZE + (0 if name == "beach" else _hills(generator))
    image = _ramp(_SKIES[name], y / (horizon * SIZE))
    if name == "beach":
        shore = line + generator.uniform(5, 9)
        image = _over(image, _ramp(_SEA, (y - line) / (shore - line)), y - line)
        line = shore + 0.5 * _hills(generator)
    ground = _ramp(_GROUNDS[name], (y - line) / (SIZE - line)) * (1 + _PATCHES[name] * _patches(generator, 7))
    return _finished(_over(image, ground, y - line), tint)


def _ramp(colours: tuple[RGB, RGB], share: np.ndarray) -> np.ndarray:
    """From the first colour (share 0) to the second (share 1)."""
    share = np.clip(share, 0, 1)
    return np.array(colours[0]) * (1 - share) + np.array(colours[1]) * share


def _over(image: np.ndarray, surface: np.ndarray, depth: np.ndarray) -> np.ndarray:
    """The surface where depth (px below its upper edge) is positive, else the image."""
    cover = np.clip(depth / EDGE + 0.5, 0, 1)
    return image * (1 - cover) + surface * cover


def _patches(generator: np.random.Generator, cells: int) -> np.ndarray:
    """(64, 64, 1) in about [-0.5, 0.5]: smooth noise whose patches are 64 / cells px large."""
    coarse = Image.fromarray(generator.random((cells, cells), dtype=np.float32))
    return np.asarray(coarse.resize((SIZE, SIZE), Image.Resampling.BICUBIC))[..., None] - 0.5


def _hills(generator: np.random.Generator) -> np.ndarray:
    """(64, 1) px that a horizon lies below its mean: one long wave."""
    x = np.linspace(0, 2 * np.pi, SIZE)[:, None]
    return generator.uniform(0.5, 2.5) * np.sin(generator.uniform(0.5, 1.1) * x + generator.uniform(0, 2 * np.pi))


def _stars(generator: np.random.Generator) -> np.ndarray:
    """(64, 64, 1): 8 to 14 soft dots."""
    n = int(generator.integers(8, 15))
    x, y = generator.uniform(0, SIZE, (2, n, 1))
    light, width = generator.uniform(0.35, 0.8, (n, 1)), generator.uniform(0.7, 1.0, (n, 1))
    at = np.arange(SIZE) + 0.5
    across, along = (np.exp(-0.5 * ((at - centre) / width) ** 2) for centre in (x, y))
    return ((light * along).T @ across)[..., None]


def _finished(image: np.ndarray, tint: np.ndarray) -> np.ndarray:
    return np.clip(image + tint, 0, 1).astype(np.float32)
