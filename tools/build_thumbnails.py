"""Write workflows/<name>.jpg for every template: left half source, right half edit.

    python tools/build_thumbnails.py [--only WORDS | --missing]

Runs the tiny templates on a live server; a thumbnail is the middle frame of the template's own `clip | edit` film. A
template that needs a download gets the tiny result of STR-Match, grey, with the model's name on it.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from pack import host_path
from PIL import Image, ImageDraw, ImageFont, ImageOps
from server import LiveServer
from templates import WORKFLOWS, api_path, is_tiny, read, templates

STAND_IN = "Swap an object - STR-Match (tiny)"
SIZE = (512, 256)
QUALITY = 85


def film_of(server: LiveServer, template: Path) -> Path | None:
    """Run a template; the animation that it saves, None where it saves none."""
    graph = read(api_path(template))
    if not any(node["class_type"] == "SaveAnimatedWEBP" for node in graph.values()):
        return None
    (saver,) = [node_id for node_id, node in graph.items() if node["class_type"] == "SaveAnimatedWEBP"]
    entry = server.queue(graph)
    (film,) = server.output_files({"outputs": {saver: entry["outputs"][saver]}})
    return film


def middle_frame(film: Path) -> Image.Image:
    """The middle frame of an animation, RGB, in SIZE."""
    with Image.open(film) as image:
        image.seek(image.n_frames // 2)
        return image.convert("RGB").resize(SIZE, Image.Resampling.BICUBIC)


def labelled(picture: Image.Image, text: str) -> Image.Image:
    """A grey, darker copy with text in its middle."""
    picture = ImageOps.grayscale(picture).point(lambda value: value // 2).convert("RGB")
    centre = (SIZE[0] // 2, SIZE[1] // 2)
    ImageDraw.Draw(picture).text(centre, text, "white", ImageFont.load_default(56), anchor="mm")
    return picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="of tiny templates, those with these words in their name")
    parser.add_argument("--missing", action="store_true", help="those that have no picture yet")
    arguments = parser.parse_args()
    only = arguments.only
    chosen = [template for template in templates() if only in template.stem and (is_tiny(template) or not only)]
    if arguments.missing:
        chosen = [template for template in chosen if not template.with_suffix(".jpg").exists()]
    pictures = {}
    with LiveServer(host_path()) as server:
        for template in filter(is_tiny, chosen):
            if film := film_of(server, template):
                pictures[template] = middle_frame(film)
    stand_in = next((picture for template, picture in pictures.items() if template.stem == STAND_IN), None)
    if stand_in is None and (before := WORKFLOWS / f"{STAND_IN}.jpg").exists():
        with Image.open(before) as image:
            stand_in = image.convert("RGB")
    for template in chosen:
        name_of_model = re.search(r"\((.+)\)$", template.stem)[1]
        label = template.stem.split()[0] if is_tiny(template) else name_of_model
        picture = pictures.get(template) or labelled(stand_in, label)
        path = template.with_suffix(".jpg")
        picture.save(path, quality=QUALITY, optimize=True)
        print(path.name, path.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
