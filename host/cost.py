"""What an edit will cost in time and memory, from a few steps of it at its own size."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter

import comfy.model_management
import comfy.sampler_helpers
import comfy.samplers
import psutil
import torch
from torch import Tensor

from ..core.parametrization import add_noise, noise_fraction
from ..core.trajectory import Trajectory
from .distillation import MOTION, RELEVANCE, SPATIAL, TEMPORAL, Distillation, optimise
from .families import family_of, noise_space
from .features import key_blocks
from .inversion import InversionSampler
from .latents import check_clip_latent, frame_count
from .memory import GradientMemory, peak_bytes
from .model_pass import as_source
from .planned_edits import Plan
from .relevance_matching import MatchedStep, RelevanceMatching, check_window, str_score_of
from .sampling import TrajectorySampler
from .step_caches import without_caches

PROBE_STEPS = 3
"""Steps of each probe; the first warms up and is not counted."""
TERMS = {"s_ssm": SPATIAL, "t_ssm": TEMPORAL, "relevance": RELEVANCE, "frame_difference": MOTION}
CARDS = (8, 12, 16, 24)
"""GB (2^30 bytes) of cards to tell about."""
RESERVED = 1.0e9
"""Bytes of a card that the host and the driver keep."""
STREAMED = 0.1
"""Share of the weights that is on the card at once where the host streams them from main memory."""


@dataclass(frozen=True)
class Cost:
    """A prediction for one edit: seconds by stage, bytes by use.

    frames: of the latent; matched_steps: how many of the steps take a gradient. held: bytes that are there before the
    edit and stay, the weights of the model and its ControlNets in the form that they are loaded in, and in main memory
    all else that this process holds. weights: those alone. sampling, gradient: measured, at the peak beyond that, of a
    step without and with a gradient. foreseen: what a gradient takes by its sizes, None without one; checkpointing:
    whether the probe kept no activations. free: on the device, what is held included.
    """

    plan: Plan
    frames: int
    inversion_seconds: float
    edit_seconds: float
    steps: int
    matched_steps: int
    held: int
    weights: int
    sampling: int
    gradient: int
    foreseen: GradientMemory | None
    checkpointing: bool
    trajectory: int
    free: int

    @property
    def seconds(self) -> float:
        return self.inversion_seconds + self.edit_seconds

    @property
    def memory(self) -> int:
        """Peak bytes on the device."""
        return self.held + max(self.sampling, self.gradient)

    def working(self, checkpointing: bool) -> int:
        """Peak bytes beyond the weights with activations kept or not; what was not tried is told by the sizes."""
        if self.foreseen is None or self.checkpointing == checkpointing:
            return max(self.sampling, self.gradient)
        scale = self.foreseen.total(checkpointing) / max(self.foreseen.total(self.checkpointing), 1)
        return max(self.sampling, round(self.gradient * scale))


def predict_costs(model, positive: list, latent: Tensor, plans: Sequence[Plan]) -> list[Cost]:
    """Runs PROBE_STEPS steps of every stage of each edit at the size of `latent`, and extrapolates.

    model: a ModelPatcher, with everything that the edit has on it; latent: as in the graph. Raises what the edit itself
    would raise, out of memory included.
    """
    family_of(model)
    check_clip_latent(latent, model)
    for plan in plans:
        check_window(plan.start, plan.end)
    return [
        _distillation(model, positive, latent, plan)
        if plan.method == "DreamMotion"
        else _edit(model, positive, latent, plan)
        for plan in plans
    ]


def weight_bytes(model) -> int:
    """Of a ModelPatcher's weights in the form that they are loaded in, quantised or packed ones too."""
    return sum(_bytes_of(tensor) for tensor in model.model.state_dict().values())


def _bytes_of(tensor: Tensor) -> int:
    packed = getattr(tensor, "_qdata", tensor)
    return packed.numel() * packed.element_size()


# --- probes -------------------------------------------------------------


def _edit(model, positive: list, latent: Tensor, plan: Plan) -> Cost:
    sampling = model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, plan.scheduler, plan.steps)
    times = [1 - noise_fraction(float(sigma), sampling.percent_to_sigma) for sigma in sigmas[:-1]]
    times = [t for t in times if plan.part[0] <= t < plan.part[1]] or times
    matched_steps = sum(plan.start <= t <= plan.end for t in times) if plan.matching else 0

    probe = _probe(model, positive, latent, sigmas)
    run = partial(_run, probe, latent)
    inversion = InversionSampler(probe.space, refinements=0)
    invert = partial(run, inversion, probe.sigmas.flip(0))
    call = _seconds(invert, model)
    held = _held(model, positive)
    at_work = [_peak(invert, model)]
    plain = partial(run, TrajectorySampler(probe), probe.sigmas, prompts=plan.prompts)
    seconds = _seconds(plain, model)
    third = seconds * max(0.0, plan.prompts / 2 - 1)  # of three prompts two are tried
    at_work.append(_peak(plain, model))
    matched, gradient, last = seconds, 0, None
    if matched_steps:
        reports: list[MatchedStep] = []
        match = partial(run, _matching(probe, plan, reports), probe.sigmas, prompts=plan.prompts)
        matched = _seconds(match, model)
        gradient, last = _peak(match, model), reports[-1]
    return Cost(
        plan=plan,
        frames=frame_count(latent),
        inversion_seconds=len(times) * (1 + plan.refinements + plan.checked) * call,
        edit_seconds=matched_steps * matched + (len(times) - matched_steps) * seconds + len(times) * third,
        steps=len(times),
        matched_steps=matched_steps,
        sampling=max(at_work),
        gradient=gradient,
        foreseen=last and last.memory,
        checkpointing=bool(last and last.checkpointing),
        trajectory=(len(times) + 1) * latent.numel() * latent.element_size(),
        free=_free(model),
        **held,
    )


def _distillation(model, positive: list, latent: Tensor, plan: Plan) -> Cost:
    weights = {TERMS[name]: weight for name, weight in plan.terms}
    made, terms = {"weights": weights, "blocks": key_blocks(model, plan.layers)}, any(weights.values())

    def run(steps: int, low_memory: bool = plan.low_memory) -> None:
        settings = Distillation(steps=steps, low_memory=low_memory, **made)
        optimise(model, positive, positive, positive, latent, settings, seed=0)

    run(1)  # warms up
    held, times = _held(model, positive), {}
    for steps in (1, 3, 7):  # balance looks at each term by itself in the first five steps, then in every fourth
        began = perf_counter()
        run(steps)
        times[steps] = perf_counter() - began
    early = max(0.0, times[3] - times[1]) / 2
    later = max(0.0, times[7] - times[3] - 2 * early) / 2
    first = min(plan.steps, 5)
    seconds = first * early + (plan.steps - first) * (0.25 * early + 0.75 * later)
    peak, foreseen, low = _peak(partial(run, 1), model), None, plan.low_memory
    if terms:
        least = peak if low else _peak(partial(run, 1, low_memory=True), model)
        foreseen, low = GradientMemory(peak, least), low or peak < 1.1 * least  # by itself, where memory is short
    return Cost(
        plan=plan,
        frames=frame_count(latent),
        inversion_seconds=0.0,
        edit_seconds=seconds,
        steps=plan.steps,
        matched_steps=plan.steps if terms else 0,
        sampling=0 if terms else peak,
        gradient=peak if terms else 0,
        foreseen=foreseen,
        checkpointing=low,
        trajectory=0,
        free=_free(model),
        **held,
    )


def _held(model, positive: list) -> dict[str, int]:
    """Of a model that has run: what the prediction starts from."""
    conds = {"positive": comfy.sampler_helpers.convert_cond(positive)}
    beside, _ = comfy.sampler_helpers.get_additional_models(conds, model.model_dtype())
    weights = sum(map(weight_bytes, {id(own): own for own in (model, *beside)}.values()))
    on_card = model.load_device.type != "cpu"
    return {"weights": weights, "held": weights if on_card else psutil.Process().memory_info().rss}


def _free(model) -> int:
    device = model.load_device
    free = int(comfy.model_management.get_free_memory(device))
    return free + (psutil.Process().memory_info().rss if device.type == "cpu" else model.loaded_size())


def _probe(model, positive: list, latent: Tensor, sigmas: Tensor) -> Trajectory:
    """A trajectory of noised copies of the clip at a few noise levels from the middle of the schedule."""
    middle = max(0, min(len(sigmas) // 2, len(sigmas) - 1 - PROBE_STEPS))
    sigmas = torch.cat([sigmas[middle : middle + PROBE_STEPS], sigmas.new_zeros(1)])
    space, clean = noise_space(model), model.model.process_latent_in(latent)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0)).to(clean)
    latents = torch.stack([add_noise(clean, noise, sigma, space) for sigma in sigmas])
    return Trajectory(latents, sigmas, space, model, positive)


def _matching(probe: Trajectory, plan: Plan, reports: list[MatchedStep]) -> TrajectorySampler:
    """A sampler that matches at every step, and what it has reported."""
    score = str_score_of(probe, plan.layers, plan.radius)
    memory = "low" if plan.low_memory else "auto"
    matching = RelevanceMatching(score, iterations=plan.iterations, memory=memory)

    def matched(x, step):
        x = matching(x, step)
        reports[:] = step.run.records
        return x

    return TrajectorySampler(probe, before_step=[matched])


def _run(probe: Trajectory, latent: Tensor, sampler, sigmas: Tensor, callback=None, prompts: int = 1) -> None:
    """A real run of the host, with so many prompts a step."""
    of_source = isinstance(sampler, InversionSampler)
    guider = comfy.samplers.CFGGuider(as_source(without_caches(probe.model)[0]) if of_source else probe.model)
    guider.inner_set_conds({"positive": probe.conditioning, "negative": probe.conditioning})
    guider.set_cfg(1.0 if prompts == 1 else 2.0)
    guider.sample(torch.zeros_like(latent), latent, sampler, sigmas, callback=callback, disable_pbar=True, seed=0)


def _seconds(run: Callable, model) -> float:
    """Of one step of a run after its first."""
    ends = []

    def note(step, denoised, x, total):
        float(x.flatten()[0])  # waits for the device
        ends.append(perf_counter())

    run(callback=note)
    return (ends[-1] - ends[0]) / (len(ends) - 1)


def _peak(run: Callable, model) -> int:
    """Bytes at the peak of a run beyond what was there before."""
    with peak_bytes(model.load_device) as peak:
        run()
    return peak()


# --- cards --------------------------------------------------------------


def fits_on(card: int, cost: Cost) -> str:
    """What of an edit fits on a card of so many GB (2^30 bytes), with the cheapest settings that do."""
    usable, streamed = card * 2**30 - RESERVED, STREAMED * cost.weights
    plain, low = cost.working(False), cost.working(True)
    streaming = "weights that ComfyUI streams from main memory (slower)"
    choices = {"fits": cost.weights + plain, f"fits with {streaming}": streamed + plain}
    if cost.foreseen is not None:
        choices = {
            "fits": cost.weights + plain,
            "fits with memory low": cost.weights + low,
            f"fits with {streaming}": streamed + plain,
            f"fits with memory low and {streaming}": streamed + low,
        }
    for said, needed in choices.items():
        if needed <= usable:
            return said
    frames = int(cost.frames * max(0.0, usable - streamed) / max(low, 1))
    if frames >= 2:
        lower = "memory low and " if cost.foreseen is not None else ""
        return f"fits with {lower}at most {frames} of the {cost.frames} latent frames, or a smaller picture"
    return "does not fit; choose a smaller picture"
