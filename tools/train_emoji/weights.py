"""Weights that training goes on from: U-Net and text encoder, and beside them the VAE whose latents they know.

A folder holds `model.safetensors`, whose metadata say how it was made, and `vae/`, both in half precision.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ..train_tiny import checkpoints
from ..train_tiny.parts import tidy

KEPT = Path(__file__).with_name("weights")
"""The best so far."""
MODEL = "model.safetensors"
ABOUT = ("configuration", "score", "step", "seconds")


def write(folder: Path, saved: Mapping, vae) -> None:
    """Write a checkpoint's weights, and the VAE, which is left in half precision."""
    folder.mkdir(parents=True, exist_ok=True)
    half = {name: value.half().contiguous() for name, value in saved["weights"].items()}
    temporary = folder / f"{MODEL}.tmp"
    save_file(half, temporary, {"about": json.dumps({name: saved[name] for name in ABOUT})})
    temporary.replace(folder / MODEL)
    vae.half().save_pretrained(folder / "vae")
    tidy(folder)


def about(path: Path) -> dict:
    """How a file's weights were made. Raises CheckpointError for a file that does not say it."""
    with safe_open(path, "pt") as file:
        found = json.loads((file.metadata() or {}).get("about", "{}"))
    if missing := set(ABOUT) - set(found):
        raise checkpoints.CheckpointError(f"{path}: its metadata lack {', '.join(sorted(missing))}")
    return found


def read(path: Path) -> dict:
    """What `write` wrote to the file, as a checkpoint in float32. Errors as of `about`."""
    return about(path) | {"weights": {name: value.float() for name, value in load_file(path).items()}}


def differences(saved: Mapping, configuration: Mapping) -> list[str]:
    """Names of the entries of the model's configuration in which a checkpoint differs."""
    there = saved["configuration"]
    return [name for name in ("channels", "head", "blocks", "words", "schedule") if there[name] != configuration[name]]
