"""How far a latent moves along the gradient of a loss whose least value is known: Polyak's step.

B. T. Polyak, Minimization of unsmooth functionals, 1969. The loss of STR-Match is a negative cosine, so its minimum is
-1. On the linear model loss + <g, d> the shortest d that reaches it is -(1 + loss) g / |g|^2: far from a match the step
is long, near one it is short, and no unit of the latent is in it. With x -> c x the gradient becomes g / c and the step
c d, so that every noise space takes the same path.
"""

from torch import Tensor

ROUNDING = 1e-7
"""Distance of a loss from -1 at which there is nothing left but rounding, of a float32 number."""


def polyak_move(
    loss: float,
    gradient: Tensor,
    direction: Tensor | None = None,
    *,
    share: float = 1.0,
    longest: float,
    rounding: float = ROUNDING,
) -> Tensor:
    """What to add to a latent to go `share` of the way to loss -1, as far as a linear model of the loss says.

    loss in [-1, 0]; gradient: d loss / d latent; direction: of the same shape, what of the gradient may act, such as
    the gradient inside a mask; None: all of it. longest: RMS, over the places where the direction is not 0, that a move
    has at most, in units of the latent. 0 where no more than `rounding` is left, or nothing may act.
    """
    direction = gradient if direction is None else direction
    largest = float(direction.abs().max())
    left = 1 + loss - rounding
    if left <= 0 or largest == 0:
        return direction.new_zeros(direction.shape)
    unit = direction / largest  # squares of small numbers would be 0
    slope = float((gradient / largest * unit).sum()) * largest  # of the loss along -unit
    length = share * left / slope
    size = float((unit.square().sum() / unit.count_nonzero()).sqrt())
    return -min(length, longest / size) * unit
