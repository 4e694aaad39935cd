"""Regions and words in the embedded model's attention to a clip whose truth is known."""

import pytest
import torch
from spacetime_edit.core.regions import Region
from spacetime_edit.host.inversion import invert
from spacetime_edit.host.latents import time_of
from spacetime_edit.host.loaders.example_clips import clip_names, load_clip
from spacetime_edit.host.model_pass import call_on_trajectory
from spacetime_edit.host.region_finding import regions_from_attention
from spacetime_edit.host.region_patch import RegionModulation, patch_regions
from spacetime_edit.host.region_prompt import LAYOUT, encode_regional_prompt, positions_in
from spacetime_edit.host.token_attention import share_inside, token_attention
from spacetime_edit.tests.host import support

PROMPT = "a blue triangle on the left and a yellow circle on the right, gray background"


@pytest.fixture(scope="module")
def clip():
    return load_clip(clip_names()[4])  # a red circle and a green square


@pytest.fixture(scope="module")
def trajectory(tiny, clip):
    with torch.inference_mode():
        sigmas = tiny.model.get_model_object("model_sampling").sigmas[[999, 800, 600, 400, 200, 100]]
        latent = tiny.vae.encode(clip.images)
        positive = support.encode(tiny, clip.source_prompt)
        return invert(tiny.model, positive, latent, torch.cat([sigmas, torch.zeros(1)]), refinements=0)


def overlap(a, b):
    a, b = a > 0.5, b > 0.5
    return float((a & b).sum() / (a | b).sum())


def test_objects_of_the_clip_are_found_and_followed(clip, trajectory):
    masks = regions_from_attention(trajectory, 3, (64, 64), seed=0)
    assert torch.stack(masks).sum(0).eq(1).all()
    for truth in (clip.mask_1, clip.mask_2):
        best = max(masks, key=lambda mask: overlap(mask, truth))
        assert min(overlap(best[f], truth[f]) for f in range(len(truth))) > 0.5


def test_seed_and_progress(trajectory):
    seen = []
    first = regions_from_attention(trajectory, 4, (64, 64), seed=7, progress=lambda *at: seen.append(at))
    again = regions_from_attention(trajectory, 4, (64, 64), seed=7)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert seen == [(i, len(seen)) for i in range(1, len(seen) + 1)] and len(seen) >= 4


def test_layers_can_be_chosen_and_unknown_ones_are_refused(trajectory):
    assert len(regions_from_attention(trajectory, 2, (64, 64), seed=0, layers="m0,u0")) >= 2
    with pytest.raises(ValueError, match="layers: 'u9' asks for u9"):
        regions_from_attention(trajectory, 2, (64, 64), seed=0, layers="u9")


def test_looking_leaves_the_model_as_it_was(tiny, trajectory):
    before = support.Untouched(tiny.model)
    regions_from_attention(trajectory, 3, (64, 64), seed=0)
    assert before.changed() == []


# --- words --------------------------------------------------------------


@pytest.fixture(scope="module")
def edit(tiny, clip):
    with torch.inference_mode():
        regions = [Region("a blue triangle", clip.mask_1), Region("a yellow circle", clip.mask_2)]
        return encode_regional_prompt(tiny.clip, PROMPT, regions)


def test_attention_to_words_is_the_softmaxs_own(tiny, trajectory, edit):
    """Against the weights written out from the queries and keys of the same run."""
    found = token_attention(trajectory, edit, "blue triangle", (16, 16), percent=0.2, layers="d0,u5")
    calls = []
    call_on_trajectory(lambda call: calls.append(call), trajectory, 0.2, frozenset({"cross"}), positive=edit)
    maps = []
    for call in calls:
        if call.kind == "cross" and call.layer.block in ("d0", "u5"):
            weights = (call.query.double() @ call.key.double().mT * call.scale).softmax(-1)
            maps.append(
                weights[..., positions_in(edit[0][1][LAYOUT], "blue triangle")].sum(-1).mean(1).view(-1, 16, 16)
            )
    assert len(maps) == 2 and torch.allclose(found.double(), torch.stack(maps).mean(0), atol=1e-5)


def test_the_patch_moves_words_into_their_region(tiny, trajectory, edit):
    layout = edit[0][1][LAYOUT]
    patched = patch_regions(tiny.model, RegionModulation(cross_strength=3.0, end=0.6))
    time = time_of(trajectory.clean, tiny.model)
    for words in ("a blue triangle", "yellow circle"):
        maps = (token_attention(trajectory, edit, words, (64, 64), percent=0.1, model=m) for m in (None, patched))
        plain, moved = (share_inside(attention, layout, words, time) for attention in maps)
        assert moved > plain + 0.1
    assert share_inside(torch.ones(8, 64, 64), layout, "gray background", time) is None


def test_a_repeated_prompt_counts_every_turn(tiny, trajectory, edit):
    """The host repeats a prompt to the length of another; the words then stand at several places."""
    twice = with_prompt_inside(tiny.model, lambda prompt: torch.cat([prompt, prompt], 1))
    once, both = (
        token_attention(trajectory, edit, "yellow", (16, 16), percent=0.2, layers="d0", model=model)
        for model in (None, twice)
    )
    assert torch.allclose(once, both, atol=1e-5)


def test_of_a_longer_prompt_the_words_of_the_regional_one_count(trajectory, edit):
    """As Conditioning (Concat) makes it: twice the same words, which share the attention, before it and behind it."""
    ((tensor, about),) = edit
    once, first, both = (
        token_attention(trajectory, p, "yellow", (16, 16), percent=0.2, layers="d0")
        for p in (edit, [[torch.cat([tensor, tensor], 1), about]], [[torch.cat([0 * tensor, tensor], 1), about]])
    )
    assert torch.allclose(once, 2 * first, atol=1e-5)
    assert 0 < float(both.mean()) < float(once.mean())


def with_prompt_inside(model, change):
    """A clone to which the prompt comes changed, as other packs' wrappers do it."""

    def wrapper(executor, x, t, c_concat, c_crossattn, *args, **kwargs):
        return executor(x, t, c_concat, change(c_crossattn), *args, **kwargs)

    changed = model.clone()
    changed.add_wrapper_with_key("apply_model", "test", wrapper)
    return changed


def test_words_that_are_not_there_are_refused(trajectory, edit):
    with pytest.raises(ValueError, match="phrase 'purple' in the prompt 'a blue triangle"):
        token_attention(trajectory, edit, "purple", (16, 16), percent=0.2)


def test_prompts_whose_words_have_no_known_place_are_refused(tiny, trajectory, edit):
    ask = lambda positive, **options: token_attention(  # noqa: E731
        trajectory, positive, "yellow", (16, 16), percent=0.2, **options
    )
    shorter = with_prompt_inside(tiny.model, lambda prompt: prompt[:, :-1])
    with pytest.raises(
        ValueError, match=r"positive: the regional prompt has (\d+) text tokens, but attention sees \d+;"
    ):
        ask(edit, model=shorter)
    with pytest.raises(ValueError, match="positive: it carries no regional prompt at percent .*; connect"):
        ask(support.encode(tiny, PROMPT))
    with pytest.raises(ValueError, match="positive: the regional prompt .* was changed after Encode Regional Prompt"):
        ask([[1.01 * edit[0][0], edit[0][1]]])


def test_another_model_than_the_inverted_one_is_refused(trajectory, edit):
    with pytest.raises(ValueError, match="model: it is not the one that was inverted"):
        token_attention(trajectory, edit, "yellow", (16, 16), percent=0.2, model=support.sd15_model())
