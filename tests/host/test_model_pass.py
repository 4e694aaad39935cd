"""Passes of our own through the real models: how they end, what they leave behind, what they say on nodes."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from comfy.patcher_extension import WrappersMP
from spacetime_edit.core.regions import Region
from spacetime_edit.host import attention_tap
from spacetime_edit.host.attention_tap import AttentionTap, EnoughSeen
from spacetime_edit.host.inversion import invert
from spacetime_edit.host.loaders.unet3d import EMBEDDED, load_folder
from spacetime_edit.host.model_pass import call_model
from spacetime_edit.host.node_text import NodeText
from spacetime_edit.host.region_prompt import encode_regional_prompt, positions_in
from spacetime_edit.host.regional_prompts import placed_on
from spacetime_edit.host.sampling import TrajectorySampler, share_of
from spacetime_edit.tests.host import support
from spacetime_edit.tests.host.tiny_families import BY_NAME, families, families_named


@pytest.fixture(scope="module")
def family(request):
    return BY_NAME[request.param]


@pytest.fixture
def model(family):
    return family.model()


def asked(model, family, listener):
    """One pass with a listener."""

    def at(guider, x, sigma, extra):
        cond, tap = guider.conds["positive"][0], AttentionTap(model, [listener])
        return call_model(guider.inner_model, [cond], x, sigma, extra["model_options"], tap=tap)

    sigma = float(model.get_model_object("model_sampling").percent_to_sigma(0.5))
    return support.at_one_sigma(support.guider_of(model, family.conditioning()), family.clip(), at, sigma)


def stop(call):
    raise EnoughSeen


@families_named("Wan")
def test_an_early_end_is_no_error_that_others_catch(model, family):
    """A wrapper of another pack that goes on after every `Exception`."""
    careless, caught = model.clone(), []

    def wrapper(executor, x, *args, **kwargs):
        try:
            return executor(x, *args, **kwargs)
        except Exception as error:  # noqa: BLE001 (it is what is tested)
            caught.append(error)
            return torch.zeros_like(x)

    careless.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "careless", wrapper)
    assert asked(careless, family, stop) is None and caught == []


@families_named("Wan")
def test_a_tap_that_cannot_start_leaves_nothing_behind(model, family, monkeypatch):
    """A layer that is gone when the hooks are set."""
    before = support.Untouched(model)
    with monkeypatch.context() as patch:
        network = type(model.model.diffusion_model)
        found = network.get_submodule

        def get_submodule(self, path):
            if path == "blocks.1.cross_attn":
                raise AttributeError(path)
            return found(self, path)

        patch.setattr(network, "get_submodule", get_submodule)
        with pytest.raises(AttributeError, match="blocks.1.cross_attn"):
            asked(model, family, lambda call: None)
    assert before.changed() == [] and attention_tap.running_taps() == ()
    seen = []
    asked(model, family, lambda call: seen.append(call.layer.path))
    assert len(seen) == family.calls


def test_a_regional_prompt_lets_the_text_encoder_go():
    """Its layout finds words later, but by the tokenizer alone."""
    _, clip, _ = load_folder(EMBEDDED)
    region = Region("red circle", torch.ones(1, 8, 8))
    conditioning = encode_regional_prompt(clip, "a red circle on a gray background", [region])
    encoder = weakref.ref(clip.cond_stage_model)
    clip.patcher.detach()
    del clip
    gc.collect()
    assert encoder() is None
    assert positions_in(placed_on(conditioning, 0.5)[1].layout, "gray background")


# --- masks --------------------------------------------------------------


@pytest.fixture
def trajectory(model, family):
    sigmas = torch.tensor([float(model.get_model_object("model_sampling").percent_to_sigma(p)) for p in (0.1, 0.5)])
    return invert(model, family.conditioning(), 0.5 * family.clip(), torch.cat([sigmas, torch.zeros(1)]))


def edited(trajectory, family, noise_mask=None, **options):
    guider = support.guider_of(trajectory.model, family.conditioning(1))
    empty = torch.zeros(trajectory.shape)
    sampler = TrajectorySampler(trajectory, **options)
    return guider.sample(empty, empty, sampler, trajectory.sigmas, noise_mask, disable_pbar=True, seed=0)


@families(lambda family: family.name in ("Wan", "LTX-Video"))
def test_masks_of_frames_on_a_compressed_latent_are_refused(trajectory, family):
    """The host interpolates them over time, so what they were is not known; one for the whole clip is as it was."""
    height, width = family.shape[-2:]
    masks = torch.zeros(4 * (family.shape[2] - 1) + 1, 1, 8 * height, 8 * width)
    for mask in (masks, masks.index_fill(0, torch.tensor([2]), 1.0), masks.index_fill(0, torch.arange(4, 9), 1.0)):
        with pytest.raises(ValueError, match="mask: the latent carries a mask for each frame, or an empty one"):
            edited(trajectory, family, mask)
    one = torch.zeros(1, 1, 8 * height, 8 * width)
    one[..., : 4 * width] = 1
    assert torch.equal(edited(trajectory, family, one), edited(trajectory, family, mask=one[:, 0]))


@pytest.mark.parametrize(
    ("mask", "text"),
    [
        (torch.zeros(2, 4, 4), "The mask is empty: nothing is edited, and the source clip comes back"),
        (torch.ones(2, 4, 4), "The mask covers the whole clip, so it has no effect"),
        (torch.eye(4)[None], "The mask edits 25 % of the clip"),
        (1 - torch.eye(4)[None], "The mask edits 75 % of the clip, dilation included. Is it the wrong way round?"),
        (torch.nn.functional.one_hot(torch.tensor([[3]]), 1000).float(), "The mask edits 1 % of the clip"),
    ],
)
def test_what_a_mask_means_is_said(mask, text):
    assert share_of(mask).startswith(text)


@families_named("UNet3D")
def test_a_mask_on_the_latent_is_said_when_it_is_used(trajectory, family):
    shown = []

    class Text(NodeText):
        def show(self, text):
            shown.append(text)

    edited(trajectory, family, torch.zeros(3, 1, 8, 8), say=Text())
    assert shown == [share_of(torch.zeros(1, 1, 1))]
