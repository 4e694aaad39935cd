"""What STR matching costs: the lean loss against the dense one, an edit against plain sampling, checkpointing.

    python benchmarks/str_cost.py [--only loss | edit | checkpointing] [--n 7] [--seed 0] [--json PATH]

loss           `matching_loss`, forward and backward, at 640 tokens, 8 heads of 80 (LaVie's half-resolution level) and
               16 frames, against the dense score with autograd
edit           a whole edit of the embedded model against plain sampling of the same steps with the host's ddim: prompt
               swap, STR-Match as the node has it, with one iteration, with two, and over all steps
checkpointing  the gradient of one matched step of a UNet3D with random weights and 8 attention blocks, with and
               without kept activations; and the whole step, source pass and features included

Time is user CPU seconds on one thread, the median of n runs in turn; what the system spends, mostly on fresh memory,
is shown apart and is in no ratio. Memory is the most bytes of tensors that lived at
once, beyond those that were there before, counted from the operations' results (scratch memory within an operation
is not seen); it comes from a run of its own.
"""
# ruff: noqa: E402 (the pack is loaded before it is imported)

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
from pack import load_pack

load_pack()

import comfy.samplers
from safetensors.torch import save_file
from spacetime_edit.benchmarks._cases import make_cases
from spacetime_edit.benchmarks._editing import Editor, Settings
from spacetime_edit.benchmarks._figures import verdict
from spacetime_edit.benchmarks._timing import RUNS, CpuSeconds, interleaved, medians, peak_bytes
from spacetime_edit.core.parametrization import NoiseSpace
from spacetime_edit.core.relevance import AttentionFeatures, matching_loss, str_score
from spacetime_edit.core.trajectory import Trajectory
from spacetime_edit.host.attention_tap import AttentionTap
from spacetime_edit.host.checkpointing import checkpointed
from spacetime_edit.host.families import family_of
from spacetime_edit.host.features import FeatureRecorder
from spacetime_edit.host.gradients import latent_gradient, normal_tensor
from spacetime_edit.host.layers import attention_layers
from spacetime_edit.host.loaders import unet3d
from spacetime_edit.host.loaders.diffusers_folder import EMBEDDED_PATH, ModelFolder
from spacetime_edit.host.loaders.unet3d_model import build
from spacetime_edit.host.memory import small_tile
from spacetime_edit.host.model_pass import call_model
from spacetime_edit.host.relevance_matching import RelevanceMatching, str_score_of
from spacetime_edit.host.sampling import Step, TrajectorySampler
from spacetime_edit.tools.shape_world import world

HEADS, TOKENS, HEAD_DIM, FRAMES = 8, 640, 80, 16
MAX_MEMORY, MAX_TIME, MIN_SAVING = 1 / 8, 0.7, 3.0

LEAN, DENSE = "matching_loss", "dense reference"
PLAIN, SWAP, INVERSION = "plain sampling", "prompt swap", "inversion, once a clip"
DEFAULT, ONCE, TWICE, ALL = (f"STR-Match{what}" for what in ("", ", 1 iteration", ", 2 iterations", ", all steps"))
MAX_EDIT = {DEFAULT: 4.0, ONCE: 2.6}
KEEPING, LEAN_STEP = "activations kept", "block checkpointing"

BLOCKS = {
    "down_block_types": ["CrossAttnDownBlock3D"] * 3,
    "up_block_types": ["CrossAttnUpBlock3D"] * 2 + ["UpBlock3D"],
}
"""A UNet3D with three, one and four blocks of attention on its way down, in the middle and on its way up."""


# --- the loss ---------------------------------------------------------


def features(frames: int, generator: torch.Generator) -> AttentionFeatures:
    """Random query, key and temporal maps of one layer; logits with a standard deviation of about 2."""
    query, key = 1.5 * torch.randn(2, frames, HEADS, TOKENS, HEAD_DIM, generator=generator)
    temporal = torch.randn(TOKENS, HEADS, frames, frames, generator=generator).softmax(-1)
    return AttentionFeatures(query, key, temporal)


def dense_loss(source: AttentionFeatures, target: AttentionFeatures) -> Tensor:
    """The loss from the scores themselves."""
    scores = []
    for f in (source, target):
        spatial = torch.softmax(f.query @ f.key.mT * f.logit_scale, -1)
        scores.append(str_score(spatial, f.temporal).flatten())
    return -torch.nn.functional.cosine_similarity(*scores, dim=0)


def loss_cost(n: int, seed: int, frames: int) -> tuple[dict, list[str]]:
    """Time and extra memory of one layer's loss with its gradient."""
    generator = torch.Generator().manual_seed(seed)
    source, target = features(frames, generator), features(frames, generator)
    leaves = [t.requires_grad_() for t in (target.query, target.key, target.temporal)]

    def gradient(loss) -> list[Tensor]:
        return torch.autograd.grad(loss(source, target), leaves)

    functions = {LEAN: lambda: gradient(matching_loss), DENSE: lambda: gradient(dense_loss)}
    peaks = {name: peak_bytes(function) for name, function in functions.items()}
    seconds = interleaved(functions, n)
    typical = medians(seconds)
    memory, time = peaks[LEAN] / peaks[DENSE], typical[LEAN].user / typical[DENSE].user
    lines = [f"matching_loss, {frames} frames, {HEADS} heads of {HEAD_DIM}, {TOKENS} tokens, forward and backward"]
    lines += [f"  {name:26} {format_time(typical[name])} {peaks[name] / 1e6:9.0f} MB" for name in functions]
    lines += [
        verdict(memory <= MAX_MEMORY, f"extra memory {memory:.3f} of the dense one's, at most {MAX_MEMORY}"),
        verdict(time <= MAX_TIME, f"time {time:.2f} of the dense one's, at most {MAX_TIME}"),
    ]
    return {"frames": frames, "seconds": seconds, "peak_bytes": peaks, "memory": memory, "time": time}, lines


# --- an edit ----------------------------------------------------------


def edit_cost(n: int, seed: int) -> tuple[dict, list[str]]:
    """Time of whole edits of one clip, against plain sampling of the same steps."""
    editor, (case,) = Editor(Settings()), make_cases("one object", seed, 1)
    latent = editor.encode(world.render(case.source)[0])
    trajectory = editor.invert(latent, case.source)
    tuned = editor.matching(trajectory)

    def edit(matching: RelevanceMatching | None) -> Tensor:
        return editor.edit(trajectory, case.target, case.seed, matching)

    ddim = comfy.samplers.sampler_object("ddim")
    functions = {
        PLAIN: lambda: editor.sample(case.target, ddim, case.seed, torch.zeros_like(latent)),
        SWAP: lambda: edit(None),
        DEFAULT: lambda: edit(tuned),
        ONCE: lambda: edit(replace(tuned, iterations=1)),
        TWICE: lambda: edit(replace(tuned, iterations=2)),
        ALL: lambda: edit(replace(tuned, end=1.0)),
        INVERSION: lambda: editor.invert(latent, case.source),
    }
    seconds = interleaved(functions, n)
    typical = medians(seconds)
    ratios = {name: time.user / typical[PLAIN].user for name, time in typical.items()}
    lines = [f"whole edits of the embedded model, {editor.settings.steps} steps, cfg {editor.settings.cfg}"]
    lines += [f"  {name:26} {format_time(typical[name])} {ratios[name]:9.2f} of plain" for name in functions]
    lines += [
        verdict(ratios[name] <= most, f"{name}: {ratios[name]:.2f} times plain sampling, at most {most}")
        for name, most in MAX_EDIT.items()
    ]
    return {"seconds": seconds, "ratios": ratios}, lines


# --- checkpointing ----------------------------------------------------


def random_model(folder: Path, seed: int):
    """A ModelPatcher of the embedded model's layout with `BLOCKS` and random weights, by way of files in `folder`."""
    shutil.copytree(EMBEDDED_PATH, folder, dirs_exist_ok=True)
    config = folder / "unet" / "config.json"
    settings = json.loads(config.read_text(encoding="utf-8")) | BLOCKS
    config.write_text(json.dumps(settings), encoding="utf-8")
    generator, weights = torch.Generator().manual_seed(seed), {}
    for name, weight in build(settings).state_dict().items():
        is_scale = weight.ndim == 1 and name.endswith("weight")
        noise = torch.randn(weight.shape, generator=generator) * weight[0].numel() ** -0.5
        weights[name] = torch.ones(weight.shape) if is_scale else noise
    save_file(weights, folder / "unet" / "diffusion_pytorch_model.safetensors")
    return unet3d.load_model(ModelFolder(folder))


class GradientPeak:
    """Before-step function that leaves x alone: `peak` is the most bytes within one gradient of the matching loss.

    The features of the source are there before and do not count.
    """

    def __init__(self, checkpoint: bool):
        self.checkpoint, self.peak = checkpoint, 0

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        model, base, options = step.run.guider.model_patcher, step.run.base_model, step.run.model_options
        given = FeatureRecorder(None)
        tap = AttentionTap(model, [given], differentiable=True)
        call_model(base, step.run.source_conds[:1], step.source, step.sigma, options, tap=tap, source=True)
        source = {path: f.map(normal_tensor) for path, f in given.features.items()}
        recorder = FeatureRecorder(None, last=list(source)[-1])
        tap = AttentionTap(model, [recorder], differentiable=True)

        def loss(_) -> Tensor:
            rows = {path: small_tile(f) if self.checkpoint else None for path, f in source.items()}
            return sum(matching_loss(f, recorder.features[path], rows=rows[path]) for path, f in source.items())

        family = family_of(model)
        blocks = checkpointed(base.diffusion_model, family, tap, recorder) if self.checkpoint else nullcontext()
        cond, given = step.run.guider.conds["positive"][0], {"model_options": options, "mutates": family.mutates}
        with blocks:
            self.peak = peak_bytes(lambda: latent_gradient(base, x, step.sigma, cond, loss, tap=tap, **given))
        return x


def one_step(trajectory: Trajectory, prompt: list, function) -> Tensor:
    """The latent after one step from the first latent of `trajectory`, `function` before it."""
    guider = comfy.samplers.CFGGuider(trajectory.model)
    guider.inner_set_conds({"positive": prompt})
    guider.set_cfg(1.0)
    sampler, empty = TrajectorySampler(trajectory, before_step=[function]), torch.zeros(trajectory.shape)
    return guider.sample(empty, empty, sampler, trajectory.sigmas, disable_pbar=True, seed=0)


def checkpointing_cost(n: int, seed: int) -> tuple[dict, list[str]]:
    """Peak memory of one gradient, and peak memory and time of the whole step with it, source pass included."""
    editor = Editor(Settings())
    with tempfile.TemporaryDirectory() as folder:
        model = random_model(Path(folder), seed)
        attending = {layer.block for layer in attention_layers(model).values() if layer.kind == "spatial"}
        clean = torch.randn(8, 4, 16, 16, generator=torch.Generator().manual_seed(seed))
        latents, sigmas = torch.stack([2 * clean, clean]), torch.tensor([2.0, 0.0])
        given = editor.prompt("a red circle on a gray background")
        trajectory = Trajectory(latents, sigmas, NoiseSpace.VE, model, given)
        step = partial(one_step, trajectory, editor.prompt("a blue square on a gray background"))
        gradients = {name: GradientPeak(checkpoint=name == LEAN_STEP) for name in (KEEPING, LEAN_STEP)}
        for function in gradients.values():
            step(function)
        matching = RelevanceMatching(str_score_of(trajectory), 0.01)
        functions = {
            KEEPING: lambda: step(matching),
            LEAN_STEP: lambda: step(replace(matching, memory="low")),
        }
        peaks = {name: peak_bytes(function) for name, function in functions.items()}
        seconds = interleaved(functions, n)
    typical = medians(seconds)
    saving = gradients[KEEPING].peak / gradients[LEAN_STEP].peak
    whole, time = peaks[KEEPING] / peaks[LEAN_STEP], typical[LEAN_STEP].user / typical[KEEPING].user
    lines = [f"one matched step, UNet3D with {len(attending)} attention blocks, 8 frames of 16 x 16"]
    lines += [
        f"  {name:26} {format_time(typical[name])}, step {peaks[name] / 1e6:.1f} MB, its gradient "
        f"{gradients[name].peak / 1e6:.1f} MB"
        for name in functions
    ]
    lines += [
        verdict(saving >= MIN_SAVING, f"peak of the gradient {saving:.2f} times lower, at least {MIN_SAVING}"),
        f"         of the whole step {whole:.2f} times lower, in {time:.2f} of the time",
    ]
    gradient_bytes = {name: function.peak for name, function in gradients.items()}
    report = {"seconds": seconds, "peak_bytes": peaks, "gradient_peak_bytes": gradient_bytes}
    return report | {"saving": saving, "whole_step_saving": whole, "time": time}, lines


# --- command line -----------------------------------------------------


def format_time(seconds: CpuSeconds) -> str:
    """For a table."""
    return f"{seconds.user:7.2f} s (system {seconds.system:.2f} s)"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("loss", "edit", "checkpointing"), help="one of the three parts")
    parser.add_argument("--n", type=int, default=RUNS, help="runs of each, in turn")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--frames", type=int, default=FRAMES, help="of the loss; the dense one takes 1.5 GB at 16")
    parser.add_argument("--json", type=Path, help="also write every run's time here")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    torch.set_num_threads(1)
    n, seed = arguments.n, arguments.seed
    parts = {
        "loss": lambda: loss_cost(n, seed, arguments.frames),
        "edit": torch.inference_mode()(lambda: edit_cost(n, seed)),
        "checkpointing": torch.inference_mode()(lambda: checkpointing_cost(n, seed)),
    }
    report = {"seed": seed, "n": n}
    for name in [arguments.only] if arguments.only else parts:
        report[name], lines = parts[name]()
        print(*lines, "", sep="\n", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
