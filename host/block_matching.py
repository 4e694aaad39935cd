"""Which blocks of a model carry the match of STR scores, and how far a move along their gradients goes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import comfy.model_management as management
import torch
from torch import Tensor

from ..core.polyak_step import polyak_move
from ..core.relevance import matching_loss
from .attention_tap import AttentionTap
from .features import FeatureRecorder
from .gradient_pass import GradientPass, ModelCall
from .gradients import normal_tensor
from .layers import attention_layers
from .memory import SMALLER_TILES, loss_memory, peak_bytes, small_tile
from .model_pass import Window, by_window, call_model
from .relevance_matching import LONGEST_MOVE, sees_all_frames

AWAY = 0.3
"""How far from the source's latent matching begins, in its standard deviations."""
LAMBDAS = (0.5, 1.0, 1.5)
SMALL = 0.1
"""Part of a move that is short enough for the loss to be nearly linear along it."""


@dataclass(frozen=True)
class BlockMatch:
    """How far one move along the gradient of a block's own loss goes, with lambda 1.

    before, after: cosines of the block's scores; gain: by how much the cosine of all tried blocks rises. right: whether
    a small part of the move raises the block's cosine, as a gradient that is right does.
    """

    block: str
    before: float
    after: float
    gain: float
    right: bool

    @property
    def share(self) -> float:
        """Of the way to a full match."""
        return (self.after - self.before) / max(1 - self.before, 1e-9)


class BlockTrial:
    """Tries each of some blocks inside a run of the host, on a source latent and one that is a little away from it.

    In a model with context windows it sees the first. Afterwards: `blocks`; strength: the lambda that goes furthest for
    all of them, None where none goes forward; memory: (predicted, measured bytes) of one gradient, None where a first
    try ran out of memory.
    """

    def __init__(self, model, source: Tensor, names: Sequence[str]):
        self._model, self._source, self._names = model, source, names
        self._wanted, self._layers = frozenset(names), attention_layers(model)
        self._radius = int(sees_all_frames(model))
        self.blocks: list[BlockMatch] = []
        self.strength: float | None = None
        self.memory: tuple[int, int] | None = None

    def __call__(self, guider, sigma: Tensor, options: dict) -> None:
        whole = self._source.to(sigma)

        def look(window: Window) -> None:
            self._in(window, guider, sigma, window.options(options), whole)

        in_first_window(guider, sigma, options, whole, look)

    def _in(self, window: Window, guider, sigma: Tensor, options: dict, whole: Tensor) -> None:
        base, source = guider.inner_model, window.of(whole)
        cond = window.leading_cond("positive", sigma, source)
        noise = torch.randn(source.shape, generator=torch.Generator().manual_seed(1)).to(source)
        x, longest = source + AWAY * source.std() * noise, LONGEST_MOVE * float(source.std())
        take, moving = GradientPass("Check Model", "the number of frames"), FeatureRecorder(self._wanted)

        def recorded(x: Tensor, of_source: bool = False) -> FeatureRecorder:
            """Of a pass without gradient, by the kernels of one with it."""
            recorder = FeatureRecorder(self._wanted)
            tap = AttentionTap(self._model, [recorder], differentiable=True)
            call_model(base, [cond], x, sigma, options, tap=tap, source=of_source)
            return recorder

        meter = take.meter(base, self._model)
        with meter.open():
            seen = recorded(source, of_source=True)
        kept = {path: own.map(normal_tensor) for path, own in seen.features.items()}
        loss, small = loss_memory(kept.values()), loss_memory(kept.values(), SMALLER_TILES)
        predicted = replace(meter.memory, loss=loss, small_loss=small)

        def cosines(move: Tensor | float) -> dict[str, float]:
            recorder = recorded(x + move)
            return {name: -float(self._loss(name, kept, recorder)) for name in self._names}

        take.make_room(predicted, [guider.model_patcher, *guider.loaded_models])
        low = take.low_memory
        asked = ModelCall(base, self._model, cond, sigma, options, 1)
        losses = {name: partial(self._loss, name, kept, moving, low) for name in self._names}
        with peak_bytes(x.device) as peak:
            made = take(asked, x, moving, losses)
        self.memory = (predicted.total(low), peak()) if take.low_memory == low else None
        before = _mean(cosines(0.0))
        for name, loss in made.losses.items():
            move = polyak_move(loss, made.gradients[name], longest=longest)
            after, right = cosines(move), cosines(SMALL * move)[name] > -loss
            self.blocks.append(BlockMatch(name, -loss, after[name], _mean(after) - before, right))
        together = sum(made.gradients.values()) / len(self._names)
        reached = {
            share: _mean(cosines(polyak_move(-before, together, share=share, longest=longest))) for share in LAMBDAS
        }
        best = max(reached, key=reached.get)
        self.strength = best if reached[best] > before else None

    def _loss(self, name: str, kept: Mapping, recorder: FeatureRecorder, low: bool = False) -> Tensor:
        """Of one block; low: in small tiles."""
        found, stop = recorder.features, management.throw_exception_if_processing_interrupted
        paths = [path for path in kept if self._layers[path].block == name]
        return torch.stack(
            [
                matching_loss(
                    kept[p], found[p], rows=small_tile(kept[p]) if low else None, radius=self._radius, on_tile=stop
                )
                for p in paths
            ]
        ).mean()


def in_first_window(guider, sigma: Tensor, options: dict, x: Tensor, look: Callable[[Window], None]) -> None:
    """Calls `look` once, with the first context window of a run, or with the whole clip where there are none."""
    looked = []

    def once(window: Window) -> None:
        if not looked:
            looked.append(window)
            look(window)

    by_window(x, sigma, guider.inner_model, options, guider.conds, 0, once)


def _mean(values: Mapping[str, float]) -> float:
    return sum(values.values()) / len(values)
