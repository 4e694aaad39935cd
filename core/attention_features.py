"""What one attention layer contributes to a relevance score, and the arithmetic that its forms share."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class AttentionFeatures:
    """What one layer contributes: the cheap factors of its maps, never the maps.

    query, key: (F, H, N, D) of self-attention. temporal: (N, H, F, F), softmaxed over its last dimension, of a layer
    whose frames see themselves only; None: each token sees those of all frames, and extra_keys (H, E, D), which belong
    to no frame (the prompt's, say). scale: factor of the logits, 1/sqrt(D) if None.
    """

    query: Tensor
    key: Tensor
    temporal: Tensor | None = None
    scale: float | None = None
    extra_keys: Tensor | None = None

    def __post_init__(self):
        frames, heads, tokens, _ = self.query.shape
        fits = self.key.shape == self.query.shape
        fits &= self.temporal is None or self.temporal.shape == (tokens, heads, frames, frames)
        if not fits:
            temporal = "none" if self.temporal is None else tuple(self.temporal.shape)
            raise ValueError(
                f"attention features do not fit together: query {tuple(self.query.shape)}, key "
                f"{tuple(self.key.shape)}, temporal {temporal}; expected query and key of one "
                f"shape (F, H, N, D) and temporal (N, H, F, F)"
            )

    @property
    def logit_scale(self) -> float:
        return self.query.shape[-1] ** -0.5 if self.scale is None else self.scale

    @property
    def tensors(self) -> list[Tensor]:
        """Those that it has."""
        return [t for t in (self.query, self.key, self.temporal, self.extra_keys) if t is not None]

    def map(self, function: Callable[[Tensor], Tensor]) -> "AttentionFeatures":
        """The same with `function` of each tensor."""
        apply = lambda t: None if t is None else function(t)  # noqa: E731
        return replace(
            self,
            query=function(self.query),
            key=function(self.key),
            temporal=apply(self.temporal),
            extra_keys=apply(self.extra_keys),
        )

    def detach(self) -> "AttentionFeatures":
        return self.map(Tensor.detach)


def neighbours(frame: int, frames: int, radius: int) -> list[int]:
    """Frames at most `radius` away from `frame`, without itself. radius 0: all other frames."""
    near = range(frames) if radius == 0 else range(max(0, frame - radius), min(frames, frame + radius + 1))
    return [j for j in near if j != frame]


def pairs_at(frames: int, d: int) -> tuple[slice, slice]:
    """The frames i that have a frame j = i + d, and those j."""
    return slice(max(0, -d), frames - max(0, d)), slice(max(0, d), frames + min(0, d))


def blocks_of(tokens: int, rows: int) -> list[slice]:
    """Tokens in blocks of at most `rows`."""
    return [slice(start, min(start + rows, tokens)) for start in range(0, tokens, rows)]


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Sum over each row in the working precision, over the rows in float64; see `in_float64`."""
    return in_float64((a * b).sum(-1)).sum()


WITHOUT_FLOAT64 = {"mps", "privateuseone"}
"""Types of devices: Metal, and DirectML. Of Intel's, some."""


def in_float64(tensor: Tensor) -> Tensor:
    """On the CPU where the device has no float64."""
    device = tensor.device
    if device.type == "xpu":
        lacks = not torch.xpu.get_device_properties(device).has_fp64
    else:
        lacks = device.type in WITHOUT_FLOAT64
    return (tensor.cpu() if lacks else tensor).double()
