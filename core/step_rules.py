"""How a latent moves along a gradient: the step rules, in units of the latent's standard deviation."""

from typing import Literal

import torch
from torch import Tensor

StepRule = Literal["normalised", "adam", "plain"]

TOLERANCE = 1e-3
"""Distance 1 - cos below which steps shrink: at the optimum the gradient is rounding noise."""


class Descent:
    """Moves a latent down a negative-cosine loss, step by step.

    strength: lambda, the step an element makes on average, in standard deviations of the latent; scale: r(sigma), that
    standard deviation. Rules: "normalised" x - lambda r g / RMS(g), "plain" x - lambda r^2 g, "adam" Adam with rate
    lambda r, whose state begins here. Each step is multiplied by min(1, (1 - cos) / 1e-3).
    """

    def __init__(self, *, strength: float, scale: Tensor | float, rule: StepRule = "normalised"):
        self._strength, self._scale, self._rule = strength, float(scale), rule
        self._moments: tuple[Tensor, Tensor] | None = None
        self._steps = 0

    def step(self, x: Tensor, loss: float, gradient: Tensor) -> Tensor:
        """x after a step; loss in [-1, 0] and d loss / d x at x."""
        g, self._steps = gradient, self._steps + 1
        size = self._strength * self._scale * min(1.0, (1 + loss) / TOLERANCE)
        if self._rule == "adam":
            moments = self._moments or (torch.zeros_like(x), torch.zeros_like(x))
            direction, self._moments = adam_direction(g, moments, self._steps)
        elif self._rule == "plain":
            direction = g * self._scale
        else:
            g = g / g.abs().max().clamp_min(torch.finfo(g.dtype).tiny)  # squares of small numbers would be 0
            direction = g / g.square().mean().sqrt().clamp_min(torch.finfo(g.dtype).tiny)
        return x - size * direction


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
