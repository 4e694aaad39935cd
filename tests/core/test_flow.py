"""Flow without weights, on pictures whose motion is known."""

import pytest
import torch
from kornia.filters import gaussian_blur2d
from spacetime_edit.core.flow import clip_flow, estimate_flow
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
