"""STR-Match and DreamMotion on long clips in the host's context windows, on the embedded model: memory, and seams.

    python benchmarks/long_clips.py [--n 4] [--frames 32] [--window 8] [--overlap 4] [--seed 0] [--json PATH]

Clips of one moving shape. memory: most bytes of live tensors of one gradient step on the long clip in windows, over
that of a clip of one window (target: at most 1.3, for what is kept of the whole clip). seam: how much more frames
change where a window begins or ends than elsewhere (target: at most 1.2 times the source's own).
"""
# ruff: noqa: E402 (the pack is loaded before it is imported)

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
from pack import load_pack

load_pack()

from comfy.context_windows import (
    IndexListContextHandler,
    get_matching_context_schedule,
    get_matching_fuse_method,
)
from spacetime_edit.benchmarks._editing import Editor, Settings
from spacetime_edit.benchmarks._figures import verdict
from spacetime_edit.benchmarks._timing import peak_bytes
from spacetime_edit.core.metrics import seam
from spacetime_edit.core.trajectory import Trajectory
from spacetime_edit.host.distillation import SPATIAL, TEMPORAL, Distillation, optimise
from spacetime_edit.host.features import key_blocks
from spacetime_edit.host.sampling import TrajectorySampler
from spacetime_edit.tools.shape_world import world

MEMORY_AT_MOST, SEAM_AT_MOST = 1.3, 1.2


def scene_of(generator: np.random.Generator, frames: int) -> world.Scene:
    return world.sample_scene(generator, "one", frames=frames)


def in_windows(editor: Editor, length: int, overlap: int) -> Editor:
    """The editor, its model in context windows."""
    editor.model = editor.model.clone()
    editor.model.model_options["context_handler"] = IndexListContextHandler(
        get_matching_context_schedule("standard_static"),
        get_matching_fuse_method("pyramid"),
        context_length=length,
        context_overlap=overlap,
    )
    return editor


@dataclass(frozen=True)
class Method:
    """step: the first step of an edit of a scene; edit: its frames, by the edited scene and a seed."""

    step: Callable[[Editor, world.Scene], object]
    edit: Callable[[Editor, world.Scene, world.Scene, int], Tensor]


def matching_step(editor: Editor, scene: world.Scene) -> Callable[[], Tensor]:
    trajectory = inverted(editor, scene)
    sampler = TrajectorySampler(trajectory, before_step=[editor.matching(trajectory)])
    return lambda: editor.sample(scene, sampler, 0, torch.zeros(trajectory.shape), trajectory.sigmas[:2])


def matched(editor: Editor, source: world.Scene, target: world.Scene, seed: int) -> Tensor:
    trajectory = inverted(editor, source)
    return editor.edit(trajectory, target, seed, editor.matching(trajectory))


def inverted(editor: Editor, scene: world.Scene) -> Trajectory:
    return editor.invert(editor.encode(world.render(scene)[0]), scene)


def distilled(editor: Editor, source: world.Scene, target: world.Scene, seed: int, steps: int = 32) -> Tensor:
    """At the settings of `quality_dds`."""
    settings = Distillation(
        steps, 1.6, 4.0, weights={SPATIAL: 0.3, TEMPORAL: 0.1}, blocks=key_blocks(editor.model), low_memory=False
    )
    prompts = [editor.prompt(text) for text in (world.caption(source), world.caption(target), "")]
    return optimise(editor.model, *prompts, editor.encode(world.render(source)[0]), settings, seed=seed)[0]


METHODS = {
    "STR-Match": Method(matching_step, matched),
    "DreamMotion": Method(lambda editor, scene: lambda: distilled(editor, scene, scene, 0, steps=1), distilled),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"n": 4, "frames": 32, "window": 8, "overlap": 4, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    generator = np.random.default_rng(arguments.seed)
    windows = arguments.window, arguments.overlap
    with torch.inference_mode():
        short, long = Editor(Settings()), in_windows(Editor(Settings()), *windows)
        reports = {name: measure(method, short, long, generator, arguments) for name, method in METHODS.items()}
    for name, report in reports.items():
        memory, ratio = report["memory"], report["seam"]
        print(
            verdict(memory <= MEMORY_AT_MOST, f"{name}: memory {memory:.2f} of one window's (at most {MEMORY_AT_MOST})")
        )
        print(verdict(ratio <= SEAM_AT_MOST, f"{name}: seam {ratio:.2f} times the source's (at most {SEAM_AT_MOST})"))
    if arguments.json:
        arguments.json.write_text(json.dumps(reports, indent=1) + "\n", encoding="utf-8")
    return 0


def measure(method: Method, short: Editor, long: Editor, generator: np.random.Generator, arguments) -> dict:
    """Memory of a step in windows over that of one window, and the seams of edits over those of their sources."""
    frames, stride = arguments.frames, arguments.window - arguments.overlap
    step = {
        "one window": peak_bytes(method.step(short, scene_of(generator, arguments.window))),
        "windows": peak_bytes(method.step(long, scene_of(generator, frames))),
    }
    places, rows = list(range(stride, frames, stride)), []
    for number in range(arguments.n):
        source = scene_of(generator, frames)
        target = world.sample_edit(source, "shape", generator, 0)
        edit = long.decode(method.edit(long, source, target, number))
        rows.append({"source": seam(world.render(source)[0], places), "edit": seam(edit, places)})
        print(f"  clip {number}: seam of source {rows[-1]['source']:.3f}, of edit {rows[-1]['edit']:.3f}", flush=True)
    ratio = float(np.mean([row["edit"] / row["source"] for row in rows]))
    return {"memory": step["windows"] / step["one window"], "seam": ratio, "bytes": step, "clips": rows}


if __name__ == "__main__":
    sys.exit(main())
