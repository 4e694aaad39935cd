"""STR matching as a before-step function of the edit loop (STR-Match, arXiv 2506.22868)."""

import logging
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import comfy.model_management as management
import torch
from torch import Tensor

from ..core.masks import redraw_inside, to_latent_grid
from ..core.polyak_step import ROUNDING, polyak_move
from ..core.relevance import AttentionFeatures, Paths, matching_loss
from ..core.trajectory import Trajectory
from .attention_call import ModelRun
from .attention_tap import AttentionTap, Listener
from .families import IN_SPACE, Family, family_of
from .features import FeatureRecorder
from .gradient_pass import GradientPass, ModelCall
from .gradients import normal_tensor
from .inflation import inflation_of
from .latents import mask_like
from .layers import Layer, attention_layers, parse_blocks, select_blocks
from .memory import SMALLER_TILES, GradientMemory, loss_memory, small_tile
from .model_pass import Window, by_window, call_model
from .sampling import Step

log = logging.getLogger("spacetime_edit")

LARGEST_LAMBDA = 2.0
MOST_ROUNDING = 1e-4
"""Of `polyak_step.ROUNDING` in types of few bits, so that something is left to match."""
LONGEST_MOVE = 0.5
"""RMS of one move at most, in standard deviations of the latent."""

DIRECT: Paths = "spatial-temporal"
"""The only form of a score that goes along no path."""

Task = Literal["change", "delete", "add"]

NEW_CONTENT: tuple[Task, ...] = ("delete", "add")
"""Tasks for which nothing inside the mask is to be matched."""

MemoryMode = Literal["auto", "low"]

TARGET, SOURCE, LOSS = "positive", "positive of Invert Video", "the match"
"""Names of the two prompts and of the loss, for errors."""
KNOBS = "the layers of Capture STR Score (such as m0)"


@dataclass(frozen=True)
class STRScore:
    """What to match: the source clip's trajectory, the blocks to look at (None: all but the finest), the score's form.

    radius, paths, bidirectional, per_pair: as in `core.relevance.str_score`, radius 0: all frames.
    """

    trajectory: Trajectory
    blocks: frozenset[str] | None
    radius: int = 0
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


def str_score_of(trajectory: Trajectory, layers: str = "", radius: int = 0, **form) -> STRScore:
    """Validates a choice of layers on the trajectory's model; ValueError without temporal attention.

    radius 0: all frames, or where self-attention spans them all, which makes each pair of frames costly, the adjacent
    ones. form: paths, bidirectional and per_pair of `STRScore`.
    """
    found = attention_layers(trajectory.model).values()
    if lacking := lacks_for_relevance(trajectory.model):
        raise ValueError(
            f"trajectory: its model ({family_of(trajectory.model).name}) has no {lacking}, which the STR score is "
            f"built from; load a text-to-video model such as Zeroscope, or inflate this one (all frames) before the "
            f"inversion"
        )
    if radius < 0:
        raise ValueError(f"radius is {radius}, expected a number of frames, or 0 for the model's own choice")
    in_one_attention = sees_all_frames(trajectory.model)
    if in_one_attention and form.get("paths", DIRECT) != DIRECT:
        raise ValueError(
            f"paths: it is {form['paths']!r}, but attention of {family_of(trajectory.model).name} sees all frames at "
            f"once, so the score goes along no path; set it to {DIRECT!r}"
        )
    blocks = {layer.block for layer in found if layer.kind in IN_SPACE}
    layers = layers if layers.strip() else _default_blocks(family_of(trajectory.model), blocks)
    chosen = select_blocks(layers, blocks) if layers.strip() else None
    return STRScore(trajectory, chosen, radius or int(in_one_attention), **form)


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

    strength: lambda, how much of the way to a full match one move goes, see `core.polyak_step`. start, end: percent of
    denoising in [0, 1] where it acts. iterations: moves a step. task: "change" moves the latent inside a mask, where
    there is one; "delete" and "add" leave what lies inside the mask out of the score, so that nothing there must be
    matched, and move the latent outside it only. memory: "low" keeps no activations (block checkpointing) and forms the
    score in small tiles; "auto" does so when memory is short.
    """

    score: STRScore
    strength: float = 1.0
    start: float = 0.0
    end: float = 1.0
    iterations: int = 1
    task: Task = "change"
    memory: MemoryMode = "auto"

    def __post_init__(self):
        if not 0 <= self.strength <= LARGEST_LAMBDA:
            raise ValueError(
                f"lambda: it is {self.strength}; expected a share of the way to a full match, from 0 (none) to "
                f"{LARGEST_LAMBDA:g} (1: all of it)"
            )
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
        run = step.run.memo.setdefault(self, _MatchingRun(self))
        cosines = []
        for _ in range(self.iterations):
            loss, move = run.move(x, step)
            x = x + move
            cosines.append(-loss)
        report = MatchedStep(step.percent, tuple(cosines), run.take.memory, run.take.low_memory)
        step.run.records.append(report)
        return x


def redraw_noise(x: Tensor, step: Step) -> Tensor:
    """Before-step function for NEW_CONTENT: begins inside the mask from noise that holds nothing of the source there.

    Inverted noise remembers the object it was inverted from. The new noise follows the seed of the run. ValueError for
    a later start: there the cells that noise is drawn from hold the picture of the background.
    """
    if step.index > 0:
        return x
    first = float(step.run.trajectory.sigmas[0])
    if float(step.sigma) < first * (1 - 1e-4):
        raise ValueError(
            f"sigmas: they begin at {float(step.sigma):.4g}, the trajectory at {first:.4g}, but tasks delete and add "
            f"begin from new noise, which is noise alone at the beginning only; connect all sigmas (no SplitSigmas, "
            f"denoise 1), or choose task change"
        )
    frames_last = x.movedim(0, 1) if x.ndim == 4 else x  # (C, F, h, w) or (1, C, F, h, w)
    redrawn = redraw_inside(frames_last, step.mask, torch.Generator().manual_seed(step.run.seed))
    return redrawn.movedim(1, 0) if x.ndim == 4 else redrawn


class _Source(NamedTuple):
    """What a window of the target is matched with: features by layer, and the weight (F, N) of their tokens."""

    features: dict[str, AttentionFeatures]
    weights: dict[str, Tensor]


class _MatchingRun:
    """One run of matching: what is known after its first step, and the source of the step that it is at."""

    def __init__(self, matching: RelevanceMatching):
        self._matching, self._score = matching, matching.score
        self.take = GradientPass("STR matching", KNOBS, matching.memory == "low")
        self._last_layer: str | None = None
        self._whole: tuple[int, _Source] | None = None  # of the clip without windows, for all iterations of a step

    def move(self, x: Tensor, step: Step) -> tuple[float, Tensor]:
        """(loss, what to add to x); in context windows each window's, blended."""
        longest = LONGEST_MOVE * float(step.space.latent_scale(step.sigma))
        conds = {TARGET: step.run.guider.conds["positive"], SOURCE: step.run.source_conds}

        def of_window(window: Window) -> tuple[float, Tensor]:
            if window.frames is not None and len(window.frames) < 2:
                raise ValueError(
                    "model: a context window shows one frame, which has no neighbours to match; choose another "
                    "context_length or context_overlap in Context Windows"
                )
            source, recorder = self._source(window, step), FeatureRecorder(self._score.blocks, self._last_layer)
            cond, options = window.leading_cond(TARGET, step.sigma, x), window.options(step.run.model_options)
            patcher = step.run.guider.model_patcher
            asked = ModelCall(step.run.base_model, patcher, cond, step.sigma, options, step.index + 1)
            made = self.take(asked, window.of(x), recorder, {LOSS: partial(self._loss, source, recorder)})
            loss, gradient = made.losses[LOSS], made.gradients[LOSS]
            direction = window.own_frames(gradient)
            if step.mask is not None:  # of new content, what still reaches the inside comes by the receptive field
                inside = mask_like(window.of_mask(step.mask), gradient)
                direction = direction * (1 - inside if self._matching.task in NEW_CONTENT else inside)
            eps = torch.finfo(step.run.base_model.get_dtype_inference()).eps
            rounding = min(max(ROUNDING, eps**2), MOST_ROUNDING)  # a cosine feels the square of what its vectors do
            options = {"share": self._matching.strength, "longest": longest, "rounding": rounding}
            return loss, polyak_move(loss, gradient, direction, **options)

        return by_window(x, step.sigma, step.run.base_model, step.run.model_options, conds, 1, of_window)

    def _source(self, window: Window, step: Step) -> _Source:
        if window.own is None and self._whole is not None and self._whole[0] == step.index:
            return self._whole[1]
        recorder = self._first_source(window, step) if self._last_layer is None else self._next_source(window, step)
        features = {path: f.map(normal_tensor) for path, f in recorder.features.items()}
        hides = self._matching.task in NEW_CONTENT
        source = _Source(features, self._hidden_inside_mask(window, step, recorder) if hides else {})
        if window.own is None:
            self._whole = step.index, source
        return source

    def _first_source(self, window: Window, step: Step) -> FeatureRecorder:
        """Records the source, learns where the forward may end, and has the host make room for the first gradient."""
        run, recorder = step.run, FeatureRecorder(self._score.blocks)
        meter = self.take.meter(run.base_model, run.trajectory.model)
        counted: dict[int, GradientMemory] = {}  # when so many layers had been recorded

        def count(_) -> None:
            counted.setdefault(len(recorder.grids), meter.memory)

        with meter.open():
            self._record_source(window, step, recorder, count)
        if not recorder.features:
            raise ValueError(
                "layers: none of the chosen blocks has a spatial and a temporal attention of one size, or one over both"
            )
        if recorder.unpaired:
            log.info("STR score: skipped layers without temporal partner: %s", ", ".join(recorder.unpaired))
        self._last_layer = next(reversed(recorder.features))
        features = recorder.features.values()
        loss, small_loss = loss_memory(features), loss_memory(features, SMALLER_TILES)
        memory = replace(counted[len(recorder.grids)], loss=loss, small_loss=small_loss)
        self.take.make_room(memory, run.models)
        return recorder

    def _next_source(self, window: Window, step: Step) -> FeatureRecorder:
        recorder = FeatureRecorder(self._score.blocks, self._last_layer)
        self._record_source(window, step, recorder)
        return recorder

    def _record_source(self, window: Window, step: Step, *listeners: Listener) -> None:
        run, x = step.run, window.of(step.source)

        def say_unheard(_: ModelRun, layers: list[Layer]) -> None:  # the first pass is a whole one
            lost = [layer for layer in layers if layer.kind in (*IN_SPACE, "temporal")]
            if lost:
                run.say(
                    f"STR matching: another node replaces the attention of {len(lost)} layers (such as "
                    f"{lost[0].path}), which are not matched. Remove it to match them."
                )

        # by the target's kernel, to the bit
        tap = AttentionTap(run.trajectory.model, listeners, differentiable=True, unheard=say_unheard)
        options, needs = window.options(run.source_options), frozenset(IN_SPACE)
        cond = window.leading_cond(SOURCE, step.sigma, x)
        call_model(run.base_model, [cond], x, step.sigma, options, tap=tap, needs=needs, source=True)

    @staticmethod
    def _hidden_inside_mask(window: Window, step: Step, recorder: FeatureRecorder) -> dict[str, Tensor]:
        """By layer, the weight (F, N) of each token: 0 in the mask, 1 outside."""
        mask = normal_tensor(window.of_mask(step.mask).float())
        with torch.inference_mode(False):
            return {path: 1 - to_latent_grid(mask, *grid[1:]).flatten(1) for path, grid in recorder.grids.items()}

    def _loss(self, source: _Source, recorder: FeatureRecorder) -> Tensor:
        """The mean over the layers; not those in which the mask hides everything, whose loss could not fall."""
        target, features = recorder.features, source.features
        left = {path: own for path, own in features.items() if path not in source.weights or source.weights[path].any()}
        losses, stop = [], management.throw_exception_if_processing_interrupted
        for path, own in (left or features).items():
            rows, weight = small_tile(own) if self.take.low_memory else None, source.weights.get(path)
            losses.append(matching_loss(own, target[path], rows=rows, weight=weight, on_tile=stop, **self._score.form))
        return torch.stack(losses).mean()
