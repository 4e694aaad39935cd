"""Check Model: nothing broken on any family, and each kind of broken model named for what it is."""

import contextlib
import json
import re

import comfy.model_management as management
import nodes
import pytest
import torch
from comfy.context_windows import (
    IndexListContextHandler,
    get_matching_context_schedule,
    get_matching_fuse_method,
)
from comfy.patcher_extension import WrappersMP
from spacetime_edit.core.regions import Region
from spacetime_edit.host import block_matching, gradient_pass, model_check
from spacetime_edit.host.clip_fitting import example_for
from spacetime_edit.host.families import family_of
from spacetime_edit.host.model_check import check_model
from spacetime_edit.host.region_patch import RegionModulation, patch_regions
from spacetime_edit.host.region_prompt import Layout, with_layout
from spacetime_edit.tests.host import support
from spacetime_edit.tests.host.tiny_families import BY_NAME, families, families_named

PARTS = ["numbers", "inversion", "attention", "matching", "regions", "memory"]


@pytest.fixture(scope="module")
def family(request):
    return BY_NAME[request.param]


@pytest.fixture(scope="module")
def model(family):
    with torch.inference_mode():
        return family.model()


def checked(model, family, clip=None):
    return check_model(model, family.conditioning(), 0.5 * family.clip() if clip is None else clip)


def verdicts(check):
    return {finding.name: finding.verdict for finding in check.findings}


def text_of(check, name):
    return next(finding.text for finding in check.findings if finding.name == name)


@families()
def test_nothing_is_broken_on_a_model_that_works(family, model):
    check_model(model, family.conditioning(), 0.5 * family.clip())  # another pack's modules come in
    untouched, progress = support.Untouched(model), []
    note = lambda done, total: progress.append((done, total))  # noqa: E731
    check = check_model(model, family.conditioning(), 0.5 * family.clip(), note)
    assert list(verdicts(check)) == PARTS and not check.broken, check.broken
    assert (verdicts(check)["matching"] == "does not apply") == (not family.matched)
    assert untouched.changed() == []
    assert progress[0] == (0, 6) and progress[-1] == (6, 6)
    if family.matched:
        assert check.layers and check.strength in block_matching.LAMBDAS
        assert {own.block for own in check.blocks} >= set(check.layers.split(","))
    assert json.loads(json.dumps(check.as_dict()))["facts"]["classes"][0] == type(model.model).__name__


@families_named("UNet3D")
def test_a_move_along_a_blocks_gradient_is_measured_on_the_block(family, model):
    """The cosine after the move is that of a pass on the moved latent."""
    check = checked(model, family)
    best = max(check.blocks, key=lambda own: own.gain)
    assert best.after > best.before and best.gain > 0 and best.block in check.layers.split(",")


# --- broken models ------------------------------------------------------


def wrapped(model, wrapper, kind=WrappersMP.APPLY_MODEL):
    broken = model.clone()
    broken.add_wrapper_with_key(kind, "of a test", wrapper)
    return broken


def answers_nan(model):
    return wrapped(model, lambda executor, *args, **kwargs: executor(*args, **kwargs) * float("nan"))


def answers_by_chance(model):
    def shaken(executor, *args, **kwargs):
        out = executor(*args, **kwargs)
        return out + 2 * torch.randn_like(out) * out.std()

    return wrapped(model, shaken)


def replaces_attention(model):
    """As IPAdapter does, in every block."""
    broken = model.clone()
    for block in ("input", "output"):
        for number in range(12):
            broken.set_model_attn2_replace(lambda q, k, v, options: q, block, number)
    return broken


def cuts_gradients(model):
    """As a kernel of 8 bits does."""

    def override(func, *args, **kwargs):
        with torch.no_grad():
            return func(*args, **kwargs)

    broken = model.clone()
    broken.model_options["transformer_options"]["optimized_attention_override"] = override
    return broken


def answers_from_a_store(model):
    """A step cache that nobody knows as one."""
    return wrapped(model, lambda executor, x, *args, **kwargs: torch.zeros_like(x), WrappersMP.DIFFUSION_MODEL)


BROKEN = {
    "NaN": (answers_nan, "Wan", "numbers", "NaN or infinity .*another precision"),
    "chance": (answers_by_chance, "Wan", "inversion", "An edit would not keep the clip"),
    "replaced attention": (replaces_attention, "SD 1.5", "attention", "replaces the cross attention of .*IPAdapter"),
    "no gradient": (cuts_gradients, "Wan", "matching", "gives no gradient .*Sage"),
    "a network that does not run": (answers_from_a_store, "Wan", "attention", "its network did not run"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_model_is_named_for_what_it_is(kind):
    """In the part that it is about, and in none before."""
    change, name, part, message = BROKEN[kind]
    family = BY_NAME[name]
    check = checked(change(family.model()), family)
    assert check.broken and check.broken[0].name == part
    assert re.search(message, text_of(check, part), re.S), text_of(check, part)


@families_named("UNet3D")
def test_a_gradient_of_the_wrong_sign_is_found(family, model, monkeypatch):
    """What fused kernels without a backward would do: the loss rises along it."""
    right = block_matching.polyak_move
    monkeypatch.setattr(block_matching, "polyak_move", lambda *args, **options: -right(*args, **options))
    check = checked(model, family)
    assert verdicts(check)["matching"] == "broken" and "in bf16 or fp32" in text_of(check, "matching")
    assert check.strength is None and check.layers == ""


@families_named("Wan")
def test_regions_that_do_nothing_are_found(family, model, monkeypatch):
    monkeypatch.setattr(model_check, "patch_regions", lambda model, modulation: model.clone())
    check = checked(model, family)
    assert verdicts(check)["regions"] == "broken" and "replaces the attention" in text_of(check, "regions")


@families_named("Wan")
def test_memory_that_was_not_foreseen_is_told(family, model, monkeypatch):
    monkeypatch.setattr(model_check, "TOO_SMALL", 0)
    monkeypatch.setattr(model_check, "NEAR", (0.999, 1.001))
    assert verdicts(checked(model, family))["memory"] == "look"


# --- what is around it --------------------------------------------------


@families_named("Wan")
def test_what_others_have_put_in_is_told_and_nothing_else(family, model):
    watched = wrapped(model, lambda executor, *args, **kwargs: executor(*args, **kwargs))
    watched.model_options["transformer_options"]["easycache"] = object()
    facts = checked(watched, family).facts
    assert facts["wrappers of other packs"] == ["of a test"] and facts["step caches"] == ["easycache"]
    assert facts["computes in"] == "float32" and facts["weights"] == ["float32"]
    assert not any("/" in str(value) or "\\" in str(value) for value in facts.values())


@families_named("Wan")
def test_a_model_with_our_own_patch_and_a_regional_prompt_is_checked_as_it_is(family, model):
    """As they are in the graph of an edit."""
    patched = patch_regions(model, RegionModulation(end=1.0))
    mask = torch.ones(1, 8, 8)
    layout = Layout("a", (Region("a", mask),), ((1,),), family.words)
    check = check_model(patched, with_layout(family.conditioning(), layout), 0.5 * family.clip())
    assert not check.broken, check.broken


@families_named("Wan")
def test_nothing_private_is_in_it(family, model):
    """A changed regional prompt, whose refusal shows the prompt, and an error of another pack with a path."""
    layout = Layout(
        "a secret cat", (Region("secret cat", torch.ones(1, 8, 8)),), ((1,),), family.words, digests=(b"",) * 7
    )
    patched = patch_regions(model, RegionModulation(end=1.0))
    told = json.dumps(check_model(patched, with_layout(family.conditioning(), layout), 0.5 * family.clip()).as_dict())
    assert "(text)" in told and "secret" not in told

    def fails(executor, *args, **kwargs):
        raise RuntimeError("cannot read /home/somebody/secret.txt")

    told = json.dumps(checked(wrapped(model, fails), family).as_dict())
    assert "RuntimeError in the model or in another pack" in told and "secret" not in told


@families_named("Wan")
def test_paths_are_left_out_of_our_own_errors(family):
    def raised(text):
        try:
            check_model(None, [], text)
        except Exception as error:  # noqa: BLE001
            return error

    error = raised(0)
    error.args = (r"in C:\Users\somebody\x.pt and /home/somebody/x.pt by 3 / 4",)
    assert model_check.public_text(error, []) == "in (path) and (path) by 3 / 4"


@families_named("Mochi")
def test_padding_is_no_word_of_the_region(family, model):
    """Mochi cuts it off inside the model."""
    ((embedding, about),) = family.conditioning()
    about["attention_mask"][:, 5:] = 0
    check = check_model(model, [[embedding, about]], 0.5 * family.clip())
    assert verdicts(check)["regions"] in ("works", "look"), text_of(check, "regions")


@families_named("Wan")
def test_prompts_that_take_turns_are_no_fault_of_the_model(family, model):
    """The first is not active in the middle of the denoising."""
    early = nodes.ConditioningSetTimestepRange().set_range(family.conditioning(), 0.0, 0.2)[0]
    late = nodes.ConditioningSetTimestepRange().set_range(family.conditioning(1), 0.2, 1.0)[0]
    check = check_model(model, early + late, 0.5 * family.clip())
    assert not check.broken, check.broken


@families_named("Wan")
def test_a_patch_that_does_nothing_early_is_told_as_that(family, model):
    check = checked(patch_regions(model, RegionModulation(start=0.5, end=1.0)), family)
    assert verdicts(check)["regions"] == "look" and "does nothing early" in text_of(check, "regions")


@families_named("Wan")
def test_a_first_try_that_runs_out_of_memory_is_not_measured(family, model, monkeypatch):
    """What it took before it failed says nothing of what a gradient takes."""
    failed, real = [], gradient_pass.prediction_with_graph

    @contextlib.contextmanager
    def short(*args, **kwargs):
        if not failed:
            failed.append(True)
            raise torch.OutOfMemoryError("out of memory")
        with real(*args, **kwargs) as made:
            yield made

    monkeypatch.setattr(gradient_pass, "prediction_with_graph", short)
    check = checked(model, family)
    assert verdicts(check)["memory"] == "does not apply" and verdicts(check)["matching"] in ("works", "look")


@families_named("UNet3D", "Wan")
def test_of_context_windows_one_is_tried(family, model):
    windowed, count = model.clone(), 2
    dim = 2 if family.patched else 0
    windowed.model_options["context_handler"] = IndexListContextHandler(
        get_matching_context_schedule("standard_static"), get_matching_fuse_method("pyramid"), count, 1, dim=dim
    )
    check = checked(windowed, family)
    assert check.facts["context windows"] and not check.broken


@families_named("UNet3D")
def test_an_interrupt_stops_it(family, model):
    management.interrupt_current_processing()
    with pytest.raises(management.InterruptProcessingException):
        checked(model, family)


@families_named("Wan")
def test_bad_input_is_refused_at_once(family, model):
    with pytest.raises(ValueError, match="^latent: its shape"):
        checked(model, family, torch.zeros(1, 4, 3, 8, 8))
    with pytest.raises(ValueError, match="^positive: it holds no prompt"):
        check_model(model, [], family.clip())


@families()
def test_the_example_clip_fits_every_model(family, model):
    images, pattern = example_for(model), family_of(model).frames
    frames, height, width, channels = images.shape
    assert frames >= 2 and channels == 3 and height == width <= 512 and images.min() >= 0 and images.max() <= 1
    assert (frames - pattern.shortest) % pattern.step == 0
