"""Latents as the host keeps them, seen as frames: [F, C, h, w] (U-Nets) or [1, C, F, h, w] (video DiTs)."""

import math
from collections.abc import Sequence

from torch import Tensor

from ..core.frames import FrameMap
from ..core.masks import latent_mask
from .families import family_of, patch_size


def frame_count(latent: Tensor) -> int:
    """Latent frames of one clip."""
    return latent.shape[0] if latent.ndim == 4 else latent.shape[2]


def clip_shape(shape: Sequence[int], packed: Sequence[Sequence[int]] | None) -> tuple[int, ...]:
    """Of a latent of this shape, that of the clip in it; packed: the host's shapes of the latents that it has put one
    behind another into one, as of a clip and its sound."""
    return tuple(packed[0] if packed is not None and len(packed) > 1 else shape)


def clip_mask(noise_mask):
    """Of the noise mask that a LATENT carries, None or nested with one for its sound, the clip's."""
    return noise_mask.unbind()[0] if getattr(noise_mask, "is_nested", False) else noise_mask


def time_of(latent: Tensor, model) -> FrameMap:
    """The time of one clip, as a ModelPatcher sees it."""
    family = family_of(model)
    joined = 1 if family.patched is None else patch_size(model.model.diffusion_model)[0]
    return family.frames.of(frame_count(latent), joined)


def mask_like(mask: Tensor, latent: Tensor) -> Tensor:
    """A mask (F, h, w) shaped to broadcast over a latent of either layout, on its device."""
    return (mask[:, None] if latent.ndim == 4 else mask[None, None]).to(latent)


def grid_mask_of(mask: Tensor, latent: Tensor, model, dilation: float) -> Tensor:
    """`mask` (F, H, W) of any size, dilated by `dilation` pixels of the clip, on the grid of its latent: (F, h, w).

    ValueError unless it has one frame, the latent's or the clip's, and the dilation is a length.
    """
    if not (math.isfinite(dilation) and dilation >= 0):
        raise ValueError(f"dilation: it is {dilation}; expected a number of pixels of at least 0")
    cell = model.model.latent_format.spacial_downscale_ratio
    return latent_mask(mask, time_of(latent, model), *latent.shape[-2:], dilation=dilation, cell=cell)


def check_clip_latent(latent: Tensor, model) -> None:
    """ValueError unless `latent` is one clip of at least 2 frames with the channels that `model` expects."""
    if getattr(latent, "is_nested", False):
        raise ValueError(
            "latent: it holds sound beside the clip, which is not edited; connect the video output of LTXV Separate AV "
            "Latent (or leave the sound out of the latent), and join clip and sound after the edit"
        )
    expected = model.model.latent_format
    channels, layout = expected.latent_channels, "frames, {}, height, width"
    if expected.latent_dimensions == 3:
        layout = "1, {}, frames, height, width"
    if latent.ndim != expected.latent_dimensions + 2 or latent.shape[1] != channels:
        raise ValueError(
            f"latent: its shape {tuple(latent.shape)} does not fit the model, which expects "
            f"({layout.format(channels)}) with {channels} channels; encode the clip with the VAE of this model"
        )
    if latent.ndim == 5 and latent.shape[0] != 1:
        raise ValueError(f"latent: it holds {latent.shape[0]} clips; expected one clip")
    if frame_count(latent) < 2:
        raise ValueError(
            f"latent: it has {frame_count(latent)} frame; a video of at least 2 frames is needed (load the clip as an "
            f"image batch, one image a frame)"
        )
