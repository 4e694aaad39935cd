"""Video DDS inside the host: gradients against finite differences, what the mask keeps, what a run leaves alone."""

from dataclasses import replace

import comfy.model_management as management
import pytest
import torch
from spacetime_edit.host import distillation
from spacetime_edit.host.distillation import (
    MOTION,
    RELEVANCE,
    SPATIAL,
    TEMPORAL,
    Distillation,
    optimise,
)
from spacetime_edit.host.families import noise_space
from spacetime_edit.host.features import key_blocks
from spacetime_edit.tests.host import plain_distillation, support

FRAMES, SIDE = 3, 8
LARGE = {SPATIAL: 3e3, TEMPORAL: 3e3, RELEVANCE: 1e3, MOTION: 1e5}
"""Weights by which gradients that are not balanced stand out from the rounding of the latent."""
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


def pulled(tiny, weights, steps=2, **options):
    """The latent, as the model sees it, after steps of the score and these regularisers, and the curve."""
    if steps == 0:
        return tiny.model.model.process_latent_in(clip()), []
    moved, curve = run(tiny, weights=weights, steps=steps, **options)
    return tiny.model.model.process_latent_in(moved), curve


@pytest.mark.parametrize("name", EVERY)
def test_nothing_pulls_where_nothing_has_moved(tiny, name):
    """In the first step the negative prompt's passes of source and target are one: what rounding leaves of a gradient
    is not blown up to its balanced share."""
    score, _ = pulled(tiny, {}, steps=1)
    both, _ = pulled(tiny, {name: 1.0}, steps=1, branch="negative")
    moved = score - tiny.model.model.process_latent_in(clip())
    assert (both - score).norm() <= 1e-4 * moved.norm()


@pytest.mark.parametrize("branch", ["text", "negative"])
@pytest.mark.parametrize("name", EVERY)
def test_each_regularisers_gradient_is_that_of_finite_differences(tiny, tiny64, name, branch):
    """What it adds to a step of the score: the first, or, where source and target are alike in that, the second.

    Along itself, by central differences in float64: the losses bend so much that float32 has no step for them. Also its
    checkpointed form, and the loss that is told.
    """
    steps = 2 if branch == "negative" or name == MOTION else 1
    settings = settings_of(tiny.model, branch=branch, steps=steps)
    (start, _), (free, _) = (pulled(tiny, {}, n, branch=branch) for n in (steps - 1, steps))
    *_, (sigma, noise) = plain_distillation.drawn(tiny.model, settings, free.shape, 0)
    a, s = noise_space(tiny.model).signal_and_noise(sigma)
    source, target = (a * x + s * noise for x in (tiny.model.model.process_latent_in(clip()), start))
    positive, edit, negative = prompts(tiny)
    pair = (positive, edit) if branch == "text" else (negative, negative)
    exact = plain_distillation.Regularisers(tiny64.model, pair, source.double(), sigma, [name], settings.blocks)
    weight = LARGE[name]
    for low_memory in (False, True):
        moved, curve = pulled(tiny, {name: weight}, steps, branch=branch, balanced=False, low_memory=low_memory)
        gradient = (free - moved).double() / (settings.step_size * plain_distillation.UNIT * float(a) * weight)
        step = 1e-3 * gradient / gradient.norm()
        ahead, behind = (exact.losses(target.double() + h * step)[name] for h in (1, -1))
        assert (ahead - behind) / 2e-3 == pytest.approx(float(gradient.norm()), rel=2e-3)
        assert curve[-1][1][name] == pytest.approx(exact.losses(target.double())[name], rel=1e-3)


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("balanced", [False, True], ids=["one gradient of their sum", "one gradient each"])
def test_several_regularisers_pull_as_each_does_alone(tiny, balanced, low_memory):
    # of one prompt the first step is the score's alone; of two it holds all but the motion's
    options = dict(balanced=balanced, low_memory=low_memory)
    options |= dict(steps=1, branch="text") if balanced else dict(steps=2, branch="negative")
    weights = EVERY if balanced else LARGE
    free = pulled(tiny, {}, **options)[0]
    alone = {name: pulled(tiny, {name: weight}, **options) for name, weight in weights.items()}
    together, curve = pulled(tiny, weights, **options)
    assert {name for name, (moved, _) in alone.items() if not torch.equal(moved, free)} >= set(EVERY) - {MOTION}
    wanted = sum(moved - free for moved, _ in alone.values())
    assert support.relative(together - free, wanted) < 1e-3
    for name, (_, own) in alone.items():
        assert curve[-1][1][name] == pytest.approx(own[-1][1][name], rel=1e-2)


@pytest.mark.parametrize("delta", [True, False])
def test_a_step_of_the_score_is_that_of_the_guiders_own_predictions(tiny, delta):
    """(a / s) times what the prediction of the target misses, less, of delta, what that of the source does."""
    settings = settings_of(tiny.model)
    ((sigma, noise),) = plain_distillation.drawn(tiny.model, replace(settings, steps=1), clip().shape, 0)
    a, s = noise_space(tiny.model).signal_and_noise(sigma)
    source, edit, negative = prompts(tiny)
    latent = tiny.model.model.process_latent_in(clip())
    missed = [
        latent - support.prediction(tiny.model, prompt, a * latent + s * noise, negative, 3.0, sigma)
        for prompt in (edit, source)
    ]
    gradient = (a / s) * (missed[0] - missed[1] if delta else missed[0])
    counter = support.CallCounter(tiny.model)
    moved, ((_, losses),) = run(tiny, model=counter.model, weights={}, steps=1, delta=delta)
    step = latent - tiny.model.model.process_latent_in(moved)
    assert support.relative(step, settings.step_size * plain_distillation.UNIT * gradient) < 1e-3
    assert losses["score"] == pytest.approx(float(gradient.square().mean()), rel=1e-3)
    assert counter.calls <= 4 if delta else counter.calls == 2  # plain score distillation needs no source


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


def part_of(prompt, **about):
    return [[embedding, settings | about] for embedding, settings in prompt]


PARTS = {
    "two for all": lambda a, b: [*a, *b],
    "one for an area": lambda a, b: [*part_of(b, area=(4, 4, 0, 2)), *a],
    "one for a mask": lambda a, b: [*a, *part_of(b, mask=torch.eye(SIDE)[None])],
    "two for some time each": lambda a, b: [
        *part_of(a, start_percent=0.0, end_percent=0.5),
        *part_of(b, start_percent=0.5, end_percent=1.0),
    ],
}


@pytest.mark.parametrize("make", PARTS.values(), ids=PARTS)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_step_of_prompts_for_parts_is_that_of_the_guiders_own_predictions(tiny, make, seed):
    """Of all conditionings together, as the host combines them; with regularisers too, whose gradients are 0 here."""
    settings = settings_of(tiny.model, steps=1)
    ((sigma, noise),) = plain_distillation.drawn(tiny.model, settings, clip().shape, seed)
    a, s = noise_space(tiny.model).signal_and_noise(sigma)
    source, edit, negative = prompts(tiny)
    others = (support.encode(tiny, f"a {thing} on a white background") for thing in ("green triangle", "circle", "dog"))
    given = [make(*pair) for pair in zip((source, edit, negative), others, strict=True)]
    latent = tiny.model.model.process_latent_in(clip())
    missed = [
        latent - support.prediction(tiny.model, prompt, a * latent + s * noise, given[2], 3.0, sigma)
        for prompt in (given[1], given[0])
    ]
    step = settings.step_size * plain_distillation.UNIT * (a / s) * (missed[0] - missed[1])
    for options in ({"weights": {}}, {"weights": {SPATIAL: 0.3, TEMPORAL: 0.1}, "branch": "negative"}):
        settings = settings_of(tiny.model, steps=1, **options)
        moved, _ = optimise(tiny.model, *given, clip(), settings, seed=seed)
        assert support.relative(latent - tiny.model.model.process_latent_in(moved), step) < 1e-3


@pytest.mark.parametrize("low_memory", [False, True])
def test_gradients_are_those_of_the_first_conditioning_for_the_whole_frame(tiny, low_memory):
    source, edit, negative = prompts(tiny)
    beside = part_of(support.encode(tiny, "a green triangle"), area=(4, 4, 0, 2))

    def pull(*given):
        options = dict(steps=1, balanced=False, low_memory=low_memory)
        free, pulled = (
            optimise(tiny.model, *given, clip(), settings_of(tiny.model, weights=weights, **options), seed=0)[0]
            for weights in ({}, {SPATIAL: LARGE[SPATIAL]})
        )
        return pulled - free

    alone = pull(source, edit, negative)
    assert alone.norm() > 0
    assert support.relative(pull([*beside, *source], [*beside, *edit], negative), alone) < 1e-3


@pytest.mark.parametrize(
    "about",
    [{"area": (4, 4, 0, 0)}, {"start_percent": 0.5, "end_percent": 1.0}, {"start_percent": 0.0, "end_percent": 0.9}],
)
@pytest.mark.parametrize("place", range(3), ids=["source_positive", "positive", "negative"])
def test_a_prompt_that_leaves_the_frame_or_a_time_open_is_refused_before_the_first_step(tiny, about, place):
    given, counter = list(prompts(tiny)), support.CallCounter(tiny.model)
    given[place] = part_of(given[place], **about)
    name = ("source_positive", "positive", "negative")[place]
    with pytest.raises(ValueError, match=f"^{name}: no conditioning covers the whole frame at sigma"):
        optimise(counter.model, *given, clip(), settings_of(tiny.model), seed=0)
    assert counter.calls == 0


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
