"""Optical flow and tracks of clips: by RAFT where the user has loaded it, else without weights."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import comfy.model_management
import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import interpolate

from ..core.flow import Flow, estimate_flow, occlusion

SMALLEST_SIDE, MULTIPLE = 128, 8
"""Sides of frames that torchvision's RAFT takes, in pixels: at least, and multiples of."""


@dataclass(frozen=True)
class ClipFlow:
    """Of F frames: forward (F - 1, 2, H, W) in pixels, occlusion (F - 1, H, W), 1 where a pixel has no match."""

    forward: Tensor
    occlusion: Tensor


def estimator_of(flow_model) -> Flow:
    """flow_model: the host's OPTICAL_FLOW, a ModelPatcher of torchvision's RAFT, or None."""
    if flow_model is None:
        return estimate_flow
    comfy.model_management.load_model_gpu(flow_model)
    return partial(_by_raft, flow_model.model, flow_model.load_device)


@torch.no_grad()
def _by_raft(network: Module, device: torch.device, first: Tensor, second: Tensor) -> Tensor:
    """(2, H, W) in pixels, from one frame (H, W, 3) to another, by a network that takes sides of its own multiples."""
    height, width = first.shape[:2]
    size = [max(SMALLEST_SIDE, round(side / MULTIPLE) * MULTIPLE) for side in (height, width)]
    a, b = (
        interpolate(2 * frame.to(device).float().movedim(-1, 0)[None] - 1, size, mode="bilinear", antialias=True)
        for frame in (first, second)
    )
    flow = interpolate(network(a, b)[-1], (height, width), mode="bilinear")[0].cpu()
    return flow * torch.tensor([width / size[1], height / size[0]])[:, None, None]


def flow_of(
    frames: Tensor, flow_model=None, progress: Callable[[int, int], None] = lambda done, total: None
) -> ClipFlow:
    """Of frames (F, H, W, 3) in [0, 1], from each to the next. ValueError for one frame and for NaN."""
    check_clip(frames)
    estimate, pairs = estimator_of(flow_model), len(frames) - 1
    forward, hidden = [], []
    for i in range(pairs):
        comfy.model_management.throw_exception_if_processing_interrupted()
        there, back = estimate(frames[i], frames[i + 1]), estimate(frames[i + 1], frames[i])
        forward.append(there)
        hidden.append(occlusion(there, back))
        progress(i + 1, pairs)
    return ClipFlow(torch.stack(forward), torch.stack(hidden))


def check_clip(frames: Tensor) -> None:
    """ValueError unless it is a clip of numbers."""
    if len(frames) < 2:
        raise ValueError(f"images: there is {len(frames)} frame; expected a clip of at least 2")
    if frames.isnan().any():
        raise ValueError("images: they hold NaN; expected numbers from 0 to 1, so check the node they come from")
