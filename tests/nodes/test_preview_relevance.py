"""Preview Relevance from end to end on an example clip, and what it shows."""

import nodes
import pytest
import torch
from spacetime_edit.host.loaders.example_clips import clip_names, load_clip
from spacetime_edit.nodes.invert_video import InvertVideo
from spacetime_edit.nodes.preview_relevance import PreviewRelevance
from spacetime_edit.nodes.sample_trajectory import SampleFromTrajectory
from spacetime_edit.tests.host import support

DEFAULTS = {
    entry.id: entry.default
    for entry in PreviewRelevance.define_schema().inputs
    if getattr(entry, "default", None) is not None
}


@pytest.fixture(scope="module")
def clip():
    return load_clip(clip_names()[5])  # a blue and a red circle


@pytest.fixture(scope="module")
def trajectory(tiny, clip):
    with torch.inference_mode():
        latent = nodes.VAEEncode().encode(tiny.vae, clip.images)[0]
        positive = support.encode(tiny, clip.source_prompt)
        options = dict(scheduler="ddim_uniform", refinements=0, check_reconstruction=False)
        return InvertVideo.execute(tiny.model, positive, latent, 4, **options).result[0]


def centre(mask):
    y, x = torch.nonzero(mask > 0.5, as_tuple=True)
    return int(x.float().mean()), int(y.float().mean())


def iou(a, b):
    a, b = a > 0.5, b > 0.5
    return float((a & b).sum() / (a | b).sum())


def preview(clip, trajectory, **inputs):
    given = {**DEFAULTS, "trajectory": trajectory, "images": clip.images}
    return PreviewRelevance.execute(**{**given, **inputs})


@pytest.mark.parametrize("which", [1, 2])
def test_a_clicked_object_is_masked_in_every_frame_and_the_other_is_not(clip, trajectory, which):
    wanted, other = clip[which], clip[3 - which]
    x, y = centre(wanted[3])
    heat, mask = preview(clip, trajectory, x=x, y=y, frame=3).result
    assert heat.shape == clip.images.shape and mask.shape == wanted.shape
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    for f in range(len(mask)):
        assert iou(mask[f], wanted[f]) > 0.6
        assert (mask[f] * other[f]).sum() == 0


def test_a_mask_asks_about_a_region_and_replaces_the_point(clip, trajectory):
    by_mask = preview(clip, trajectory, x=60, y=60, frame=2, mask=clip.mask_1).result[1]
    assert iou(by_mask, clip.mask_1) > 0.6


def test_a_higher_threshold_makes_a_smaller_mask(clip, trajectory):
    x, y = centre(clip.mask_1[0])
    areas = [preview(clip, trajectory, x=x, y=y, threshold=t).result[1].sum() for t in (0.1, 0.25, 0.5, 1.0)]
    assert areas == sorted(areas, reverse=True) and areas[-1] >= 1


def test_the_heat_map_is_shown_on_the_node(clip, trajectory):
    shown = preview(clip, trajectory, x=5, y=5).ui.as_dict()
    assert len(shown["images"]) == len(clip.images)
    assert PreviewRelevance.define_schema().is_output_node


def test_the_mask_fits_the_mask_input_of_the_editing_nodes(clip, trajectory):
    mask = preview(clip, trajectory, x=5, y=5).result[1]
    sampler = SampleFromTrajectory.execute(trajectory, dilation=4.0, blend="trajectory", mask=mask).result[0]
    assert sampler.grid.shape == (len(mask), *trajectory.shape[-2:])


def test_wrong_layers_are_refused_before_the_run():
    assert PreviewRelevance.validate_inputs(layers="d0,u2-u3") is True
    assert PreviewRelevance.validate_inputs(layers="finest").startswith("layers: 'finest'")


@pytest.mark.parametrize(
    ("inputs", "message"), [({"x": 64}, "^x, y: "), ({"frame": 8}, "^frame: "), ({"percent": 2.0}, "^percent: ")]
)
def test_wrong_input_is_refused_before_the_model_runs(clip, trajectory, inputs, message):
    counter = support.CallCounter(trajectory.model)
    own = type(trajectory)(
        trajectory.latents, trajectory.sigmas, trajectory.space, counter.model, trajectory.conditioning
    )
    with pytest.raises(ValueError, match=message):
        preview(clip, own, **inputs)
    assert counter.calls == 0
