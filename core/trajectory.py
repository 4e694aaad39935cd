"""The latents of one inversion, by noise level."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .parametrization import NoiseSpace


@dataclass(frozen=True)
class Trajectory:
    """z_t of the source clip for every sigma, and what made them.

    sigmas: (S + 1,) falling, to 0 but in the noisy part of an inversion by two models, which goes on from where the
    first ended; latents: (S + 1, *latent), in the model's own scale, latents[k] at sigmas[k]. model and conditioning
    are the host's objects that the inversion used; core never looks inside. z0: the clean latent, where it is not the
    last of `latents`; whole: steps of the whole schedule, where this is a part.
    """

    latents: Tensor
    sigmas: Tensor
    space: NoiseSpace
    model: Any
    conditioning: Any
    z0: Tensor | None = None
    whole: int | None = None

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    @property
    def schedule_steps(self) -> int:
        """Steps of the whole schedule."""
        return self.whole or self.steps

    @property
    def is_part(self) -> bool:
        """Whether another model has, or is to have, the rest of the schedule."""
        return self.schedule_steps != self.steps

    @property
    def clean(self) -> Tensor:
        """The clip's latent without noise."""
        return self.latents[-1] if self.z0 is None else self.z0

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one latent."""
        return tuple(self.latents.shape[1:])

    def offset_of(self, sigmas: Tensor) -> int:
        """Index of the first of `sigmas` here; they must be a contiguous part of the trajectory's sigmas."""
        own, given = self.sigmas.cpu().double(), sigmas.cpu().double()
        for start in range(len(own) - len(given) + 1):
            if torch.allclose(own[start : start + len(given)], given, rtol=1e-5, atol=1e-7):
                return start
        raise ValueError(
            f"sigmas: {_summary(given)} are not a contiguous part of the trajectory's {_summary(own)}; connect the "
            f"SIGMAS output of Invert Video, or a part of it (SplitSigmas)"
        )


def _summary(sigmas: Tensor) -> str:
    return f"{len(sigmas)} values from {float(sigmas[0]):.4g} to {float(sigmas[-1]):.4g}"
