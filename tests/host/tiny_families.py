"""Tiny models with random weights of the families that ComfyUI itself loads, through its own classes."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import comfy.model_management as management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.supported_models
import pytest
import torch
from comfy.ldm.cogvideo.model import CogVideoXTransformer3DModel
from comfy.ldm.wan.model import WanModel
from safetensors.torch import save_file
from spacetime_edit.core.inflation import Inflation
from spacetime_edit.host.inflation import inflate_attention
from spacetime_edit.host.loaders import lavie as lavie_loader
from spacetime_edit.host.loaders import lavie_model, unet3d
from spacetime_edit.tests.host import animatediff_real, animatediff_standin, support

OPS = comfy.ops.disable_weight_init
WORDS = 7
MASK = "attention_mask"
QUIET = re.compile(r"out\.2\.|conv_out")
"""Output layers of U-Nets, whose noise predictions would else be too rough to invert."""
LOOKS = re.compile(r"\.attn[12]\.to_[qk]\.weight")
"""Queries and keys that no norm follows."""
SHARP = re.compile(r"norm_[qk]\b|[qk]_norm\b")
"""Norms of queries and keys: their scale is how far attention tells tokens apart."""


@dataclass(frozen=True)
class TinyFamily:
    """weights: a checkpoint's state dict; load: it as a ModelPatcher, options being the host's model_options.

    shape: of a latent; grid: of a transformer's tokens, of a U-Net's finest level; context: width of prompts; extra:
    what else a conditioning holds. calls: attention calls of one pass that are ours, hidden: how many of them the
    host's slot for attention does not see; others: that are not ours, and why. matched: whether it has an STR score.
    behind: tokens of pictures behind the clip's.
    """

    name: str
    weights: Callable[[], dict]
    shape: tuple[int, ...]
    grid: tuple[int, int, int]
    context: int
    calls: int
    load: Callable = lambda weights, **options: comfy.sd.load_diffusion_model_state_dict(weights, options)
    extra: dict = field(default_factory=dict)
    others: dict[str, int] = field(default_factory=dict)
    hidden: int = 0
    words: int = WORDS
    step: float = 0.002
    fp8: float = 0.9
    matched: bool = True
    behind: int = 0

    @property
    def patched(self) -> bool:
        """Whether it is a transformer over space and time."""
        return len(self.shape) == 5

    @property
    def of_host(self) -> bool:
        """Whether it is a U-Net of the host's own blocks."""
        return not self.patched and self.load not in (unet3d_folder, lavie)

    def model(self, **options):
        return self.load(self.weights(), **options)

    def conditioning(self, seed: int = 0, words: int | None = None) -> list:
        words = words or self.words
        noise = torch.randn(1, words, self.context, generator=torch.Generator().manual_seed(seed))
        extra = {k: torch.ones(1, words, dtype=torch.long) if k == MASK else v for k, v in self.extra.items()}
        return [[noise, extra]]

    def clip(self, seed: int = 0) -> torch.Tensor:
        return torch.randn(self.shape, generator=torch.Generator().manual_seed(100 + seed))


def _cogvideox(**options) -> dict:
    sizes = dict(num_attention_heads=1, attention_head_dim=64, num_layers=2, time_embed_dim=32, text_embed_dim=32)
    fixed = dict(use_rotary_positional_embeddings=True, dtype=torch.float32, operations=OPS)
    return smooth(CogVideoXTransformer3DModel(**sizes, **fixed, **options))


def smooth(net, quiet: float = 1e-4, sharpness: float = 2.0) -> dict:
    """Random weights small enough that inversion converges, with attention that tells tokens apart.

    quiet: size of a U-Net's output layer.
    """
    generator, weights = torch.Generator().manual_seed(1), {}
    for name, weight in net.state_dict().items():
        if not weight.is_floating_point():
            weights[name] = torch.zeros_like(weight)
        elif weight.ndim == 1 and name.endswith("weight"):
            weights[name] = torch.full(weight.shape, sharpness if SHARP.search(name) else 1.0, dtype=weight.dtype)
        else:
            noise = torch.randn(weight.shape, generator=generator)
            size = quiet if QUIET.match(name) else 0.2 if LOOKS.search(name) else 0.05
            weights[name] = (size * noise).to(weight.dtype)
    return weights


SVD = dict(
    image_size=32,
    in_channels=8,
    out_channels=4,
    model_channels=64,
    num_res_blocks=[1, 1],
    channel_mult=[1, 1],
    use_spatial_transformer=True,
    context_dim=16,
    transformer_depth=[1, 1],
    transformer_depth_output=[1, 1, 1, 1],
    transformer_depth_middle=1,
    use_linear_in_transformer=True,
    num_classes="sequential",
    adm_in_channels=768,
    extra_ff_mix_layer=True,
    use_spatial_context=True,
    merge_strategy="learned_with_images",
    merge_factor=0.0,
    video_kernel_size=[3, 1, 1],
    use_temporal_resblock=True,
    use_temporal_attention=True,
    disable_temporal_crossattention=False,
    legacy=False,
)


def by_hand(kind, config: dict):
    """How to load weights into a host's model that its own loader would not recognise at this size."""

    def load(weights, dtype=torch.float32):
        settings = kind(config)
        settings.set_inference_dtype(dtype, torch.float32 if dtype.itemsize < 4 else None)
        model = settings.get_model({}, "")
        model.diffusion_model.load_state_dict(smooth(model.diffusion_model))
        devices = management.get_torch_device(), management.unet_offload_device()
        return comfy.model_patcher.CoreModelPatcher(model, *devices)

    return load


def animatediff(weights, dtype=torch.float32):
    model = by_hand(comfy.supported_models.SD15, support.SD15)(weights, dtype)
    return animatediff_standin.with_motion(model, heads=4, channels=(32, 64))


def animatediff_itself(weights, dtype=torch.float32):
    model = by_hand(comfy.supported_models.SD15, animatediff_real.SD15)(weights, dtype)
    return animatediff_real.with_motion(model, smooth)


UNET3D = {"block_out_channels": [8, 16, 16]}
WEIGHT_DTYPES = {dtype: name for name, dtype in unet3d.WEIGHT_DTYPES.items()}


def lavie(weights, dtype=torch.float32):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lavie.safetensors"
        save_file(support.released_lavie_names(weights), path)
        return lavie_loader.load_lavie(path, weight_dtype=WEIGHT_DTYPES[dtype])


def unet3d_folder(weights, dtype=torch.float32):
    """The embedded model's layout with random weights."""
    with tempfile.TemporaryDirectory() as folder:
        return support.unet3d_model(Path(folder), smooth, WEIGHT_DTYPES[dtype], **UNET3D)


def inflated(weights, dtype=torch.float32):
    """SD 1.5 whose frames see one another."""
    model = by_hand(comfy.supported_models.SD15, support.SD15)(weights, dtype)
    return inflate_attention(model, Inflation("all frames"))


PICTURE = {"concat_latent_image": torch.full((1, 4, 8, 8), 0.3)}

FAMILIES = (
    TinyFamily("UNet3D", dict, (3, 4, 8, 8), (3, 8, 8), 64, 42, unet3d_folder, step=3e-5, fp8=0.8),
    TinyFamily(
        name="LaVie",
        weights=lambda: smooth(lavie_model.build(support.LAVIE), quiet=2e-6),
        shape=(3, 4, 8, 8),
        grid=(3, 8, 8),
        context=16,
        calls=12,
        load=lavie,
        step=3e-7,
    ),
    TinyFamily(
        name="SD 1.5",
        weights=dict,
        shape=(3, 4, 8, 8),
        grid=(3, 8, 8),
        context=16,
        calls=14,
        load=by_hand(comfy.supported_models.SD15, support.SD15),
        matched=False,
    ),
    TinyFamily("SD 1.5, inflated", dict, (3, 4, 8, 8), (3, 8, 8), 16, 14, inflated, step=3e-5, fp8=0.85),
    TinyFamily("AnimateDiff", dict, (3, 4, 8, 8), (3, 8, 8), 16, 28, animatediff, hidden=14, step=3e-5),
    TinyFamily(
        name="Stable Video Diffusion",
        weights=dict,
        shape=(3, 4, 8, 8),
        grid=(3, 8, 8),
        context=16,
        calls=14,
        load=by_hand(comfy.supported_models.SVD_img2vid, SVD),
        extra=PICTURE,
        words=1,
        step=3e-5,
        others={"attention to the picture, over space": 7, "and over time": 7},
    ),
    TinyFamily("CogVideoX 1.0", _cogvideox, (1, 16, 3, 8, 8), (3, 4, 4), 32, 2),
    TinyFamily("CogVideoX 1.5", lambda: _cogvideox(patch_size_t=2), (1, 16, 4, 8, 10), (2, 4, 5), 32, 2),
)
DITS = {
    "mochi": dict(
        image_model="mochi_preview", depth=2, patch_size=2, num_heads=2, hidden_size_x=64, hidden_size_y=32,
        mlp_ratio_x=192.0, mlp_ratio_y=4.0, learn_sigma=False, in_channels=12, qk_norm=True, qkv_bias=False,
        out_bias=True, attn_drop=0.0, patch_embed_bias=True, posenc_preserve_area=True, timestep_mlp_bias=True,
        attend_to_padding=False, timestep_scale=1000.0, use_t5=True, t5_feat_dim=32, t5_token_length=8,
        rope_theta=10000.0,
    ),
    "cosmos": dict(
        image_model="cosmos", max_img_h=240, max_img_w=240, max_frames=128, in_channels=16, out_channels=16,
        patch_spatial=2, patch_temporal=1, model_channels=64, block_config="FA-CA-MLP", concat_padding_mask=True,
        pos_emb_cls="rope3d", pos_emb_learnable=False, pos_emb_interpolation="crop", block_x_format="THWBD",
        affline_emb_norm=True, use_adaln_lora=True, adaln_lora_dim=16, num_blocks=2, num_heads=2,
        crossattn_emb_channels=32, extra_per_block_abs_pos_emb=True, rope_h_extrapolation_ratio=1.0,
        rope_w_extrapolation_ratio=1.0, rope_t_extrapolation_ratio=2.0, extra_per_block_abs_pos_emb_type="learnable",
    ),
    "predict2": dict(
        image_model="cosmos_predict2", max_img_h=240, max_img_w=240, max_frames=128, in_channels=16, out_channels=16,
        patch_spatial=2, patch_temporal=1, model_channels=64, concat_padding_mask=True, crossattn_emb_channels=32,
        pos_emb_cls="rope3d", pos_emb_learnable=True, pos_emb_interpolation="crop", min_fps=1, max_fps=30,
        use_adaln_lora=True, adaln_lora_dim=16, num_blocks=2, num_heads=2, extra_per_block_abs_pos_emb=False,
        rope_h_extrapolation_ratio=4.0, rope_w_extrapolation_ratio=4.0, rope_t_extrapolation_ratio=1.0,
        rope_enable_fps_modulation=False,
    ),
    "kandinsky": dict(
        image_model="kandinsky5", model_dim=64, axes_dims=(8, 12, 12), time_dim=32, ff_dim=64, visual_embed_dim=132,
        num_text_blocks=1, num_visual_blocks=2, in_text_dim=32, in_text_dim2=16,
    ),
    "wan": dict(
        image_model="wan2.1", model_type="t2v", dim=128, ffn_dim=64, num_heads=1, num_layers=2, text_dim=32, in_dim=16,
        out_dim=16,
    ),
    "ltx": dict(
        image_model="ltxv", in_channels=128, cross_attention_dim=64, attention_head_dim=2, num_attention_heads=32,
        caption_channels=32, num_layers=2,
    ),
    "ltx2": dict(
        image_model="ltxav", in_channels=128, cross_attention_dim=64, attention_head_dim=32, num_attention_heads=2,
        audio_in_channels=128, audio_cross_attention_dim=32, audio_attention_head_dim=16, audio_num_attention_heads=2,
        caption_channels=32, num_layers=2, connector_attention_head_dim=16, connector_num_attention_heads=2,
        connector_num_layers=1, rope_type="split", frequencies_precision="float64", apply_gated_attention=True,
        use_middle_indices_grid=True,
    ),
    "hunyuan 1.5": dict(
        image_model="hunyuan_video", in_channels=65, patch_size=[1, 1, 1], out_channels=32, vec_in_dim=None,
        axes_dim=[16, 56, 56], meanflow=False, context_in_dim=32, hidden_size=128, mlp_ratio=4.0, num_heads=1, depth=2,
        depth_single_blocks=0, theta=256, qkv_bias=True, byt5=True, guidance_embed=False, use_cond_type_embedding=True,
        vision_in_dim=1152, meanflow_sum=False,
    ),
    "hunyuan": dict(
        image_model="hunyuan_video", in_channels=16, patch_size=[1, 2, 2], out_channels=16, vec_in_dim=768,
        axes_dim=[16, 56, 56], meanflow=False, context_in_dim=32, hidden_size=128, mlp_ratio=4.0, num_heads=1, depth=1,
        depth_single_blocks=1, theta=256, qkv_bias=True, byt5=False, guidance_embed=True, use_cond_type_embedding=False,
        vision_in_dim=None, meanflow_sum=False,
    ),
}  # fmt: skip


def wan_weights(context: int) -> dict:
    """As in a released file, of the smallest network that the host's loader takes; context: width of prompts."""
    sizes = dict(model_type="t2v", in_dim=16, dim=128, ffn_dim=64, num_heads=1, num_layers=2, text_dim=context)
    return smooth(WanModel(**sizes, dtype=torch.float32, operations=OPS))


class Look:
    """What a CLIP vision encoder says of a picture."""

    penultimate_hidden_states = torch.randn(1, 257, 1280, generator=torch.Generator().manual_seed(9))


def pooled(width: int) -> dict:
    return {"pooled_output": torch.randn(1, width, generator=torch.Generator().manual_seed(8))}


KNOWN = comfy.supported_models
FIVE = (1, 16, 3, 8, 8)
MASKED = {MASK: None}
I2V = {"concat_latent_image": torch.full((1, 16, 3, 8, 8), 0.3), "clip_vision_output": Look}
FAMILIES += (
    TinyFamily("Wan", dict, FIVE, (3, 4, 4), 32, 4, by_hand(KNOWN.WAN21_T2V, DITS["wan"]), step=1e-4),
    TinyFamily(
        name="Wan image to video",
        weights=dict,
        shape=FIVE,
        grid=(3, 4, 4),
        context=32,
        calls=4,
        load=by_hand(KNOWN.WAN21_I2V, DITS["wan"] | {"model_type": "i2v", "in_dim": 36}),
        extra=I2V,
        step=1e-4,
        others={"attention to the picture": 2},
    ),
    TinyFamily(
        name="Wan VACE",
        weights=dict,
        shape=FIVE,
        grid=(3, 4, 4),
        context=32,
        calls=6,
        load=by_hand(KNOWN.WAN21_Vace, DITS["wan"] | {"model_type": "vace", "vace_layers": 1, "vace_in_dim": 96}),
        step=3e-5,
    ),
    TinyFamily(
        name="HunyuanVideo",
        weights=dict,
        shape=FIVE,
        grid=(3, 4, 4),
        context=32,
        calls=2,
        load=by_hand(KNOWN.HunyuanVideo, DITS["hunyuan"]),
        extra=pooled(768),
        others={"of the prompt with itself": 2},
    ),
    TinyFamily(
        name="LTX-Video",
        weights=dict,
        shape=(1, 128, 3, 4, 4),
        grid=(3, 4, 4),
        context=32,
        calls=4,
        load=by_hand(KNOWN.LTXV, DITS["ltx"]),
        step=1e-4,
        extra=MASKED,
    ),
    TinyFamily(
        name="LTX-2",
        weights=dict,
        shape=(1, 128, 3, 4, 4),
        grid=(3, 4, 4),
        context=64,
        calls=4,
        load=by_hand(KNOWN.LTXAV, DITS["ltx2"]),
        step=1e-4,
    ),
    TinyFamily(
        name="HunyuanVideo 1.5",
        weights=dict,
        shape=(1, 32, 3, 4, 4),
        grid=(3, 4, 4),
        context=32,
        calls=2,
        load=by_hand(KNOWN.HunyuanVideo15, DITS["hunyuan 1.5"]),
        extra={"pooled_output": None},
        others={"of the prompt with itself": 2},
    ),
    TinyFamily(
        name="Wan with pictures behind the clip (Bernini)",
        weights=dict,
        shape=FIVE,
        grid=(3, 4, 4),
        context=32,
        calls=4,
        load=by_hand(KNOWN.WAN21_T2V, DITS["wan"]),
        extra={"context_latents": [torch.full((1, 16, 1, 8, 8), 0.2), torch.full((1, 16, 2, 6, 8), -0.1)]},
        step=1e-4,
        behind=16 + 24,
    ),
    TinyFamily(
        name="Mochi",
        weights=dict,
        shape=(1, 12, 3, 8, 8),
        grid=(3, 4, 4),
        context=32,
        calls=2,
        load=by_hand(KNOWN.GenmoMochi, DITS["mochi"]),
        extra=MASKED,
    ),
    TinyFamily("Cosmos 1", dict, FIVE, (3, 4, 4), 32, 4, by_hand(KNOWN.CosmosT2V, DITS["cosmos"])),
    TinyFamily(
        "Cosmos Predict2", dict, FIVE, (3, 4, 4), 32, 4, by_hand(KNOWN.CosmosT2IPredict2, DITS["predict2"]), step=1e-4
    ),
    TinyFamily(
        name="Kandinsky 5",
        weights=dict,
        shape=FIVE,
        grid=(3, 4, 4),
        context=32,
        calls=4,
        load=by_hand(KNOWN.Kandinsky5, DITS["kandinsky"]),
        extra=pooled(16),
        others={"of the prompt with itself": 1},
    ),
)
if animatediff_real.PATH:
    FAMILIES += (
        TinyFamily(
            name="AnimateDiff-Evolved itself",
            weights=dict,
            shape=(3, 4, 16, 16),
            grid=(3, 16, 16),
            context=16,
            calls=72,
            load=animatediff_itself,
            hidden=40,
            step=3e-5,
            fp8=0.6,
        ),
    )
BY_NAME = {family.name: family for family in FAMILIES}
FAST = ("UNet3D", "Wan", "CogVideoX 1.0")
"""One U-Net, one transformer with cross-attention, one with joint attention: those that `dev.py test` runs."""


def families(applies: Callable[[TinyFamily], bool] = lambda family: True):
    """Parametrises a test with the families that it applies to; of those beside FAST it runs with --every-family."""
    marked = [
        pytest.param(name, marks=() if name in FAST else pytest.mark.every_family)
        for name, family in BY_NAME.items()
        if applies(family)
    ]
    return pytest.mark.parametrize("family", marked, indirect=True, scope="module")


def families_named(*names: str):
    """The same, of some by name."""
    assert set(names) <= set(BY_NAME)
    return families(lambda family: family.name in names)
