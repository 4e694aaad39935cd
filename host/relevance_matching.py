"""STR matching as a before-step function of the edit loop (STR-Match, arXiv 2506.22868)."""

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.guidance import StepRule, descend
from ..core.relevance import AttentionFeatures, matching_loss
from ..core.trajectory import Trajectory
from .attention_tap import AttentionTap, until_enough_seen
from .families import attention_layers, family_of, select_blocks
from .features import FeatureRecorder
from .gradients import latent_gradient, normal_tensor, predict
from .sampling import Step

log = logging.getLogger("spacetime_edit")

STEPS_OF_LAMBDA = 50
"""lambda is given for a schedule of 50 steps; other schedules move as far in total."""

HALF_PRECISION_SCALE = 2.0**14
"""Loss scale for float16 models, whose gradients of a mean cosine would underflow."""


@dataclass(frozen=True)
class STRScore:
    """What to match: the source clip's trajectory, the blocks to look at (None: all but the finest), the radius."""

    trajectory: Trajectory
    blocks: frozenset[str] | None
    radius: int


def str_score_of(trajectory: Trajectory, layers: str, radius: int) -> STRScore:
    """Validates a choice of layers on the trajectory's model; ValueError without temporal attention."""
    found = attention_layers(trajectory.model).values()
    if not any(layer.kind == "temporal" for layer in found):
        raise ValueError(
            f"trajectory: its model ({family_of(trajectory.model).name}) has no temporal attention, which the STR "
            f"score is built from; load a text-to-video model such as Zeroscope"
        )
    if radius < 0:
        raise ValueError(f"radius: it is {radius}; expected a number of frames, or 0 for all")
    blocks = {layer.block for layer in found if layer.kind == "spatial"}
    return STRScore(trajectory, select_blocks(layers, blocks) if layers.strip() else None, radius)


def check_window(start: float, end: float) -> None:
    """ValueError unless start and end are a window within [0, 1]."""
    if not 0 <= start <= end <= 1:
        raise ValueError(
            f"start_percent, end_percent: {start} and {end}; expected 0 <= start_percent <= end_percent <= 1"
        )


class RelevanceMatching:
    """Moves the target latent so that its STR score matches the source's, before the prediction of each step.

    strength: lambda for 50 steps. start, end: percent of denoising in [0, 1] where it acts.
    """

    def __init__(
        self,
        score: STRScore,
        strength: float,
        *,
        start: float = 0.0,
        end: float = 1.0,
        iterations: int = 1,
        rule: StepRule = "normalised",
    ):
        if not 0 <= strength <= 1:
            raise ValueError(f"lambda: it is {strength}; expected a number from 0 to 1 (0.01 is the method's own)")
        check_window(start, end)
        self._score, self._strength = score, strength
        self._start, self._end = start, end
        self._iterations, self._rule = iterations, rule
        self._last_layer: str | None = None  # known after the first step; the model's forward may end there

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        if self._strength == 0 or not self._start <= step.percent <= self._end:
            return x
        matcher = _Matcher(self._score, step, self._last_layer)
        self._last_layer = matcher.last_layer
        return descend(
            x,
            matcher.gradient,
            strength=self._strength * STEPS_OF_LAMBDA / self._score.trajectory.steps,
            scale=step.space.latent_scale(step.sigma),
            rule=self._rule,
            iterations=self._iterations,
        )


class _Matcher:
    """The loss between the source at one noise level and a target latent there."""

    def __init__(self, score: STRScore, step: Step, last_layer: str | None):
        self._score, self._step = score, step
        self._source = self._source_features(last_layer)
        self.last_layer = next(reversed(self._source))

    def gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        run, recorder = self._step.run, FeatureRecorder(self._score.blocks, self.last_layer)
        tap = AttentionTap(run.guider.model_patcher, [recorder], differentiable=True)
        half = run.base_model.get_dtype_inference() == torch.float16
        loss, gradient = latent_gradient(
            run.base_model,
            x,
            self._step.sigma,
            leading_cond(run.guider.conds["positive"], self._step.sigma, "positive"),
            lambda _: self._loss(recorder.features),
            model_options=tap.install(run.model_options),
            loss_scale=HALF_PRECISION_SCALE if half else 1.0,
            mutates=family_of(run.guider.model_patcher).mutates,
        )
        if not torch.isfinite(gradient).all():
            raise ValueError(
                f"STR matching: the gradient is not finite at step {self._step.index + 1} (sigma "
                f"{float(self._step.sigma):.4g}, layer {_first_bad_layer(recorder.features)}); try the model in bf16 "
                f"or fp32, or fewer layers"
            )
        return loss, gradient

    def _source_features(self, last_layer: str | None) -> dict[str, AttentionFeatures]:
        run, sigma, recorder = self._step.run, self._step.sigma, FeatureRecorder(self._score.blocks, last_layer)
        options = AttentionTap(run.trajectory.model, [recorder]).install(run.source_options)
        cond = leading_cond(run.source_conds, sigma, "positive of Invert Video")
        z = self._step.source
        sigmas = sigma * z.new_ones(z.shape[0])
        until_enough_seen(lambda: predict(run.base_model, z, sigmas, cond, options))
        if not recorder.features:
            raise ValueError("layers: none of the chosen blocks has a spatial and a temporal attention of one size")
        if last_layer is None and recorder.unpaired:
            log.info("STR score: skipped layers without temporal partner: %s", ", ".join(recorder.unpaired))
        return {path: _normal(f) for path, f in recorder.features.items()}

    def _loss(self, target: dict[str, AttentionFeatures]) -> Tensor:
        losses = [
            matching_loss(source, target[path], radius=self._score.radius) for path, source in self._source.items()
        ]
        return torch.stack(losses).mean()


def leading_cond(conds: list[dict], sigma: Tensor, name: str) -> dict:
    """The first conditioning that is active at `sigma` over the whole frame; its attention maps stand for the clip."""
    for cond in conds:
        starts, ends = cond.get("timestep_start"), cond.get("timestep_end")
        active = (starts is None or sigma <= starts) and (ends is None or sigma >= ends)
        if active and "area" not in cond:
            return cond
    raise ValueError(
        f"{name}: no conditioning covers the whole frame at sigma {float(sigma):.4g}; STR matching needs one without "
        f"an area whose timestep range covers the whole edit"
    )


def _normal(features: AttentionFeatures) -> AttentionFeatures:
    query, key, temporal = (normal_tensor(t) for t in (features.query, features.key, features.temporal))
    return AttentionFeatures(query, key, temporal, features.scale)


def _first_bad_layer(features: dict[str, AttentionFeatures]) -> str:
    for path, f in features.items():
        if not all(torch.isfinite(t).all() for t in (f.query, f.key, f.temporal)):
            return path
    return "unknown, in the backward pass"
