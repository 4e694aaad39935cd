"""Regions from mask batches and coloured layouts whose regions are known."""

import pytest
import torch
from spacetime_edit.core.region_sources import regions_of_colours, regions_of_masks

RED, GREEN, BLUE = torch.eye(3)


def layout(noise=0.0):
    """A red region of 32 x 32 that moves, a green one of 16 x 16, on black."""
    video = torch.zeros(3, 64, 64, 3)
    for f in range(3):
        video[f, 4:36, 4 * f : 4 * f + 32] = RED
        video[f, 40:56, 40:56] = GREEN
    return (video + noise * torch.randn(video.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)


@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_each_colour_is_a_region_the_largest_first(noise):
    big, small = regions_of_colours(layout(noise), [" a cat ", "a dog"])
    assert (big.phrase, small.phrase) == ("a cat", "a dog")
    for f in range(3):
        expected = torch.zeros(64, 64)
        expected[4:36, 4 * f : 4 * f + 32] = 1
        assert torch.equal(big.mask[f], expected)
    assert small.mask.sum() == 3 * 16 * 16


def test_soft_rims_are_no_regions():
    video = layout()
    video[:, 36] = (video[:, 35] + video[:, 37]) / 2  # half red
    assert len(regions_of_colours(video, ["a", "b"])) == 2


def test_wide_rims_between_two_colours_are_no_regions():
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    inside = torch.sigmoid(1.2 * (14 - torch.hypot(x - 30, y - 32)))[None, ..., None]  # 5 px wide
    video = torch.lerp(torch.tensor([0.75, 0.25, 0.25]), torch.tensor([0.25, 0.38, 0.75]), inside)
    background, disc = regions_of_colours(video, ["a", "b"])
    wanted = (inside[0, ..., 0] > 0.5).float()
    assert (disc.mask[0] * wanted).sum() > 0.97 * torch.maximum(disc.mask[0], wanted).sum()
    assert torch.equal(background.mask, 1 - disc.mask)


def test_a_wrong_number_of_colours_names_those_found():
    with pytest.raises(ValueError, match="2 colours besides black .*#ff0000.* there are 3 lines"):
        regions_of_colours(layout(), ["a", "b", "c"])
    with pytest.raises(ValueError, match="0 colours besides black"):
        regions_of_colours(torch.zeros(1, 8, 8, 3), ["a"])


def test_a_batch_of_masks_is_cut_by_the_lines():
    masks = torch.arange(6.0).view(6, 1, 1).expand(6, 4, 4)
    first, second = regions_of_masks(masks, ["a", "b"])
    assert first.mask[:, 0, 0].tolist() == [0, 1, 2] and second.mask[:, 0, 0].tolist() == [3, 4, 5]
    with pytest.raises(ValueError, match="there are 6 for 4 lines"):
        regions_of_masks(masks, ["a"] * 4)
