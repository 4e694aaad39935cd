"""What an edit will cost in time and memory, from a few steps of it at its own size."""

from dataclasses import dataclass
from time import perf_counter

import comfy.model_management
import comfy.samplers
import torch
from torch import Tensor

from ..core.parametrization import add_noise, noise_fraction
from ..core.trajectory import Trajectory
from .families import family_of, noise_space
from .inversion import InversionSampler
from .latents import check_clip_latent
from .memory import GradientMemory
from .model_pass import as_source
from .relevance_matching import MatchedStep, RelevanceMatching, check_window, str_score_of
from .sampling import TrajectorySampler
from .step_caches import without_caches

PROBE_STEPS = 3
"""Steps of each probe; the first warms up and is not counted."""


@dataclass(frozen=True)
class Plan:
    """The edit to predict. matching: with STR matching in its window; prompts: 2 with CFG above 1.

    layers, iterations, start, end: those of the STR nodes.
    """

    steps: int = 50
    refinements: int = 1
    prompts: int = 2
    matching: bool = True
    layers: str = ""
    iterations: int = 3
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self):
        check_window(self.start, self.end)


@dataclass(frozen=True)
class Cost:
    """A prediction: seconds by stage, bytes by use.

    gradient: of one matching step, beyond the weights (None: no step matches); checkpointing: whether it will keep no
    activations; sampling: the host's own estimate of a plain step; free: on the device, weights included.
    """

    inversion_seconds: float
    edit_seconds: float
    steps: int
    matched_steps: int
    weights: int
    sampling: int
    gradient: GradientMemory | None
    checkpointing: bool
    trajectory: int
    free: int

    @property
    def seconds(self) -> float:
        return self.inversion_seconds + self.edit_seconds

    @property
    def memory(self) -> int:
        """Peak bytes on the device: the weights and the larger of sampling and gradient."""
        gradient = self.gradient.total(self.checkpointing) if self.gradient else 0
        return self.weights + max(self.sampling, gradient)


def predict_cost(model, positive, latent: Tensor, plan: Plan, scheduler: str = "ddim_uniform") -> Cost:
    """Runs PROBE_STEPS steps of the inversion and of the edit at the size of `latent`, and counts up the rest.

    model: a ModelPatcher; latent: as in the graph. Raises what the edit itself would raise, out of memory included.
    """
    family_of(model)
    check_clip_latent(latent, model)
    sampling = model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, scheduler, plan.steps)
    times = [1 - noise_fraction(float(sigma), sampling.percent_to_sigma) for sigma in sigmas[:-1]]
    matched_steps = sum(plan.start <= t <= plan.end for t in times) if plan.matching else 0

    probe = _probe(model, positive, latent, sigmas)
    inversion = InversionSampler(probe.space, refinements=0)
    call = _seconds_a_step(probe, inversion, probe.sigmas.flip(0), latent)
    plain = _seconds_a_step(probe, TrajectorySampler(probe), probe.sigmas, latent, plan.prompts)
    matched, last = plain, None
    if matched_steps:
        matched, last = _matching_step(probe, latent, plan)
    device = model.load_device
    rows = (plan.prompts * latent.shape[0], *latent.shape[1:])
    return Cost(
        inversion_seconds=len(times) * (1 + plan.refinements) * call,
        edit_seconds=matched_steps * matched + (len(times) - matched_steps) * plain,
        steps=len(times),
        matched_steps=matched_steps,
        weights=model.model_size(),
        sampling=int(model.memory_required(rows)),
        gradient=last and last.memory,
        checkpointing=bool(last and last.checkpointing),
        trajectory=(len(times) + 1) * latent.numel() * latent.element_size(),
        free=int(comfy.model_management.get_free_memory(device)) + model.loaded_size(),
    )


def _probe(model, positive, latent: Tensor, sigmas: Tensor) -> Trajectory:
    """A trajectory of noised copies of the clip at a few noise levels from the middle of the schedule."""
    middle = max(0, min(len(sigmas) // 2, len(sigmas) - 1 - PROBE_STEPS))
    sigmas = torch.cat([sigmas[middle : middle + PROBE_STEPS], sigmas.new_zeros(1)])
    space, clean = noise_space(model), model.model.process_latent_in(latent)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0)).to(clean)
    latents = torch.stack([add_noise(clean, noise, sigma, space) for sigma in sigmas])
    return Trajectory(latents, sigmas, space, model, positive)


def _matching_step(probe: Trajectory, latent: Tensor, plan: Plan) -> tuple[float, MatchedStep]:
    """Seconds of a step with STR matching, and what the last one reported."""
    matching = RelevanceMatching(str_score_of(probe, plan.layers), iterations=plan.iterations)
    reports: list[MatchedStep] = []

    def matched(x, step):
        x = matching(x, step)
        reports[:] = step.run.records
        return x

    sampler = TrajectorySampler(probe, before_step=[matched])
    return _seconds_a_step(probe, sampler, probe.sigmas, latent, plan.prompts), reports[-1]


def _seconds_a_step(probe: Trajectory, sampler, sigmas: Tensor, latent: Tensor, prompts: int = 1) -> float:
    """Seconds of one step of `sampler` after its first, in a real run of the host."""
    of_source = isinstance(sampler, InversionSampler)
    guider = comfy.samplers.CFGGuider(as_source(without_caches(probe.model)[0]) if of_source else probe.model)
    guider.inner_set_conds({"positive": probe.conditioning, "negative": probe.conditioning})
    guider.set_cfg(1.0 if prompts == 1 else 2.0)
    ends = []

    def note(step, denoised, x, total):
        float(x.flatten()[0])  # waits for the device
        ends.append(perf_counter())

    guider.sample(torch.zeros_like(latent), latent, sampler, sigmas, callback=note, disable_pbar=True, seed=0)
    return (ends[-1] - ends[0]) / (len(ends) - 1)
