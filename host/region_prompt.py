"""How phrases reach attention: where the words of a region stand in an encoded prompt (decision D8)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice, takewhile
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
    spellings = [tokenize(space + text) for text in (phrase, phrase[:1].swapcase() + phrase[1:]) for space in ("", " ")]
    try:
        return phrase_positions(words, spellings[0], occurrence, spellings[1:])
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
    around = _tokens(clip, "")

    def tokenize(text: str) -> list[object]:
        return _without_template(_tokens(clip, text), around)

    words, templated = tokenize(prompt), any(token is not None for token in around)
    positions = [
        tuple(_positions(words, prompt, region.phrase, tokenize, region.occurrence)) if region.phrase.strip() else ()
        for region in regions
    ]
    if templated and splice:
        raise ValueError(
            "splice: this text encoder is a language model, in which a phrase alone is not what it is in a prompt; "
            "switch splice off and choose mode paper"
        )
    conditioning = clip.encode_from_tokens_scheduled(clip.tokenize(prompt))
    length = conditioning[0][0].shape[1]
    cut = len(words) - length  # the host cuts off the beginning of a template
    if cut < 0 or (cut > 0 and not templated) or any(word is not None for word in words[:cut]):
        raise ValueError(
            f"clip: it turns {len(words)} text tokens into {length} vectors, so the place of a phrase is not known; "
            f"use the text encoder of the model"
        )
    words, positions = words[cut:], [tuple(place - cut for place in places) for places in positions]
    if splice:
        conditioning = _spliced(clip, conditioning, regions, positions)
    return conditioning, Layout(prompt, tuple(regions), tuple(positions), length, mode, tuple(words), tokenize)


CLIP_ENCODERS = ("l", "g", "h")


def _tokens(clip, text: str) -> list[object]:
    """The tokens of all chunks in a row, None where there is no word, of the encoder whose vectors attention reads."""
    by_encoder = clip.tokenize(text, return_word_ids=True)
    others = [tokens for name, tokens in by_encoder.items() if name not in CLIP_ENCODERS]
    read = others or list(by_encoder.values())  # beside another encoder CLIP only gives one vector of the whole prompt
    if any([len(c) for c in tokens] != [len(c) for c in read[0]] for tokens in read[1:]):
        raise ValueError(
            "clip: its text encoders cut a prompt in different ways, so the place of a phrase is not known"
        )
    return [token[0] if token[2] != 0 else None for chunk in read[0] for token in chunk]


def _without_template(tokens: Sequence[object], around: Sequence[object]) -> list[object]:
    """None for what stands around every prompt; around: the tokens of an empty one."""
    longest = min(len(tokens), len(around))
    before = _shared(tokens, around, longest)
    after = _shared(tokens[::-1], around[::-1], longest - before)
    return [None] * before + list(tokens[before : len(tokens) - after]) + [None] * after


def _shared(a: Sequence[object], b: Sequence[object], longest: int) -> int:
    """How many of the first tokens are the same."""
    equal = (not isinstance(x, Tensor) and not isinstance(y, Tensor) and x == y for x, y in zip(a, b, strict=False))
    return sum(1 for _ in takewhile(bool, islice(equal, longest)))


def _spliced(clip, conditioning: list, regions: Sequence[Region], positions: Sequence[Sequence[int]]) -> list:
    """The conditioning with the embeddings of phrases encoded by themselves."""
    alone = {}
    for region, places in zip(regions, positions, strict=True):
        if not places:
            continue
        own = [i for i, word in enumerate(_tokens(clip, region.phrase)) if word is not None]
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
