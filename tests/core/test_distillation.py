"""Delta denoising score: the gradient against the difference of noises, the loop on a model whose optimum is known."""

import pytest
import torch
from spacetime_edit.core.distillation import STEP_UNIT, Answer, DeltaDenoising, delta_denoising_gradient
from spacetime_edit.core.parametrization import NoiseSpace, add_noise, predicted_noise

SHAPE = (4, 2, 3, 3)
SPACES = list(NoiseSpace)


def draw(seed):
    return torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def sigma_of(t):
    return torch.tensor(t, dtype=torch.float64)  # in (0, 1): fits every space


@pytest.mark.parametrize("space", SPACES)
def test_the_gradient_is_the_difference_of_the_predicted_noises(space):
    target, source, noise, d_target, d_source = map(draw, range(5))
    sigma = sigma_of(0.6)
    noises = [
        predicted_noise(add_noise(x, noise, sigma, space), d, sigma, space)
        for x, d in ((target, d_target), (source, d_source))
    ]
    found = delta_denoising_gradient(target, source, d_target, d_source, sigma, space)
    assert torch.allclose(found, noises[0] - noises[1], atol=1e-12)
    plain = delta_denoising_gradient(target, source, d_target, None, sigma, space)
    assert torch.allclose(plain, noises[0] - noise, atol=1e-12)


class Painter:
    """A model that predicts one clean latent for each prompt, whatever it sees; pull: a regulariser's gradient."""

    def __init__(self, target, source=None, pull=None):
        self.target, self.source, self.pull = target, source, pull
        self.seen, self.asked = [], []

    def __call__(self, question):
        scales = question.scales
        self.seen.append((question.target, question.source, float(question.sigma)))
        self.asked.append(scales)
        if self.pull is None:
            return Answer(self.target, self.source)
        if scales is None:
            return Answer(self.target, self.source, {"pull": 1.0}, {"pull": self.pull})
        return Answer(self.target, self.source, {"pull": 1.0}, pull=scales.get("pull", 0.0) * self.pull)


def run(answer, source, space=NoiseSpace.VE, seed=0, steps=200, told=None, **options):
    """The latent after some steps; told: gets the losses of each."""
    optimiser = DeltaDenoising(source, space, generator=torch.Generator().manual_seed(seed), **options)
    for step in range(steps):
        question = optimiser.ask(sigma_of)
        assert question.step == step
        losses = optimiser.tell(question, answer(question))
        if told is not None:
            told.append(losses)
    return optimiser.latent


@pytest.mark.parametrize("space", SPACES)
def test_it_finds_the_source_plus_what_the_prompts_differ_in(space):
    source, wanted, believed = draw(0), draw(1), draw(2)
    edited = run(Painter(wanted, believed), source, space, steps=400, t_range=(0.3, 0.9))
    assert torch.allclose(edited, source + wanted - believed, atol=1e-4)
    assert torch.allclose(run(Painter(wanted), source, space, steps=400, t_range=(0.3, 0.9)), wanted, atol=1e-4)


def test_equal_prompts_change_nothing():
    source, believed = draw(0), draw(1)
    assert torch.equal(run(Painter(believed, believed), source, steps=20), source)


def test_both_get_one_noise_and_times_are_drawn_from_the_range():
    look = Painter(draw(1), draw(2))
    run(look, draw(0), steps=200, t_range=(0.2, 0.4))
    times = torch.tensor([sigma for *_, sigma in look.seen])
    assert 0.2 <= times.min() < 0.215 and 0.385 < times.max() <= 0.4 and abs(times.mean() - 0.3) < 0.015
    first = look.seen[0]
    assert torch.equal(first[0], first[1])  # target = source before the first step
    noises = [(x - draw(0)) / s for _, x, s in look.seen]
    assert abs(torch.stack(noises).mean()) < 0.05 and abs(torch.stack(noises).std() - 1) < 0.05


def test_the_seed_decides_and_global_state_does_not():
    before = torch.get_rng_state()
    make = lambda seed: run(Painter(draw(1), draw(2)), draw(0), seed=seed, steps=5)  # noqa: E731
    first, again, other = make(3), make(3), make(4)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(before, torch.get_rng_state())


def test_one_step_is_plain_descent():
    source, wanted, believed = draw(0), draw(1), draw(2)
    look = Painter(wanted, believed)
    moved = run(look, source, steps=1, step_size=2.0)
    gradient = delta_denoising_gradient(
        source, source, wanted, believed, torch.tensor(look.seen[0][2], dtype=torch.float64), NoiseSpace.VE
    )
    assert torch.allclose(moved, source - 2.0 * STEP_UNIT * gradient, atol=1e-12)


def test_the_mask_filters_the_score_and_not_the_regulariser():
    mask = torch.zeros(SHAPE)
    mask[..., 0] = 1
    pull = torch.ones(SHAPE, dtype=torch.float64)
    source = draw(0)
    masked = run(Painter(draw(1), draw(2)), source, steps=3, mask=mask)
    assert torch.equal(masked[..., 1:], source[..., 1:]) and not torch.equal(masked[..., 0], source[..., 0])
    both = run(Painter(draw(1), draw(2), pull), source, steps=3, mask=mask, weights={"pull": 0.3})
    assert (both[..., 1:] < source[..., 1:]).all()
    held = run(Painter(draw(1), draw(2), pull), source, steps=9, mask=mask, mask_all=True, weights={"pull": 0.3})
    assert torch.equal(held[..., 1:], source[..., 1:]) and not torch.equal(held[..., 0], masked[..., 0])


@pytest.mark.parametrize("size", [1e-6, 1e6])
def test_balanced_regularisers_have_their_share_whatever_their_size(size):
    """Of the score's RMS inside the mask."""
    mask = torch.zeros(SHAPE)
    mask[..., 0] = 1
    source, pull, look = draw(0), size * draw(5), Painter(draw(1), draw(2), size * draw(5))
    plain = run(Painter(draw(1), draw(2)), source, steps=1, mask=mask)
    pulled = run(look, source, steps=1, mask=mask, weights={"pull": 0.3})
    rms = lambda x: float(x.square().mean().sqrt())  # noqa: E731
    of_score = rms((plain - source)[..., 0])
    assert rms((pulled - plain)[..., 0]) == pytest.approx(0.3 * of_score, rel=1e-6)
    assert torch.nn.functional.cosine_similarity((plain - pulled).flatten(), pull.flatten(), dim=0) > 1 - 1e-9


def test_fixed_weights_multiply():
    source, pull = draw(0), draw(5)
    plain = run(Painter(draw(1), draw(2)), source, steps=1)
    fixed = run(Painter(draw(1), draw(2), pull), source, steps=1, weights={"pull": 3.0}, balanced=False, step_size=1.0)
    plain = run(Painter(draw(1), draw(2)), source, steps=1, step_size=1.0)
    assert torch.allclose(plain - fixed, 3.0 * STEP_UNIT * pull, atol=1e-12)
    without = run(Painter(draw(1), draw(2), pull), source, steps=1, step_size=1.0)
    assert torch.equal(without, plain)


def test_every_step_tells_its_losses():
    told = []
    run(Painter(draw(1), draw(2), draw(5)), draw(0), steps=4, weights={"pull": 0.1}, told=told)
    assert len(told) == 4
    assert all(set(losses) == {"score", "pull"} and losses["score"] > 0 for losses in told)


def test_each_gradient_is_looked_at_by_itself_at_first_and_every_fourth_step():
    mask = torch.ones(SHAPE)
    look = Painter(draw(1), draw(2), draw(5))
    run(look, draw(0), steps=15, weights={"pull": 0.3}, mask=mask)
    assert [scales is None for scales in look.asked] == [s in (0, 1, 2, 3, 4, 5, 9, 13) for s in range(15)]
    fixed = Painter(draw(1), draw(2), draw(5))
    run(fixed, draw(0), steps=3, weights={"pull": 0.3, "none": 0.0}, balanced=False)
    assert fixed.asked == [{"pull": 0.3}] * 3


def test_a_gradient_of_zero_says_nothing_of_the_balance():
    """As before the first step, where source and target are one."""

    class Starting(Painter):
        def __call__(self, *arguments):
            self.pull = torch.zeros(SHAPE, dtype=torch.float64) if not self.seen else draw(5)
            return super().__call__(*arguments)

    look = Starting(draw(1), draw(2), draw(5))
    run(look, draw(0), steps=8, weights={"pull": 0.3}, mask=torch.ones(SHAPE))
    assert look.asked[6] == pytest.approx(look.asked[7], rel=1e-9) and 0 < look.asked[6]["pull"] < 10


def test_a_regulariser_that_has_what_it_holds_is_not_blown_up():
    """Its gradient falls to a thousandth: so does its pull."""

    class Falling(Painter):
        def __call__(self, *arguments):
            self.pull = draw(5) * (1 if len(self.seen) < 6 else 1e-3)
            return super().__call__(*arguments)

    look = Falling(draw(1), draw(2), draw(5))
    run(look, draw(0), steps=20, weights={"pull": 0.3})
    assert look.asked[18]["pull"] < 3 * look.asked[6]["pull"]


@pytest.mark.parametrize("term", ["score", "pull"])
def test_what_is_not_finite_stops_the_run_and_is_named(term):
    source = draw(0)
    painter = Painter(draw(1), draw(2), pull=draw(3))
    wrong = torch.full_like(source, float("nan"))

    def at_the_second(*arguments):
        seen = painter(*arguments)
        if len(painter.seen) < 2:
            return seen
        if term == "score":
            return Answer(wrong, seen.denoised_source, seen.losses, seen.slopes)
        return Answer(seen.denoised, seen.denoised_source, seen.losses, {"pull": wrong})

    with pytest.raises(ValueError, match=f"Video DDS: {term} is not finite at step 2"):
        run(at_the_second, source, steps=5, weights={"pull": 0.1})


def test_a_sum_that_is_not_finite_stops_the_run_too():
    wrong = torch.full(SHAPE, float("nan"), dtype=torch.float64)
    look = lambda *_: Answer(draw(1), draw(2), {"pull": 1.0}, pull=wrong)  # noqa: E731
    with pytest.raises(ValueError, match="Video DDS: a regulariser is not finite at step 1"):
        run(look, draw(0), steps=2, weights={"pull": 0.1}, balanced=False)
