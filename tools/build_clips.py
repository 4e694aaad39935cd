"""Write the example clips 08 to 31: what the first eight lack. The same seed writes the same files.

    python tools/build_clips.py [--folder assets/tiny_clips]

Twelve clips of two or three objects (of which eight of one shape), four of objects that change sides, four fast ones,
two with a part, two more. The first eight clips and their entries in `captions.json` stay as they are. Frames and masks
are rendered without jitter, so that `captions.json` describes them in full; a mask is what is seen of its object.
"""
# ruff: noqa: E402 (the pack is loaded before it is imported)

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))
from pack import ROOT, load_pack

load_pack(host=False)

from spacetime_edit.tools.shape_world import variety, world

FIRST = 8
SEED = 2026

PLAN: list[tuple[str, dict, tuple[str, ...]]] = [
    *[("same", {"objects": 2, "motion": "straight"}, ("colour", "shape", "background"))] * 4,
    ("same", {"objects": 2, "motion": "curved"}, ("colour", "shape", "background")),
    ("same", {"objects": 3, "motion": "straight"}, ("colour", "shape", "background")),
    *[("pair", {"same_shape": True}, ("colour", "shape", "background"))] * 2,
    *[("three", {"objects": 3}, ("colour", "shape", "background"))] * 2,
    ("heights", {}, ("colour", "shape", "background")),
    ("sides", {"textured": True}, ("colour", "shape", "background")),
    *[("crossing", {}, ("colour", "shape", "background"))] * 4,
    *[("one", {"motion": "fast"}, ("colour", "shape", "background"))] * 4,
    *[("part", {"motion": "straight"}, ("stripe", "colour", "background"))] * 2,
    ("one", {"motion": "leaving"}, ("colour", "shape", "background")),
    ("one", {"motion": "curved", "textured": True}, ("colour", "shape", "background")),
]
"""Kind of scene, what is asked of it, and its three edits."""


def draw(generator: np.random.Generator, kind: str, asked: dict) -> world.Scene:
    """A scene without jitter that is as asked."""
    while True:
        options = {"motion": asked["motion"]} if "motion" in asked else {}
        scene = variety.sample(generator, kind, **options)
        shapes = {obj.shape for obj in scene.objects}
        fits = len(scene.objects) == asked.get("objects", len(scene.objects))
        fits &= not asked.get("same_shape") or len(shapes) == 1
        fits &= not asked.get("textured") or scene.texture != "plain"
        fits &= kind != "three" or len({obj.colour for obj in scene.objects}) == 3
        if fits:
            break
    rounded = (
        replace(
            obj,
            jitter=(0.0, 0.0, 0.0),
            radius=round(obj.radius, 2),
            centres=tuple((round(x, 2), round(y, 2)) for x, y in obj.centres),
        )
        for obj in scene.objects
    )
    return replace(
        scene,
        objects=tuple(rounded),
        jitter=(0.0, 0.0, 0.0),
        gradient=round(scene.gradient, 3),
        contrast=round(scene.contrast, 3),
        pitch=round(scene.pitch, 3),
    )


def save(path: Path, image: Tensor) -> None:
    """(3, H, W) or (H, W) in [0, 1] as PNG."""
    pixels = (image * 255).round().byte().numpy()
    Image.fromarray(pixels.transpose(1, 2, 0) if pixels.ndim == 3 else pixels).save(path, optimize=True)


def write(folder: Path, number: int, scene: world.Scene, edits: list[tuple[str, int, world.Scene]]) -> dict:
    """One clip's files; its entry."""
    name = f"clip_{number:02d}"
    home = folder / name
    home.mkdir(parents=True, exist_ok=True)
    frames, masks = world.render(scene)
    for i, frame in enumerate(frames):
        save(home / f"frame_{i:02d}.png", frame)
    seen = world.visible_masks(masks)
    objects = []
    for index, (obj, mask) in enumerate(zip(scene.objects, seen, strict=True)):
        entry = {"index": index, "color": obj.colour, "shape": obj.shape, "place": None, "radius": obj.radius}
        entry["mask"] = f"mask_obj{index}_%02d.png"
        parts = {entry["mask"]: mask}
        if obj.stripe:
            entry |= {"stripe": obj.stripe, "stripe_mask": f"mask_obj{index}_stripe_%02d.png"}
            parts[entry["stripe_mask"]] = world.stripe_mask(obj) * mask / world.object_mask(obj).clamp(min=1e-6)
        for pattern, values in parts.items():
            for i, value in enumerate(values):
                save(home / (pattern % i), value)
        objects.append(entry | {"centres": [list(centre) for centre in obj.centres]})
    return {
        "clip": name,
        "frames": len(frames),
        "size": world.SIZE,
        "caption": world.caption(scene),
        "edits": [
            {"caption": world.caption(target), "kind": kind, "object": None if kind == "background" else index}
            for kind, index, target in edits
        ],
        "background": scene.background,
        "places": scene.places,
        "gradient": scene.gradient,
        "direction": scene.direction,
        "texture": scene.texture,
        "contrast": scene.contrast,
        "pitch": scene.pitch,
        "objects": objects,
    }


def edits_of(generator: np.random.Generator, scene: world.Scene, kinds: tuple[str, ...]):
    """(kind, object, target scene): of the first object that the kind can change, and of the others in turn."""
    for turn, kind in enumerate(kinds):
        striped = [i for i, obj in enumerate(scene.objects) if obj.stripe]
        index = striped[0] if striped else turn % len(scene.objects) if scene.places != "none" else 0
        yield kind, index, world.sample_edit(scene, kind, generator, index)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "assets" / "tiny_clips")
    folder = parser.parse_args().folder
    path = folder / "captions.json"
    entries = json.loads(path.read_text(encoding="utf-8"))[:FIRST]
    generator = np.random.default_rng(SEED)
    for number, (kind, asked, kinds) in enumerate(PLAN, start=FIRST):
        scene = draw(generator, kind, asked)
        entries.append(write(folder, number, scene, list(edits_of(generator, scene, kinds))))
        print(entries[-1]["clip"], entries[-1]["caption"])
    path.write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
