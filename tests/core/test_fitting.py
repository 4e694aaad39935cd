"""Sizes, frame counts, and pictures and masks that stay together."""

from itertools import product
from math import log

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from spacetime_edit.core.fitting import Placement, fit_frames, fit_size, place_images, place_mask
from spacetime_edit.core.frames import FramePattern

many = settings(max_examples=200, deadline=None, derandomize=True)
SIZES = st.tuples(st.integers(1, 4096), st.integers(1, 4096))
LIMITS = st.sampled_from([1, 8, 14, 16, 32, 64]).flatmap(lambda n: st.tuples(st.just(n), st.integers(n, 1024)))
MODES = st.sampled_from(["crop", "pad"])
every_mode = pytest.mark.parametrize("mode", ["crop", "pad"])


def disc(width, height, x, y, radius):
    rows, columns = torch.arange(height)[:, None] + 0.5, torch.arange(width) + 0.5
    return ((columns - x).square() + (rows - y).square()).le(radius**2).float()


def centroid(picture):
    """(x, y) of a (H, W) picture in pixels."""
    rows, columns = torch.arange(picture.shape[0])[:, None] + 0.5, torch.arange(picture.shape[1]) + 0.5
    return torch.stack([(picture * columns).sum(), (picture * rows).sum()]) / picture.sum()


# sizes


@many
@given(SIZES, LIMITS, MODES)
@example((1919, 101), (64, 576), "pad")
def test_sides_are_multiples_within_the_bound(size, limit, mode):
    multiple, max_side = limit
    placement = fit_size(*size, multiple=multiple, max_side=max_side, mode=mode)
    for side, old, scaled in zip(placement.size, size, placement.scaled, strict=True):
        assert side % multiple == 0 and multiple <= side <= max_side
        assert side < old + multiple, "a side grew by more than the rounding"
        assert scaled >= side if mode == "crop" else scaled <= side
    assert any(s == t for s, t in zip(placement.size, placement.scaled, strict=True)), "cut or padded more than needed"


@many
@given(SIZES, LIMITS)
def test_the_aspect_ratio_is_the_nearest_that_rounding_allows(size, limit):
    """Against all sizes whose sides are within one multiple of the scaled clip's."""
    multiple, max_side = limit
    placement = fit_size(*size, multiple=multiple, max_side=max_side, mode="crop")
    sides = range(multiple, max_side + 1, multiple)
    shrink = min(1.0, sides[-1] / max(size))
    near = ([s for s in sides if abs(s - shrink * n) < multiple - 1e-6 or s == multiple] for n in size)
    error = [abs(log(w / h) - log(size[0] / size[1])) for w, h in product(*near)]
    width, height = placement.size
    assert abs(log(width / height) - log(size[0] / size[1])) <= min(error) + 1e-6


@many
@given(SIZES, LIMITS, MODES)
def test_the_scaled_picture_keeps_its_shape(size, limit, mode):
    """Within the rounding to whole pixels."""
    (width, height), (multiple, max_side) = size, limit
    scaled = fit_size(*size, multiple=multiple, max_side=max_side, mode=mode).scaled
    assert abs(scaled[0] * height / width - scaled[1]) <= max(1, height / width)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((1920, 1080), (576, 320)),
        ((1080, 1920), (320, 576)),
        ((576, 320), (576, 320)),
        ((4096, 4096), (576, 576)),
        ((600, 600), (576, 576)),
        ((10, 20), (64, 64)),
        ((512, 512), (512, 512)),
    ],
    ids=str,
)
def test_sizes_of_zeroscope(size, expected):
    assert fit_size(*size, multiple=64, max_side=576, mode="crop").size == expected


def test_a_bound_below_one_multiple_is_named():
    with pytest.raises(
        ValueError, match="^max_side: it is 63, but the sides must be multiples of 64; expected at least"
    ):
        fit_size(640, 480, multiple=64, max_side=63, mode="crop")


# frames


PICTURES, FOURS = FramePattern(), FramePattern((1,), (4,))


@many
@given(
    st.integers(2, 300),
    st.integers(2, 300),
    st.sampled_from([PICTURES, FOURS, FramePattern((1,), (8,)), FramePattern(cycle=(1, 4, 4, 4, 4), least=2, group=5)]),
)
@example(81, 81, FOURS)
def test_the_longest_clip_that_the_vae_keeps_whole(frames, maximum, pattern):
    kept = (pattern.clip_frames(n) for n in range(pattern.least, 301, pattern.group))
    lengths = [n for n in kept if 2 <= n <= min(frames, maximum)]
    assume(lengths)
    assert fit_frames(frames, maximum=maximum, pattern=pattern) == lengths[-1]


@pytest.mark.parametrize(
    ("frames", "maximum", "pattern", "words"),
    [
        (4, 24, FOURS, "^images: 4 .* at least 5"),
        (9, 4, FOURS, "^max_frames: 4 .* 5"),
        (1, 9, PICTURES, "^images: 1 .* 2"),
    ],
)
def test_a_clip_that_is_too_short_is_named(frames, maximum, pattern, words):
    with pytest.raises(ValueError, match=words):
        fit_frames(frames, maximum=maximum, pattern=pattern)


# pictures


@every_mode
@pytest.mark.parametrize("size", [(301, 170), (170, 301), (90, 80), (50, 61)], ids=str)
def test_a_disc_in_image_and_mask_stays_aligned(size, mode):
    """And lies where the placement says, with the frames in order."""
    width, height = size
    placement = fit_size(width, height, multiple=16, max_side=112, mode=mode)
    at = [(width * 0.45, height * 0.5), (width * 0.55, height * 0.55)]
    masks = torch.stack([disc(width, height, x, y, min(size) / 6) for x, y in at])
    images = place_images(masks[..., None].expand(-1, -1, -1, 3), placement)
    fitted = place_mask(masks, placement)
    for (x, y), image, mask in zip(at, images[..., 1], fitted, strict=True):
        left, _, top, _ = placement.border
        expected = torch.tensor(
            [x * placement.scaled[0] / width + left, y * placement.scaled[1] / height + top], dtype=torch.float32
        )
        assert (centroid(image) - centroid(mask)).abs().max() < 0.1
        assert (centroid(mask) - expected).abs().max() < 0.5


@every_mode
def test_a_mask_of_another_size_lands_in_the_same_place(mode):
    placement = fit_size(200, 120, multiple=16, max_side=112, mode=mode)
    fine, coarse = disc(200, 120, 90, 64, 24)[None], disc(50, 30, 22.5, 16, 6)[None]
    assert (centroid(place_mask(fine, placement)[0]) - centroid(place_mask(coarse, placement)[0])).abs().max() < 0.5


@every_mode
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_what_fits_is_not_resampled(mode, dtype):
    images, mask = torch.rand(3, 32, 48, 3).to(dtype), torch.rand(3, 32, 48).to(dtype)
    placement = fit_size(48, 32, multiple=16, max_side=48, mode=mode)
    assert torch.equal(place_images(images, placement), images)
    assert torch.equal(place_mask(mask, placement), mask)


def test_cutting_without_scaling_is_slicing():
    images, mask = torch.rand(2, 37, 48, 3), torch.rand(2, 37, 48)
    placement = Placement((48, 32), (48, 37))
    assert torch.equal(place_images(images, placement), images[:, 3:35])
    assert torch.equal(place_mask(mask, placement), mask[:, 3:35])


def test_the_border_repeats_the_edge_and_is_no_part_of_the_mask():
    images, mask = torch.rand(2, 32, 41, 3), torch.rand(2, 32, 41)
    placement = fit_size(41, 32, multiple=16, max_side=48, mode="pad")
    assert placement == Placement((48, 32), (41, 32))
    fitted, kept = place_images(images, placement), place_mask(mask, placement)
    assert torch.equal(fitted[:, :, 3:44], images) and torch.equal(kept[:, :, 3:44], mask)
    assert torch.equal(fitted[:, :, :3], images[:, :, :1].expand(-1, -1, 3, -1))
    assert torch.equal(fitted[:, :, 44:], images[:, :, -1:].expand(-1, -1, 4, -1))
    assert kept[:, :, :3].eq(0).all() and kept[:, :, 44:].eq(0).all()


@every_mode
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_values_stay_in_0_and_1(mode, dtype):
    """Bicubic overshoots at hard edges."""
    images, mask = (torch.rand(2, 70, 110, *c).round().to(dtype) for c in ((3,), ()))
    placement = fit_size(110, 70, multiple=16, max_side=64, mode=mode)
    for fitted in (place_images(images, placement), place_mask(mask, placement)):
        assert fitted.dtype == dtype and fitted.is_contiguous()
        assert fitted.min() >= 0 and fitted.max() <= 1 and fitted.float().std() > 0.01


@every_mode
def test_a_thin_line_of_the_mask_does_not_end(mode):
    placement = fit_size(640, 360, multiple=16, max_side=64, mode=mode)
    for column in range(280, 300):
        line = torch.zeros(1, 360, 640)
        line[:, :, column] = 1
        assert place_mask(line, placement)[0].amax(1)[2:-2].min() > 0.04
