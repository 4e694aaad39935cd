"""Relevance of a region of the source clip over all frames, from one call of the model on the inverted clip."""

from dataclasses import dataclass, field

import torch
from matplotlib import colormaps
from torch import Tensor
from torch.nn.functional import interpolate

from ..core.cross_frame_relevance import cross_frame_relevance, point_region, region_weight
from ..core.masks import as_frames
from ..core.trajectory import Trajectory
from .attention_call import AttentionCall
from .families import AttentionKind, space_kinds
from .latents import frame_count, time_of
from .layers import attention_layers, select_blocks
from .model_pass import HANDLER, call_on_trajectory

LUMINANCE = torch.tensor([0.299, 0.587, 0.114])
"""Weights of red, green and blue in the brightness of a picture (ITU-R BT.601)."""


def relevance_of(
    region: Tensor,
    frame: int,
    trajectory: Trajectory,
    *,
    percent: float,
    layers: str = "",
    frames: int | None = None,
) -> Tensor:
    """Relevance (F, H, W) of every pixel to `region` (H, W) of one frame; 1 is that of uniform attention.

    `cross_frame_relevance`, averaged over layers. percent: progress of denoising in [0, 1]; the inverted latent
    nearest to it is looked at. layers: blocks such as "u2-u3"; empty: those at the latent's own resolution, which
    place an object best, or all of a transformer. frames: of the clip; None: the latent's. ValueError for layers that
    the model has not.
    """
    model = trajectory.model
    shown = time_of(trajectory.clean, model).tokens_of_clip(frames or frame_count(trajectory.clean))
    recorder = RelevanceRecorder(region, shown[frame], chosen_blocks(layers, model), space_kinds(model))
    call_on_trajectory(recorder, trajectory, percent, frozenset(recorder.kinds))
    return recorder.relevance[shown]


def chosen_blocks(layers: str, model) -> frozenset[str] | None:
    """Of a list such as "u2-u3"; None: the node's own choice."""
    found, kinds = attention_layers(model).values(), space_kinds(model)
    if HANDLER in model.model_options:
        raise ValueError(
            "trajectory: its model has context windows, which show it only a part of the clip at a time; remove the "
            "context window node before Invert Video"
        )
    return select_blocks(layers, {at.block for at in found if at.kind in kinds}) if layers.strip() else None


def query_region(
    images: Tensor, trajectory: Trajectory, *, x: int, y: int, frame: int, mask: Tensor | None = None
) -> Tensor:
    """What is asked about, (H, W) in [0, 1]: the point (x, y) in pixels of `images`, or the mask's frame `frame`.

    images: (F, H, W, 3). ValueError for images, points, frames or masks that do not fit the trajectory's clip.
    """
    check_images(images, trajectory)
    frames, height, width, _ = images.shape
    if not 0 <= frame < frames:
        raise ValueError(f"frame: it is {frame}; the clip has {frames} frames, expected 0 to {frames - 1}")
    if mask is None:
        return point_region(x, y, height, width)
    region = as_frames(mask, frames)[frame].clamp(0, 1)
    if region.max() == 0:
        raise ValueError(
            f"mask: it is empty in frame {frame}; paint the object there, or set `frame` to one in which it is painted"
        )
    return region


def check_images(images: Tensor, trajectory: Trajectory) -> None:
    """ValueError unless `images` (F, H, W, 3) has the trajectory's frames and, to a latent cell, its aspect ratio."""
    latent = trajectory.clean
    height, width = latent.shape[-2:]
    time_of(latent, trajectory.model).tokens_of_clip(len(images))
    tall, wide = images.shape[1:3]
    if abs(wide * height / tall - width) >= 1 and abs(tall * width / wide - height) >= 1:
        cell = trajectory.model.model.latent_format.spacial_downscale_ratio
        raise ValueError(
            f"images: they have {wide} x {tall} pixels, the trajectory's clip has {width * cell} x {height * cell}, of "
            f"another shape; connect the clip that was encoded for Invert Video"
        )


def heat_map(relevance: Tensor, images: Tensor, opacity: float) -> Tensor:
    """Relevance (F, H, W), from 0 to its maximum over the clip, in the colours of inferno over the grey clip.

    images: (F, H, W, 3) in [0, 1]; opacity: of the colours, in [0, 1]. Returns (F, H, W, 3).
    """
    grey = images[..., :3].float().cpu() @ LUMINANCE
    level = relevance / relevance.max().clamp_min(torch.finfo(relevance.dtype).tiny)
    colours = torch.from_numpy(colormaps["inferno"](level.numpy())[..., :3]).float()
    return torch.lerp(grey[..., None].expand_as(colours), colours, opacity)


@dataclass
class RelevanceRecorder:
    """A listener that sums up each layer's relevance as the layer runs; it keeps no query and no key.

    region: (H, W) in [0, 1] of the tokens' frame `frame`; blocks: names of those to look at, None: those at the
    latent's own resolution, or all of a transformer; kinds: of the attention.
    """

    region: Tensor
    frame: int
    blocks: frozenset[str] | None
    kinds: tuple[AttentionKind, ...] = ("spatial",)
    layers: list[str] = field(default_factory=list)
    total: Tensor | float = 0.0

    def __call__(self, call: AttentionCall) -> None:
        finest = call.at_latent_resolution or call.run.patch is not None
        wanted = finest if self.blocks is None else call.layer.block in self.blocks
        if call.kind in self.kinds and wanted:
            alone, (frames, height, width) = call.per_frame, call.grid
            weight, own = region_weight(self.region, height, width), map(alone.of_clip, (alone.query, alone.key))
            relevance = cross_frame_relevance(*own, weight, self.frame, scale=call.scale)
            maps = relevance.view(frames, 1, height, width)
            self.total = self.total + interpolate(maps, self.region.shape, mode="bilinear")[:, 0].cpu()
            self.layers.append(call.layer.path)

    @property
    def relevance(self) -> Tensor:
        """(F, H, W), the mean over the layers. ValueError if no layer was seen."""
        if not self.layers:
            raise ValueError("layers: no attention runs at the latent's own resolution; name blocks, such as d1-d2")
        return self.total / len(self.layers)
