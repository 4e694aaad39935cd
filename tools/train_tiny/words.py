"""Vocabularies: byte pair encodings of CLIP's kind in which every word of a world is one token."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
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


def _merges(words: Sequence[str]) -> list[tuple[str, str]]:
    words = [[*word[:-1], word[-1] + END_OF_WORD] for word in words]
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


class Vocabulary:
    """The tokens of a list of words. The merges are trained to completion on it, so any other word falls apart into
    pieces that no caption of the training holds.

    merges: pairs in their order; numbers: token to number: start, end, the words in their order, then letters and
    pieces.
    """

    def __init__(self, words: Sequence[str]):
        self.words = tuple(words)
        self.merges = _merges(words)
        letters = [chr(ord("a") + i) for i in range(26)]
        pieces = [",", *letters, *(letter + END_OF_WORD for letter in letters), *(a + b for a, b in self.merges)]
        tokens = [START, END, *(word + END_OF_WORD for word in words), *pieces]
        self.numbers = {token: i for i, token in enumerate(dict.fromkeys(tokens))}

    def __len__(self) -> int:
        return len(self.numbers)

    def token_ids(self, caption: str) -> list[int]:
        """The 24 token numbers of a caption in known words, as `transformers.CLIPTokenizer` gives them.

        Raises KeyError for an unknown word.
        """
        words = caption.lower().replace(",", " , ").split()[: POSITIONS - 2]
        numbers = [self.numbers[token] for token in (START, *(word + END_OF_WORD for word in words), END)]
        return numbers + [self.numbers[END]] * (POSITIONS - len(numbers))

    def write_tokenizer(self, folder: Path) -> None:
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
        merges = "".join(f"{a} {b}\n" for a, b in self.merges)
        (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}", encoding="utf-8")
        for name, content in {
            "vocab.json": self.numbers,
            "tokenizer_config.json": configuration,
            "special_tokens_map.json": special,
        }.items():
            (folder / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


SHAPE_WORLD = Vocabulary(WORDS)
MERGES, VOCABULARY = SHAPE_WORLD.merges, SHAPE_WORLD.numbers
token_ids, write_tokenizer = SHAPE_WORLD.token_ids, SHAPE_WORLD.write_tokenizer
