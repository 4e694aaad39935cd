"""Train the VAE of the embedded model on frames of the shape world.

    python tools/train_tiny/train_vae.py RUN [--init FOLDER] [--minutes 12]

RUN is a folder; `vae.pt` in it is written about every minute, and a second call goes on from it. At the end latents are
whitened exactly, the map folded into the two 1 x 1 convolutions, so that a latent has mean 0 and variance 1 after the
usual scaling factor 0.18215, and the VAE is written to RUN/vae in diffusers layout, unless a better one is there.
"""
# ruff: noqa: E402 (the pack is loaded before it is imported)

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import max_pool2d

sys.path.append(str(Path(__file__).resolve().parents[1]))
from pack import load_pack

load_pack(host=False)

from spacetime_edit.core.metrics import psnr_db
from spacetime_edit.tools.train_tiny import checkpoints
from spacetime_edit.tools.train_tiny.batches import sample_batch
from spacetime_edit.tools.train_tiny.muon import Muon
from spacetime_edit.tools.train_tiny.parts import SCALING, decode, encode, make_vae, read_vae

AVERAGE = 0.995
SAVE_SECONDS = 60
HELD_OUT_SEED = 10_000
HELD_OUT_FRAMES = 512

FramesOf = Callable[[np.random.Generator, int], tuple[Tensor, Tensor]]
"""n frames (B, 3, 64, 64) of a world, and the union of their objects (B, 1, 64, 64)."""


def frames_of(generator: np.random.Generator, n: int) -> tuple[Tensor, Tensor]:
    _, frames, masks = sample_batch(generator, n, 1)
    return frames[:, 0], masks


def loss_of(vae, frames: Tensor, masks: Tensor, noise: float, covariance: float) -> tuple[Tensor, Tensor]:
    """The loss, and the mean squared error of pixels in [0, 1].

    L1 + 2 MSE with edges of objects weighted 3, half the L1 of the gradients, and instead of a KL term the squared
    distance of the latents' mean and covariance from 0 and 1; noise: added to the latents before they are decoded.
    """
    x = frames * 2 - 1
    latents = vae.encode(x).latent_dist.mode() * SCALING
    values = latents.movedim(1, 0).flatten(1)
    centred = values - values.mean(1, keepdim=True)
    spread = centred @ centred.mT / values.shape[1]
    unit = (spread - torch.eye(len(spread), device=spread.device)).square().sum() + values.mean(1).square().sum()
    y = vae.decode((latents + noise * torch.randn_like(latents)) / SCALING).sample
    weight = 1 + 2 * max_pool2d(((masks > 0.03) & (masks < 0.97)).float(), 3, 1, 1)
    error = y - x
    gradients = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    loss = (error.abs() * weight).mean() + 2 * (error.square() * weight).mean() + 0.5 * gradients
    return loss + covariance * unit, error.detach().square().mean() / 4


@torch.no_grad()
def whiten(vae, frames: Tensor) -> None:
    """Fold the exact whitening of the latents of these frames into the two 1 x 1 convolutions."""
    latents = torch.cat([vae.encode(part * 2 - 1).latent_dist.mode() for part in frames.split(64)])
    values = latents.movedim(1, 0).flatten(1).double()
    mean = values.mean(1)
    eigenvalues, vectors = torch.linalg.eigh(torch.cov(values))
    whitener = (vectors * eigenvalues.rsqrt() @ vectors.mT / SCALING).float()
    inverse = (vectors * eigenvalues.sqrt() @ vectors.mT * SCALING).float()
    mean, before, after = mean.float(), vae.quant_conv, vae.post_quant_conv
    n = len(mean)
    before.bias[:n] = whitener @ (before.bias[:n] - mean)
    before.weight[:n] = torch.einsum("ij,jkhw->ikhw", whitener, before.weight[:n])
    before.weight[n:], before.bias[n:] = 0, -16  # the variance, of which nothing is drawn
    weight = after.weight[:, :, 0, 0].clone()
    after.bias.add_(weight @ mean)
    after.weight[:, :, 0, 0] = weight @ inverse


@torch.no_grad()
def score(vae, frames_of: FramesOf = frames_of) -> float:
    """Mean PSNR in dB over the same held-out frames of every call."""
    frames, _ = frames_of(np.random.default_rng(HELD_OUT_SEED), HELD_OUT_FRAMES)
    decoded = torch.cat([decode(vae, encode(vae, part)) for part in frames.split(64)])
    return float(np.mean([psnr_db(a, b) for a, b in zip(decoded, frames, strict=True)]))


def train(vae, arguments: argparse.Namespace, path: Path, frames_of: FramesOf = frames_of) -> None:
    configuration = {"channels": list(vae.config.block_out_channels), "init": arguments.init}
    named = list(vae.named_parameters())
    optimiser = Muon(named, ("conv_in", "conv_out", "quant_conv"))
    average, step, before = [p.detach().clone() for _, p in named], 0, 0.0
    if path.exists():
        saved = checkpoints.load(path, configuration)
        vae.load_state_dict(saved["weights"])
        optimiser.load_state_dict(saved["optimiser"])
        average, step, before = saved["average"], saved["step"], saved["seconds"]
        print(f"going on from step {step}, {before / 60:.1f} min")
    generator = np.random.default_rng([arguments.seed, step])
    torch.manual_seed(arguments.seed + step)
    start = last = time.monotonic()
    total, error = arguments.minutes * 60, None
    while (seconds := before + time.monotonic() - start) < total:
        frames, masks = frames_of(generator, arguments.batch)
        loss, mse = loss_of(vae, frames, masks, arguments.noise, arguments.covariance)
        for _, parameter in named:
            parameter.grad = None
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for _, p in named], 1.0)
        rate = min(1.0, (step + 1) / 50) * (1 - 0.98 * seconds / total)
        optimiser.step(arguments.rate * rate, arguments.adam_rate * rate)
        step += 1
        torch._foreach_lerp_(average, [p.data for _, p in named], 1 - min(AVERAGE, (1 + step) / (10 + step)))
        error = float(mse) if error is None else 0.97 * error + 0.03 * float(mse)
        if step % 50 == 0:
            print(f"step {step}, {seconds / 60:.1f} min, {-10 * np.log10(error):.2f} dB", flush=True)
        if time.monotonic() - last > SAVE_SECONDS or seconds + 1 > total:
            last = time.monotonic()
            state = {"weights": vae.state_dict(), "optimiser": optimiser.state_dict(), "average": average}
            checkpoints.save(path, configuration, state | {"step": step, "seconds": seconds})
    with torch.no_grad():
        for (_, parameter), mean in zip(named, average, strict=True):
            parameter.copy_(mean)


def parse_arguments(description: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--init", default="", help="diffusers folder to begin from; empty: random weights")
    parser.add_argument("--minutes", type=float, default=12.0)
    parser.add_argument("--batch", type=int, default=24, help="frames a step")
    parser.add_argument("--rate", type=float, default=0.01, help="of Muon")
    parser.add_argument("--adam-rate", type=float, default=3e-3)
    parser.add_argument("--noise", type=float, default=0.12, help="on latents of variance 1")
    parser.add_argument("--covariance", type=float, default=0.03, help="weight of the penalty on the latents")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def main(
    frames_of: FramesOf = frames_of, channels: tuple[int, int, int] = (8, 24, 48), description: str | None = __doc__
) -> int:
    """The command, for a world's frames. channels: of a VAE of random weights."""
    arguments = parse_arguments(description)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    arguments.run.mkdir(parents=True, exist_ok=True)
    vae = read_vae(arguments.init) if arguments.init else make_vae(channels)
    vae.train()
    train(vae, arguments, arguments.run / "vae.pt", frames_of)
    vae.eval()
    whiten(vae, frames_of(np.random.default_rng(arguments.seed + 1), 1024)[0])
    reached, report = score(vae, frames_of), arguments.run / "vae.json"
    there = json.loads(report.read_text())["psnr_db"] if report.exists() else -np.inf
    print(f"held-out frames {reached:.2f} dB")
    if there > reached:
        print(f"{arguments.run / 'vae'} has {there:.2f} dB: it is kept")
        return 1
    vae.save_pretrained(arguments.run / "vae")
    report.write_text(json.dumps({"psnr_db": reached}) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
