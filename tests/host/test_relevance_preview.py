"""One look at the source clip inside the host: which latent, which layers, what it leaves alone, what it refuses."""

import pytest
import torch
from spacetime_edit.core.cross_frame_relevance import cross_frame_relevance, region_weight
from spacetime_edit.host.inversion import invert
from spacetime_edit.host.model_pass import call_on_trajectory, nearest_step
from spacetime_edit.host.relevance_preview import heat_map, query_region, relevance_of
from spacetime_edit.tests.host import support

FRAMES, SIDE, CELL = 3, 8, 8
POINT = {"x": 21, "y": 10, "frame": 1}


def trajectory_of(model, positive, sigmas=(9.0, 4.0, 1.5, 0.4, 0.0)):
    latent = torch.randn(FRAMES, 4, SIDE, SIDE, generator=torch.Generator().manual_seed(3))
    return invert(model, positive, latent, torch.tensor(sigmas), refinements=0)


@pytest.fixture(scope="module")
def trajectory(tiny):
    with torch.inference_mode():
        return trajectory_of(tiny.model, support.encode(tiny))


@pytest.fixture(scope="module")
def images(trajectory):
    side = SIDE * trajectory.model.model.latent_format.spacial_downscale_ratio
    return torch.rand(FRAMES, side, side, 3, generator=torch.Generator().manual_seed(4))


@pytest.fixture
def region(images, trajectory):
    return query_region(images, trajectory, **POINT)


class Calls:
    """A listener that keeps what it hears."""

    def __init__(self):
        self.kept = []

    def __call__(self, call):
        self.kept.append(call)


def by_hand(calls, region, blocks):
    """Mean over the blocks' layers of the enlarged relevance, from the calls of a run."""
    maps = []
    for call in calls:
        if call.kind == "spatial" and call.layer.block in blocks:
            frames, height, width = call.grid
            weight = region_weight(region, height, width)
            found = cross_frame_relevance(call.query, call.key, weight, POINT["frame"], scale=call.scale)
            maps.append(
                torch.nn.functional.interpolate(found.view(frames, 1, height, width), region.shape, mode="bilinear")
            )
    return torch.stack(maps).mean(0)[:, 0]


@pytest.mark.parametrize(("layers", "blocks"), [("", {"d0", "u4", "u5"}), ("d1,m0", {"d1", "m0"})])
def test_it_is_the_mean_over_the_chosen_layers_and_by_default_the_finest(trajectory, region, layers, blocks):
    calls = Calls()
    call_on_trajectory(calls, trajectory, 0.7, frozenset({"spatial"}))
    found = relevance_of(region, POINT["frame"], trajectory, percent=0.7, layers=layers)
    assert found.shape == (FRAMES, *region.shape)
    torch.testing.assert_close(found, by_hand(calls.kept, region, blocks), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("percent", [0.0, 0.3, 0.7, 1.0])
def test_the_model_sees_the_source_at_the_nearest_noise_level_once(tiny, trajectory, region, percent):
    seen = []

    def keep(executor, x, t, *args, **kwargs):
        seen.append((x.clone(), t.clone(), kwargs))
        return executor(x, t, *args, **kwargs)

    model = trajectory.model.clone()
    model.add_wrapper_with_key("apply_model", "test", keep)
    own = type(trajectory)(trajectory.latents, trajectory.sigmas, trajectory.space, model, trajectory.conditioning)
    relevance_of(region, 1, own, percent=percent)
    step = nearest_step(trajectory, percent)
    ((x, t, _),) = seen
    assert torch.equal(x.cpu(), trajectory.latents[step])
    assert torch.allclose(t.cpu(), trajectory.sigmas[step].expand(FRAMES))


def test_the_nearest_step_by_hand(trajectory):
    sampling = trajectory.model.get_model_object("model_sampling")
    for percent in (0.0, 0.25, 0.5, 0.8, 1.0):
        step, sigma = nearest_step(trajectory, percent), sampling.percent_to_sigma(percent)
        assert 0 <= step < trajectory.steps
        above = [k for k in range(trajectory.steps) if trajectory.sigmas[k] >= sigma]
        assert step in {above[-1] if above else 0, min(len(above), trajectory.steps - 1)}
    with pytest.raises(ValueError, match="^percent: it is 1.5; expected"):
        nearest_step(trajectory, 1.5)


def test_a_look_leaves_the_model_as_it_was(trajectory, region):
    before = support.Untouched(trajectory.model)
    relevance_of(region, 0, trajectory, percent=0.5)
    assert before.changed() == []


def test_a_model_without_temporal_attention_will_do():
    trajectory = trajectory_of(support.sd15_model(), support.sd15_conditioning())
    region = torch.zeros(64, 64)
    region[:20, 30:] = 1
    found = relevance_of(region, 2, trajectory, percent=0.5)
    assert found.shape == (FRAMES, 64, 64) and torch.isfinite(found).all() and found.std() > 0


def test_a_mask_replaces_the_point(images, trajectory):
    masks = torch.zeros(FRAMES, 16, 16)
    masks[1, 4:8] = 2
    assert torch.equal(query_region(images, trajectory, **POINT, mask=masks), masks[1].clamp(0, 1))
    assert torch.equal(query_region(images, trajectory, **POINT, mask=masks[1]), masks[1].clamp(0, 1))
    outside = POINT | {"x": 9999}
    assert torch.equal(query_region(images, trajectory, **outside, mask=masks), masks[1].clamp(0, 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": 64}, r"^x, y: the point \(64, 10\) lies outside the clip of \d+ x \d+ pixels"),
        ({"frame": 3}, "^frame: it is 3; the clip has 3 frames, expected 0 to 2"),
        ({"mask": torch.zeros(FRAMES, 8, 8)}, "^mask: it is empty in frame 1; paint the object there, or set `frame`"),
        ({"mask": torch.ones(2, 8, 8)}, "^mask: it has 2 frames, the clip has 3; connect"),
        ({"images": (4, 64, 64)}, "^images: they are 4, the trajectory's clip has 3; connect the one"),
        (
            {"images": (3, 64, 96)},
            r"^images: they have 96 x 64 pixels, the trajectory's clip has \d+ x \d+, of another",
        ),
    ],
    ids=["point", "frame", "empty mask", "frames of the mask", "frames", "aspect ratio"],
)
def test_input_that_does_not_fit_the_clip(images, trajectory, change, message):
    if "images" in change:
        images = torch.zeros(*change["images"], 3)
    options = POINT | {name: value for name, value in change.items() if name != "images"}
    with pytest.raises(ValueError, match=message):
        query_region(images, trajectory, **options)


@pytest.mark.parametrize("size", [(64, 64), (128, 128), (71, 64), (64, 71)])
def test_images_of_the_clips_shape_in_any_size(trajectory, size):
    """VAE Encode crops to whole latent cells, so up to a cell may be missing."""
    region = query_region(torch.zeros(FRAMES, *size, 3), trajectory, **POINT)
    assert region.shape == size and region[10, 21] == 1 and region.sum() == 1


def test_unknown_layers_and_context_windows_are_refused_before_the_model_runs(trajectory, region):
    counter = support.CallCounter(trajectory.model)
    given = (trajectory.latents, trajectory.sigmas, trajectory.space)
    with pytest.raises(ValueError, match="^layers: 'u9' asks for u9; this model has d0"):
        relevance_of(
            region, 0, type(trajectory)(*given, counter.model, trajectory.conditioning), percent=1, layers="u9"
        )
    windowed = counter.model.clone()
    windowed.model_options["context_handler"] = object()
    with pytest.raises(ValueError, match="^trajectory: its model has context windows"):
        relevance_of(region, 0, type(trajectory)(*given, windowed, trajectory.conditioning), percent=1)
    assert counter.calls == 0


def test_the_heat_map_runs_from_the_grey_clip_to_the_colours(images):
    relevance = torch.zeros(images.shape[:3])
    relevance[1, 5, 6] = 7.0
    colours = heat_map(relevance, images, 1.0)
    assert colours.shape == images.shape and colours.min() >= 0 and colours.max() <= 1
    assert colours[0].max() < 0.02 and colours[1, 5, 6].min() > 0.6  # inferno: black, and pale yellow
    grey = heat_map(relevance, images, 0.0)
    assert torch.equal(grey[..., 0], grey[..., 2])
    torch.testing.assert_close(heat_map(0 * relevance, images, 0.5)[..., 1], grey[..., 1] / 2, atol=0.01, rtol=0)
