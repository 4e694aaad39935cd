"""One map of time: clip, latent, tokens."""

from itertools import chain, cycle, islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from spacetime_edit.core.frames import FrameMap, FramePattern

PICTURES, FOURS = FramePattern(), FramePattern((1,), (4,))
GROUPS = FramePattern(cycle=(1, 4, 4, 4, 4), least=2, group=5)
"""One frame and four times four, over and over; a latent of two frames, or five more."""


@pytest.mark.parametrize(
    ("pattern", "lengths"),
    [
        (PICTURES, {1: 1, 2: 2, 16: 16}),
        (FOURS, {1: 1, 2: 5, 3: 9, 21: 81}),
        (FramePattern((1,), (8,)), {1: 1, 2: 9, 16: 121}),
        (GROUPS, {2: 5, 7: 22, 12: 39, 17: 56}),
    ],
    ids=str,
)
def test_frames_of_a_clip_by_those_of_its_latent(pattern, lengths):
    for latents, frames in lengths.items():
        assert pattern.clip_frames(latents) == pattern.of(latents).clip == frames
    assert pattern.shortest == min(lengths.values())


def by_hand(head, repeating, latents):
    """For each frame of the clip the latent frame that holds it."""
    sizes = islice(chain(head, cycle(repeating)), latents)
    return [latent for latent, size in enumerate(sizes) for _ in range(size)]


patterns = st.sampled_from([((), (1,)), ((1,), (4,)), ((1,), (8,)), ((), (1, 4, 4, 4, 4)), ((2, 3), (1, 5))])


@given(patterns, st.integers(2, 13), st.integers(1, 3))
def test_each_frame_of_the_clip_is_in_one_token(pattern, latents, joined):
    head, repeating = pattern
    time, holder = FramePattern(head, repeating).of(latents, joined), by_hand(head, repeating, latents)
    assert time.tokens_of_clip(len(holder)) == [latent // joined for latent in holder]
    assert time.tokens_of_clip(latents) == [latent // joined for latent in range(latents)]
    assert time.tokens == max(time.tokens_of_clip(latents)) + 1
    values = torch.rand(len(holder), 2)
    of_latent = [[v for v, at in zip(values, holder, strict=True) if at == latent] for latent in range(latents)]
    for how, join in (("maximum", lambda t: torch.stack(t).amax(0)), ("mean", lambda t: torch.stack(t).mean(0))):
        expected = torch.stack([join(part) for part in of_latent])
        torch.testing.assert_close(time.in_latents(values, how), expected)
        parts = [list(expected[i : i + joined]) for i in range(0, latents, joined)]
        torch.testing.assert_close(time.in_tokens(values, how), torch.stack([join(part) for part in parts]))
    torch.testing.assert_close(time.in_clip(expected), expected[holder])
    assert torch.equal(time.in_clip(values), values)


def test_one_mask_is_for_all_frames():
    time = FOURS.of(3)
    one = torch.rand(1, 2, 2)
    assert torch.equal(time.in_latents(one, "mean"), one.expand(3, 2, 2))
    assert torch.equal(time.in_clip(one), one.expand(9, 2, 2))


@pytest.mark.parametrize(("pattern", "latents", "spare"), [(PICTURES, 9, 0), (FOURS, 3, 3), (GROUPS, 7, 16)], ids=str)
def test_frames_that_the_vae_drops_have_no_latent(pattern, latents, spare):
    time = pattern.of(latents)
    kept = torch.rand(time.clip, 1)
    for more in range(1, spare + 1):
        longer = torch.cat([kept, torch.full((more, 1), 9.0)])
        assert torch.equal(time.in_latents(longer, "maximum"), time.in_latents(kept, "maximum"))
        assert torch.equal(time.in_clip(longer), kept)
    for wrong in (latents - 1, time.clip + spare + 1):
        for turn in (time.in_clip, lambda values: time.in_tokens(values, "mean")):
            with pytest.raises(ValueError, match=rf"^mask: it has {wrong} frames, the clip has {time.clip}"):
                turn(torch.zeros(wrong, 1))


def test_images_are_the_clips_or_the_latents():
    time = FOURS.of(3)
    with pytest.raises(ValueError, match=r"^images: they are 8, the trajectory's clip has 9 \(3 in the latent\)"):
        time.tokens_of_clip(8)
    with pytest.raises(ValueError, match=r"clip has 3; connect"):
        PICTURES.of(3).tokens_of_clip(4)


def test_tokens_of_a_context_window():
    time = FramePattern((1,), (4,)).of(7, 2)
    assert time.tokens == 4 and time.tokens_of(range(7)) == (0, 1, 2, 3)
    assert time.tokens_of([2, 3, 6]) == (1, 3)
    assert FrameMap((1,) * 7).tokens_of([5, 0, 2]) == (5, 0, 2)
    with pytest.raises(ValueError, match="joins 2 latent frames .* begins in the middle"):
        time.tokens_of([1, 2])
