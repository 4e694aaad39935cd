"""Train the VAE of the emoji world's model on its frames, as `train_tiny.train_vae` does on the shape world's.

    python tools/train_emoji/train_vae.py RUN [--init FOLDER] [--minutes 40]

RUN is a folder; `vae.pt` in it is written about every minute, and a second call goes on from it. At the end the VAE is
whitened and written to RUN/vae in diffusers layout, unless a better one is there, and RUN/vae.json says its PSNR on
held-out frames. --init: a folder that holds `vae/`.
"""
# ruff: noqa: E402 (the pack is loaded before it is imported)

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))
from pack import load_pack

load_pack(host=False)

from spacetime_edit.tools.train_emoji.batches import frames_of
from spacetime_edit.tools.train_tiny import train_vae

CHANNELS = (16, 48, 96)

if __name__ == "__main__":
    sys.exit(train_vae.main(frames_of, CHANNELS, __doc__))
