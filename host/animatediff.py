"""AnimateDiff-Evolved's attention over time, which calls its kernel itself: for a run, our taps see it too.

Each temporal attention module of that pack holds its kernel in the attribute `actual_attention`, which takes query,
key, value, heads and mask. Within `bridged` that attribute leads through a tap instead; overrides of the host's
attention that other packs set do not see these calls, and do not see them here either.
"""

import contextlib
from collections.abc import Callable, Iterable

from torch.nn import Module

SLOT = "actual_attention"
SETTINGS = "ADE_params"
"""Key of that pack's settings among a ModelPatcher's attachments."""
PARAMETERS = "ad_params"
"""Key of that pack's account of a run in the transformer_options."""


def window_of(options: dict) -> tuple[tuple[int, ...], int] | None:
    """(frames, frames of the whole clip) of a run on one of that pack's own sliding windows; None for any other run."""
    parameters = options.get(PARAMETERS) or {}
    frames = parameters.get("sub_idxs")
    return None if frames is None else (tuple(frames), parameters["full_length"])


def window_length(model) -> int | None:
    """Frames of that pack's own windows (its context options) on a ModelPatcher; None where it has none."""
    options = getattr(model.attachments.get(SETTINGS), "context_options", None)
    return getattr(options, "context_length", None)


class _Bridge:
    """Stands in for a kernel, and hands its calls to `attention(previous, kernel, *arguments)` of a tap."""

    def __init__(self, attention: Callable, inner: Callable):
        self._attention = attention
        outer_of = isinstance(inner, _Bridge)
        self.kernel, self._previous = (inner.kernel, inner.attend) if outer_of else (inner, None)

    def __call__(self, query, key, value, heads, mask=None, *args, **kwargs):
        return self.attend(self.kernel, query, key, value, heads, mask, *args, **kwargs)

    def attend(self, kernel: Callable, *args, **kwargs):
        """In the way of the host's overrides: by `kernel`, or through the taps that were there before."""
        return self._attention(self._previous, kernel, *args, **kwargs)


@contextlib.contextmanager
def bridged(modules: Iterable[Module], attention: Callable):
    """Within, those of `modules` that hold a kernel of their own call `attention` in its place; restored on exit."""
    before = [(module, module.__dict__[SLOT]) for module in modules if SLOT in module.__dict__]
    try:
        for module, kernel in before:
            setattr(module, SLOT, _Bridge(attention, kernel))
        yield
    finally:
        for module, kernel in before:
            setattr(module, SLOT, kernel)
