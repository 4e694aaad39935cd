"""Which sigmas belong to a trajectory."""

import pytest
import torch
from spacetime_edit.core.parametrization import NoiseSpace
from spacetime_edit.core.trajectory import Trajectory

SIGMAS = torch.tensor([14.6, 6.0, 2.9, 1.6, 0.5, 0.03, 0.0])
TRAJECTORY = Trajectory(torch.zeros(7, 8, 4, 16, 16), SIGMAS, NoiseSpace.VE, None, None)


def test_sizes():
    assert TRAJECTORY.steps == 6 and TRAJECTORY.shape == (8, 4, 16, 16)


@pytest.mark.parametrize(("part", "offset"), [(slice(0, 7), 0), (slice(3, 7), 3), (slice(0, 4), 0), (slice(2, 5), 2)])
def test_any_contiguous_part_is_found(part, offset):
    assert TRAJECTORY.offset_of(SIGMAS[part]) == offset
    assert TRAJECTORY.offset_of(SIGMAS[part].double() * (1 + 1e-7)) == offset


WRONG = {
    "another schedule": torch.tensor([14.6, 5.0, 2.0, 0.0]),
    "a gap": SIGMAS[[0, 1, 3, 4]],
    "rising": SIGMAS.flip(0),
    "longer": torch.cat([torch.tensor([20.0]), SIGMAS]),
    "slightly off": SIGMAS * 1.001,
    "FlipSigmas' end": torch.cat([SIGMAS[4:6], torch.tensor([1e-4])]),
}


@pytest.mark.parametrize("sigmas", WRONG.values(), ids=WRONG)
def test_other_sigmas_are_refused(sigmas):
    with pytest.raises(ValueError, match=r"^sigmas: \d values from .* are not a contiguous part .*SIGMAS output"):
        TRAJECTORY.offset_of(sigmas)
