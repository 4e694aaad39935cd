"""STR-Match on long clips in the host's context windows, on the embedded model: memory, and seams between windows.

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
from pathlib import Path

import numpy as np
import torch

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


def one_step(editor: Editor, scene: world.Scene) -> int:
    """Peak bytes of the first step of an edit."""
    trajectory = editor.invert(editor.encode(world.render(scene)[0]), scene)
    sampler = TrajectorySampler(trajectory, before_step=[editor.matching(trajectory)])
    return peak_bytes(lambda: editor.sample(scene, sampler, 0, torch.zeros(trajectory.shape), trajectory.sigmas[:2]))


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
        step = {
            "one window": one_step(short, scene_of(generator, arguments.window)),
            "windows": one_step(long, scene_of(generator, arguments.frames)),
        }
        memory = step["windows"] / step["one window"]
        print(f"peak of a step, {arguments.frames} frames in windows / {arguments.window} frames: {memory:.2f}")
        starts = range(arguments.window - arguments.overlap, arguments.frames, arguments.window - arguments.overlap)
        rows = []
        for number in range(arguments.n):
            source = scene_of(generator, arguments.frames)
            target = world.sample_edit(source, "shape", generator, 0)
            frames = world.render(source)[0]
            trajectory = long.invert(long.encode(frames), source)
            edit = long.decode(long.edit(trajectory, target, number, long.matching(trajectory)))
            places = [start for start in starts if start < arguments.frames]
            rows.append({"source": seam(frames, places), "edit": seam(edit, places)})
            print(
                f"  clip {number}: seam of source {rows[-1]['source']:.3f}, of edit {rows[-1]['edit']:.3f}", flush=True
            )
    ratio = float(np.mean([row["edit"] / row["source"] for row in rows]))
    report = {"memory": memory, "seam": ratio, "bytes": step, "clips": rows}
    print(verdict(memory <= MEMORY_AT_MOST, f"memory {memory:.2f} of that of one window (at most {MEMORY_AT_MOST})"))
    print(verdict(ratio <= SEAM_AT_MOST, f"seam of the edit {ratio:.2f} times the source's (at most {SEAM_AT_MOST})"))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
