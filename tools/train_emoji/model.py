"""The emoji world's model: its sizes, its noise schedule, and what is sampled from it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import DDIMScheduler
from PIL import Image, ImageDraw
from torch import Tensor, nn

from ..train_tiny import parts
from .batches import VOCABULARY

CHANNELS = (48, 80, 112)
HEAD = 16
SCHEDULE = parts.SCHEDULE | {"beta_end": 0.02}
"""A thing covers some 64 cells of the latent, a shape of the shape world 36: the noisiest latent has less signal."""

SHOWN = (
    "a cat on a meadow",
    "a football on a beach",
    "a rocket in the night sky",
    "a penguin in the snow",
    "a fox on a blue background",
    "two pandas in the snow",
    "two cats on a meadow",
    "a cat on the left and a dog on the right on a beach",
    "a rocket at the top and a car at the bottom in the night sky",
    "a dog and a panda on a meadow",
    "a fox and a penguin in the snow",
    "a car and a football on a pink background",
)
"""Captions of the sheet that is looked at."""


def alphas_cumprod() -> Tensor:
    """(1000,) of the schedule."""
    return DDIMScheduler(**SCHEDULE).alphas_cumprod


def make_model(channels: Sequence[int] = CHANNELS, head: int = HEAD) -> tuple[nn.ModuleDict, dict]:
    """A U-Net and a text encoder of random weights, and the configuration that their checkpoints name."""
    unet, text = parts.make_unet(tuple(channels), head), parts.make_text_encoder(VOCABULARY)
    configuration = {
        "channels": list(channels),
        "head": head,
        "blocks": list(unet.config.down_block_types),
        "words": len(VOCABULARY),
        "schedule": SCHEDULE,
    }
    return nn.ModuleDict({"unet": unet, "text": text}), configuration


@torch.no_grad()
def sample(
    model: nn.ModuleDict, captions: Sequence[str], seed: int, frames: int = 8, steps: int = 16, guidance: float = 4.0
) -> Tensor:
    """Latents (B, 4, F, 16, 16) from noise by DDIM with classifier-free guidance."""
    device = next(model.parameters()).device
    scheduler = DDIMScheduler(**SCHEDULE)
    scheduler.set_timesteps(steps)
    ids = parts.ids_of((*captions, *("" for _ in captions)), VOCABULARY).to(device)
    text = parts.encode_text(model["text"], ids)
    shape = (len(captions), parts.CHANNELS, frames, parts.LATENT, parts.LATENT)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)
    for t in scheduler.timesteps:
        both = model["unet"](torch.cat([x, x]), t.to(device).expand(len(ids)), text, return_dict=False)[0].float()
        told, untold = both.chunk(2)
        x = scheduler.step(untold + guidance * (told - untold), t, x).prev_sample
    return x


@torch.no_grad()
def decode_clips(vae, latents: Tensor) -> Tensor:
    """(B, 4, F, 16, 16) -> (B, F, 3, 64, 64) in [0, 1]."""
    return torch.stack([parts.decode(vae, clip.movedim(1, 0)) for clip in latents])


def sheet(clips: Tensor, captions: Sequence[str], columns: int = 2, scale: int = 2) -> Image.Image:
    """Clips (B, F, 3, 64, 64), each as a row of its frames under its caption, in `columns` columns."""
    clips = clips.float().cpu()
    count, frames, _, height, width = clips.shape
    tall, wide, line = height * scale, frames * width * scale, 14
    rows = -(-count // columns)
    image = Image.new("RGB", (columns * (wide + 8), rows * (tall + line)), "white")
    pen = ImageDraw.Draw(image)
    for i, (clip, caption) in enumerate(zip(clips, captions, strict=True)):
        x, y = i % columns * (wide + 8), i // columns * (tall + line)
        pixels = (clip.permute(2, 0, 3, 1).flatten(1, 2) * 255).round().byte().numpy()
        pen.text((x + 2, y), caption, fill="black")
        picture = Image.fromarray(pixels).resize((wide, tall), Image.Resampling.NEAREST)
        image.paste(picture, (x, y + line))
    return image
