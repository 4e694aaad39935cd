"""The parts of the model: how they are built, read from a diffusers folder, and made faster for training."""

from __future__ import annotations

import json
import types
from collections.abc import Iterable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet3DConditionModel
from diffusers.models.resnet import TemporalConvLayer
from diffusers.models.transformers.transformer_temporal import TransformerTemporalModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from .words import END, POSITIONS, SHAPE_WORLD, START, Vocabulary

SCALING = 0.18215
WIDTH = 64  # of the text encoder
LATENT = 16  # side of the latent of 64 x 64 pixels
CHANNELS = 4

SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.018,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "prediction_type": "v_prediction",
    "timestep_spacing": "leading",
}


def make_vae(channels: tuple[int, int, int] = (8, 24, 48)) -> AutoencoderKL:
    """4 times smaller, 4 channels. One group of normalisation: with one channel a group no flat colour would pass."""
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=tuple(channels),
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=1,
        sample_size=64,
        mid_block_add_attention=False,
        scaling_factor=SCALING,
    )


def make_unet(
    channels: tuple[int, int, int] = (32, 64, 80), head: int = 8, coarse_attention: bool = True
) -> UNet3DConditionModel:
    """A video U-Net of the ModelScope / Zeroscope family. coarse_attention: also at 4 x 4 cells."""
    coarse = "CrossAttn" if coarse_attention else ""
    unet = UNet3DConditionModel(
        sample_size=LATENT,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        block_out_channels=tuple(channels),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=WIDTH,
        attention_head_dim=head,
        down_block_types=("CrossAttnDownBlock3D",) * 2 + (f"{coarse}DownBlock3D",),
        up_block_types=(f"{coarse}UpBlock3D",) + ("CrossAttnUpBlock3D",) * 2,
    )
    for module in unet.modules():
        if isinstance(module, TransformerTemporalModel):  # a fresh model begins as one of images
            nn.init.zeros_(module.proj_out.weight)
            nn.init.zeros_(module.proj_out.bias)
    return unet


def with_coarse_attention(unet: UNet3DConditionModel) -> UNet3DConditionModel:
    """The same function, with attention around the middle that still adds nothing; a U-Net that has it as it is."""
    config = unet.config
    wider = make_unet(tuple(config.block_out_channels), config.attention_head_dim)
    missing, unknown = wider.load_state_dict(unet.state_dict(), strict=False)
    if unknown or any("attentions" not in name for name in missing):
        raise ValueError(
            f"expected a U-Net as `make_unet` makes them; found others' layers: {[*unknown, *missing][:3]}"
        )
    for name in missing:
        if ".proj_out." in name:
            nn.init.zeros_(wider.get_parameter(name))
    return wider


def make_text_encoder(vocabulary: Vocabulary = SHAPE_WORLD) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(vocabulary),
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=POSITIONS,
            bos_token_id=vocabulary.numbers[START],
            eos_token_id=vocabulary.numbers[END],
            pad_token_id=vocabulary.numbers[END],
            projection_dim=WIDTH,
        )
    )


def read_vae(folder: Path) -> AutoencoderKL:
    """The VAE of a diffusers folder, in float32."""
    return AutoencoderKL.from_pretrained(folder, subfolder="vae", torch_dtype=torch.float32, low_cpu_mem_usage=False)


def read_unet(folder: Path) -> UNet3DConditionModel:
    return UNet3DConditionModel.from_pretrained(
        folder, subfolder="unet", torch_dtype=torch.float32, low_cpu_mem_usage=False
    )


def read_text_encoder(folder: Path, vocabulary: Vocabulary = SHAPE_WORLD) -> CLIPTextModel:
    """The text encoder of a diffusers folder, the rows of its embedding moved to our numbers.

    Words that the folder lacks begin near the mean of those that it has.
    """
    folder = Path(folder)
    there = json.loads((folder / "tokenizer" / "vocab.json").read_text(encoding="utf-8"))
    saved = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder", torch_dtype=torch.float32)
    old, encoder = saved.get_input_embeddings().weight.detach(), make_text_encoder(vocabulary)
    known = {token: old[number] for token, number in there.items() if old[number].any()}  # letters are zero
    table = torch.stack(list(known.values()))
    new = table.mean(0) + 0.5 * table.std() * torch.randn(len(vocabulary), WIDTH)
    rows = torch.stack([known.get(token, new[number]) for token, number in vocabulary.numbers.items()])
    state = {name: rows if value.shape == old.shape else value for name, value in saved.state_dict().items()}
    encoder.load_state_dict(state)
    return encoder


def tidy(folder: Path) -> None:
    """What `save_pretrained` wrote, readable to all and without the folder that a part was read from."""
    for path in folder.rglob("*.safetensors"):
        path.chmod(0o644)
    for path in folder.rglob("config.json"):
        entries = json.loads(path.read_text(encoding="utf-8"))
        if entries.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")


def ids_of(captions: Iterable[str], vocabulary: Vocabulary = SHAPE_WORLD) -> Tensor:
    """(B, 24)."""
    return torch.tensor([vocabulary.token_ids(caption) for caption in captions])


def encode_text(encoder: CLIPTextModel, ids: Tensor) -> Tensor:
    """(B, 24) -> (B, 24, 64): the encoder's last hidden state, by operations that a CUDA graph can hold."""
    encoder = getattr(encoder, "text_model", encoder)  # older transformers
    tables = encoder.embeddings
    table = tables.token_embedding.weight
    chosen = (ids[..., None] == torch.arange(len(table), device=ids.device)).to(table)
    x = chosen @ table + tables.position_embedding.weight[: ids.shape[1]]
    for layer in encoder.encoder.layers:
        attention, normed = layer.self_attn, layer.layer_norm1(x)
        projections = attention.q_proj, attention.k_proj, attention.v_proj
        q, k, v = (p(normed).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for p in projections)
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + attention.out_proj(out.transpose(1, 2).flatten(2))
        x = x + layer.mlp(layer.layer_norm2(x))
    return encoder.final_layer_norm(x)


def encode(vae: AutoencoderKL, frames: Tensor) -> Tensor:
    """(F, 3, 64, 64) in [0, 1] -> latents (F, 4, 16, 16) of unit variance."""
    return vae.encode(frames * 2 - 1).latent_dist.mode() * vae.config.scaling_factor


def decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    return (vae.decode(latents / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)


def alphas_cumprod() -> Tensor:
    """(1000,) of the schedule."""
    return DDIMScheduler(**SCHEDULE).alphas_cumprod


def faster(unet: UNet3DConditionModel) -> UNet3DConditionModel:
    """The same function, faster on a CPU, and for one frame without the temporal layers: for training only.

    A (3, 1, 1) convolution over time becomes a 2-D one over (time, pixels); attention over a few frames is written as
    batched products; attention over space stays in float32 under autocast, where bfloat16 takes three times as long;
    dropout is off. Methods of the instance are replaced, never a class.
    """
    for name, module in unet.named_modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.Conv3d):
            module.forward = types.MethodType(_temporal_convolution, module)
        if hasattr(module, "set_processor"):
            over_time = "temp" in name or "transformer_in" in name
            module.set_processor(_ShortAttention() if over_time else _SpatialAttention())
        if isinstance(module, TemporalConvLayer):
            module.forward = _unless_one_frame(module.forward)
        if isinstance(module, TransformerTemporalModel):
            module.forward = _unless_one_frame(module.forward, tuple_result=True)
    return unet


def _temporal_convolution(self: nn.Conv3d, x: Tensor) -> Tensor:
    out = nn.functional.conv2d(x.flatten(3), self.weight.squeeze(-1), self.bias, padding=(1, 0))
    return out.unflatten(3, x.shape[3:])


def _unless_one_frame(forward, tuple_result: bool = False):
    def skipped(x: Tensor, *arguments, num_frames: int = 1, **options):
        if num_frames == 1:
            return (x,) if tuple_result else x
        return forward(x, *arguments, num_frames=num_frames, **options)

    return skipped


class _ShortAttention:
    """Attention over sequences of a few tokens as two batched products."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None, **options):
        q, k, v = (x.flatten(0, 1) for x in _heads(attn, hidden_states, encoder_hidden_states))
        weights = torch.bmm(q * attn.scale, k.mT).softmax(-1)
        out = torch.bmm(weights, v).unflatten(0, (-1, attn.heads)).transpose(1, 2).flatten(2)
        return attn.to_out[0](out)


class _SpatialAttention:
    """torch's attention, on a CPU in float32."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None, **options):
        q, k, v = _heads(attn, hidden_states, encoder_hidden_states)
        if q.is_cuda:
            out = nn.functional.scaled_dot_product_attention(q, k, v)
        else:
            with torch.autocast("cpu", enabled=False):
                out = nn.functional.scaled_dot_product_attention(q.float(), k.float(), v.float())
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


def _heads(attn, hidden_states: Tensor, context: Tensor | None) -> list[Tensor]:
    """Queries, keys and values (B, heads, N, C)."""
    context = hidden_states if context is None else context
    projected = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
    return [x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in projected]
