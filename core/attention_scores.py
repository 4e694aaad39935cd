"""Scores of an attention and their extrema, never as a whole: in tiles, with memory linear in tokens.

Shape letters: B batch, H heads, N queries, M keys, D head dimension.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate

import torch
from torch import Tensor

log = logging.getLogger("spacetime_edit")

HIDDEN = -1e4
"""An additive mask at or below this hides its key."""


@cache
def _kernels():
    """The module of Triton kernels; None where there is no Triton."""
    try:
        from . import region_kernels
    except ImportError as reason:  # on Windows, say: the package triton-windows brings it
        log.info("region attention: by PyTorch's attention, which is slower (%s)", reason)
        return None
    return region_kernels


def kernels_for(query: Tensor, value: Tensor):
    """The module of Triton kernels, where it takes tensors of this device, dtype and widths; else None."""
    if query.device.type != "cuda":
        return None
    kernels = _kernels()
    return kernels if kernels is not None and kernels.fits(query, value) else None


@dataclass(frozen=True)
class Scores:
    """scale <query, key> + mask, never as a whole."""

    query: Tensor
    key: Tensor
    scale: float
    mask: Tensor | None
    blocks: Sequence[int] | None
    tile: int

    @property
    def slices(self) -> list[slice]:
        """Of the keys, one a block."""
        ends = list(accumulate(self.blocks or [self.key.shape[2]]))
        return [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]

    @property
    def by_key(self) -> bool:
        """Whether the mask, if there is one, is the same for all rows."""
        return self.mask is None or self.mask.shape[2] == 1

    def hidden(self) -> Tensor | None:
        """(B or 1, 1, 1 or N, M): the keys that the mask hides."""
        return None if self.mask is None else self.mask <= HIDDEN

    def bias(self) -> Tensor | None:
        """The mask without its hidden keys; None if nothing is left."""
        if self.mask is None:
            return None
        rest = self.mask.masked_fill(self.mask <= HIDDEN, 0.0)
        return rest if rest.any() else None

    def row_tiles(self) -> list[slice]:
        step = max(1, self.tile // max(1, self.query.shape[0] * self.query.shape[1] * self.key.shape[2]))
        return [slice(start, start + step) for start in range(0, self.query.shape[2], step)]

    def of_rows(self, rows: slice) -> Scores:
        """Those of some queries."""
        mask = self.mask if self.by_key else self.mask[:, :, rows]
        return replace(self, query=self.query[:, :, rows], mask=mask)

    def formed(self) -> Tensor:
        """(B, H, N, M), hidden keys left as they are."""
        scores = self.query * self.scale @ self.key.mT
        bias = self.bias()
        return scores if bias is None else scores + bias

    def extrema(self, keys: slice) -> tuple[Tensor, Tensor]:
        """Lowest and highest score of each row over a block of keys, each (B, H, N) in float32 or better.

        With a graph to build, or in half precision, only the indices are searched, and the two scores are formed again
        from them: they carry gradients, and the precision of one inner product.
        """
        wide = self.query.dtype in (torch.float32, torch.float64)
        recorded = torch.is_grad_enabled() and (self.query.requires_grad or self.key.requires_grad)
        low, high = self._searched(keys, values=wide and not recorded)
        return (low, high) if wide and not recorded else (self._score_of(low), self._score_of(high))

    @torch.no_grad()
    def _searched(self, keys: slice, values: bool) -> tuple[Tensor, Tensor]:
        """Values, or indices among all keys, of each row's lowest and highest score in a block of keys."""
        if self.by_key and (kernels := kernels_for(self.query, self.key)) is not None:
            found = kernels.extrema(self.query, self.key, keys, scale=self.scale, mask=self.mask)
            return found[0] if values else found[1]
        batch, heads, n, _ = self.query.shape
        key, bias, hidden = self.key[:, :, keys].mT, self.bias(), self.hidden()
        width = key.shape[-1]
        together = max(1, self.tile // (n * width)) if n * width < self.tile else 1  # whole heads, if they are small
        step = n if together > 1 else max(1, self.tile // width)
        found = [self.query.new_empty(batch, heads, n, dtype=None if values else torch.long) for _ in range(2)]
        for b in range(batch):
            of_bias, of_hidden = (None if t is None else t[min(b, len(t) - 1), :, :, keys] for t in (bias, hidden))
            for first in range(0, heads, together):
                at = slice(first, first + together)
                for start in range(0, n, step):
                    rows = slice(start, start + step)
                    scores = self.query[b, at, rows] * self.scale @ key[b, at]  # in this order: float16 is narrow
                    low, high = _extrema_of(scores, of_bias, of_hidden, values)
                    found[0][b, at, rows], found[1][b, at, rows] = low, high
        return tuple(found) if values else tuple(index + (keys.start or 0) for index in found)

    def _score_of(self, index: Tensor) -> Tensor:
        """The scores of one key a row, index (B, H, N)."""
        wide = torch.promote_types(self.query.dtype, torch.float32)
        chosen = self.key.gather(2, index[..., None].expand(*index.shape, self.key.shape[-1]))
        score = (self.query.to(wide) * chosen.to(wide)).sum(-1) * self.scale
        bias = self.bias()
        if bias is None:
            return score
        return score + bias.to(wide).expand(*index.shape[:2], 1, -1)[:, :, 0].gather(2, index)


def _extrema_of(scores: Tensor, bias: Tensor | None, hidden: Tensor | None, values: bool) -> tuple[Tensor, Tensor]:
    """Values or indices of the lowest and highest of each row, hidden keys left out."""
    if bias is not None:
        scores = scores + bias
    low = high = scores
    if hidden is not None:
        low, high = scores.masked_fill(hidden, torch.inf), scores.masked_fill(hidden, -torch.inf)
    if not values:
        return low.argmin(-1), high.argmax(-1)
    low, high = low.amin(-1), high.amax(-1)  # not aminmax, which is three times as slow on a CPU
    nothing = low > high  # all keys of the block are hidden
    return low.masked_fill(nothing, 0.0), high.masked_fill(nothing, 0.0)
