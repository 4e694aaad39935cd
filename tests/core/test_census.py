"""The wider shape world and the instruments that need no place: right on the truth, wrong on what is wrong."""

from collections import Counter
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from spacetime_edit.tools.shape_world import census, variety, world


def scenes(kind, n=12, **options):
    generator = np.random.default_rng(list(variety.KINDS).index(kind))
    return [variety.sample(generator, kind, **options) for _ in range(n)]


@pytest.mark.parametrize("kind", variety.KINDS)
def test_the_truth_has_all_attributes(kind):
    results = [census.attributes(world.render(s)[0], s.description) for s in scenes(kind, motion="straight")]
    for name in results[0]:
        least = 0.75 if (kind, name) == ("crossing", "count") else 1  # one hides the other
        assert np.mean([r[name] for r in results]) >= least, (kind, name)


@pytest.mark.parametrize("kind", variety.KINDS)
def test_captions_tell_the_scene_and_are_read_back(kind):
    captions = [world.caption(scene) for scene in scenes(kind, 40)]
    assert [world.parse_caption(c) for c in captions] == [s.description for s in scenes(kind, 40)]
    assert max(len(c.replace(",", " ,").split()) for c in captions) <= 22  # 24 positions


def test_captions_of_each_form():
    found = {kind: {world.caption(s) for s in scenes(kind, 60)} for kind in variety.KINDS}
    assert any("two " in c for c in found["same"]) and any("three " in c for c in found["same"])
    assert all("on the top" in c and "on the bottom" in c for c in found["heights"])
    assert all("left" not in c and " and a " in c for c in found["pair"])
    assert all("stripe" in c for c in found["part"])
    assert any(", " in c for c in found["three"]) and any("two " in c for c in found["three"])


@pytest.mark.parametrize(
    "text",
    [
        "two red circle on a gray background",
        "a red circles on a gray background",
        "a red circle and a red circle on a gray background",
        "a red circle on the left and a green square, gray background",
        "a red circle on a dotted gray background",
        "four red circles on a gray background",
    ],
)
def test_other_sentences_are_refused(text):
    with pytest.raises(ValueError, match="not a shape-world caption"):
        world.parse_caption(text)


def test_held_out_pairs_are_never_drawn_unless_asked_for():
    drawn = {p[:2] for kind in variety.KINDS for s in scenes(kind, 60) for p in s.description.objects}
    assert not drawn & {p[:2] for p in world.HELD_OUT} and len(drawn) == 15
    drawn = {p[:2] for s in scenes("pair", 20, held_out=True) for p in s.description.objects}
    assert drawn <= {p[:2] for p in world.HELD_OUT}


@pytest.mark.parametrize("kind", [kind for kind in variety.KINDS if kind != "crossing"])
@pytest.mark.parametrize("frames", [8, 16])
def test_objects_do_not_touch(kind, frames):
    for scene in scenes(kind, frames=frames):
        assert all(len(o.centres) == frames for o in scene.objects)
        for a, b in combinations(scene.objects, 2):
            nearest = np.hypot(*(np.array(a.centres) - b.centres).T).min()
            assert nearest > 0.84 * (a.radius + b.radius)  # squares side by side in their halves


def test_kinds_come_by_their_shares():
    generator = np.random.default_rng(0)
    counts = Counter(len(variety.sample(generator).objects) for _ in range(600))
    assert abs(counts[1] / 600 - variety.KINDS["one"] - 0.7 * variety.KINDS["part"]) < 0.06
    with pytest.raises(ValueError, match="unknown kind"):
        variety.sample(generator, "four")


def test_motions():
    def travel(scene):
        return float(np.hypot(*np.diff(np.array(scene.objects[0].centres), axis=0).T).sum())

    assert all(travel(s) <= world.MAX_TRAVEL + 1e-6 for s in scenes("one", 40, motion="straight"))
    assert np.mean([travel(s) > world.MAX_TRAVEL for s in scenes("one", 40, motion="fast")]) > 0.9
    bends = [
        np.abs(np.diff(np.array(s.objects[0].centres), 2, axis=0)).max() for s in scenes("one", 40, motion="curved")
    ]
    assert np.median(bends) > 0.2
    last = [np.array(s.objects[0].centres[-1]) for s in scenes("one", 40, motion="leaving")]
    assert np.mean([(p < 0).any() or (p > world.SIZE).any() for p in last]) > 0.5


def test_a_wrong_colour_a_missing_one_and_a_third_are_seen():
    scene = next(s for s in scenes("same", motion="straight") if len(s.objects) == 2)
    other = next(c for c in world.COLOURS if c != scene.objects[0].colour)

    def judged(*objects):
        return census.attributes(world.render(replace(scene, objects=objects))[0], scene.description)

    first, second = scene.objects
    recoloured = judged(first, replace(second, colour=other))
    assert (recoloured["colour"], recoloured["shape"], recoloured["count"], recoloured["all"]) == (0.5, 0.5, 1, 0)
    alone = judged(first)
    assert (alone["colour"], alone["count"]) == (0.5, 0)
    new_shape = next(s for s in world.SHAPES if s != first.shape)
    reshaped = judged(first, replace(second, shape=new_shape))
    assert (reshaped["colour"], reshaped["shape"]) == (1, 0.5)


def test_places_stripes_and_textures_are_judged():
    sides, part = scenes("sides")[0], scenes("part")[0]
    frames = world.render(sides)[0]
    swapped = sides.description._replace(objects=sides.description.objects[::-1])
    assert census.attributes(frames, swapped)["places"] == 0
    assert census.attributes(frames.flip(-1), sides.description)["places"] == 0
    bare = replace(part, objects=tuple(replace(o, stripe="") for o in part.objects))
    assert census.attributes(world.render(bare)[0], part.description)["stripe"] < 1
    for texture in world.TEXTURES:
        clip = world.render(replace(sides, background="gray", gradient=0.0, texture=texture))[0]
        assert census.texture_name(clip) == texture
    graded = world.render(replace(sides, background="gray", gradient=0.25, texture="plain"))[0]
    assert census.texture_name(graded) == "plain"


def test_stripe_masks_are_part_of_their_object():
    obj = replace(scenes("part")[0].objects[0], stripe="white")
    band, whole = world.stripe_mask(obj), world.object_mask(obj)
    assert (band <= whole + 1e-6).all() and 0.2 < float(band.sum() / whole.sum()) < 0.5
