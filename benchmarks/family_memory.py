"""Memory that a gradient through each family takes at its real size, predicted without weights.

    python benchmarks/family_memory.py [--frames 33] [--height 480] [--width 832] [--json PATH] [--write]

The network is built on the meta device and run once on shapes alone, and `host.memory.ActivationMeter` counts what its
modules put out in bfloat16: what *STR Latent Optimizer* predicts before its first step. plain: all activations kept;
low: block checkpointing (**memory** *low*); STR: up to the last block that the score looks at, which is where its pass
ends. Weights and the score's own tiles are not in it. Mochi is missing: it reads values of the prompt's mask.
AnimateDiff's attention over time is another pack's. --write puts the README's table into it.
"""
# ruff: noqa: E402 (the pack is loaded before it is imported)

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
from pack import load_pack

load_pack()

import comfy.ops
from comfy.ldm.cogvideo.model import CogVideoXTransformer3DModel
from comfy.ldm.cosmos.predict2 import MiniTrainDIT
from comfy.ldm.hunyuan_video.model import HunyuanVideo
from comfy.ldm.lightricks.av_model import LTXAVModel
from comfy.ldm.lightricks.model import LTXVModel
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.ldm.wan.model import WanModel
from spacetime_edit.host.families import FAMILIES
from spacetime_edit.host.loaders import lavie_model, unet3d_model
from spacetime_edit.host.memory import ActivationMeter

META = {"device": "meta", "dtype": torch.bfloat16, "operations": comfy.ops.disable_weight_init}
ROWS = {family.name: family for family in FAMILIES}
GIB = 2**30
README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN, END = "<!-- memory -->", "<!-- end of memory -->"
KNOWN_AS = {"SD 1.5": "SD 1.5, inflated"}
SD = dict(
    image_size=32, in_channels=4, out_channels=4, model_channels=320, num_res_blocks=[2] * 4, channel_mult=[1, 2, 4, 4],
    num_heads=8, use_spatial_transformer=True, context_dim=768, transformer_depth=[1] * 6 + [0] * 2,
    transformer_depth_output=[1] * 9 + [0] * 3, transformer_depth_middle=1, use_linear_in_transformer=False,
)  # fmt: skip
ZEROSCOPE = dict(
    in_channels=4, out_channels=4, block_out_channels=[320, 640, 1280, 1280], cross_attention_dim=1024,
    attention_head_dim=64, layers_per_block=2, norm_num_groups=32,
    down_block_types=["CrossAttnDownBlock3D"] * 3 + ["DownBlock3D"],
    up_block_types=["UpBlock3D"] + ["CrossAttnUpBlock3D"] * 3,
)  # fmt: skip
SVD = SD | dict(
    in_channels=8, num_heads=-1, num_head_channels=64, context_dim=1024, use_linear_in_transformer=True,
    num_classes="sequential", adm_in_channels=768, extra_ff_mix_layer=True, use_spatial_context=True,
    merge_strategy="learned_with_images", merge_factor=0.0, video_kernel_size=[3, 1, 1], use_temporal_resblock=True,
    use_temporal_attention=True, disable_temporal_crossattention=False,
)  # fmt: skip
LAVIE = dict(
    in_channels=4, out_channels=4, block_out_channels=[320, 640, 1280, 1280], cross_attention_dim=768,
    attention_head_dim=8, layers_per_block=2, down_block_types=["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
)  # fmt: skip


def meta(shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(shape, device="meta", dtype=dtype)


def attend(func, q, k, v, heads=None, *args, **kwargs):
    """Shapes of attention; (B, N, H D) or (B, H, N, D)."""
    if not kwargs.get("skip_reshape"):
        return torch.empty_like(q)
    out = torch.empty_like(q)
    return out if kwargs.get("skip_output_reshape") else out.transpose(1, 2).flatten(2)


OPTIONS = {"optimized_attention_override": attend, "cond_or_uncond": [0], "patches": {}}


def u_net(build, channels: int, text: int):
    def run(frames: int, height: int, width: int):
        network = build().to(torch.bfloat16)
        x, context = meta((frames, channels, height // 8, width // 8)), meta((frames, 77, text))
        return network, lambda: network(x, meta((frames,)), context=context, transformer_options=dict(OPTIONS))

    return run


def svd(frames: int, height: int, width: int):
    network = UNetModel(**SVD, **META)
    x, context, about = meta((frames, 8, height // 8, width // 8)), meta((frames, 1, 1024)), meta((frames, 768))
    options = {"num_video_frames": frames, "image_only_indicator": meta((1, frames))}
    return network, lambda: network(x, meta((frames,)), context, about, transformer_options=dict(OPTIONS), **options)


def transformer(build, channels: int, text: int, step: int, cell: int, tokens: int, listed: bool = False, **more):
    """listed: the network takes a list of latents."""

    def run(frames: int, height: int, width: int):
        network = build()
        latents = (frames - 1) // step + 1
        x = meta((1, channels, latents, height // cell, width // cell))
        given = {key: value() for key, value in more.items()}
        return network, lambda: network(
            [x] if listed else x, meta((1,)), meta((1, tokens, text)), transformer_options=dict(OPTIONS), **given
        )

    return run


def wan(dim: int, ffn: int, heads: int, layers: int):
    return lambda: WanModel("t2v", in_dim=16, dim=dim, ffn_dim=ffn, num_heads=heads, num_layers=layers, **META)


MODELS = {  # name: (family, how to build and run it)
    "Zeroscope": ("UNet3D (Zeroscope, ModelScope)", u_net(lambda: unet3d_model.build(ZEROSCOPE), 4, 1024)),
    "LaVie": ("LaVie", u_net(lambda: lavie_model.build(LAVIE), 4, 768)),
    "SD 1.5": ("SD 1.5", u_net(lambda: UNetModel(**SD, **META), 4, 768)),
    "Stable Video Diffusion": ("Stable Video Diffusion", svd),
    "CogVideoX 5B": (
        "CogVideoX",
        transformer(
            lambda: CogVideoXTransformer3DModel(48, 64, num_layers=42, use_rotary_positional_embeddings=True, **META),
            16, 4096, 4, 8, 226,
        ),
    ),
    "CogVideoX 1.5 5B": (
        "CogVideoX",
        transformer(
            lambda: CogVideoXTransformer3DModel(
                48, 64, num_layers=42, patch_size_t=2, use_rotary_positional_embeddings=True, **META
            ),
            16, 4096, 4, 8, 226,
        ),
    ),
    "Wan 1.3B": ("Wan", transformer(wan(1536, 8960, 12, 30), 16, 4096, 4, 8, 512)),
    "Wan 14B": ("Wan", transformer(wan(5120, 13824, 40, 40), 16, 4096, 4, 8, 512)),
    "LTX-Video 2B": (
        "LTX-Video",
        transformer(
            lambda: LTXVModel(num_layers=28, **META), 128, 4096, 8, 32, 256,
            attention_mask=lambda: meta((1, 256), torch.long),
        ),
    ),
    "LTX-2 19B": (
        "LTX-2",
        transformer(lambda: LTXAVModel(num_layers=48, **META), 128, 2 * 3840, 8, 32, 1024, listed=True),
    ),
    "HunyuanVideo 1.5": (
        "HunyuanVideo 1.5",
        transformer(
            lambda: HunyuanVideo(
                in_channels=65, patch_size=[1, 1, 1], out_channels=32, vec_in_dim=None, axes_dim=[16, 56, 56],
                meanflow=False, context_in_dim=3584, hidden_size=2048, mlp_ratio=4.0, num_heads=16, depth=54,
                depth_single_blocks=0, theta=256, qkv_bias=True, byt5=True, guidance_embed=False,
                use_cond_type_embedding=True, vision_in_dim=1152, meanflow_sum=True, **META,
            ),
            65, 3584, 4, 16, 256,
        ),
    ),
    "HunyuanVideo": (
        "HunyuanVideo",
        transformer(
            lambda: HunyuanVideo(
                in_channels=16, patch_size=[1, 2, 2], out_channels=16, vec_in_dim=768, axes_dim=[16, 56, 56],
                meanflow=False, context_in_dim=4096, hidden_size=3072, mlp_ratio=4.0, num_heads=24, depth=20,
                depth_single_blocks=40, theta=256, qkv_bias=True, byt5=False, guidance_embed=True,
                use_cond_type_embedding=False, vision_in_dim=None, meanflow_sum=False, **META,
            ),
            16, 4096, 4, 8, 256, y=lambda: meta((1, 768)), guidance=lambda: meta((1,)),
        ),
    ),
    "Cosmos Predict2 2B": (
        "Cosmos Predict2",
        transformer(
            lambda: MiniTrainDIT(
                max_img_h=240, max_img_w=240, max_frames=128, in_channels=16, out_channels=16, patch_spatial=2,
                patch_temporal=1, model_channels=2048, concat_padding_mask=True, crossattn_emb_channels=1024,
                pos_emb_cls="rope3d", pos_emb_learnable=True, pos_emb_interpolation="crop", min_fps=1, max_fps=30,
                use_adaln_lora=True, adaln_lora_dim=256, num_blocks=28, num_heads=16,
                extra_per_block_abs_pos_emb=False, **META,
            ),
            16, 1024, 4, 8, 512,
        ),
    ),
}  # fmt: skip


class _Seen(Exception):
    """The last block that the score looks at has run."""


def predicted(family, network, call, last: str | None = None) -> tuple[float, float]:
    """GiB of a gradient that keeps all activations, and of one that keeps blocks' inputs; last: where it ends."""
    meter = ActivationMeter(network, family)
    with meter.open(), mock.patch.object(torch, "equal", return_value=True):  # one prompt for all frames: no values
        handle = None

        def end(*_):
            raise _Seen

        if last is not None:
            handle = network.get_submodule(last).register_forward_hook(end)
        try:
            call()
        except _Seen:
            pass
        finally:
            if handle is not None:
                handle.remove()
    memory = meter.memory
    return memory.plain / GIB, memory.checkpointed / GIB


def last_block(family) -> str | None:
    """Of a transformer, by its family's row."""
    begins = {
        "HunyuanVideo": "double_",
        "HunyuanVideo 1.5": "double_",
        "LTX-Video": "transformer_",
        "LTX-2": "transformer_",
    }
    path = f"{begins.get(family.name, '')}blocks.1"
    return path if family.patched else None


def markdown(report: dict[str, dict[str, float]], size: str) -> str:
    """The README's table; of U-Nets, whose score looks at late blocks too, the whole pass is what the score takes."""
    rows = [f"| {size}, GiB | whole pass | with **memory** *low* | STR | STR, *low* |", "|---" * 5 + "|"]
    for name, values in report.items():
        of_score = [values["STR plain"], values["STR low"]] if ROWS[MODELS[name][0]].patched else ["", ""]
        cells = [values["plain"], values["low"], *of_score]
        shown = " | ".join(f"{cell:.1f}" if cell != "" else "" for cell in cells)
        rows.append(f"| {KNOWN_AS.get(name, name)} | {shown} |")
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=33)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=832)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--write", action="store_true", help="into README.md")
    arguments = parser.parse_args()
    size = arguments.frames, arguments.height, arguments.width
    print(f"{arguments.frames} frames of {arguments.width} x {arguments.height}, bfloat16, GiB beyond the weights\n")
    print(f"{'':22}{'plain':>9}{'low':>9}{'STR plain':>12}{'STR low':>10}")
    report = {}
    for name, (row, build) in MODELS.items():
        family = ROWS[row]
        with torch.no_grad():
            network, call = build(*size)
            whole = predicted(family, network, call)
            score = predicted(family, network, call, last_block(family)) if family.patched else whole
        report[name] = {"plain": whole[0], "low": whole[1], "STR plain": score[0], "STR low": score[1]}
        print(f"{name:22}{whole[0]:9.1f}{whole[1]:9.1f}{score[0]:12.1f}{score[1]:10.1f}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if arguments.write:
        text = README.read_text(encoding="utf-8")
        before, _, rest = text.partition(BEGIN)
        table = markdown(report, f"{arguments.frames} frames of {arguments.width} x {arguments.height}")
        README.write_text(f"{before}{BEGIN}\n{table}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
