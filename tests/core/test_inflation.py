"""Attention over several frames against its definition, frame by frame and token by token."""

import pytest
import torch
from spacetime_edit.core.inflation import Inflation
from torch.nn.functional import scaled_dot_product_attention

PROMPTS, FRAMES, HEADS, TOKENS, WIDTH = 2, 4, 3, 5, 6


def seen_by(frame, keys):
    """Frames whose tokens a frame attends to, written out."""
    return {"all frames": [0, 1, 2, 3], "first + previous": [0, max(frame - 1, 0)]}[keys]


@pytest.mark.parametrize("keys", ["all frames", "first + previous"])
def test_each_frame_attends_to_the_frames_that_it_should(keys):
    generator = torch.Generator().manual_seed(0)
    shape = (PROMPTS * FRAMES, HEADS, TOKENS, WIDTH)
    query, key, value = (torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(3))
    inflation = Inflation(keys)
    output = inflation.deflate(scaled_dot_product_attention(*inflation.inflate(query, key, value, FRAMES)), FRAMES)
    for prompt in range(PROMPTS):
        for frame in range(FRAMES):
            rows = [prompt * FRAMES + other for other in seen_by(frame, keys)]
            k, v = (torch.cat(list(t[rows]), 1) for t in (key, value))
            q = query[prompt * FRAMES + frame]
            wanted = (q @ k.mT / WIDTH**0.5).softmax(-1) @ v
            assert torch.allclose(output[prompt * FRAMES + frame], wanted, atol=1e-12)


@pytest.mark.parametrize("keys", ["all frames", "first + previous"])
def test_the_account_of_its_rows_is_that_of_its_keys(keys):
    """A key that holds the number of its frame comes where `frames_of_rows` says."""
    numbers = torch.arange(float(FRAMES)).repeat(PROMPTS)[:, None, None, None].expand(-1, 1, TOKENS, 1)
    inflation = Inflation(keys)
    query, key, _ = inflation.inflate(numbers, numbers, numbers, FRAMES)
    rows = inflation.frames_of_rows(FRAMES)
    for b in range(len(query)):
        of_query, of_key = rows[b % len(rows)]
        assert query[b, 0, ::TOKENS, 0].tolist() == list(of_query)
        assert key[b, 0, ::TOKENS, 0].tolist() == list(of_key)


def test_levels_choose_where_it_holds():
    assert Inflation().at(1) and Inflation().at(8)
    assert Inflation(levels=frozenset({2})).at(2) and not Inflation(levels=frozenset({2})).at(1)
    assert not Inflation("per frame").at(1)


def test_words_tell_two_inflations_apart():
    made = [Inflation(), Inflation("first + previous"), Inflation(levels=frozenset({2, 4})), Inflation("per frame")]
    made += [Inflation(shared_norms=True), Inflation("per frame", shared_norms=True)]
    assert len({str(i) for i in made}) == len(made)
    assert [i.neutral for i in made] == [False, False, False, True, False, False]
