"""Noise spaces and DDIM, against the alpha-bar form of the papers and against each other."""

import pytest
import torch
from spacetime_edit.core.parametrization import (
    NoiseSpace,
    add_noise,
    ddim_inversion_step,
    ddim_step,
    noise_fraction,
    predicted_noise,
)
from spacetime_edit.core.polyak_step import polyak_move

VE, RF, VP = NoiseSpace.VE, NoiseSpace.RF, NoiseSpace.VP
LEVELS = torch.tensor([20.0, 8.0, 3.0, 1.2, 0.5, 0.2, 0.0], dtype=torch.float64)  # s / a, the same in every space
MEANS = torch.tensor([[-1.5, 0.4, 1.0], [1.2, -0.7, 0.3], [0.1, 1.6, -1.1]], dtype=torch.float64)
SPREAD = 0.6
ANCHOR = torch.tensor([0.8, -0.3, 0.5], dtype=torch.float64)


def posterior_mean(noisy, level):
    """E[x0 | x0 + level eps] for points (N, 3) of a mixture of three equal Gaussians."""
    means = MEANS.to(noisy)
    variance = SPREAD**2 + level**2
    distance = (noisy[:, None] - means).square().sum(-1)
    share = torch.softmax(-distance / (2 * variance), -1)
    towards = (SPREAD**2 * noisy[:, None] + level**2 * means) / variance
    return (share[..., None] * towards).sum(1)


def sigma_of(level, space):
    """The sigma at which `space` has s / a = level."""
    return level / (1 + level) if space is RF else level


def denoiser(space):
    """The same network, written for latents of `space`."""

    def denoise(x, sigma):
        a, s = space.signal_and_noise(sigma)
        return posterior_mean(x / a, s / a)

    return denoise


def similarity_to_anchor(u):
    """A smooth loss in [-1, 0] of latents in clean scale."""
    direction = ANCHOR.to(u).expand_as(u).flatten()
    cosine = torch.nn.functional.cosine_similarity(torch.sin(u).flatten(), direction, dim=0)
    return -(1 + cosine) / 2


def similarity_gradient(space, sigma):
    def gradient(x):
        a, _ = space.signal_and_noise(sigma)
        leaf = x.clone().requires_grad_()
        loss = similarity_to_anchor(leaf / a)
        return loss.detach(), torch.autograd.grad(loss, leaf)[0]

    return gradient


def generate(start, space, iterations=0, share=1.0):
    """Latents in clean scale after every step, from `start` in clean scale."""
    sigmas = sigma_of(LEVELS.to(start), space)
    x = start * space.signal_and_noise(sigmas[0])[0]
    seen = []
    for now, then in zip(sigmas[:-1], sigmas[1:], strict=True):
        for _ in range(iterations):
            loss, gradient = similarity_gradient(space, now)(x)
            x = x + polyak_move(float(loss), gradient, share=share, longest=0.5 * float(space.latent_scale(now)))
        x = ddim_step(x, denoiser(space)(x, now), now, then, space)
        seen.append(x / space.signal_and_noise(then)[0])
    return torch.stack(seen)


def invert(clean, space, refinements=1):
    """Latents in clean scale at every level, rising."""
    sigmas = sigma_of(LEVELS.to(clean), space).flip(0)
    x, seen = clean, [clean]
    for now, then in zip(sigmas[:-1], sigmas[1:], strict=True):
        x, _ = ddim_inversion_step(x, denoiser(space), now, then, space, refinements)
        seen.append(x / space.signal_and_noise(then)[0])
    return torch.stack(seen)


def points(scale, dtype=torch.float64):
    return scale * torch.randn(40, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64).to(dtype)


def relative(a, b):
    return float((a - b).abs().max() / b.abs().max())


def test_signal_and_noise_of_each_space():
    sigma = torch.linspace(0, 1, 11, dtype=torch.float64)
    for space in NoiseSpace:
        a, s = space.signal_and_noise(sigma)
        assert a.shape == s.shape == sigma.shape
        assert (a[0], s[0]) == (1, 0)
        assert torch.allclose(space.latent_scale(sigma) ** 2, a**2 + s**2, rtol=1e-14)
    a, s = VE.signal_and_noise(sigma)
    assert a.eq(1).all() and torch.equal(s, sigma)
    a, s = RF.signal_and_noise(sigma)
    assert torch.allclose(a + s, torch.ones_like(sigma), rtol=1e-15) and torch.equal(s, sigma)
    a, s = VP.signal_and_noise(sigma)
    assert torch.allclose(a**2 + s**2, torch.ones_like(sigma), rtol=1e-14)
    assert torch.allclose(s, a * sigma, rtol=1e-14)


@pytest.mark.parametrize("space", NoiseSpace)
def test_noise_comes_back(space):
    x0, noise, sigma = points(1.0), points(1.0).flip(0), torch.tensor(0.7, dtype=torch.float64)
    assert torch.allclose(predicted_noise(add_noise(x0, noise, sigma, space), x0, sigma, space), noise, atol=1e-12)


def network(x, alpha_bar):
    """An epsilon network trained on variance-preserving latents."""
    return torch.tanh(1.3 * x + 0.2) * (1 - alpha_bar).sqrt() + 0.1 * x.roll(1, -1)


def network_in_ve(x, sigma):
    """Its prediction of x0 as the host has it: for variance-exploding latents."""
    alpha_bar = 1 / (1 + sigma**2)
    return x - sigma * network(x * alpha_bar.sqrt(), alpha_bar)


def alpha_bar_step(x, noise, now, then):
    """Song et al. 2021, eq. 12 with eta 0."""
    return then.sqrt() * (x - (1 - now).sqrt() * noise) / now.sqrt() + (1 - then).sqrt() * noise


ALPHA_BARS = torch.tensor([0.004, 0.05, 0.2, 0.5, 0.8, 0.97, 1.0], dtype=torch.float64)
VE_SIGMAS = ((1 - ALPHA_BARS) / ALPHA_BARS).sqrt()


def test_a_vp_model_in_ve_is_ddim_with_alpha_bar():
    reference = points(1.0)
    ours = reference / ALPHA_BARS[0].sqrt()
    for k in range(len(VE_SIGMAS) - 1):
        now, then = ALPHA_BARS[k], ALPHA_BARS[k + 1]
        reference = alpha_bar_step(reference, network(reference, now), now, then)
        ours = ddim_step(ours, network_in_ve(ours, VE_SIGMAS[k]), VE_SIGMAS[k], VE_SIGMAS[k + 1], VE)
        assert relative(ours * then.sqrt(), reference) <= 1e-12


def test_without_refinements_it_is_the_classic_inversion():
    """One call a step, eps_theta(z_t, t + 1) at the latent itself, which the network sees variance-preserving."""
    x = reference = points(1.0)
    for k in range(len(VE_SIGMAS) - 1, 0, -1):
        now, then = ALPHA_BARS[k], ALPHA_BARS[k - 1]
        reference = alpha_bar_step(reference, network(reference, then), now, then)
        x, _ = ddim_inversion_step(x, network_in_ve, VE_SIGMAS[k], VE_SIGMAS[k - 1], VE, 0)
        assert relative(x * then.sqrt(), reference) <= 1e-10, f"step to alpha-bar {float(then)}"


def test_the_last_step_gives_the_prediction_itself():
    x, denoised = points(1.0), points(1.0).flip(0)
    for space in NoiseSpace:
        assert torch.equal(ddim_step(x, denoised, torch.tensor(0.5), torch.tensor(0.0), space), denoised)


GUIDANCE = {
    "plain sampling": {},
    "one move": dict(share=0.02, iterations=1),
    "three moves": dict(share=0.01, iterations=3),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("guidance", GUIDANCE.values(), ids=GUIDANCE)
def test_generation_is_the_same_in_every_space(guidance, dtype):
    """One denoiser and one lambda, three ways to write the noisy latent."""
    limit = 1e-10 if dtype == torch.float64 else 1e-5
    reference = generate(points(20.0, dtype), VE, **guidance)
    for space in (RF, VP):
        assert relative(generate(points(20.0, dtype), space, **guidance), reference) <= limit
    if guidance:
        assert relative(generate(points(20.0, dtype), VE), reference) > 1e-2, "the guidance did nothing"


@pytest.mark.parametrize("refinements", [0, 1, 3])
def test_inversion_is_the_same_in_every_space(refinements):
    reference = invert(points(1.0), VE, refinements)
    for space in (RF, VP):
        assert relative(invert(points(1.0), space, refinements), reference) <= 1e-10


@pytest.mark.parametrize("space", NoiseSpace)
def test_refinements_make_the_round_trip_exact(space):
    clean = points(1.0)
    errors = [relative(generate(invert(clean, space, n)[-1], space)[-1], clean) for n in (0, 1, 3, 60)]
    assert errors == sorted(errors, reverse=True)
    assert errors[1] < 0.7 * errors[0]
    assert errors[-1] < 1e-6


def test_inversion_predicts_the_noise_at_the_noisier_level():
    seen = []

    def denoise(x, sigma):
        seen.append(float(sigma))
        return 0.5 * x

    ddim_inversion_step(points(1.0), denoise, torch.tensor(0.2), torch.tensor(0.5), VE, refinements=2)
    assert seen == [0.5] * 3


@pytest.mark.parametrize("percent", [0.0, 1e-3, 0.25, 0.5, 0.9, 1.0])
def test_noise_fraction_inverts_a_schedule(percent):
    assert abs(noise_fraction(7 * (1 - percent) ** 3, lambda p: 7 * (1 - p) ** 3) - (1 - percent)) <= 2e-6
