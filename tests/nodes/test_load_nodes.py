"""The nodes that load models and clips."""

from itertools import zip_longest

import folder_paths
import pytest
import torch
from spacetime_edit.host.loaders.example_clips import clip_names, load_clip
from spacetime_edit.nodes.example_clip import LoadExampleClip
from spacetime_edit.nodes.load_lavie import LoadLaVie
from spacetime_edit.nodes.load_model import LoadVideoDiffusersModel
from spacetime_edit.tests.host import support
from spacetime_edit.tools.shape_world import world

ONE = "clip_00 - a red circle on a gray background"
TWO = "clip_04 - a red circle on the left and a green square on the right, gray background"
THREE = "clip_17 - a red triangle, a green square and a blue circle on a gray background"
CROSSING = "clip_23 - a red circle and a blue square on a gray background"
STRIPED = "clip_28 - a yellow square with a black stripe on a checked pink background"
BEFORE = [  # in workflows that were saved when there were only these
    "clip_00 - a red circle on a gray background",
    "clip_01 - a blue square on a white background",
    "clip_02 - a yellow triangle on a black background",
    "clip_03 - a cyan circle on a brown background",
    "clip_04 - a red circle on the left and a green square on the right, gray background",
    "clip_05 - a blue circle on the left and a red circle on the right, white background",
    "clip_06 - a yellow square on the left and a purple square on the right, black background",
    "clip_07 - a green triangle on the left and a yellow circle on the right, navy background",
]
OUTPUTS = ["images", "mask_1", "mask_2", "source_prompt", "edit_prompt", "fps", "mask_3", "stripe_mask"]


@pytest.mark.parametrize("node", [LoadVideoDiffusersModel, LoadLaVie, LoadExampleClip])
def test_every_socket_has_a_tooltip(node):
    schema = node.define_schema()
    assert schema.node_id.startswith("STE_") and schema.category == "Spacetime Edit/load"
    assert schema.description and schema.search_aliases
    assert all(socket.tooltip for socket in [*schema.inputs, *schema.outputs])


def test_load_model():
    model, clip, vae = LoadVideoDiffusersModel.execute("embedded tiny model", "bf16").result
    assert model.model.get_dtype() == torch.bfloat16
    assert clip.tokenize("a red circle") and vae.latent_channels == 4


def test_lavie_is_loaded_from_the_hosts_folder_and_again_when_the_file_changes(tmp_path, monkeypatch):
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "diffusion_models", ([str(tmp_path)], {".pt"}))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    path = tmp_path / "lavie_base.pt"
    torch.save(support.lavie_weights(), path)
    (names,) = [i.options for i in LoadLaVie.define_schema().inputs if i.id == "model_name"]
    assert names == ["lavie_base.pt"]
    (model,) = LoadLaVie.execute("lavie_base.pt", "bf16").result
    assert model.model.get_dtype() == torch.bfloat16
    before = LoadLaVie.fingerprint_inputs("lavie_base.pt", "default")
    torch.save({"ema": support.lavie_weights()}, path)
    assert LoadLaVie.fingerprint_inputs("lavie_base.pt", "default") != before


def test_workflows_that_were_saved_before_still_load():
    schema = LoadExampleClip.define_schema()
    names = schema.inputs[0].options
    assert names[:8] == BEFORE and len(names) == len(set(names)) == 32 and schema.inputs[0].default == ONE
    assert [output.id for output in schema.outputs] == OUTPUTS


def test_one_object():
    images, first, second, source, edit, fps, third, stripe = LoadExampleClip.execute(ONE, 2).result
    assert images.shape == (8, 64, 64, 3) and first.shape == second.shape == third.shape == stripe.shape == (8, 64, 64)
    assert images.min() >= 0 and images.max() <= 1 and first.max() == 1
    assert second.max() == third.max() == stripe.max() == 0
    assert (source, edit) == ("a red circle on a gray background", "a red square on a gray background")
    assert fps == 8.0


def test_two_objects_are_where_the_masks_are():
    images, left, right, *_ = LoadExampleClip.execute(TWO, 1).result
    red, green = images[left == 1].mean(0), images[right == 1].mean(0)
    assert red.argmax() == 0 and green.argmax() == 1
    assert (left * right).max() == 0


def test_three_objects_are_where_the_masks_are():
    clip = load_clip(THREE)
    colours = [clip.images[mask == 1].mean(0).argmax() for mask in (clip.mask_1, clip.mask_2, clip.mask_3)]
    assert colours == [0, 1, 2] and clip.stripe_mask.max() == 0


def test_of_what_lies_behind_another_the_mask_is_what_is_seen():
    clip = load_clip(CROSSING)
    assert (clip.mask_1 + clip.mask_2).max() < 1.01
    areas = clip.mask_1.sum((1, 2))
    assert areas.min() < 0.5 * areas.max()


def test_a_stripe_is_part_of_its_object():
    clip = load_clip(STRIPED)
    assert (clip.stripe_mask <= clip.mask_1 + 0.01).all() and clip.mask_2.max() == clip.mask_3.max() == 0
    on_it, around = clip.stripe_mask == 1, (clip.mask_1 == 1) & (clip.stripe_mask == 0)
    assert clip.images[on_it].max() < 0.1, "black"
    assert torch.allclose(clip.images[around].mean(0), torch.tensor(world.COLOURS["yellow"]), atol=0.02)


@pytest.mark.parametrize("name", clip_names())
def test_every_clip_has_masks_of_the_objects_that_its_prompt_names(name):
    clip = load_clip(name)
    description = world.parse_caption(clip.source_prompt)
    named = [world.COLOURS[pair.colour] for pair in description.objects]
    for mask, colour in zip_longest((clip.mask_1, clip.mask_2, clip.mask_3), named):
        seen = (mask > 0.99) & (clip.stripe_mask < 0.01)
        if colour is None:
            assert mask.max() == 0
        else:
            assert (clip.images[seen] - torch.tensor(colour)).abs().max() < world.JITTER + 0.03
    assert bool(clip.stripe_mask.max()) == any(pair.stripe for pair in description.objects)
    edits = {load_clip(name, number).edit_prompt for number in (1, 2, 3)}
    assert len(edits | {clip.source_prompt}) == 4


@pytest.mark.parametrize(
    ("clip", "edit", "message"),
    [
        ("clip_99", 1, "clip is 'clip_99'; expected one of the list, such as 'clip_00 - .*choose"),
        (ONE, 4, "edit is 4; 'clip_00.* has edits 1 to 3"),
        (ONE, 0, "edit is 0; 'clip_00.* has edits 1 to 3"),
    ],
)
def test_other_clips_and_edits_are_refused(clip, edit, message):
    with pytest.raises(ValueError, match=message):
        LoadExampleClip.execute(clip, edit)


def test_the_model_reconstructs_the_clip(tiny):
    images = LoadExampleClip.execute(ONE, 1).result[0]
    error = (tiny.vae.decode(tiny.vae.encode(images)) - images).square().mean()
    assert -10 * error.log10() > 35
