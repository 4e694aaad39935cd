"""The one edit loop, and what a step may ask of it; its reverse is in `inversion`.

For every sigma: before-step functions on z, the guider's prediction, a DDIM step in the model's noise space, after-step
functions on z. STR matching is a before-step function, latent blend an after-step function.
"""

import contextlib
import copy
import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import comfy.hooks
import comfy.model_management
import comfy.sampler_helpers
import comfy.samplers
import torch
from comfy.model_patcher import create_model_options_clone
from comfy.patcher_extension import merge_nested_dicts
from torch import Tensor

from ..core.masks import blend
from ..core.parametrization import (
    NoiseSpace,
    add_noise,
    ddim_step,
    noise_fraction,
)
from ..core.trajectory import Trajectory
from .attention_call import SOURCE_RUN
from .attention_tap import ONE_GPU
from .conditioning import check_picture
from .families import noise_space
from .inflation import inflation_of
from .latents import frame_count, grid_mask_of, mask_like, time_of
from .model_pass import check_windows
from .node_text import LOG, NodeText
from .region_patch import tell_layouts_without_patch

log = logging.getLogger("spacetime_edit")

BlendSource = Literal["trajectory", "re-noised source"]


class Run:
    """One run of the edit loop: whose weights, whose options, whose conditioning.

    The source's conditioning is prepared at the first use, its ControlNets loaded beside the models that the guider
    already uses, and cleaned up by `close`. memo: what a step function remembers of this run; records: what it reports.
    say: shows a message on the sampler's node.
    """

    def __init__(self, guider, trajectory: Trajectory, model_options: dict, seed: int, say: NodeText = LOG):
        self.guider, self.trajectory, self.say = guider, trajectory, say
        self.model_options, self.seed = model_options, seed
        self._conds: dict[str, list[dict]] = {}
        self._models: list = []
        self.memo: dict[Any, Any] = {}
        self.records: list = []

    @property
    def base_model(self):
        return self.guider.inner_model

    @cached_property
    def source_conds(self) -> list[dict]:
        """The conditioning of the inversion, processed for this run."""
        patcher = self.guider.model_patcher
        latent = self.trajectory.clean.to(patcher.load_device)
        self._conds = {"positive": comfy.sampler_helpers.convert_cond(self.trajectory.conditioning)}
        self._register_hooks()
        self._models, memory = comfy.sampler_helpers.get_additional_models(self._conds, patcher.model_dtype())
        if self._models:
            models = [patcher, *self.guider.loaded_models, *self._models]
            comfy.model_management.load_models_gpu(models, memory_required=memory)
        self._conds = comfy.samplers.process_conds(
            self.base_model,
            torch.zeros_like(latent),
            self._conds,
            latent.device,
            latent,
            seed=self.seed,
            latent_shapes=[latent.shape],
        )
        return self._conds["positive"]

    def _register_hooks(self) -> None:
        """Has the host know the weights that hooks of the source's prompt bring, beside those of the guider's."""
        comfy.samplers.preprocess_conds_hooks(self._conds)
        own, both = comfy.hooks.HookGroup(), comfy.hooks.HookGroup()
        comfy.sampler_helpers.get_hooks_from_cond(self._conds["positive"], own)
        if not own.hooks:
            return
        for conds in (*self.guider.conds.values(), self._conds["positive"]):
            comfy.sampler_helpers.get_hooks_from_cond(conds, both)
        target = comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Model)
        self.guider.model_patcher.register_all_hook_patches(both, target, self.model_options)

    @property
    def models(self) -> list:
        """The ModelPatchers in use, the guider's first."""
        return [self.guider.model_patcher, *self.guider.loaded_models, *self._models]

    def close(self) -> None:
        """Lets go of the source's ControlNets."""
        comfy.sampler_helpers.cleanup_models(self._conds, self._models)

    @cached_property
    def source_options(self) -> dict:
        """Options of source passes: those of the model that was inverted, and what was put in for this run alone.

        Among that are the sigmas, and what another pack's wrapper of the whole sampling keeps for its own calls.
        """
        given, own = self.model_options["transformer_options"], self.guider.model_patcher.model_options
        of_run = {name: value for name, value in given.items() if name not in own.get("transformer_options", {})}
        return _source_options(self.trajectory.model, of_run)

    @cached_property
    def renoise(self) -> Tensor:
        """One fixed noise for a re-noised source."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn(self.trajectory.shape, generator=generator)


@dataclass(frozen=True)
class Step:
    """One step of a run, from sigma to sigma_next (scalars); source latents are in the sampler's own scale.

    mask: where the run edits, (F, h, w) on the latent grid and dilated; None: everywhere.
    """

    run: Run
    index: int
    sigma: Tensor
    sigma_next: Tensor
    source: Tensor
    source_next: Tensor
    mask: Tensor | None = None

    @property
    def space(self) -> NoiseSpace:
        return self.run.trajectory.space

    @cached_property
    def percent(self) -> float:
        """Progress of denoising in [0, 1], as in Apply ControlNet."""
        return 1 - noise_fraction(float(self.sigma), self.run.base_model.model_sampling.percent_to_sigma)


StepFunction = Callable[[Tensor, Step], Tensor]


class TrajectorySampler(comfy.samplers.Sampler):
    """Samples from the latents of an inversion, whatever noise is connected .

    mask: (F, H, W), 1 = edit, any size; dilation in source pixels. Outside it the latent follows the source. A function
    of `before_step` may have `check(mask)`, which raises ValueError before the first step. continue_from_latent: starts
    from the latent that is connected, which an edit by another model of the same schedule left at the first sigma. say:
    shows a message on the sampler's node.
    """

    REMEMBERED = 4
    """Runs whose records are kept."""

    def __init__(
        self,
        trajectory: Trajectory,
        *,
        mask: Tensor | None = None,
        dilation: float = 0.0,
        blend_source: BlendSource = "trajectory",
        before_step: Sequence[StepFunction] = (),
        continue_from_latent: bool = False,
        say: NodeText = LOG,
    ):
        self.trajectory, self.continue_from_latent, self.say = trajectory, continue_from_latent, say
        self.before_step = tuple(before_step)
        self.dilation, self.blend_source = dilation, blend_source
        self.grid = None if mask is None else grid_mask(mask, trajectory, dilation)
        self._finished: deque[tuple[Tensor, list]] = deque(maxlen=self.REMEMBERED)

    def replaced(self, before_step: Sequence[StepFunction]) -> "TrajectorySampler":
        """The same sampler with other before-step functions and no finished runs."""
        other = copy.copy(self)
        other.before_step, other._finished = tuple(before_step), deque(maxlen=self.REMEMBERED)
        return other

    def records_of(self, samples: Tensor) -> list | None:
        """What the step functions reported in the run that returned `samples`, as in the graph; None: no such run."""
        for made, records in self._finished:
            if made.shape == samples.shape and torch.equal(made, samples.to(made)):
                return records
        return None

    def sample(
        self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False
    ):
        sampling = model_wrap.inner_model.model_sampling
        if sigmas[-1] > 0 and not torch.isclose(sigmas[-1].cpu(), self.trajectory.sigmas[-1].cpu()):
            log.warning(
                "sigmas: they end at %.3g, so the result is still noisy; for a later start, take the low_sigmas "
                "of SplitSigmas",
                float(sigmas[-1]),
            )
        first = self._check(model_wrap, sigmas, noise, denoise_mask, extra_args["model_options"])
        tell_layouts_without_patch(model_wrap.model_patcher, model_wrap.conds)
        grid = self._grid(denoise_mask)
        if denoise_mask is not None:
            unheard = extra_args["model_options"].get("denoise_mask_function")
            self.say.show(share_of(grid) + (" Differential Diffusion does nothing here." if unheard else ""))
            _without_noise_mask(model_wrap, noise, latent_image, extra_args.get("seed"))
        after_step = self._after_step(grid)
        for function in self.before_step:
            getattr(function, "check", lambda _: None)(grid)
        run = Run(model_wrap, self.trajectory, extra_args["model_options"], extra_args.get("seed") or 0, self.say)

        def source(k: int) -> Tensor:
            return self.trajectory.latents[first + k].to(noise)

        x, last = source(0).clone(), len(sigmas) - 1
        if self.continue_from_latent:
            x = sampling.noise_scaling(sigmas[0], torch.zeros_like(noise), latent_image)
        with contextlib.closing(run):
            for k in range(last):
                comfy.model_management.throw_exception_if_processing_interrupted()
                step = Step(run, k, sigmas[k], sigmas[k + 1], source(k), source(k + 1), grid)
                for function in self.before_step:
                    x = function(x, step)
                denoised = model_wrap(x, sigmas[k] * x.new_ones(x.shape[0]), **extra_args)
                x = ddim_step(x, denoised, sigmas[k], sigmas[k + 1], self.trajectory.space)
                for function in after_step:
                    x, denoised = function(x, step), function.shown(denoised, step)
                if callback is not None:
                    callback(k, denoised, x, last)
        x = sampling.inverse_noise_scaling(sigmas[-1], x)
        if run.records:
            self._finished.append((model_wrap.inner_model.process_latent_out(x.float()).cpu(), run.records))
        return x

    def _check(self, guider, sigmas, noise, denoise_mask, model_options) -> int:
        """Index of the first sigma in the trajectory; ValueError for whatever does not belong to it."""
        _check_guider(guider, self.trajectory)
        if noise.ndim == 3:  # several latents, which the host has put one behind another
            raise ValueError(
                "latent_image: it holds sound beside the clip, which is not edited; connect the video output of LTXV "
                "Separate AV Latent, and join clip and sound after the edit"
            )
        if tuple(noise.shape) != self.trajectory.shape:
            raise ValueError(
                f"latent_image: its shape {tuple(noise.shape)} is not the trajectory's {self.trajectory.shape}; "
                f"connect the latent that Invert Video received"
            )
        check_picture(guider.model_patcher, guider.conds["positive"], "positive")
        if denoise_mask is not None and hasattr(guider, "uncond_model_patcher"):
            raise ValueError(
                f"mask: {type(guider).__name__} shows the latent's noise mask to a second model; connect the mask to "
                f"this sampler's node instead of the latent"
            )
        if denoise_mask is not None and self.grid is not None:
            raise ValueError(
                "mask: the latent already carries a noise mask; connect the mask here or set it on the latent, not both"
            )
        if self.before_step:
            frames = frame_count(self.trajectory.clean)
            check_windows(guider.model_patcher, self.trajectory.model, frames)
        if "multigpu_clones" in model_options:
            raise ValueError(ONE_GPU)
        return self.trajectory.offset_of(sigmas)

    def _grid(self, denoise_mask: Tensor | None) -> Tensor | None:
        """The mask of this run on the latent grid: the sampler's own, or the one that the latent carries."""
        if denoise_mask is None:
            return self.grid
        mask = _frames_of(denoise_mask)
        time = time_of(self.trajectory.clean, self.trajectory.model)
        if time.compressed and (mask.max() == 0 or not torch.equal(mask, mask[:1].expand_as(mask))):
            raise ValueError(
                "mask: the latent carries a mask for each frame, or an empty one, but a latent frame of this model "
                "holds several frames of the clip, between which ComfyUI interpolates the masks; connect the mask "
                "to this sampler's node instead of Set Latent Noise Mask"
            )
        return grid_mask(mask, self.trajectory, self.dilation)

    def _after_step(self, grid: Tensor | None) -> list["LatentBlend"]:
        if grid is None:
            return []
        if grid.min() == 1:
            log.warning("mask: it covers the whole clip, so it changes nothing")
            return []
        if grid.max() == 0:
            log.warning("mask: it is empty, so nothing is edited and the source clip comes back")
        return [LatentBlend(grid, self.blend_source)]


class LatentBlend:
    """After-step function: outside `mask` (F, h, w) the latent is the source's at the same noise level."""

    def __init__(self, mask: Tensor, source: BlendSource):
        self._mask, self._source = mask, source

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        source = step.source_next
        if self._source == "re-noised source":
            clean = step.run.trajectory.clean.to(x)
            source = add_noise(clean, step.run.renoise.to(x), step.sigma_next, step.space)
        return blend(source, x, mask_like(self._mask, x))

    def shown(self, denoised: Tensor, step: Step) -> Tensor:
        """The prediction of x0 as previews and `denoised_output` show it: the clean source outside the mask."""
        return blend(step.run.trajectory.clean.to(denoised), denoised, mask_like(self._mask, denoised))


def grid_mask(mask: Tensor, trajectory: Trajectory, dilation: float) -> Tensor:
    """`mask` dilated by `dilation` source pixels, on the trajectory's latent grid: (F, h, w).

    ValueError unless it has one frame or the trajectory's, and the dilation is a length.
    """
    return grid_mask_of(mask, trajectory.clean, trajectory.model, dilation)


LARGE = 0.6
"""Share of the clip above which a mask may be the wrong way round."""


def share_of(grid: Tensor) -> str:
    """What a mask (F, h, w) on the latent grid means for an edit, for a node to show."""
    share = float(grid.float().mean())
    if share == 0:
        return "The mask is empty: nothing is edited, and the source clip comes back. Paint where to edit (1 = edit)."
    if grid.min() == 1:
        return "The mask covers the whole clip, so it has no effect."
    turned = " Is it the wrong way round? 1 = edit, 0 = keep." if share > LARGE else ""
    return f"The mask edits {max(1, round(100 * share))} % of the clip, dilation included.{turned}"


def _frames_of(denoise_mask: Tensor) -> Tensor:
    """The host's noise mask, shaped like the latent, as (F, h, w)."""
    return denoise_mask[:, 0] if denoise_mask.ndim == 4 else denoise_mask[0, 0]


def _without_noise_mask(guider, noise: Tensor, latent_image: Tensor | None, seed: int) -> None:
    """Processes a run's conditioning once more, as for a latent without noise mask.

    From one LTX-Video, Wan 2.2 5B and Cosmos Predict2 read which tokens are clean, models with pictures which frames
    are known; in this loop none is before the last step.
    """
    for name, conds in guider.conds.items():
        for cond in conds:
            kept = {key: value for key, value in cond["model_conds"].items() if key not in ("denoise_mask", "c_concat")}
            cond["model_conds"] = kept
        comfy.samplers.encode_model_conds(
            guider.inner_model.extra_conds,
            conds,
            noise,
            noise.device,
            name,
            latent_image=latent_image,
            seed=seed,
            latent_shapes=[noise.shape],
        )


def _check_guider(guider, trajectory: Trajectory) -> None:
    name = type(guider).__name__
    patcher = getattr(guider, "model_patcher", None)
    if patcher is None or "positive" not in getattr(guider, "conds", {}):
        raise ValueError(
            f"guider: {name} has no model or no positive prompt that can be edited; use CFGGuider or one like it"
        )
    if patcher.is_clone(trajectory.model) and noise_space(patcher) is not trajectory.space:
        raise ValueError(
            f"guider: its model samples in the noise space {noise_space(patcher).name}, the inversion ran in "
            f"{trajectory.space.name}; connect the same ModelSampling nodes to both"
        )
    if patcher.is_dynamic() != trajectory.model.is_dynamic():
        raise ValueError(
            "guider: a prompt with hooks (such as a scheduled LoRA) makes ComfyUI load a second copy of the model; "
            "start ComfyUI with --disable-dynamic-vram, or remove the hooks"
        )
    if not patcher.is_clone(trajectory.model):
        own, inverted = type(patcher.model).__name__, type(trajectory.model.model).__name__
        found = f"a {own}, not the {inverted}" if own != inverted else f"another loaded copy of the {own}"
        raise ValueError(
            f"guider: its model is not the one that was inverted but {found}; connect the same loader to Invert Video "
            f"and to {name}"
        )
    if inflation_of(patcher) != inflation_of(trajectory.model):
        own, inverted = (str(inflation_of(m) or "per frame") for m in (patcher, trajectory.model))
        raise ValueError(
            f"guider: its model attends to frames '{own}', the inverted one '{inverted}'; connect the same Inflate "
            f"Attention to Video to Invert Video and to {name}"
        )


def _source_options(model, of_run: dict) -> dict:
    """The options of a ModelPatcher as the host would hand them to a sampler, marked as a run on the source.

    of_run: transformer_options of this run, for whatever the model itself does not say.
    """
    options = create_model_options_clone(model.model_options)
    inner = options.setdefault("transformer_options", {})
    for name in ("wrappers", "callbacks"):
        inner[name] = merge_nested_dicts(inner.get(name, {}), getattr(model, name))
    for name, value in of_run.items():
        inner.setdefault(name, value)
    inner[SOURCE_RUN] = True
    return options
