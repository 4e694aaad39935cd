"""STR matching as a before-step function of the edit loop (STR-Match, arXiv 2506.22868)."""

import contextlib
import logging
from dataclasses import dataclass, replace
from typing import Any, Literal

import comfy.model_management
import torch
from torch import Tensor

from ..core.guidance import StepRule, descend
from ..core.masks import redraw_inside, to_latent_grid
from ..core.relevance import AttentionFeatures, Paths, matching_loss
from ..core.trajectory import Trajectory
from .attention_call import ModelRun
from .attention_tap import AttentionTap, Listener
from .checkpointing import checkpointed
from .families import IN_SPACE, Family, Layer, attention_layers, family_of, parse_blocks, select_blocks
from .features import FeatureRecorder
from .gradients import latent_gradient, normal_tensor
from .inflation import inflation_of
from .latents import mask_like
from .memory import SMALLER_TILES, ActivationMeter, GradientMemory, loss_memory, small_tile, with_less_memory
from .model_pass import Window, by_window, call_model, leading_cond
from .sampling import Step

log = logging.getLogger("spacetime_edit")

STEPS_OF_LAMBDA = 50
"""lambda is given for a schedule of 50 steps; other schedules move as far in total."""

HALF_PRECISION_SCALE = 2.0**14
"""Loss scale for float16 models, whose gradients of a mean cosine would underflow."""

DIRECT: Paths = "spatial-temporal"
"""The only form of a score that goes along no path."""

Task = Literal["change", "delete", "add"]

NEW_CONTENT: tuple[Task, ...] = ("delete", "add")
"""Tasks for which nothing inside the mask is to be matched."""

MemoryMode = Literal["auto", "low"]

TARGET, SOURCE, GRADIENT, LOSS = "positive", "positive of Invert Video", "gradient", "loss"
"""Names of the two prompts, and of what one window gives."""


@dataclass(frozen=True)
class STRScore:
    """What to match: the source clip's trajectory, the blocks to look at (None: all but the finest), the score's form.

    radius, paths, bidirectional, per_pair: as in `core.relevance.str_score`.
    """

    trajectory: Trajectory
    blocks: frozenset[str] | None
    radius: int = 1
    paths: Paths = "spatial-temporal"
    bidirectional: bool = True
    per_pair: bool = False

    @property
    def form(self) -> dict[str, Any]:
        """The options of `matching_loss`."""
        return {name: getattr(self, name) for name in ("radius", "paths", "bidirectional", "per_pair")}


def lacks_for_relevance(model) -> str:
    """Which attention of those that the STR score is built from a ModelPatcher has not; "" if none."""
    kinds = {layer.kind for layer in attention_layers(model).values()}
    if sees_all_frames(model):
        return ""
    needed = {"spatial": "spatial self-attention apart from the prompt's", "temporal": "temporal attention"}
    return " and no ".join(name for kind, name in needed.items() if kind not in kinds)


def sees_all_frames(model) -> bool:
    """Whether self-attention of a ModelPatcher spans all frames: of a video transformer, or where it is inflated so."""
    if family_of(model).patched is not None:
        return True
    inflation, kinds = inflation_of(model), {layer.kind for layer in attention_layers(model).values()}
    return inflation is not None and inflation.keys == "all frames" and "temporal" not in kinds


def str_score_of(trajectory: Trajectory, layers: str = "", radius: int = 1, **form) -> STRScore:
    """Validates a choice of layers on the trajectory's model; ValueError without temporal attention.

    form: paths, bidirectional and per_pair of `STRScore`.
    """
    found = attention_layers(trajectory.model).values()
    if lacking := lacks_for_relevance(trajectory.model):
        raise ValueError(
            f"trajectory: its model ({family_of(trajectory.model).name}) has no {lacking}, which the STR score is "
            f"built from; load a text-to-video model such as Zeroscope, or inflate this one (all frames) before the "
            f"inversion"
        )
    if radius < 0:
        raise ValueError(f"radius: it is {radius}; expected a number of frames, or 0 for all")
    if sees_all_frames(trajectory.model) and form.get("paths", DIRECT) != DIRECT:
        raise ValueError(
            f"paths: it is {form['paths']!r}, but attention of {family_of(trajectory.model).name} sees all frames at "
            f"once, so the score goes along no path; set it to {DIRECT!r}"
        )
    blocks = {layer.block for layer in found if layer.kind in IN_SPACE}
    layers = layers if layers.strip() else _default_blocks(family_of(trajectory.model), blocks)
    return STRScore(trajectory, select_blocks(layers, blocks) if layers.strip() else None, radius, **form)


def _default_blocks(family: Family, blocks: set[str]) -> str:
    """The family's own choice, as far as a small model has them."""
    return ",".join(sorted(blocks & frozenset().union(*parse_blocks(family.score_blocks).values())))


def check_window(start: float, end: float) -> None:
    """ValueError unless start and end are a window within [0, 1]."""
    if not 0 <= start <= end <= 1:
        raise ValueError(
            f"start_percent, end_percent: {start} and {end}; expected 0 <= start_percent <= end_percent <= 1"
        )


@dataclass(frozen=True)
class MatchedStep:
    """What matching reports of a step: its place in the denoising and the cosine before each of its iterations.

    memory: predicted bytes of its gradient beyond the weights; checkpointing: whether it kept no activations.
    """

    percent: float
    cosines: tuple[float, ...]
    memory: GradientMemory
    checkpointing: bool


@dataclass(frozen=True, eq=False)
class RelevanceMatching:
    """Moves the target latent so that its STR score matches the source's, before the prediction of each step.

    strength: lambda for 50 steps. start, end: percent of denoising in [0, 1] where it acts. task: "delete" and "add"
    leave what lies inside the mask out of the score, so that nothing there must be matched, and move the latent outside
    it only. memory: "low" keeps no activations (block checkpointing) and forms the score in small tiles; "auto" does
    so when memory is short.
    """

    score: STRScore
    strength: float
    start: float = 0.0
    end: float = 1.0
    iterations: int = 1
    rule: StepRule = "normalised"
    task: Task = "change"
    memory: MemoryMode = "auto"

    def __post_init__(self):
        if not 0 <= self.strength <= 1:
            raise ValueError(f"lambda: it is {self.strength}; expected a number from 0 to 1 (0.01 is the method's own)")
        check_window(self.start, self.end)

    def with_strength(self, strength: float) -> "RelevanceMatching":
        """The same matching with another lambda."""
        return replace(self, strength=strength)

    def check(self, mask: Tensor | None) -> None:
        """ValueError where the task needs a mask and there is none."""
        if mask is None and self.task in NEW_CONTENT:
            raise ValueError(
                f"mask: the task is {self.task!r}, but no mask is connected; connect one that is 1 where the object "
                f"{'is' if self.task == 'delete' else 'shall appear'}"
            )

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        if self.strength == 0 or not self.start <= step.percent <= self.end:
            return x
        run = step.run.memo.setdefault(self, _MatchingRun(low_memory=self.memory == "low"))
        conds = {TARGET: step.run.guider.conds["positive"], SOURCE: step.run.source_conds}
        whole: list[_Matcher] = []  # of the clip without windows, for all iterations
        cosines = []

        def gradient(x: Tensor) -> tuple[Tensor, Tensor]:
            def of_window(window: Window) -> tuple[dict[str, Tensor], dict[str, float]]:
                matcher = whole[0] if whole else _Matcher(self, step, run, window)
                if window.own is None:
                    whole[:] = [matcher]
                loss, slope = matcher.gradient(window.of(x))
                return {GRADIENT: window.own_frames(slope)}, {LOSS: float(loss)}

            options = step.run.model_options
            found, losses = by_window(x, step.sigma, step.run.base_model, options, conds, [GRADIENT], of_window)
            cosines.append(-losses[LOSS])
            return torch.tensor(losses[LOSS], dtype=torch.float64), found[GRADIENT]

        x = descend(
            x,
            gradient,
            strength=self.strength * STEPS_OF_LAMBDA / self.score.trajectory.schedule_steps,
            scale=step.space.latent_scale(step.sigma),
            rule=self.rule,
            iterations=self.iterations,
        )
        step.run.records.append(MatchedStep(step.percent, tuple(cosines), run.memory, run.low_memory))
        return x


def redraw_noise(x: Tensor, step: Step) -> Tensor:
    """Before-step function for NEW_CONTENT: begins inside the mask from noise that holds nothing of the source there.

    Inverted noise remembers the object it was inverted from. The new noise follows the seed of the run.
    """
    if step.index > 0:
        return x
    frames_last = x.movedim(0, 1) if x.ndim == 4 else x  # (C, F, h, w) or (1, C, F, h, w)
    redrawn = redraw_inside(frames_last, step.mask, torch.Generator().manual_seed(step.run.seed))
    return redrawn.movedim(1, 0) if x.ndim == 4 else redrawn


@dataclass
class _MatchingRun:
    """What is known of a run after its first step.

    low_memory: keep no activations. last_layer: where the model's forward may end. memory: what a gradient takes.
    """

    low_memory: bool
    last_layer: str | None = None
    memory: GradientMemory = GradientMemory(0, 0)


class _Matcher:
    """The loss between the source at one noise level and a target latent there, on the frames of a window."""

    def __init__(self, matching: RelevanceMatching, step: Step, run: _MatchingRun, window: Window):
        self._matching, self._score, self._step, self._run = matching, matching.score, step, run
        self._window = window
        recorder = self._first_source() if run.last_layer is None else self._next_source()
        self._source, self._grids = {p: f.map(normal_tensor) for p, f in recorder.features.items()}, recorder.grids
        self._weights = self._hidden_inside_mask() if matching.task in NEW_CONTENT else {}

    def gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(loss, d loss / d x); where memory runs out, once more with as little of it as there is a way to."""
        lean = None if self._run.low_memory else lambda: self._lean(x)
        knobs = "the layers of Capture STR Score (such as m0)"
        loss, gradient = with_less_memory("STR matching", lambda: self._gradient(x), lean, knobs)
        if self._matching.task in NEW_CONTENT:  # what still reaches the inside comes by the network's receptive field
            gradient = gradient * (1 - mask_like(self._window.of_mask(self._step.mask), gradient))
        return loss, gradient

    def _lean(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self._run.low_memory = True
        return self._gradient(x)

    def _gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        run, patcher = self._step.run, self._step.run.guider.model_patcher
        recorder = FeatureRecorder(self._score.blocks, self._run.last_layer)
        tap = AttentionTap(patcher, [recorder], differentiable=True)
        family, half = family_of(patcher), run.base_model.get_dtype_inference() == torch.float16
        blocks = checkpointed(run.base_model.diffusion_model, family, tap, recorder)
        with blocks if self._run.low_memory else contextlib.nullcontext():
            loss, gradient = latent_gradient(
                run.base_model,
                x,
                self._step.sigma,
                self._cond(TARGET),
                lambda _: self._loss(recorder.features),
                model_options=self._window.options(run.model_options),
                tap=tap,
                needs=frozenset(IN_SPACE),
                loss_scale=HALF_PRECISION_SCALE if half else 1.0,
                mutates=family.mutates,
            )
        if not torch.isfinite(gradient).all():
            raise ValueError(
                f"STR matching: the gradient is not finite at step {self._step.index + 1} (sigma "
                f"{float(self._step.sigma):.4g}, layer {_first_bad_layer(recorder.features)}); try the model in bf16 "
                f"or fp32, or fewer layers"
            )
        return loss, gradient

    def _first_source(self) -> FeatureRecorder:
        """Records the source, learns where the forward may end, and has the host make room for the first gradient."""
        run = self._step.run
        meter = ActivationMeter(run.base_model.diffusion_model, family_of(run.trajectory.model))
        recorder = FeatureRecorder(self._score.blocks)
        counted: dict[int, GradientMemory] = {}  # when so many layers had been recorded

        def count(_) -> None:
            counted.setdefault(len(recorder.grids), meter.memory)

        with meter.open():
            self._record_source(recorder, count)
        if not recorder.features:
            raise ValueError(
                "layers: none of the chosen blocks has a spatial and a temporal attention of one size, or one over both"
            )
        if recorder.unpaired:
            log.info("STR score: skipped layers without temporal partner: %s", ", ".join(recorder.unpaired))
        self._run.last_layer = next(reversed(recorder.features))
        features = recorder.features.values()
        loss, small_loss = loss_memory(features), loss_memory(features, SMALLER_TILES)
        self._run.memory = replace(counted[len(recorder.grids)], loss=loss, small_loss=small_loss)
        self._make_room(self._run.memory)
        return recorder

    def _next_source(self) -> FeatureRecorder:
        recorder = FeatureRecorder(self._score.blocks, self._run.last_layer)
        self._record_source(recorder)
        return recorder

    def _make_room(self, memory: GradientMemory) -> None:
        management, device = comfy.model_management, self._step.run.guider.model_patcher.load_device
        self._step.run.reserve(memory.total(checkpointing=self._run.low_memory))
        if not self._run.low_memory and memory.total(checkpointing=False) > management.get_free_memory(device):
            log.info("STR matching: keeps no activations, %.1f GB would not fit", memory.total(False) / 1e9)
            self._run.low_memory = True

    def _record_source(self, *listeners: Listener) -> None:
        run, x = self._step.run, self._window.of(self._step.source)
        # by the target's kernel, to the bit
        tap = AttentionTap(run.trajectory.model, listeners, differentiable=True, unheard=self._say_unheard)
        options, needs = self._window.options(run.source_options), frozenset(IN_SPACE)
        cond = self._cond(SOURCE)
        call_model(run.base_model, [cond], x, self._step.sigma, options, tap=tap, needs=needs, source=True)

    def _say_unheard(self, _: ModelRun, layers: list[Layer]) -> None:
        """After the first pass, which is a whole one: layers in which another pack stands in for the attention."""
        lost = [layer for layer in layers if layer.kind in (*IN_SPACE, "temporal")]
        if lost:
            self._step.run.say(
                f"STR matching: another node replaces the attention of {len(lost)} layers (such as {lost[0].path}), "
                f"which are not matched. Remove it to match them."
            )

    def _cond(self, name: str) -> dict:
        cond = leading_cond(self._window.conds[name], self._step.sigma, name)
        if self._window.own is not None and "control" in cond:
            raise ValueError(f"{name}: in context windows no gradient can follow a ControlNet; remove one of them")
        return cond

    def _hidden_inside_mask(self) -> dict[str, Tensor]:
        """By layer, the weight (F, N) of each token: 0 in the mask, 1 outside."""
        mask = normal_tensor(self._window.of_mask(self._step.mask).float())
        with torch.inference_mode(False):
            return {path: 1 - to_latent_grid(mask, *self._grids[path][1:]).flatten(1) for path in self._source}

    def _loss(self, target: dict[str, AttentionFeatures]) -> Tensor:
        losses = []
        for path, source in self._source.items():
            rows = small_tile(source) if self._run.low_memory else None
            weight = self._weights.get(path)
            losses.append(matching_loss(source, target[path], rows=rows, weight=weight, **self._score.form))
        return torch.stack(losses).mean()


def _first_bad_layer(features: dict[str, AttentionFeatures]) -> str:
    for path, f in features.items():
        if not all(torch.isfinite(t).all() for t in f.tensors):
            return path
    return "unknown, in the backward pass"
