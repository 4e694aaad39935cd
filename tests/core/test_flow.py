"""Flow without weights, on pictures whose motion is known."""

import pytest
import torch
from kornia.filters import gaussian_blur2d
from spacetime_edit.core.flow import (
    clip_flow,
    estimate_flow,
    flow_picture,
    follow,
    grid_points,
    occlusion,
    track_points,
)
from spacetime_edit.core.metrics import warp_error

SIZE = 96


def texture(seed=0, size=SIZE + 40):
    noise = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(seed))
    smooth = gaussian_blur2d(noise, (9, 9), (2.0, 2.0))
    return ((smooth - smooth.min()) / (smooth.max() - smooth.min()))[0].movedim(0, -1)


def moved(picture, dx, dy):
    return picture[20 - dy : 20 - dy + SIZE, 20 - dx : 20 - dx + SIZE]


@pytest.mark.parametrize("step", [(0, 0), (1, 0), (-3, 2), (8, -5)])
def test_the_shift_of_a_picture_is_found(step):
    picture = texture()
    flow = estimate_flow(moved(picture, 0, 0), moved(picture, *step))
    inner = flow[:, 16:-16, 16:-16]
    assert (inner - torch.tensor(step).view(2, 1, 1)).norm(dim=0).mean() <= 0.25


def test_what_moves_by_itself_is_found_beside_what_stands():
    picture, other = texture(1), texture(2)
    frames = []
    for i in range(3):
        frame = moved(picture, 0, 0).clone()
        frame[30:66, 20 + 2 * i : 56 + 2 * i] = other[:36, :36]
        frames.append(frame)
    flow = clip_flow(torch.stack(frames))
    assert flow.shape == (2, 2, SIZE, SIZE)
    assert abs(float(flow[0, 0, 40:56, 30:46].mean()) - 2) <= 0.3
    assert flow[0, :, :16].norm(dim=0).mean() <= 0.1
    assert warp_error(torch.stack(frames), flow) < 0.2 * warp_error(torch.stack(frames), torch.zeros_like(flow))


def test_a_flat_picture_does_not_move():
    assert not estimate_flow(torch.full((32, 48, 3), 0.5), torch.full((32, 48, 3), 0.5)).any()


def test_what_hides_and_what_leaves_has_no_match():
    """A square moves right over a still picture: what it will cover, and what leaves at the edge."""
    forward, backward = torch.zeros(2, 40, 60), torch.zeros(2, 40, 60)
    forward[0, 10:30, 10:30] = 8  # the square
    backward[0, 10:30, 18:38] = -8
    hidden = occlusion(forward, backward)
    assert hidden[10:30, 30:38].all() and not hidden[:10].any() and not hidden[12:28, 12:28].any()
    leaving = torch.full((2, 40, 60), 0.0)
    leaving[0] = 5
    assert occlusion(leaving, -leaving)[:, -5:].all() and not occlusion(leaving, -leaving)[:, :50].any()


def test_points_stand_on_a_grid_and_in_the_mask():
    points = grid_points(32, 48, 16)
    assert points.tolist() == [[8, 8], [24, 8], [40, 8], [8, 24], [24, 24], [40, 24]]
    mask = torch.zeros(32, 48)
    mask[:, 20:30] = 1
    assert grid_points(32, 48, 16, mask).tolist() == [[24, 8], [24, 24]]
    assert len(grid_points(5, 5, 16)) == 1
    with pytest.raises(ValueError, match="mask: no point of a grid of 16 pixels"):
        grid_points(32, 48, 16, torch.zeros(32, 48))


def test_points_follow_a_flow_between_pixels_and_stop_at_the_edge():
    flow = torch.zeros(2, 20, 30)
    flow[0] = torch.linspace(0, 2.9, 30)  # a tenth of x
    flow[1] = 1
    points = torch.tensor([[10.0, 5.0], [12.5, 5.5], [28.0, 19.0]])
    assert torch.allclose(follow(points, flow), torch.tensor([[11.0, 6.0], [13.75, 6.5], [29.0, 19.0]]), atol=1e-4)


def test_tracks_are_those_of_what_moves():
    """Points on a moving square go along; those that it covers are lost; those beside stay."""
    picture, other = texture(1), texture(2)
    frames = []
    for i in range(5):
        frame = moved(picture, 0, 0).clone()
        frame[30:66, 20 + 3 * i : 56 + 3 * i] = other[:36, :36]
        frames.append(frame)
    points = torch.tensor([[38.0, 48.0], [61.0, 48.0], [80.0, 10.0]])
    tracks, seen = track_points(torch.stack(frames), points, estimate_flow)
    assert tracks.shape == (3, 5, 2) and seen.shape == (3, 5)
    assert (tracks[0, -1] - torch.tensor([50.0, 48.0])).norm() <= 1.0
    assert (tracks[2, -1] - points[2]).norm() <= 0.5
    assert seen[0].all() and seen[2].all() and not seen[1, -1]


def test_the_picture_shows_direction_and_length():
    flow = torch.zeros(2, 1, 4)
    flow[:, 0, 1], flow[:, 0, 2], flow[:, 0, 3] = torch.tensor([2.0, 0]), torch.tensor([0, 2.0]), torch.tensor([1.0, 0])
    picture = flow_picture(flow)[0]
    assert torch.allclose(picture[0], torch.ones(3)) and torch.allclose(
        picture[1], torch.tensor([1.0, 0, 0]), atol=1e-4
    )
    assert torch.allclose(picture[2], torch.tensor([0.5, 1, 0]), atol=1e-4)
    assert torch.allclose(picture[3], torch.tensor([1, 0.5, 0.5]), atol=1e-4)
    assert torch.allclose(flow_picture(flow, largest=4.0)[0, 1], torch.tensor([1, 0.5, 0.5]), atol=1e-4)


def test_frames_smaller_than_the_window_are_refused():
    with pytest.raises(ValueError, match="frames of 9 x 7 pixels are too small"):
        estimate_flow(torch.rand(7, 9, 3), torch.rand(7, 9, 3))
    assert estimate_flow(torch.rand(8, 9, 3), torch.rand(8, 9, 3)).isfinite().all()
