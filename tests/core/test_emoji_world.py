"""The emoji world: what is drawn is what the scene says, and captions say it."""

import math
from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import pytest
import torch
from PIL import Image
from spacetime_edit.tools.emoji_world import backdrops, instruments, sprites, variety, world
from spacetime_edit.tools.shape_world.world import visible_masks


def scenes(count, seed=0, **options):
    generator = np.random.default_rng(seed)
    return [variety.sample(generator, **options) for _ in range(count)]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(world.render(a), world.render(b), strict=True))


# --- scenes -------------------------------------------------------------


@pytest.mark.parametrize("kind", variety.KINDS)
def test_the_same_seed_gives_the_same_clip_and_another_another(kind):
    first, again, other = (scenes(1, seed, kind=kind)[0] for seed in (1, 1, 2))
    assert first == again and same(first, again)
    assert not torch.equal(world.render(first)[0], world.render(other)[0])


@pytest.mark.parametrize("kind", variety.KINDS)
def test_what_a_kind_shows(kind):
    for scene in scenes(12, kind=kind):
        things = [o.thing for o in scene.objects]
        assert len(things) == (1 if kind == "one" else 2)
        if kind == "same":
            assert len(set(things)) == 1
        if kind in ("pair", "crossing"):
            assert len(set(things)) == 2
        frames, masks = world.render(scene)
        assert frames.shape == (world.FRAMES, 3, 64, 64) and masks.shape == (len(things), world.FRAMES, 64, 64)
        assert float(frames.min()) >= 0 and float(frames.max()) <= 1 and float(masks.max()) <= 1
        assert all(len(o.poses) == world.FRAMES for o in scene.objects)


@pytest.mark.parametrize("kind,axis", [("sides", 0), ("heights", 1)])
def test_things_stand_where_the_caption_says(kind, axis):
    for scene in scenes(30, kind=kind):
        first, second = (np.array(o.centres)[:, axis] for o in scene.objects)
        assert (first < 32).all() and (second > 32).all()


@pytest.mark.parametrize("kind", ["pair", "same"])
def test_things_anywhere_do_not_touch(kind):
    for scene in scenes(16, kind=kind):
        _, masks = world.render(scene)
        assert float((masks[0] * masks[1]).sum((1, 2)).max()) < 3  # px


def test_crossing_things_change_sides_and_the_later_hides_the_earlier():
    hidden = []
    for scene in scenes(30, kind="crossing"):
        first, second = (np.array(o.centres)[:, 0] for o in scene.objects)
        assert first[0] < second[0] and first[-1] > second[-1]
        _, masks = world.render(scene)
        seen = visible_masks(masks)
        assert torch.equal(seen[1], masks[1])
        hidden.append(float((masks[0] - seen[0]).sum((1, 2)).max() / masks[0].sum((1, 2)).max()))
    assert min(hidden) > 0.1


@pytest.mark.parametrize("path", [*variety.PATHS, "roll"])
@pytest.mark.parametrize("manner", ["plain", "flip"])
def test_a_thing_stays_in_the_picture_unless_it_leaves(path, manner):
    for scene in scenes(8, kind="one", path=path, manner=manner):
        _, masks = world.render(scene)
        shown = masks[0].sum((1, 2))
        assert float(shown[0]) > 60
        if path != "leaving":
            assert all(0 <= c <= 64 for centre in scene.objects[0].centres for c in centre)
            assert float(shown.min()) > 60


def test_a_thing_that_hops_is_subject_to_gravity():
    for scene in scenes(20, kind="one", path="hop", background="gray", frames=33):
        height = np.array(scene.objects[0].centres)[:, 1]
        bends = np.diff(height, 2)  # downwards is positive: constant but where it leaps off, and at the box' edge
        assert np.median(bends) > 0 and np.mean(np.abs(bends - np.median(bends)) < 1e-3) > 0.6


def test_unknown_kinds_and_backdrops_are_refused():
    with pytest.raises(ValueError, match="unknown kind"):
        variety.sample(np.random.default_rng(0), "dozen")
    with pytest.raises(ValueError, match="unknown backdrop"):
        backdrops.backdrop("moon", 0.3, 0)


# --- captions -----------------------------------------------------------


def test_parsing_is_the_inverse_of_captions():
    for background, (a, b), places in product(world.BACKGROUNDS, product(world.THINGS, repeat=2), world.PLACE_WORDS):
        for description in (
            world.Description(background, (a,)),
            world.Description(background, (a, b)),
            world.Description(background, (a, b), places),
            world.Description(background, (a, b, b)),
        ):
            assert world.parse_caption(world.caption(description)) == description


@pytest.mark.parametrize(
    "description,text",
    [
        (world.Description("meadow", ("cat",)), "a cat on a meadow"),
        (world.Description("snow", ("fox", "fox")), "two foxes in the snow"),
        (world.Description("night sky", ("dog", "rocket")), "a dog and a rocket in the night sky"),
        (
            world.Description("beach", ("cat", "dog"), "sides"),
            "a cat on the left and a dog on the right on a beach",
        ),
        (
            world.Description("blue", ("car", "car"), "heights"),
            "a car at the top and a car at the bottom on a blue background",
        ),
    ],
)
def test_captions_are_english(description, text):
    assert world.caption(description) == text and world.parse_caption(text) == description


@pytest.mark.parametrize(
    "text",
    ["", "a cat", "a cat on a moon", "a cow on a meadow", "two cat on a meadow", "a cats on a meadow", "a cat and"]
    + ["a cat on a meadow at night", "a cat on the left and a dog on a meadow", "a  cat on a meadow"],
)
def test_other_sentences_are_refused(text):
    with pytest.raises(ValueError, match="not an emoji-world caption"):
        world.parse_caption(text)


def test_a_caption_of_no_or_too_many_things_is_refused():
    for things in ((), ("cat", "dog", "fox", "panda")):
        with pytest.raises(ValueError, match="objects"):
            world.caption(world.Description("meadow", things))


# --- pictures -----------------------------------------------------------


def composed(scene, frame):
    """The frame by straight alpha, each thing pasted by Pillow at twice the size it is drawn at."""
    image = Image.fromarray((backdrops.backdrop(scene.background, scene.horizon, scene.seed) * 255).astype(np.uint8))
    canvas = image.resize((128, 128), Image.Resampling.BICUBIC).convert("RGBA")
    masks = []
    for obj in scene.objects:
        pose = obj.poses[frame]
        index = list(sprites.CODES).index(obj.thing)
        column, row = index % sprites.COLUMNS * 64, index // sprites.COLUMNS * 64
        with Image.open(sprites.SHEET) as sheet:
            picture = sheet.convert("RGBA").crop((column + 1, row + 1, column + 63, row + 63))
        size = round(2 * abs(pose.width)), round(2 * pose.height)
        picture = picture.resize(size, Image.Resampling.LANCZOS)
        if pose.width < 0:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        picture = picture.rotate(-pose.angle, Image.Resampling.BICUBIC, expand=True)
        layer = Image.new("RGBA", canvas.size)
        layer.paste(picture, (round(2 * pose.x - picture.width / 2), round(2 * pose.y - picture.height / 2)))
        canvas = Image.alpha_composite(canvas, layer)
        masks.append(np.asarray(layer.getchannel("A").resize((64, 64), Image.Resampling.BOX), dtype=np.float32) / 255)
    return np.asarray(canvas.convert("RGB").resize((64, 64), Image.Resampling.BOX), dtype=np.float32) / 255, masks


@pytest.mark.parametrize("kind", ["one", "crossing", "same"])
def test_frames_and_masks_agree_with_another_way_to_draw_them(kind):
    for scene in scenes(4, seed=3, kind=kind):
        frames, masks = world.render(scene)
        for i in (0, 7):
            expected, expected_masks = composed(scene, i)
            assert np.abs(frames[i].movedim(0, -1).numpy() - expected).mean() < 0.012
            for mask, other in zip(masks[:, i].numpy(), expected_masks, strict=True):
                assert np.abs(mask - other).sum() < 0.12 * other.sum() + 4
                assert math.isclose(mask.sum(), other.sum(), rel_tol=0.05, abs_tol=4)


def test_outside_the_masks_is_the_backdrop():
    for scene in scenes(10, seed=4):
        frames, masks = world.render(scene)
        outside = (masks.amax(0) == 0)[:, None].expand_as(frames)
        behind = world.backdrop_image(scene).expand_as(frames)
        assert float((frames[outside] - behind[outside]).abs().max()) < 2.1 / 255  # pictures are of 8 bits


def test_a_mirrored_thing_is_its_mirror_image():
    pose = world.Pose(32.0, 30.0, 30.0, 30.0)
    one, other = world.draw_thing("car", pose), world.draw_thing("car", pose._replace(width=-30.0))
    assert np.abs(one.astype(int) - other[:, ::-1].astype(int)).max() <= 2
    assert np.abs(one.astype(int) - other.astype(int)).max() > 50


def test_a_thing_turns_clockwise():
    upright = world.draw_thing("penguin", world.Pose(32.0, 32.0, 40.0, 40.0)).astype(int)
    turned = world.draw_thing("penguin", world.Pose(32.0, 32.0, 40.0, 40.0, 90.0)).astype(int)
    assert np.abs(np.rot90(upright, -1) - turned).max() <= 2


def test_every_sprite_fills_its_cell():
    for name in sprites.CODES:
        side, picture = sprites.level(name, 62)
        coverage = np.asarray(picture)[..., 3]
        assert side == 64 and coverage[0].max() == coverage[:, 0].max() == 0
        tall, wide = (np.flatnonzero(coverage.max(axis) > 128) for axis in (1, 0))
        assert max(np.ptp(tall), np.ptp(wide)) > 55, name


@pytest.mark.parametrize("name", backdrops.BACKDROPS)
def test_backdrops_are_smooth_and_differ_by_seed(name):
    one, other = (backdrops.backdrop(name, 0.35, seed) for seed in (0, 1))
    assert one.shape == (64, 64, 3) and one.dtype == np.float32 and one.min() >= 0 and one.max() <= 1
    assert np.abs(one - other).mean() > 1e-3
    second = np.abs(np.diff(one, 2, axis=1)).mean()
    assert second < 0.02, "texture is noise to the VAE"


@pytest.mark.parametrize("name", backdrops.BACKDROPS)
def test_things_stand_out_from_every_backdrop(name):
    pose = world.Pose(32.0, 44.0, 30.0, 30.0)
    for thing in world.THINGS:
        scene = world.Scene(name, (world.Object(thing, (pose,)),))
        frames, masks = world.render(scene)
        difference = (frames[0] - world.backdrop_image(scene)).square().sum(0).sqrt()
        assert float(difference[masks[0, 0] > 0.9].mean()) > 0.2, thing


def test_the_licence_of_the_pictures_stands_beside_them():
    text = (sprites.SHEET.parent / "LICENSE-fluent-emoji").read_text(encoding="utf-8")
    assert "MIT License" in text and "Microsoft" in text and "permission notice" in text
    assert sprites.SHEET.stat().st_size < 300 * 1024


def test_a_scene_s_description_has_places_for_two_things_only():
    scene = scenes(1, kind="sides")[0]
    assert scene.description.places == "sides"
    assert replace(scene, objects=scene.objects[:1]).description.places == "none"


# --- instruments --------------------------------------------------------


def scene_of(background, *things, places="none"):
    """Things of 24 px side by side from left to right, which move a little to the right."""
    width = 64 / len(things)
    ways = [
        tuple(world.Pose(width * (i + 0.5) - 2 + 0.5 * t, 40.0, 24.0, 24.0) for t in range(4))
        for i in range(len(things))
    ]
    objects = tuple(world.Object(thing, way) for thing, way in zip(things, ways, strict=True))
    return world.Scene(background, objects, places)


def seen(scene, description=None):
    return instruments.attributes(world.render(scene)[0], description or scene.description)


@pytest.mark.parametrize("background", world.BACKGROUNDS)
def test_each_thing_and_background_is_recognised(background):
    for one, other in pairwise((*world.THINGS, world.THINGS[0])):
        assert set(seen(scene_of(background, one, other, places="sides")).values()) == {1.0}, (one, other)


def test_what_a_clip_does_not_show_is_missed():
    clip = scene_of("beach", "cat", "dog", places="sides")
    of = clip.description
    assert seen(clip, of._replace(objects=("dog", "cat"))) == dict(thing=1, background=1, places=0, all=0, count=1)
    assert seen(clip, of._replace(objects=("cat", "fox")))["thing"] == 0.5
    assert seen(clip, of._replace(background="snow"))["background"] == 0
    alone = seen(scene_of("beach", "cat"), of)
    assert (alone["thing"], alone["places"], alone["all"], alone["count"]) == (0.5, 0, 0, 0)


def test_two_equal_things_are_two():
    two, one = scene_of("meadow", "fox", "fox"), scene_of("meadow", "fox")
    assert seen(two)["all"] == seen(two)["count"] == 1
    assert seen(one, two.description)["thing"] == 0.5 and seen(one, two.description)["count"] == 0


def test_centres_are_found_to_a_pixel_and_a_bare_backdrop_shows_none():
    scene = scene_of("snow", "rocket", "panda")
    frames, _ = world.render(scene)
    centres = [o.centres for o in scene.objects]
    assert instruments.trajectory_error_px(frames, centres) < 1.5
    bare = world.backdrop_image(scene).expand_as(frames)
    assert not any(instruments.look(bare).frames)
    assert instruments.trajectory_error_px(bare, centres) == instruments.FAR_PX


def test_a_weak_sight_counts_where_a_sure_one_of_its_thing_is_near():
    """Frame 0: a sure cat; frame 1: a weak cat near it, a weak dog near it and a weak cat far away."""
    logits = torch.full((2, len(world.THINGS), 16, 16), -9.0)
    logits[0, 0, 4, 4] = 3.0
    logits[1, 0, 4, 5] = logits[1, 1, 9, 4] = logits[1, 0, 14, 14] = -1.0
    network = lambda frames: (logits, torch.full((2, 2, 16, 16), 0.5), torch.zeros(2, len(world.BACKGROUNDS)))  # noqa: E731
    first, second = instruments.look(torch.zeros(2, 3, 64, 64), network).frames
    assert [(f.thing, f.centre) for f in first] == [("cat", (18.0, 18.0))]
    assert [(f.thing, f.centre) for f in second] == [("cat", (22.0, 18.0))]
