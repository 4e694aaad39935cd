"""Regions: a phrase with a mask for each frame, and what of them a token belongs to (ST-Modulator, arXiv 2502.17258).

Shape letters: F frames of the masks, f frames of a token grid (h, w), N = h w tokens a frame, K regions, L text tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, adaptive_max_pool2d, interpolate

from .frames import FrameMap
from .masks import as_frames

Pooling = Literal["area", "max", "nearest"]
Over = Literal["clip", "frame"]

ONLY, EVERY = 0, -1
"""Values of `Region.occurrence` besides 1, 2, ... for the n-th."""
OCCURRENCES = {"once": ONLY, "every": EVERY, "first": 1, "second": 2, "third": 3, "fourth": 4, "fifth": 5}
"""The same by their names."""

PART = 0.9  # share of a region that lies within another, which makes it a part of that
TINY = 1e-6
THIN = 0.5  # membership that the best token of a region has at least
MASKS = "regions: their masks (Regions from Masks gives each line of phrases an equal part of its own) have"


class PhraseError(ValueError):
    """A phrase is not in its prompt, or more than once without a choice; the caller knows the words."""


@dataclass(frozen=True, eq=False)
class Region:
    """phrase: words of the prompt, or "" for a region without text. mask: (F, H, W) in [0, 1].

    occurrence: which place of the phrase in the prompt is meant: ONLY (there is but one), 1, 2, ..., or EVERY.
    """

    phrase: str
    mask: Tensor
    occurrence: int = ONLY

    def __post_init__(self):
        if not self.mask.numel() or not self.mask.isfinite().all():
            raise ValueError(
                f"mask of {self.phrase!r}: it {'holds NaN or infinity' if self.mask.numel() else 'has no frame'}; "
                f"expected one mask for the clip or one a frame, from 0 to 1"
            )


# --- masks --------------------------------------------------------------


def same_frames(regions: Sequence[Region]) -> Tensor:
    """The masks of all regions, (K, F, H, W) in [0, 1]; a mask of one frame holds for all.

    Raises ValueError where sizes or numbers of frames differ, naming the region.
    """
    frames = max(region.mask.reshape(-1, *region.mask.shape[-2:]).shape[0] for region in regions)
    masks = []
    for number, region in enumerate(regions, start=1):
        name = f"region {number} ({region.phrase!r})"
        mask = as_frames(region.mask.float().clamp(0, 1), frames, name)
        if masks and mask.shape != masks[0].shape:
            raise ValueError(
                f"{name}: its mask has {mask.shape[2]} x {mask.shape[1]} pixels, the first region's "
                f"{masks[0].shape[2]} x {masks[0].shape[1]}; all masks of a clip need one size"
            )
        masks.append(mask)
    return torch.stack(masks)


def partition(masks: Tensor) -> Tensor:
    """(K, F, H, W) -> (K + 1, F, H, W) that sum to 1: each pixel to its front region, the last layer to none.

    A part lies before what it is a part of; else a later region lies before an earlier one. Soft pixels are shared.
    """
    shares, left = torch.empty(len(masks) + 1, *masks.shape[1:]), torch.ones_like(masks[0])
    for k in _front_first(masks):
        shares[k] = masks[k] * left
        left = left * (1 - masks[k])
    shares[-1] = left
    return shares


def _front_first(masks: Tensor) -> list[int]:
    """Numbers of the regions: from the last to the first, each behind its parts."""
    covered, order = [float(mask.sum()) for mask in masks], []

    def is_part(k: int, of: int) -> bool:
        return 0 < covered[k] < covered[of] and float(torch.minimum(masks[k], masks[of]).sum()) >= PART * covered[k]

    def put(k: int) -> None:
        if k in order:
            return
        for part in reversed(range(len(masks))):
            if is_part(part, k):
                put(part)
        order.append(k)

    for k in reversed(range(len(masks))):
        put(k)
    return order


def membership(layers: Tensor, time: FrameMap, size: tuple[int, int], pooling: Pooling = "area") -> Tensor:
    """What of each token belongs to each layer (K, F, H, W): (f, N, K) in [0, 1] for frames of tokens of size (h, w).

    area: the share of the token's pixels. Of a partition the result sums to 1; a region that has at least a half of
    some pixel of a frame, but less than a half of every token, is scaled up to a half in its best one, at the cost of
    the others, so that thin parts survive. max: the largest pixel. nearest: the top left one, as the public code does.
    Over the frames that are one token it is the mean. F: the clip's, the latent's, or 1.
    """
    owned = time.in_tokens((layers.amax((2, 3)) >= 0.5).float().T, "maximum", MASKS).T > 0  # (K, f)
    layers = time.in_tokens(layers.transpose(0, 1), "mean", MASKS).transpose(0, 1)
    height, width = size
    flat = layers.flatten(0, 1)[:, None]
    if pooling == "area":
        pooled = adaptive_avg_pool2d(flat, (height, width))
    elif pooling == "max":
        pooled = adaptive_max_pool2d(flat, (height, width))
    else:
        pooled = interpolate(flat, (height, width), mode="nearest")
    tokens = pooled.unflatten(0, layers.shape[:2])[:, :, 0].flatten(2).permute(1, 2, 0)
    return _thin_parts_kept(tokens, owned.T) if pooling == "area" else tokens


def _thin_parts_kept(tokens: Tensor, owned: Tensor) -> Tensor:
    """(f, N, K) of a partition, its last layer the background; owned (f, K): whether a region has a pixel at all."""
    best = tokens.amax(1, keepdim=True)
    thin = owned[:, None] & (best < THIN)
    thin[..., -1] = False
    grown = torch.where(thin, tokens * (THIN / best.clamp(min=TINY)), 0.0)
    grown = grown / grown.sum(-1, keepdim=True).clamp(min=1)
    others = torch.where(thin, 0.0, tokens)
    left = (1 - grown.sum(-1, keepdim=True)) / others.sum(-1, keepdim=True).clamp(min=TINY)
    return torch.where(thin.any(-1, keepdim=True), grown + others * left, tokens)


def size_term(tokens: Tensor, over: Over = "clip", *, covered_twice: bool = False) -> Tensor:
    """(f, N, K) -> (f, N) in [0, 1]: 1 minus the share of the clip, or of the frame, that a token's regions cover.

    Large regions are modulated less (arXiv 2502.17258, section 3.2). covered_twice: divide by the frames once
    more, as the public code does, so that the term is about 1.
    """
    share = tokens.mean((0, 1)) if over == "clip" else tokens.mean(1, keepdim=True)
    if covered_twice:
        share = share / tokens.shape[0]
    return (1 - (tokens * share).sum(-1)).clamp(0, 1)


# --- words --------------------------------------------------------------


def phrase_positions(
    prompt: Sequence[object],
    phrase: Sequence[object],
    occurrence: int = ONLY,
    *,
    at_start: Sequence[object] = (),
    starts: Collection[int] = (),
) -> list[int]:
    """Where the tokens of a phrase stand in a prompt; both hold token numbers, None where there is no word.

    at_start: the tokens that it has instead at the places `starts`, where no word goes before it. A phrase may run over
    places without a word, for example from one chunk of 77 tokens to the next. Raises PhraseError where there is no
    such occurrence, or more than one and none is chosen.
    """
    places = [place for place, token in enumerate(prompt) if token is not None]
    words = [prompt[place] for place in places]
    found = []
    for start, place in enumerate(places):
        length = _length_at(words[start:], phrase)
        if place in starts:
            length = max(length, _length_at(words[start:], at_start))
        if length:
            found.append(places[start : start + length])
    if not found:
        raise PhraseError("it is not there")
    if occurrence == EVERY:
        return sorted({place for places in found for place in places})
    if occurrence == ONLY and len(found) > 1:
        raise PhraseError(f"it is there {len(found)} times, and no occurrence is chosen")
    if occurrence > len(found):
        raise PhraseError(f"it is there {len(found)} times, and occurrence {occurrence} is asked for")
    return found[max(occurrence, 1) - 1]


def _length_at(words: Sequence[object], phrase: Sequence[object]) -> int:
    """How many of the first words are the phrase's: all of its own, or 0."""
    wanted = [token for token in phrase if token is not None]
    same = len(words) >= len(wanted) and all(map(_same, words, wanted))
    return len(wanted) if same else 0


def _same(a: object, b: object) -> bool:
    """Equal token numbers; an embedding (a tensor) equals nothing."""
    return not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b


def token_regions(positions: Sequence[Sequence[int]], length: int) -> Tensor:
    """(L, K) in {0, 1}: which text tokens are of which region's phrase."""
    table = torch.zeros(length, len(positions))
    for k, places in enumerate(positions):
        table[list(places), k] = 1
    return table
