"""Spatial attention over several frames, for models made for single pictures.

All frames: each token attends to every token of the clip (VideoGrain, arXiv 2502.17258). First + previous: to those of
the first frame and of the one before (Tune-A-Video, arXiv 2212.11565, section 3.2).

Shape letters: B prompts, F frames, H heads, N tokens a frame, D head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, cat

Keys = Literal["all frames", "first + previous", "per frame"]


@dataclass(frozen=True)
class Inflation:
    """keys: which frames a token attends to. levels: how much coarser than the latent the grids are where it holds;
    None: everywhere. shared_norms: group norms of ResNet blocks take their statistics over the clip."""

    keys: Keys = "all frames"
    levels: frozenset[int] | None = None
    shared_norms: bool = False

    def __str__(self) -> str:
        levels = "" if self.levels is None else " at levels " + ",".join(map(str, sorted(self.levels)))
        return f"{self.keys}{levels}{', norms over the clip' if self.shared_norms else ''}"

    @property
    def neutral(self) -> bool:
        """Whether it changes nothing."""
        return self.keys == "per frame" and not self.shared_norms

    def at(self, level: int) -> bool:
        """Whether attention on a grid that is `level` times coarser than the latent spans frames."""
        return self.keys != "per frame" and (self.levels is None or level in self.levels)

    def frames_of_rows(self, frames: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """For each batch row of one prompt the frames of its queries and those of its keys."""
        if self.keys == "all frames":
            return [(tuple(range(frames)), tuple(range(frames)))]
        return [((f,), (0, max(f - 1, 0))) for f in range(frames)]

    def inflate(self, query: Tensor, key: Tensor, value: Tensor, frames: int) -> tuple[Tensor, Tensor, Tensor]:
        """(B F, H, N, D) each, prompt-major -> queries, keys and values of the rows of `frames_of_rows`."""
        if self.keys == "all frames":
            return _joined(query, frames), _joined(key, frames), _joined(value, frames)
        return query, _first_and_previous(key, frames), _first_and_previous(value, frames)

    def deflate(self, output: Tensor, frames: int) -> Tensor:
        """What attention gives for the queries of `inflate`, as (B F, H, N, D)."""
        if self.keys != "all frames":
            return output
        return output.unflatten(2, (frames, -1)).transpose(1, 2).flatten(0, 1)


def _joined(tensor: Tensor, frames: int) -> Tensor:
    """(B F, H, N, D) -> (B, H, F N, D)."""
    return tensor.unflatten(0, (-1, frames)).transpose(1, 2).flatten(2, 3)


def _first_and_previous(tensor: Tensor, frames: int) -> Tensor:
    """(B F, H, N, D) -> (B F, H, 2 N, D)."""
    by_prompt = tensor.unflatten(0, (-1, frames))
    first = by_prompt[:, :1].expand(-1, frames, -1, -1, -1)
    previous = cat([by_prompt[:, :1], by_prompt[:, :-1]], 1)
    return cat([first, previous], 3).flatten(0, 1)
