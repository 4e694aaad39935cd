"""Regions of a clip from what its tokens attend to (VideoGrain, arXiv 2502.17258, appendix B), of all frames together.

Each token is described by how its attention is spread over the whole clip. Tokens of one object look alike in every
frame, so clusters keep their number over time; objects of one kind fall into one cluster and are told apart by place.
Shape letters: F frames, H heads, N tokens a frame on a grid (h, w), D head dimension, L landmarks, K clusters.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, interpolate

MAX_TOKENS = 1024
"""Tokens a frame at most, to which grids are pooled."""
MAX_LANDMARKS = 4096
"""Places of the clip over which a token's attention is described, at most."""
RESTARTS, ITERATIONS = 8, 100
SMALLEST = 0.004
TILE_ELEMENTS = 2**24
"""Of the attention maps that exist at once."""


def on_grid(tensor: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """(F, H, N, D) on a grid (h, w) -> (F, H, N', D) on the grid `size`: means of cells, or linear between tokens."""
    if grid == size:
        return tensor
    maps = tensor.transpose(2, 3).unflatten(-1, grid).flatten(0, 1)
    smaller = size[0] <= grid[0]
    maps = adaptive_avg_pool2d(maps, size) if smaller else interpolate(maps, size, mode="bilinear")
    return maps.flatten(2).transpose(1, 2).unflatten(0, tensor.shape[:2])


def attention_profiles(query: Tensor, key: Tensor, grid: tuple[int, int], scale: float) -> Tensor:
    """How the attention of each token spreads over the clip: (F, N, L), rows with sum 1, mean over heads.

    query, key: (F, H, N, D). The tokens of all frames are keys of one softmax, as if attention spanned the clip; its
    weights are summed over the cells of a coarser grid where the clip has more than `MAX_LANDMARKS` tokens.
    """
    frames, heads, tokens, _ = query.shape
    height, width = grid
    while frames * height * width > MAX_LANDMARKS and height * width > 1:
        height, width = -(-height // 2), -(-width // 2)
    keys = key.transpose(0, 1).flatten(1, 2).float()  # (H, F N, D)
    rows = max(1, TILE_ELEMENTS // (heads * frames * tokens))
    profiles = []
    for queries in query.float():
        for some in queries.split(rows, 1):
            weights = torch.softmax(some @ keys.mT * scale, -1).mean(0)  # (rows, F N)
            maps = weights.unflatten(-1, (frames, *grid))
            pooled = adaptive_avg_pool2d(maps, (height, width)) if (height, width) != grid else maps
            profiles.append(pooled.flatten(1))
    profiles = torch.cat(profiles).unflatten(0, (frames, tokens))
    return profiles / profiles.sum(-1, keepdim=True)


def k_means(points: Tensor, clusters: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm from k-means++ starts (Arthur and Vassilvitskii, 2007), the best of several.

    points: (n, c). Returns numbers of the clusters (n,) and their centres (clusters, c). The same generator state gives
    the same result. Raises ValueError for more clusters than points.
    """
    if not 1 <= clusters <= len(points):
        raise ValueError(f"regions: {clusters} clusters of {len(points)} tokens are not possible")
    best = None
    for _ in range(RESTARTS):
        centres = _spread_centres(points, clusters, generator)
        labels = None
        for _ in range(ITERATIONS):
            nearest, distance = _nearest(points, centres)
            if labels is not None and torch.equal(nearest, labels):
                break
            labels = nearest
            sums = torch.zeros_like(centres).index_add_(0, labels, points)
            counts = torch.bincount(labels, minlength=clusters)[:, None]
            centres = torch.where(counts > 0, sums / counts.clamp(min=1), centres)
        inertia = float(distance.sum())
        if best is None or inertia < best[0]:
            best = inertia, labels, centres
    return best[1], best[2]


def _spread_centres(points: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    """k-means++: each next centre is a point drawn in proportion to its squared distance from the others."""
    chosen = [int(torch.randint(len(points), (1,), generator=generator))]
    for _ in range(clusters - 1):
        _, distance = _nearest(points, points[chosen])
        weights = distance.cpu().double()
        if weights.sum() == 0:
            weights = torch.ones_like(weights)
        chosen.append(int(torch.multinomial(weights, 1, generator=generator)))
    return points[chosen]


def _nearest(points: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """Number of the nearest centre, and squared distance from it."""
    squares = points.square().sum(1, keepdim=True) - 2 * points @ centres.T + centres.square().sum(1)
    distance, nearest = squares.min(1)
    return nearest, distance.clamp(min=0)


def cluster_layout(
    profiles: Tensor,
    grid: tuple[int, int],
    clusters: int,
    generator: torch.Generator,
    *,
    instances: bool = True,
    smallest: float = SMALLEST,
) -> list[Tensor]:
    """Regions of a clip as masks (F, h, w) of 0 and 1 that cover it without overlap, the largest first.

    profiles: (F, N, L), of `attention_profiles`; tokens of all frames are clustered together. instances: what of a
    cluster is not connected over space and time becomes regions of its own. smallest: share of the clip that a region
    has at least; less of it goes to the nearest other.
    """
    labels, _ = k_means(profiles.flatten(0, 1), clusters, generator)
    parts = labels.view(len(profiles), *grid).cpu().numpy() + 1
    if instances:
        parts = _connected(parts)
    numbers, sizes = np.unique(parts, return_counts=True)
    large = numbers[sizes >= min(smallest * parts.size, sizes.max())]
    nearest = ndimage.distance_transform_edt(~np.isin(parts, large), return_distances=False, return_indices=True)
    parts = parts[tuple(nearest)]
    masks = [torch.from_numpy(parts == number).float() for number in large]
    return sorted(masks, key=lambda mask: -float(mask.sum()))


def _connected(labels: np.ndarray) -> np.ndarray:
    """Other numbers, from 1, so that each connected part of (F, h, w) has its own."""
    parts, count = np.zeros(labels.shape, int), 0
    for label in np.unique(labels):
        found, more = ndimage.label(labels == label, np.ones((3, 3, 3)))
        parts[found > 0] = found[found > 0] + count
        count += more
    return parts
