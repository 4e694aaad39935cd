"""One model call of our own: a conditioning, a latent and a sigma, with listeners, on the clip or on a window of it.

The guider's own predictions go the host's way, with whatever other packs have put around it. What is asked here is
asked for its attention: without step caches, which would answer in the network's place, and checked to have run the
network once, on all frames.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import comfy.model_management
import comfy.samplers
import torch
from comfy.context_windows import IndexListContextHandler, IndexListContextWindow
from comfy.model_patcher import create_model_options_clone
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..core.parametrization import noise_fraction
from ..core.trajectory import Trajectory
from .animatediff import window_length
from .attention_call import RETAINED, SOURCE_RUN, has_anchor, shown_frames
from .attention_tap import ONE_GPU, AttentionTap, Listener, until_enough_seen
from .families import AttentionKind
from .latents import frame_count
from .step_caches import uncached, without_caches

Result = TypeVar("Result")

HANDLER = "context_handler"
"""Key of the host's context windows in the options of a model."""
PASS = "spacetime_edit_pass"
PROMPTS_TESTED = 33
"""Noise levels at which the prompts of a run are tried before its first step."""


# --- context windows ----------------------------------------------------


@dataclass(frozen=True)
class Window:
    """What a pass sees of a run: the whole clip, or of long ones the frames of one of the host's context windows.

    conds: by name, what they hold for each frame cut to these frames.
    """

    conds: Mapping[str, list[dict]]
    handler: IndexListContextHandler | None = None
    own: IndexListContextWindow | None = None

    @cached_property
    def frames(self) -> list[int] | None:
        """Latent frames of the clip that it shows, in its order; None: all."""
        if self.own is None:
            return None
        return list(shown_frames(self.own, self.handler.latent_retain_index_list))

    def options(self, model_options: dict) -> dict:
        """A copy of the options of a run, or of another model of it, for a pass on these frames."""
        options = create_model_options_clone(model_options)
        options.pop(HANDLER, None)
        if self.own is not None:
            inner = options.setdefault("transformer_options", {})
            inner["context_window"], inner[RETAINED] = self.own, tuple(self.handler.latent_retain_index_list)
        return options

    def of(self, latent: Tensor) -> Tensor:
        """The frames of a latent that it shows."""
        if self.own is None:
            return latent
        return self.own.get_tensor(latent, latent.device, retain_index_list=self.handler.latent_retain_index_list)

    def of_mask(self, mask: Tensor) -> Tensor:
        """Of a mask (F, h, w)."""
        return mask if self.own is None else mask[self.frames]

    def leading_cond(self, name: str, sigma: Tensor, x: Tensor) -> dict:
        """Of a named prompt, for a latent of these frames: see `leading_cond`. ValueError for a ControlNet, whose hint
        the host does not cut."""
        size = x.shape[2:] if self.own is None or x.ndim == 4 else (self.own.total_frames, *x.shape[3:])
        cond = leading_cond(self.conds[name], sigma, name, tuple(size))
        if self.own is not None and "control" in cond:
            raise ValueError(f"{name}: in context windows no gradient can follow a ControlNet; remove one of them")
        return cond

    def own_frames(self, gradient: Tensor) -> Tensor:
        """A gradient of its own frames, 0 at those that it shows beside them or in the place of others."""
        if self.own is None:
            return gradient
        places = {*self.handler.latent_retain_index_list} | ({0} if has_anchor(self.own) else set())
        return gradient.index_fill(self.own.dim, torch.tensor(sorted(places), device=gradient.device).long(), 0.0)


def by_window(
    latent: Tensor,
    sigma: Tensor,
    base_model,
    model_options: dict,
    conds: Mapping[str, list[dict]],
    latents: int,
    compute: Callable[[Window], Result],
) -> Result:
    """What `compute` gives for each context window of a run, put together: a nest of latents, numbers and None.

    Latents are blended by the host's own windows as it blends predictions; numbers are averaged. Without windows, or of
    a clip that fits into one, compute is asked once. sigma: scalar. conds: of the run, by name. latents: how many there
    are in a result.
    """
    handler = model_options.get(HANDLER)
    everything, sigmas = list(conds.values()), sigma * latent.new_ones(latent.shape[0])
    if handler is None or not handler.should_use_context(base_model, everything, latent, sigmas, model_options):
        return compute(Window(conds))
    said: list[list] = []
    slots, form = everything + [None] * max(0, latents - len(everything)), None

    def of_window(model, own_conds, x, timestep, run_options):
        nonlocal form
        comfy.model_management.throw_exception_if_processing_interrupted()
        own = {name: own_conds[i] for i, name in enumerate(conds)}
        window = Window(own, handler, run_options["transformer_options"]["context_window"])
        leaves, form = tree_flatten(compute(window))
        made = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        said.append(["latent" if isinstance(leaf, Tensor) else leaf for leaf in leaves])
        return made + [torch.zeros_like(x)] * (len(slots) - len(made))

    options = create_model_options_clone(model_options)
    blended = iter(handler.execute(of_window, base_model, slots, latent, sigmas, options))

    def together(values: tuple):
        if values[0] == "latent":
            return next(blended)
        return None if values[0] is None else sum(values) / len(values)

    return tree_unflatten([together(values) for values in zip(*said, strict=True)], form)


def check_handler(model, frames: int) -> None:
    """ValueError for a ModelPatcher that runs so many latent frames in windows which are not known here."""
    handler, length = model.model_options.get(HANDLER), window_length(model)
    if length is not None and frames > length:
        raise ValueError(
            f"model: AnimateDiff-Evolved's context options run it on {length} of the {frames} frames at a time, so its "
            f"attention to the whole clip is not seen; use ComfyUI's Context Windows (Manual) instead, or Sample from "
            f"Trajectory"
        )
    if handler is not None and not isinstance(handler, IndexListContextHandler):
        raise ValueError(
            f"model: its context windows are of a kind ({type(handler).__name__}) in which no gradient is taken; use "
            f"ComfyUI's own, or Sample from Trajectory"
        )


def check_windows(model, of_source, frames: int) -> None:
    """ValueError for windows of another kind, or in one of two ModelPatchers only."""
    for each in (model, of_source):
        check_handler(each, frames)
    if (HANDLER in model.model_options) != (HANDLER in of_source.model_options):
        raise ValueError(
            "model: only one of the inverted model and the edit's has context windows; put the node before both"
        )


def at_step(model_options: dict, sigma: Tensor, step: int) -> dict:
    """The options of a run for a sigma of no schedule: context windows are those of step number `step`."""
    if HANDLER not in model_options:
        return model_options
    options = create_model_options_clone(model_options)
    sigmas = torch.full((step + 1,), -1.0)
    sigmas[step] = float(sigma)
    options.setdefault("transformer_options", {})["sample_sigmas"] = sigmas.to(sigma.device)
    return options


def as_source(model):
    """A clone of a ModelPatcher for runs that see the source clip: region patches are inactive in them."""
    marked = model.clone()
    marked.model_options.setdefault("transformer_options", {})[SOURCE_RUN] = True
    return marked


def begin_hooks(base_model, conds: Iterable[dict], sigma: Tensor) -> None:
    """Sets the strengths of hooks with a schedule (LoRAs of a prompt) to those of `sigma`, a scalar.

    The host goes through such a schedule forward only, as sigmas fall; here they rise, or are drawn.
    """
    groups = {id(h.hook_keyframe): h.hook_keyframe for c in conds for h in getattr(c.get("hooks"), "hooks", ())}
    scheduled = [group for group in groups.values() if group.has_index(1)]
    before = [group.strength for group in scheduled]
    for group in scheduled:
        group.reset()
        group.prepare_current_keyframe(sigma, {"sample_sigmas": sigma.reshape(1)})
    if before != [group.strength for group in scheduled]:
        base_model.current_patcher.clear_cached_hook_weights()


# --- the pass -----------------------------------------------------------


def call_model(
    base_model,
    conds: list[dict],
    x: Tensor,
    sigma: Tensor,
    model_options: dict,
    *,
    tap: AttentionTap | None = None,
    needs: frozenset[AttentionKind] = frozenset(),
    source: bool = False,
    place: int = 0,
) -> Tensor | None:
    """The prediction of x0 for one list of processed conditionings, or None where a listener of `tap` ended it early.

    model_options: of a run on the frames of x, such as `Window.options`; step caches are left out. tap: hears the
    attention; then the network must run once, on all frames, and some attention of the kinds in `needs` must reach it.
    source: the pass sees the source clip, so region patches are inactive. place: of the list among the host's, by which
    other packs know it: 0 positive, 1 negative. ValueError where one of this does not hold.
    """
    if "multigpu_clones" in model_options:
        raise ValueError(ONE_GPU)
    options = for_pass(model_options, source)
    sigmas = sigma * x.new_ones(x.shape[0])
    once = None if tap is None else _Once(x, options)
    if once is not None:
        options = once.install(tap.install(options))
    lists = [*[None] * place, conds]
    made = until_enough_seen(lambda: comfy.samplers.calc_cond_batch(base_model, lists, x, sigmas, options)[place])
    if once is not None:
        once.check(tap, needs)
    return made


def for_pass(model_options: dict, source: bool) -> dict:
    """A copy of the options of a run for a pass on the source clip or on the edit, without step caches."""
    options = uncached(model_options)
    inner = options["transformer_options"]
    inner.pop(SOURCE_RUN, None)
    if source:
        inner[SOURCE_RUN] = True
    return options


class _Once:
    """Watches that a pass runs the network once, on all frames of its latent."""

    def __init__(self, x: Tensor, model_options: dict):
        self._shape, self._calls = x.shape, 0
        wrappers = model_options["transformer_options"].get("wrappers", {})
        self._others = [str(name) for name in wrappers.get(WrappersMP.CALC_COND_BATCH, {}) if "spacetime" not in name]

    def install(self, options: dict) -> dict:
        add_wrapper_with_key(WrappersMP.APPLY_MODEL, PASS, self._count, options, is_model_options=True)
        return options

    def _count(self, executor, x, *args, **kwargs):
        self._calls += 1
        if self._calls > 1 or x.shape != self._shape:
            others = f" ({', '.join(self._others)})" if self._others else ""
            raise ValueError(
                f"model: another pack{others} calls it several times for one prediction, or on a part of the clip, as "
                f"Tiled Diffusion does, or AnimateDiff-Evolved's context options (use ComfyUI's Context Windows "
                f"(Manual) instead of these); remove that node, or use Sample from Trajectory"
            )
        return executor(x, *args, **kwargs)

    def check(self, tap: AttentionTap, needs: frozenset[AttentionKind]) -> None:
        if self._calls != 1 or not tap.entered:
            raise ValueError(
                "model: its network did not run, since a node of another pack answers in its place (a step cache such "
                "as TeaCache or MagCache); remove that node from the model of this edit"
            )
        if needs and not tap.heard_kinds & needs:
            raise ValueError(
                "model: its attention does not reach this node, since another pack replaces it (such as Sage attention "
                "that is patched into all of ComfyUI, or an attention replacement in every block); remove that node"
            )


def leading_cond(conds: list[dict], sigma: Tensor, name: str, size: tuple[int, ...]) -> dict:
    """The first conditioning that is active at `sigma` over the whole frame; its attention maps stand for the clip.

    size: of the clip's latent, (F, h, w) or (h, w).
    """
    for cond in conds:
        starts, ends = cond.get("timestep_start"), cond.get("timestep_end")
        active = (starts is None or sigma <= starts) and (ends is None or sigma >= ends)
        if active and covers_all(cond, size):
            return cond
    raise ValueError(
        f"{name}: no conditioning covers the whole frame at sigma {float(sigma):.4g}; connect one without an area or "
        f"mask whose timestep range covers the whole edit"
    )


def covers_all(cond: dict, size: tuple[int, ...]) -> bool:
    """Whether a processed conditioning holds for all of a latent of this size, with no area or mask that leaves some
    of it out."""
    area, mask = cond.get("area"), cond.get("mask")
    if area is not None:
        extent, first = area[: len(area) // 2], area[len(area) // 2 :]
        if any(first) or any(own < whole for own, whole in zip(extent, size[-len(extent) :], strict=True)):
            return False
    return mask is None or bool((mask >= 1).all())


def check_prompts(guider, t_range: tuple[float, float], size: tuple[int, ...]) -> None:
    """ValueError unless each prompt of a guider has a conditioning for the whole frame at every noise level of a range.

    t_range: normalised times, 1 = noise; size: see `leading_cond`.
    """
    sampling = guider.inner_model.model_sampling
    for t in torch.linspace(*t_range, PROMPTS_TESTED).tolist():
        sigma = torch.as_tensor(sampling.percent_to_sigma(1 - t))
        for name, conds in guider.conds.items():
            leading_cond(conds, sigma, name, size)


# --- a look at the inverted clip ----------------------------------------


def nearest_step(trajectory: Trajectory, percent: float) -> int:
    """Index of the noise level of the trajectory, above 0, whose progress of denoising is nearest to `percent`."""
    if not 0 <= percent <= 1:
        raise ValueError(f"percent: it is {percent}; expected a number from 0 to 1")
    of_percent = trajectory.model.get_model_object("model_sampling").percent_to_sigma
    away = [abs(1 - noise_fraction(float(sigma), of_percent) - percent) for sigma in trajectory.sigmas[:-1]]
    return away.index(min(away))


def call_on_trajectory(
    listener: Listener,
    trajectory: Trajectory,
    percent: float,
    needs: frozenset[AttentionKind],
    *,
    model=None,
    positive: list | None = None,
) -> None:
    """Calls the model once on the inverted latent nearest to `percent`; `listener` gets every attention call.

    model: another ModelPatcher than the inverted one, with its region patches, which are inactive without; positive:
    the prompt of an edit; None: that of the source. needs: see `call_model`.
    """
    step = nearest_step(trajectory, percent)
    check_handler(model or trajectory.model, frame_count(trajectory.clean))
    asked, _ = without_caches(model or trajectory.model)
    guider = comfy.samplers.CFGGuider(as_source(asked) if model is None else asked)
    guider.inner_set_conds({"positive": positive or trajectory.conditioning})
    empty = torch.zeros(trajectory.shape)
    whose = "positive of Invert Video" if positive is None else "positive"
    sampler = _OneCall(trajectory.latents[step], AttentionTap(asked, [listener]), needs, whose, source=model is None)
    guider.sample(empty, empty, sampler, trajectory.sigmas[step:], disable_pbar=True, seed=0)


class _OneCall(comfy.samplers.Sampler):
    """Calls the model once on a latent; samples nothing."""

    def __init__(self, latent: Tensor, tap: AttentionTap, needs: frozenset[AttentionKind], whose: str, source: bool):
        self._latent, self._tap, self._needs, self._whose, self._source = latent, tap, needs, whose, source

    def sample(
        self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False
    ):
        x, options = self._latent.to(noise), extra_args["model_options"]
        cond = leading_cond(model_wrap.conds["positive"], sigmas[0], self._whose, tuple(x.shape[2:]))
        call_model(
            model_wrap.inner_model, [cond], x, sigmas[0], options, tap=self._tap, needs=self._needs, source=self._source
        )
        return noise
