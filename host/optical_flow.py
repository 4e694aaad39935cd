"""Optical flow and tracks of clips: by the host's RAFT where the user has it, else without weights."""

from collections.abc import Callable
from dataclasses import dataclass

import comfy.model_management
import torch
from torch import Tensor

from ..core.flow import Flow, estimate_flow, occlusion


@dataclass(frozen=True)
class ClipFlow:
    """Of F frames: forward (F - 1, 2, H, W) in pixels, occlusion (F - 1, H, W), 1 where a pixel has no match."""

    forward: Tensor
    occlusion: Tensor


def estimator_of(flow_model) -> Flow:
    """flow_model: the host's OPTICAL_FLOW, or None."""
    if flow_model is None:
        return estimate_flow
    from comfy_extras.void_noise_warp import RaftOpticalFlow

    comfy.model_management.load_model_gpu(flow_model)
    raft = RaftOpticalFlow(flow_model.model)
    return lambda a, b: raft(a.movedim(-1, 0), b.movedim(-1, 0)).cpu()


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
