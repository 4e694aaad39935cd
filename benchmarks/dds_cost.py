"""What a step of Video DDS costs on the embedded model, in forward passes, and how memory grows with the frames.

    python benchmarks/dds_cost.py [--n 7] [--frames 8 16] [--steps 20] [--whole] [--seed 0] [--json PATH]

A forward pass is one prompt's prediction for the whole clip. A step is a run of `--steps` steps divided by them, so
what a run does once is in it. Time is user CPU seconds on one thread, the median of n runs in turn. Memory is the most
bytes of tensors that lived at once, beyond those that were there before. --whole: also 200 steps of DreamMotion on 8
frames, in seconds of the clock with two threads.
"""
# ruff: noqa: E402 (the pack is loaded before it is imported)

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
from pack import load_pack

load_pack()

import comfy.samplers
from spacetime_edit.benchmarks._editing import Editor, Settings
from spacetime_edit.benchmarks._figures import verdict
from spacetime_edit.benchmarks._timing import RUNS, interleaved, medians, peak_bytes
from spacetime_edit.host.distillation import SPATIAL, TEMPORAL, Distillation, optimise
from spacetime_edit.host.features import key_blocks
from spacetime_edit.host.model_pass import call_model

FORWARD, SCORE, SPATIAL_ONLY, FULL, LEAN = "forward", "DDS", "DDS + S-SSM", "DreamMotion", "DreamMotion, memory low"
FORMS: dict[str, dict] = {
    SCORE: {},
    SPATIAL_ONLY: {"weights": {SPATIAL: 0.3}},
    FULL: {"weights": {SPATIAL: 0.3, TEMPORAL: 0.1}},
    LEAN: {"weights": {SPATIAL: 0.3, TEMPORAL: 0.1}, "low_memory": True},
}
PROMPTS = ("a red circle on a gray background", "a blue circle on a gray background", "")
WHOLE_STEPS, WHOLE_SECONDS = 200, 180
AT_MOST = {FULL: 6, LEAN: 7}


class _Forward(comfy.samplers.Sampler):
    """A sampler that makes so many predictions of one prompt."""

    def __init__(self, times: int):
        self.times = times

    def sample(self, model_wrap, sigmas, extra_args, callback, noise, *args, **kwargs):
        cond = model_wrap.conds["positive"][0]
        for _ in range(self.times):
            call_model(model_wrap.inner_model, [cond], noise, sigmas[0], extra_args["model_options"])
        return noise


def forward(editor: Editor, latent: Tensor, times: int) -> None:
    guider = comfy.samplers.CFGGuider(editor.model)
    guider.inner_set_conds({"positive": editor.prompt(PROMPTS[1])})
    guider.sample(
        latent, torch.zeros_like(latent), _Forward(times), torch.tensor([2.0, 0.0]), disable_pbar=True, seed=0
    )


def optimised(editor: Editor, latent: Tensor, steps: int, **options) -> Tensor:
    settings = Distillation(steps=steps, step_size=1.6, cfg=4.0, blocks=key_blocks(editor.model), **options)
    return optimise(editor.model, *map(editor.prompt, PROMPTS), latent, settings, seed=0)[0]


def cost(editor: Editor, frames: int, steps: int, n: int, generator: torch.Generator) -> list[dict]:
    """A row for the forward pass and for each form of a step."""
    latent = torch.randn(frames, 4, 16, 16, generator=generator)
    functions: dict[str, Callable] = {FORWARD: partial(forward, editor, latent, 4 * steps)}
    functions |= {name: partial(optimised, editor, latent, steps, **options) for name, options in FORMS.items()}
    seconds = medians(interleaved(functions, n))
    one = seconds[FORWARD].user / (4 * steps)
    rows = []
    for name, function in functions.items():
        own = one if name == FORWARD else seconds[name].user / steps
        rows.append(
            {"frames": frames, "form": name, "seconds": own, "forwards": own / one, "bytes": peak_bytes(function)}
        )
    return rows


def whole(editor: Editor, generator: torch.Generator) -> float:
    """Seconds of the clock of 200 steps on 8 frames, two threads."""
    torch.set_num_threads(2)
    latent = torch.randn(8, 4, 16, 16, generator=generator)
    start = time.monotonic()
    optimised(editor, latent, WHOLE_STEPS, **FORMS[FULL])
    return time.monotonic() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--n", type=int, default=RUNS)
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(arguments.seed)
    report = {"rows": []}
    with torch.inference_mode():
        editor = Editor(Settings())
        print(f"{'frames':>7}  {'form':26} {'s':>8} {'forwards':>9} {'MB':>8}")
        for frames in arguments.frames:
            for row in cost(editor, frames, arguments.steps, arguments.n, generator):
                report["rows"].append(row)
                shown = f"{row['seconds']:8.3f} {row['forwards']:9.2f} {row['bytes'] / 1e6:8.1f}"
                print(f"{frames:7}  {row['form']:26} {shown}", flush=True)
        by_form = {name: [r for r in report["rows"] if r["form"] == name] for name in (FULL, LEAN)}
        for name, rows in by_form.items():
            for row in rows:
                met = row["forwards"] <= AT_MOST[name]
                text = f"{name}, {row['frames']} frames: a step is {row['forwards']:.2f} forward passes"
                print(verdict(met, f"{text}, at most {AT_MOST[name]}"))
            growth = rows[-1]["bytes"] / rows[0]["bytes"] / (rows[-1]["frames"] / rows[0]["frames"])
            print(f"  {name}: memory grows {growth:.2f} times as fast as the frames")
        if arguments.whole:
            report["whole_seconds"] = took = whole(editor, generator)
            text = f"{WHOLE_STEPS} steps on 8 frames take {took:.0f} s, at most {WHOLE_SECONDS}"
            print(verdict(took <= WHOLE_SECONDS, text))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
