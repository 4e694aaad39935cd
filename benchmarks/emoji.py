"""What a model of the emoji world can do: does it draw what the prompt says, and how well can a clip be inverted?

    python benchmarks/emoji.py FOLDER [--n 96] [--only NAME ...] [--sets NAME ...] [--cfg 4] [--seed 100] [--bf16]
                               [--processes 1] [--clips FOLDER] [--json PATH] [--sheet PATH]

FOLDER is what `tools/train_emoji/export.py` wrote. Parts:

    prompts     n clips a set from noise (DDIM, 20 steps), by `emoji_world.instruments`. Beside the model: ground truth,
                the same through the VAE, and chance, that is the model's clip of the set's next prompt judged by this
                one. right: every thing that the prompt names is there
    inversion   24 clips there and back (DDIM, 20 steps, one refinement, guidance 1), PSNR against the clip and against
                the VAE's reconstruction
    vae         PSNR of 512 frames through the VAE

Each figure with its 95 % interval. Seeds below 100 are for trying settings.
"""
# ruff: noqa: E402 (the pack is loaded before it is imported)

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
from pack import load_pack

load_pack()

import comfy.samplers
from spacetime_edit.benchmarks._editing import Editor, Settings
from spacetime_edit.benchmarks.tiny import end_with_parent, means, table
from spacetime_edit.core.metrics import psnr_db
from spacetime_edit.host.inversion import invert, reconstruct
from spacetime_edit.tools.emoji_world import instruments, variety, world
from spacetime_edit.tools.shape_world.statistics import Interval, paired_bootstrap
from spacetime_edit.tools.train_emoji.batches import frames_of
from spacetime_edit.tools.train_emoji.model import sheet

SETS: dict[str, tuple[str, ...]] = {
    "one": ("one",),
    "two different": ("pair", "sides", "heights"),
    "two equal": ("same",),
}
"""Kinds of scene, by turns."""
COLUMNS = ("right", "thing", "background", "places", "all", "count")
INVERTED = 24
VAE_FRAMES = 512
SHOWN = 24

_editors: dict[str, Editor] = {}


# --- one clip, in a worker process --------------------------------------


def _editor(arguments: argparse.Namespace) -> Editor:
    if arguments.folder not in _editors:
        torch.set_num_threads(1)
        _editors[arguments.folder] = Editor(Settings(cfg=arguments.cfg), arguments.folder)
    return _editors[arguments.folder]


def _scene(name: str, seed: int, index: int) -> world.Scene:
    kinds, generator = SETS[name], np.random.default_rng([seed, index])
    while True:
        scene = variety.sample(generator, kinds[index % len(kinds)])
        things = {o.thing for o in scene.objects}
        if name == "two equal" or len(things) == len(scene.objects):
            return scene


def _made(arguments: argparse.Namespace, name: str, index: int) -> torch.Tensor:
    """The model's clip of a prompt, from --clips where it is there."""
    kept = arguments.clips and arguments.clips / f"{name}-cfg{arguments.cfg:g}-{arguments.seed}-{index}.pt"
    if kept and kept.exists():
        return torch.load(kept, weights_only=True) / 255
    caption = world.caption(_scene(name, arguments.seed, index))
    frames = _generated(_editor(arguments), caption, arguments.seed * 1000 + index, arguments.bf16)
    frames = (frames * 255).round().byte()
    if kept:
        torch.save(frames, kept)
    return frames / 255


def _generated(editor: Editor, caption: str, seed: int, bf16: bool) -> torch.Tensor:
    guider = comfy.samplers.CFGGuider(editor.model)
    guider.set_conds(editor.prompt(caption), editor.prompt(""))
    guider.set_cfg(editor.settings.cfg)
    empty = torch.zeros(world.FRAMES, 4, 16, 16)
    noise = torch.randn(empty.shape, generator=torch.Generator().manual_seed(seed))
    ddim = comfy.samplers.sampler_object("ddim")
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        latent = guider.sample(noise, empty, ddim, editor.sigmas, disable_pbar=True, seed=seed)
    return editor.decode(latent.float())


def _attributes(frames: torch.Tensor, scene: world.Scene) -> dict[str, float]:
    found = instruments.attributes(frames, scene.description)
    return found | {"right": float(found["thing"] == 1)}


@torch.inference_mode()
def prompt_record(arguments: argparse.Namespace, name: str, index: int) -> dict:
    """Attributes of one prompt's clip, of the truth, of the truth through the VAE, and by the prompt before."""
    editor, seed = _editor(arguments), arguments.seed
    scene, before = _scene(name, seed, index), _scene(name, seed, (index - 1) % arguments.n)
    truth, _ = world.render(scene)
    made = _made(arguments, name, index)
    return {
        "model": _attributes(made, scene),
        "chance": _attributes(made, before),
        "ground truth": _attributes(truth, scene),
        "through VAE": _attributes(editor.decode(editor.encode(truth)), scene),
        "caption": world.caption(scene),
        "frames": made if index < SHOWN else None,
    }


@torch.inference_mode()
def inversion_record(arguments: argparse.Namespace, index: int) -> dict:
    """PSNR in dB of one clip there and back."""
    editor = _editor(arguments)
    scene = variety.sample(np.random.default_rng([arguments.seed, 1, index]))
    frames, _ = world.render(scene)
    latent = editor.encode(frames)
    reconstruction = editor.decode(latent)
    trajectory = invert(editor.model, editor.prompt(world.caption(scene)), latent, editor.sigmas, refinements=1)
    back = editor.decode(editor.model.model.process_latent_out(reconstruct(trajectory)))
    return {
        "VAE against clip": psnr_db(reconstruction, frames),
        "back against clip": psnr_db(back, frames),
        "back against VAE": psnr_db(back, reconstruction),
    }


@torch.inference_mode()
def vae_record(arguments: argparse.Namespace, index: int) -> dict:
    """PSNR in dB of one frame through the VAE."""
    editor = _editor(arguments)
    frames, _ = frames_of(np.random.default_rng([arguments.seed, 2, index]), 1)
    return {"VAE against frame": psnr_db(editor.decode(editor.encode(frames)), frames)}


# --- tables -------------------------------------------------------------


def share(values: Sequence[float]) -> Interval:
    """Of ones among zeros and ones, with its 95 % interval by Wilson (1927)."""
    n, p, z = len(values), float(np.mean(values)), 1.96
    middle, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return Interval(p, *((middle + sign * spread) / (1 + z * z / n) for sign in (-1, 1)))


def mean(values: Sequence[float]) -> Interval:
    """With its 95 % bootstrap interval."""
    return paired_bootstrap(values, np.zeros(len(values)), "difference_of_means")


def intervals(records: Sequence[dict[str, float]], of: Callable[[Sequence[float]], Interval]) -> dict[str, dict]:
    """Name to n, estimate, low and high, over the records that have it."""
    names = dict.fromkeys(name for record in records for name in record)
    columns = {name: [r[name] for r in records if name in r] for name in names}
    return {name: {"n": len(values), **of(values)._asdict()} for name, values in columns.items()}


def lines(found: dict[str, dict], digits: int) -> list[str]:
    row = "  {:30}{estimate:8.{digits}f}  ({low:.{digits}f} to {high:.{digits}f}, n = {n})"
    return [row.format(name, digits=digits, **values) for name, values in found.items()]


def run_prompts(each: Callable, arguments: argparse.Namespace) -> dict:
    report = {}
    for name in arguments.sets:
        records = each(partial(prompt_record, arguments, name), arguments.n)
        captions, frames = [r.pop("caption") for r in records], [r.pop("frames") for r in records]
        if arguments.sheet:
            shown = torch.stack(frames[:SHOWN])
            path = arguments.sheet.with_stem(f"{arguments.sheet.stem}-{name.replace(' ', '-')}")
            sheet(shown, captions[:SHOWN]).save(path, optimize=True)
        binary = [{k: v for k, v in r["model"].items() if k != "thing"} for r in records]
        rows = {row: means([r[row] for r in records], COLUMNS) for row in records[0]}
        report[name] = {
            "rows": rows,
            "intervals": intervals(binary, share),
            "records": [{"caption": c, **r["model"]} for c, r in zip(captions, records, strict=True)],
        }
        print(table(rows, f"{name} (n = {arguments.n}, CFG {arguments.cfg:g})"))
        print(*lines(report[name]["intervals"], 3), sep="\n", flush=True)
    return report


def run_inversion(each: Callable, arguments: argparse.Namespace) -> dict:
    report = intervals(each(partial(inversion_record, arguments), min(arguments.n, INVERTED)), mean)
    print("\ninversion and back, dB", *lines(report, 2), sep="\n", flush=True)
    return report


def run_vae(each: Callable, arguments: argparse.Namespace) -> dict:
    report = intervals(each(partial(vae_record, arguments), VAE_FRAMES), mean)
    print("\nframes through the VAE, dB", *lines(report, 2), sep="\n", flush=True)
    return report


PARTS = {"prompts": run_prompts, "inversion": run_inversion, "vae": run_vae}


# --- command line -------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="diffusers folder")
    parser.add_argument("--only", choices=PARTS, nargs="+", default=list(PARTS))
    parser.add_argument("--sets", choices=SETS, nargs="+", default=list(SETS), help="of the prompts")
    parser.add_argument("--cfg", type=float, default=4.0, help="guidance of the prompts")
    parser.add_argument("--seed", type=int, default=100)
    parser.add_argument("--n", type=int, default=96)
    parser.add_argument("--bf16", action="store_true", help="prompts with products in bfloat16, in about half the time")
    parser.add_argument("--processes", type=int, default=1, help="each on one thread")
    parser.add_argument("--clips", type=Path, help="folder that keeps this model's clips, to be judged again")
    parser.add_argument("--json", type=Path, help="also write the tables here, after each part")
    parser.add_argument("--sheet", type=Path, help="also draw the first clips of each set, as pictures of this name")
    return parser.parse_args()


def run(each: Callable, arguments: argparse.Namespace) -> None:
    report = {name: getattr(arguments, name) for name in ("seed", "n", "cfg", "bf16")}
    for part in arguments.only:
        report[part] = PARTS[part](each, arguments)
        if arguments.json:
            arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    arguments = parse_arguments()
    if arguments.clips:
        arguments.clips.mkdir(parents=True, exist_ok=True)
    if arguments.processes == 1:
        run(lambda function, n: list(map(function, range(n))), arguments)
        return 0
    context = get_context("spawn")
    with ProcessPoolExecutor(arguments.processes, mp_context=context, initializer=end_with_parent) as pool:
        run(lambda function, n: list(pool.map(function, range(n), chunksize=4)), arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
