"""Write tiny models with random weights, in the layouts of released ones, below a folder: a script of its own process.

    python tests/workflows/random_models.py FOLDER

`diffusers/show-1-base`; in `diffusion_models` `lavie_base.pt`, CogVideoX in two pieces, Wan and the pair of Wan
2.2, which read prompts of the embedded model's width.
"""
# ruff: noqa: E402 (the pack is loaded before it is imported)

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
from pack import load_pack

load_pack()

import torch
from safetensors.torch import save_file
from spacetime_edit.tests.host import support, tiny_families

EMBEDDED_WIDTH = 64
WAN = (
    "wan2.1_t2v_1.3B_fp16.safetensors",
    "wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors",
    "wan2.2_t2v_low_noise_14B_fp8_scaled.safetensors",
)

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    with torch.inference_mode():
        support.show1_folder(folder / "diffusers" / "show-1-base")
        (folder / "diffusion_models").mkdir()
        for name in WAN:
            save_file(
                tiny_families.wan_weights(EMBEDDED_WIDTH),
                folder / "diffusion_models" / name,
                {"config": json.dumps({"transformer": {"text_dim": EMBEDDED_WIDTH}})},
            )
        support.cogvideox_pieces(folder / "diffusion_models" / "CogVideoX-5b", EMBEDDED_WIDTH)
        torch.save(support.lavie_weights(EMBEDDED_WIDTH), folder / "diffusion_models" / "lavie_base.pt")
