"""Train the U-Net and the text encoder of the embedded model, together, on clips and images of the shape world.

    python tools/train_tiny/train_unet.py RUN [--init FOLDER] [--minutes 100] [--processes 2]

RUN is a folder with the VAE of `train_vae`; without one it gets that of --init. `unet.pt` in it is written every few
minutes and at the end, and a second call, also with another number of processes, goes on from it; the schedule counts
the minutes of all calls. The weights of the lowest held-out loss are in `best.pt`, which no worse ones replace.

Velocity prediction (v); the clean latent's error is weighted by min-SNR (gamma 5), by (1 + 1 / SNR)^0.75 toward noisy
times, where place, number and binding are decided, and up to threefold on objects where noise is low. At noisy times it
must not be: the best guess of a place under such a weight shows an object there too often, and clips get copies. For
the same reason the schedule ends in less signal than Stable Diffusion's (beta_end 0.018 instead of 0.012): there the
noisiest training latent still tells where its objects are, and pure noise is read as if it did. Muon and Adam; a moving
average of the weights is what is kept.
"""
# ruff: noqa: E402 (the pack is loaded before it is imported)

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.nn.functional import avg_pool2d, max_pool2d

sys.path.append(str(Path(__file__).resolve().parents[1]))
from pack import load_pack

load_pack(host=False)

from spacetime_edit.tools.train_tiny import checkpoints
from spacetime_edit.tools.train_tiny.batches import sample_batch
from spacetime_edit.tools.train_tiny.muon import Muon
from spacetime_edit.tools.train_tiny.parts import (
    SCHEDULE,
    alphas_cumprod,
    encode,
    encode_text,
    faster,
    ids_of,
    make_text_encoder,
    make_unet,
    read_text_encoder,
    read_unet,
    read_vae,
    with_coarse_attention,
)

AVERAGE = 0.997
GAMMA = 5.0
EMPTY_SHARE = 0.1
WARM_UP_STEPS = 40
HELD_OUT_SEED = 20_000
HELD_OUT_CLIPS = 32
"""Of 8 frames, and 8 of 16 frames, each at four times."""


# --- the loss -----------------------------------------------------------


@dataclass(frozen=True)
class Weighting:
    """times: cumulative density (1000,) that t is drawn from; loss: (1000,) the rest of the weight; alphas: (1000,)."""

    times: Tensor
    loss: Tensor
    alphas: Tensor

    @classmethod
    def of(cls, noisy: float, alphas: Tensor | None = None) -> Weighting:
        """noisy: p in (1 + 1 / SNR)^p; alphas: of another schedule than `parts.SCHEDULE`.

        The square root of the weight of v's error goes into the density.
        """
        alphas = alphas_cumprod() if alphas is None else alphas
        snr = alphas / (1 - alphas)
        weight = snr.clamp(max=GAMMA) * (1 + 1 / snr) ** noisy / (1 + snr)
        density = weight.sqrt() / weight.sqrt().mean()
        rest = weight / density
        return cls(density.cumsum(0) / len(density), rest / rest.mean(), alphas)

    def weight(self, t: Tensor, masks: Tensor, on_objects: float) -> Tensor:
        """Of the squared errors at t (B,): (B, 1, F, 16, 16), more by up to `on_objects` on objects of little noise."""
        alphas, loss = (values[t].view(-1, 1, 1, 1, 1) for values in (self.alphas, self.loss))
        return loss * (1 + on_objects * alphas * masks)

    def to(self, device: torch.device) -> Weighting:
        return Weighting(*(values.to(device) for values in (self.times, self.loss, self.alphas)))

    def draw(self, n: int) -> Tensor:
        """n times, stratified, in random order."""
        levels = (torch.arange(n) + torch.rand(n)) / n
        return torch.searchsorted(self.times, levels).clamp(0, len(self.times) - 1)[torch.randperm(n)]


@dataclass(frozen=True)
class Batch:
    """ids (B, 24): the captions; latents (B, 4, F, 16, 16); masks (B, 1, F, 16, 16): the objects, grown by a cell."""

    ids: Tensor
    latents: Tensor
    masks: Tensor


@torch.no_grad()
def make_batch(generator: np.random.Generator, vae, clips: int, frames: int) -> Batch:
    captions, images, masks = sample_batch(generator, clips, frames)
    return Batch(ids_of(captions), clip_latents(vae, images), coarse_masks(masks))


def clip_latents(vae, images: Tensor) -> Tensor:
    """(B, F, 3, 64, 64) in [0, 1] -> (B, 4, F, 16, 16)."""
    return encode(vae, images.flatten(0, 1)).unflatten(0, images.shape[:2]).transpose(1, 2).contiguous()


def coarse_masks(masks: Tensor) -> Tensor:
    """(B, F, 64, 64) -> (B, 1, F, 16, 16), grown by a cell."""
    return max_pool2d(avg_pool2d(masks, 4), 3, 1, 1)[:, None]


def squared_errors(model: nn.ModuleDict, batch: Batch, t: Tensor, noise: Tensor, alphas: Tensor) -> Tensor:
    """Of the predicted velocity a eps - s x0, in the shape of the latents."""
    alpha = alphas[t].view(-1, 1, 1, 1, 1)
    a, s = alpha.sqrt(), (1 - alpha).sqrt()
    text = encode_text(model["text"], batch.ids)
    velocity = model["unet"](a * batch.latents + s * noise, t, text, return_dict=False)[0].float()
    return (velocity - a * noise + s * batch.latents).square()


# --- the run ------------------------------------------------------------


def held_out_batches(vae) -> list[Batch]:
    """The clips that every run is judged by."""
    generator = np.random.default_rng(HELD_OUT_SEED)
    return [make_batch(generator, vae, 8, frames) for frames in (*(8,) * (HELD_OUT_CLIPS // 8), 16)]


class HeldOut:
    """The same clips, times and noises at every call: losses of two moments compare."""

    def __init__(self, batches: Iterable[Batch], weighting: Weighting, device: torch.device | str = "cpu"):
        self.weighting = weighting.to(device)
        self.batches = [Batch(*(x.to(device) for x in (b.ids, b.latents, b.masks))) for b in batches]

    @torch.no_grad()
    def loss(self, model: nn.ModuleDict) -> float:
        generator = torch.Generator().manual_seed(HELD_OUT_SEED)
        losses = []
        for batch in self.batches:
            t = torch.linspace(100, 980, len(batch.ids)).long().to(batch.ids.device)
            noise = torch.randn(batch.latents.shape, generator=generator).to(batch.latents)
            errors = squared_errors(model, batch, t, noise, self.weighting.alphas)
            losses.append((errors.mean((1, 2, 3, 4)) * self.weighting.loss[t]).mean())
        return float(torch.stack(losses).mean())


class Workers:
    """What the processes of one run do together; alone, nothing."""

    def __init__(self, rank: int, count: int, meeting: str):
        self.rank, self.count = rank, count
        if count > 1:
            distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=count)

    def agreed(self, value: float) -> float:
        """The first process' value."""
        tensor = torch.tensor(value, dtype=torch.float64)
        if self.count > 1:
            distributed.broadcast(tensor, 0)
        return float(tensor)

    def mean_gradients(self, parameters: list[nn.Parameter], limit: float) -> None:
        """Average over the processes, and scale to a norm of at most `limit`."""
        active = [p for p in parameters if p.grad is not None]
        if self.count > 1:
            flat = torch.cat([p.grad.flatten() for p in active])
            distributed.all_reduce(flat)
            for parameter, part in zip(active, flat.split([p.numel() for p in active]), strict=True):
                parameter.grad = (part / self.count).view_as(parameter)
        nn.utils.clip_grad_norm_(active, limit)


def frames_of_step(step: int, arguments: argparse.Namespace) -> int:
    """1, 8 or 16: by turns."""
    if step % arguments.image_every == 0:
        return 1
    return 16 if step % arguments.long_every == 1 else 8


def train(rank: int, arguments: argparse.Namespace, meeting: str) -> None:
    torch.set_num_threads(arguments.threads)
    workers = Workers(rank, arguments.processes, meeting)
    torch.manual_seed(arguments.seed)
    vae = read_vae(arguments.run).requires_grad_(False).eval()
    model, configuration = make_model(arguments)
    named = list(model.named_parameters())
    parameters = [p for _, p in named]
    optimiser = Muon(named, ("embed", "conv_in", "conv_out"))
    average, step, before = [p.detach().clone() for p in parameters], 0, 0.0
    path = arguments.run / "unet.pt"
    if path.exists():
        saved = checkpoints.load(path, configuration)
        model.load_state_dict(saved["weights"])
        optimiser.load_state_dict(saved["optimiser"])
        average, step, before = saved["average"], saved["step"], saved["seconds"]
    weighting = Weighting.of(arguments.noisy)
    held_out = HeldOut(held_out_batches(vae), weighting) if rank == 0 else None
    generator = np.random.default_rng([arguments.seed, rank, step])
    torch.manual_seed(arguments.seed + 1000 * rank + step)
    start = saved_at = time.monotonic()
    total, smooth = arguments.minutes * 60, {}

    def save(seconds: float) -> None:
        state = {"weights": model.state_dict(), "optimiser": optimiser.state_dict(), "average": average}
        checkpoints.save(path, configuration, state | {"step": step, "seconds": seconds})
        keep_best(arguments.run, configuration, model, average, held_out, step, seconds)

    while (seconds := workers.agreed(before + time.monotonic() - start)) < total:
        frames = frames_of_step(step, arguments)
        clips = {1: arguments.images, 8: arguments.clips, 16: max(1, arguments.clips // 2)}[frames]
        batch = make_batch(generator, vae, clips, frames)
        silent = torch.from_numpy(generator.random(clips) < EMPTY_SHARE)
        ids = torch.where(silent[:, None], ids_of([""]), batch.ids)
        t, noise = weighting.draw(clips), torch.randn_like(batch.latents)
        with torch.autocast("cpu", torch.bfloat16, enabled=arguments.bf16):
            errors = squared_errors(model, replace(batch, ids=ids), t, noise, weighting.alphas)
        weight = weighting.weight(t, batch.masks, arguments.object_weight)
        for parameter in parameters:
            parameter.grad = None
        (errors * weight).mean().backward()
        workers.mean_gradients(parameters, 1.0)
        rate = min(1.0, (step + 1) / WARM_UP_STEPS, (1 - seconds / total) / (1 - arguments.decay_from))
        optimiser.step(arguments.rate * max(rate, 0.02), arguments.adam_rate * max(rate, 0.02))
        step += 1
        torch._foreach_lerp_(average, [p.data for p in parameters], 1 - min(AVERAGE, (1 + step) / (20 + step)))
        plain = float((errors.detach().mean((1, 2, 3, 4)) * weighting.loss[t]).mean())
        smooth[frames] = 0.96 * smooth.get(frames, plain) + 0.04 * plain
        if rank == 0 and step % 50 == 0:
            losses = ", ".join(f"{n} frames {value:.4f}" for n, value in sorted(smooth.items()))
            print(f"step {step}, {seconds / 60:.1f} min, rate {rate:.2f}, loss {losses}", flush=True)
        if rank == 0 and time.monotonic() - saved_at > arguments.save_minutes * 60:
            save(seconds)
            saved_at = time.monotonic()
    if rank == 0:
        save(seconds)
    if workers.count > 1:
        distributed.destroy_process_group()


def keep_best(
    run: Path,
    configuration: dict,
    model: nn.ModuleDict,
    average: list[Tensor],
    held_out: HeldOut,
    step: int,
    seconds: float,
) -> None:
    """Write RUN/best.pt with the average of the weights, unless the file's own loss on held-out clips is lower."""
    parameters = list(model.parameters())
    moving = [p.detach().clone() for p in parameters]
    copy_into(parameters, average)
    loss = held_out.loss(model)
    weights = {name: value.cpu() for name, value in model.state_dict().items()}
    try:
        state = {"weights": weights, "step": step, "seconds": seconds}
        checkpoints.save(run / "best.pt", configuration, state, score=-loss)
        kept = "best so far"
    except checkpoints.CheckpointError as reason:
        kept = str(reason)
    copy_into(parameters, moving)
    print(f"step {step}, {seconds / 60:.1f} min, held-out loss {loss:.5f}, {kept}", flush=True)


def copy_into(parameters: list[nn.Parameter], values: list[Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)


def make_model(arguments: argparse.Namespace) -> tuple[nn.ModuleDict, dict]:
    """The U-Net and the text encoder, and the configuration that their checkpoints name."""
    if arguments.init:
        unet = with_coarse_attention(read_unet(arguments.init))
        text = read_text_encoder(arguments.init)
    else:
        unet, text = make_unet(tuple(arguments.channels)), make_text_encoder()
    model = nn.ModuleDict({"unet": faster(unet), "text": text}).train()
    configuration = {
        "channels": list(unet.config.block_out_channels),
        "head": unet.config.attention_head_dim,
        "blocks": list(unet.config.down_block_types),
        "words": text.config.vocab_size,
        "init": arguments.init,
        "schedule": SCHEDULE,
        "noisy": arguments.noisy,
    }
    return model, configuration


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--init", default="", help="diffusers folder to begin from; empty: random weights")
    parser.add_argument("--channels", type=int, nargs=3, default=[32, 64, 80], help="of a U-Net of random weights")
    parser.add_argument("--minutes", type=float, default=100.0, help="of all calls together")
    parser.add_argument("--processes", type=int, default=1, help="each with its own batch; gradients are averaged")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--bf16", action="store_true", help="products in bfloat16: faster where the processor has them")
    parser.add_argument("--clips", type=int, default=6, help="a step and process, of 8 frames; half as many of 16")
    parser.add_argument("--images", type=int, default=32, help="an image step and process")
    parser.add_argument("--image-every", type=int, default=4, help="every so many steps is one of images")
    parser.add_argument("--long-every", type=int, default=8, help="every so many steps is one of 16 frames")
    parser.add_argument("--rate", type=float, default=0.015, help="of Muon")
    parser.add_argument("--adam-rate", type=float, default=2e-3)
    parser.add_argument("--decay-from", type=float, default=0.35, help="share of the minutes at the full rate")
    parser.add_argument("--noisy", type=float, default=0.75, help="p in the weight (1 + 1 / SNR)^p; 0: min-SNR alone")
    parser.add_argument("--object-weight", type=float, default=2.0, help="added on objects, times the signal variance")
    parser.add_argument("--save-minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    if arguments.init and not (arguments.run / "vae").is_dir():
        shutil.copytree(Path(arguments.init) / "vae", arguments.run / "vae")
    with tempfile.TemporaryDirectory() as folder:
        meeting = str(Path(folder) / "meeting")
        if arguments.processes == 1:
            train(0, arguments, meeting)
        else:
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # an exit that takes the processes along
            torch.multiprocessing.spawn(train, (arguments, meeting), arguments.processes, daemon=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
