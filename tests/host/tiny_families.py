"""Tiny models with random weights of the families that ComfyUI itself loads, through its own classes."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

import comfy.ops
import comfy.sd
import torch
from comfy.ldm.cogvideo.model import CogVideoXTransformer3DModel

OPS = comfy.ops.disable_weight_init
WORDS = 7
SHARP = re.compile(r"norm_[qk]\b|[qk]_norm\b")
"""Norms of queries and keys: their scale is how far attention tells tokens apart."""


@dataclass(frozen=True)
class TinyFamily:
    """weights: a checkpoint's state dict; load: it as a ModelPatcher, options being the host's model_options.

    shape: of a latent; grid: of its tokens; context: width of prompts; extra: what else a conditioning holds. calls:
    attention calls of one pass that are ours, others: that are not, and why.
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

    def model(self, **options):
        return self.load(dict(self.weights()), **options)

    def conditioning(self, seed: int = 0, words: int = WORDS) -> list:
        noise = torch.randn(1, words, self.context, generator=torch.Generator().manual_seed(seed))
        return [[noise, dict(self.extra)]]

    def clip(self, seed: int = 0) -> torch.Tensor:
        return torch.randn(self.shape, generator=torch.Generator().manual_seed(100 + seed))


def _cogvideox(**options) -> dict:
    sizes = dict(num_attention_heads=1, attention_head_dim=64, num_layers=2, time_embed_dim=32, text_embed_dim=32)
    fixed = dict(use_rotary_positional_embeddings=True, dtype=torch.float32, operations=OPS)
    return smooth(CogVideoXTransformer3DModel(**sizes, **fixed, **options))


def smooth(net, sharpness: float = 2.0) -> dict:
    """Random weights small enough that inversion converges, with attention that tells tokens apart."""
    generator, weights = torch.Generator().manual_seed(1), {}
    for name, weight in net.state_dict().items():
        if not weight.is_floating_point():
            weights[name] = torch.zeros_like(weight)
        elif weight.ndim == 1 and name.endswith("weight"):
            weights[name] = torch.full(weight.shape, sharpness if SHARP.search(name) else 1.0, dtype=weight.dtype)
        else:
            weights[name] = 0.05 * torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
    return weights


FAMILIES = (
    TinyFamily("CogVideoX 1.0", _cogvideox, (1, 16, 3, 8, 8), (3, 4, 4), 32, 2),
    TinyFamily("CogVideoX 1.5", lambda: _cogvideox(patch_size_t=2), (1, 16, 4, 8, 10), (2, 4, 5), 32, 2),
)
BY_NAME = {family.name: family for family in FAMILIES}
