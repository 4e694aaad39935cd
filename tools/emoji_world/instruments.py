"""What a clip of the emoji world shows, found without the truth: things, where they are, and the background.

A small network (`Detector`, trained by `train_emoji.train_detector` on renders and on what a VAE makes of them) marks
the centre of each thing. Clips are (F, 3, 64, 64) in [0, 1].
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import max_pool2d, relu

from .world import BACKGROUNDS, SIZE, THINGS, Description

WEIGHTS = Path(__file__).with_name("detector.safetensors")
CELL = 4
"""Px of a cell of the detector's map."""
SURE, WEAK = 0.4, 0.1
"""Scores above which a centre counts by itself, and where a frame nearby has a sure one of the same thing: a thing that
flips is a narrow strip for a moment."""
LINK_FRAMES, LINK_PX = 2, 9.0
"""How many frames away, and how far for each of them."""
NEAR = 3
"""Cells around a centre in which there is no other."""
FAR_PX = 32.0
"""Distance that counts where a thing is not there."""


class Detector(nn.Module):
    """(B, 3, 64, 64) in [0, 1] -> logits of a centre (B, 8 things, 16, 16), the centre's place in its cell
    (B, 2, 16, 16) in cells, and logits of the background (B, 8)."""

    def __init__(self, width: int = 48):
        super().__init__()
        self.stem = nn.ModuleList([_conv(3, width // 2, 3), _conv(width // 2, width, 4, 2), _conv(width, width, 4, 2)])
        self.body = nn.ModuleList([_conv(width, width, 3, dilation=d) for d in (1, 2, 1, 2, 1, 1)])
        self.centres = nn.Conv2d(width, len(THINGS) + 2, 1)
        self.behind = nn.Sequential(nn.Linear(2 * width, width), nn.ReLU(), nn.Linear(width, len(BACKGROUNDS)))
        nn.init.constant_(self.centres.bias, -3.0)

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = frames * 2 - 1
        for layer in self.stem:
            x = relu(layer(x))
        coarse = x
        for layer in self.body:
            x = x + relu(layer(x))
        found = self.centres(x)
        behind = self.behind(torch.cat([coarse.mean((2, 3)), x.mean((2, 3))], 1))
        return found[:, :-2], found[:, -2:], behind


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    padding = (kernel - 1) // 2 * dilation
    layers = nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation), nn.GroupNorm(8, outputs)
    return nn.Sequential(*layers)


@cache
def detector() -> Detector:
    """The trained one."""
    network = Detector()
    network.load_state_dict({name: value.float() for name, value in load_file(WEIGHTS).items()})
    return network.eval().requires_grad_(False)


@dataclass(frozen=True)
class Found:
    """A thing in one frame, its centre (x, y) in px, and how sure it is, in [0, 1]."""

    thing: str
    centre: tuple[float, float]
    score: float


@dataclass(frozen=True)
class Sight:
    """What a clip shows: things of each frame, the surest first, and the background."""

    frames: tuple[tuple[Found, ...], ...]
    background: str


@torch.no_grad()
def look(frames: Tensor, network: Detector | None = None) -> Sight:
    """What the clip (F, 3, 64, 64) shows."""
    network = network or detector()
    logits, places, behind = network(frames.float().clamp(0, 1))
    chances = logits.sigmoid()
    best, which = chances.max(1)
    peaks = (best == max_pool2d(best, 2 * NEAR + 1, 1, NEAR)) & (best > WEAK)
    found: list[list[Found]] = [[] for _ in frames]
    for i, y, x in torch.nonzero(peaks).tolist():
        centre = CELL * (x + float(places[i, 0, y, x])), CELL * (y + float(places[i, 1, y, x]))
        found[i].append(Found(THINGS[int(which[i, y, x])], centre, float(best[i, y, x])))
    name = list(BACKGROUNDS)[int(behind.log_softmax(1).mean(0).argmax())]
    return Sight(_linked(found), name)


def _linked(found: Sequence[Sequence[Found]]) -> tuple[tuple[Found, ...], ...]:
    """The sure ones, and the weak ones with a sure one nearby; of each frame the surest first."""

    def kept(i: int, weak: Found) -> bool:
        return weak.score > SURE or any(
            sure.score > SURE
            and sure.thing == weak.thing
            and math.dist(sure.centre, weak.centre) < LINK_PX * abs(i - j)
            for j in range(max(0, i - LINK_FRAMES), min(len(found), i + LINK_FRAMES + 1))
            for sure in found[j]
        )

    frames = (sorted((f for f in of if kept(i, f)), key=lambda f: -f.score) for i, of in enumerate(found))
    return tuple(map(tuple, frames))


def attributes(frames: Tensor, description: Description, network: Detector | None = None) -> dict[str, float]:
    """Shares in [0, 1] of what the caption asks for that the clip shows.

    thing: of the objects, those that at least half of the frames show, two equal ones where two are asked for. places:
    1 if the two stand as told in at least half of the frames that show both. background: 0 or 1. all: 1 if all of these
    are 1. count: 1 if every frame shows the right number of things, whatever they are.
    """
    seen = look(frames, network)
    result = {
        "thing": _shown(seen.frames, description.objects),
        "background": float(seen.background == description.background),
    }
    if len(description.objects) == 2 and description.places != "none":
        result["places"] = _in_order(seen.frames, description.objects, 0 if description.places == "sides" else 1)
    result["all"] = float(all(value == 1 for value in result.values()))
    result["count"] = float(all(len(of_frame) == len(description.objects) for of_frame in seen.frames))
    return result


def _shown(found: Sequence[Sequence[Found]], wanted: Sequence[str]) -> float:
    frames = [Counter(f.thing for f in of_frame) for of_frame in found]
    shown = sum(
        np.mean([counts[name] >= number for counts in frames]) >= 0.5
        for name, times in Counter(wanted).items()
        for number in range(1, times + 1)
    )
    return shown / len(wanted)


def _in_order(found: Sequence[Sequence[Found]], wanted: Sequence[str], axis: int) -> float:
    """1 if the things along the axis are the wanted ones in their order, in most frames that show two."""
    verdicts = []
    for of_frame in found:
        if len(of_frame) >= 2:
            ordered = sorted(of_frame[:2], key=lambda f: f.centre[axis])
            verdicts.append([f.thing for f in ordered] == list(wanted))
    return float(len(verdicts) > 0 and np.mean(verdicts) >= 0.5)


def trajectory_error_px(
    frames: Tensor, centres: Sequence[Sequence[tuple[float, float]]], network: Detector | None = None
) -> float:
    """Distance between each object's centre (K, F points) and the nearest thing found, mean over objects and frames.

    A frame that shows nothing counts as `FAR_PX`, as does a thing further off; whatever the thing is.
    """
    seen = look(frames, network).frames
    errors = [
        min([FAR_PX, *(float(np.hypot(f.centre[0] - x, f.centre[1] - y)) for f in of_frame)])
        for of_object in centres
        for of_frame, (x, y) in zip(seen, of_object, strict=True)
        if 0 <= x <= SIZE and 0 <= y <= SIZE
    ]
    return float(np.mean(errors))
