"""Video DDS Optimize and Mask from Boxes as a graph uses them."""

import pytest
import torch
from spacetime_edit.host.loaders.example_clips import clip_names, load_clip
from spacetime_edit.nodes.mask_from_boxes import MaskFromBoxes
from spacetime_edit.nodes.video_dds import VideoDDSOptimize, loss_chart
from spacetime_edit.tests.host import support
from spacetime_edit.tools.shape_world import instruments

SETTINGS = dict(dilation=4.0, steps=24, step_size=1.6, cfg=4.0, s_ssm=0.3, t_ssm=0.1, seed=0)


@pytest.fixture(scope="module")
def clip():
    return load_clip(clip_names()[0], 1)  # a red circle becomes a blue one


def optimised(tiny, clip, mask=None, **options):
    latent = {"samples": tiny.vae.encode(clip.images), "noise_mask": None}
    prompts = [support.encode(tiny, text) for text in (clip.source_prompt, clip.edit_prompt, "")]
    return latent, VideoDDSOptimize.execute(tiny.model, latent, *prompts, mask=mask, **SETTINGS | options).result


def test_a_circle_changes_its_colour_and_stays_where_it_is(tiny, clip):
    _, (latent, chart) = optimised(tiny, clip, clip.mask_1)
    frames = tiny.vae.decode(latent["samples"]).movedim(-1, 1).clamp(0, 1)
    (seen,) = instruments.identify(frames, 1)
    assert seen.colour == "blue"
    source = clip.images.movedim(-1, 1)
    assert instruments.kept_region_psnr_db(frames, source, clip.mask_1[None]) > 25
    assert set(latent) == {"samples", "noise_mask"}
    assert chart.shape == (1, 432, 768, 3)


def test_the_latent_that_comes_in_is_left_alone(tiny, clip):
    latent, (edited, _) = optimised(tiny, clip, steps=1)
    assert torch.equal(latent["samples"], tiny.vae.encode(clip.images))
    assert not torch.equal(latent["samples"], edited["samples"])


def test_a_mask_on_the_latent_is_the_mask(tiny, clip):
    """Not both: which is meant is not known."""
    prompts = [support.encode(tiny, text) for text in (clip.source_prompt, clip.edit_prompt, "")]
    latent = {"samples": tiny.vae.encode(clip.images), "noise_mask": clip.mask_1[:, None]}
    few = SETTINGS | {"steps": 1}
    carried = VideoDDSOptimize.execute(tiny.model, latent, *prompts, **few).result[0]
    connected = VideoDDSOptimize.execute(
        tiny.model, {"samples": latent["samples"]}, *prompts, mask=clip.mask_1, **few
    ).result[0]
    assert torch.equal(carried["samples"], connected["samples"])
    with pytest.raises(ValueError, match="mask: the latent already carries a noise mask"):
        VideoDDSOptimize.execute(tiny.model, latent, *prompts, mask=clip.mask_1, **few)


def test_a_mask_of_other_frames_is_refused(tiny, clip):
    with pytest.raises(ValueError, match="mask: it has 3 frames, the clip has 8"):
        optimised(tiny, clip, clip.mask_1[:3])


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"layers": "u0;u1"}, "layers: 'u0;u1' is not a block"),
        ({"t_min": 0.6, "t_max": 0.5}, "t_min, t_max: they are 0.6 and 0.5"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_the_run(values, words):
    assert words in VideoDDSOptimize.validate_inputs(**values)
    assert VideoDDSOptimize.validate_inputs("u0-u2", 0.05, None) is True


def test_curves_of_one_step_and_of_zeros_are_drawn():
    assert loss_chart([(0.5, {"score": 0.0, "S-SSM": 1.0})]).isfinite().all()
    assert loss_chart([]).shape == (1, 432, 768, 3)


# --- boxes --------------------------------------------------------------


def test_boxes_make_a_mask_a_frame(clip):
    (mask,) = MaskFromBoxes.execute(clip.images, "0: 0, 0, 10, 8\n7: 14, 0, 10, 8").result
    assert mask.shape == clip.images.shape[:3]
    assert [int(m.nonzero()[:, 1].min()) for m in mask] == [0, 2, 4, 6, 8, 10, 12, 14]
    assert mask.sum((1, 2)).eq(80).all()


def test_boxes_of_a_detector(clip):
    box = {"x": 4, "y": 5, "width": 6, "height": 7}
    for found in (box, [box], [[box]], [[box]] * 8):
        (mask,) = MaskFromBoxes.execute(clip.images, "", bounding_boxes=found).result
        assert mask.sum((1, 2)).eq(42).all() and mask[3, 5:12, 4:10].eq(1).all()
    with pytest.raises(ValueError, match="bounding_boxes: they are of 3 frames, the clip has 8"):
        MaskFromBoxes.execute(clip.images, "", bounding_boxes=[[box]] * 3)


def test_boxes_that_cannot_be_are_refused(clip):
    assert "expected frame: x, y, width, height" in MaskFromBoxes.validate_inputs("1, 2")
    with pytest.raises(ValueError, match="boxes: one is of frame 8; the clip has 8 frames, expected 0 to 7"):
        MaskFromBoxes.execute(clip.images, "8: 0, 0, 1, 1")
    with pytest.raises(ValueError, match="boxes: there are none"):
        MaskFromBoxes.execute(clip.images, "")
