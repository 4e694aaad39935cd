"""LaVie's base network written down once more, from its weights, over clips (B, C, F, h, w)."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

HEADS, GROUPS, BUCKETS = 8, 32, 32


class PlainLaVie:
    """weights: of a released file, by name. Two levels, the first with transformers, one layer each."""

    def __init__(self, weights: dict[str, Tensor]):
        self.weights = weights

    def __call__(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        embedding = self.linear("time_embedding.linear_1", sinusoidal(time, self.weights["conv_in.weight"].shape[0]))
        embedding = self.linear("time_embedding.linear_2", functional.silu(embedding))
        x = self.conv("conv_in", x)
        skips = [x]
        x = self.transformer(
            "down_blocks.0.attentions.0", self.resnet("down_blocks.0.resnets.0", x, embedding), context
        )
        skips.append(x)
        x = self.conv("down_blocks.0.downsamplers.0.conv", x, stride=2)
        skips.append(x)
        x = self.resnet("down_blocks.1.resnets.0", x, embedding)
        skips.append(x)
        x = self.resnet("mid_block.resnets.0", x, embedding)
        x = self.resnet("mid_block.resnets.1", self.transformer("mid_block.attentions.0", x, context), embedding)
        for i in range(2):
            x = self.resnet(f"up_blocks.0.resnets.{i}", torch.cat([x, skips.pop()], 1), embedding)
        x = self.conv("up_blocks.0.upsamplers.0.conv", x.repeat_interleave(2, -1).repeat_interleave(2, -2))
        for i in range(2):
            x = self.resnet(f"up_blocks.1.resnets.{i}", torch.cat([x, skips.pop()], 1), embedding)
            x = self.transformer(f"up_blocks.1.attentions.{i}", x, context)
        return self.conv("conv_out", functional.silu(self.norm("conv_norm_out", x, 1e-5)))

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.weights[f"{name}.weight"].mT + self.weights.get(f"{name}.bias", 0)

    def conv(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        """Of each frame."""
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        frames = [functional.conv2d(f, weight, bias, stride, weight.shape[-1] // 2) for f in x.unbind(2)]
        return torch.stack(frames, 2)

    def norm(self, name: str, x: Tensor, eps: float) -> Tensor:
        """Statistics over all that follows the channels: of a clip, its frames too."""
        grouped = x.unflatten(1, (GROUPS, -1))
        axes = tuple(range(2, grouped.ndim))
        mean, variance = grouped.mean(axes, keepdim=True), grouped.var(axes, unbiased=False, keepdim=True)
        normal = ((grouped - mean) / (variance + eps).sqrt()).flatten(1, 2)
        scale, shift = (self.weights[f"{name}.{part}"].view(-1, *[1] * (x.ndim - 2)) for part in ("weight", "bias"))
        return normal * scale + shift

    def layer_norm(self, name: str, x: Tensor) -> Tensor:
        mean, variance = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
        return (x - mean) / (variance + 1e-5).sqrt() * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def resnet(self, name: str, x: Tensor, embedding: Tensor) -> Tensor:
        y = self.conv(f"{name}.conv1", functional.silu(self.norm(f"{name}.norm1", x, 1e-5)))
        y = y + self.linear(f"{name}.time_emb_proj", functional.silu(embedding))[:, :, None, None, None]
        y = self.conv(f"{name}.conv2", functional.silu(self.norm(f"{name}.norm2", y, 1e-5)))
        return y + (self.conv(f"{name}.conv_shortcut", x) if f"{name}.conv_shortcut.weight" in self.weights else x)

    def transformer(self, name: str, x: Tensor, context: Tensor) -> Tensor:
        clips, _, frames, height, width = x.shape
        normal = torch.stack([self.norm(f"{name}.norm", frame, 1e-6) for frame in x.unbind(2)], 2)
        tokens = self.conv(f"{name}.proj_in", normal).permute(0, 2, 3, 4, 1).flatten(2, 3)  # (B, F, N, C)
        block = f"{name}.transformer_blocks.0"
        each = context[:, None].expand(-1, frames, -1, -1)
        own = self.layer_norm(f"{block}.norm1", tokens)
        tokens = tokens + self.attention(f"{block}.attn1", own, own)
        tokens = tokens + self.attention(f"{block}.attn2", self.layer_norm(f"{block}.norm2", tokens), each)
        along = self.layer_norm(f"{block}.norm_temp", tokens).transpose(1, 2)
        tokens = tokens + self.attention(f"{block}.attn_temp", along, along, in_time=True).transpose(1, 2)
        value, gate = self.linear(f"{block}.ff.net.0.proj", self.layer_norm(f"{block}.norm3", tokens)).chunk(2, -1)
        tokens = tokens + self.linear(f"{block}.ff.net.2", value * functional.gelu(gate))
        spread = tokens.unflatten(2, (height, width)).permute(0, 4, 1, 2, 3)
        return x + self.conv(f"{name}.proj_out", spread)

    def attention(self, name: str, x: Tensor, source: Tensor, in_time: bool = False) -> Tensor:
        """(..., N, C) and (..., M, C') to (..., N, C)."""
        heads = [
            self.linear(f"{name}.{part}", of).unflatten(-1, (HEADS, -1)).transpose(-2, -3)
            for part, of in (("to_q", x), ("to_k", source), ("to_v", source))
        ]
        query, key, value = heads
        if in_time:
            query, key = rotated(query), rotated(key)
        logits = query @ key.mT / query.shape[-1] ** 0.5
        if in_time:
            table = self.weights[f"{name}.time_rel_pos_bias.relative_attention_bias.weight"]
            for i in range(x.shape[-2]):
                for j in range(x.shape[-2]):
                    logits[..., i, j] += table[bucket(i, j)][:, None].squeeze(-1)
        return self.linear(f"{name}.to_out.0", (logits.softmax(-1) @ value).transpose(-2, -3).flatten(-2))


def sinusoidal(time: Tensor, width: int) -> Tensor:
    angles = time[:, None].double() * torch.exp(-math.log(10000) * torch.arange(width // 2).double() / (width // 2))
    return torch.cat([angles.cos(), angles.sin()], -1).float()


def rotated(x: Tensor) -> Tensor:
    """Each pair of the first 32 channels as a complex number, turned by its place in time."""
    dims = min(32, x.shape[-1])
    numbers = torch.view_as_complex(x[..., :dims].double().unflatten(-1, (-1, 2)).contiguous())
    speed = 10000 ** (-torch.arange(0, dims, 2).double() / dims)
    turn = torch.polar(torch.ones(1, dtype=torch.float64), torch.arange(x.shape[-2])[:, None] * speed)
    return torch.cat([torch.view_as_real(numbers * turn).flatten(-2).float(), x[..., dims:]], -1)


def bucket(query: int, key: int) -> int:
    """T5's, for a query and a key of these places."""
    later = BUCKETS // 2 if key > query else 0
    distance = abs(query - key)
    if distance < 8:
        return later + distance
    return later + min(15, 8 + int(math.log(distance / 8) / math.log(32 / 8) * 8))
