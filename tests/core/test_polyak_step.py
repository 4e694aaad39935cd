"""Polyak's step, by its properties."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from spacetime_edit.core.polyak_step import polyak_move

FREE = 1e9


def draw(seed, dtype=torch.float64):
    return torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def cosine_loss(x, seed=1):
    """The negative cosine to another tensor, and its gradient."""
    leaf = x.clone().requires_grad_()
    loss = -torch.nn.functional.cosine_similarity(leaf.flatten(), draw(seed).flatten(), dim=0)
    return float(loss.detach()), torch.autograd.grad(loss, leaf)[0]


@given(st.floats(-0.99, 0.0), st.floats(0.01, 2.0), st.integers(0, 9))
def test_on_a_linear_loss_it_goes_its_share_of_the_way(loss, share, seed):
    gradient = draw(seed)
    move = polyak_move(loss, gradient, share=share, longest=FREE)
    assert float((gradient * move).sum()) == pytest.approx(-share * (1 + loss), rel=1e-4, abs=2e-6)


def test_no_shorter_move_gets_there():
    """It has the direction of the gradient, so any other move to the same loss is longer."""
    gradient = draw(0)
    move = polyak_move(-0.4, gradient, longest=FREE)
    assert torch.allclose(move / move.norm(), -gradient / gradient.norm())


@pytest.mark.parametrize("unit", [1e-3, 7.0, 500.0])
def test_the_latents_unit_does_not_matter(unit):
    """A latent that is `unit` times as large has gradients so much smaller, and moves so much further."""
    gradient, direction = draw(0), draw(0) * (draw(1) > 0)
    for given_direction in (None, direction):
        small = polyak_move(-0.4, gradient, given_direction, longest=0.5)
        scaled = None if given_direction is None else direction / unit
        large = polyak_move(-0.4, gradient / unit, scaled, longest=0.5 * unit)
        torch.testing.assert_close(large, unit * small)


def test_inside_a_mask_it_does_what_the_inside_can():
    mask = torch.zeros(3, 5, 4, dtype=torch.float64)
    mask[:, 2:4] = 1
    gradient = draw(0)
    move = polyak_move(-0.4, gradient, gradient * mask, longest=FREE)
    assert not (move * (1 - mask)).any()
    assert float((gradient * move).sum()) == pytest.approx(-0.6, rel=1e-5)
    soft = polyak_move(-0.4, gradient, gradient * (0.5 * mask), longest=FREE)
    torch.testing.assert_close(soft, move)


def test_no_move_is_longer_than_the_longest():
    gradient = 1e-3 * draw(0)
    move = polyak_move(-0.4, gradient, longest=0.5)
    assert float(move.square().mean().sqrt()) == pytest.approx(0.5)
    inside = gradient.clone()
    inside[1:] = 0
    move = polyak_move(-0.4, gradient, inside, longest=0.5)
    assert float(move[:1].square().mean().sqrt()) == pytest.approx(0.5) and not move[1:].any()


@pytest.mark.parametrize("loss", [-1.0, -1 + 1e-9, -1 - 1e-9])
def test_a_match_moves_nothing_whatever_rounding_says(loss):
    assert not polyak_move(loss, 1e-12 * draw(0), longest=FREE).any()


def test_a_gradient_of_zero_moves_nothing():
    assert not polyak_move(-0.4, torch.zeros(2, 3), longest=FREE).any()
    assert not polyak_move(-0.4, draw(0), torch.zeros(3, 5, 4), longest=FREE).any()


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e20])
def test_squares_neither_vanish_nor_overflow(size):
    gradient = draw(0, torch.float32)
    move = polyak_move(-0.4, size * gradient, longest=FREE * 1e30)
    torch.testing.assert_close(move * size, polyak_move(-0.4, gradient, longest=FREE), rtol=1e-4, atol=1e-6)


def test_it_goes_down_the_cosine_and_stays():
    x = draw(0)
    losses = []
    for _ in range(12):
        loss, gradient = cosine_loss(x)
        losses.append(loss)
        x = x + polyak_move(loss, gradient, longest=10.0)
    assert losses[0] > -0.5 and losses[-1] < -1 + 1e-3
    assert all(after < before for before, after in zip(losses, losses[1:], strict=False) if before > -1 + 1e-3)
