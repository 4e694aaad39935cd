"""Video delta denoising score: a clip's latent is optimised, without sampling (DreamMotion, arXiv 2403.12002, sections
3.1 to 3.3; delta denoising score, arXiv 2304.07090).

Source and target latent get the same noise at the same time; the difference of the two predictions says how the target
must change to follow its prompt, and what both predictions get wrong alike cancels. Self-similarity regularisers pull
with it on the target.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .parametrization import NoiseSpace, add_noise

STEP_UNIT = 0.035 / 0.4
"""What a step size of 1 moves by a gradient of 1, such that the paper's 0.4 is an element-wise step of 0.035, whatever
the number of frames."""
BALANCE_EVERY = 4
"""Steps from one look at each regulariser's own gradient to the next, which the first steps all have; between them
their sum has one gradient."""
BALANCE_OVER = 5
"""Looks over which the score's size is averaged."""


def delta_denoising_gradient(
    target: Tensor, source: Tensor, denoised: Tensor, denoised_source: Tensor | None, sigma: Tensor, space: NoiseSpace
) -> Tensor:
    """The gradient of the score with respect to the target latent, the model's Jacobian left out.

    target, source: clean latents of one shape; denoised, denoised_source: the guided predictions of x0 for both, noised
    alike at `sigma` > 0 (scalar); denoised_source None: plain score distillation. In units of the predicted noise,
    eps_target - eps_source = (a / s) [(target - D_target) - (source - D_source)], in every noise space.
    """
    signal, noise = space.signal_and_noise(sigma)
    residual = target - denoised
    if denoised_source is not None:
        residual = residual - (source - denoised_source)
    return residual * (signal / noise)


def frame_difference(target: Tensor, source: Tensor, signal: Tensor, dim: int) -> tuple[float, Tensor]:
    """Mean square of how the differences of neighbouring frames differ between two clips, and its gradient at target.

    target, source: latents that were noised alike, frames along `dim`; signal: the factor a of the clean latent in
    them, which the differences are divided by.
    """
    moved = ((target - source) / signal).diff(dim=dim)
    gradient = torch.zeros_like(target)
    gradient.narrow(dim, 1, moved.shape[dim]).add_(moved)
    gradient.narrow(dim, 0, moved.shape[dim]).sub_(moved)
    return float(moved.square().mean()), 2 * gradient / (moved.numel() * signal)


@dataclass(frozen=True)
class Question:
    """What a step asks the model: step number from 0, normalised time t, sigma (scalar), and both latents noised alike.

    scales: of the regularisers, the sum of whose gradients is wanted; None: each gradient is wanted by itself.
    """

    step: int
    t: float
    sigma: Tensor
    target: Tensor
    source: Tensor
    scales: Mapping[str, float] | None


@dataclass(frozen=True)
class Answer:
    """What the model says: guided predictions of x0, and losses of regularisers by name.

    denoised_source None: plain score distillation (SDS). Gradients are with respect to the noised target: slopes, of
    each loss, or pull, of the sum of the losses, each times the scale that was asked for.
    """

    denoised: Tensor
    denoised_source: Tensor | None
    losses: Mapping[str, float] = field(default_factory=dict)
    slopes: Mapping[str, Tensor] = field(default_factory=dict)
    pull: Tensor | None = None


class DeltaDenoising:
    """Optimises a latent, which begins as `source` (any shape): asks for a step's predictions, is told, and moves it.

    A step draws t uniformly from `t_range` (1 = pure noise, 0 = clean) and one noise, on the CPU from `generator`, so
    that a seed gives one result on every device. mask: 1 = edit, broadcasts to the latent; it filters the score's
    gradient only, as in the paper, or, with mask_all, all gradients. weights: of the regularisers by name; balanced:
    each is scaled so that the RMS of its gradient inside the mask, where it has been largest so far, is that share of
    the score's, averaged over some 20 steps; else they multiply the gradients. Plain gradient descent.
    """

    def __init__(
        self,
        source: Tensor,
        space: NoiseSpace,
        *,
        generator: torch.Generator,
        step_size: float = 0.4,
        t_range: tuple[float, float] = (0.05, 0.95),
        mask: Tensor | None = None,
        mask_all: bool = False,
        weights: Mapping[str, float] | None = None,
        balanced: bool = True,
    ):
        self.latent = source.clone()
        self._source, self._space, self._generator = source, space, generator
        self._step_size, self._t_range = step_size, t_range
        self._mask, self._mask_all = mask, mask_all
        self._balance = _Balance(dict(weights or {}), balanced)
        self._steps = 0

    def ask(self, sigma_of: Callable[[float], Tensor]) -> Question:
        """What the next step asks; sigma_of(t): the noise level."""
        (low, high), source, step = self._t_range, self._source, self._steps
        t = low + (high - low) * float(torch.rand((), generator=self._generator, dtype=torch.float64))
        sigma = sigma_of(t).to(source)
        noise = torch.randn(source.shape, generator=self._generator).to(source)
        target, source = (add_noise(x, noise, sigma, self._space) for x in (self.latent, source))
        self._steps += 1
        return Question(step, t, sigma, target, source, None if self._balance.due(step) else self._balance.scales)

    def tell(self, question: Question, answer: Answer) -> dict[str, float]:
        """Moves the latent; the losses by name ("score": mean square of the score's gradient).

        ValueError, naming step and term, where a gradient is not finite.
        """
        sigma, mask, balance = question.sigma, self._mask, self._balance
        predictions = answer.denoised, answer.denoised_source
        gradient = delta_denoising_gradient(self.latent, self._source, *predictions, sigma, self._space)
        if mask is not None:
            gradient = gradient * mask
        of_all = mask if self._mask_all and mask is not None else 1
        signal, _ = self._space.signal_and_noise(sigma)
        slopes = {name: signal * slope * of_all for name, slope in answer.slopes.items()}
        for name, slope in slopes.items():
            balance.measure(name, slope, gradient, mask)
        pulls = [balance.scales.get(name, 0.0) * slope for name, slope in slopes.items()]
        pulls += [] if answer.pull is None else [signal * answer.pull * of_all]
        pulled = sum(pulls, torch.zeros_like(gradient))
        _check_finite(question.step, sigma, {"score": gradient} | slopes | {"a regulariser": pulled})
        self.latent = self.latent - self._step_size * STEP_UNIT * (gradient + pulled)
        return {"score": float(gradient.square().mean()), **answer.losses}


def _check_finite(step: int, sigma: Tensor, terms: Mapping[str, Tensor]) -> None:
    """ValueError that names the step and the first term that is not finite."""
    for name, gradient in terms.items():
        if not gradient.isfinite().all():
            raise ValueError(
                f"Video DDS: {name} is not finite at step {step + 1} (sigma {float(sigma):.4g}); try the model in bf16 "
                f"or fp32, or a smaller step_size or cfg"
            )


class _Balance:
    """How much a regulariser's gradient is multiplied by: `scales` by name, as far as known.

    Its largest gradient so far sets the scale: were it the last one, a regulariser that has what it holds would be
    blown up again to its share, and pull in a direction that says nothing.
    """

    def __init__(self, weights: dict[str, float], balanced: bool):
        self._weights = {name: weight for name, weight in weights.items() if weight}
        self._balanced = balanced
        self._squares: dict[str, tuple[float, float]] = {}

    @property
    def scales(self) -> dict[str, float]:
        if not self._balanced:
            return self._weights
        return {name: self._weights[name] * (score / own) ** 0.5 for name, (score, own) in self._squares.items()}

    def due(self, step: int) -> bool:
        """Whether this step has to look at each gradient by itself."""
        unknown = self._weights.keys() - self._squares.keys()
        early = step <= BALANCE_EVERY or step % BALANCE_EVERY == 1
        return self._balanced and bool(self._weights) and (bool(unknown) or early)

    def measure(self, name: str, slope: Tensor, gradient: Tensor, mask: Tensor | None) -> None:
        """Takes one look into account, unless the gradient is 0, as before the first step, where nothing has moved."""
        within = torch.ones_like(gradient) if mask is None else mask.expand_as(gradient).to(gradient)
        score, own = (float((x.square() * within).sum() / within.sum().clamp(min=1e-6)) for x in (gradient, slope))
        if name not in self._weights or not own > 0:
            return
        now = score, own
        before = self._squares.get(name, now)
        keep = 1 - 1 / BALANCE_OVER
        self._squares[name] = keep * before[0] + (1 - keep) * now[0], max(before[1], own)
