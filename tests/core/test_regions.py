"""Regions on known pictures: who owns a pixel, what a token belongs to, where a phrase stands."""

import pytest
import torch
from spacetime_edit.core.frames import FramePattern
from spacetime_edit.core.live_memory import PeakMemory
from spacetime_edit.core.regions import (
    EVERY,
    ONLY,
    PhraseError,
    Region,
    membership,
    partition,
    phrase_positions,
    same_frames,
    size_term,
    token_regions,
)

ONE = FramePattern().of(1)


def box(x0, y0, x1, y1, frames=1, side=16):
    mask = torch.zeros(frames, side, side)
    mask[:, y0:y1, x0:x1] = 1
    return mask


def masks_of(*masks):
    return torch.stack(masks)


# --- partition ----------------------------------------------------------


def test_a_part_lies_before_its_whole_whatever_the_order():
    whole, part = box(2, 2, 12, 12), box(4, 4, 8, 8)
    for order in ((whole, part), (part, whole)):
        shares = partition(masks_of(*order))
        a, b = (shares[0], shares[1]) if order[0] is whole else (shares[1], shares[0])
        assert torch.equal(b, part) and torch.equal(a, whole - part)
        assert torch.equal(shares[2], 1 - whole)


def test_of_two_that_overlap_the_later_lies_before():
    first, second = box(0, 0, 10, 16), box(6, 0, 16, 16)
    shares = partition(masks_of(first, second))
    assert torch.equal(shares[1], second) and torch.equal(shares[0], box(0, 0, 6, 16))
    assert shares[2].sum() == 0


def test_equal_masks_leave_the_first_nothing():
    shares = partition(masks_of(box(0, 0, 8, 8), box(0, 0, 8, 8)))
    assert shares[0].sum() == 0 and torch.equal(shares[1], box(0, 0, 8, 8))


def test_an_empty_region_owns_nothing():
    shares = partition(masks_of(box(0, 0, 0, 0), box(0, 0, 8, 8)))
    assert shares[0].sum() == 0 and torch.equal(shares[1], box(0, 0, 8, 8))


@pytest.mark.parametrize("regions", [1, 2, 5])
@pytest.mark.parametrize("seed", range(3))
def test_shares_sum_to_one(regions, seed):
    masks = torch.rand(regions, 2, 6, 6, generator=torch.Generator().manual_seed(seed))
    shares = partition(masks)
    assert shares.shape == (regions + 1, 2, 6, 6) and shares.min() >= 0
    torch.testing.assert_close(shares.sum(0), torch.ones(2, 6, 6))


# --- membership ---------------------------------------------------------


def test_area_is_the_share_of_a_tokens_pixels():
    shares = partition(masks_of(box(0, 0, 6, 16)))
    tokens = membership(shares, ONE, (4, 4))
    expected = torch.tensor([1.0, 0.5, 0, 0]).expand(4, 4).flatten()
    torch.testing.assert_close(tokens[0, :, 0], expected)
    torch.testing.assert_close(tokens.sum(-1), torch.ones(1, 16))


def test_thin_parts_get_half_a_token_and_the_rest_gives_way():
    whole, line = box(0, 0, 16, 16), box(0, 5, 16, 6)
    tokens = membership(partition(masks_of(whole, line)), ONE, (4, 4))
    assert float(tokens[0, 4:8, 1].min()) == 0.5 and tokens[0, :4, 1].max() == 0
    torch.testing.assert_close(tokens.sum(-1), torch.ones(1, 16))


def test_max_and_nearest():
    line = masks_of(box(0, 5, 16, 6))
    assert membership(line, ONE, (4, 4), "max")[0, 4:8, 0].min() == 1
    assert membership(line, ONE, (4, 4), "nearest").sum() == 0  # the top left pixel of a token is another row
    assert membership(masks_of(box(0, 4, 16, 5)), ONE, (4, 4), "nearest")[0, 4:8, 0].min() == 1


def test_each_frame_has_its_own_mask():
    masks = masks_of(torch.cat([box(0, 0, 8, 16), box(8, 0, 16, 16)]))
    tokens = membership(partition(masks), FramePattern().of(2), (2, 2))
    assert tokens[:, :, 0].tolist() == [[1, 0, 1, 0], [0, 1, 0, 1]]


def test_frames_of_a_token_are_means_of_theirs():
    """Of latents of 4 n + 1 frames, two of which are one token: the first holds frames 0 and 1 to 4, a half each."""
    layers = (torch.arange(13) >= 4).float().view(1, 13, 1, 1)
    pattern = FramePattern((1,), (4,))
    assert membership(layers, pattern.of(4), (1, 1), "max").flatten().tolist() == [0, 0.25, 1, 1]
    assert membership(layers, pattern.of(4, 2), (1, 1), "max").flatten().tolist() == [0.125, 1]
    with pytest.raises(ValueError, match=r"^regions: .* have 13 frames, the clip has 9 \(3 in the latent\)"):
        membership(layers, pattern.of(3), (1, 1))


def test_masks_of_other_sizes_are_refused_by_name():
    with pytest.raises(ValueError, match=r"region 2 \('b'\): its mask has 8 x 8 pixels"):
        same_frames([Region("a", box(0, 0, 1, 1)), Region("b", torch.zeros(1, 8, 8))])
    with pytest.raises(ValueError, match=r"region 2 \('b'\): it has 2 frames, the clip has 3"):
        same_frames([Region("a", torch.zeros(3, 8, 8)), Region("b", torch.zeros(2, 8, 8))])
    assert same_frames([Region("a", torch.zeros(3, 8, 8)), Region("b", torch.ones(8, 8))])[1].sum() == 3 * 64


def test_size_terms():
    tokens = torch.zeros(2, 10, 2)
    tokens[0, :5, 0], tokens[1, :1, 0] = 1, 1  # 6 of 20 tokens; half of the first frame, a tenth of the second
    clip, frame = size_term(tokens, "clip"), size_term(tokens, "frame")
    assert clip[0, 0] == pytest.approx(0.7) and clip[0, 9] == 1
    assert frame[0, 0] == pytest.approx(0.5) and frame[1, 0] == pytest.approx(0.9)
    assert size_term(tokens, "clip", covered_twice=True)[0, 0] == pytest.approx(0.85)
    assert size_term(torch.ones(1, 4, 3)).min() == 0  # three regions everywhere: not below 0


def test_noise_in_a_mask_is_no_thin_part():
    """Frame 1 of the first region is the black of a video, 1/255 and not 0: it owns nothing there."""
    masks = masks_of(box(4, 4, 12, 12, frames=2))
    masks[0, 1] = 1 / 255
    tokens = membership(partition(masks), FramePattern().of(2), (4, 4))
    assert tokens[1, :, 0].max() < 0.01 and tokens[0, :, 0].max() == 1


def test_a_thin_part_of_one_frame_of_four_survives_in_the_latents():
    mask = torch.zeros(1, 5, 16, 16)
    mask[0, 2, 5, 5] = 1
    tokens = membership(partition(mask), FramePattern((1,), (4,)).of(2), (4, 4))
    assert tokens[1, :, 0].max() == pytest.approx(0.5) and tokens[0, :, 0].max() == 0


def test_thin_parts_of_one_token_share_it_alike():
    """One pixel in sixteen each, both want a half: neither gives way to the other."""
    tokens = membership(partition(masks_of(box(0, 0, 1, 1), box(2, 2, 3, 3))), ONE, (4, 4))
    assert tokens[0, 0].tolist() == pytest.approx([0.5, 0.5, 0.0])
    three = membership(partition(masks_of(box(0, 0, 1, 1), box(2, 2, 3, 3), box(0, 3, 1, 4))), ONE, (4, 4))
    assert three[0, 0].tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0.0])


def test_only_parts_go_before_later_regions():
    """B is a part of A; C, later and part of nothing, lies before both."""
    a, b, c = box(0, 0, 12, 12), box(2, 2, 6, 6), box(4, 4, 16, 8)
    shares = partition(masks_of(a, b, c))
    assert shares[2][c > 0].min() == 1 and shares[1][(b > 0) & (c == 0)].min() == 1
    assert shares[0][(a > 0) & (b == 0) & (c == 0)].min() == 1
    part, between, whole = partition(masks_of(b, c, a))[:3]  # in this order the whole, the last, lies before c
    assert part[b > 0].min() == 1 and whole[(a > 0) & (b == 0)].min() == 1 and between[(c > 0) & (a == 0)].min() == 1


def test_a_partition_takes_no_memory_of_pairs():
    """Eight masks of 64 MB in all: beyond them and the result, a few of one."""
    masks = torch.rand(8, 8, 512, 512)
    with PeakMemory() as peak:
        partition(masks)
    assert peak.peak < 2.2 * masks.nbytes


# --- phrases ------------------------------------------------------------

A, RED, CIRCLE, AND, GREEN = range(5)
PROMPT = [None, A, RED, CIRCLE, AND, A, GREEN, CIRCLE, None, None, A, RED, CIRCLE, None]


def test_where_a_phrase_stands():
    assert phrase_positions(PROMPT, [GREEN, CIRCLE]) == [6, 7]
    assert phrase_positions(PROMPT, [A, RED, CIRCLE], 2) == [10, 11, 12]
    assert phrase_positions(PROMPT, [RED, CIRCLE], EVERY) == [2, 3, 11, 12]
    assert phrase_positions(PROMPT, [None, CIRCLE, AND, None]) == [3, 4]


def test_a_phrase_may_run_over_the_end_of_a_chunk():
    assert phrase_positions(PROMPT, [GREEN, CIRCLE, A, RED]) == [6, 7, 10, 11]


@pytest.mark.parametrize(
    ("phrase", "occurrence", "message"),
    [
        ([RED, GREEN], ONLY, "not there"),
        ([], ONLY, "not there"),
        ([RED] * 20, ONLY, "not there"),
        ([RED], ONLY, "2 times, and no occurrence"),
        ([RED], 3, "2 times, and occurrence 3"),
        ([torch.ones(3)], ONLY, "not there"),
    ],
)
def test_phrases_that_are_not_meant(phrase, occurrence, message):
    with pytest.raises(PhraseError, match=message):
        phrase_positions(PROMPT, phrase, occurrence)


def test_overlapping_occurrences_are_counted():
    assert phrase_positions([RED, RED, RED], [RED, RED], EVERY) == [0, 1, 2]
    assert phrase_positions([RED, RED, RED], [RED, RED], 2) == [1, 2]


def test_a_phrase_has_other_tokens_where_no_word_goes_before():
    """As in the vocabularies of language models, whose tokens hold the space before a word."""
    options = {"at_start": [A, RED], "starts": {1}}
    assert phrase_positions(PROMPT, [GREEN, CIRCLE], EVERY, **options) == [1, 2, 6, 7]  # not at place 10
    assert phrase_positions(PROMPT, [CIRCLE, RED], **options) == [1, 2]
    with pytest.raises(PhraseError, match="there 2 times, and no occurrence"):
        phrase_positions(PROMPT, [GREEN], **options)


def test_table_of_tokens():
    table = token_regions([[1, 2], [], [5]], 7)
    assert table.shape == (7, 3) and table.nonzero().tolist() == [[1, 0], [2, 0], [5, 2]]
