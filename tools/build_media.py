"""Write docs/edits.webp, the animation at the top of the README, and the registry's icon and banner.

    python tools/build_media.py [--only-drawn]

The animation is four tiny templates' own films, clip beside edit, by the embedded model. --only-drawn: icon and banner
alone, which need no server.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from build_thumbnails import film_of
from pack import ROOT, host_path
from PIL import Image, ImageDraw, ImageFont
from server import LiveServer
from templates import WORKFLOWS

DOCS = ROOT / "docs"
FILMS = {
    "STR-Match: another shape, the same motion": "Swap an object - STR-Match (tiny)",
    "ST-Layout: two phrases, each in its region": "Two objects become two others - ST-Layout (tiny)",
    "DreamMotion: another colour": "Recolour the clip - DreamMotion (tiny)",
    "STR-Match with a mask: the background stays": "Keep the background exactly - STR-Match with mask (tiny)",
}
FILM, CAPTION, MILLISECONDS = (400, 200), 26, 160
DARK, RED, BLUE, LIGHT = "#16181d", "#e5383b", "#4361ee", "#f1f3f5"
ICON, BANNER = 400, (1344, 576)


def frames_of(film: Path) -> list[Image.Image]:
    with Image.open(film) as image:
        found = []
        for index in range(image.n_frames):
            image.seek(index)
            found.append(image.convert("RGB").resize(FILM, Image.Resampling.BICUBIC))
        return found


def animation(films: dict[str, list[Image.Image]]) -> list[Image.Image]:
    """The films in two columns, each below its caption."""
    width, height = FILM[0] * 2 + 4, (FILM[1] + CAPTION) * 2
    font, frames = ImageFont.load_default(15), []
    for index in range(min(map(len, films.values()))):
        page = Image.new("RGB", (width, height), DARK)
        pen = ImageDraw.Draw(page)
        for place, (caption, film) in enumerate(films.items()):
            x, y = (place % 2) * (FILM[0] + 4), (place // 2) * (FILM[1] + CAPTION)
            pen.text((x + 6, y + 4), caption, LIGHT, font)
            page.paste(film[index], (x, y + CAPTION))
        frames.append(page)
    return frames


def mark(size: int) -> Image.Image:
    """A circle that becomes a square over three frames of a film."""
    large = 4 * size
    picture = Image.new("RGB", (large, large), DARK)
    pen = ImageDraw.Draw(picture)
    for step, (offset, colour) in enumerate(((0.0, "#3d4148"), (0.09, "#5c6370"), (0.18, LIGHT))):
        side = 0.56 * large
        left = (0.13 + offset) * large
        pen.rounded_rectangle((left, left, left + side, left + side), 0.05 * large, DARK, colour, large // 50)
        if step == 2:
            middle, half = left + side / 2, 0.17 * large
            pen.pieslice((middle - half, middle - half, middle + half, middle + half), 90, 270, RED)
            pen.rectangle((middle, middle - half, middle + half, middle + half), BLUE)
    return picture.resize((size, size), Image.Resampling.LANCZOS)


def banner() -> Image.Image:
    picture = Image.new("RGB", BANNER, DARK)
    picture.paste(mark(ICON), (80, 88))
    pen = ImageDraw.Draw(picture)
    pen.text((540, 190), "Spacetime Edit", LIGHT, ImageFont.load_default(88))
    pen.text((544, 310), "edit a video with a prompt, without training", "#adb5bd", ImageFont.load_default(34))
    return picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only-drawn", action="store_true")
    arguments = parser.parse_args()
    mark(ICON).save(DOCS / "icon.png", optimize=True)
    banner().save(DOCS / "banner.png", optimize=True)
    if arguments.only_drawn:
        return
    with LiveServer(host_path()) as server:
        films = {text: frames_of(film_of(server, WORKFLOWS / f"{name}.json")) for text, name in FILMS.items()}
    first, *others = animation(films)
    options = {"save_all": True, "append_images": others, "duration": MILLISECONDS, "loop": 0}
    first.save(DOCS / "edits.webp", quality=80, method=6, **options)
    print((DOCS / "edits.webp").stat().st_size, "bytes")


if __name__ == "__main__":
    main()
