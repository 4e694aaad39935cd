"""How phrases reach attention: where the words of a region stand in an encoded prompt (decision D8)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice, takewhile
from typing import Literal

from torch import Tensor

from ..core.regions import EVERY, PhraseError, Region, phrase_positions

Mode = Literal["paper", "released"]

CLIP_ENCODERS = ("l", "g", "h")
"""The host's names of encoders that, beside another, only give one vector of the whole prompt."""
OPENING = "([{\"'“‘-/\n"
"""What a word may follow without a space."""


@dataclass(frozen=True, eq=False)
class Layout:
    """Regions and where their phrases stand in one prompt.

    positions: for each region the places of its words among the prompt's `length` text tokens; empty for a region
    without a phrase. mode: whose rules hold, see `region_patch`. words: the prompt's tokens, None where there is no
    word; tokenize: other words in the same way; starts: the places that no word goes before, None where a word's tokens
    are the same everywhere.
    """

    prompt: str
    regions: tuple[Region, ...]
    positions: tuple[tuple[int, ...], ...]
    length: int
    mode: Mode = "paper"
    words: tuple[object, ...] = field(default=(), repr=False)
    tokenize: Callable[[str], list[object]] | None = field(default=None, repr=False)
    starts: frozenset[int] | None = field(default=None, repr=False)


def positions_in(layout: Layout, phrase: str) -> list[int]:
    """Where words stand in the layout's prompt, at every occurrence. ValueError where there is none."""
    return _found(layout, phrase, EVERY)[1]


def _found(layout: Layout, phrase: str, occurrence: int) -> tuple[str, list[int]]:
    """A phrase as it is written in the layout's prompt, with a small or a capital first letter, and where."""
    written = (phrase, phrase[:1].swapcase() + phrase[1:])
    text = next((text for text in written if _places(layout, text, EVERY)), phrase)
    try:
        return text, _places(layout, text, occurrence, strict=True)
    except PhraseError as error:
        raise ValueError(
            f"phrase {phrase!r} in the prompt {layout.prompt!r}: {error}; write it into the prompt word for word, or "
            f"choose its occurrence"
        ) from error


def _places(layout: Layout, text: str, occurrence: int, strict: bool = False) -> list[int]:
    """Of a text in the layout's prompt; none where it is not there, or if strict PhraseError."""
    alone = layout.tokenize(text)
    try:
        if layout.starts is None:
            return phrase_positions(layout.words, alone, occurrence)
        inside = layout.tokenize(" " + text)
        return phrase_positions(layout.words, inside, occurrence, at_start=alone, starts=layout.starts)
    except PhraseError:
        if strict:
            raise
        return []


def encode_regional_prompt(clip, prompt: str, regions: Sequence[Region], mode: Mode = "paper", splice: bool = False):
    """CONDITIONING of a prompt, and the Layout of the regions in it.

    splice: put the embedding of each phrase encoded by itself in its place, as the public code does: a phrase then
    knows nothing of the others. Raises ValueError naming phrase and prompt where a phrase is not in the prompt, or
    more than once and no occurrence is chosen.
    """
    around = _tokens(clip, "")[0]

    def tokenize(text: str) -> list[object]:
        return _without_template(_tokens(clip, text)[0], around)

    words, templated = tokenize(prompt), any(token is not None for token in around)
    starts = _starts(words, _tokens(clip, prompt)[1], tokenize) if templated else None
    whole = Layout(prompt, tuple(regions), (), len(words), mode, tuple(words), tokenize, starts)
    phrases = any(region.phrase.strip() for region in regions)
    if templated and phrases:
        _check_language_model(tokenize, splice)
    found = [_found(whole, r.phrase.strip(), r.occurrence) if r.phrase.strip() else ("", []) for r in regions]
    conditioning = clip.encode_from_tokens_scheduled(clip.tokenize(prompt))
    length = conditioning[0][0].shape[1]
    cut = len(words) - length  # the host cuts off the beginning of a template
    if cut < 0 or (cut > 0 and not templated) or any(word is not None for word in words[:cut]):
        raise ValueError(
            f"clip: it turns {len(words)} text tokens into {length} vectors, so the place of a phrase is not known; "
            f"use the text encoder of the model"
        )
    positions = tuple(tuple(place - cut for place in places) for _, places in found)
    if splice and phrases:
        conditioning = _spliced(clip, conditioning, [text for text, _ in found], positions)
    starts = None if starts is None else frozenset(place - cut for place in starts)
    layout = replace(whole, positions=positions, length=length, words=tuple(words[cut:]), starts=starts)
    return conditioning, layout


def _check_language_model(tokenize: Callable[[str], list[object]], splice: bool) -> None:
    """ValueError for a text encoder that is a language model in which phrases cannot be found, or not be spliced."""
    if tokenize("a b") == tokenize("ab"):
        raise ValueError(
            "clip: its tokenizer loses the spaces between words, so no phrase can be found (ComfyUI's of HunyuanVideo "
            "does so with transformers 5); install transformers below 5, or leave the regions' phrases empty"
        )
    if splice:
        raise ValueError(
            "splice: this text encoder is a language model, in which a phrase alone is not what it is in a prompt; "
            "switch splice off and choose mode paper"
        )


def _tokens(clip, text: str) -> tuple[list[object], list[int]]:
    """The tokens of all chunks in a row, None where there is no word, of the encoder whose vectors attention reads; and
    the numbers of the parts of the text that they are of."""
    by_encoder = clip.tokenize(text, return_word_ids=True)
    others = [tokens for name, tokens in by_encoder.items() if name not in CLIP_ENCODERS]
    read = others or list(by_encoder.values())
    if any([len(c) for c in tokens] != [len(c) for c in read[0]] for tokens in read[1:]):
        raise ValueError("clip: its text encoders cut a prompt in different ways: places of phrases are not known")
    numbered = [(token[0], token[2]) for chunk in read[0] for token in chunk]
    return [token if part else None for token, part in numbered], [part for _, part in numbered]


def _starts(words: Sequence[object], parts: Sequence[int], tokenize: Callable[[str], list[object]]) -> frozenset[int]:
    """Places of the words that no other goes right before: at the beginning, of a part with a weight of its own too,
    and behind a bracket, a quotation mark and the like."""
    opening = {word for mark in OPENING for text in (mark, " " + mark) for word in tokenize(text)} | {None}

    def is_start(place: int) -> bool:
        before = words[place - 1] if place else None
        return isinstance(before, Tensor) or before in opening or parts[place] != parts[place - 1]

    return frozenset(place for place, word in enumerate(words) if word is not None and is_start(place))


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


def _spliced(clip, conditioning: list, phrases: Sequence[str], positions: Sequence[Sequence[int]]) -> list:
    """The conditioning with the embeddings of phrases encoded by themselves."""
    alone = {}
    for phrase, places in zip(phrases, positions, strict=True):
        if not places:
            continue
        own = [i for i, word in enumerate(_tokens(clip, phrase)[0]) if word is not None]
        embedding = clip.encode_from_tokens_scheduled(clip.tokenize(phrase))[0][0]
        for start in range(0, len(places), len(own)):  # every occurrence
            for place, place_alone in zip(places[start:], own, strict=False):
                alone[place] = embedding[:, place_alone]
    return [[_with_rows(embedding, alone), settings] for embedding, settings in conditioning]


def _with_rows(embedding: Tensor, rows: dict[int, Tensor]) -> Tensor:
    embedding = embedding.clone()
    for place, row in rows.items():
        embedding[:, place] = row
    return embedding
