"""The instruments that judge every edit: right on the truth, wrong by the right amount on corruptions."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from spacetime_edit.core.masks import dilate
from spacetime_edit.tools.shape_world import census, instruments, media, world
from spacetime_edit.tools.shape_world.clips import read_clips
from spacetime_edit.tools.shape_world.statistics import paired_bootstrap

CLIPS = read_clips(Path(world.__file__).parents[2] / "assets" / "tiny_clips")


def straight(colour, shape, start, end, radius=11.0):
    path = np.linspace(start, end, world.FRAMES)
    return world.Object(colour, shape, radius, tuple((float(x), float(y)) for x, y in path))


ONE = world.Scene("gray", (straight("red", "circle", (20, 24), (40, 36)),))
TWO = world.Scene(
    "navy",
    (straight("green", "triangle", (15, 40), (18, 22)), straight("yellow", "circle", (48, 24), (46, 44))),
)


def accuracies(frames, target):
    return (
        instruments.background_accuracy(frames, target),
        instruments.colour_accuracy(frames, target),
        instruments.shape_accuracy(frames, target),
    )


def shifted(scene, dx, dy):
    """All objects moved by (dx, dy) px."""
    return replace(
        scene,
        objects=tuple(replace(o, centres=tuple((x + dx, y + dy) for x, y in o.centres)) for o in scene.objects),
    )


@pytest.mark.parametrize("objects", [1, 2])
@pytest.mark.parametrize("held_out", [False, True])
def test_ground_truth_scores_perfectly(objects, held_out):
    generator = np.random.default_rng(objects)
    for _ in range(12):
        scene = world.sample_scene(generator, objects, held_out=held_out)
        frames, masks = world.render(scene)
        assert accuracies(frames, scene.description) == (1, 1, 1), world.caption(scene)
        assert instruments.trajectory_error_px(frames, masks) < 0.5
        assert instruments.count_accuracy(frames, objects) == 1


@pytest.mark.parametrize("clip", CLIPS, ids=lambda clip: clip.name)
def test_delivered_clip_is_its_description(clip):
    assert world.parse_caption(clip.caption) == clip.scene.description
    assert len(clip.edits) == 3 and all(world.caption(world.parse_caption(e)) == e for e in clip.edits)
    assert census.attributes(clip.frames, clip.scene.description)["all"] == 1


@pytest.mark.parametrize("clip", CLIPS[:8], ids=lambda clip: clip.name)
def test_delivered_clip_of_one_or_of_left_and_right(clip):
    assert accuracies(clip.frames, clip.scene.description) == (1, 1, 1)
    assert instruments.trajectory_error_px(clip.frames, clip.masks) < 0.5
    assert instruments.count_accuracy(clip.frames, len(clip.scene.objects)) == 1


@pytest.mark.parametrize("clip", CLIPS, ids=lambda clip: clip.name)
def test_renderer_draws_the_delivered_clip(clip):
    frames, masks = world.render(clip.scene)
    masks = world.visible_masks(masks)
    assert overlap(masks, clip.masks) > 0.995
    for index, stripe in clip.stripe_masks.items():
        assert overlap(world.stripe_mask(clip.scene.objects[index]), stripe) > 0.995
    inside = (clip.masks.amax(0) > 0.99)[:, None].expand_as(frames)
    assert (frames - clip.frames)[inside].abs().max() < world.JITTER + 0.015  # 8 bits, and the edge's tail


def overlap(mask, other):
    return torch.minimum(mask, other).sum() / torch.maximum(mask, other).sum()


def test_captions_of_other_worlds_are_refused():
    for text in ("a red circle", "a red fox on a gray background", "a red circle on a mauve background", ""):
        with pytest.raises(ValueError, match="not a shape-world caption"):
            world.parse_caption(text)


def test_sampling_is_a_function_of_the_seed():
    first, again, other = (world.sample_scene(np.random.default_rng(seed)) for seed in (5, 5, 6))
    assert first == again and first != other


def test_sampled_scenes_follow_the_training_distribution():
    generator = np.random.default_rng(0)
    scenes = [world.sample_scene(generator) for _ in range(400)]
    objects = [o for scene in scenes for o in scene.objects]
    still = [o for o in objects if o.centres[0] == o.centres[-1]]
    assert np.mean([len(s.objects) == 2 for s in scenes]) == pytest.approx(0.45, abs=0.08)
    assert np.mean([s.gradient > 0 for s in scenes]) == pytest.approx(0.4, abs=0.08)
    assert len(still) / len(objects) == pytest.approx(0.1, abs=0.05)
    assert max(np.hypot(*np.subtract(o.centres[-1], o.centres[0])) for o in objects) <= 24 + 1e-9
    assert not world.HELD_OUT & {world.Pair(o.colour, o.shape) for o in objects}
    for scene in scenes:
        if len(scene.objects) == 2:
            left, right = scene.objects
            assert left.colour != right.colour
            assert max(x for x, _ in left.centres) + left.radius <= 32 <= min(x for x, _ in right.centres)


@pytest.mark.parametrize("objects", [1, 2])
@pytest.mark.parametrize("kind", world.EDIT_KINDS)
def test_edit_changes_one_attribute(objects, kind):
    generator = np.random.default_rng(7)
    for index in range(objects):
        for _ in range(20):
            scene = world.sample_scene(generator, objects)
            edited = world.sample_edit(scene, kind, generator, index)
            before, after = scene.objects[index], edited.objects[index]
            changed = {
                "colour": before.colour != after.colour,
                "shape": before.shape != after.shape,
                "background": scene.background != edited.background,
                "stripe": before.stripe != after.stripe,
            }
            assert [name for name, is_changed in changed.items() if is_changed] == [kind]
            assert before.centres == after.centres
            assert all(a == b for i, (a, b) in enumerate(zip(scene.objects, edited.objects, strict=True)) if i != index)
            assert world.Pair(after.colour, after.shape) not in world.HELD_OUT
            assert len({o.colour for o in edited.objects}) == objects


@pytest.mark.parametrize("distance", [2, 5, 9])
@pytest.mark.parametrize("scene", [ONE, TWO], ids=["one", "two"])
def test_shifted_clip_has_that_trajectory_error(scene, distance):
    _, masks = world.render(scene)
    frames, _ = world.render(shifted(scene, 0, distance))
    assert instruments.trajectory_error_px(frames, masks) == pytest.approx(distance, abs=0.3)


def test_shape_swap_has_the_stated_offset():
    _, masks = world.render(ONE)
    for shape, offset in (("square", 0.0), ("triangle", 0.14 * 11)):
        edited = replace(ONE, objects=(replace(ONE.objects[0], shape=shape),))
        frames, _ = world.render(edited)
        assert instruments.trajectory_error_px(frames, masks) == pytest.approx(offset, abs=0.3)


@pytest.mark.parametrize("colour", world.COLOURS)
@pytest.mark.parametrize("shape", world.SHAPES)
def test_each_object_is_told_from_the_others(colour, shape):
    frames, _ = world.render(replace(ONE, objects=(replace(ONE.objects[0], colour=colour, shape=shape),)))
    target = ONE.description
    assert accuracies(frames, target) == (1, float(colour == "red"), float(shape == "circle"))


def test_wrong_background_is_seen():
    frames, _ = world.render(replace(ONE, background="brown"))
    assert accuracies(frames, ONE.description) == (0, 1, 1)


def test_swapped_halves_are_wrong():
    frames, _ = world.render(TWO)
    swapped = world.Description(TWO.background, TWO.description.objects[::-1])
    assert accuracies(frames, swapped) == (1, 0, 0)
    assert instruments.colour_accuracy(frames, world.Description("navy", (TWO.description.objects[0],) * 2)) == 0.5


def test_missing_object_is_half_the_image_away():
    frames, masks = world.render(ONE)
    empty = world.background_image(ONE)
    nothing = empty.expand_as(frames)
    assert instruments.trajectory_error_px(nothing, masks) == instruments.MISSING_PX == 32
    assert accuracies(nothing, ONE.description) == (1, 0, 0)
    assert instruments.count(nothing).tolist() == [0] * 8
    part = frames.clone()
    part[6:] = empty
    whole = instruments.trajectory_error_px(frames[:6], masks[:, :6])
    assert instruments.trajectory_error_px(part, masks) == pytest.approx((6 * whole + 2 * 32) / 8, abs=1e-4)


def test_noise_holds_no_object():
    _, masks = world.render(ONE)
    frames = torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert instruments.trajectory_error_px(frames, masks) > 4
    assert instruments.count_accuracy(frames, 1) == 0


def test_second_copy_is_counted_and_pulls_the_centroid():
    first = straight("red", "square", (16, 20), (16, 20))
    second = straight("red", "square", (46, 20), (46, 20))
    _, masks = world.render(world.Scene("white", (first,)))
    frames, _ = world.render(world.Scene("white", (first, second)))
    assert instruments.count(frames).tolist() == [2] * 8
    assert instruments.count_accuracy(frames, 1) == 0
    assert instruments.trajectory_error_px(frames, masks) == pytest.approx(15, abs=0.3)


def test_kept_region_ignores_the_object_and_measures_the_rest():
    frames, masks = world.render(ONE)
    recoloured, _ = world.render(replace(ONE, objects=(replace(ONE.objects[0], colour="blue"),)))
    assert instruments.kept_region_psnr_db(recoloured, frames, masks) > 80
    assert instruments.kept_region_psnr_db(frames, frames, masks) == 100
    darker = (frames - 0.1).clamp(0, 1)
    assert instruments.kept_region_psnr_db(darker, frames, masks) == pytest.approx(20, abs=0.01)
    moved, _ = world.render(shifted(ONE, 12, 0))
    assert instruments.kept_region_psnr_db(moved, frames, masks) < 30


def crossings(n=16, seed=3):
    generator = np.random.default_rng(seed)
    return [world.sample_crossing(generator) for _ in range(n)]


def own_colours(scene):
    return [{o.colour} for o in scene.objects]


def test_crossing_objects_change_sides_and_meet():
    for scene in crossings(40):
        left, right = scene.objects
        (a0, a1), (b0, b1) = ((o.centres[0], o.centres[-1]) for o in scene.objects)
        assert a0[0] + left.radius + 6 <= b0[0] - right.radius and b1[0] + right.radius + 6 <= a1[0] - left.radius
        assert scene.travel_px >= 24 and left.colour != right.colour
        for obj in scene.objects:
            assert all(obj.radius <= v <= world.SIZE - obj.radius for point in obj.centres for v in point)
        masks = world.render(scene)[1]
        assert (masks[0] * masks[1]).sum((1, 2)).max() > 40


def test_crossing_ground_truth_scores_perfectly_by_colour_and_not_by_halves():
    for scene in crossings():
        frames, masks = world.render(scene)
        colours, target = own_colours(scene), scene.description
        assert instruments.colour_accuracy(frames, target, colours) == 1, world.caption(scene)
        assert instruments.shape_accuracy(frames, target, colours) == 1, world.caption(scene)
        assert instruments.trajectory_error_px(frames, masks, colours) < 0.6
        assert instruments.trajectory_error_px(frames, masks) > 5


def test_objects_that_change_sides_are_known_by_their_places():
    generator = np.random.default_rng(4)
    for _ in range(4):
        scene = world.sample_crossing(generator)
        other = world.sample_edit(world.sample_edit(scene, "shape", generator, 0), "colour", generator, 1)
        places = world.visible_masks(world.render(scene)[1])
        places = (dilate(places.flatten(0, 1), 6).view_as(places) > 0.5) & (places.flip(0) < 0.5)
        for shown in (scene, other):
            seen = instruments.identify_in(world.render(shown)[0], places)
            assert [s[:2] for s in seen] == [o[:2] for o in shown.description.objects]


def test_colours_find_objects_that_stay_in_their_half_as_halves_do():
    generator = np.random.default_rng(6)
    for _ in range(6):
        scene = world.sample_scene(generator, 2)
        frames, masks = world.render(scene)
        by_half, by_colour = (instruments.identify(frames, 2, c) for c in (None, own_colours(scene)))
        assert by_half == by_colour == list(scene.description.objects)
        errors = [instruments.trajectory_error_px(frames, masks, c) for c in (None, own_colours(scene))]
        assert errors[0] == pytest.approx(errors[1], abs=0.1)


@pytest.mark.parametrize("distance", [3, 6])
def test_shifted_crossing_clip_has_that_trajectory_error(distance):
    for scene in crossings(4, seed=8):
        _, masks = world.render(scene)
        frames, _ = world.render(shifted(scene, 0, distance))
        error = instruments.trajectory_error_px(frames, masks, own_colours(scene))
        assert error == pytest.approx(distance, abs=0.6)


def test_object_that_lost_its_colour_is_missing_unless_either_name_is_its():
    scene = crossings(1)[0]
    frames, masks = world.render(scene)
    other = next(c for c in world.COLOURS if c not in {o.colour for o in scene.objects})
    renamed = [{other}, {scene.objects[1].colour}]
    error = instruments.trajectory_error_px(frames, masks, renamed)
    assert error == pytest.approx(instruments.MISSING_PX / 2, abs=0.6)
    either = [{other, scene.objects[0].colour}, {scene.objects[1].colour}]
    assert instruments.trajectory_error_px(frames, masks, either) < 0.6
    edited = world.Description(
        scene.background, (world.Pair(other, scene.objects[0].shape), scene.description.objects[1])
    )
    assert instruments.colour_accuracy(frames, edited, either) == 0.5


def test_visible_masks_leave_out_what_is_in_front():
    masks = torch.rand(3, 2, 4, 4)
    expected = [masks[0] * (1 - masks[1]) * (1 - masks[2]), masks[1] * (1 - masks[2]), masks[2]]
    assert torch.allclose(world.visible_masks(masks), torch.stack(expected))


def test_frames_that_hide_the_rear_object_do_not_count():
    rear = straight("red", "circle", (14, 32), (50, 32), radius=9)
    front = straight("blue", "square", (44, 32), (16, 32), radius=15)
    scene = world.Scene("gray", (rear, front))
    frames, masks = world.render(scene)
    hidden = world.visible_masks(masks)[0].sum((1, 2)) < instruments.MIN_VISIBLE
    assert 1 <= hidden.sum() <= 3
    assert instruments.trajectory_error_px(frames, masks, own_colours(scene)) < 1
    gone = frames.clone()
    gone[hidden] = world.render(world.Scene("gray", (front,)))[0][hidden]
    assert instruments.trajectory_error_px(gone, masks, own_colours(scene)) < 1


def test_bootstrap_matches_the_normal_interval():
    noise = np.random.default_rng(1).normal(size=200)
    a, b = 3 + noise, np.full(200, 1.5)
    half = 1.96 * a.std() / 200**0.5
    for statistic, centre, scale in (
        ("difference_of_means", a.mean() - 1.5, 1),
        ("ratio_of_means", a.mean() / 1.5, 1.5),
    ):
        estimate, low, high = paired_bootstrap(a, b, statistic, seed=3)
        assert estimate == pytest.approx(centre)
        assert (high - low) / 2 == pytest.approx(half / scale, rel=0.05)
        assert low < estimate < high


def test_bootstrap_draws_pairs():
    b = np.random.default_rng(2).uniform(1, 9, 30)
    assert paired_bootstrap(b / 2, b) == pytest.approx((0.5, 0.5, 0.5))
    assert paired_bootstrap(b + 4, b, "difference_of_means") == pytest.approx((4, 4, 4))


def test_bootstrap_covers_the_truth():
    generator = np.random.default_rng(4)
    covered = 0
    for _ in range(200):
        a, b = generator.normal(1.0, 1.0, (2, 40))
        _, low, high = paired_bootstrap(a, b, "difference_of_means", n=400, seed=int(generator.integers(1 << 30)))
        covered += low <= 0 <= high
    assert 0.89 <= covered / 200 <= 0.99


def test_bootstrap_refuses_broken_measurements():
    with pytest.raises(ValueError, match="not finite"):
        paired_bootstrap([1.0, float("nan")], [1.0, 1.0])
    with pytest.raises(ValueError, match="equal, non-zero length"):
        paired_bootstrap([1.0], [1.0, 2.0])


def test_media_can_be_read_back(tmp_path):
    frames, _ = world.render(TWO)
    pair = media.side_by_side(frames, media.difference(frames, frames))
    media.save_webp(tmp_path / "pair.webp", pair)
    film = Image.open(tmp_path / "pair.webp")
    assert film.n_frames == 8 and film.size == (512, 256)
    film.seek(7)
    assert np.array_equal(np.array(film.convert("RGB")), media.pixels(pair, media.FILM_SCALE)[7])
    media.save_mp4(tmp_path / "pair.mp4", pair)
    with media.av.open(str(tmp_path / "pair.mp4")) as container:
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(decoded) == 32
    assert np.abs(decoded[7].astype(int) - media.pixels(pair, media.FILM_SCALE)[7]).mean() < 4


def test_contact_sheet_places_every_clip():
    frames, _ = world.render(ONE)
    sheet = media.contact_sheet([[frames, 1 - frames], [frames, frames]], ["source", "edit"])
    strip = media.film_strip(frames)
    assert sheet.width == 2 * strip.width + 3 * media.GAP
    assert sheet.height == media.HEADER + 2 * strip.height + 3 * media.GAP
    top = media.HEADER
    corner = sheet.crop((media.GAP, top, media.GAP + strip.width, top + strip.height))
    assert np.array_equal(np.array(corner), np.array(strip))
