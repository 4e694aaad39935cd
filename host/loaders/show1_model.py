"""The pixel-space U-Net of Show-1's key frames (arXiv 2309.15818) with the calling convention of a ComfyUI model.

DeepFloyd IF's blocks, each followed by layers over time, from diffusers' parts. Its spatial attention is joint: queries
of the frame's tokens meet keys of the prompt and of the frame. Module paths are those of the released weights.
Imports diffusers, so it is itself imported only when a model is loaded.
"""

from __future__ import annotations

import comfy.ldm.modules.attention
import comfy.model_management
import torch
from diffusers.models.activations import get_activation
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.resnet import ResnetBlock2D, TemporalConvLayer
from diffusers.models.transformers.transformer_temporal import TransformerTemporalModel
from torch import Tensor, nn

from .unet3d_model import CALL, FramesInBatch, HostAttention

ATTENTIVE, PLAIN = "SimpleCrossAttn", "Resnet"
"""How the names of blocks with and without spatial attention begin."""


class JointAttention:
    """As `HostAttention`, for spatial attention whose keys are those of the prompt, then those of the frame."""

    def __init__(self, path: str):
        self.path = path

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        transformer_options: dict | None = None,
    ) -> Tensor:
        """(F, C, h, w) to the same; encoder_hidden_states (F, L, C'), one prompt a frame."""
        options = {} if transformer_options is None else transformer_options
        options[CALL] = {**options.get(CALL, {}), "path": self.path, "kind": "joint"}
        normal = attn.group_norm(hidden_states.flatten(2)).mT
        text = (
            encoder_hidden_states if attn.norm_cross is None else attn.norm_encoder_hidden_states(encoder_hidden_states)
        )
        key = torch.cat([attn.add_k_proj(text), attn.to_k(normal)], 1)
        value = torch.cat([attn.add_v_proj(text), attn.to_v(normal)], 1)
        precision = torch.float32 if attn.upcast_softmax else None
        out = comfy.ldm.modules.attention.optimized_attention(
            attn.to_q(normal), key, value, attn.heads, attn_precision=precision, transformer_options=options
        )
        return attn.to_out[1](attn.to_out[0](out)).mT.reshape(hidden_states.shape) + hidden_states


class _Pooling(nn.Module):
    """One vector of a prompt (B, L, C): its mean attends to its tokens. Its own weight is cast where it is used."""

    casts_own_parameters = True

    def __init__(self, heads: int, width: int):
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.zeros(1, width))
        self.k_proj, self.q_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        place = comfy.model_management.cast_to(self.positional_embedding, x.dtype, x.device)
        first = x.mean(1, keepdim=True) + place
        x = torch.cat([first, x], 1)
        parts = self.q_proj(first), self.k_proj(x), self.v_proj(x)
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        return nn.functional.scaled_dot_product_attention(query, key, value).flatten(1)


class _TextEmbedding(nn.Module):
    """A prompt (B, L, C) as an addition to the embedding of time (B, E)."""

    def __init__(self, width: int, out: int, heads: int):
        super().__init__()
        self.norm1, self.pool = nn.LayerNorm(width), _Pooling(heads, width)
        self.proj, self.norm2 = nn.Linear(width, out), nn.LayerNorm(out)

    def forward(self, text: Tensor) -> Tensor:
        return self.norm2(self.proj(self.pool(self.norm1(text))))


class _Level(nn.Module):
    """One resolution: for each layer a ResNet block, a convolution over time and, for the first `attentive` of them,
    attention in space and over time; at the end a ResNet block that changes the resolution.

    widths: input channels of each layer, those of the skip connection included.
    """

    def __init__(self, config: dict, widths: list[int], out: int, attentive: int, sampler: str | None = None):
        super().__init__()
        groups, heads = config["norm_num_groups"], config["attention_head_dim"]

        def resnet(width: int, **options) -> ResnetBlock2D:
            return ResnetBlock2D(
                in_channels=width,
                out_channels=out,
                temb_channels=4 * config["block_out_channels"][0],
                eps=config["norm_eps"],
                groups=groups,
                time_embedding_norm=config["resnet_time_scale_shift"],
                non_linearity=config["act_fn"],
                output_scale_factor=config["resnet_out_scale_factor"],
                skip_time_act=config["resnet_skip_time_act"],
                **options,
            )

        self.resnets = nn.ModuleList(resnet(width) for width in widths)
        self.temp_convs = nn.ModuleList(TemporalConvLayer(out, out, dropout=0.1) for _ in widths)
        self.attentions = nn.ModuleList(
            Attention(
                query_dim=out,
                cross_attention_dim=out,
                heads=out // heads,
                dim_head=heads,
                added_kv_proj_dim=config["cross_attention_dim"],
                norm_num_groups=groups,
                bias=True,
                upcast_softmax=True,
                cross_attention_norm=config["cross_attention_norm"],
            )
            for _ in range(attentive)
        )
        self.temp_attentions = nn.ModuleList(  # the released weights have head count and head size the other way round
            TransformerTemporalModel(heads, out // heads, in_channels=out, num_layers=1, norm_num_groups=groups)
            for _ in range(attentive)
        )
        self.downsamplers = nn.ModuleList([resnet(out, down=True)] if sampler == "down" else [])
        self.upsamplers = nn.ModuleList([resnet(out, up=True)] if sampler == "up" else [])

    def forward(self, x: Tensor, embedding: Tensor, text: Tensor, frames: int, options: dict, skips: list | None):
        """(x, what each layer gave); skips: outputs of the way down, taken from its end."""
        given, extra = [], {"transformer_options": options}
        for i, (resnet, over_time) in enumerate(zip(self.resnets, self.temp_convs, strict=True)):
            if skips is not None:
                x = torch.cat([x, skips.pop()], 1)
            x = over_time(resnet(x, embedding), num_frames=frames)
            if i < len(self.attentions):
                x = self.attentions[i](x, encoder_hidden_states=text, **extra)
                x = self.temp_attentions[i](x, num_frames=frames, cross_attention_kwargs=extra, return_dict=False)[0]
            given.append(x)
        for sampler in (*self.downsamplers, *self.upsamplers):
            x = sampler(x, embedding)
            given.append(x)
        return x, given


class PixelUNet3D(FramesInBatch, nn.Module):
    """Noise of frames (F, 3, h, w) in -1..1, h and w multiples of `multiple`; text (F, L, encoder_hid_dim).

    config: the released `unet/config.json`, completed by `completed`. The variance that it also predicts is left out.
    """

    def __init__(self, config: dict):
        super().__init__()
        widths, depths = list(config["block_out_channels"]), config["layers_per_block"]
        depths = [depths] * len(widths) if isinstance(depths, int) else list(depths)
        hidden = config["encoder_hid_dim"]
        self.out_channels, self.multiple = config["in_channels"], 2 ** (len(widths) - 1)
        self.conv_in = nn.Conv2d(config["in_channels"], widths[0], 3, padding=1)
        if config["transfromer_in_opt"]:
            self.transformer_in = TransformerTemporalModel(8, 64, in_channels=widths[0], num_layers=1)
        self.time_proj = Timesteps(widths[0], config["flip_sin_to_cos"], config["freq_shift"])
        self.time_embedding = TimestepEmbedding(widths[0], 4 * widths[0], act_fn=config["act_fn"])
        self.add_embedding = _TextEmbedding(hidden, 4 * widths[0], config["addition_embed_type_num_heads"])
        act = config["time_embedding_act_fn"]
        self.time_embed_act = nn.Identity() if act is None else get_activation(act)
        self.encoder_hid_proj = nn.Linear(hidden, config["cross_attention_dim"])

        skips = [widths[0]]
        self.down_blocks = nn.ModuleList()
        for i, (name, width, depth) in enumerate(zip(config["down_block_types"], widths, depths, strict=True)):
            last = i == len(widths) - 1
            inputs = [skips[-1], *[width] * (depth - 1)]
            attentive = depth if name.startswith(ATTENTIVE) else 0
            self.down_blocks.append(_Level(config, inputs, width, attentive, None if last else "down"))
            skips += [width] * (depth + (not last))
        middle = config | {"resnet_out_scale_factor": config["mid_block_scale_factor"]}
        self.mid_block = _Level(middle, [widths[-1]] * 2, widths[-1], 1)
        self.up_blocks = nn.ModuleList()
        before = widths[-1]
        for i, name in enumerate(config["up_block_types"]):
            width, depth = widths[-1 - i], depths[-1 - i] + 1
            inputs = [(before if j == 0 else width) + skips.pop() for j in range(depth)]
            attentive = depth if name.startswith(ATTENTIVE) else 0
            self.up_blocks.append(_Level(config, inputs, width, attentive, None if i == len(widths) - 1 else "up"))
            before = width
        self.conv_norm_out = nn.GroupNorm(config["norm_num_groups"], widths[0], eps=config["norm_eps"])
        self.conv_act = get_activation(config["act_fn"])
        self.conv_out = nn.Conv2d(widths[0], config["out_channels"], 3, padding=1)

    def of_clips(self, x: Tensor, times: Tensor, context: Tensor, frames: int, options: dict) -> Tensor:
        """See `FramesInBatch`."""
        if any(size % self.multiple for size in x.shape[-2:]):
            height, width = x.shape[-2:]
            raise ValueError(
                f"latent: frames of {width} x {height} pixels do not fit this pixel-space model; expected multiples of "
                f"{self.multiple} (Show-1 was trained at 64 x 40). Resize the clip before VAE Encode"
            )
        embedding = self.time_embedding(self.time_proj(times).to(x.dtype)) + self.add_embedding(context[::frames])
        embedding = self.time_embed_act(embedding).repeat_interleave(frames, 0)
        text = self.encoder_hid_proj(context)
        x = self.conv_in(x)
        if hasattr(self, "transformer_in"):
            extra = {"transformer_options": options}
            x = self.transformer_in(x, num_frames=frames, cross_attention_kwargs=extra, return_dict=False)[0]
        skips = [x]
        for level in self.down_blocks:
            x, given = level(x, embedding, text, frames, options, None)
            skips += given
        x, _ = self.mid_block(x, embedding, text, frames, options, None)
        for level in self.up_blocks:
            x, _ = level(x, embedding, text, frames, options, skips)
        return self.conv_out(self.conv_act(self.conv_norm_out(x)))[:, : self.out_channels]


DEFAULTS = {
    "addition_embed_type_num_heads": 64,
    "attention_head_dim": 64,
    "cross_attention_norm": "group_norm",
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "layers_per_block": 3,
    "mid_block_scale_factor": 1.0,
    "norm_eps": 1e-5,
    "norm_num_groups": 32,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "scale_shift",
    "time_embedding_act_fn": "gelu",
    "transfromer_in_opt": False,
}
"""Of entries that a config may leave out; the last is spelled as in the released file."""
FIXED = {
    "addition_embed_type": ("text",),
    "encoder_hid_dim_type": ("text_proj", None),
    "mid_block_type": ("UNetMidBlock3DSimpleCrossAttn",),
    "class_embed_type": (None,),
    "conv_in_kernel": (3, None),
    "conv_out_kernel": (3, None),
    "only_cross_attention": (False, None),
    "time_embedding_type": ("positional", None),
    "time_embedding_dim": (None,),
    "center_input_sample": (False, None),
}
"""Entries of which only these values are built here: those of the key frame model."""


def completed(config: dict) -> dict:
    """The config with every entry that `PixelUNet3D` reads; ValueError for a kind of network that it is not."""
    for name, values in FIXED.items():
        if config.get(name) not in values:
            raise ValueError(
                f"{name} is {config.get(name)!r}; this loader builds Show-1's key frame model (show-1-base), where it "
                f"is {values[0]!r}"
            )
    return DEFAULTS | config


def build(config: dict) -> PixelUNet3D:
    """The model of a released `unet/config.json` on the meta device, with the host's attention."""
    with torch.device("meta"):
        net = PixelUNet3D(completed(config))
    for path, module in net.named_modules():
        if isinstance(module, Attention):
            module.set_processor(JointAttention(path) if module.added_kv_proj_dim else HostAttention(path))
    return net
