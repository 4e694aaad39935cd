"""Memory of a gradient pass, predicted from one pass without gradient at the same size; and what code takes."""

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.live_memory import PeakMemory
from ..core.relevance import AttentionFeatures, tile_elements, tile_rows
from .families import Family

LOSS_TILES = 12
"""Tiles of the score that live at once in the backward pass of the loss, rather too many than too few."""
LOGITS = 3
"""As `LOSS_TILES`, of logits of all frames, where attention spans them."""
COPIES, COPIES_OF_JOINT = 3, 4.25
"""Of features in float32, gradients included; attention over all frames has them once more, frames side by side."""


@dataclass(frozen=True)
class GradientMemory:
    """Bytes beyond the weights: activations kept by a plain pass, or with block checkpointing, and the loss's own.

    small_loss: the loss in the smaller tiles that go with checkpointing.
    """

    plain: int
    checkpointed: int
    loss: int = 0
    small_loss: int = 0

    def total(self, checkpointing: bool) -> int:
        """Peak bytes of a gradient pass."""
        return self.checkpointed + self.small_loss if checkpointing else self.plain + self.loss


class ActivationMeter:
    """Adds up what the modules of a network put out while it is open; the run may end early.

    A gradient pass keeps about that much: convolutions and linear layers keep nothing of their input here, norms,
    activations and attention keep theirs.
    """

    def __init__(self, network: torch.nn.Module, family: Family):
        self._network, self._blocks, self._unseen = network, re.compile(family.blocks), family.unseen
        self._within: str | None = None
        self._of_block: dict[str, int] = {}
        self._inputs = self._outside = 0

    @property
    def memory(self) -> GradientMemory:
        """What a gradient pass over the same modules takes."""
        inside = [round(self._unseen * size) for size in self._of_block.values()]
        plain = self._outside + sum(inside)
        return GradientMemory(plain, self._outside + self._inputs + max(inside, default=0))

    @contextlib.contextmanager
    def open(self):
        handles = []
        try:
            for path, module in self._network.named_modules():
                if self._blocks.fullmatch(path) and any(module.children()):
                    handles.append(module.register_forward_pre_hook(self._enter(path), with_kwargs=True))
                    handles.append(module.register_forward_hook(self._leave, always_call=True))
                elif not any(module.children()) and not isinstance(module, (torch.nn.Dropout, torch.nn.Identity)):
                    handles.append(module.register_forward_hook(self._count))
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, path: str):
        def enter(module, args, kwargs):
            self._within = path
            self._of_block.setdefault(path, 0)
            self._inputs += next(filter(None, map(_bytes, (*args, *kwargs.values()))), 0)

        return enter

    def _leave(self, *_):
        self._within = None

    def _count(self, module, args, output):
        if self._within is None:
            self._outside += _bytes(output)
        else:
            self._of_block[self._within] += _bytes(output)


SMALLER_TILES = 32
"""How many times smaller the score's tiles are when memory is short."""


def small_tile(features: AttentionFeatures) -> int:
    """Tokens along a tile of the score when memory is short."""
    return tile_rows(features, SMALLER_TILES)


def loss_memory(features: Iterable[AttentionFeatures], smaller: int = 1) -> int:
    """Bytes that matching these layers takes: features of both clips in float32, their gradients, tiles of scores.

    smaller: how many times smaller than usual the tiles are.
    """
    kept = tile = logits = 0
    for f in features:
        frames, heads, tokens, _ = f.query.shape
        kept += sum(t.numel() for t in f.tensors) * (COPIES if f.temporal is not None else COPIES_OF_JOINT)
        most = tile_elements(f.query.device.type) // smaller
        tile = max(tile, min(most, frames * heads * tokens**2))
        if f.temporal is None:
            logits = max(logits, min(most, heads * (frames * tokens) ** 2))
    return round(4 * (kept + LOSS_TILES * tile + LOGITS * logits))


@contextlib.contextmanager
def peak_bytes(device: torch.device) -> Iterator[Callable[[], int]]:
    """Within and afterwards: what says the most bytes that lived at once on a device beyond those before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield lambda: torch.cuda.max_memory_allocated(device) - before
    else:
        with PeakMemory() as watched:
            yield lambda: watched.peak


def _bytes(value) -> int:
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0
