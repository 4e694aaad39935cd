"""Options, tasks, memory and records of STR matching in real runs of the embedded model."""

import logging

import comfy.model_management as management
import comfy.samplers
import pytest
import torch
from spacetime_edit.core.live_memory import PeakMemory
from spacetime_edit.host import cost as cost_module
from spacetime_edit.host import relevance_matching
from spacetime_edit.host.cost import predict_costs
from spacetime_edit.host.inversion import invert
from spacetime_edit.host.planned_edits import Plan
from spacetime_edit.host.relevance_matching import RelevanceMatching, redraw_noise, str_score_of
from spacetime_edit.host.sampling import TrajectorySampler
from spacetime_edit.tests.host import support
from spacetime_edit.tests.host.test_checkpointing import gradient
from torch.utils.flop_counter import FlopCounterMode

FRAMES, SIDE, STEPS = 3, 8, 2
FORMS = {
    "temporal first": dict(paths="temporal-spatial"),
    "both paths": dict(paths="both"),
    "concat": dict(paths="concat"),
    "one way": dict(bidirectional=False),
    "per pair": dict(per_pair=True),
    "adjacent frames": dict(radius=1),
}


@pytest.fixture(scope="module")
def edit(tiny):
    with torch.inference_mode():
        return support.encode(tiny, support.EDIT_PROMPT)


@pytest.fixture(scope="module")
def trajectory(tiny):
    with torch.inference_mode():
        latent = torch.randn(FRAMES, 4, SIDE, SIDE, generator=torch.Generator().manual_seed(3))
        sampling = tiny.model.get_model_object("model_sampling")
        sigmas = comfy.samplers.calculate_sigmas(sampling, "simple", STEPS)
        return invert(tiny.model, support.encode(tiny), latent, sigmas, refinements=0)


def sampler(trajectory, form=None, mask=None, strength=0.2, **options):
    matching = RelevanceMatching(str_score_of(trajectory, **(form or {})), strength, **options)
    return TrajectorySampler(trajectory, mask=mask, before_step=[matching])


def run(sampler, positive, noise_mask=None, first=0):
    trajectory = sampler.trajectory
    guider = support.guider_of(trajectory.model, positive)
    zeros = torch.zeros(trajectory.shape)
    return guider.sample(zeros, zeros, sampler, trajectory.sigmas[first:], noise_mask, disable_pbar=True, seed=7)


def left_half():
    mask = torch.zeros(1, SIDE, SIDE)
    mask[:, :, : SIDE // 2] = 1
    return mask


def watched(monkeypatch, function):
    """Replaces matching_loss by `function(loss, *args, **options)`."""
    original = relevance_matching.matching_loss
    monkeypatch.setattr(relevance_matching, "matching_loss", lambda *a, **k: function(original, *a, **k))


# options


def test_all_frames_are_compared_unless_a_radius_is_chosen(trajectory):
    assert [str_score_of(trajectory, "", *radius).radius for radius in ((), (0,), (2,))] == [0, 0, 2]


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_every_form_of_the_score_reaches_the_loss_and_changes_the_edit(trajectory, edit, monkeypatch, form):
    seen = []
    watched(monkeypatch, lambda loss, *a, **k: seen.append(k) or loss(*a, **k))
    result = run(sampler(trajectory, form), edit)
    assert torch.isfinite(result).all()
    assert all(form.items() <= options.items() for options in seen)
    assert not torch.equal(result, run(sampler(trajectory), edit))


@pytest.mark.parametrize("task", ["delete", "add"])
def test_inside_the_mask_nothing_is_matched(trajectory, edit, monkeypatch, task):
    """The weight of every layer is 0 on the mask's tokens and 1 on the others."""
    weights = []
    watched(monkeypatch, lambda loss, *a, **k: weights.append(k["weight"]) or loss(*a, **k))
    run(sampler(trajectory, mask=left_half(), task=task), edit)
    assert weights
    for weight in weights:
        side = int(weight.shape[1] ** 0.5)
        rows = weight.view(FRAMES, side, side)
        assert (rows[:, :, : side // 2] == 0).all() and (rows[:, :, side // 2 :] == 1).all()


def test_the_latent_moves_outside_the_mask_only(trajectory, edit):
    """The blend would hide what the step did outside, so the step is asked directly."""
    moves = []

    def watch(x, step):
        moves.append((x.clone(), matched(x, step)))
        return moves[-1][1]

    matched = RelevanceMatching(str_score_of(trajectory), 0.01, task="delete")
    run(TrajectorySampler(trajectory, mask=left_half(), before_step=[watch]), edit)
    for before, after in moves:
        left, right = slice(None, SIDE // 2), slice(SIDE // 2, None)
        assert torch.equal(before[..., left], after[..., left])
        assert not torch.equal(before[..., right], after[..., right])


def test_new_noise_inside_the_mask_follows_the_seed_of_the_run(trajectory, edit):
    starts = []

    def watch(x, step):
        starts.append(x.clone())
        return x

    redrawn = TrajectorySampler(trajectory, mask=left_half(), before_step=[redraw_noise, watch])
    first, second = run(redrawn, edit), run(redrawn, edit)
    assert torch.equal(first, second)
    start, source = starts[0], trajectory.latents[0]
    assert torch.equal(start[..., SIDE // 2 :], source[..., SIDE // 2 :])
    assert not torch.equal(start[..., : SIDE // 2], source[..., : SIDE // 2])
    drawn_from = source[..., SIDE // 2 :].flatten(2)
    for frame, row in enumerate(start[..., : SIDE // 2].flatten(2)):
        assert torch.isin(row, drawn_from[frame]).all()
    assert torch.equal(starts[1], starts[1 + STEPS]), "later steps are left alone"


def test_new_noise_is_refused_where_latents_hold_the_picture(trajectory, edit):
    """A later start, as behind SplitSigmas."""
    with pytest.raises(ValueError, match="^sigmas: they begin at .*, the trajectory at .*; connect all sigmas"):
        run(TrajectorySampler(trajectory, mask=left_half(), before_step=[redraw_noise]), edit, first=1)


def test_change_matches_inside_the_mask_too(trajectory, edit, monkeypatch):
    weights = []
    watched(monkeypatch, lambda loss, *a, **k: weights.append(k["weight"]) or loss(*a, **k))
    run(sampler(trajectory, mask=left_half()), edit)
    assert set(weights) == {None}


def test_the_task_takes_the_mask_that_the_latent_carries(trajectory, edit):
    on_node = run(sampler(trajectory, mask=left_half(), task="delete"), edit)
    noise_mask = left_half()[:, None].expand(FRAMES, 1, -1, -1)
    assert torch.equal(run(sampler(trajectory, task="delete"), edit, noise_mask), on_node)


@pytest.mark.parametrize(("task", "where"), [("delete", "object is"), ("add", "shall appear")])
def test_a_task_without_a_mask_is_refused_before_the_model_runs(trajectory, edit, monkeypatch, task, where):
    monkeypatch.setattr(relevance_matching, "call_model", lambda *_, **__: pytest.fail("the model ran"))
    with pytest.raises(ValueError, match=f"^mask: the task is '{task}', but no mask is connected; .*{where}"):
        run(sampler(trajectory, task=task), edit)


def test_a_mask_of_everything_leaves_delete_nothing_to_match(trajectory, edit):
    """The gradient is 0, not NaN: the edit is the plain prompt swap."""
    result = run(sampler(trajectory, mask=torch.ones(1, SIDE, SIDE), task="delete"), edit)
    assert torch.equal(result, run(TrajectorySampler(trajectory), edit))


def test_layers_in_which_the_mask_hides_everything_do_not_count(trajectory, edit):
    """One cell of each quadrant: of grids of 2 x 2 nothing is left, of those of 4 x 4 most. What is left of the loss is
    what those can still match, or every move would be too long."""
    mask = torch.zeros(1, SIDE, SIDE)
    mask[:, ::4, ::4] = 1
    found = []
    for form in (None, {"layers": "d1,u2-u3"}):
        matched = sampler(trajectory, form, mask=mask, task="delete", end=0.1)
        found.append((samples := run(matched, edit), matched.records_of(samples)[0].cosines[0]))
    assert found[0][1] == pytest.approx(found[1][1], abs=1e-6)
    assert support.relative(found[0][0], found[1][0]) <= 1e-4


# records


def test_a_run_is_remembered_by_what_it_made(trajectory, edit, tiny):
    matched = sampler(trajectory, iterations=2)
    first = run(matched, edit)
    other = run(matched, support.encode(tiny))
    for result in (first, other):
        records = matched.records_of(result)
        assert [len(record.cosines) for record in records] == [2] * STEPS
        assert [record.percent for record in records] == pytest.approx([0, 0.5], abs=2e-3)
        assert all(0 < cosine <= 1 + 1e-6 for record in records for cosine in record.cosines)
    assert matched.records_of(first)[0] is not matched.records_of(other)[0]
    assert matched.records_of(first + 1) is None
    assert matched.replaced(matched.before_step).records_of(first) is None


def test_the_recorded_cosines_rise_within_a_step(trajectory, edit):
    matched = sampler(trajectory, strength=0.02, iterations=4, start=0.4)
    (record,) = matched.records_of(run(matched, edit))
    assert list(record.cosines) == sorted(record.cosines)


# memory


def test_low_memory_gives_the_same_edit(trajectory, edit):
    """Rounding apart, which later steps amplify."""
    plain, lean = (run(sampler(trajectory, memory=memory), edit) for memory in ("auto", "low"))
    assert not torch.equal(plain, lean), "the blocks did not run again"
    assert support.relative(lean, plain) <= 1e-4


def test_short_memory_turns_checkpointing_on(trajectory, edit, monkeypatch, caplog):
    short = 1_000_000
    free = lambda device=None, torch_free_too=False: (short, short) if torch_free_too else short  # noqa: E731
    monkeypatch.setattr(management, "get_free_memory", free)
    matched = sampler(trajectory)
    with caplog.at_level(logging.INFO, "spacetime_edit"):
        result = run(matched, edit)
    assert "keeps no activations" in caplog.text
    assert all(record.checkpointing for record in matched.records_of(result))
    assert support.relative(result, run(sampler(trajectory, memory="low"), edit)) <= 1e-4


def test_the_host_is_asked_once_for_the_memory_of_the_gradient(trajectory, edit, monkeypatch):
    asked = []
    load = management.load_models_gpu
    note = lambda models, memory_required=0, **k: asked.append((models, memory_required))  # noqa: E731
    monkeypatch.setattr(management, "load_models_gpu", lambda *a, **k: (note(*a, **k), load(*a, **k)))
    before = support.Untouched(trajectory.model)
    matched = sampler(trajectory)
    records = matched.records_of(run(matched, edit))
    amounts = [amount for _, amount in asked if amount == records[0].memory.total(checkpointing=False)]
    assert len(amounts) == 1
    assert before.changed() == []


def out_of_memory_at(calls):
    """A matching loss that runs out of memory at these calls."""
    count = iter(range(1_000_000))

    def fail(loss, *args, **options):
        if next(count) in calls:
            raise torch.OutOfMemoryError("out of memory")
        return loss(*args, **options)

    return fail


def test_out_of_memory_is_retried_once_with_less(trajectory, edit, monkeypatch, caplog):
    watched(monkeypatch, out_of_memory_at({0}))
    result = run(sampler(trajectory), edit)
    assert "out of memory; once more without kept activations" in caplog.text
    monkeypatch.undo()
    assert torch.equal(result, run(sampler(trajectory, memory="low"), edit))


@pytest.mark.parametrize("memory", ["auto", "low"])
def test_out_of_memory_for_good_names_what_to_lower(trajectory, edit, monkeypatch, memory):
    before = support.Untouched(trajectory.model)
    watched(monkeypatch, out_of_memory_at(range(1000)))
    with pytest.raises(RuntimeError, match="out of memory, also without kept.*frames.*size.*layers.*reserve-vram"):
        run(sampler(trajectory, memory=memory), edit)
    assert before.changed() == []


@pytest.mark.parametrize("memory", ["auto", "low"])
def test_an_interrupt_in_the_backward_pass_leaves_the_model_as_it_was(trajectory, edit, monkeypatch, memory):
    before = support.Untouched(trajectory.model)
    expected = run(sampler(trajectory, memory=memory), edit)

    def press_stop(loss, *args, **options):
        management.interrupt_current_processing()
        return loss(*args, **options)

    watched(monkeypatch, press_stop)
    with pytest.raises(management.InterruptProcessingException):
        run(sampler(trajectory, memory=memory), edit)
    monkeypatch.undo()
    assert before.changed() == []
    assert torch.equal(run(sampler(trajectory, memory=memory), edit), expected)


@pytest.mark.parametrize("memory", ["auto", "low"])
def test_an_interrupt_acts_before_the_next_layer(trajectory, edit, memory):
    """Wherever in a run it comes: in a prediction, in the pass with gradient, in blocks that run again."""
    layers = [m for m in trajectory.model.model.diffusion_model.modules() if hasattr(m, "in_features")]

    def calls_of_a_run(press_at=None):
        calls = []

        def count(*_):
            calls.append(None)
            if len(calls) == press_at:
                management.interrupt_current_processing()

        hooks = [layer.register_forward_hook(count) for layer in layers]
        try:
            run(sampler(trajectory, memory=memory), edit)
        except management.InterruptProcessingException:
            return len(calls)
        finally:
            for hook in hooks:
                hook.remove()
        assert press_at is None, "the run went on"
        return len(calls)

    total = calls_of_a_run()
    for press_at in range(1, total, total // 9):
        assert calls_of_a_run(press_at) == press_at


def test_an_interrupt_acts_between_tiles_of_a_loss(trajectory, edit, monkeypatch):
    def press_stop(loss, *args, on_tile, **options):
        def pressed():
            management.interrupt_current_processing()
            on_tile()

        with pytest.raises(management.InterruptProcessingException):
            loss(*args, on_tile=pressed, **options)
        return loss(*args, **options)

    watched(monkeypatch, press_stop)
    run(sampler(trajectory), edit)


def test_other_errors_are_not_taken_for_memory(trajectory, edit, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("shapes differ")

    watched(monkeypatch, fail)
    with pytest.raises(RuntimeError, match="shapes differ"):
        run(sampler(trajectory), edit)


@pytest.mark.parametrize("checkpoint", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize(("frames", "side"), [(8, 16), (16, 16)])
def test_predicted_memory_of_a_gradient(tiny, frames, side, checkpoint):
    """Within a third of what lives at the peak, and rather above it than below where memory is short."""
    source, target = (
        2 * torch.randn(frames, 4, side, side, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)
    )
    measured = gradient(tiny.model, support.encode(tiny), target, source, checkpoint=checkpoint)[2].peak
    (cost,) = predict_costs(tiny.model, support.encode(tiny), source, [Plan(steps=5, end=1.0)])
    predicted = cost.foreseen.total(checkpointing=checkpoint)
    assert 0.9 <= predicted / measured <= 1.34


def test_a_whole_edit_keeps_only_the_trajectory(tiny, edit, trajectory):
    """Live bytes after a run: the latents and nothing of any step."""
    matched = sampler(trajectory)
    run(matched, edit)  # what the host keeps after its first run is kept once
    with PeakMemory() as memory:
        result = run(matched, edit)
    made = result.numel() * 4
    assert memory.live <= 3 * made + 4096


# cost


def test_predicted_cost_counts_steps_and_bytes(tiny):
    latent = torch.randn(FRAMES, 4, SIDE, SIDE)
    before = support.Untouched(tiny.model)
    plans = {
        "half": dict(end=0.499),
        "none": dict(method="prompt swap"),
        "all": dict(end=1.0),
        "zero": dict(strength=0.0),
    }
    made = [Plan(steps=20, scheduler="simple", **options) for options in plans.values()]
    costs = dict(zip(plans, predict_costs(tiny.model, support.encode(tiny), latent, made), strict=True))
    assert [costs[name].matched_steps for name in costs] == [10, 0, 20, 0]
    assert costs["none"].foreseen is None and costs["none"].steps == 20
    assert costs["all"].trajectory == 21 * latent.numel() * 4
    assert all(cost.inversion_seconds > 0 and cost.edit_seconds > 0 for cost in costs.values())
    assert costs["all"].weights == sum(w.numel() * w.element_size() for w in tiny.model.model.state_dict().values())
    assert before.changed() == []


def test_predicted_time_is_that_of_a_run(tiny, trajectory, edit, monkeypatch):
    """On a clock that counts floating point operations: seconds of a busy machine prove nothing."""
    with FlopCounterMode(display=False) as work:
        monkeypatch.setattr(cost_module, "perf_counter", work.get_total_flops)
        plan = Plan(steps=10, prompts=1, iterations=1, end=1.0, scheduler="simple")
        (cost,) = predict_costs(tiny.model, edit, torch.randn(trajectory.shape), [plan])
    sampling = tiny.model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "simple", 10)
    with FlopCounterMode(display=False) as work:
        longer = invert(tiny.model, support.encode(tiny), torch.randn(trajectory.shape), sigmas)
        inversion = work.get_total_flops()
        run(sampler(longer), edit)
    assert inversion > 1e8
    assert cost.inversion_seconds == pytest.approx(inversion, rel=0.05)
    assert cost.edit_seconds == pytest.approx(work.get_total_flops() - inversion, rel=0.05)
