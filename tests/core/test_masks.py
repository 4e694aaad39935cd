"""Masks of any size on the latent grid."""

import pytest
import torch
from spacetime_edit.core.frames import FramePattern
from spacetime_edit.core.masks import as_frames, blend, dilate, latent_mask, redraw_inside, to_latent_grid

FRAMES, HEIGHT, WIDTH, CELL = 3, 6, 10, 8
SOURCE = (HEIGHT * CELL, WIDTH * CELL)


def point(row, column, size=SOURCE):
    mask = torch.zeros(1, *size)
    mask[0, row, column] = 1
    return mask


def on_grid(mask, **options):
    return latent_mask(mask, FramePattern().of(FRAMES), HEIGHT, WIDTH, cell=CELL, **options)


@pytest.mark.parametrize("size", [SOURCE, (HEIGHT, WIDTH), (1, 1), (7, 9), (200, 333), (3, 500), (500, 3)], ids=str)
@pytest.mark.parametrize("frames", [1, FRAMES])
def test_any_size_fits(frames, size):
    full = on_grid(torch.ones(frames, *size))
    assert full.shape == (FRAMES, HEIGHT, WIDTH) and full.eq(1).all()
    assert on_grid(torch.zeros(frames, *size), dilation=16.0).eq(0).all()


def test_shapes_of_one_mask_and_one_a_frame():
    one, many = torch.rand(5, 4), torch.rand(FRAMES, 5, 4)
    assert torch.equal(as_frames(one, FRAMES), one.expand(FRAMES, 5, 4))
    assert torch.equal(as_frames(one[None], FRAMES), one.expand(FRAMES, 5, 4))
    assert torch.equal(as_frames(many, FRAMES), many)
    assert torch.equal(on_grid(many)[1], on_grid(many[1])[0])


def test_a_wrong_number_of_frames_is_named():
    with pytest.raises(ValueError, match=r"^mask: it has 2 frames, the clip has 3; connect one mask .* or 3 of them"):
        on_grid(torch.ones(2, *SOURCE))


def test_masks_of_the_clips_frames_are_joined_as_the_latents_are():
    """Latents of 4 n + 1 frames: the first latent frame holds one, each other four."""
    time = FramePattern((1,), (4,)).of(FRAMES)
    many = torch.zeros(9, *SOURCE)
    many[0, 0, 0] = many[4, 8, 8] = many[5, 16, 16] = 1
    joined = latent_mask(many, time, HEIGHT, WIDTH, cell=CELL)
    assert [tuple(place) for place in joined.nonzero().tolist()] == [(0, 0, 0), (1, 1, 1), (2, 2, 2)]
    of_latent = torch.rand(FRAMES, *SOURCE)
    assert torch.equal(latent_mask(of_latent, time, HEIGHT, WIDTH, cell=CELL), on_grid(of_latent))
    with pytest.raises(ValueError, match=r"it has 8 frames, the clip has 9 \(3 in the latent\).* 9 or 3"):
        latent_mask(torch.ones(8, *SOURCE), time, HEIGHT, WIDTH)


def test_values_outside_0_and_1_are_clamped():
    assert on_grid(torch.full((1, *SOURCE), 7.0)).max() == 1
    assert on_grid(torch.full((1, *SOURCE), -7.0)).min() == 0


@pytest.mark.parametrize("radius", [0, 1, 5])
def test_dilation_of_a_point_is_a_square(radius):
    grown = dilate(point(20, 30), radius)[0]
    rows, columns = torch.arange(SOURCE[0])[:, None], torch.arange(SOURCE[1])
    assert torch.equal(grown, ((rows - 20).abs().le(radius) & (columns - 30).abs().le(radius)).float())


def cells(low, high):
    """Latent cells that the source pixels low..high touch."""
    return set(range(low // CELL, high // CELL + 1))


@pytest.mark.parametrize("dilation", [0, 3, 4, 11, 16])
def test_dilation_counts_source_pixels(dilation):
    """A point at pixel (20, 36) reaches exactly the cells within `dilation` pixels."""
    grid = on_grid(point(20, 36), dilation=float(dilation))[0]
    rows, columns = cells(20 - dilation, 20 + dilation), cells(36 - dilation, 36 + dilation)
    assert {(r, c) for r, c in grid.nonzero().tolist()} == {(r, c) for r in rows for c in columns}


@pytest.mark.parametrize("zoom", [2, 4])
def test_dilation_does_not_depend_on_the_resolution_of_the_mask(zoom):
    mask = point(20, 36)
    large = mask.repeat_interleave(zoom, 1).repeat_interleave(zoom, 2)
    assert torch.equal(on_grid(large, dilation=11.0), on_grid(mask, dilation=11.0))


def test_dilation_counts_source_pixels_in_both_directions_of_a_stretched_mask():
    """The same point in a mask twice as wide: 16 source pixels are 32 of its columns, but 16 of its rows."""
    mask = point(20, 36)
    assert torch.equal(on_grid(mask.repeat_interleave(2, 2), dilation=16.0), on_grid(mask, dilation=16.0))


@pytest.mark.parametrize("size", [SOURCE, (40, 333), (480, 800), (HEIGHT, 80), (4, 80)], ids=str)
def test_a_thin_line_survives(size):
    """A vertical line one pixel wide, wherever it stands and however tall the mask is."""
    for column in range(0, size[1], 7):
        line = torch.zeros(1, *size)
        line[:, :, column] = 1
        assert to_latent_grid(line, HEIGHT, WIDTH).amax(2).eq(1).all(), f"line at {column} is lost"


def test_blend_is_exact_where_the_mask_is_0_or_1():
    source, target = torch.randn(4, 5, 6) * 30, torch.randn(4, 5, 6) * 1e-3
    mask = torch.rand(4, 5, 6).round()
    assert torch.equal(blend(source, target, mask), torch.where(mask == 1, target, source))
    assert torch.allclose(blend(source, target, torch.tensor(0.25)), 0.75 * source + 0.25 * target, atol=1e-6)


def test_redrawn_cells_come_from_outside_the_same_place_in_every_frame():
    frames, side = 3, 6
    latent = torch.arange(4 * frames * side * side, dtype=torch.float64).view(4, frames, side, side)
    mask = torch.zeros(frames, side, side)
    for i in range(frames):
        mask[i, 1:4, i : i + 3] = 1
    redrawn = redraw_inside(latent, mask, torch.Generator().manual_seed(0))
    inside = (mask > 0).expand_as(latent)
    assert torch.equal(redrawn[~inside], latent[~inside])
    cells = latent.view(4, frames, -1)
    outside = set((mask.amax(0) == 0).flatten().nonzero()[:, 0].tolist())
    origin = redrawn.view(4, frames, -1) - cells[:, :, :1]  # which cell of its frame and channel
    for frame, cell in (mask.flatten(1) > 0).nonzero().tolist():
        places = set(origin[:, frame, cell].tolist())
        assert len(places) == 1 and places <= outside
    place = origin[0].where(mask.flatten(1) > 0, torch.nan)
    shared = [{p for p in place[:, cell].tolist() if p == p} for cell in range(side * side)]
    assert max(len(places) for places in shared) == 1
    assert torch.equal(redraw_inside(latent, mask, torch.Generator().manual_seed(0)), redrawn)
    assert not torch.equal(redraw_inside(latent, mask, torch.Generator().manual_seed(1)), redrawn)


def test_nothing_outside_leaves_nothing_to_draw_from():
    latent = torch.randn(4, 2, 3, 3)
    assert torch.equal(redraw_inside(latent, torch.ones(2, 3, 3), torch.Generator()), latent)
