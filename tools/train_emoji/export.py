"""Write the emoji world's model as one diffusers folder in fp16, and check that it reads back.

    python tools/train_emoji/export.py FOLDER [--weights FOLDER] [--force]

--weights: what `card` or `train_unet` wrote to --out, by default the weights that are kept here. FOLDER is a new one,
or an older model that this replaces, and which is kept if its held-out loss, in FOLDER/training.json, is not higher
(--force: replace it all the same).
"""
# ruff: noqa: E402 (the pack is loaded before it is imported)

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[1]))
from pack import load_pack

load_pack(host=False)

from spacetime_edit.tools.emoji_world import world
from spacetime_edit.tools.train_emoji import weights
from spacetime_edit.tools.train_emoji.batches import VOCABULARY
from spacetime_edit.tools.train_tiny import checkpoints
from spacetime_edit.tools.train_tiny.export import Kind, replace_folder
from spacetime_edit.tools.train_tiny.parts import read_vae


def any_caption(generator: np.random.Generator) -> str:
    """Of any background, one or two things, and places."""
    background, places = (str(generator.choice(list(of))) for of in (world.BACKGROUNDS, (*world.PLACE_WORDS, "none")))
    things = tuple(map(str, generator.choice(world.THINGS, generator.integers(1, 3))))
    return world.caption(world.Description(background, things, places))


EMOJI = Kind(VOCABULARY, any_caption, 24 * 2**20)


def export(source: Path, folder: Path, force: bool = False) -> None:
    """Put the model of the weights in the folder's place. Errors as of `train_tiny.export.replace_folder`."""
    saved = weights.read(source / weights.MODEL)
    replace_folder(saved, read_vae(source), source, folder, EMOJI, force)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--weights", type=Path, default=weights.KEPT)
    parser.add_argument("--force", action="store_true", help="replace a model of a lower loss, or of none")
    arguments = parser.parse_args()
    try:
        export(arguments.weights, arguments.folder, arguments.force)
    except checkpoints.CheckpointError as reason:
        print(reason)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
