"""Train the U-Net and the text encoder of the embedded model on one CUDA card: `train_unet` with larger steps.

    python tools/train_tiny/train_unet_gpu.py RUN --init assets/tiny_t2v [--minutes 9] [--clips 96]

Loss, held-out clips and `best.pt` are those of `train_unet`. The U-Net's thousands of small operations would keep a
card waiting for Python, so a whole step, from the frames to the average of the weights, is one CUDA graph for each
number of frames; processes draw the clips meanwhile. The minutes count from the start of the command: it is made for a
card that is there for minutes, and a second call begins anew from --init.
"""
# ruff: noqa: E402 (the pack is loaded before it is imported)

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

sys.path.append(str(Path(__file__).resolve().parents[1]))
from pack import load_pack

STARTED = time.monotonic()
load_pack(host=False)

from spacetime_edit.tools.train_tiny.batches import sample_batch
from spacetime_edit.tools.train_tiny.muon import Muon
from spacetime_edit.tools.train_tiny.parts import ids_of, read_vae
from spacetime_edit.tools.train_tiny.train_unet import (
    EMPTY_SHARE,
    Batch,
    HeldOut,
    Weighting,
    clip_latents,
    coarse_masks,
    held_out_batches,
    keep_best,
    make_model,
    squared_errors,
)

AVERAGE = 0.999
SHARES = {"one": 0.13, "part": 0.1, "sides": 0.13, "heights": 0.1, "pair": 0.2, "same": 0.15, "three": 0.13}
"""Of the kinds of scene, the rest is "crossing": more than in `variety.KINDS` of those that are hard."""
FRAMES = {8: 0.76, 16: 0.16, 1: 0.08}
"""Shares of the steps."""
WARM_UP_STEPS = 200
WAIT_EVERY = 4
TIMED = range(40, 140)
"""Steps whose pace must not be above `--slowest`."""


class Clips(IterableDataset):
    """Endless batches for one step each."""

    def __init__(self, seed: int, sizes: dict[int, int]):
        self.seed, self.sizes = seed, sizes

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        torch.set_num_threads(1)
        worker = get_worker_info()
        generator = np.random.default_rng([self.seed, worker.id if worker else 0])
        while True:
            frames = int(generator.choice(list(FRAMES), p=list(FRAMES.values())))
            yield draw(generator, self.sizes[frames], frames)


def draw(generator: np.random.Generator, clips: int, frames: int) -> tuple[Tensor, Tensor, Tensor]:
    """ids (B, 24); images (B, F, 3, 64, 64) and masks (B, 1, F, 16, 16), in 0 to 255."""
    shares = SHARES | {"crossing": 1 - sum(SHARES.values())}
    kinds = generator.choice(list(shares), p=list(shares.values()), size=clips)
    captions, images, masks = sample_batch(generator, clips, frames, kinds)
    ids = ids_of("" if generator.random() < EMPTY_SHARE else caption for caption in captions)
    return ids, (images * 255).round().byte(), (coarse_masks(masks) * 255).round().byte()


class Trainer:
    """The model, what moves it, and one graph a number of frames.

    A trainer of another world overrides `make_weighting`, `held_out_batches` and `make_model`.
    """

    def __init__(self, arguments: argparse.Namespace, device: torch.device):
        self.arguments, self.device = arguments, device
        self.vae = read_vae(arguments.run).requires_grad_(False).eval()
        self.weighting = self.make_weighting()
        self.held_out = HeldOut(self.held_out_batches(), self.weighting, device)
        self.vae.to(device)
        model, self.configuration = self.make_model()
        self.model = model.to(device)
        named = list(self.model.named_parameters())
        self.parameters = [p for _, p in named]
        self.rate, self.adam_rate = (torch.zeros((), device=device) for _ in range(2))
        self.optimiser = Muon(named, ("embed", "conv_in", "conv_out"), in_graph=device.type == "cuda")
        self.average = [p.detach().clone() for p in self.parameters]
        self.on_card = self.weighting.to(device)
        self.losses: dict[int, Tensor] = {}
        self.graphs: dict[int, tuple[tuple[Tensor, ...], torch.cuda.CUDAGraph]] = {}

    def make_weighting(self) -> Weighting:
        return Weighting.of(self.arguments.noisy)

    def held_out_batches(self) -> list[Batch]:
        """On the CPU, where the VAE is."""
        return held_out_batches(self.vae)

    def make_model(self) -> tuple[nn.ModuleDict, dict]:
        """The U-Net and the text encoder, and the configuration that their checkpoints name."""
        return make_model(self.arguments)

    def step(self, frames: int, ids: Tensor, images: Tensor, masks: Tensor, t: Tensor) -> None:
        """One step of training, nothing of which waits for the card."""
        with torch.no_grad():
            batch = Batch(ids, clip_latents(self.vae, images / 255), masks / 255)
        noise = torch.randn_like(batch.latents)
        for parameter in self.parameters:
            parameter.grad = None
        with torch.autocast(self.device.type, torch.bfloat16):
            errors = squared_errors(self.model, batch, t, noise, self.on_card.alphas)
        (errors * self.on_card.weight(t, batch.masks, self.arguments.object_weight)).mean().backward()
        torch.nn.utils.clip_grad_norm_([p for p in self.parameters if p.grad is not None], 1.0)
        self.optimiser.step(self.rate, self.adam_rate)
        with torch.no_grad():
            torch._foreach_lerp_(self.average, [p.data for p in self.parameters], 1 - AVERAGE)
            plain = (errors.mean((1, 2, 3, 4)) * self.on_card.loss[t]).mean()
            self.losses[frames].lerp_(plain, 0.02)

    def __call__(self, inputs: tuple[Tensor, ...], rate: float) -> None:
        """A step of a drawn batch at a share of the full rate."""
        frames = inputs[1].shape[1]
        inputs = (*inputs, self.weighting.draw(len(inputs[0])))
        self.rate.fill_(self.arguments.rate * rate)
        self.adam_rate.fill_(self.arguments.adam_rate * rate)
        if frames not in self.graphs:
            self.losses.setdefault(frames, torch.full((), 0.2, device=self.device))
            static = tuple(x.to(self.device) for x in inputs)
            if self.device.type == "cpu" or self.arguments.eager:
                self.step(frames, *static)
                return
            self.graphs[frames] = static, self._captured(frames, static)
        static, graph = self.graphs[frames]
        for mine, given in zip(static, inputs, strict=True):
            mine.copy_(given, non_blocking=True)
        graph.replay()

    def _captured(self, frames: int, static: tuple[Tensor, ...]) -> torch.cuda.CUDAGraph:
        began = time.monotonic()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.step(frames, *static)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        for parameter in self.parameters:
            parameter.grad = None
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # another thread pins batches meanwhile
            self.step(frames, *static)
        print(f"graph of {frames} frames after {time.monotonic() - began:.1f} s", flush=True)
        return graph

    def save(self, step: int) -> None:
        seconds = time.monotonic() - STARTED
        keep_best(self.arguments.run, self.configuration, self.model, self.average, self.held_out, step, seconds)


def train(arguments: argparse.Namespace) -> None:
    device = torch.device(arguments.device)
    sizes = {8: arguments.clips, 16: arguments.clips // 2, 1: arguments.images}
    clips = Clips(arguments.seed, sizes)
    batches = iter(
        DataLoader(clips, None, num_workers=arguments.loaders, prefetch_factor=4, pin_memory=device.type == "cuda")
    )
    first = next(batches)  # the processes are there before the card is in use
    torch.manual_seed(arguments.seed)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    trainer = Trainer(arguments, device)
    trainer.save(0)
    total, saved_at = arguments.minutes * 60, time.monotonic()
    began, step, marks = time.monotonic() - STARTED, 0, []
    while (seconds := time.monotonic() - STARTED) < total:
        share = (seconds - began) / max(total - began, 1e-9)
        rate = min(1.0, (step + 1) / WARM_UP_STEPS, (1 - share) / (1 - arguments.decay_from))
        trainer(first if step == 0 else next(batches), max(rate, 0.002))
        step += 1
        if step % WAIT_EVERY == 0:
            trainer.rate.item()  # waits for the card, which else would be seconds behind
        if step in (TIMED.start, TIMED.stop):
            marks.append(time.monotonic())
            pace = (marks[-1] - marks[0]) / len(TIMED) * 1000
            if pace > arguments.slowest:
                raise SystemExit(f"{pace:.0f} ms a step: too slow for the minutes there are")
        if step % arguments.print_every == 0:
            losses = ", ".join(f"{n} frames {float(x):.4f}" for n, x in sorted(trainer.losses.items()))
            pace = (time.monotonic() - STARTED - began) / step * 1000
            print(f"step {step}, {seconds / 60:.1f} min, {pace:.1f} ms a step, loss {losses}", flush=True)
        if time.monotonic() - saved_at > arguments.save_minutes * 60:
            trainer.save(step)
            saved_at = time.monotonic()
    trainer.save(step)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--init", required=True, help="diffusers folder to begin from")
    parser.add_argument("--minutes", type=float, default=9.0, help="from the start of the command to its end")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--eager", action="store_true", help="without CUDA graphs")
    parser.add_argument("--loaders", type=int, default=14, help="processes that draw clips")
    parser.add_argument("--clips", type=int, default=96, help="a step, of 8 frames; half as many of 16")
    parser.add_argument("--images", type=int, default=256, help="an image step")
    parser.add_argument("--rate", type=float, default=0.012, help="of Muon")
    parser.add_argument("--adam-rate", type=float, default=1.5e-3)
    parser.add_argument("--decay-from", type=float, default=0.15, help="share of the minutes at the full rate")
    parser.add_argument("--noisy", type=float, default=1.0, help="p in the weight (1 + 1 / SNR)^p; 0: min-SNR alone")
    parser.add_argument("--object-weight", type=float, default=2.0, help="added on objects, times the signal variance")
    parser.add_argument("--save-minutes", type=float, default=2.0)
    parser.add_argument("--print-every", type=int, default=500, help="steps")
    parser.add_argument("--slowest", type=float, default=120.0, help="ms a step, above which the run stops at once")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    if not (arguments.run / "vae").is_dir():
        shutil.copytree(Path(arguments.init) / "vae", arguments.run / "vae")
    train(arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
