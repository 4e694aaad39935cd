"""Noise spaces: the one place that knows how a model writes a noisy latent.

Every model of the host writes x = a(sigma) x0 + s(sigma) eps. Algorithms ask a `NoiseSpace` for a and s
and never learn which family they run on.
"""

from collections.abc import Callable
from enum import Enum

import torch
from torch import Tensor


class NoiseSpace(Enum):
    """Variance exploding (x0 + sigma eps), rectified flow ((1 - sigma) x0 + sigma eps), variance preserving."""

    VE = "VE"
    RF = "RF"
    VP = "VP"

    def signal_and_noise(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """a(sigma), s(sigma); same shape as sigma. sigma >= 0, and <= 1 in RF."""
        if self is NoiseSpace.RF:
            return 1 - sigma, sigma
        if self is NoiseSpace.VP:
            norm = torch.sqrt(1 + sigma**2)
            return 1 / norm, sigma / norm
        return torch.ones_like(sigma), sigma

    def latent_scale(self, sigma: Tensor) -> Tensor:
        """r(sigma) = sqrt(a^2 + s^2): the standard deviation of a noisy latent whose clean one has unit variance."""
        signal, noise = self.signal_and_noise(sigma)
        return torch.sqrt(signal**2 + noise**2)


def add_noise(x0: Tensor, noise: Tensor, sigma: Tensor, space: NoiseSpace) -> Tensor:
    """a(sigma) x0 + s(sigma) eps."""
    a, s = space.signal_and_noise(sigma)
    return a * x0 + s * noise


def predicted_noise(x: Tensor, denoised: Tensor, sigma: Tensor, space: NoiseSpace) -> Tensor:
    """eps from x and the prediction of x0. sigma > 0."""
    a, s = space.signal_and_noise(sigma)
    return (x - a * denoised) / s


def ddim_step(x: Tensor, denoised: Tensor, sigma: Tensor, sigma_next: Tensor, space: NoiseSpace) -> Tensor:
    """One deterministic DDIM step (Song et al. 2021, eq. 12, eta 0) from sigma to sigma_next.

    x, denoised: any shape; sigma > 0 and sigma_next >= 0: scalars. Exact in every noise space.
    """
    if sigma_next == 0:
        return denoised
    return add_noise(denoised, predicted_noise(x, denoised, sigma, space), sigma_next, space)


def ddim_inversion_step(
    x: Tensor,
    denoise: Callable[[Tensor, Tensor], Tensor],
    sigma: Tensor,
    sigma_next: Tensor,
    space: NoiseSpace,
    refinements: int = 1,
) -> tuple[Tensor, Tensor]:
    """One step of DDIM inversion from sigma up to sigma_next > sigma; returns (x_next, denoised).

    The noise is predicted at the noisier level, which makes the equation implicit; it is solved by fixed-point
    iteration (Pan et al. 2023, AIDI): `refinements` = 0 is the classic one-call inversion, eps of the present latent at
    the next level; each further one evaluates the model again at the landing point. `denoise(x, sigma)` returns the
    prediction of x0. The present latent is rescaled to the next level's variance, so every noise space starts alike.
    """
    (a0, s0), (a1, s1) = space.signal_and_noise(sigma), space.signal_and_noise(sigma_next)
    landing = x * (space.latent_scale(sigma_next) / space.latent_scale(sigma))
    for _ in range(1 + refinements):
        denoised = denoise(landing, sigma_next)
        noise = (landing - a1 * denoised) / s1
        landing = a1 * (x - s0 * noise) / a0 + s1 * noise
    return landing, denoised


def noise_fraction(sigma: float, percent_to_sigma: Callable[[float], float]) -> float:
    """Normalised time t in [0, 1] of a noise level: 1 = pure noise, 0 = clean.

    Inverts the model's own falling `percent_to_sigma` (0 -> most noise, 1 -> clean) by bisection to 1e-6.
    """
    low, high = 0.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if percent_to_sigma(middle) > sigma else (low, middle)
    return 1 - (low + high) / 2
