"""The step rules, against their formulas and torch.optim."""

import pytest
import torch
from spacetime_edit.core.step_rules import Descent

TARGET = torch.randn(6, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def descend(x, gradient, *, iterations=1, **options):
    """Moves x along gradient(x) -> (loss, d loss / d x) so many times."""
    descent = Descent(**options)
    for _ in range(iterations):
        loss, g = gradient(x)
        x = descent.step(x, float(loss), g)
    return x


def cosine_gradient(x):
    """Loss and gradient of the negative cosine to TARGET."""
    leaf = x.clone().requires_grad_()
    loss = -torch.nn.functional.cosine_similarity(leaf.flatten(), TARGET.flatten(), dim=0)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def fixed_gradient(loss, gradient):
    return lambda x: (torch.tensor(loss, dtype=x.dtype), gradient)


def rms(x):
    return float(x.square().mean().sqrt())


def start():
    return torch.randn(6, 4, dtype=torch.float64)


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e6])
def test_a_normalised_step_is_lambda_times_the_scale(size):
    """However large the gradient: the RMS of the step is lambda r and it points against the gradient."""
    x, gradient = start(), size * torch.randn(6, 4, dtype=torch.float64)
    step = descend(x, fixed_gradient(-0.3, gradient), strength=0.02, scale=torch.tensor(7.0)) - x
    assert abs(rms(step) - 0.14) <= 1e-12
    assert torch.allclose(step / rms(step), -gradient / rms(gradient), atol=1e-9)


def test_a_plain_step_is_lambda_times_the_squared_scale():
    x, gradient = start(), torch.randn(6, 4, dtype=torch.float64)
    moved = descend(x, fixed_gradient(-0.3, gradient), strength=0.02, scale=torch.tensor(7.0), rule="plain")
    assert torch.allclose(moved, x - 0.02 * 49 * gradient, atol=1e-12)


@pytest.mark.parametrize("rule", ["normalised", "plain", "adam"])
@pytest.mark.parametrize(("distance", "factor"), [(0.5, 1.0), (1e-3, 1.0), (2.5e-4, 0.25), (0.0, 0.0)])
def test_steps_vanish_at_the_optimum(rule, distance, factor):
    """The step is multiplied by min(1, (1 - cos) / 1e-3): at cos 1 the gradient is rounding noise."""
    x, gradient = start(), torch.randn(6, 4, dtype=torch.float64)
    options = dict(strength=0.02, scale=torch.tensor(7.0), rule=rule)
    free = descend(x, fixed_gradient(0.0, gradient), **options) - x
    damped = descend(x, fixed_gradient(distance - 1, gradient), **options) - x
    assert torch.allclose(damped, factor * free, atol=1e-9 * rms(free))


@pytest.mark.parametrize("rule", ["normalised", "adam"])
def test_a_zero_gradient_moves_nothing(rule):
    x = start()
    assert torch.equal(descend(x, fixed_gradient(-0.3, torch.zeros_like(x)), strength=1, scale=1, rule=rule), x)


def test_adam_equals_torch():
    """Three iterations on the cosine loss; torch's epsilon is absolute, ours relative."""
    x = start()
    leaf = x.clone().requires_grad_()
    optimizer = torch.optim.Adam([leaf], lr=0.02 * 7.0, eps=1e-14)
    for _ in range(3):
        leaf.grad = cosine_gradient(leaf.detach())[1]
        optimizer.step()
    ours = descend(x, cosine_gradient, strength=0.02, scale=torch.tensor(7.0), rule="adam", iterations=3)
    assert rms(ours - leaf.detach()) <= 1e-6 * rms(ours - x)


def test_adam_does_not_depend_on_the_size_of_the_gradient():
    """In float32, where the gradients of a mean cosine square to less than the usual epsilon."""
    x, tiny = start().float(), 1e-12

    def scaled(factor):
        return lambda z: [t.float() * f for t, f in zip(cosine_gradient(z.double()), (1, factor), strict=True)]

    options = dict(strength=0.02, scale=torch.tensor(1.0), rule="adam", iterations=3)
    assert torch.allclose(descend(x, scaled(tiny), **options), descend(x, scaled(1.0), **options), atol=1e-5)


@pytest.mark.parametrize("rule", ["normalised", "adam"])
def test_iterations_go_down_the_loss(rule):
    x = start()
    options = dict(strength=0.05, scale=torch.tensor(1.0), rule=rule)
    losses = [float(cosine_gradient(descend(x, cosine_gradient, iterations=n, **options))[0]) for n in (1, 5, 20)]
    assert float(cosine_gradient(x)[0]) > losses[0] > losses[1] > losses[2]


def test_strength_0_moves_nothing():
    x = start()
    assert torch.equal(descend(x, cosine_gradient, strength=0.0, scale=torch.tensor(7.0), iterations=3), x)
