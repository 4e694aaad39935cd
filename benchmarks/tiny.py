"""What the embedded model can do: does it draw what the prompt says, and how well can a clip be inverted?

    python benchmarks/tiny.py [--folder assets/tiny_t2v] [--n 96] [--only NAME ...] [--sets NAME ...] [--processes 2]
                              [--json PATH]

Parts, each with n clips:

    prompts     clips from noise (DDIM, 16 steps, guidance 4), one set a kind of scene, by `shape_world.census`. Beside
                the model: ground truth, the same through the VAE, and chance, that is the model's clip of the set's
                next prompt judged by this one
    inversion   DDIM inversion and back (20 steps, guidance 1), PSNR against the clip and against the VAE's
                reconstruction; beside it the same prompt from random noise
    instances   prompt swap on two equal objects that no place tells apart ("two red circles" to "a red circle and a
                blue circle"): is the first, the intended one, changed, and it alone? One in two would be chance
"""
# ruff: noqa: E402 (the pack is loaded before it is imported)

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context, parent_process
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
from pack import load_pack

load_pack()

import comfy.samplers
from spacetime_edit.benchmarks._editing import Editor, Settings
from spacetime_edit.core.metrics import psnr_db
from spacetime_edit.host.loaders import unet3d
from spacetime_edit.tools.shape_world import census, instruments, variety, world

PROMPT_STEPS = 16
SETS: dict[str, dict] = {
    "one": {"kind": "one"},
    "one, unseen pairs": {"kind": "one", "held_out": True},
    "sides": {"kind": "sides"},
    "heights": {"kind": "heights"},
    "pair": {"kind": "pair"},
    "same": {"kind": "same"},
    "three": {"kind": "three"},
    "part": {"kind": "part"},
    "all kinds, 8 frames": {},
    "all kinds, 16 frames": {"frames": 16},
}
COLUMNS = ("colour", "shape", "stripe", "background", "texture", "places", "all", "count")
OUTCOMES = ("intended alone", "other alone", "both", "neither")

_editors: dict[str, Editor] = {}


# --- one clip, in a worker process --------------------------------------


def _editor(folder: str) -> Editor:
    if folder not in _editors:
        torch.set_num_threads(1)
        _editors[folder] = Editor(Settings(), folder)
    return _editors[folder]


def _scene(name: str, seed: int, index: int) -> world.Scene:
    """The same scene for 8 and for 16 frames, but for its motion."""
    return variety.sample(np.random.default_rng([seed, index]), **SETS[name])


def _generated(editor: Editor, scene: world.Scene, seed: int) -> torch.Tensor:
    ddim = comfy.samplers.sampler_object("ddim")
    sigmas = comfy.samplers.calculate_sigmas(
        editor.model.get_model_object("model_sampling"), "ddim_uniform", PROMPT_STEPS
    )
    frames = len(scene.objects[0].centres)
    return editor.decode(editor.sample(scene, ddim, seed, torch.zeros(frames, 4, 16, 16), sigmas))


@torch.inference_mode()
def prompt_record(folder: str, name: str, seed: int, n: int, index: int) -> dict:
    """Attributes of one prompt's clip, of the truth, of the truth through the VAE, and by the prompt before."""
    editor = _editor(folder)
    scene, before = _scene(name, seed, index), _scene(name, seed, (index - 1) % n)
    truth, _ = world.render(scene)
    made = _generated(editor, scene, seed * 1000 + index)
    return {
        "model": census.attributes(made, scene.description),
        "chance": census.attributes(made, before.description),
        "ground truth": census.attributes(truth, scene.description),
        "through VAE": census.attributes(editor.decode(editor.encode(truth)), scene.description),
    }


@torch.inference_mode()
def inversion_record(folder: str, seed: int, index: int) -> dict:
    """PSNR in dB of one clip there and back."""
    editor = _editor(folder)
    scene = variety.sample(np.random.default_rng([seed, 1, index]))
    frames, _ = world.render(scene)
    latent = editor.encode(frames)
    reconstruction = editor.decode(latent)
    trajectory = editor.invert(latent, scene)
    editor.settings = replace(editor.settings, cfg=1.0)
    back = editor.decode(editor.edit(trajectory, scene, 0))
    noise = editor.decode(
        editor.sample(scene, comfy.samplers.sampler_object("ddim"), index, torch.zeros(trajectory.shape))
    )
    editor.settings = Settings()
    return {
        "VAE against clip": psnr_db(reconstruction, frames),
        "back against clip": psnr_db(back, frames),
        "back against VAE": psnr_db(back, reconstruction),
        "random noise against VAE": psnr_db(noise, reconstruction),
    }


def _instance_scenes(seed: int, index: int) -> tuple[world.Scene, world.Scene]:
    """Two equal objects, and the same with another colour of the first."""
    generator = np.random.default_rng([seed, 2, index])
    while len((source := variety.sample(generator, "same")).objects) != 2:
        pass
    return source, world.sample_edit(source, "colour", generator, 0)


@torch.inference_mode()
def instance_record(folder: str, seed: int, index: int) -> dict:
    """Which of two equal objects a prompt swap changed, by the most frequent colour in each one's place."""
    editor = _editor(folder)
    source, target = _instance_scenes(seed, index)
    frames, masks = world.render(source)
    trajectory = editor.invert(editor.encode(frames), source)
    edited = editor.decode(editor.edit(trajectory, target, seed * 1000 + index))
    labels = instruments.segment(edited, instruments.background_name(edited))
    new = list(world.COLOURS).index(target.objects[0].colour)
    first, second = (float((labels[mask > 0.5] == new).float().mean()) > 0.5 for mask in masks)
    outcome = {(True, False): 0, (False, True): 1, (True, True): 2, (False, False): 3}[first, second]
    return {
        **{name: float(i == outcome) for i, name in enumerate(OUTCOMES)},
        "count": float(instruments.count_accuracy(edited, 2)),
    }


# --- tables -------------------------------------------------------------


def means(records: Sequence[dict[str, float]], names: Iterable[str]) -> dict[str, float | None]:
    """Mean of each name over the records that have it."""
    found = {name: [r[name] for r in records if name in r] for name in names}
    return {name: float(np.mean(values)) if values else None for name, values in found.items()}


def table(rows: dict[str, dict[str, float | None]], title: str) -> str:
    names = list(next(iter(rows.values())))
    width = max(map(len, names)) + 2
    lines = ["", f"{title:32}" + "".join(f"{name:>{width}}" for name in names)]
    for label, row in rows.items():
        cells = ("-" if row[name] is None else f"{row[name]:.3f}" for name in names)
        lines.append(f"  {label:30}" + "".join(f"{cell:>{width}}" for cell in cells))
    return "\n".join(lines)


def run_prompts(each: Callable, arguments: argparse.Namespace) -> dict:
    report = {}
    for name in arguments.sets:
        function = partial(prompt_record, arguments.folder, name, arguments.seed, arguments.n)
        records = each(function, arguments.n)
        report[name] = {row: means([r[row] for r in records], COLUMNS) for row in records[0]}
        print(table(report[name], f"{name} (n = {arguments.n})"), flush=True)
    return report


def run_inversion(each: Callable, arguments: argparse.Namespace) -> dict:
    records = each(partial(inversion_record, arguments.folder, arguments.seed), arguments.n)
    report = means(records, records[0])
    print(f"\ninversion and back, dB (n = {arguments.n})", *(f"  {k:30}{v:8.2f}" for k, v in report.items()), sep="\n")
    return report


def run_instances(each: Callable, arguments: argparse.Namespace) -> dict:
    records = each(partial(instance_record, arguments.folder, arguments.seed), arguments.n)
    report = means(records, records[0])
    print(f"\nswap of one of two (n = {arguments.n})", *(f"  {k:30}{v:8.3f}" for k, v in report.items()), sep="\n")
    return report


PARTS = {"prompts": run_prompts, "inversion": run_inversion, "instances": run_instances}


# --- command line -------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default=unet3d.EMBEDDED, help="diffusers folder; by default the embedded model")
    parser.add_argument("--only", choices=PARTS, nargs="+", default=list(PARTS))
    parser.add_argument("--sets", choices=SETS, nargs="+", default=list(SETS), help="of the prompts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--n", type=int, default=96)
    parser.add_argument("--processes", type=int, default=1, help="each on one thread")
    parser.add_argument("--json", type=Path, help="also write the tables here")
    return parser.parse_args()


def end_with_parent() -> None:
    """Ends this worker when the benchmark is stopped: a pool's workers would go on."""
    threading.Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()


def main() -> int:
    arguments = parse_arguments()
    report = {"seed": arguments.seed, "n": arguments.n}
    context = get_context("spawn")
    with ProcessPoolExecutor(arguments.processes, mp_context=context, initializer=end_with_parent) as pool:

        def each(function: Callable[[int], dict], n: int) -> list[dict]:
            return list(pool.map(function, range(n), chunksize=4))

        for part in arguments.only:
            report[part] = PARTS[part](each, arguments)
            if arguments.json:
                arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
