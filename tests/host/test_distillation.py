"""Video DDS inside the host: gradients against finite differences, what the mask keeps, what a run leaves alone."""

import comfy.model_management as management
import pytest
import torch
from spacetime_edit.host import distillation
from spacetime_edit.host.distillation import (
    MOTION,
    RELEVANCE,
    SOURCE_POSITIVE,
    SPATIAL,
    TEMPORAL,
    Distillation,
    key_blocks,
    optimise,
)
from spacetime_edit.tests.host import support

FRAMES, SIDE = 3, 8
EVERY = {SPATIAL: 0.3, TEMPORAL: 0.1, RELEVANCE: 0.2, MOTION: 0.1}


def clip(seed=0, frames=FRAMES):
    return torch.randn(frames, 4, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def settings_of(model, **options):
    return Distillation(**{"steps": 2, "cfg": 3.0, "weights": EVERY, "blocks": key_blocks(model)} | options)


def prompts(tiny, target=support.EDIT_PROMPT):
    return support.encode(tiny), support.encode(tiny, target), support.encode(tiny, "")


def run(tiny, latent=None, target=support.EDIT_PROMPT, seed=0, mask=None, model=None, **options):
    model = model or tiny.model
    settings = settings_of(model, **options)
    return optimise(model, *prompts(tiny, target), clip() if latent is None else latent, settings, seed=seed, mask=mask)


def looked(tiny, function, **options):
    """function(looks, target_t, source_t, sigma) inside a real run of the host, in the precision of its model."""
    source, target, negative = prompts(tiny)
    guider = support.guider_of(tiny.model, target, negative, 3.0)
    guider.inner_set_conds({"positive": target, "negative": negative, SOURCE_POSITIVE: source})
    settings = settings_of(tiny.model, **options)

    def at(guider, x, sigma, extra_args):
        looks = distillation._Looks(settings, guider, extra_args["model_options"])
        x = x.to(tiny.model.model.get_dtype_inference())
        return function(looks, x, x + 0.5 * clip(1), sigma)

    return support.at_one_sigma(guider, 2 * clip(), at)


@pytest.mark.parametrize("branch", ["text", "negative"])
@pytest.mark.parametrize("name", EVERY)
def test_each_regularisers_gradient_is_that_of_finite_differences(tiny, tiny64, name, branch):
    """Along itself, by central differences in float64: the losses bend so much that float32 has no step for them.

    Also its checkpointed form.
    """
    of_name = {"branch": branch, "weights": {name: 1.0}}
    gradient, lean = (
        looked(tiny, lambda looks, *a: looks(*a, None).slopes[name], low_memory=low_memory, **of_name)
        for low_memory in (False, True)
    )

    def slope(looks, target, source, sigma):
        step = 1e-3 * gradient.double() / gradient.double().norm()
        ahead, behind = (looks(target + h * step, source, sigma, None).losses[name] for h in (1, -1))
        return (ahead - behind) / 2e-3

    assert abs(looked(tiny64, slope, **of_name) / float(gradient.norm()) - 1) < 1e-3
    assert support.relative(lean, gradient) < 1e-4


def test_several_regularisers_have_the_gradients_that_each_has_alone(tiny):
    at = lambda looks, *arguments: looks(*arguments, None).slopes  # noqa: E731
    together = looked(tiny, at)
    lean = looked(tiny, at, low_memory=True)
    assert set(together) == set(EVERY)
    for name in EVERY:
        alone = looked(tiny, at, weights={name: 1.0})
        assert support.relative(together[name], alone[name]) < 1e-5
        assert support.relative(lean[name], together[name]) < 1e-4


@pytest.mark.parametrize("low_memory", [False, True])
def test_their_sum_has_the_sum_of_their_gradients(tiny, low_memory):
    scales = {SPATIAL: 300.0, TEMPORAL: 20.0, RELEVANCE: 5.0, MOTION: 0.5}
    apart = looked(tiny, lambda looks, *a: looks(*a, None))
    found = looked(tiny, lambda looks, *a: looks(*a, scales), low_memory=low_memory)
    wanted = sum(scale * apart.slopes[name] for name, scale in scales.items())
    assert support.relative(found.pull, wanted) < 1e-4
    assert found.losses == pytest.approx(apart.losses, rel=1e-4) and not found.slopes


def test_predictions_are_the_guiders_own(tiny):
    denoised, other = looked(tiny, lambda looks, *a: (looks(*a, {}).denoised, looks(*a, {}).denoised_source))
    source, target, negative = prompts(tiny)
    for prompt, x, seen in ((target, 2 * clip(), denoised), (source, 2 * clip() + 0.5 * clip(1), other)):
        wanted = support.prediction(tiny.model, prompt, x, negative, 3.0)
        assert support.relative(seen, wanted) < 1e-4


def test_equal_prompts_change_nothing(tiny):
    edited, curve = run(tiny, target=support.SOURCE_PROMPT)
    # scaling to the model's latents and back costs a bit or two
    torch.testing.assert_close(edited, clip(), atol=1e-6, rtol=1e-6)
    assert all(losses[name] == 0 for _, losses in curve for name in ("score", SPATIAL, TEMPORAL, MOTION))


def test_an_edit_moves_and_the_seed_decides(tiny):
    before = torch.get_rng_state()
    first, curve = run(tiny, seed=3)
    again, other = run(tiny, seed=3)[0], run(tiny, seed=4)[0]
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert support.relative(first, clip()) > 1e-3
    assert len(curve) == 2 and all(set(losses) == {"score", *EVERY} and 0 < t < 1 for t, losses in curve)
    assert torch.equal(before, torch.get_rng_state())


def test_outside_the_mask_the_score_changes_no_bit(tiny):
    mask = torch.zeros(FRAMES, SIDE, SIDE)
    mask[:, :, :4] = 1
    edited, _ = run(tiny, mask=mask, weights={})
    torch.testing.assert_close(edited[..., 4:], clip()[..., 4:], atol=1e-5, rtol=1e-5)
    assert not torch.equal(edited[..., :4], clip()[..., :4])


def test_an_empty_mask_gives_back_the_clip_and_says_so(tiny, caplog):
    counter = support.CallCounter(tiny.model)
    edited, curve = run(tiny, model=counter.model, mask=torch.zeros(1, 4, 4))
    assert torch.equal(edited, clip()) and curve == [] and counter.calls == 0
    assert "the mask is empty" in caplog.text


def out_of_memory_at(monkeypatch, calls):
    """The loss of S-SSM runs out of memory at these calls."""
    count, loss = iter(range(1_000_000)), distillation.spatial_self_similarity_loss

    def fail(*arguments):
        if next(count) in calls:
            raise torch.OutOfMemoryError("out of memory")
        return loss(*arguments)

    monkeypatch.setattr(distillation, "spatial_self_similarity_loss", fail)


def test_out_of_memory_is_tried_once_more_with_less(tiny, monkeypatch, caplog):
    lean, _ = run(tiny, low_memory=True)
    out_of_memory_at(monkeypatch, {0})
    assert torch.equal(run(tiny)[0], lean)
    assert "Video DDS: out of memory; once more without kept activations" in caplog.text


@pytest.mark.parametrize("low_memory", [False, True])
def test_out_of_memory_for_good_names_what_to_lower(tiny, monkeypatch, low_memory):
    before = support.Untouched(tiny.model)
    out_of_memory_at(monkeypatch, range(1000))
    with pytest.raises(RuntimeError, match="Video DDS: out of memory, also without kept.*frames.*size.*layers.*vram"):
        run(tiny, low_memory=low_memory)
    assert before.changed() == []


def test_plain_score_distillation_needs_no_source(tiny):
    counter = support.CallCounter(tiny.model)
    plain, _ = run(tiny, model=counter.model, weights={}, delta=False)
    assert counter.calls == 2 * 2  # two prompts, two steps
    assert support.relative(plain, run(tiny, weights={})[0]) > 1e-3


@pytest.mark.parametrize("weights", [{}, {SPATIAL: 0.3, TEMPORAL: 0.1}], ids=["score", "held by keys"])
def test_sd15_takes_frames_as_a_batch(weights):
    model = support.sd15_model()
    conds = [support.sd15_conditioning(seed) for seed in range(3)]
    edited, _ = optimise(model, *conds, clip(), settings_of(model, weights=weights), seed=0)
    assert edited.isfinite().all() and support.relative(edited, clip()) > 1e-4


def test_a_run_leaves_everything_as_it_was(tiny):
    before = support.Untouched(tiny.model)
    run(tiny)
    run(tiny, low_memory=True)
    assert before.changed() == []


def test_an_interrupt_leaves_everything_as_it_was_and_the_next_run_is_right(tiny):
    wanted, _ = run(tiny)
    before = support.Untouched(tiny.model)
    for call in range(1, 9):
        counter = support.CallCounter(
            tiny.model, lambda n, call=call: management.interrupt_current_processing(True) if n == call else None
        )
        with pytest.raises(management.InterruptProcessingException):
            run(tiny, model=counter.model)
        assert before.changed() == []
    assert torch.equal(run(tiny)[0], wanted)


def test_what_cannot_work_is_refused_before_the_run(tiny):
    with pytest.raises(ValueError, match="t_min, t_max: they are 0.9 and 0.1"):
        Distillation(t_range=(0.9, 0.1))
    with pytest.raises(ValueError, match="cfg: it is -1"):
        Distillation(cfg=-1)
    with pytest.raises(ValueError, match="layers: 'd9' asks for d9"):
        key_blocks(tiny.model, "d9")
    with pytest.raises(ValueError, match="negative: it holds no prompt"):
        optimise(tiny.model, support.encode(tiny), support.encode(tiny), [], clip(), settings_of(tiny.model), seed=0)
    model = support.sd15_model()
    conds = [support.sd15_conditioning(seed) for seed in range(3)]
    with pytest.raises(ValueError, match="relevance: SD 1.5 has no temporal attention"):
        optimise(model, *conds, clip(), settings_of(model), seed=0)


def test_keys_are_those_of_the_way_up_where_none_are_named(tiny):
    assert key_blocks(tiny.model) == {f"u{n}" for n in range(6)} and key_blocks(tiny.model, "d0, u1") == {"d0", "u1"}


# --- what it refuses, and who it asks -----------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda prompt: [*prompt, *prompt], "positive: it holds 2 prompts, and Video DDS takes one"),
        (lambda prompt: [[prompt[0][0], {"mask": torch.ones(1, 8, 8)}]], r"holds for a part only \(mask\)"),
        (lambda prompt: [[prompt[0][0], {"area": (4, 4, 0, 0)}]], r"holds for a part only \(area\)"),
        (lambda prompt: [[prompt[0][0], {"start_percent": 0.5, "end_percent": 1.0}]], r"part only \(start_percent\)"),
    ],
)
def test_a_prompt_for_a_part_is_refused(tiny, change, message):
    source, target, negative = prompts(tiny)
    with pytest.raises(ValueError, match=message):
        optimise(tiny.model, source, change(target), negative, clip(), settings_of(tiny.model), seed=0)


def test_a_prompt_for_all_noise_levels_is_taken(tiny):
    source, target, negative = prompts(tiny)
    whole = [[target[0][0], target[0][1] | {"start_percent": 0.0, "end_percent": 1.0}]]
    settings = settings_of(tiny.model, steps=1)
    moved = [optimise(tiny.model, source, p, negative, clip(), settings, seed=0)[0] for p in (target, whole)]
    assert torch.equal(*moved)


def test_several_gpus_are_refused(tiny):
    several = tiny.model.clone()
    several.set_additional_models("multigpu", [tiny.model.clone()])
    with pytest.raises(ValueError, match="model: editing runs on one GPU"):
        run(tiny, model=several)


def test_guidance_of_other_packs_gets_the_prompts(tiny):
    """Perturbed attention guidance and its like call the model again with the positive prompt."""
    seen, guided = [], tiny.model.clone()

    def after(arguments):
        seen.append((arguments["cond"][0]["cross_attn"], arguments["uncond"][0]["cross_attn"]))
        return arguments["denoised"]

    guided.set_model_sampler_post_cfg_function(after)
    run(tiny, model=guided, steps=1)
    source, target, negative = (prompt[0][0] for prompt in prompts(tiny))
    assert len(seen) == 2
    assert torch.equal(seen[0][0], target) and torch.equal(seen[1][0], source)
    assert all(torch.equal(pair[1], negative) for pair in seen)
