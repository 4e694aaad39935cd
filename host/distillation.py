"""Video delta denoising score inside the host (DreamMotion, arXiv 2403.12002): the loop as a Sampler (decision D10).

Each step takes three calls of the model: the source with both its prompts; the target with the negative prompt, without
gradient; the target with its own prompt, with a gradient from the attention keys.
"""

import contextlib
import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import comfy.model_management
import comfy.samplers
import torch
from torch import Tensor

from ..core.distillation import Look, Progress, distill
from ..core.relevance import matching_loss
from ..core.self_similarity import spatial_self_similarity_loss, temporal_self_similarity_loss
from .attention_tap import ONE_GPU, AttentionCall, AttentionTap, Listener
from .checkpointing import checkpointed
from .conditioning import check_picture
from .families import IN_SPACE, attention_layers, family_of, noise_space, select_blocks
from .features import FeatureRecorder
from .gradients import latent_gradients, normal_tensor, predict
from .latents import check_clip_latent, grid_mask_of, mask_like
from .memory import ActivationMeter, small_tile, with_less_memory
from .relevance_matching import HALF_PRECISION_SCALE, lacks_for_relevance, leading_cond
from .windows import View, blended, check_handler, views_of

log = logging.getLogger("spacetime_edit")

SPATIAL, TEMPORAL, RELEVANCE, MOTION = "S-SSM", "T-SSM", "STR", "frame difference"
"""Regularisers by name."""

Branch = Literal["text", "negative"]
SOURCE_POSITIVE = "source_positive"
TOGETHER = "all regularisers"
PREVIEW_SECONDS = 1.0


@dataclass(frozen=True)
class Distillation:
    """Settings of one run. weights: of the regularisers by name, 0 = none; the rest as in `core.distillation.distill`.

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


def check_whole(cond: list, name: str) -> None:
    """ValueError for CONDITIONING that is not one prompt for the whole frame at every noise level: of others a step
    would see a part."""
    if len(cond) > 1:
        raise ValueError(
            f"{name}: it holds {len(cond)} prompts, and Video DDS takes one; remove Conditioning (Combine) or hooks of "
            f"the text encoder with a schedule, and for several regions use ST-Layout Attention Patch"
        )
    everywhere = {"mask": None, "area": None, "start_percent": 0.0, "end_percent": 1.0}
    limits = [key for key, whole in everywhere.items() if cond[0][1].get(key, whole) not in (None, whole)]
    if limits:
        raise ValueError(
            f"{name}: it holds for a part only ({', '.join(limits)}), and Video DDS takes a prompt for the whole frame "
            f"and all noise levels; remove Conditioning (Set Mask), (Set Area) or ConditioningSetTimestepRange, and "
            f"connect a mask to this node instead"
        )


def check_times(t_range: tuple[float, float]) -> None:
    """ValueError unless it is a range of normalised times, without pure noise and without none."""
    low, high = t_range
    if not 0 < low < high < 1:
        raise ValueError(f"t_min, t_max: they are {low} and {high}; expected 0 < t_min < t_max < 1")


def key_blocks(model, layers: str = "") -> frozenset[str]:
    """The blocks whose keys are compared: those named, or all on the way up, of a transformer the later half.

    ValueError for what the model has not.
    """
    blocks = {layer.block for layer in attention_layers(model).values() if layer.kind in IN_SPACE}
    if layers.strip():
        return select_blocks(layers, blocks)
    main = [name for name in blocks if not name.startswith("v")]  # not those of VACE's control video
    later = sorted(main, key=lambda name: (name[0], int(name[1:])))[len(main) // 2 :]
    return frozenset(block for block in blocks if block.startswith("u")) or frozenset(later)


class KeyRecorder:
    """A listener that keeps the keys of spatial self-attention. One prompt a run.

    blocks: names of those to look at. `tensors` holds keys (F, H, N, D) by "path keys", for block checkpointing to
    exchange.
    """

    def __init__(self, blocks: frozenset[str]):
        self._blocks = blocks
        self.tensors: dict[str, Tensor] = {}

    @property
    def keys(self) -> dict[str, Tensor]:
        """(F, N, C) by name, heads side by side."""
        return {name: t.transpose(1, 2).flatten(2) for name, t in self.tensors.items() if name.endswith(" keys")}

    def __call__(self, call: AttentionCall) -> None:
        self.tensors.update(self._taken(call))

    def replay(self, names: Iterable[str]) -> Listener:
        """A listener for a second run of some layers: it keeps again the tensors of these names."""
        wanted = frozenset(names)

        def listen(call: AttentionCall) -> None:
            self.tensors.update({name: t for name, t in self._taken(call).items() if name in wanted})

        return listen

    def _taken(self, call: AttentionCall) -> dict[str, Tensor]:
        if call.kind not in IN_SPACE or call.layer.block not in self._blocks:
            return {}
        return {f"{call.layer.path} keys": call.of_clip(call.key)}


class Recorders:
    """Several recorders as one, with one store of tensors."""

    def __init__(self, *recorders):
        self._recorders = recorders
        self.tensors = {}

    @property
    def tensors(self) -> dict[str, Tensor]:
        return self._tensors

    @tensors.setter
    def tensors(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors
        for recorder in self._recorders:
            recorder.tensors = tensors

    def __call__(self, call: AttentionCall) -> None:
        for recorder in self._recorders:
            recorder(call)

    def replay(self, names: Iterable[str]) -> Listener:
        names = tuple(names)

        def listen(call: AttentionCall) -> None:
            for recorder in self._recorders:
                recorder.replay(names)(call)

        return listen


class DistillationSampler(comfy.samplers.Sampler):
    """Optimises the latent that it gets; the noise is its own, from `seed`.

    mask: (F, h, w) on the latent grid, 1 = edit. curve: after a run, (t, losses by name) of each step.
    """

    def __init__(self, settings: Distillation, seed: int, mask: Tensor | None = None):
        self.settings, self.seed, self.mask = settings, seed, mask
        self.curve: list[tuple[float, dict[str, float]]] = []

    def sample(
        self,
        model_wrap,
        sigmas,
        extra_args,
        callback,
        noise,
        latent_image=None,
        denoise_mask=None,
        disable_pbar=False,
    ):
        sampling, settings = model_wrap.inner_model.model_sampling, self.settings
        looks = _Looks(settings, model_wrap, extra_args["model_options"])
        self.curve, shown = [], time.monotonic()

        def tell(progress: Progress) -> None:
            nonlocal shown
            self.curve.append((progress.t, progress.losses))
            if callback is not None and (
                time.monotonic() - shown > PREVIEW_SECONDS or progress.step + 1 == settings.steps
            ):
                shown = time.monotonic()
                callback(progress.step, progress.latent, progress.latent, settings.steps)

        return distill(
            latent_image,
            looks,
            lambda t: torch.as_tensor(sampling.percent_to_sigma(1 - t)),
            noise_space(model_wrap.model_patcher),
            generator=torch.Generator().manual_seed(self.seed),
            steps=settings.steps,
            step_size=settings.step_size,
            t_range=settings.t_range,
            mask=None if self.mask is None else mask_like(self.mask, latent_image),
            mask_all=settings.mask_all,
            weights=settings.weights,
            balanced=settings.balanced,
            callback=tell,
        )


@dataclass
class _Found:
    """What regularisers say, as in `core.distillation.Look`."""

    losses: dict[str, float] = field(default_factory=dict)
    slopes: dict[str, Tensor] = field(default_factory=dict)
    pull: Tensor | None = None

    def add(self, name: str, slope: Tensor, scales: Mapping[str, float] | None) -> None:
        """The slope of one more regulariser."""
        if scales is None:
            self.slopes[name] = slope
        elif name in scales:
            self.pull = scales[name] * slope + (0 if self.pull is None else self.pull)


TARGET, SOURCE, LOSS, SLOPE, PULL = "target ", "source ", "loss ", "slope ", "pull"
"""What one window says, by the beginning of its name."""


class _Looks:
    """What the model says of the noised latents of a step; of long clips in context windows, window by window."""

    def __init__(self, settings: Distillation, guider, model_options: dict):
        self._settings, self._guider, self._options = settings, guider, model_options
        self._active = [name for name, weight in settings.weights.items() if weight]
        self._of_model = [name for name in self._active if name != MOTION]
        self._low_memory, self._measured = settings.low_memory, False

    def __call__(self, target: Tensor, source: Tensor, sigma: Tensor, scales: Mapping[str, float] | None) -> Look:
        """See `core.distillation.distill`; of the model's regularisers each gradient is a backward pass."""
        views = views_of(target, sigma, self._guider.inner_model, self._options)
        seen = blended(target, views, lambda view: self._of_view(view, target, source, sigma, scales))

        def named(kind: str) -> dict:
            return {name.removeprefix(kind): value for name, value in seen.items() if name.startswith(kind)}

        found = _Found(named(LOSS), named(SLOPE), seen.get(PULL))
        if MOTION in self._active:
            loss, slope = self._motion(target, source, sigma)
            found.losses[MOTION] = loss
            found.add(MOTION, slope, scales)
        denoised = self._guided(named(TARGET), "positive", target, sigma)
        of_source = self._guided(named(SOURCE), SOURCE_POSITIVE, source, sigma) if self._settings.delta else None
        return Look(denoised, of_source, found.losses, found.slopes, found.pull)

    def _of_view(self, view: View, target: Tensor, source: Tensor, sigma: Tensor, scales) -> dict[str, Tensor | float]:
        """Predictions by prompt, losses and gradients, of the frames that a view sees."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        held, said = None, {}
        if self._settings.delta or self._of_model:
            seen, held = self._of_source(view, view.of(source), sigma)
            said |= {SOURCE + branch: value for branch, value in seen.items()}
        seen, found = self._of_target(view, view.of(target), sigma, held, scales)
        said |= {TARGET + branch: value for branch, value in seen.items()}
        said |= {LOSS + name: value for name, value in found.losses.items()}
        said |= {SLOPE + name: value for name, value in found.slopes.items()}
        return said if found.pull is None else said | {PULL: found.pull}

    def _recorders(self) -> tuple[KeyRecorder, FeatureRecorder | None, Recorders]:
        keys = KeyRecorder(self._settings.blocks)
        features = FeatureRecorder(None) if RELEVANCE in self._active else None
        return keys, features, Recorders(*filter(None, (keys, features)))

    def _of_source(self, view: View, x: Tensor, sigma: Tensor):
        """The predictions by prompt, and what the regularisers compare with."""
        keys, features, recorder = self._recorders()
        prompts = {"text": SOURCE_POSITIVE, "negative": "negative"}
        if not self._settings.delta:
            prompts = {self._settings.branch: prompts[self._settings.branch]}
        tap = AttentionTap(self._guider.model_patcher, [recorder] if self._of_model else [], differentiable=True)
        seen = {
            branch: self._predict(view, name, x, sigma, tap if branch == self._settings.branch else None)
            for branch, name in prompts.items()
        }
        own_keys = {name: normal_tensor(t) for name, t in keys.keys.items()}
        return seen, (own_keys, {} if features is None else features.features)

    def _of_target(self, view: View, x: Tensor, sigma: Tensor, held, scales) -> tuple[dict[str, Tensor], _Found]:
        """The predictions by prompt, and what the regularisers say."""
        prompts = {"text": "positive", "negative": "negative"}
        graded = self._settings.branch if self._of_model else None
        seen = {}
        for branch, name in prompts.items():
            if branch != graded:
                predict = self._metered if graded else self._predict
                seen[branch] = predict(view, name, x, sigma)
        found = _Found()
        if graded:
            arguments = view, prompts[graded], x, sigma, held, scales
            lean = None if self._low_memory else lambda: self._lean(*arguments)
            knobs = "the layers (such as u1)"
            seen[graded], found = with_less_memory("Video DDS", lambda: self._with_gradient(*arguments), lean, knobs)
        return seen, found

    def _lean(self, *arguments) -> tuple[Tensor, _Found]:
        self._low_memory = True
        return self._with_gradient(*arguments)

    def _with_gradient(self, view: View, prompt: str, x: Tensor, sigma: Tensor, held, scales) -> tuple[Tensor, _Found]:
        base, patcher = self._guider.inner_model, self._guider.model_patcher
        keys, features, recorder = self._recorders()
        tap = AttentionTap(patcher, [recorder], differentiable=True)
        family, half = family_of(patcher), base.get_dtype_inference() == torch.float16
        kept, found = [], _Found()
        largest = max(scales.values(), default=1.0) if scales else 1.0  # half precision holds the sum as it holds each

        def losses(denoised: Tensor) -> dict[str, Tensor]:
            kept.append(denoised.detach())
            own = self._losses(held, keys.keys, {} if features is None else features.features)
            found.losses = {name: float(value.detach()) for name, value in own.items()}
            if scales is None:
                return own
            return {TOGETHER: sum(scales.get(name, 0.0) / largest * value for name, value in own.items())}

        blocks = checkpointed(base.diffusion_model, family, tap, recorder)
        with blocks if self._low_memory else contextlib.nullcontext():
            gradients = latent_gradients(
                base,
                x,
                sigma,
                view.cond(leading_cond(self._guider.conds[prompt], sigma, prompt)),
                losses,
                model_options=tap.install(view.options(self._options)),
                loss_scale=HALF_PRECISION_SCALE if half else 1.0,
                mutates=family.mutates,
            )
        for name, (_, gradient) in gradients.items():
            if scales is None:
                found.slopes[name] = gradient
            else:
                found.pull = largest * gradient
        return kept[0], found

    def _losses(self, held, keys: dict[str, Tensor], features: dict) -> dict[str, Tensor]:
        source_keys, source_features = held
        forms = {SPATIAL: spatial_self_similarity_loss, TEMPORAL: temporal_self_similarity_loss}
        found = {}
        for name in self._of_model:
            if name == RELEVANCE:
                pairs = [(source_features[path], features[path]) for path in source_features]
                losses = [
                    matching_loss(source, target, rows=small_tile(source) if self._low_memory else None)
                    for source, target in pairs
                ]
            else:
                losses = [forms[name](source_keys[path], keys[path]) for path in source_keys]
            found[name] = torch.stack(losses).mean()
        return found

    def _motion(self, target: Tensor, source: Tensor, sigma: Tensor) -> tuple[float, Tensor]:
        """Mean square of how the frame differences of the clean latents differ; its slope at the noised target."""
        signal, _ = noise_space(self._guider.model_patcher).signal_and_noise(sigma)
        frames = 0 if target.ndim == 4 else 2
        moved = ((target - source) / signal).diff(dim=frames)
        slope = torch.zeros_like(target)
        slope.narrow(frames, 1, moved.shape[frames]).add_(moved)
        slope.narrow(frames, 0, moved.shape[frames]).sub_(moved)
        return float(moved.square().mean()), 2 * slope / (moved.numel() * signal)

    # --- calls of the model ---------------------------------------------

    def _predict(self, view: View, prompt: str, x: Tensor, sigma: Tensor, tap: AttentionTap | None = None) -> Tensor:
        options = view.options(self._options)
        options = options if tap is None else tap.install(options)
        cond = view.cond(leading_cond(self._guider.conds[prompt], sigma, prompt))
        return predict(self._guider.inner_model, x, sigma * x.new_ones(x.shape[0]), cond, options)

    def _metered(self, view: View, prompt: str, x: Tensor, sigma: Tensor) -> Tensor:
        """The same; the first time it also learns what a gradient takes, and has the host make room."""
        if self._measured:
            return self._predict(view, prompt, x, sigma)
        patcher = self._guider.model_patcher
        meter = ActivationMeter(self._guider.inner_model.diffusion_model, family_of(patcher))
        with meter.open():
            seen = self._predict(view, prompt, x, sigma)
        self._measured, memory = True, meter.memory
        models = [patcher, *self._guider.loaded_models]
        needed = memory.total(checkpointing=self._low_memory)
        comfy.model_management.load_models_gpu(models, memory_required=needed)
        if not self._low_memory and needed > comfy.model_management.get_free_memory(patcher.load_device):
            log.info("Video DDS: keeps no activations, %.1f GB would not fit", needed / 1e9)
            self._low_memory = True
        return seen

    def _guided(self, seen: Mapping[str, Tensor], prompt: str, x: Tensor, sigma: Tensor) -> Tensor:
        """By the host's guidance, and by what other packs have put into it, which may call the model again."""
        conds = self._guider.conds
        return comfy.samplers.cfg_function(
            self._guider.inner_model,
            seen["text"],
            seen["negative"],
            self._settings.cfg,
            x,
            sigma * x.new_ones(x.shape[0]),
            model_options=self._options,
            cond=conds[prompt],
            uncond=conds["negative"],
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
) -> tuple[Tensor, list[tuple[float, dict[str, float]]]]:
    """The optimised latent, as in the graph, and (t, losses by name) of each step.

    model: ModelPatcher; the rest are the host's CONDITIONING and samples of a LATENT; mask (F, H, W) of any
    size, 1 = edit, grown by `dilation` pixels of the clip; of one that is 0 everywhere the latent comes back, without a
    step.
    ValueError for a latent that is not a clip of this model, a prompt that is missing, a regulariser it cannot have.
    """
    check_clip_latent(latent, model)
    for name, cond in ((SOURCE_POSITIVE, source_positive), ("positive", positive), ("negative", negative)):
        if not cond:
            raise ValueError(f"{name}: it holds no prompt; connect a CLIP Text Encode")
        check_picture(model, (about for _, about in cond), name)
        check_whole(cond, name)
    check_handler(model.model_options)
    if model.get_additional_models_with_key("multigpu"):
        raise ValueError(ONE_GPU)
    if settings.weights.get(RELEVANCE) and (lacking := lacks_for_relevance(model)):
        raise ValueError(
            f"relevance: {family_of(model).name} has no {lacking}, which the STR score is built from; set it to 0"
        )
    guider = comfy.samplers.CFGGuider(model)
    guider.inner_set_conds({"positive": positive, "negative": negative, SOURCE_POSITIVE: source_positive})
    guider.set_cfg(settings.cfg)
    where = None if mask is None else grid_mask_of(mask, latent, model, dilation)
    if where is not None and not where.any():
        log.warning("Video DDS: the mask is empty (0 everywhere), so there is nothing to edit; the clip is unchanged")
        return latent.clone(), []
    sampler = DistillationSampler(settings, seed, where)
    sampling = model.get_model_object("model_sampling")
    sigmas = torch.tensor([float(sampling.percent_to_sigma(1 - settings.t_range[1])), 0.0])
    samples = guider.sample(
        torch.zeros_like(latent), latent, sampler, sigmas, callback=callback, disable_pbar=True, seed=seed
    )
    return samples, sampler.curve
