"""Train the U-Net and the text encoder of the emoji world's model on one CUDA card.

    python tools/train_emoji/train_unet.py RUN --seconds 580 [--init FOLDER] [--plan 640] [--finish] [--out FOLDER]

RUN is a folder with the VAE of `train_vae`, or gets that of --init, and begins from its weights if it has some: then no
worse ones are kept. Loss, optimiser and graphs are those of `train_tiny.train_unet_gpu`; single
images come first and clips later. `unet.pt` in it is written every minute or two, and a second call goes on from it.
The weights of the lowest held-out loss are in `best.pt`, which no worse ones replace, and in half precision in --out.

The rate falls with the seconds of all calls, to zero at --plan; with --finish from where it is to zero at this call's
end.
"""
# ruff: noqa: E402 (the pack is loaded before it is imported)

from __future__ import annotations

import argparse
import math
import multiprocessing
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

sys.path.append(str(Path(__file__).resolve().parents[1]))
from pack import load_pack

STARTED = time.monotonic()
load_pack(host=False)

from spacetime_edit.tools.train_emoji import weights
from spacetime_edit.tools.train_emoji.batches import VOCABULARY, Clips, sample_batch
from spacetime_edit.tools.train_emoji.model import (
    CHANNELS,
    HEAD,
    SHOWN,
    alphas_cumprod,
    decode_clips,
    make_model,
    sample,
    sheet,
)
from spacetime_edit.tools.train_emoji.speed import faster_on_card
from spacetime_edit.tools.train_tiny import checkpoints, train_unet_gpu
from spacetime_edit.tools.train_tiny.parts import faster, ids_of, read_vae
from spacetime_edit.tools.train_tiny.train_unet import (
    HELD_OUT_SEED,
    Batch,
    Weighting,
    clip_latents,
    coarse_masks,
    copy_into,
    keep_best,
)

HELD_OUT_CLIPS = 48
WARM_UP_STEPS = 150
LOWEST_RATE = 0.002
WAIT_EVERY = 4
IMAGES_FIRST = ((0.0, 0.6), (0.15, 0.5), (0.4, 0.12), (1.0, 0.08))
"""Share of the seconds done, and share of the steps that are of single images: appearance and place cost less there."""
RESERVE_SECONDS = 14.0
"""For the last weights and the sheet of samples."""
NOT_FINITE = 3
"""Exit status of a run whose loss is not finite."""
BEGUN_FROM = "init.safetensors"
"""In a run that began from weights, these."""


class Trainer(train_unet_gpu.Trainer):
    """The card's trainer on this world."""

    def make_weighting(self) -> Weighting:
        return Weighting.of(self.arguments.noisy, alphas_cumprod())

    @torch.no_grad()
    def held_out_batches(self) -> list[Batch]:
        self.vae.to(self.device)
        generator, batches = np.random.default_rng(HELD_OUT_SEED), []
        for _ in range(self.arguments.held_out // 8):
            captions, images, masks = sample_batch(generator, 8)
            latents = clip_latents(self.vae, images.to(self.device))
            batches.append(Batch(ids_of(captions, VOCABULARY), latents, coarse_masks(masks)))
        return batches

    def make_model(self) -> tuple[nn.ModuleDict, dict]:
        model, configuration = make_model(self.arguments.channels, self.arguments.head)
        model.to(self.device).train()
        faster_on_card(faster(model["unet"]), self.arguments.clips)
        return model, configuration | {"noisy": self.arguments.noisy}

    def state(self) -> dict:
        """What `load` goes on from."""
        return {"weights": self.model.state_dict(), "optimiser": self.optimiser.state_dict(), "average": self.average}

    def load(self, saved: dict) -> None:
        self.model.load_state_dict(saved["weights"])
        self.optimiser.load_state_dict(saved["optimiser"])
        copy_into(self.average, [x.to(self.device) for x in saved["average"]])

    def begin_from(self, path: Path) -> None:
        """Take the weights of a file. Raises CheckpointError where they are of another model."""
        saved = weights.read(path)
        if names := weights.differences(saved, self.configuration):
            raise checkpoints.CheckpointError(f"{path} is of another model ({', '.join(names)}); name other sizes")
        self.model.load_state_dict(saved["weights"])
        copy_into(self.average, [p.detach() for p in self.parameters])
        print(f"beginning from weights of step {saved['step']}, held-out loss {-saved['score']:.5f}", flush=True)

    def publish(self, folder: Path) -> None:
        """Write the best weights and the VAE in half precision, with their score in the file's metadata."""
        weights.write(folder, checkpoints.load(self.arguments.run / "best.pt"), read_vae(self.arguments.run))

    @torch.no_grad()
    def show(self, folder: Path, seeds: tuple[int, ...] = (0, 1)) -> None:
        """Draw the best weights' clips of captions of `SHOWN`, one column a seed."""
        captions = SHOWN[: self.arguments.shown]
        best = checkpoints.load(self.arguments.run / "best.pt")["weights"]
        moving = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.model.load_state_dict(best)
        clips = [decode_clips(self.vae, sample(self.model, captions, seed)) for seed in seeds]
        self.model.load_state_dict(moving)
        twice = [caption for caption in captions for _ in seeds]
        sheet(torch.stack(clips, 1).flatten(0, 1), twice, len(seeds)).save(folder / "samples.png", optimize=True)

    def profile(self, drawn: tuple[Tensor, ...]) -> None:
        """Print which operations a step without a graph spends the device's time on."""
        inputs = [x.to(self.device) for x in (*drawn, self.weighting.draw(len(drawn[0])))]
        with torch.profiler.profile() as profiler:
            self.step(drawn[1].shape[1], *inputs)
            self.rate.item()
        kind = "cpu" if self.device.type == "cpu" else "device"
        averages = profiler.key_averages()
        print(averages.table(sort_by=f"self_{kind}_time_total", row_limit=40, max_name_column_width=70), flush=True)


def give_start(init: Path, run: Path) -> None:
    """Give a run that has not begun a folder's VAE, and its weights where it has some."""
    if (run / "unet.pt").exists():
        return
    shutil.copytree(init / "vae", run / "vae", dirs_exist_ok=True)
    if (init / weights.MODEL).is_file():
        shutil.copy(init / weights.MODEL, run / BEGUN_FROM)


def image_share(done: float) -> float:
    """Of the steps, after this share of the seconds."""
    return float(np.interp(done, *zip(*IMAGES_FIRST, strict=True)))


def rate_of(step: int, done: float, decay_from: float) -> float:
    """Share of the full rate at a step, and after a share of the seconds."""
    return max(LOWEST_RATE, min(1.0, (step + 1) / WARM_UP_STEPS, (1 - done) / (1 - decay_from)))


def batches_of(arguments: argparse.Namespace, share) -> Iterator[tuple[Tensor, ...]]:
    seed = arguments.seed + int(time.time())  # a second call draws other clips
    loader = DataLoader(
        Clips(seed, arguments.clips, arguments.images, share), None, num_workers=arguments.loaders,
        prefetch_factor=3 if arguments.loaders else None, pin_memory=arguments.device != "cpu",
    )  # fmt: skip
    return iter(loader)


def train(arguments: argparse.Namespace) -> None:
    device = torch.device(arguments.device)
    end = STARTED + arguments.seconds - arguments.reserve
    path, begun_from = arguments.run / "unet.pt", arguments.run / BEGUN_FROM
    fresh = not begun_from.exists()  # weights that are there have had their images
    earlier = {"step": 0, "seconds": 0.0} if fresh else weights.about(begun_from)
    share = multiprocessing.Value("d", image_share(0.0 if fresh else 1.0))
    batches = batches_of(arguments, share)
    drawn = next(batches)  # the processes are there before the card is in use
    torch.manual_seed(arguments.seed)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    trainer, step, before = Trainer(arguments, device), 0, 0.0
    count = sum(p.numel() for p in trainer.parameters)
    print(f"{count / 1e6:.2f} M parameters, {time.monotonic() - STARTED:.0f} s after the start", flush=True)
    if path.exists():
        saved = checkpoints.load(path, trainer.configuration)
        trainer.load(saved)
        step, before = saved["step"], saved["seconds"]
        print(f"going on from step {step}, {before:.0f} s", flush=True)
        del saved

    def keep() -> None:
        had = step + earlier["step"], seconds + earlier["seconds"]
        keep_best(arguments.run, trainer.configuration, trainer.model, trainer.average, trainer.held_out, *had)
        trainer.publish(arguments.out)

    def save() -> None:
        torch.backends.cudnn.benchmark = False  # the graphs are there
        checkpoints.save(path, trainer.configuration, trainer.state() | {"step": step, "seconds": seconds})
        keep()

    first_step, began = step, time.monotonic()
    saved_at, seconds = began, before
    if not step and not fresh:
        trainer.begin_from(begun_from)
        keep()
    plan = before + end - began if arguments.finish else arguments.plan
    decay_from = arguments.decay_from
    if arguments.finish and step:  # from the rate there was, straight to zero
        reached = rate_of(step, before / arguments.plan, decay_from)
        decay_from = 1 - (1 - before / plan) / max(reached, 1e-3)
    while time.monotonic() < end:
        seconds = before + time.monotonic() - began
        done = min(1.0, seconds / plan)
        share.value = image_share(done if fresh else 1.0)
        trainer(drawn, rate_of(step, done, decay_from))
        drawn, step = next(batches), step + 1
        if step % WAIT_EVERY == 0:
            trainer.rate.item()  # waits for the card, which else would be seconds behind
        if step % arguments.print_every == 0 or step - first_step in (20, 100):
            report(trainer, step, first_step, began, rate_of(step, done, decay_from))
        if time.monotonic() - saved_at > arguments.save_seconds:
            save()
            saved_at = time.monotonic()
    save()
    trainer.show(arguments.out)
    if arguments.profile:
        trainer.profile(drawn)
    if device.type == "cuda":
        print(f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB of the card's memory", flush=True)


def report(trainer: Trainer, step: int, first_step: int, began: float, rate: float) -> None:
    losses = {frames: float(loss) for frames, loss in sorted(trainer.losses.items())}
    pace = (time.monotonic() - began) / (step - first_step) * 1000
    words = ", ".join(f"{frames} frames {loss:.4f}" for frames, loss in losses.items())
    print(f"step {step}, {pace:.1f} ms a step, rate {rate:.3f}, loss {words}", flush=True)
    if not all(map(math.isfinite, losses.values())):
        print("the loss is not finite", flush=True)
        sys.exit(NOT_FINITE)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--init", type=Path, help="folder with vae/, and weights if it has some, to begin from")
    parser.add_argument("--out", type=Path, help="folder for weights and samples; by default the run's")
    parser.add_argument("--seconds", type=float, default=580.0, help="of this call, from its start to its end")
    parser.add_argument("--plan", type=float, default=640.0, help="seconds of training of all calls")
    parser.add_argument("--finish", action="store_true", help="the rate is zero at the end of this call")
    parser.add_argument("--reserve", type=float, default=RESERVE_SECONDS, help="seconds left for the end")
    parser.add_argument("--channels", type=int, nargs=3, default=list(CHANNELS))
    parser.add_argument("--head", type=int, default=HEAD, help="channels of an attention head")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--profile", action="store_true", help="print where the time of a step goes, at the end")
    parser.add_argument("--eager", action="store_true", help="without CUDA graphs")
    parser.add_argument("--loaders", type=int, default=14, help="processes that draw clips")
    parser.add_argument("--clips", type=int, default=80, help="a step, of 8 frames")
    parser.add_argument("--images", type=int, default=256, help="an image step")
    parser.add_argument("--rate", type=float, default=0.014, help="of Muon")
    parser.add_argument("--adam-rate", type=float, default=2e-3)
    parser.add_argument("--decay-from", type=float, default=0.3, help="share of the seconds at the full rate")
    parser.add_argument("--noisy", type=float, default=1.0, help="p in the weight (1 + 1 / SNR)^p; 0: min-SNR alone")
    parser.add_argument("--object-weight", type=float, default=2.0, help="added on objects, times the signal variance")
    parser.add_argument("--held-out", type=int, default=HELD_OUT_CLIPS, help="clips that the weights are judged by")
    parser.add_argument("--shown", type=int, default=len(SHOWN), help="captions of the sheet of samples")
    parser.add_argument("--save-seconds", type=float, default=110.0)
    parser.add_argument("--print-every", type=int, default=250, help="steps")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.out = arguments.out or arguments.run
    return arguments


def main() -> int:
    arguments = parse_arguments()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.init:
        give_start(arguments.init, arguments.run)
    train(arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
