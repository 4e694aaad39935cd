"""How phrases reach attention: where the words of a region stand in an encoded prompt (decision D8)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from ..core.regions import EVERY, PhraseError, Region, phrase_positions

Mode = Literal["paper", "released"]


@dataclass(frozen=True, eq=False)
class Layout:
    """Regions and where their phrases stand in one prompt.

    positions: for each region the places of its words among the prompt's `length` text tokens; empty for a region
    without a phrase. mode: whose rules hold, see `region_patch`. words: the prompt's tokens, None where there is no
    word; tokenize: other words in the same way.
    """

    prompt: str
    regions: tuple[Region, ...]
    positions: tuple[tuple[int, ...], ...]
    length: int
    mode: Mode = "paper"
    words: tuple[object, ...] = field(default=(), repr=False)
    tokenize: Callable[[str], list[object]] | None = field(default=None, repr=False)


def positions_in(layout: Layout, phrase: str) -> list[int]:
    """Where words stand in the layout's prompt, at every occurrence. ValueError where there is none."""
    return _positions(layout.words, layout.prompt, phrase, layout.tokenize, EVERY)


def _positions(words: Sequence, prompt: str, phrase: str, tokenize: Callable, occurrence: int) -> list[int]:
    try:
        return phrase_positions(words, tokenize(phrase), occurrence)
    except PhraseError as error:
        raise ValueError(
            f"phrase {phrase!r} in the prompt {prompt!r}: {error}; write it into the prompt word for word, or "
            f"choose its occurrence"
        ) from error


def encode_regional_prompt(clip, prompt: str, regions: Sequence[Region], mode: Mode = "paper", splice: bool = False):
    """CONDITIONING of a prompt, and the Layout of the regions in it.

    splice: put the embedding of each phrase encoded by itself in its place, as the public code does: a phrase then
    knows nothing of the others. Raises ValueError naming phrase and prompt where a phrase is not in the prompt, or
    more than once and no occurrence is chosen.
    """

    def tokenize(text: str) -> list[object]:
        return _words(clip.tokenize(text, return_word_ids=True))

    words = tokenize(prompt)
    positions = [
        tuple(_positions(words, prompt, region.phrase, tokenize, region.occurrence)) if region.phrase.strip() else ()
        for region in regions
    ]
    conditioning = clip.encode_from_tokens_scheduled(clip.tokenize(prompt))
    for embedding, _ in conditioning:
        if embedding.shape[1] != len(words):
            raise ValueError(
                f"clip: it turns {len(words)} text tokens into {embedding.shape[1]} vectors, so the place of a phrase "
                f"is not known; regions need a CLIP text encoder"
            )
    if splice:
        conditioning = _spliced(clip, conditioning, regions, positions)
    return conditioning, Layout(prompt, tuple(regions), tuple(positions), len(words), mode, tuple(words), tokenize)


def _words(tokens: dict) -> list[object]:
    """The tokens of all chunks in a row, None where there is no word."""
    by_encoder = list(tokens.values())
    chunks = by_encoder[0]
    if any([len(c) for c in other] != [len(c) for c in chunks] for other in by_encoder[1:]):
        raise ValueError("clip: its text encoders cut a prompt in different ways; regions need CLIP text encoders only")
    return [token[0] if token[2] != 0 else None for chunk in chunks for token in chunk]


def _spliced(clip, conditioning: list, regions: Sequence[Region], positions: Sequence[Sequence[int]]) -> list:
    """The conditioning with the embeddings of phrases encoded by themselves."""
    alone = {}
    for region, places in zip(regions, positions, strict=True):
        if not places:
            continue
        tokens = clip.tokenize(region.phrase, return_word_ids=True)
        own = [i for i, word in enumerate(_words(tokens)) if word is not None]
        embedding = clip.encode_from_tokens_scheduled(clip.tokenize(region.phrase))[0][0]
        for start in range(0, len(places), len(own)):  # every occurrence
            for place, place_alone in zip(places[start:], own, strict=False):
                alone[place] = embedding[:, place_alone]
    return [[_with_rows(embedding, alone), settings] for embedding, settings in conditioning]


def _with_rows(embedding: Tensor, rows: dict[int, Tensor]) -> Tensor:
    embedding = embedding.clone()
    for place, row in rows.items():
        embedding[:, place] = row
    return embedding
