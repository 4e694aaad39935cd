"""Optical flow without weights: pyramidal Lucas-Kanade (Lucas and Kanade 1981, Bouguet 2001), dense.

For metrics where no network (RAFT) is at hand. Good to a fraction of a pixel on textured pictures that move smoothly;
flat areas take the motion of what is near, and what hides or appears has none of its own.
"""

import torch
from kornia.filters import gaussian_blur2d, spatial_gradient
from kornia.geometry.transform import pyrdown
from torch import Tensor
from torch.nn.functional import grid_sample, interpolate

ITERATIONS = 5
SMALLEST = 16  # side of the coarsest level
WINDOW = (15, 15)
SIGMA = (3.0, 3.0)
REGULAR = 1e-4
"""Added to the structure tensor: where nothing is to be seen nothing moves."""


def estimate_flow(first: Tensor, second: Tensor) -> Tensor:
    """(2, H, W) in pixels: what is at x in `first` (H, W, 3) is at x + flow in `second`. Values in [0, 1]."""
    a, b = (frame.float().mean(-1)[None, None] for frame in (first, second))
    pyramid = [(a, b)]
    while min(pyramid[-1][0].shape[-2:]) >= 2 * SMALLEST:
        pyramid.append(tuple(pyrdown(level) for level in pyramid[-1]))
    flow = torch.zeros(1, 2, *pyramid[-1][0].shape[-2:], device=a.device)
    for a, b in reversed(pyramid):
        size = a.shape[-2:]
        grown = torch.tensor([size[1] / flow.shape[-1], size[0] / flow.shape[-2]], device=a.device).view(1, 2, 1, 1)
        flow = interpolate(flow, size, mode="bilinear", align_corners=False) * grown
        flow = _refined(a, b, flow)
    return flow[0]


def clip_flow(frames: Tensor) -> Tensor:
    """(F - 1, 2, H, W): from each frame to the next."""
    return torch.stack([estimate_flow(a, b) for a, b in zip(frames, frames[1:], strict=False)])


def _refined(a: Tensor, b: Tensor, flow: Tensor) -> Tensor:
    gradient = spatial_gradient(a)[:, 0]  # (1, 2, H, W)
    x, y = gradient[:, :1], gradient[:, 1:]
    xx, xy, yy = (gaussian_blur2d(product, WINDOW, SIGMA) for product in (x * x, x * y, y * y))
    xx, yy = xx + REGULAR, yy + REGULAR
    determinant = xx * yy - xy * xy
    for _ in range(ITERATIONS):
        difference = _moved(b, flow) - a
        u, v = (gaussian_blur2d(product, WINDOW, SIGMA) for product in (x * difference, y * difference))
        step = torch.cat([yy * u - xy * v, xx * v - xy * u], 1) / determinant
        flow = flow - step.clamp(-2, 2)
    return flow


def _moved(image: Tensor, flow: Tensor) -> Tensor:
    height, width = image.shape[-2:]
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    x, y = columns.to(flow) + flow[0, 0], rows.to(flow) + flow[0, 1]
    grid = torch.stack([2 * x / max(width - 1, 1) - 1, 2 * y / max(height - 1, 1) - 1], -1)
    return grid_sample(image, grid[None], align_corners=True, padding_mode="border")
