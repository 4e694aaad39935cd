"""What a CPU cannot tell: half precision, the methods, region attention and Wan's size on a card.

    python benchmarks/gpu.py [--only PART ...] [--device cuda | cpu] [--quick] [--folder assets/tiny_t2v]
                             [--seconds 160] [--json PATH]

precision  the embedded model in float16 and bfloat16 against float32, all on the card: the latents of clips that the
           host samples, and how well an inverted clip comes back
fp16, bf16 inversion, prompt swap, STR-Match, ST-Layout and DreamMotion on one clip against float32; seconds. Of
           STR-Match what is judged is where single steps of it move
methods    the same in float32 against the CPU, which another process computes meanwhile; seconds
attention  region attention in half precision against stock attention: time, by the kernel and by PyTorch, memory beyond
           query, key, value and output, error
loss       the loss of STR-Match of one block of Wan 1.3B, with its gradient: seconds, memory, error
wan        a step of STR-Match and of ST-Layout through Wan 1.3B with random weights at 480p: seconds, and peak memory
           against what *Predict Cost* says

Decibels are the power of the reference over that of the difference. Each part has a limit of its own; one that fails
is reported with its traceback, and the others still run; the exit code is then 1. What no longer fits into --seconds
is reported as not run. Seconds are wall clock, in half precision after a run that does not count. --quick is
for trying the script out: tiny sizes, whose figures say nothing.
"""
# ruff: noqa: E402 (the pack is loaded before it is imported)

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from time import perf_counter

START = perf_counter()

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, one_hot, scaled_dot_product_attention

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
from pack import load_pack

load_pack(host_arguments=["--cpu"] if "cpu" in sys.argv else [])  # the host looks for its device once, when it loads

import comfy.model_management as management
import comfy.samplers
from spacetime_edit.benchmarks import _cases as cases
from spacetime_edit.benchmarks import attention_cost, quality_dds
from spacetime_edit.benchmarks import quality_st_layout as st_layout
from spacetime_edit.benchmarks._device import GIB, extra_bytes, on_card, peak_of, seconds_of, typical_seconds
from spacetime_edit.benchmarks._editing import Editor, Settings
from spacetime_edit.benchmarks._parts import Row, Rows, at_least, at_most, run_part
from spacetime_edit.benchmarks._random_wan import WanClip, Watched, random_wan
from spacetime_edit.core.region_attention import modulated_attention
from spacetime_edit.core.regions import Region
from spacetime_edit.core.relevance import AttentionFeatures, matching_loss
from spacetime_edit.core.trajectory import Trajectory
from spacetime_edit.host.distillation import Distillation, optimise
from spacetime_edit.host.features import key_blocks
from spacetime_edit.host.inversion import reconstruct, reconstruction_db
from spacetime_edit.host.loaders import unet3d
from spacetime_edit.host.region_patch import RegionModulation, patch_regions
from spacetime_edit.host.relevance_matching import RelevanceMatching, str_score_of
from spacetime_edit.host.sampling import Step, TrajectorySampler
from spacetime_edit.tools.shape_world import instruments, world

HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}
INVERSION, SWAP, STR, LAYOUT, MOTION = "inversion", "prompt swap", "STR-Match", "ST-Layout", "DreamMotion"
ONE_CALL, FRAMES_OF, MOVES = "one call", "decoded", "STR-Match, single steps"

SAMPLING_STEPS = 12
LEAST_SAMPLED_DB = {"fp16": 30.0, "bf16": 20.0}  # latents from noise, against float32
LEAST_EDITED_DB = {"fp16": 15.0, "bf16": 5.0}  # in bf16 other edits, as good ones: see what they keep
LEAST_COSINE = {"fp16": 0.99, "bf16": 0.8}  # of single steps of STR-Match with float32's, the mean
LEAST_CPU_COSINE = 0.999
MAX_LOST_DB = 3.0  # of an inversion's round trip, and of what an edit keeps, against float32
LEAST_CPU_DB = {ONE_CALL: 80.0, FRAMES_OF: 30.0, INVERSION: 50.0, SWAP: 50.0, LAYOUT: 50.0, MOTION: 30.0}
MAX_TIME, MAX_BACKWARD = {40: 2.8, 64: 2.0, 128: 2.0}, 2.5  # of region attention, by the width of heads
MAX_MEMORY, MAX_ERROR = 0.1, 1.5
WAN_CALL = (1, 12, 32760, 128)
WAN_BLOCK = (9, 12, 1560, 128)  # frames, heads, tokens, width: 33 frames of 832 x 480
MAX_LOSS_SECONDS, MAX_LOSS_GB = 0.15, 2.0
MAX_OF_LEFT, LEAST_LOSS_COSINE = 1e-2, 0.9999  # of 1 + loss, and of the gradient, against float64
MAX_GIB, MAX_OF_PREDICTED = 24.0, 1.1
MAX_MATCHED, MAX_REGIONAL = 3.0, 1.7  # steps in plain ones


# --- measuring ----------------------------------------------------------


def db(result: Tensor, reference: Tensor) -> float:
    """Power of the reference over that of the difference; at most 200."""
    result, reference = (t.double().cpu() for t in (result, reference))
    error = (result - reference).square().mean()
    return float(10 * torch.log10(reference.square().mean() / error.clamp_min(1e-20))) if error > 0 else 200.0


def cosines(moves: Tensor, reference: Tensor) -> list[float]:
    """One a step, of (steps, *latent)."""
    moves, reference = (t.double().cpu().flatten(1) for t in (moves, reference))
    return cosine_similarity(moves, reference).tolist()


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """Within, products and convolutions of float32 are not rounded to TF32."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@dataclass
class Probe:
    """Before-step function that leaves the latent: where STR matching would move it.

    every: steps from one that it asks about to the next, until matching ends. latents: by step, those to ask about; the
    first run fills them in with its own.
    """

    matching: RelevanceMatching
    every: int
    latents: dict[int, Tensor]
    moves: list[Tensor] = field(default_factory=list)

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        if step.index % self.every == 0 and step.percent <= self.matching.end:
            latent = self.latents.setdefault(step.index, x)
            self.moves.append(self.matching(latent, step) - latent)
        return x


# --- the embedded model ---------------------------------------------------


@dataclass
class Tiny:
    """The embedded model in several dtypes, and the clips that it is tried on."""

    folder: str
    quick: bool
    _editors: dict[str, Editor] = field(default_factory=dict)
    _passed: dict[int, Tensor] = field(default_factory=dict)

    @property
    def settings(self) -> Settings:
        return Settings(steps=4 if self.quick else 20)

    def editor(self, dtype: str) -> Editor:
        if dtype not in self._editors:
            self._editors[dtype] = Editor(self.settings, self.folder, dtype)
        return self._editors[dtype]

    @cached_property
    def clips(self) -> list[cases.Case]:
        return cases.make_cases("one object", 0, 2 if self.quick else 16)

    @cached_property
    def pair(self) -> st_layout.Case:
        return st_layout.make_cases("forms", 0, 1)[0]

    @cached_property
    def latents(self) -> dict[str, Tensor]:
        """Of the two clips that are edited, for this process and the one on the CPU."""
        editor = self.editor("fp32")
        return {name: editor.encode(world.render(case.source)[0]) for name, case in self.edited.items()}

    @cached_property
    def exact(self) -> dict[str, tuple[Tensor, float]]:
        """Of float32 without TF32, by method, the edited latent and its seconds."""
        with exact_float32():
            return {name: (latent, time) for name, latent, time in edits_of(self, "fp32")}

    @cached_property
    def inverted(self) -> Trajectory:
        """The first clip's trajectory in float32 without TF32."""
        with exact_float32():
            return self.editor("fp32").invert(self.latents["one"], self.clips[0].source)

    @cached_property
    def exact_moves(self) -> Tensor:
        with exact_float32():
            return self.moves("fp32")

    def moves(self, dtype: str) -> Tensor:
        """Where up to four steps of STR matching move latents of float32's prompt swap: (steps, *latent)."""
        editor, case = self.editor(dtype), self.clips[0]
        trajectory = replace(self.inverted, model=editor.model)
        probe = Probe(editor.matching(trajectory), trajectory.steps // 4, self._passed)
        sampler = TrajectorySampler(trajectory, before_step=[probe])
        editor.sample(case.target, sampler, case.seed, torch.zeros(trajectory.shape))
        return torch.stack(probe.moves)

    @property
    def edited(self) -> dict[str, cases.Case | st_layout.Case]:
        return {"one": self.clips[0], "pair": self.pair}


def edits_of(tiny: Tiny, dtype: str) -> Iterator[tuple[str, Tensor, float]]:
    """The latents that the methods make, and the seconds that each took beyond its inversion."""
    editor, case, pair, latents = tiny.editor(dtype), tiny.clips[0], tiny.pair, tiny.latents
    trajectory, time = seconds_of(lambda: editor.invert(latents["one"], case.source))
    yield INVERSION, trajectory.latents[0], time
    of_pair = editor.invert(latents["pair"], pair.source)
    masks = world.render(pair.source)[1]
    regions = [Region(phrase, mask) for phrase, mask in zip(pair.phrases, masks, strict=True)]
    prompts = [editor.prompt(text) for text in (world.caption(case.source), world.caption(case.target), "")]
    motion = Distillation(
        steps=2 if tiny.quick else 16, step_size=1.6, cfg=4.0, weights=quality_dds.HELD, blocks=key_blocks(editor.model)
    )
    steps = {
        SWAP: lambda: editor.edit(trajectory, case.target, case.seed),
        STR: lambda: editor.edit(trajectory, case.target, case.seed, editor.matching(trajectory)),
        LAYOUT: lambda: st_layout.sample(editor, pair, of_pair, pair.prompt, regions, masks.amax(0), **st_layout.TUNED),
        MOTION: lambda: optimise(editor.model, *prompts, latents["one"], motion, seed=case.seed)[0],
    }
    for name, function in steps.items():
        yield name, *seconds_of(function)


def one_call(tiny: Tiny, dtype: str) -> Tensor:
    """The model's prediction of the clean latent from noise, in the middle of the schedule."""
    editor, case = tiny.editor(dtype), tiny.clips[0]
    guider = comfy.samplers.CFGGuider(editor.model)
    guider.inner_set_conds({"positive": editor.prompt(world.caption(case.source))})
    guider.set_cfg(1.0)
    sigmas = torch.stack([editor.sigmas[len(editor.sigmas) // 2], torch.tensor(0.0)])
    noise = torch.randn(tiny.latents["one"].shape, generator=torch.Generator().manual_seed(0))
    euler = comfy.samplers.sampler_object("euler")
    return guider.sample(noise, torch.zeros_like(noise), euler, sigmas, disable_pbar=True, seed=0)


def decoded(tiny: Tiny) -> Tensor:
    return tiny.editor("fp32").decode(tiny.latents["one"])


def precision(tiny: Tiny) -> Rows:
    ddim = comfy.samplers.sampler_object("ddim")

    def sampled(dtype: str, clips: int | None = None) -> list[Tensor]:
        editor, empty = tiny.editor(dtype), torch.zeros_like(tiny.latents["one"])
        sampling = editor.model.get_model_object("model_sampling")
        sigmas = comfy.samplers.calculate_sigmas(sampling, "ddim_uniform", 4 if tiny.quick else SAMPLING_STEPS)
        return [editor.sample(case.source, ddim, case.seed, empty, sigmas) for case in tiny.clips[:clips]]

    def returned(dtype: str) -> list[float]:
        editor, found = tiny.editor(dtype), []
        for case in tiny.clips[:2]:
            trajectory = editor.invert(editor.encode(world.render(case.source)[0]), case.source)
            found.append(reconstruction_db(trajectory, reconstruct(trajectory)))
        return found

    chosen = Editor(tiny.settings, tiny.folder).model.model.get_dtype()
    yield Row(f"by itself the host chooses {chosen}", 8 * chosen.itemsize, "bits")
    frames = tiny.editor("fp32").decode
    rounded = sampled("fp32", 4)
    with exact_float32():
        exact = sampled("fp32")
    found = [db(*pair) for pair in zip(rounded, exact, strict=False)]
    yield Row(f"fp32 with TF32 convolutions against without, {len(found)} clips, mean", mean(found), "dB")
    for dtype, least in LEAST_SAMPLED_DB.items():
        pairs = list(zip(sampled(dtype), exact, strict=True))
        found = [db(*pair) for pair in pairs]
        yield at_least(f"{dtype} against fp32, sampled latents, mean", mean(found), "dB", least)
        yield Row(f"{dtype} against fp32, sampled latents, worst", min(found), "dB")
        shown = [float(-10 * torch.log10((frames(a) - frames(b)).square().mean().clamp_min(1e-12))) for a, b in pairs]
        yield Row(f"{dtype} against fp32, frames, mean PSNR", mean(shown), "dB")
    with exact_float32():
        whole = mean(returned("fp32"))
    yield Row("inversion and back, fp32, mean", whole, "dB")
    for dtype in HALF:
        back = mean(returned(dtype))
        yield at_least(f"inversion and back, {dtype}, mean", back, "dB", whole - MAX_LOST_DB)


# --- the same on the CPU ----------------------------------------------------


class OnTheCpu:
    """A process that makes the same edits without a card, on half of the machine's processors."""

    def __init__(self, tiny: Tiny):
        self._folder = tempfile.TemporaryDirectory()
        self._given, self._made = (Path(self._folder.name, name) for name in ("given.pt", "made.pt"))
        torch.save(tiny.latents, self._given)
        command = [sys.executable, __file__, "--device", "cpu", "--folder", tiny.folder]
        command += ["--quick"] * tiny.quick + ["--reference", str(self._given), str(self._made)]
        environment = os.environ | {
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // 2)),
        }
        self._process = subprocess.Popen(command, env=environment)

    def results(self, timeout: float) -> dict[str, Tensor]:
        """Waits for them. Raises TimeoutError where they are not there in time."""
        try:
            code = self._process.wait(timeout)
        except subprocess.TimeoutExpired as error:
            raise TimeoutError(f"the CPU was not done after another {timeout:.0f} s") from error
        if code:
            raise RuntimeError(f"the process on the CPU ended with {code}")
        return torch.load(self._made, weights_only=True)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._folder.cleanup()


@torch.inference_mode()
def reference(tiny: Tiny, given: str, made: str) -> None:
    """What `OnTheCpu` runs."""
    tiny.latents = torch.load(given, weights_only=True)
    results = {ONE_CALL: one_call(tiny, "fp32"), FRAMES_OF: decoded(tiny), MOVES: tiny.exact_moves}
    results |= {name: latent for name, (latent, _) in tiny.exact.items()}
    torch.save({name: tensor.clone() for name, tensor in results.items()}, made)


def methods(tiny: Tiny, cpu: OnTheCpu) -> Rows:
    yield from (Row(f"{name}, fp32", time, "s") for name, (_, time) in tiny.exact.items())
    with exact_float32():
        own = {ONE_CALL: one_call(tiny, "fp32"), FRAMES_OF: decoded(tiny)}
    own |= {name: latent for name, (latent, _) in tiny.exact.items()}
    theirs = cpu.results(timeout=600.0 if tiny.quick else 30.0)
    for name, least in LEAST_CPU_DB.items():
        yield at_least(f"{name}, fp32 against the CPU", db(own[name], theirs[name]), "dB", least)
    same = min(cosines(tiny.exact_moves, theirs[MOVES]))
    yield at_least(f"{MOVES}, fp32 against the CPU, worst", same, "cosine", LEAST_CPU_COSINE)
    yield Row(f"{STR}, fp32 against the CPU", db(own[STR], theirs[STR]), "dB")
    rounded = db(one_call(tiny, "fp32"), theirs[ONE_CALL])
    yield Row(f"{ONE_CALL}, with TF32 convolutions, against the CPU", rounded, "dB")


def half_precision(dtype: str, tiny: Tiny) -> Rows:
    exact = tiny.exact_moves  # the first run, which says at which latents
    found = cosines(tiny.moves(dtype), exact)
    yield at_least(f"{MOVES}, {dtype} against fp32, mean", mean(found), "cosine", LEAST_COSINE[dtype])
    yield Row(f"{MOVES}, {dtype} against fp32, worst", min(found), "cosine")
    if not tiny.quick:
        for _ in edits_of(tiny, dtype):  # a run that does not count
            pass
    for name, latent, time in edits_of(tiny, dtype):
        yield Row(f"{name}, {dtype}", time, "s")
        edited = tiny.exact[name][0]
        what, found = f"{name}, {dtype} against fp32", db(latent, edited)
        yield Row(what, found, "dB") if name == STR else at_least(what, found, "dB", LEAST_EDITED_DB[dtype])
        if name in (SWAP, STR, MOTION):
            kept = kept_db(tiny, edited)
            yield at_least(f"{name}, {dtype}: what is kept", kept_db(tiny, latent), "dB", kept - MAX_LOST_DB)


def kept_db(tiny: Tiny, latent: Tensor) -> float:
    """PSNR outside the edited object, of the source against an edit of the first clip."""
    frames, (source, masks) = tiny.editor("fp32").decode(latent), world.render(tiny.clips[0].source)
    return instruments.kept_region_psnr_db(frames, source, masks)


# --- region attention -------------------------------------------------------


def attention_inputs(shape: tuple[int, ...], regions: int, dtype: torch.dtype) -> list[Tensor]:
    """Query, key, value, membership and strength."""
    device = management.get_torch_device()
    g = torch.Generator(device).manual_seed(0)
    qkv = [torch.randn(shape, generator=g, device=device).to(dtype) for _ in range(3)]
    region = one_hot(torch.randint(regions, shape[2:3], generator=g, device=device), regions).float()
    return [*qkv, region, 0.1 + 0.2 * torch.rand(shape[2], generator=g, device=device)]


def attention_error(dtype: torch.dtype, tokens: int) -> float:
    """Error of region attention over that of its dense form in the same dtype, both against float64."""
    q, k, v, region, strength = attention_inputs((1, 8, tokens, 40), 4, dtype)
    true = attention_cost.dense(*(t.double() for t in (q, k, v, region, strength)))
    ours = modulated_attention(q, k, v, region, region, strength)
    dense = attention_cost.dense(q, k, v, region.to(dtype), strength.to(dtype))
    return float((ours - true).square().mean().sqrt() / (dense - true).square().mean().sqrt())


def attention_rows(shape: tuple[int, ...], regions: int, name: str, backward: bool) -> Rows:
    q, k, v, region, strength = attention_inputs(shape, regions, HALF[name])
    leaves = [t.requires_grad_() for t in (q, k, v)] if backward else [q, k, v]

    def run(form: Callable[..., Tensor]) -> object:
        if backward:
            return torch.autograd.grad(form(*leaves).float().sum(), leaves)
        with torch.inference_mode():
            return form(*leaves)

    def regional(q: Tensor, k: Tensor, v: Tensor, kernels: bool = True) -> Tensor:
        return modulated_attention(q, k, v, region, region, strength, overlap="product", kernels=kernels)

    stock, ours = partial(run, scaled_dot_product_attention), partial(run, regional)
    given = sum(t.numel() * t.element_size() for t in (q, k, v))
    base, time = typical_seconds(stock), typical_seconds(ours)
    peak = extra_bytes(ours)  # after a run, which has made the libraries' workspaces
    what = f"{shape[1]} heads, {shape[2]} tokens, width {shape[3]}, {regions} regions, {name}{', backward' * backward}"
    yield Row(f"{what}: stock", 1e3 * base, "ms")
    yield at_most(f"{what}: time", time / base, "x stock", MAX_BACKWARD if backward else MAX_TIME[shape[3]])
    if backward:
        yield Row(f"{what}: extra memory", peak / given, "x q, k, v")
        return
    yield at_most(f"{what}: extra memory", (peak - given / 3) / given, "x q, k, v, beside the output", MAX_MEMORY)
    yield Row(f"{what}: by PyTorch", typical_seconds(partial(run, partial(regional, kernels=False))) / base, "x stock")


def attention(tiny: Tiny) -> Rows:
    for name, dtype in HALF.items():
        error = attention_error(dtype, 256 if tiny.quick else 2048)
        yield at_most(f"error, {name}", error, "x that of the dense form", MAX_ERROR)
    shapes = [(1, 8, 256, 40), (2, 2, 300, 128)] if tiny.quick else [(1, 8, 8192, 40), (1, 8, 16384, 64), WAN_CALL]
    for shape in shapes:
        for regions in (2, 16):
            yield from attention_rows(shape, regions, "bf16", False)
    yield from attention_rows(shapes[0], 16, "fp16", False)
    for shape in shapes[: len(shapes) - (not tiny.quick)]:
        yield from attention_rows(shape, 4, "bf16", True)


# --- the loss of STR-Match --------------------------------------------------


def block(shape: tuple[int, ...], noise: float) -> AttentionFeatures:
    """Query and key of attention over all frames in bfloat16, off by some noise."""
    device = management.get_torch_device()
    generator = torch.Generator(device).manual_seed(0)
    clip, other = (torch.randn(2, *shape, generator=generator, device=device) for _ in range(2))
    return AttentionFeatures(*(clip + noise * other).bfloat16())


def loss_and_gradient(source: AttentionFeatures, target: AttentionFeatures) -> tuple[float, Tensor]:
    leaves = [tensor.clone().requires_grad_() for tensor in target.tensors]
    value = matching_loss(source, AttentionFeatures(*leaves))
    gradient = torch.autograd.grad(value, leaves)
    return float(value.detach()), torch.cat([g.flatten() for g in gradient]).double()


def loss(tiny: Tiny) -> Rows:
    shape = (3, 2, 60, 128) if tiny.quick else WAN_BLOCK
    source, target = block(shape, 0.0), block(shape, 0.3)
    run = partial(loss_and_gradient, source, target)
    yield at_most("time of loss and gradient", typical_seconds(run), "s", MAX_LOSS_SECONDS)
    yield at_most("extra memory", extra_bytes(run) / 1e9, "GB", MAX_LOSS_GB)
    small = (3, 2, 60 if tiny.quick else 400, 128)
    for noise in (1.0, 0.3, 0.1, 0.03):
        source, target = block(small, 0.0), block(small, noise)
        value, gradient = loss_and_gradient(source, target)
        exact, wanted = loss_and_gradient(*(f.map(Tensor.double) for f in (source, target)))
        what, error = f"at a cosine of {-exact:.4f}", abs((1 + value) / (1 + exact) - 1)
        yield at_most(f"{what}: error of 1 + loss", error, "of it", MAX_OF_LEFT)
        cosine = float(cosine_similarity(gradient, wanted, dim=0))
        yield at_least(f"{what}: gradient against float64", cosine, "cosine", LEAST_LOSS_COSINE)


# --- Wan 1.3B -----------------------------------------------------------------

WAN = {"dim": 1536, "ffn_dim": 8960, "num_heads": 12, "num_layers": 30, "text_dim": 4096}
SMALL_WAN = {"dim": 128, "ffn_dim": 64, "num_heads": 1, "num_layers": 3, "text_dim": 32}


def matched_rows(clip: WanClip, what: str, memory: str, plain: float) -> Rows:
    matching = RelevanceMatching(str_score_of(clip.trajectory), memory=memory)
    watched = Watched(matching)
    step, _ = peak_of(lambda: clip.step_seconds(before=[watched]))
    predicted = (clip.model.model_size() + watched.report.memory.total(watched.report.checkpointing)) / GIB
    what = f"{what}, STR-Match, memory {memory}"
    row = f"{what}: step", step / plain, "x the plain one"
    yield at_most(*row, MAX_MATCHED) if memory == "auto" else Row(*row)
    yield Row(f"{what}: of it the matching", watched.seconds, "s")
    if on_card():
        peak = watched.peak / GIB
        yield at_most(f"{what}: peak of the matching", peak, "GiB", MAX_GIB)
        yield at_most(f"{what}: peak", peak / predicted, f"x the predicted {predicted:.2f} GiB", MAX_OF_PREDICTED)


def wan(tiny: Tiny) -> Rows:
    management.unload_all_models()
    gc.collect()
    management.soft_empty_cache()
    sizes, area = (SMALL_WAN, (8, 12)) if tiny.quick else (WAN, (60, 104))
    model = random_wan(sizes)
    for frames in (9,) if tiny.quick else (33, 81):
        clip = WanClip(model, (1, 16, (frames - 1) // 4 + 1, *area), sizes["text_dim"])
        what = f"{frames} frames of {8 * area[1]} x {8 * area[0]}"
        plain, peak = peak_of(clip.step_seconds)
        yield Row(f"{what}: plain step", plain, "s")
        if on_card():
            yield at_most(f"{what}: its peak", peak, "GiB", MAX_GIB)
        yield from matched_rows(clip, what, "auto", plain)
        regional = patch_regions(model, RegionModulation(end=1.0))
        time, peak = peak_of(lambda clip=clip, regional=regional: clip.step_seconds(regional))
        yield at_most(f"{what}, {LAYOUT}: step", time / plain, "x the plain one", MAX_REGIONAL)
        if on_card():
            yield at_most(f"{what}, {LAYOUT}: peak", peak, "GiB", MAX_GIB)
        yield from matched_rows(clip, what, "low", plain)


# --- running ------------------------------------------------------------------

PARTS: dict[str, tuple[Callable[..., Rows], float]] = {  # with its limit in seconds
    "precision": (precision, 35),
    "fp16": (partial(half_precision, "fp16"), 35),
    "bf16": (partial(half_precision, "bf16"), 25),
    "methods": (methods, 35),  # by now the process on the CPU is done
    "attention": (attention, 25),
    "loss": (loss, 20),
    "wan": (wan, 80),
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, nargs="+", default=list(PARTS))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to try the script out")
    parser.add_argument("--folder", default=unet3d.EMBEDDED, help="diffusers folder; by default the embedded model")
    parser.add_argument("--seconds", type=float, default=160.0, help="of everything, imports included")
    parser.add_argument("--json", type=Path, help="also write the figures here, after each part")
    parser.add_argument("--reference", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def run_in_time(name: str, part: Callable[[], Rows], arguments: argparse.Namespace) -> dict:
    """A part's report, if there is time left for it."""
    left = arguments.seconds - (perf_counter() - START)
    if left < 5:
        print(f"\n{name}: not run, the {arguments.seconds:.0f} s are over", flush=True)
        return {"rows": [], "error": "not run", "seconds": 0.0}
    limit = PARTS[name][1] * (4 if arguments.quick else 1)
    # the host runs nodes in inference mode; backward passes of attention alone want normal tensors
    with contextlib.nullcontext() if name in ("attention", "loss") else torch.inference_mode():
        return run_part(name, part, min(left, limit))


def main() -> int:
    arguments = parse_arguments()
    device = management.get_torch_device()
    if device.type != arguments.device:
        print(
            f"no {arguments.device} here: the host runs on {device}; --device {device.type} tries that", file=sys.stderr
        )
        return 2
    tiny = Tiny(arguments.folder, arguments.quick)
    if arguments.reference:
        reference(tiny, *arguments.reference)
        return 0
    name = torch.cuda.get_device_name() if on_card() else "CPU"
    print(f"{name}, PyTorch {torch.__version__}, {perf_counter() - START:.0f} s of imports", flush=True)
    report: dict = {"device": name, "torch": torch.__version__, "quick": arguments.quick, "parts": {}}
    with contextlib.ExitStack() as stack:
        parts = {name: partial(function, tiny) for name, (function, _) in PARTS.items()}
        with torch.inference_mode():
            if "methods" in arguments.only:
                stack.enter_context(contextlib.closing(cpu := OnTheCpu(tiny)))
                parts["methods"] = partial(methods, tiny, cpu)
        for name in arguments.only:
            report["parts"][name] = run_in_time(name, parts[name], arguments)
            if arguments.json:
                arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    failed = [name for name, part in report["parts"].items() if part["error"]]
    outcome = f"failed or not run: {', '.join(failed)}" if failed else "no part failed"
    print(f"\n{perf_counter() - START:.0f} s in all; {outcome}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
