"""Optical flow without weights, and what is made of any flow: occlusion, tracks of points, a picture.

The flow is pyramidal Lucas-Kanade (Lucas and Kanade 1981, Bouguet 2001), dense, for where no network (RAFT) is at hand.
Good to a fraction of a pixel on textured pictures that move smoothly; flat areas take the motion of what is near, and
what hides or appears has none of its own.
"""

import math
from collections.abc import Callable

import torch
from kornia.color import hsv_to_rgb
from kornia.filters import gaussian_blur2d, spatial_gradient
from kornia.geometry.transform import pyrdown
from torch import Tensor
from torch.nn.functional import grid_sample, interpolate

Flow = Callable[[Tensor, Tensor], Tensor]
"""From one frame (H, W, 3) to the next: (2, H, W) in pixels."""

ITERATIONS = 5
CONVERGED = 0.02  # pixels of the root mean square of a step, below which a level is done
SMALLEST = 16  # side of the coarsest level
WINDOW = (15, 15)
SIGMA = (3.0, 3.0)
REGULAR = 1e-4
"""Added to the structure tensor: where nothing is to be seen nothing moves."""


def estimate_flow(first: Tensor, second: Tensor) -> Tensor:
    """(2, H, W) in pixels: what is at x in `first` (H, W, 3) is at x + flow in `second`. Values in [0, 1].

    ValueError for sides of less than 8 pixels, half of the window that is compared.
    """
    if min(first.shape[:2]) <= WINDOW[0] // 2:
        raise ValueError(f"frames of {first.shape[1]} x {first.shape[0]} pixels are too small for an optical flow")
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


def occlusion(forward: Tensor, backward: Tensor) -> Tensor:
    """(H, W) 1 where a pixel has no match in the next frame: the way there and back does not end where it began.

    forward, backward: (2, H, W) in pixels, from a frame to the next and back. The bound is that of Sundaram et al. 2010
    ("Dense point trajectories by GPU-accelerated large displacement optical flow"). What leaves the picture counts too.
    """
    height, width = forward.shape[-2:]
    back = _moved(backward[None], forward[None])[0]
    apart = (forward + back).square().sum(0)
    bound = 0.01 * (forward.square().sum(0) + back.square().sum(0)) + 0.5
    x, y = (grid + part for grid, part in zip(_pixels(height, width, forward), forward, strict=True))
    outside = (x < 0) | (x > width - 1) | (y < 0) | (y > height - 1)
    return ((apart > bound) | outside).float()


def grid_points(height: int, width: int, spacing: int, mask: Tensor | None = None) -> Tensor:
    """(N, 2) points x, y in pixels, `spacing` apart and centred; with a mask (H, W) those where it is above 0.5.

    ValueError where none is left.
    """
    xs, ys = (
        torch.arange(size % spacing // 2 + spacing // 2 if size > spacing else size // 2, size, spacing)
        for size in (width, height)
    )
    points = torch.cartesian_prod(ys, xs).flip(-1).float()
    if mask is not None:
        points = points[mask[points[:, 1].long(), points[:, 0].long()] > 0.5]
    if not len(points):
        raise ValueError(f"mask: no point of a grid of {spacing} pixels lies in it; use a finer grid or a larger mask")
    return points


def follow(points: Tensor, flow: Tensor) -> Tensor:
    """Where points (N, 2), x and y in pixels, go by a flow (2, H, W); those outside the picture stay at its edge."""
    height, width = flow.shape[-2:]
    size = torch.tensor([width, height], device=flow.device, dtype=points.dtype)
    at = (2 * points / (size - 1).clamp(min=1) - 1).to(flow)
    step = grid_sample(flow[None], at[None, None], align_corners=True, padding_mode="border")[0, :, 0].T
    return torch.minimum((points + step.to(points)).clamp(min=0), size - 1)


def track_points(
    frames: Tensor, points: Tensor, estimate: Flow, progress: Callable[[int, int], None] = lambda done, total: None
) -> tuple[Tensor, Tensor]:
    """Points (N, 2) of the first frame followed through a clip (F, H, W, 3) by its flow from frame to frame.

    Tracks (N, F, 2) in pixels, and (N, F) whether a point is still seen: once hidden, or out of the picture, it counts
    as lost.
    """
    tracks, seen = [points], [torch.ones(len(points), dtype=torch.bool)]
    for i in range(len(frames) - 1):
        forward, backward = estimate(frames[i], frames[i + 1]), estimate(frames[i + 1], frames[i])
        hidden = _values_at(points, occlusion(forward, backward)) > 0.5
        points = follow(points, forward)
        tracks.append(points)
        seen.append(seen[-1] & ~hidden.cpu())
        progress(i + 1, len(frames) - 1)
    return torch.stack(tracks, 1), torch.stack(seen, 1)


def _values_at(points: Tensor, values: Tensor) -> Tensor:
    """(N,) values (H, W) at the pixels nearest to points (N, 2)."""
    height, width = values.shape
    x, y = points.round().long().unbind(-1)
    return values[y.clamp(0, height - 1), x.clamp(0, width - 1)]


def flow_picture(flow: Tensor, largest: float | None = None) -> Tensor:
    """(H, W, 3) in [0, 1]: the direction of a flow (2, H, W) as hue, its length as saturation; still is white.

    largest: pixels that are fully saturated; None: the longest of this flow.
    """
    length = flow.norm(dim=0)
    top = float(length.max()) if largest is None else largest
    hue = torch.atan2(flow[1], flow[0]) % (2 * math.pi)
    saturation = (length / max(top, 1e-6)).clamp(max=1)
    return hsv_to_rgb(torch.stack([hue, saturation, torch.ones_like(hue)])[None])[0].movedim(0, -1)


def _pixels(height: int, width: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """x and y of each pixel, (H, W) each."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return columns.to(like), rows.to(like)


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
        step = step.clamp(-2, 2)
        flow = flow - step
        if step.square().mean().sqrt() < CONVERGED:
            break
    return flow


def _moved(image: Tensor, flow: Tensor) -> Tensor:
    height, width = image.shape[-2:]
    x, y = (grid + part for grid, part in zip(_pixels(height, width, flow), flow[0], strict=True))
    grid = torch.stack([2 * x / max(width - 1, 1) - 1, 2 * y / max(height - 1, 1) - 1], -1)
    return grid_sample(image, grid[None], align_corners=True, padding_mode="border")
