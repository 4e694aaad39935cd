"""Regions of the source clip from the model's own attention to it, without masks from outside."""

from collections.abc import Callable
from dataclasses import dataclass

import comfy.model_management
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ..core.clustering import MAX_TOKENS, attention_profiles, cluster_layout, on_grid
from ..core.trajectory import Trajectory
from .attention_call import AttentionCall
from .families import AttentionKind, family_of, patch_size, space_kinds
from .latents import frame_count, time_of
from .model_pass import call_on_trajectory, nearest_step
from .relevance_preview import chosen_blocks

PERCENTS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Where in the denoising the source is looked at: not at its ends, where there is nothing yet to see, or left to do."""


def regions_from_attention(
    trajectory: Trajectory,
    clusters: int,
    size: tuple[int, int],
    *,
    seed: int,
    instances: bool = True,
    layers: str = "",
    frames: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Tensor]:
    """Masks (F, H, W) of 0 and 1 at `size`, which cover the clip without overlap, the largest first.

    clusters: kinds of things to tell apart; instances: things of one kind that do not touch are regions of their own.
    layers: blocks such as "u2-u3"; empty: those of the finest grid with at most 1024 tokens a frame, or all of a
    transformer. frames: of the clip; None: the latent's. Holds a table of all tokens by at most 4096 places of the
    clip. ValueError for layers that the model has not.
    """
    model, clean = trajectory.model, trajectory.clean
    blocks = chosen_blocks(layers, model)
    shown = time_of(clean, model).tokens_of_clip(frames or frame_count(clean))
    patch = (1, 1) if family_of(model).patched is None else patch_size(model.model.diffusion_model)[1:]
    finest = tuple(-(-side // cell) for side, cell in zip(clean.shape[-2:], patch, strict=True))
    recorder = ProfileRecorder(finest, blocks, space_kinds(model))
    steps = {nearest_step(trajectory, percent): percent for percent in PERCENTS}
    for done, percent in enumerate(steps.values()):
        comfy.model_management.throw_exception_if_processing_interrupted()
        call_on_trajectory(recorder, trajectory, percent, frozenset(recorder.kinds))
        progress(done + 1, len(steps))
    generator = torch.Generator().manual_seed(seed)
    masks = cluster_layout(recorder.profiles, recorder.grid, clusters, generator, instances=instances)
    large = interpolate(torch.stack(masks), size, mode="bilinear")  # (K, F, H, W)
    owner = large.argmax(0)[shown]
    return [(owner == k).float() for k in range(len(masks))]


@dataclass
class ProfileRecorder:
    """A listener that sums up how tokens attend over the clip; it keeps no query and no key.

    size: of a frame's finest tokens. blocks: names of those to look at; None: those on `grid`, or all of a transformer.
    kinds: of the attention.
    """

    size: tuple[int, int]
    blocks: frozenset[str] | None
    kinds: tuple[AttentionKind, ...] = ("spatial",)
    layers: int = 0
    total: Tensor | float = 0.0

    @property
    def grid(self) -> tuple[int, int]:
        """The finest, halved, rounding up, until a frame has at most 1024 tokens."""
        height, width = self.size
        while height * width > MAX_TOKENS:
            height, width = (height + 1) // 2, (width + 1) // 2
        return height, width

    @property
    def profiles(self) -> Tensor:
        """(F, N, L), the mean over layers and noise levels. ValueError if no layer was seen."""
        if not self.layers:
            raise ValueError(
                f"layers: no attention runs on a grid of {self.grid[1]} x {self.grid[0]}; name blocks, such as u0-u1"
            )
        return self.total / self.layers

    def __call__(self, call: AttentionCall) -> None:
        own = call.grid[1:]
        found = own == self.grid or call.run.patch is not None
        wanted = found if self.blocks is None else call.layer.block in self.blocks
        if call.kind in self.kinds and wanted:
            per_frame = call.per_frame
            query, key = (on_grid(per_frame.of_clip(t), own, self.grid) for t in (per_frame.query, per_frame.key))
            self.total = self.total + attention_profiles(query, key, self.grid, call.scale).cpu()
            self.layers += 1
