"""Inversion and the edit loop inside the host's own sampling, against plain loops and stock samplers."""

import logging

import comfy.model_management as management
import comfy.model_sampling
import comfy.samplers
import nodes
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_custom_sampler import Guider_Basic, Guider_DualCFG, SplitSigmas
from spacetime_edit.core.parametrization import NoiseSpace, noise_fraction
from spacetime_edit.host import relevance_matching
from spacetime_edit.host.families import noise_space
from spacetime_edit.host.inversion import InversionSampler, invert, reconstruct, reconstruction_db
from spacetime_edit.host.loaders.example_clips import clip_names, load_clip
from spacetime_edit.host.relevance_matching import RelevanceMatching, str_score_of
from spacetime_edit.host.sampling import TrajectorySampler
from spacetime_edit.tests.host import support

FRAMES, SIDE, STEPS = 3, 8, 4
SHAPE = (FRAMES, 4, SIDE, SIDE)
LAMBDA = 1.0


@pytest.fixture(scope="module")
def clip(tiny):
    """Three frames of the middle of a real clip, in the latent space: [3,4,8,8]."""
    with torch.inference_mode():
        frames = load_clip(clip_names()[0], 1)[0][1:7:2]
        return tiny.vae.encode(frames)[:, :, 4:12, 4:12].clone()


@pytest.fixture(scope="module")
def source(tiny):
    with torch.inference_mode():
        return support.encode(tiny)


@pytest.fixture(scope="module")
def edit(tiny):
    with torch.inference_mode():
        return support.encode(tiny, support.EDIT_PROMPT)


@pytest.fixture(scope="module")
def trajectory(tiny, clip, source):
    with torch.inference_mode():
        return invert(tiny.model, source, clip, schedule(tiny.model))


def schedule(model, steps=STEPS, name="simple"):
    return comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), name, steps)


def run(trajectory, positive, *, cfg=1.0, negative=None, model=None, sigmas=None, noise_mask=None, **sampler):
    """An edit; returns the samples and what the callback saw: (step, x0, x, total)."""
    calls = []
    samples = TrajectorySampler(trajectory, **sampler)
    return run_sampler(samples, trajectory, positive, cfg, negative, model, sigmas, noise_mask, calls), calls


def run_sampler(sampler, trajectory, positive, cfg=1.0, negative=None, model=None, sigmas=None, mask=None, calls=None):
    guider = support.guider_of(model or trajectory.model, positive, negative, cfg)
    return sample(guider, sampler, trajectory, sigmas, mask, calls)


def sample(guider, sampler, trajectory, sigmas=None, mask=None, calls=None, seed=7, noise=None):
    callback = None if calls is None else lambda k, x0, x, total: calls.append((k, x0.clone(), x.clone(), total))
    noise = torch.zeros(trajectory.shape) if noise is None else noise
    latent = trajectory.model.model.process_latent_out(trajectory.latents[-1])
    sigmas = trajectory.sigmas if sigmas is None else sigmas
    return guider.sample(noise, latent, sampler, sigmas, mask, callback=callback, disable_pbar=True, seed=seed)


def matching(trajectory, strength=LAMBDA, layers="", radius=1, **options):
    return RelevanceMatching(str_score_of(trajectory, layers, radius), strength, **options)


def str_edit(trajectory, positive, strength=LAMBDA, matching_options=None, **options):
    step = matching(trajectory, strength, **(matching_options or {}))
    return run(trajectory, positive, before_step=[step], **options)


def in_model_scale(trajectory, samples):
    return trajectory.model.model.process_latent_in(samples)


# noise spaces of the host


class Config:
    def __init__(self, **settings):
        self.sampling_settings = settings


def model_sampling(kind):
    """(model_sampling as the host builds it, its noise space)."""
    build = lambda schedule, prediction, config: type("Sampling", (schedule, prediction), {})(config)  # noqa: E731
    host = comfy.model_sampling
    if kind == "EPS":
        return build(host.ModelSamplingDiscrete, host.EPS, Config(linear_start=0.00085, linear_end=0.012))
    if kind == "CONST":
        return build(host.ModelSamplingDiscreteFlow, host.CONST, Config(shift=3.0))
    return build(host.ModelSamplingDiscrete, host.V_PREDICTION_DDPM, Config(zsnr=True))


SPACES = {"EPS": NoiseSpace.VE, "CONST": NoiseSpace.RF, "V_PREDICTION_DDPM": NoiseSpace.VP}


@pytest.mark.parametrize("kind", SPACES)
def test_noise_fraction_inverts_the_hosts_percent_to_sigma(kind):
    sampling = model_sampling(kind)
    for percent in (0.001, 0.01, 0.3, 0.5, 0.77, 0.99, 0.999):
        sigma = sampling.percent_to_sigma(percent)
        fraction = noise_fraction(sigma, sampling.percent_to_sigma)
        assert abs(fraction - (1 - percent)) <= 1e-4
        assert sampling.percent_to_sigma(1 - fraction) == pytest.approx(sigma, rel=1e-4)


@pytest.mark.parametrize("kind", SPACES)
def test_noise_fraction_of_a_schedule_falls_from_1_to_0(kind):
    sampling = model_sampling(kind)
    sigmas = comfy.samplers.calculate_sigmas(sampling, "simple", 10)
    fractions = [noise_fraction(float(sigma), sampling.percent_to_sigma) for sigma in sigmas]
    assert fractions == sorted(fractions, reverse=True)
    assert abs(fractions[0] - 1) <= 1e-3 and fractions[-1] <= 1e-5


@pytest.mark.parametrize("kind", SPACES)
def test_noise_space_of_a_patched_model(tiny, kind):
    model = tiny.model.clone()
    model.add_object_patch("model_sampling", model_sampling(kind))
    assert noise_space(model) is SPACES[kind]


@pytest.mark.parametrize("kind", SPACES)
def test_a_noisy_latent_is_the_hosts(kind):
    """a x0 + s eps and the host's noise_scaling and calculate_denoised agree on what x is."""
    sampling, space = model_sampling(kind), SPACES[kind]
    sigma = torch.tensor([0.6])
    x0, noise = torch.randn(1, 4, 5, 5), torch.randn(1, 4, 5, 5)
    a, s = space.signal_and_noise(sigma)
    target = {"EPS": noise, "CONST": noise - x0, "V_PREDICTION_DDPM": a * noise - s * x0}[kind]
    assert torch.allclose(sampling.calculate_denoised(sigma, target, a * x0 + s * noise), x0, atol=1e-5)


# inversion


def test_inversion_starts_at_the_clip_and_ends_in_noise(tiny, trajectory, clip, source):
    model = tiny.model.model
    assert trajectory.latents.shape == (STEPS + 1, *SHAPE) and trajectory.steps == STEPS
    assert torch.equal(trajectory.latents[-1], model.process_latent_in(clip))
    assert torch.equal(trajectory.sigmas, schedule(tiny.model))
    assert trajectory.latents[0].std() > 0.3 * trajectory.sigmas[0]
    assert trajectory.model is tiny.model and trajectory.conditioning is source


def test_inversion_is_ddim_upwards(tiny, clip, source):
    """At the fixed point each stored latent leads to the next cleaner one by a plain DDIM step."""
    inverted = invert(tiny.model, source, clip, schedule(tiny.model, 4, "ddim_uniform"), refinements=20)

    def check(guider, x, sigma, extra_args):
        for k in range(inverted.steps):
            (upper, lower), (now, then) = inverted.latents[k : k + 2].double(), inverted.sigmas[k : k + 2].double()
            denoised = guider(upper.float(), now.float() * torch.ones(FRAMES), **extra_args).double()
            yield support.relative(denoised + then * (upper - denoised) / now, lower)

    guider = support.guider_of(tiny.model, source)
    assert max(support.at_one_sigma(guider, torch.ones(SHAPE), lambda *a: list(check(*a)))) < 1e-3


def test_refinements_bring_the_clip_back(tiny, clip, source):
    back = []
    for refinements in (0, 1, 4):
        inverted = invert(tiny.model, source, clip, schedule(tiny.model, 6, "ddim_uniform"), refinements=refinements)
        back.append(reconstruction_db(inverted, reconstruct(inverted)))
    assert back[0] + 2 < back[1] < back[2] - 2


def test_inversion_marks_its_run_and_reports_each_step(tiny, clip, source):
    """Region patches ask for the mark."""
    marks, calls = [], []

    def note(executor, *args, **kwargs):
        marks.append(args[5].get("spacetime_edit_source"))
        return executor(*args, **kwargs)

    model = tiny.model.clone()
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "test", note)
    callback = lambda k, x0, x, total: calls.append((k, x0.shape, total))  # noqa: E731
    invert(model, source, clip, schedule(model), refinements=2, callback=callback)
    assert marks == [True] * 3 * STEPS
    assert calls == [(k, SHAPE, STEPS) for k in range(STEPS)]
    assert "spacetime_edit_source" not in model.model_options["transformer_options"]


# the edit loop


class Float64DDIM(comfy.samplers.Sampler):
    """Eq. 12 of Song et al. 2021 in alpha-bar notation, accumulated in float64."""

    def __init__(self, start):
        self.start = start

    def sample(self, model_wrap, sigmas, extra_args, *args, **kwargs):
        alpha_bars = 1 / (1 + sigmas.double() ** 2)
        x = self.start.double() * alpha_bars[0].sqrt()  # variance preserving
        for k in range(len(sigmas) - 1):
            now, then = alpha_bars[k], alpha_bars[k + 1]
            host_x = (x / now.sqrt()).float()
            denoised = model_wrap(host_x, sigmas[k] * torch.ones(len(x)), **extra_args).double()
            noise = (x - now.sqrt() * denoised) / (1 - now).sqrt()
            x = then.sqrt() * denoised + (1 - then).sqrt() * noise
        return (x / alpha_bars[-1].sqrt()).float()


def test_equals_ddim_in_float64(trajectory, source, edit):
    ours, _ = run(trajectory, edit, cfg=3.0, negative=source)
    reference = run_sampler(Float64DDIM(trajectory.latents[0]), trajectory, edit, 3.0, source)
    assert support.relative(ours, reference) <= 1e-4


def test_equals_the_hosts_euler(trajectory, source, edit):
    """In the variance-exploding space DDIM is Euler's method."""
    ours, _ = run(trajectory, edit, cfg=3.0, negative=source)
    sigma = trajectory.sigmas[0]
    is_max = torch.isclose(sigma, trajectory.model.model.model_sampling.sigma_max)
    noise = trajectory.latents[0] / (torch.sqrt(1 + sigma**2) if is_max else sigma)
    guider = support.guider_of(trajectory.model, edit, source, 3.0)
    euler = comfy.samplers.sampler_object("euler")
    reference = guider.sample(noise, torch.zeros(SHAPE), euler, trajectory.sigmas, disable_pbar=True, seed=1)
    assert support.relative(ours, reference) <= 1e-4


def test_strength_0_is_plain_sampling(trajectory, source, edit):
    plain, _ = run(trajectory, edit, cfg=3.0, negative=source)
    matched, _ = str_edit(trajectory, edit, 0.0, cfg=3.0, negative=source)
    assert torch.equal(matched, plain)


def test_every_matching_step_brings_the_scores_closer(trajectory, source, edit):
    """Measured by a second step of matching at the same place, which is not taken."""
    plain, _ = run(trajectory, edit, cfg=3.0, negative=source)
    act, cosines = matching(trajectory, 0.3), []

    def watched(x, step):
        moved = act(x, step)
        act(moved, step)
        before, after = (record.cosines[0] for record in step.run.records[-2:])
        cosines.append((before, after))
        return moved

    matched, _ = run(trajectory, edit, cfg=3.0, negative=source, before_step=[watched])
    assert torch.isfinite(matched).all() and support.relative(matched, plain) > 1e-3
    assert len(cosines) == STEPS and all(after > before for before, after in cosines), cosines


def test_equal_prompts_leave_the_latent_in_place(tiny, clip, source):
    """At CFG 1 with the source prompt there is nothing to match: the damped steps move < 1e-3 in all."""
    inverted = invert(tiny.model, source, clip, schedule(tiny.model, 4, "ddim_uniform"), refinements=20)
    moves, act = [], matching(inverted)

    def watched(x, step):
        moved = act(x, step)
        moves.append(float((moved - x).square().mean().sqrt() / step.space.latent_scale(step.sigma)))
        return moved

    run(inverted, source, before_step=[watched])
    assert len(moves) == inverted.steps and sum(moves) < 1e-3, moves


@pytest.mark.parametrize("share", [0.02, 0.05])
def test_lambda_is_the_share_of_the_way_to_a_match(trajectory, edit, share):
    """Small enough that the loss is linear: what is left of 1 - cos falls by so much."""
    act, before, after = matching(trajectory, share, start=0.3), [], []

    def watched(x, step):
        if step.percent >= 0.3:
            act(act(x, step), step)
            first, second = (1 - record.cosines[0] for record in step.run.records[-2:])
            before.append(first), after.append(second)
        return x

    run(trajectory, edit, before_step=[watched])
    assert len(before) == 2
    for first, second in zip(before, after, strict=True):
        assert second / first == pytest.approx(1 - share, abs=0.3 * share)


def test_moves_are_at_most_half_a_deviation_long(trajectory, edit):
    """And, with a mask, inside it."""
    mask = torch.zeros(1, 64, 64)
    mask[:, :32] = 1
    act, sizes = matching(trajectory, 2.0), []

    def watched(x, step):
        move = (act(x, step) - x) / step.space.latent_scale(step.sigma)
        assert not move[:, :, 4:].any()
        sizes.append(float(move[:, :, :4].square().mean().sqrt()))
        return x + 30 * torch.randn(x.shape, generator=torch.Generator().manual_seed(step.index))

    run(trajectory, edit, mask=mask, before_step=[watched])
    assert max(sizes) <= 0.5 + 1e-5 and min(sizes) > 0


def test_several_iterations_are_moves_one_after_another(trajectory, edit):
    once, twice = matching(trajectory), matching(trajectory, iterations=2)

    def watched(x, step):
        assert support.relative(twice(x, step), once(once(x, step), step)) <= 1e-6
        return x

    run(trajectory, edit, sigmas=trajectory.sigmas[-3:], before_step=[watched])


@pytest.mark.parametrize(
    ("start", "end", "active"),
    [(0.0, 1.0, range(4)), (0.4, 1.0, (2, 3)), (0.0, 0.4, (0, 1)), (0.2, 0.3, (1,)), (0.3, 0.4, ())],
)
def test_matching_acts_within_its_window_only(trajectory, edit, start, end, active):
    """The steps lie at 0, 25, 50, 75 percent; a matched step costs more model calls."""
    counter = support.CallCounter(trajectory.model)
    calls_at = []

    def count(x, step):
        calls_at.append((counter.calls, step.percent))
        return x

    steps = [count, matching(trajectory, start=start, end=end), count]
    result, seen = run(trajectory, edit, model=counter.model, before_step=steps)
    plain, plain_seen = run(trajectory, edit)
    before, after = calls_at[::2], calls_at[1::2]
    assert [percent for _, percent in before] == pytest.approx([0, 0.25, 0.5, 0.75], abs=2e-3)
    assert [k for k in range(STEPS) if after[k][0] > before[k][0]] == list(active)
    assert torch.equal(result, plain) == (not active)
    for k in range(min(active, default=STEPS)):
        assert torch.equal(seen[k][2], plain_seen[k][2])


@pytest.mark.parametrize("step", [1, 3])
def test_a_part_of_the_sigmas_starts_from_the_latent_there(trajectory, edit, step):
    """SplitSigmas: a later start is a weaker edit."""
    high, low = SplitSigmas.execute(trajectory.sigmas, step).result
    starts = []

    def watch(x, at):
        starts.append((x.clone(), at.source.clone(), at.source_next.clone(), at.index))
        return x

    result, calls = run(trajectory, edit, sigmas=low, before_step=[watch])
    assert torch.equal(starts[0][0], trajectory.latents[step])
    for k, (_, at, following, index) in enumerate(starts):
        assert index == k
        assert torch.equal(at, trajectory.latents[step + k])
        assert torch.equal(following, trajectory.latents[step + k + 1])
    assert [call[3] for call in calls] == [STEPS - step] * (STEPS - step)
    reference = run_sampler(Float64DDIM(trajectory.latents[step]), trajectory, edit, sigmas=low)
    assert support.relative(result, reference) <= 1e-4
    first_half, _ = run(trajectory, edit, sigmas=high)
    whole = run(trajectory, edit)[1]
    assert support.relative(in_model_scale(trajectory, first_half), whole[step - 1][2]) < 1e-6


def test_the_connected_noise_does_not_matter(trajectory, edit):
    guider = lambda: support.guider_of(trajectory.model, edit)  # noqa: E731
    results = [
        sample(guider(), TrajectorySampler(trajectory), trajectory, noise=noise, seed=seed)
        for seed, noise in ((1, torch.zeros(SHAPE)), (2, torch.randn(SHAPE)))
    ]
    assert torch.equal(*results)


def test_two_runs_are_equal(trajectory, source, edit):
    """Also of one sampler object, which the host caches between prompts."""
    step = matching(trajectory)
    sampler = TrajectorySampler(trajectory, before_step=[step], mask=left_half(), blend_source="re-noised source")
    first, second = (run_sampler(sampler, trajectory, edit, 3.0, source) for _ in range(2))
    assert torch.equal(first, second)


def test_the_callback_reports_each_step_once(trajectory, edit):
    result, calls = run(trajectory, edit)
    assert [(k, total) for k, _, _, total in calls] == [(k, STEPS) for k in range(STEPS)]
    assert support.relative(in_model_scale(trajectory, result), calls[-1][2]) < 1e-6
    assert torch.equal(calls[-1][1], calls[-1][2]), "the last DDIM step lands on the prediction"


def test_nothing_changes_in_the_model_the_options_or_the_trajectory(trajectory, source, edit):
    before, latents = support.Untouched(trajectory.model), trajectory.latents.clone()
    str_edit(trajectory, edit, cfg=3.0, negative=source, mask=left_half())
    assert before.changed() == []
    assert torch.equal(trajectory.latents, latents)


def test_a_wrapper_that_edits_its_latent_does_not_reach_the_trajectory(trajectory, edit):
    """Other packs move the latent in place in a PREDICT_NOISE wrapper; the trajectory serves later runs too."""
    latents = trajectory.latents.clone()

    def shift(executor, x, *args, **kwargs):
        x.add_(0.5)
        return executor(x, *args, **kwargs)

    model = trajectory.model.clone()
    model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "other_pack", shift)
    try:
        run(trajectory, edit, model=model)
        assert torch.equal(trajectory.latents, latents)
    finally:
        trajectory.latents.copy_(latents)


# masks


def left_half(frames=FRAMES, height=SIDE, width=SIDE):
    mask = torch.zeros(frames, height, width)
    mask[:, :, : width // 2] = 1
    return mask


@pytest.mark.parametrize("strength", [0.0, LAMBDA])
def test_outside_the_mask_the_source_stays_bit_by_bit(trajectory, source, edit, strength):
    """At every noise level: the kept latents are the trajectory's own."""
    result, calls = str_edit(trajectory, edit, strength, cfg=3.0, negative=source, mask=left_half())
    kept = left_half()[:, None].expand(SHAPE) == 0
    for k, _, x, _ in calls:
        assert torch.equal(x[kept], trajectory.latents[k + 1][kept])
        assert not torch.equal(x[~kept], trajectory.latents[k + 1][~kept])
    source_latent = trajectory.model.model.process_latent_out(trajectory.latents[-1])
    assert torch.equal(result[kept], source_latent[kept])


def test_a_re_noised_source_is_one_fixed_noise_on_the_clean_clip(trajectory, edit):
    result, calls = run(trajectory, edit, mask=left_half(), blend_source="re-noised source")
    kept = left_half()[:, None].expand(SHAPE) == 0
    clean = trajectory.latents[-1]
    noises = [(x - clean)[kept] / trajectory.sigmas[k + 1] for k, _, x, _ in calls[:-1]]
    assert abs(float(noises[0].std()) - 1) < 0.1
    for noise in noises[1:]:
        assert (noise - noises[0]).abs().max() < 1e-3
    assert torch.equal(calls[-1][2][kept], clean[kept])
    other = sample(
        support.guider_of(trajectory.model, edit),
        TrajectorySampler(trajectory, mask=left_half(), blend_source="re-noised source"),
        trajectory,
        seed=8,
    )
    assert not torch.equal(other, result), "the noise should follow the seed"


def test_a_soft_mask_blends(trajectory, edit):
    last = trajectory.sigmas[-2:]
    (_, _, plain, _) = run(trajectory, edit, sigmas=last)[1][0]
    (_, _, mixed, _) = run(trajectory, edit, sigmas=last, mask=torch.full((1, 1, 1), 0.25))[1][0]
    assert torch.allclose(mixed, 0.75 * trajectory.latents[-1] + 0.25 * plain, atol=1e-5)


def test_previews_and_denoised_output_show_the_kept_source(trajectory, edit):
    _, calls = run(trajectory, edit, cfg=3.0, mask=left_half())
    kept = left_half()[:, None].expand(SHAPE) == 0
    for _, x0, _, _ in calls:
        assert torch.equal(x0[kept], trajectory.latents[-1][kept])
        assert not torch.equal(x0[~kept], trajectory.latents[-1][~kept])


def test_another_noise_space_is_refused(trajectory, edit):
    """The same weights under a ModelSampling patch of a rectified flow."""
    patched = trajectory.model.clone()
    patched.add_object_patch("model_sampling", flow_sampling(trajectory.model))
    with pytest.raises(ValueError, match="^guider: its model samples in the noise space RF, the inversion ran in VE"):
        run(trajectory, edit, model=patched)


def flow_sampling(model):
    class Flow(comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST):
        pass

    return Flow(model.model.model_config)


def test_dilation_is_in_source_pixels(trajectory, edit):
    """A latent cell of this model is 4 pixels wide: 8 pixels are 2 cells."""
    mask = torch.zeros(1, 4 * SIDE, 4 * SIDE)
    mask[:, 12:16, 12:16] = 1
    _, calls = run(trajectory, edit, mask=mask, dilation=8.0)
    changed = (calls[-1][2] != trajectory.latents[-1]).any(1)
    expected = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    expected[1:6, 1:6] = True
    assert all(torch.equal(frame, expected) for frame in changed)


def test_a_noise_mask_on_the_latent_is_the_mask(trajectory, edit):
    mask = left_half()
    connected, _ = run(trajectory, edit, mask=mask)
    on_latent, _ = run(trajectory, edit, noise_mask=mask[:, None])
    assert torch.equal(on_latent, connected)


def test_a_noise_mask_and_a_connected_mask_are_refused(trajectory, edit):
    counter = support.CallCounter(trajectory.model)
    with pytest.raises(ValueError, match="^mask: the latent already carries a noise mask; .* not both"):
        run(trajectory, edit, model=counter.model, mask=left_half(), noise_mask=left_half()[:, None])
    assert counter.calls == 0


@pytest.mark.parametrize("mask", [torch.ones(1, 5, 5), left_half()], ids=["full", "full after dilation"])
def test_a_full_mask_is_no_mask(trajectory, edit, mask, caplog):
    plain, _ = run(trajectory, edit)
    with caplog.at_level(logging.WARNING, "spacetime_edit"):
        full, _ = run(trajectory, edit, mask=mask, dilation=64.0)
    assert torch.equal(full, plain)
    assert "mask: it covers the whole clip" in caplog.text


@pytest.mark.parametrize("blend_source", ["trajectory", "re-noised source"])
def test_an_empty_mask_returns_the_source(trajectory, edit, caplog, blend_source):
    with caplog.at_level(logging.WARNING, "spacetime_edit"):
        result, _ = run(trajectory, edit, mask=torch.zeros(1, 9, 9), dilation=16.0, blend_source=blend_source)
    assert torch.equal(result, trajectory.model.model.process_latent_out(trajectory.latents[-1]))
    assert "mask: it is empty" in caplog.text


# interruption


def interrupted_at(counts):
    """A counter whose model presses the stop button before call number `counts`."""
    return lambda count: management.interrupt_current_processing() if count == counts else None


def test_inversion_can_be_interrupted(tiny, clip, source, trajectory):
    counter = support.CallCounter(tiny.model, interrupted_at(4))
    before = support.Untouched(counter.model)
    with pytest.raises(management.InterruptProcessingException):
        invert(counter.model, source, clip, schedule(tiny.model))
    assert counter.calls == 4
    assert before.changed() == []
    again = invert(tiny.model, source, clip, schedule(tiny.model))
    assert torch.equal(again.latents, trajectory.latents)


@pytest.mark.parametrize("call", [1, 2, 3, 6], ids=["source pass", "gradient", "prediction", "third step"])
def test_an_edit_can_be_interrupted(trajectory, edit, call):
    """Within the model call that is running, at once; afterwards all is as if it had never run."""
    sigmas = trajectory.sigmas[-4:]
    expected, _ = str_edit(trajectory, edit, sigmas=sigmas)
    counter = support.CallCounter(trajectory.model, interrupted_at(call))
    before = support.Untouched(counter.model)
    with pytest.raises(management.InterruptProcessingException):
        str_edit(trajectory, edit, model=counter.model, sigmas=sigmas)
    assert counter.calls == call
    assert before.changed() == []
    assert torch.equal(str_edit(trajectory, edit, sigmas=sigmas)[0], expected)


# whose model, whose prompts


def lora_of(model, seed=5):
    """A clone with a random low-rank change of the attention's queries."""
    clone, generator, patches = model.clone(), torch.Generator().manual_seed(seed), {}
    for key, weight in model.model.state_dict().items():
        if key.endswith("to_q.weight"):
            down, up = (torch.randn(n, 2, generator=generator) for n in weight.shape)
            patches[key] = ("diff", (0.05 * down @ up.T,))
    assert clone.add_patches(patches)
    return clone


def test_a_lora_works_in_inversion_and_edit(tiny, trajectory, clip, source, edit):
    """And the model without it is as before afterwards."""
    plain, _ = str_edit(trajectory, edit)
    model = lora_of(tiny.model)
    patched_trajectory = invert(model, source, clip, schedule(tiny.model))
    patched, _ = str_edit(patched_trajectory, edit)
    assert torch.isfinite(patched).all()
    assert support.relative(patched_trajectory.latents[0], trajectory.latents[0]) > 1e-2
    assert support.relative(patched, plain) > 1e-2
    assert torch.equal(str_edit(trajectory, edit)[0], plain)


def test_the_weights_of_the_guider_are_in_force(tiny, trajectory, edit):
    """Decision D2: a LoRA on the guider's model alone is used, on the trajectory of the plain model."""
    plain, _ = str_edit(trajectory, edit)
    patched, _ = str_edit(trajectory, edit, model=lora_of(tiny.model))
    assert support.relative(patched, plain) > 1e-2


def test_two_combined_prompts(tiny, trajectory, source, edit):
    """Conditioning (Combine): the prediction is the mean of both, the matching looks at the first."""
    other = support.encode(tiny, "a green triangle")
    both = nodes.ConditioningCombine().combine(edit, other)[0]

    def first(prompt):
        """Of the first step: where matching moves the latent, and without it the prediction."""
        moves, act = [], matching(trajectory)

        def watched(x, step):
            moves.append(act(x, step))
            return moves[-1]

        run(trajectory, prompt, cfg=3.0, negative=source, before_step=[watched], sigmas=trajectory.sigmas[:2])
        _, calls = run(trajectory, prompt, cfg=3.0, negative=source, sigmas=trajectory.sigmas[:2])
        return moves[0], calls[0][1]

    (moved, predicted), (of_first, one), (of_second, two) = map(first, (both, edit, other))
    assert torch.equal(moved, of_first) and not torch.equal(moved, of_second)
    assert support.relative(predicted, (one + two) / 2) < 1e-4 < support.relative(predicted, one)


def between(conditioning, start, end):
    return nodes.ConditioningSetTimestepRange().set_range(conditioning, start, end)[0]


def test_prompts_that_take_turns(trajectory, source, edit):
    """Conditioning Set Timestep Range: each step matches the prompt that is active there."""
    turns = between(edit, 0.0, 0.6) + between(source, 0.6, 1.0)
    matched, calls = str_edit(trajectory, turns)
    assert torch.isfinite(matched).all()
    alone = str_edit(trajectory, edit)[1]
    for k in range(3):
        assert torch.equal(calls[k][2], alone[k][2])
    assert not torch.equal(calls[3][2], alone[3][2])


def test_a_prompt_that_ends_early_is_named(trajectory, edit):
    with pytest.raises(ValueError, match="^positive: no conditioning covers the whole frame at sigma"):
        str_edit(trajectory, between(edit, 0.0, 0.4))


def test_a_source_prompt_for_an_area_only_is_named(tiny, clip, source, edit):
    partly = nodes.ConditioningSetArea().append(source, 16, 16, 0, 0, 1.0)[0]
    inverted = invert(tiny.model, partly, clip, schedule(tiny.model, 2))
    with pytest.raises(ValueError, match="^positive of Invert Video: no conditioning covers the whole frame"):
        str_edit(inverted, edit)


def test_other_guiders_with_a_positive_prompt_work(trajectory, source, edit):
    basic = Guider_Basic(trajectory.model)
    basic.set_conds(edit)
    sigmas = trajectory.sigmas[-3:]
    sampler = lambda: TrajectorySampler(trajectory, before_step=[matching(trajectory)])  # noqa: E731
    assert torch.equal(sample(basic, sampler(), trajectory, sigmas), str_edit(trajectory, edit, sigmas=sigmas)[0])
    dual = Guider_DualCFG(trajectory.model)
    dual.set_conds(edit, source, source)
    dual.set_cfg(3.0, 2.0)
    assert torch.isfinite(sample(dual, sampler(), trajectory, sigmas)).all()


def test_non_finite_gradients_stop_the_run_and_name_the_step(trajectory, edit, monkeypatch):
    """Instead of a black video after an hour."""

    def broken(loss, *args, **kwargs):
        return matching_loss(loss, *args, **kwargs) * float("nan")

    matching_loss = relevance_matching.matching_loss
    monkeypatch.setattr(relevance_matching, "matching_loss", broken)
    message = r"gradient of the match is not finite at step 3 .*sigma .*layer .*; try the model in bf16"
    with pytest.raises(ValueError, match=message):
        str_edit(trajectory, edit, matching_options=dict(start=0.4))


def test_the_inversion_sampler_keeps_no_view_of_its_latent(tiny, clip, source):
    """The latent on the graph belongs to other nodes."""
    sampler = InversionSampler(NoiseSpace.VE, 0)
    latent = clip.clone()
    guider = support.guider_of(tiny.model, source)
    guider.sample(torch.zeros(SHAPE), latent, sampler, schedule(tiny.model, 2).flip(0), disable_pbar=True, seed=0)
    assert torch.equal(latent, clip) and len(sampler.latents) == 3
