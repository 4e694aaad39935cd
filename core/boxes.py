"""Masks from boxes that are given for some frames and move between them."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

Box = tuple[float, float, float, float]
"""x, y of the upper left corner, width and height in pixels."""

NUMBER = r"-?\d+(?:\.\d+)?"
LINE = re.compile(rf"(?:(\d+)\s*:)?\s*({NUMBER})[\s,]+({NUMBER})[\s,]+({NUMBER})[\s,]+({NUMBER})")


def parse_boxes(text: str) -> list[dict[int, Box]]:
    """Boxes by the frames that they are given for, from lines such as "0: 10, 20, 30, 40".

    An empty line begins another box; a line without a frame is of frame 0. Raises ValueError naming the line.
    """
    boxes: list[dict[int, Box]] = [{}]
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.strip()
        if not line:
            boxes.append({})
            continue
        match = LINE.fullmatch(line)
        if not match:
            raise ValueError(f"boxes: line {number} is {line!r}; expected frame: x, y, width, height in pixels")
        frame, box = int(match[1] or 0), tuple(float(v) for v in match.groups()[1:])
        if min(box[2:]) <= 0:
            raise ValueError(f"boxes: line {number} is {line!r}; width and height must be above 0")
        if frame in boxes[-1]:
            raise ValueError(f"boxes: line {number} gives frame {frame} again; put an empty line before another box")
        boxes[-1][frame] = box
    return [keys for keys in boxes if keys]


def box_at(keys: dict[int, Box], frame: int) -> Box:
    """The box at a frame: on a straight way between the frames that it is given for, held before and after them."""
    frames = sorted(keys)
    before = max((f for f in frames if f <= frame), default=frames[0])
    after = min((f for f in frames if f >= frame), default=frames[-1])
    share = 0.0 if before == after else (frame - before) / (after - before)
    return tuple(a + share * (b - a) for a, b in zip(keys[before], keys[after], strict=True))


def mask_of_boxes(boxes: Sequence[Sequence[Box]], height: int, width: int) -> Tensor:
    """(F, height, width): for each frame 1 where the centre of a pixel lies in any of its boxes, else 0."""
    mask = torch.zeros(len(boxes), height, width)
    y, x = torch.arange(height) + 0.5, torch.arange(width) + 0.5
    for frame, of_frame in enumerate(boxes):
        for left, top, wide, tall in of_frame:
            inside = ((y >= top) & (y < top + tall))[:, None] & ((x >= left) & (x < left + wide))
            mask[frame][inside] = 1
    return mask
