"""LTX-2: prompts that the model itself prepares, and latents with sound beside the clip."""

import comfy.nested_tensor
import comfy.samplers
import nodes
import pytest
import torch
from comfy_extras.nodes_video_model import ConditioningSetAreaPercentageVideo
from spacetime_edit.core.regions import Region
from spacetime_edit.host.attention_tap import AttentionTap
from spacetime_edit.host.distillation import Distillation, optimise
from spacetime_edit.host.inversion import invert
from spacetime_edit.host.latents import clip_mask
from spacetime_edit.host.model_pass import call_model
from spacetime_edit.host.region_patch import RegionModulation, patch_regions
from spacetime_edit.host.region_prompt import Layout, digests_of, with_layout
from spacetime_edit.host.regional_prompts import UNPREPARED
from spacetime_edit.host.sampling import TrajectorySampler
from spacetime_edit.tests.host import support
from spacetime_edit.tests.host.tiny_families import BY_NAME

FAMILY = BY_NAME["LTX-2"]
WIDTH, WORDS = 32, 5  # of a prompt as the text encoder gives it
PERCENT = 0.1
REGIONS = RegionModulation(end=1.0, self_strength=2.0, cross_strength=2.0)


@pytest.fixture(scope="module")
def model():
    with torch.inference_mode():
        return FAMILY.model()


def sigma_of(model):
    return float(model.get_model_object("model_sampling").percent_to_sigma(PERCENT))


def raw(seed=0):
    return torch.randn(1, WORDS, WIDTH, generator=torch.Generator().manual_seed(seed))


def layout_of(embedding, flip=False):
    left = torch.zeros(1, 16, 16)
    left[..., :8] = 1
    masks = (1 - left, left) if flip else (left, 1 - left)
    regions = tuple(Region(name, mask) for name, mask in zip("ab", masks, strict=True))
    return Layout("a b", regions, ((1,), (3,)), embedding.shape[1], digests=digests_of(embedding))


def regional(embedding, **about):
    return with_layout([[embedding, about]], layout_of(embedding))


def as_the_model_prepares_it(model, embedding):
    return model.model.diffusion_model.preprocess_text_embeds(embedding, unprocessed=True)


def predicted(model, positive, negative=None, clip=None):
    return support.prediction(model, positive, FAMILY.clip() if clip is None else clip, negative, 2.0, sigma_of(model))


# --- prompts ------------------------------------------------------------


def test_words_keep_their_places_where_the_model_prepares_the_prompt(model):
    """As in the prompt that the encoder of the first files of LTX-2 prepares by itself."""
    patched, prepared = patch_regions(model, REGIONS), as_the_model_prepares_it(model, raw())
    assert prepared.shape[1] > WORDS
    by_model = predicted(patched, regional(raw(), **{UNPREPARED: True}))
    by_encoder = predicted(patched, regional(prepared))
    torch.testing.assert_close(by_model, by_encoder, rtol=1e-5, atol=1e-6)
    assert support.relative(by_model, predicted(model, [[prepared, {}]])) > 1e-3


def test_another_prompt_that_borrows_an_area_does_not_get_the_words(model):
    """The host copies a conditioning with an area into the other prompts, with their vectors."""
    patched = patch_regions(model, REGIONS)
    positive = ConditioningSetAreaPercentageVideo().append(
        regional(raw(), **{UNPREPARED: True}), 1.0, 0.5, 1.0, 0, 0, 0, 1.0
    )[0]
    positive += [[raw(3), {UNPREPARED: True}]]
    negative = [[raw(5), {UNPREPARED: True}]]
    seen = []

    def note(guider, x, sigma, extra_args):
        tap = AttentionTap(patched, [lambda call: seen.append(call)])
        options = tap.install(extra_args["model_options"])
        return guider(x, sigma * x.new_ones(x.shape[0]), model_options=options, seed=0)

    support.at_one_sigma(support.guider_of(patched, positive, negative, 2.0), FAMILY.clip(), note, sigma_of(model))
    from spacetime_edit.host.regional_prompts import prompts_of

    of_rows = {
        (row.prompt, row.uuid): prompts_of(call.run).of_chunk(call.run, row.chunk)[0] is not None
        for call in seen
        for row in call.rows
    }
    assert sorted((prompt, has) for (prompt, _), has in of_rows.items()) == [
        (0, False),
        (0, True),
        (1, False),
        (1, False),
    ]


def test_a_prompt_that_was_zeroed_out_has_no_words(model):
    zeroed = nodes.ConditioningZeroOut().zero_out(regional(raw(), **{UNPREPARED: True}))[0]
    plain = [[torch.zeros_like(raw()), {UNPREPARED: True}]]
    assert torch.equal(predicted(patch_regions(model, REGIONS), zeroed), predicted(model, plain))


# --- sound --------------------------------------------------------------


def with_sound(clip, seconds=6):
    sound = torch.randn(1, 8, seconds, 16, generator=torch.Generator().manual_seed(4))
    return comfy.nested_tensor.NestedTensor((clip, sound))


def sampled(model, positive, latent, sampler=None):
    """A whole run of the host."""
    guider = support.guider_of(model, positive, FAMILY.conditioning(2), 2.0)
    noise = comfy.nested_tensor.NestedTensor(
        [torch.randn(t.shape, generator=torch.Generator().manual_seed(8)) for t in latent.unbind()]
    )
    sigmas = torch.tensor([0.95, 0.6, 0.2, 0.0])
    sampler = comfy.samplers.sampler_object("euler") if sampler is None else sampler
    return guider.sample(noise, latent, sampler, sigmas, disable_pbar=True, seed=0).unbind()


def test_regions_act_on_the_clip_beside_its_sound(model):
    prepared = as_the_model_prepares_it(model, raw())
    latent = with_sound(FAMILY.clip())
    plain = sampled(model, [[prepared, {}]], latent)
    neutral = sampled(
        patch_regions(model, RegionModulation(self_strength=0, cross_strength=0)), regional(prepared), latent
    )
    modulated = sampled(patch_regions(model, REGIONS), regional(prepared), latent)
    assert all(map(torch.equal, plain, neutral))
    assert plain[0].shape == modulated[0].shape == FAMILY.shape
    assert support.relative(modulated[0], plain[0]) > 1e-4


def test_calls_are_of_the_clip_where_there_is_sound(model):
    """A call of the clip's own attention, with sound beside it, has the clip's tokens and no others."""
    seen = []
    tapped = model.clone()
    tapped.model_options = AttentionTap(model, [seen.append]).install(model.model_options)
    sampled(tapped, FAMILY.conditioning(), with_sound(FAMILY.clip()))
    frames, height, width = FAMILY.grid
    assert seen and all(call.grid == FAMILY.grid and call.query.shape[2] == frames * height * width for call in seen)
    assert all("audio" not in call.layer.path for call in seen)


SOUND = "it holds sound beside the clip.*LTXV Separate AV Latent"


def test_sound_is_refused_where_a_clip_is_edited(model):
    latent, positive = with_sound(FAMILY.clip()), FAMILY.conditioning()
    sigmas = torch.tensor([0.95, 0.6, 0.2, 0.0])
    with pytest.raises(ValueError, match=f"latent: {SOUND}"):
        invert(model, positive, latent, sigmas)
    with pytest.raises(ValueError, match=f"latent: {SOUND}"):
        optimise(model, positive, positive, positive, latent, Distillation(steps=1), seed=0)
    trajectory = invert(model, positive, 0.3 * FAMILY.clip(), sigmas, refinements=0)
    with pytest.raises(ValueError, match=f"latent_image: {SOUND}"):
        sampled(model, positive, latent, TrajectorySampler(trajectory))


def test_a_mask_that_is_also_of_the_sound_is_the_clips():
    """As LTX-2's own nodes make one: the host takes the first, and so do we."""
    clip, sound = torch.rand(1, 1, 3, 4, 4), torch.rand(1, 1, 6, 16)
    assert clip_mask(comfy.nested_tensor.NestedTensor((clip, sound))) is clip
    assert clip_mask(clip) is clip and clip_mask(None) is None


def test_our_own_passes_see_the_clip_and_not_its_first_row(model):
    """The host hands LTX-2 a list of latents, for which a conditioning must say their shapes."""
    positive, clip = FAMILY.conditioning(), 0.3 * FAMILY.clip()
    trajectory = invert(model, positive, clip, torch.tensor([0.95, 0.6, 0.2, 0.0]), refinements=0)
    seen = {}

    def source_pass(x, step):
        cond = step.run.source_conds
        own = call_model(step.run.base_model, cond, x, step.sigma, step.run.model_options, source=True)
        seen[step.index] = own, step.run.guider(x, step.sigma * x.new_ones(1), model_options={}, seed=0)
        return x

    guider = support.guider_of(model, positive)
    sampler, empty = TrajectorySampler(trajectory, before_step=[source_pass]), torch.zeros(trajectory.shape)
    guider.sample(empty, empty, sampler, trajectory.sigmas, disable_pbar=True, seed=0)
    assert len(seen) == 3 and all(torch.equal(*pair) for pair in seen.values())
