"""The vocabulary: a byte pair encoding of CLIP's kind in which every word of the shape world is one token.

Its merges are trained to completion on the list of words, so any other word falls apart into pieces that no caption of
the training holds.
"""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

from ..shape_world.world import BACKGROUNDS, COLOURS, SHAPES, STRIPES, TEXTURES

START, END = "<|startoftext|>", "<|endoftext|>"
POSITIONS = 24
END_OF_WORD = "</w>"
WORDS = tuple(
    dict.fromkeys(
        ["a", "on", "the", "left", "right", "and", ",", "background", *COLOURS, *BACKGROUNDS, *SHAPES]
        + ["top", "bottom", "two", "three", "with", "stripe", *STRIPES, *TEXTURES[1:], *(f"{s}s" for s in SHAPES)]
    )
)


def _merges() -> list[tuple[str, str]]:
    words = [[*word[:-1], word[-1] + END_OF_WORD] for word in WORDS]
    merges = []
    while any(len(word) > 1 for word in words):
        counts = Counter(pair for word in words for pair in pairwise(word))
        best = max(counts, key=lambda pair: (counts[pair], pair))
        merges.append(best)
        words = [_merged(word, best) for word in words]
    return merges


def _merged(word: list[str], pair: tuple[str, str]) -> list[str]:
    result = []
    for piece in word:
        if result and (result[-1], piece) == pair:
            result[-1] += piece
        else:
            result.append(piece)
    return result


MERGES = _merges()
_LETTERS = [chr(ord("a") + i) for i in range(26)]
_PIECES = [",", *_LETTERS, *(letter + END_OF_WORD for letter in _LETTERS), *(a + b for a, b in MERGES)]
VOCABULARY = {
    token: i for i, token in enumerate(dict.fromkeys([START, END, *(word + END_OF_WORD for word in WORDS), *_PIECES]))
}
"""Token to number: start, end, the words in their order, then letters and pieces."""


def token_ids(caption: str) -> list[int]:
    """The 24 token numbers of a caption in known words, as `transformers.CLIPTokenizer` gives them.

    Raises KeyError for an unknown word.
    """
    words = caption.lower().replace(",", " , ").split()[: POSITIONS - 2]
    numbers = [VOCABULARY[START], *(VOCABULARY[word + END_OF_WORD] for word in words), VOCABULARY[END]]
    return numbers + [VOCABULARY[END]] * (POSITIONS - len(numbers))


def write_tokenizer(folder: Path) -> None:
    """The files of a `transformers.CLIPTokenizer`."""
    folder.mkdir(parents=True, exist_ok=True)
    special = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
    configuration = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": POSITIONS,
        **special,
        "do_lower_case": True,
        "add_prefix_space": False,
        "errors": "replace",
    }
    merges = "".join(f"{a} {b}\n" for a, b in MERGES)
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}", encoding="utf-8")
    for name, content in {
        "vocab.json": VOCABULARY,
        "tokenizer_config.json": configuration,
        "special_tokens_map.json": special,
    }.items():
        (folder / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
