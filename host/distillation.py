"""Video delta denoising score inside the host (DreamMotion, arXiv 2403.12002): the loop as a Sampler.

Each step takes four passes: the source and the target, each with its own prompt and with the negative one. One of the
target's has a gradient, from the attention keys.
"""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Literal, NamedTuple

import comfy.model_management
import comfy.samplers
import torch
from torch import Tensor

from ..core.distillation import Answer, DeltaDenoising, Question, frame_difference
from ..core.relevance import matching_loss
from ..core.self_similarity import spatial_self_similarity_loss, temporal_self_similarity_loss
from .attention_call import ModelRun
from .attention_tap import ONE_GPU, AttentionTap
from .conditioning import check_picture
from .families import IN_SPACE, family_of, noise_space
from .features import FeatureRecorder, KeyRecorder, Recorders
from .gradient_pass import GradientPass, Gradients, ModelCall
from .gradients import normal_tensor
from .latents import check_clip_latent, frame_count, grid_mask_of, mask_like
from .layers import Layer
from .memory import small_tile
from .model_pass import (
    Window,
    at_step,
    begin_hooks,
    by_window,
    call_model,
    check_handler,
    check_prompts,
    for_pass,
)
from .node_text import LOG, NodeText
from .region_patch import tell_layouts_without_patch
from .regional_prompts import SOURCE_POSITIVE
from .relevance_matching import lacks_for_relevance
from .sampling import share_of
from .step_caches import without_caches

log = logging.getLogger("spacetime_edit")

SPATIAL, TEMPORAL, RELEVANCE, MOTION = "S-SSM", "T-SSM", "STR", "frame difference"
"""Regularisers by name."""

Branch = Literal["text", "negative"]
PREVIEW_SECONDS = 1.0


@dataclass(frozen=True)
class Distillation:
    """Settings of one run. weights: of the regularisers by name, 0 = none; the rest as in `DeltaDenoising`.

    blocks: names of those whose keys are compared. branch: the prompt whose pass gives the keys. delta: against the
    source's prediction, else plain score distillation. low_memory: keep no activations. mask_all: outside the mask
    nothing moves, else only the score does not, as in the paper.
    """

    steps: int = 200
    step_size: float = 0.4
    cfg: float = 7.5
    weights: Mapping[str, float] = field(default_factory=dict)
    balanced: bool = True
    t_range: tuple[float, float] = (0.05, 0.95)
    blocks: frozenset[str] = frozenset()
    branch: Branch = "text"
    delta: bool = True
    low_memory: bool = False
    mask_all: bool = True

    def __post_init__(self):
        check_times(self.t_range)
        if not self.cfg >= 0:
            raise ValueError(f"cfg: it is {self.cfg}; expected a number of at least 0")


def check_times(t_range: tuple[float, float]) -> None:
    """ValueError unless it is a range of normalised times, without pure noise and without none."""
    low, high = t_range
    if not 0 < low < high < 1:
        raise ValueError(f"t_min, t_max: they are {low} and {high}; expected 0 < t_min < t_max < 1")


class DistillationSampler(comfy.samplers.Sampler):
    """Optimises the latent that it gets; the noise is its own, from `seed`.

    mask: (F, h, w) on the latent grid, 1 = edit. curve: after a run, (t, losses by name) of each step.
    """

    def __init__(self, settings: Distillation, seed: int, mask: Tensor | None = None, say: NodeText = LOG):
        self.settings, self.seed, self.mask, self.say = settings, seed, mask, say
        self.curve: list[tuple[float, dict[str, float]]] = []

    def sample(
        self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False
    ):
        sampling, settings = model_wrap.inner_model.model_sampling, self.settings
        check_prompts(model_wrap, settings.t_range, tuple(latent_image.shape[2:]))
        tell_layouts_without_patch(model_wrap.model_patcher, model_wrap.conds)
        asked = _Predictor(settings, model_wrap, extra_args["model_options"], self.say)
        optimiser = DeltaDenoising(
            latent_image,
            noise_space(model_wrap.model_patcher),
            generator=torch.Generator().manual_seed(self.seed),
            step_size=settings.step_size,
            t_range=settings.t_range,
            mask=None if self.mask is None else mask_like(self.mask, latent_image),
            mask_all=settings.mask_all,
            weights=settings.weights,
            balanced=settings.balanced,
        )
        self.curve, shown = [], time.monotonic()
        for step in range(settings.steps):
            question = optimiser.ask(lambda t: torch.as_tensor(sampling.percent_to_sigma(1 - t)))
            losses = optimiser.tell(question, asked(question))
            self.curve.append((question.t, losses))
            due = time.monotonic() - shown > PREVIEW_SECONDS or step + 1 == settings.steps
            if callback is not None and due:
                shown = time.monotonic()
                callback(step, optimiser.latent, optimiser.latent, settings.steps)
        return optimiser.latent


class _OfWindow(NamedTuple):
    """What the model says of one window: predictions of target and source by branch, and gradients."""

    target: dict[str, Tensor]
    source: dict[str, Tensor]
    held: Gradients


NOTHING = Gradients({}, {})
KNOBS = "the layers (such as u1)"
SAME = 1e-6
"""Distance of a cosine from 1 below which its gradient is rounding, which balance would blow up to its share."""
PLACES = {"text": 0, "negative": 1}
"""Of the prompts among those of a host's call, by which other packs know them."""


class _Predictor:
    """Answers the questions of a run; of long clips in context windows, window by window."""

    def __init__(self, settings: Distillation, guider, model_options: dict, say: NodeText = LOG):
        self._settings, self._guider, self._given = settings, guider, model_options
        self._say_once = cache(say)
        self._options, self._step = model_options, 0
        self._active = [name for name, weight in settings.weights.items() if weight]
        self._of_model = [name for name in self._active if name != MOTION]
        self._take = GradientPass("Video DDS", KNOBS, settings.low_memory)

    def __call__(self, question: Question) -> Answer:
        """Of the model's regularisers each gradient is a backward pass."""
        target, source, sigma, scales = question.target, question.source, question.sigma, question.scales
        self._options, base = at_step(self._given, sigma, question.step), self._guider.inner_model
        self._step = question.step + 1
        begin_hooks(base, [cond for conds in self._guider.conds.values() for cond in conds], sigma)

        def of_window(window: Window) -> _OfWindow:
            comfy.model_management.throw_exception_if_processing_interrupted()
            of_source, held = {}, None
            if self._settings.delta or self._of_model:
                of_source, held = self._of_source(window, window.of(source), sigma)
            of_target, found = self._of_target(window, window.of(target), sigma, held, scales)
            own = {name: window.own_frames(gradient) for name, gradient in found.gradients.items()}
            total = None if found.total is None else window.own_frames(found.total)
            of_source = of_source if self._settings.delta else {}
            return _OfWindow(of_target, of_source, Gradients(found.losses, own, total))

        conds, sides = self._guider.conds, 2 if self._settings.delta else 1
        seen = by_window(target, sigma, base, self._options, conds, 2 * sides + max(1, len(self._of_model)), of_window)
        losses, slopes, pull = dict(seen.held.losses), dict(seen.held.gradients), seen.held.total
        if MOTION in self._active:
            signal, _ = noise_space(self._guider.model_patcher).signal_and_noise(sigma)
            frames = 0 if target.ndim == 4 else 2
            losses[MOTION], slope = frame_difference(target, source, signal, frames)
            if scales is None:
                slopes[MOTION] = slope
            elif MOTION in scales:
                pull = scales[MOTION] * slope + (0 if pull is None else pull)
        denoised = self._guided(seen.target, "positive", target, sigma)
        of_source = self._guided(seen.source, SOURCE_POSITIVE, source, sigma) if self._settings.delta else None
        return Answer(denoised, of_source, losses, slopes, pull)

    def _recorders(self) -> tuple[KeyRecorder, FeatureRecorder | None, Recorders]:
        keys = KeyRecorder(self._settings.blocks)
        features = FeatureRecorder(None) if RELEVANCE in self._active else None
        return keys, features, Recorders(*filter(None, (keys, features)))

    def _of_source(self, window: Window, x: Tensor, sigma: Tensor):
        """The predictions by prompt, and what the regularisers compare with."""
        keys, features, recorder = self._recorders()
        prompts, branch = {"text": SOURCE_POSITIVE, "negative": "negative"}, self._settings.branch
        if not self._settings.delta:
            prompts = {branch: prompts[branch]}
        patcher, tap = self._guider.model_patcher, None
        if self._of_model:
            tap = AttentionTap(patcher, [recorder], differentiable=True, unheard=self._say_unheard)
        seen = self._predict(window, prompts, x, sigma, source=True, heard=branch, tap=tap)
        own_keys = {name: normal_tensor(t) for name, t in keys.keys.items()}
        if {SPATIAL, TEMPORAL} & set(self._of_model) and not own_keys:
            raise ValueError(
                "layers: the attention of none of them reaches Video DDS, since another node replaces it; remove that "
                "node, or name other layers"
            )
        return seen, (own_keys, {} if features is None else features.features)

    def _say_unheard(self, _: ModelRun, layers: list[Layer]) -> None:
        lost = [layer for layer in layers if layer.kind in IN_SPACE and layer.block in self._settings.blocks]
        if lost:
            self._say_once(
                f"Video DDS: another node replaces the attention of {len(lost)} layers (such as {lost[0].path}), whose "
                f"keys are not compared. Remove it to compare them."
            )

    def _of_target(self, window: Window, x: Tensor, sigma: Tensor, held, scales) -> tuple[dict[str, Tensor], Gradients]:
        """The predictions by prompt, and what the regularisers say."""
        prompts, branch = {"text": "positive", "negative": "negative"}, self._settings.branch
        if not self._of_model:
            return self._predict(window, prompts, x, sigma), NOTHING
        alone = self._one_pass_predicts(window, prompts[branch])
        seen = self._metered(window, {b: p for b, p in prompts.items() if b != branch or not alone}, x, sigma)
        keys, features, recorder = self._recorders()
        cond, options = window.leading_cond(prompts[branch], sigma, x), window.options(self._options)
        base, patcher = self._guider.inner_model, self._guider.model_patcher
        asked = ModelCall(base, patcher, cond, sigma, options, self._step, PLACES[branch])
        losses = {name: partial(self._loss, name, held, keys, features) for name in self._of_model}
        found = self._take(asked, x, recorder, losses, scales)
        return seen | ({branch: found.denoised} if alone else {}), found

    def _one_pass_predicts(self, window: Window, prompt: str) -> bool:
        """Whether the pass of the leading conditioning is the host's whole prediction of a prompt."""
        return len(window.conds[prompt]) == 1 and "sampler_calc_cond_batch_function" not in self._options

    def _loss(self, name: str, held, keys: KeyRecorder, features: FeatureRecorder | None) -> Tensor:
        """Of one regulariser, the mean over the layers."""
        source_keys, source_features = held
        losses, stop = [], comfy.model_management.throw_exception_if_processing_interrupted
        if name != RELEVANCE:
            form = {SPATIAL: spatial_self_similarity_loss, TEMPORAL: temporal_self_similarity_loss}[name]
            return torch.stack([form(source, keys.keys[path]) for path, source in source_keys.items()]).mean()
        for path, source in source_features.items():
            rows = small_tile(source) if self._take.low_memory else None
            losses.append(matching_loss(source, features.features[path], rows=rows, on_tile=stop))
        loss = torch.stack(losses).mean()
        same = float(loss.detach()) < -1 + SAME  # before anything has moved
        return loss.detach() + 0 * loss if same else loss

    # --- passes ---------------------------------------------------------

    def _predict(
        self,
        window: Window,
        prompts: Mapping[str, str],
        x: Tensor,
        sigma: Tensor,
        *,
        source: bool = False,
        heard: str = "",
        tap: AttentionTap | None = None,
    ) -> dict[str, Tensor]:
        """The host's predictions by branch, with all conditionings of each prompt; tap: hears the branch `heard`.

        A function that another pack has put in the host's place for this gets both prompts at once.
        """
        base, options = self._guider.inner_model, window.options(self._options)
        found: dict[str, Tensor] = {}
        if "sampler_calc_cond_batch_function" in options and len(prompts) > 1:
            found = self._by_others(window, prompts, x, sigma, source)
        for branch, prompt in prompts.items():
            one = branch == heard and tap is not None
            if one:
                cond, heard_by = window.leading_cond(prompt, sigma, x), {"tap": tap, "needs": frozenset(IN_SPACE)}
                made = call_model(base, [cond], x, sigma, options, source=source, place=PLACES[branch], **heard_by)
                if self._one_pass_predicts(window, prompt):
                    found[branch] = made
            if branch not in found:
                conds, place = window.conds[prompt], PLACES[branch]
                found[branch] = call_model(base, conds, x, sigma, options, source=source, place=place)
        return found

    def _by_others(self, window: Window, prompts: Mapping[str, str], x: Tensor, sigma: Tensor, source: bool):
        options = for_pass(window.options(self._options), source)
        given = {
            "conds": [window.conds[prompts[branch]] for branch in ("text", "negative")],
            "input": x,
            "sigma": sigma * x.new_ones(x.shape[0]),
            "model": self._guider.inner_model,
            "model_options": options,
        }
        return dict(zip(("text", "negative"), options["sampler_calc_cond_batch_function"](given), strict=True))

    def _metered(self, window: Window, prompts: Mapping[str, str], x: Tensor, sigma: Tensor) -> dict[str, Tensor]:
        """The same; the first time it also learns what a gradient takes, and has the host make room."""
        if self._take.memory is not None:
            return self._predict(window, prompts, x, sigma)
        patcher = self._guider.model_patcher
        meter = self._take.meter(self._guider.inner_model, patcher)
        first, *others = prompts
        with meter.open():
            seen = self._predict(window, {first: prompts[first]}, x, sigma)
        self._take.make_room(meter.memory, [patcher, *self._guider.loaded_models])
        if "sampler_calc_cond_batch_function" in self._options:
            return self._predict(window, prompts, x, sigma)
        return seen | (self._predict(window, {name: prompts[name] for name in others}, x, sigma) if others else {})

    def _guided(self, seen: Mapping[str, Tensor], prompt: str, x: Tensor, sigma: Tensor) -> Tensor:
        """By the host's guidance, and by what other packs have put into it, which may call the model again."""
        conds, out = [self._guider.conds[name] for name in (prompt, "negative")], [seen["text"], seen["negative"]]
        options, sigmas = for_pass(self._options, prompt == SOURCE_POSITIVE), sigma * x.new_ones(x.shape[0])
        base, scale = self._guider.inner_model, self._settings.cfg
        about = {"cond_scale": scale, "timestep": sigmas, "sigma": sigmas, "input": x, "model": base}
        for function in options.get("sampler_pre_cfg_function", []):
            out = function({"conds": conds, "conds_out": out, "model_options": options, **about})
        return comfy.samplers.cfg_function(
            base, out[0], out[1], scale, x, sigmas, model_options=options, cond=conds[0], uncond=conds[1]
        )


def optimise(
    model,
    source_positive: list,
    positive: list,
    negative: list,
    latent: Tensor,
    settings: Distillation,
    *,
    seed: int,
    mask: Tensor | None = None,
    dilation: float = 0.0,
    callback=None,
    say: NodeText = LOG,
) -> tuple[Tensor, list[tuple[float, dict[str, float]]]]:
    """The optimised latent, as in the graph, and (t, losses by name) of each step.

    model: ModelPatcher; the rest are the host's CONDITIONING and samples of a LATENT; mask (F, H, W) of any
    size, 1 = edit, grown by `dilation` pixels of the clip; of one that is 0 everywhere the latent comes back, without a
    step. say: shows a message on the node. ValueError for a latent that is not a clip of this model, a prompt that is
    missing, a regulariser it cannot have.
    """
    check_clip_latent(latent, model)
    for name, cond in ((SOURCE_POSITIVE, source_positive), ("positive", positive), ("negative", negative)):
        if not cond:
            raise ValueError(f"{name}: it holds no prompt; connect a CLIP Text Encode")
        check_picture(model, (about for _, about in cond), name)
    check_handler(model, frame_count(latent))
    if model.get_additional_models_with_key("multigpu"):
        raise ValueError(ONE_GPU)
    if settings.weights.get(RELEVANCE) and (lacking := lacks_for_relevance(model)):
        raise ValueError(
            f"relevance: {family_of(model).name} has no {lacking}, which the STR score is built from; set it to 0"
        )
    model, caches = without_caches(model)
    if caches:
        say(f"Step caches are left out here ({', '.join(sorted(caches))}): each step needs the model's own answer.")
    guider = comfy.samplers.CFGGuider(model)
    guider.inner_set_conds({"positive": positive, "negative": negative, SOURCE_POSITIVE: source_positive})
    guider.set_cfg(settings.cfg)
    where = None if mask is None else grid_mask_of(mask, latent, model, dilation)
    if where is not None:
        say.show(share_of(where))
    if where is not None and not where.any():
        log.warning("Video DDS: the mask is empty (0 everywhere), so there is nothing to edit; the clip is unchanged")
        return latent.clone(), []
    sampler = DistillationSampler(settings, seed, where, say)
    sampling = model.get_model_object("model_sampling")
    sigmas = torch.tensor([float(sampling.percent_to_sigma(1 - settings.t_range[1])), 0.0])
    samples = guider.sample(
        torch.zeros_like(latent), latent, sampler, sigmas, callback=callback, disable_pbar=True, seed=seed
    )
    return samples, sampler.curve
