"""The nodes that load models and clips."""

import folder_paths
import pytest
import torch
from spacetime_edit.nodes.example_clip import LoadExampleClip
from spacetime_edit.nodes.load_lavie import LoadLaVie
from spacetime_edit.nodes.load_model import LoadVideoDiffusersModel
from spacetime_edit.tests.host import support

ONE = "clip_00 - a red circle on a gray background"
TWO = "clip_04 - a red circle on the left and a green square on the right, gray background"


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


def test_one_object():
    images, first, second, source, edit, fps = LoadExampleClip.execute(ONE, 2).result
    assert images.shape == (8, 64, 64, 3) and first.shape == second.shape == (8, 64, 64)
    assert images.min() >= 0 and images.max() <= 1 and first.max() == 1 and second.max() == 0
    assert (source, edit) == ("a red circle on a gray background", "a red square on a gray background")
    assert fps == 8.0


def test_two_objects_are_where_the_masks_are():
    images, left, right, *_ = LoadExampleClip.execute(TWO, 1).result
    red, green = images[left == 1].mean(0), images[right == 1].mean(0)
    assert red.argmax() == 0 and green.argmax() == 1
    assert (left * right).max() == 0


@pytest.mark.parametrize(("clip", "edit"), [("clip_99", 1), (ONE, 4), (ONE, 0)])
def test_other_clips_and_edits_are_refused(clip, edit):
    with pytest.raises(ValueError, match="clip_"):
        LoadExampleClip.execute(clip, edit)


def test_the_model_reconstructs_the_clip(tiny):
    images = LoadExampleClip.execute(ONE, 1).result[0]
    error = (tiny.vae.decode(tiny.vae.encode(images)) - images).square().mean()
    assert -10 * error.log10() > 35
