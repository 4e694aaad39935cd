"""Clips as pictures and films for a person to look at. Clips are (F, 3, H, W) in [0, 1]."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

SHEET_FRAMES = (0, 2, 5, 7)
SHEET_SCALE = 2
FILM_SCALE = 4
FPS = 4
GAP = 6
HEADER = 16
INK = (30, 30, 30)
PAPER = (255, 255, 255)


def difference(a: Tensor, b: Tensor) -> Tensor:
    """|a - b| per channel: black where the clips agree."""
    return (a - b).abs().clamp(0, 1)


def side_by_side(*clips: Tensor) -> Tensor:
    """Clips of equal size as one wide clip."""
    return torch.cat(clips, dim=-1)


def pixels(clip: Tensor, scale: int = 1) -> np.ndarray:
    """(F, H * scale, W * scale, 3) uint8, each pixel repeated."""
    array = (clip.detach().float().cpu().clamp(0, 1) * 255).round().byte().movedim(1, -1).numpy()
    return np.ascontiguousarray(array.repeat(scale, axis=1).repeat(scale, axis=2))


def film_strip(clip: Tensor) -> Image.Image:
    """Frames 0, 2, 5 and 7 (those that the clip has) in a row, twice their size, a white line between two."""
    frames = pixels(clip, SHEET_SCALE)
    line = np.full((frames.shape[1], 1, 3), 255, np.uint8)
    shown = [part for i in SHEET_FRAMES if i < len(frames) for part in (frames[i], line)]
    return Image.fromarray(np.concatenate(shown[:-1], axis=1))


def contact_sheet(
    rows: Sequence[Sequence[Tensor]], labels: Sequence[str], row_labels: Sequence[str] = ()
) -> Image.Image:
    """A table of film strips. labels: one a column, drawn on top; row_labels: one a row, drawn above it."""
    strips = [[film_strip(clip) for clip in row] for row in rows]
    width, height = strips[0][0].size
    row_header = HEADER if row_labels else 0
    step_x, step_y = width + GAP, height + row_header + GAP
    sheet = Image.new("RGB", (GAP + step_x * len(labels), GAP + HEADER + step_y * len(rows)), PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, text in enumerate(labels):
        draw.text((GAP + column * step_x, 3), text, fill=INK)
    for index, row in enumerate(strips):
        top = HEADER + index * step_y
        if row_labels:
            draw.text((GAP, top + 3), row_labels[index], fill=INK)
        for column, strip in enumerate(row):
            sheet.paste(strip, (GAP + column * step_x, top + row_header))
    return sheet


def save_webp(path: Path, clip: Tensor, fps: int = FPS, scale: int = FILM_SCALE) -> None:
    """A looping, lossless animation."""
    images = [Image.fromarray(frame) for frame in pixels(clip, scale)]
    images[0].save(path, save_all=True, append_images=images[1:], duration=1000 // fps, loop=0, lossless=True)


def video_encoder() -> tuple[str, dict[str, str]]:
    """H.264 where this PyAV has it, else MPEG-4, with options for good quality."""
    if "libx264" in av.codecs_available:
        return "libx264", {"crf": "12"}
    return "mpeg4", {"qscale": "2"}


def save_mp4(path: Path, clip: Tensor, fps: int = FPS, scale: int = FILM_SCALE, repeats: int = 4) -> None:
    """The clip `repeats` times over (8 frames last 2 s). Height and width times scale must be even."""
    frames = pixels(clip, scale)
    codec, options = video_encoder()
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(fps), options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in np.concatenate([frames] * repeats):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
