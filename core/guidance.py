"""How a latent moves along a gradient: the step rules, in units of the latent's standard deviation."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

StepRule = Literal["normalised", "adam", "plain"]

TOLERANCE = 1e-3
"""Distance 1 - cos below which steps shrink: at the optimum the gradient is rounding noise."""


def descend(
    x: Tensor,
    gradient: Callable[[Tensor], tuple[Tensor, Tensor]],
    *,
    strength: float,
    scale: Tensor,
    rule: StepRule = "normalised",
    iterations: int = 1,
) -> Tensor:
    """Moves x down a negative-cosine loss, `iterations` times.

    gradient(x) returns (loss in [-1, 0], d loss / d x). strength: lambda, the step an element makes on average, in
    standard deviations of the latent; scale: r(sigma), that standard deviation. Rules: "normalised" x - lambda r g /
    RMS(g), "plain" x - lambda r^2 g (both one gradient step), "adam" Adam with rate lambda r and fresh state.
    Each step is multiplied by min(1, (1 - cos) / 1e-3).
    """
    moments = (torch.zeros_like(x), torch.zeros_like(x))
    for k in range(1, iterations + 1):
        loss, g = gradient(x)
        size = strength * float(scale) * min(1.0, float(1 + loss) / TOLERANCE)
        if rule == "adam":
            direction, moments = adam_direction(g, moments, k)
        elif rule == "plain":
            direction = g * float(scale)
        else:
            g = g / g.abs().max().clamp_min(torch.finfo(g.dtype).tiny)  # squares of small numbers would be 0
            direction = g / g.square().mean().sqrt().clamp_min(torch.finfo(g.dtype).tiny)
        x = x - size * direction
    return x


def adam_direction(
    g: Tensor, moments: tuple[Tensor, Tensor], k: int, betas: tuple[float, float] = (0.9, 0.999)
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Adam's bias-corrected update direction at iteration k >= 1 (Kingma and Ba 2015) and the new moments.

    The usual epsilon is relative here, 1e-8 of the largest element, because gradients of a mean cosine are tiny.
    """
    first = torch.lerp(g, moments[0], betas[0])
    second = torch.lerp(g.square(), moments[1], betas[1])
    mean, variance = first / (1 - betas[0] ** k), second / (1 - betas[1] ** k)
    root = variance.sqrt()
    return mean / (root + 1e-8 * root.max()).clamp_min(torch.finfo(g.dtype).tiny), (first, second)
