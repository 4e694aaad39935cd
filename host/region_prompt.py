"""Regions on a prompt: where the words of each region stand in it, written into the CONDITIONING that it becomes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import blake2b
from itertools import islice, takewhile
from typing import Literal

from torch import Tensor

from ..core.region_attention import Overlap
from ..core.regions import EVERY, PhraseError, Pooling, Region, phrase_positions
from .node_text import NodeText

Mode = Literal["paper", "released"]

LAYOUT = "spacetime_edit_layout"
"""Key of the Layout in the dict of a CONDITIONING's entry."""

BESIDE = ("l", "g", "h", "byt5")
"""The host's names of encoders that, beside another, give one vector of the whole prompt, or vectors of what is written
in quotation marks."""
OPENING = "([{\"'“‘-/\n"
"""What a word may follow without a space."""


@dataclass(frozen=True)
class Rules:
    """How regions become memberships of tokens, and whose self-attention they hold together.

    partitioned: each pixel is of one region, and what is in none is a region of its own. overlap: tokens share a region
    by the product of memberships, or if any mask covers both. covered_twice: see `core.regions.size_term`.
    own_self_attention: of the regional prompt too, else only of the prompts beside it.
    """

    partitioned: bool
    pooling: Pooling
    overlap: Overlap
    covered_twice: bool
    own_self_attention: bool


RULES: dict[Mode, Rules] = {
    "paper": Rules(True, "area", "product", covered_twice=False, own_self_attention=True),
    "released": Rules(False, "nearest", "any", covered_twice=True, own_self_attention=False),
}
"""As the method is published, and as its public code does it (arXiv 2502.17258)."""


@dataclass(frozen=True, eq=False)
class Layout:
    """Regions and where their phrases stand in one prompt.

    positions: for each region the places of its words among the prompt's `length` text tokens; empty for a region
    without a phrase. mode: whose rules hold. words: the prompt's tokens, None where there is no word; tokenize: other
    words in the same way; starts: the places that no word goes before, None where a word's tokens are the same
    everywhere. digests: of the prompt's vectors, by which it is known again in a longer prompt; empty: not compared.
    node: the graph's name of the node that made it.
    """

    prompt: str
    regions: tuple[Region, ...]
    positions: tuple[tuple[int, ...], ...]
    length: int
    mode: Mode = "paper"
    words: tuple[object, ...] = field(default=(), repr=False)
    tokenize: Callable[[str], list[object]] | None = field(default=None, repr=False)
    starts: frozenset[int] | None = field(default=None, repr=False)
    digests: tuple[bytes, ...] = field(default=(), repr=False)
    node: str | None = None

    @property
    def rules(self) -> Rules:
        return RULES[self.mode]

    def offset_in(self, embedding: Tensor) -> int | None:
        """Place of this prompt's first vector among those of an embedding (1, L, C); None: it is not there as it was.

        Only vectors of the regions' words are compared: what else is in the prompt may have changed.
        """
        if not self.digests:
            return 0 if embedding.shape[1] >= self.length else None
        there, words = digests_of(embedding), [place for places in self.positions for place in places]
        words = words or range(self.length)
        for offset in range(len(there) - max(words)):
            if all(there[offset + place] == self.digests[place] for place in words):
                return offset
        return None


def digests_of(embedding: Tensor) -> tuple[bytes, ...]:
    """One of each vector of an embedding (1, L, C)."""
    rows = embedding[0].float().cpu().numpy()
    return tuple(blake2b(row.tobytes(), digest_size=8).digest() for row in rows)


def with_layout(conditioning: list, layout: Layout) -> list:
    """A copy of a CONDITIONING that carries the layout."""
    return [[embedding, {**about, LAYOUT: layout}] for embedding, about in conditioning]


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


def encode_regional_prompt(
    clip,
    prompt: str,
    regions: Sequence[Region],
    mode: Mode = "paper",
    splice: bool = False,
    node: str | None = None,
) -> list:
    """CONDITIONING of a prompt that carries the Layout of the regions in it.

    splice: put the embedding of each phrase encoded by itself in its place, as the public code does: a phrase then
    knows nothing of the others. node: where it is said what does nothing. Raises ValueError naming phrase and prompt
    where a phrase is not in the prompt, or more than once and no occurrence is chosen.
    """
    if clip is None:
        raise ValueError(
            "clip: there is none (None): a checkpoint without a text encoder was loaded; connect Load CLIP"
        )
    tokens_of = _tokenizer(clip)
    around = tokens_of("")[0]

    def tokenize(text: str) -> list[object]:
        return _without_template(tokens_of(text)[0], around)

    words, (_, parts, weights) = tokenize(prompt), tokens_of(prompt)
    language_model = any(token is not None for token in around) or tokenize(" a") != tokenize("a")
    starts = _starts(words, parts, tokenize) if language_model else None
    whole = Layout(prompt, tuple(regions), (), len(words), mode, tuple(words), tokenize, starts)
    phrases = any(region.phrase.strip() for region in regions)
    if language_model and phrases:
        _check_language_model(tokenize, splice)
    found = [_found(whole, r.phrase.strip(), r.occurrence) if r.phrase.strip() else ("", []) for r in regions]
    conditioning = clip.encode_from_tokens_scheduled(clip.tokenize(prompt))
    length = conditioning[0][0].shape[1]
    cut = _cut(clip, words, length)
    if cut is None:
        raise ValueError(
            f"clip: it turns {len(words)} text tokens into {length} vectors, so the place of a phrase is not known; "
            f"use the text encoder of the model"
        )
    positions = tuple(tuple(place - cut for place in places) for _, places in found)
    if splice and phrases:
        _say_lost_weights([(text, [weights[place] for place in places]) for text, places in found], NodeText(node))
        conditioning = _spliced(clip, tokens_of, conditioning, [text for text, _ in found], positions)
    starts = None if starts is None else frozenset(place - cut for place in starts)
    known = {"positions": positions, "length": length, "words": tuple(words[cut:]), "starts": starts, "node": node}
    one = replace(whole, **known)
    # hooks of the text encoder with a schedule encode the prompt once for each of their times
    layouts = [replace(one, digests=digests_of(embedding)) for embedding, _ in conditioning]
    return [with_layout([entry], layout)[0] for entry, layout in zip(conditioning, layouts, strict=True)]


def _cut(clip, words: Sequence[object], length: int) -> int | None:
    """How many tokens at the beginning of a prompt have no vector among `length`: of a template, or of padding.

    None where that is not known.
    """
    cut, drops = len(words) - length, _drops_padding(clip)
    if drops and cut == 0:  # and has the model's own tokens in the place of padding, behind the prompt
        cut = next((i for i, word in enumerate(words) if word is not None), 1) - 1  # what begins a prompt is no padding
    if cut < 0 or any(word is not None for word in words[:cut]):
        return None
    templated = any(token is not None for token in _tokenizer(clip)("")[0])
    return cut if cut == 0 or templated or drops else None


def _drops_padding(clip) -> bool:
    """Whether a text encoder gives no vectors for the padding in front of a prompt: LTX-2's does not."""
    return any(kind.__name__ == "LTXAVTEModel" for kind in type(clip.cond_stage_model).__mro__)


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
            "switch splice off"
        )


def _say_lost_weights(found: Sequence[tuple[str, Sequence[float]]], say: NodeText) -> None:
    """found: phrases with the weights of their words in the prompt."""
    lost = [repr(text) for text, weights in found if any(weight != 1 for weight in weights)]
    if lost:
        say(
            f"The weights of {' and '.join(lost)} in the prompt do nothing, since phrases are encoded by themselves: "
            f"switch splice off to keep them."
        )


def _tokenizer(clip) -> Callable[[str], tuple[list[object], list[int], list[float]]]:
    """What gives the tokens of a text by a CLIP's tokenizer, without holding its text encoder in memory."""
    options = {"tokenizer_options": clip.tokenizer_options} if clip.tokenizer_options else {}
    return partial(_tokens, partial(clip.tokenizer.tokenize_with_weights, return_word_ids=True, **options))


def _tokens(tokenize: Callable[[str], dict], text: str) -> tuple[list[object], list[int], list[float]]:
    """The tokens of all chunks in a row, None where there is no word, of the encoder whose vectors attention reads; the
    numbers of the parts of the text that they are of, and their weights."""
    by_encoder = tokenize(text)
    others = [tokens for name, tokens in by_encoder.items() if name not in BESIDE]
    read = others or list(by_encoder.values())
    if any([len(c) for c in tokens] != [len(c) for c in read[0]] for tokens in read[1:]):
        raise ValueError("clip: its text encoders cut a prompt in different ways: places of phrases are not known")
    tokens = [token for chunk in read[0] for token in chunk]
    words = [token if part else None for token, _, part in tokens]
    return words, [part for _, _, part in tokens], [float(weight) for _, weight, _ in tokens]


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


def _spliced(
    clip, tokens_of: Callable, conditioning: list, phrases: Sequence[str], positions: Sequence[Sequence[int]]
) -> list:
    """The conditioning with the embeddings of phrases encoded by themselves."""
    alone: list[dict[int, Tensor]] = [{} for _ in conditioning]  # of each time, where the text encoder has hooks
    for phrase, places in zip(phrases, positions, strict=True):
        if not places:
            continue
        own = [i for i, word in enumerate(tokens_of(phrase)[0]) if word is not None]
        encoded = clip.encode_from_tokens_scheduled(clip.tokenize(phrase))
        for rows, (embedding, _) in zip(alone, encoded, strict=True):
            for start in range(0, len(places), len(own)):  # every occurrence
                rows |= {p: embedding[:, at] for p, at in zip(places[start:], own, strict=False)}
    return [[_with_rows(entry[0], rows), entry[1]] for entry, rows in zip(conditioning, alone, strict=True)]


def _with_rows(embedding: Tensor, rows: dict[int, Tensor]) -> Tensor:
    embedding = embedding.clone()
    for place, row in rows.items():
        embedding[:, place] = row
    return embedding
