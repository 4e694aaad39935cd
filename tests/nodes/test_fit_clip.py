"""Fit Clip to Model: what fits, what it says, and that the model then takes the clip."""

from types import SimpleNamespace

import comfy.ops
import nodes
import pytest
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from spacetime_edit.host.clip_fitting import size_multiple
from spacetime_edit.host.loaders import lavie_model, show1_model
from spacetime_edit.host.loaders.unet3d_model import build
from spacetime_edit.nodes.fit_clip import FitClipToModel
from spacetime_edit.tests.host import support

TINY = "UNet3D (Zeroscope, ModelScope): sides in steps of 16 pixels."


@pytest.fixture
def fit(tiny):
    """fit(images, **inputs) -> the node's outputs, with its default widgets."""

    def run(images, **inputs):
        given = dict(model=tiny.model, max_frames=24, max_side=576, mode="crop")
        return FitClipToModel.execute(images, **{**given, **inputs}).result

    return run


def numbered(frames, height=32, width=48):
    """A clip whose frame i has the value i / 100."""
    return (torch.arange(frames) / 100)[:, None, None, None].expand(-1, height, width, 3)


@pytest.mark.parametrize("size", [(90, 50), (33, 70), (20, 9)], ids=str)
@pytest.mark.parametrize("mode", ["crop", "pad"])
def test_the_model_takes_the_fitted_clip(tiny, fit, size, mode):
    images, mask, frames, _ = fit(torch.rand(3, size[1], size[0], 3), max_side=70, max_frames=2, mode=mode)
    assert images.shape[0] == frames == 2 and images.shape[1:3] == mask.shape[1:3]
    latent = nodes.VAEEncode().encode(tiny.vae, images)[0]["samples"]
    assert latent.shape == (2, 4, images.shape[1] // 4, images.shape[2] // 4)
    assert all(side % 4 == 0 for side in latent.shape[-2:]), "the coarsest level is not whole"
    assert support.prediction(tiny.model, support.encode(tiny), latent).shape == latent.shape


def test_the_multiple_is_that_of_the_network(tiny):
    """The embedded one has 2 down-samplers and 4 pixels a latent cell, the small SD 1.5 one and 8."""
    assert size_multiple(tiny.model) == 4 * 4
    assert size_multiple(support.sd15_model()) == 8 * 2


def test_the_multiple_of_models_of_full_size_is_64():
    """Zeroscope's four blocks and SD 1.5's four levels, with few channels and no weights."""
    levels = {"num_res_blocks": [1] * 4, "channel_mult": [1] * 4, "transformer_depth": [0] * 4}
    levels |= {"transformer_depth_output": [0] * 8, "transformer_depth_middle": 0}
    with torch.device("meta"):
        sd15 = UNetModel(**{**support.SD15, **levels}, operations=comfy.ops.disable_weight_init)
    zeroscope = build({"block_out_channels": [32] * 4, "layers_per_block": 1, "attention_head_dim": 8})
    for base, network in (("UNet3DVideoModel", zeroscope), ("BaseModel", sd15)):
        model = type(base, (), {})()
        model.diffusion_model, model.latent_format = network, SimpleNamespace(spacial_downscale_ratio=8)
        assert size_multiple(SimpleNamespace(injections={}, model=model)) == 64


def test_the_multiples_of_lavie_and_of_show1():
    """Four levels each; Show-1 works on pixels."""
    levels = {"block_out_channels": [32] * 4, "layers_per_block": 1}
    down, up = ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"], ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3
    lavie = lavie_model.build(support.LAVIE | levels | {"down_block_types": down, "up_block_types": up})
    down, up = (["ResnetDownsampleBlock3D"] * 4, ["ResnetUpsampleBlock3D"] * 4)
    show1 = show1_model.build(support.SHOW1 | levels | {"down_block_types": down, "up_block_types": up})
    for network, cell, expected in ((lavie, 8, 64), (show1, 1, 8)):
        model = type("UNet3DVideoModel", (), {})()
        model.diffusion_model, model.latent_format = network, SimpleNamespace(spacial_downscale_ratio=cell)
        assert size_multiple(SimpleNamespace(injections={}, model=model)) == expected


def test_a_clip_that_fits_passes_unchanged(fit):
    images, mask = torch.rand(8, 64, 64, 3), torch.rand(8, 64, 64)
    for mode in ("crop", "pad"):
        fitted, masked, frames, note = fit(images, mask=mask, mode=mode)
        assert torch.equal(fitted, images) and torch.equal(masked, mask) and frames == 8
        assert note == f"8 frames of 64 x 64: it fits, nothing changed. {TINY}"


def test_frames_and_masks_are_picked_together(fit):
    images = numbered(20)
    masks = images[..., 0]
    fitted, masked, frames, note = fit(images, mask=masks, every_nth=3, max_frames=5)
    assert frames == 5 and torch.equal(fitted, images[[0, 3, 6, 9, 12]]) and torch.equal(masked, fitted[..., 0])
    assert "took frames 1, 4, ... 13 (save it at 1/3 of the frame rate)" in note
    assert torch.equal(fit(images, mask=masks[:1], every_nth=3)[1], masks[:1])
    assert torch.equal(fit(images, mask=masks[1], max_frames=4)[1], masks[1:2])


@pytest.mark.parametrize(
    ("clip", "inputs", "note"),
    [
        (
            (64, 216, 384),
            dict(max_side=96, mode="crop"),
            "64 frames of 384 x 216 -> 24 frames of 96 x 48: took frames 1 to 24, scaled by 0.25, "
            "cut 3 pixels at the top and 3 pixels at the bottom.",
        ),
        (
            (2, 64, 60),
            dict(mode="pad"),
            "2 frames of 60 x 64 -> 2 frames of 64 x 64: added 2 pixels at the left and 2 pixels at the right.",
        ),
        ((2, 64, 63), dict(mode="pad"), ": added 1 pixel at the right."),
        ((4, 32, 32), dict(every_nth=2), "took frames 1, 3 (save it at 1/2 of the frame rate)."),
    ],
    ids=["crop", "pad", "one pixel", "every second"],
)
def test_the_note_says_what_changed(fit, clip, inputs, note):
    assert note in fit(torch.zeros(*clip, 3), **inputs)[3]


def test_without_a_mask_all_but_the_border_is_edited(fit):
    images = torch.rand(2, 64, 60, 3)
    assert torch.equal(fit(images, mode="crop")[1], torch.ones(1, 64, 64))
    padded = fit(images, mode="pad")[1]
    assert padded[..., 2:62].eq(1).all() and padded[..., :2].eq(0).all() and padded[..., 62:].eq(0).all()


def test_alpha_is_dropped_and_said(fit):
    images = torch.rand(2, 32, 32, 4)
    fitted, _, _, note = fit(images)
    assert torch.equal(fitted, images[..., :3]) and "dropped the alpha channel" in note


@pytest.mark.parametrize(
    ("clip", "inputs", "message"),
    [
        ((1, 32, 32), {}, "^images: a clip of 1 frame; expected at least 2"),
        ((4, 32, 32), dict(every_nth=4), "^every_nth: it is 4, which leaves 1 of 4 frames; expected at most 3"),
        ((4, 32, 32), dict(mask=torch.ones(3, 32, 32)), "^mask: it has 3 frames, the clip has 4; connect one mask"),
        ((4, 32, 32), dict(mask=torch.ones(2, 32, 32), every_nth=2), "^mask: it has 2 frames, the clip has 4"),
        ((4, 32, 32), dict(mask=torch.full((1, 9, 9), float("nan"))), "^mask: it holds NaN"),
        ((4, 32, 32), dict(max_side=15), "^max_side: it is 15, but the sides must be multiples of 16"),
    ],
)
def test_wrong_input_is_named(fit, clip, inputs, message):
    with pytest.raises(ValueError, match=message):
        fit(torch.zeros(*clip, 3), **inputs)


def test_nan_and_unknown_models_are_named(fit):
    with pytest.raises(ValueError, match="^images: it holds NaN"):
        fit(torch.full((2, 32, 32, 3), float("nan")))
    model = SimpleNamespace(injections={}, model=SimpleNamespace(diffusion_model=torch.nn.Identity()))
    with pytest.raises(ValueError, match="^model: .* is not a supported model family"):
        fit(torch.zeros(2, 32, 32, 3), model=model)
