"""LaVie's base network (arXiv 2309.15103) with the calling convention of a ComfyUI model.

SD 1.4's U-Net with two differences: every transformer block also attends over time, after its cross-attention, with
rotary embedding and a bias by distance in time; and group norms outside the transformers see the whole clip. Module
paths are those of the released weights, but for `norm` within a norm that sees the clip. Imports diffusers, so it is
itself imported only when a model is loaded.
"""

from __future__ import annotations

import math

import comfy.ldm.modules.attention
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from .unet3d_model import CALL, FramesInBatch, HostAttention

HEADS = 8
ROTARY_DIMS, ROTARY_BASE = 32, 10000.0
BUCKETS, FURTHEST = 32, 32


class Clip:
    """How many frames a clip of the running call has."""

    frames = 1


class ClipNorm(nn.Module):
    """A group norm with its statistics over all frames of a clip: (clips F, C, h, w) to the same."""

    def __init__(self, norm: nn.GroupNorm, clip: Clip):
        super().__init__()
        self.norm, self.clip = norm, clip

    def forward(self, x: Tensor) -> Tensor:
        frames = self.clip.frames
        joined = self.norm(x.unflatten(0, (-1, frames)).transpose(1, 2).flatten(2, 3))
        return joined.unflatten(2, (frames, -1)).transpose(1, 2).flatten(0, 1)


class PositionBias(nn.Module):
    """A number a head for each distance in time, in T5's buckets: (heads, F, F) for F frames."""

    def __init__(self):
        super().__init__()
        self.relative_attention_bias = nn.Embedding(BUCKETS, HEADS)

    def forward(self, frames: int, like: Tensor) -> Tensor:
        buckets = distance_buckets(frames).to(like.device)
        return self.relative_attention_bias(buckets).movedim(-1, 0).to(like)


def distance_buckets(frames: int) -> Tensor:
    """(F, F) of queries and keys: 0 to 15 for keys that are not later, 16 to 31 for later ones.

    Distances below 8 have a bucket each, larger ones share them by their logarithm up to 32.
    """
    places = torch.arange(frames)
    distance = places[:, None] - places[None]
    half, exact = BUCKETS // 2, BUCKETS // 4
    far = (distance.abs().clamp(min=1) / exact).log() / math.log(FURTHEST / exact) * (half - exact)
    far = (exact + far.long()).clamp(max=half - 1)
    return torch.where(distance.abs() < exact, distance.abs(), far) + half * (distance < 0)


def rotate(x: Tensor) -> Tensor:
    """Rotary embedding (arXiv 2104.09864) of the first 32 channels, in pairs of neighbours: (..., F, D) to the same."""
    dims = min(ROTARY_DIMS, x.shape[-1])
    speed = ROTARY_BASE ** (-torch.arange(0, dims, 2, device=x.device, dtype=torch.float32) / dims)
    angle = torch.arange(x.shape[-2], device=x.device, dtype=torch.float32)[:, None] * speed
    cosine, sine = angle.cos(), angle.sin()
    even, odd = x[..., :dims].float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([even * cosine - odd * sine, odd * cosine + even * sine], -1).flatten(-2)
    return torch.cat([turned.to(x.dtype), x[..., dims:]], -1)


class TemporalAttention(nn.Module):
    """Attention over the frames of each place: (clips N, F, C) to the same."""

    def __init__(self, dim: int):
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim), nn.Dropout(0.0)])
        self.time_rel_pos_bias = PositionBias()

    def forward(self, x: Tensor, transformer_options: dict) -> Tensor:
        transformer_options[CALL] = {**transformer_options.get(CALL, {}), "kind": "temporal1"}
        query, key, value = (
            layer(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in (self.to_q, self.to_k, self.to_v)
        )
        out = comfy.ldm.modules.attention.optimized_attention(
            rotate(query),
            rotate(key),
            value,
            HEADS,
            mask=self.time_rel_pos_bias(x.shape[1], query)[None],
            skip_reshape=True,
            transformer_options=transformer_options,
        )
        return self.to_out[1](self.to_out[0](out))


class VideoTransformerBlock(nn.Module):
    """Self-attention within frames, cross-attention, attention over time, feed-forward: (clips F, N, C) to the same."""

    def __init__(self, block: BasicTransformerBlock, clip: Clip):
        super().__init__()
        self.norm1, self.attn1 = block.norm1, block.attn1
        self.norm2, self.attn2 = block.norm2, block.attn2
        self.norm3, self.ff, self.clip = block.norm3, block.ff, clip
        (width,) = block.norm1.normalized_shape
        self.norm_temp, self.attn_temp = nn.LayerNorm(width), TemporalAttention(width)

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, cross_attention_kwargs: dict, **_
    ) -> Tensor:
        x, extra = hidden_states, cross_attention_kwargs
        x = x + self.attn1(self.norm1(x), **extra)
        x = x + self.attn2(self.norm2(x), encoder_hidden_states=encoder_hidden_states, **extra)
        places = x.unflatten(0, (-1, self.clip.frames)).transpose(1, 2)
        along = self.norm_temp(places.flatten(0, 1))
        moved = self.attn_temp(along, **extra).unflatten(0, places.shape[:2]).transpose(1, 2).flatten(0, 1)
        x = x + moved
        return x + self.ff(self.norm3(x))


class LaVieUNet(FramesInBatch, UNet2DConditionModel):
    """The network; see the module."""

    def of_clips(self, x: Tensor, times: Tensor, context: Tensor, frames: int, options: dict) -> Tensor:
        """See `FramesInBatch`."""
        self.clip.frames = frames
        return UNet2DConditionModel.forward(
            self,
            x,
            times.repeat_interleave(frames),
            context,
            cross_attention_kwargs={"transformer_options": options},
            return_dict=False,
        )[0]


def config_of(shapes: dict[str, tuple[int, ...]]) -> dict:
    """The sizes of a network with weights of these names and shapes; KeyError where a name is missing."""
    levels = _count(shapes, "down_blocks.")
    attends = [f"down_blocks.{i}.attentions.0.norm.weight" in shapes for i in range(levels)]
    depth = _count(shapes, "down_blocks.0.resnets.")
    return {
        "in_channels": shapes["conv_in.weight"][1],
        "out_channels": shapes["conv_out.weight"][0],
        "block_out_channels": [shapes[f"down_blocks.{i}.resnets.0.conv1.weight"][0] for i in range(levels)],
        "layers_per_block": depth,
        "cross_attention_dim": shapes["mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"][1],
        "down_block_types": ["CrossAttnDownBlock2D" if there else "DownBlock2D" for there in attends],
        "up_block_types": ["CrossAttnUpBlock2D" if there else "UpBlock2D" for there in reversed(attends)],
        "attention_head_dim": HEADS,  # diffusers' name for their number
    }


def _count(shapes: dict, prefix: str) -> int:
    """How many numbered modules have names that begin with `prefix`; KeyError for none."""
    numbers = {key.removeprefix(prefix).split(".")[0] for key in shapes if key.startswith(prefix)}
    if not any(map(str.isdigit, numbers)):
        raise KeyError(prefix)
    return 1 + max(int(number) for number in numbers if number.isdigit())


def build(config: dict) -> LaVieUNet:
    """The network of these sizes (see `config_of`) on the meta device, with the host's attention."""
    clip = Clip()
    with torch.device("meta"):
        net = LaVieUNet.from_config(config)
        for module in list(net.modules()):
            if isinstance(module, ResnetBlock2D):
                module.norm1, module.norm2 = ClipNorm(module.norm1, clip), ClipNorm(module.norm2, clip)
            for name, child in list(module.named_children()):
                if isinstance(child, BasicTransformerBlock):
                    setattr(module, name, VideoTransformerBlock(child, clip))
        net.conv_norm_out = ClipNorm(net.conv_norm_out, clip)
    net.clip = clip
    for path, module in net.named_modules():
        if isinstance(module, Attention):
            module.set_processor(HostAttention(path))
    return net
