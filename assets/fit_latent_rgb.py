"""Fits the linear map from the embedded model's latents to RGB that previews while sampling use.

python assets/fit_latent_rgb.py        writes assets/tiny_t2v/vae/latent_rgb.json
"""
# ruff: noqa: E402 (the pack is loaded before it is imported)

import json
import sys
from pathlib import Path

import torch

ASSETS = Path(__file__).resolve().parent
sys.path.insert(0, str(ASSETS.parent / "tools"))
from pack import load_pack

load_pack()

from spacetime_edit.host.loaders.unet3d import EMBEDDED, load_folder
from spacetime_edit.tools.shape_world.clips import read_clips


def main() -> None:
    model, _, vae = load_folder(EMBEDDED)
    frames = torch.cat([clip.frames for clip in read_clips(ASSETS / "tiny_clips")])
    latents = model.model.process_latent_in(vae.encode(frames.movedim(1, -1)))
    colours = torch.nn.functional.adaptive_avg_pool2d(frames * 2 - 1, latents.shape[-2:])
    points = torch.cat([latents.movedim(1, -1).reshape(-1, 4), torch.ones(latents[:, 0].numel(), 1)], 1)
    fit = torch.linalg.lstsq(points, colours.movedim(1, -1).reshape(-1, 3)).solution
    rounded = [[round(float(v), 4) for v in row] for row in fit]
    text = json.dumps({"factors": rounded[:-1], "bias": rounded[-1]}, indent=1)
    (ASSETS / "tiny_t2v" / "vae" / "latent_rgb.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
