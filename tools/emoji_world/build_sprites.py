"""Bring the emoji pictures from npm and build the sprite sheet that is committed beside this file.

    python tools/emoji_world/build_sprites.py [--folder .host/emoji]

Needs `npm`. The archive (16 MB) stays in the folder, which git ignores.
"""
# ruff: noqa: E402 (the pack is loaded before it is imported)

from __future__ import annotations

import argparse
import subprocess
import sys
import tarfile
from pathlib import Path

from PIL import Image

sys.path.append(str(Path(__file__).resolve().parents[1]))
from pack import ROOT, load_pack

load_pack(host=False)

from spacetime_edit.tools.emoji_world.sprites import CELL, CODES, COLUMNS, MARGIN, SHEET

PACKAGE = "@lobehub/fluent-emoji-3d@1.1.0"
ARCHIVE = "lobehub-fluent-emoji-3d-1.1.0.tgz"


def bring(folder: Path) -> Path:
    """The package's archive in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / ARCHIVE).is_file():
        subprocess.run(["npm", "pack", PACKAGE, "--silent"], cwd=folder, check=True)
    return folder / ARCHIVE


def square(picture: Image.Image) -> Image.Image:
    """The picture's opaque part, in the middle of a square of the sheet's cell."""
    part = picture.convert("RGBa").crop(picture.getchannel("A").point(lambda a: 255 * (a > 8)).getbbox())
    scale = (CELL - 2 * MARGIN) / max(part.size)
    part = part.resize([max(1, round(side * scale)) for side in part.size], Image.Resampling.LANCZOS)
    cell = Image.new("RGBa", (CELL, CELL))
    cell.paste(part.convert("RGBA"), ((CELL - part.width) // 2, (CELL - part.height) // 2))
    return cell


def build(archive: Path) -> Image.Image:
    """The sheet of all pictures, in the order of `CODES`."""
    rows = -(-len(CODES) // COLUMNS)
    sheet = Image.new("RGBA", (COLUMNS * CELL, rows * CELL))
    with tarfile.open(archive) as files:
        for i, code in enumerate(CODES.values()):
            with Image.open(files.extractfile(f"package/assets/{code}.webp")) as picture:
                sheet.paste(square(picture.convert("RGBA")), (i % COLUMNS * CELL, i // COLUMNS * CELL))
    return sheet


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / ".host" / "emoji")
    build(bring(parser.parse_args().folder)).save(SHEET, optimize=True)
    print(f"{SHEET.name}: {SHEET.stat().st_size / 1024:.0f} KiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
