"""CogVideoX from diffusers' files, against diffusers' own network."""

import folder_paths
import pytest
import torch
from safetensors.torch import save_file
from spacetime_edit.host.loaders import cogvideox
from spacetime_edit.host.loaders.diffusers_folder import ModelFolderError
from spacetime_edit.tests.host import support

KINDS = {"1.0": {}, "1.5": {"patch_size_t": 2}}


@pytest.fixture(params=KINDS)
def released(request, tmp_path):
    """(diffusers' network, its files)."""
    return support.cogvideox_pieces(tmp_path, **KINDS[request.param])


def rotation(net, grid):
    """cos and sin as diffusers' pipeline makes them for a clip of this many tokens."""
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    frames, height, width = grid
    if net.config.patch_size_t is None:
        crops = (0, 0), (height, width)
        return get_3d_rotary_pos_embed(64, crops, (height, width), frames)
    return get_3d_rotary_pos_embed(
        64, None, (height, width), frames, grid_type="slice", max_size=(max(height, 30), max(width, 45))
    )


def test_it_predicts_what_the_released_network_does(released):
    net, paths = released
    model = cogvideox.load_cogvideox(paths)
    host = model.model.diffusion_model
    latent, text = torch.randn(1, 16, 4, 8, 10), torch.randn(1, 7, 32)
    time = torch.tensor([300.0])
    grid = (4 // (net.config.patch_size_t or 1), 4, 5)
    theirs = net(latent.transpose(1, 2), text, time, image_rotary_emb=rotation(net, grid), return_dict=False)[0]
    ours = host(latent, time, text)
    if net.config.patch_size_t is None:  # the host scales positions of the 1.0 by the size that it was trained at
        host.spatial_interpolation_scale = 1.0
        ours = host(latent, time, text)
    assert support.relative(ours, theirs.transpose(1, 2)) <= 1e-4


def test_files_are_found_by_the_first_piece(released, monkeypatch):
    _, paths = released
    monkeypatch.setattr(folder_paths, "get_filename_list", lambda kind: [path.name for path in paths])
    monkeypatch.setattr(folder_paths, "get_full_path", lambda kind, name: str(paths[0].with_name(name)))
    assert cogvideox.list_files() == [paths[0].name]
    assert cogvideox.files_of(paths[0].name) == paths
    before = cogvideox.fingerprint(paths[0].name)
    paths[1].write_bytes(paths[1].read_bytes() + b" ")
    assert cogvideox.fingerprint(paths[0].name) != before
    paths[1].unlink()
    with pytest.raises(ModelFolderError, match="its pieces diffusion_pytorch_model-00002-of-00002.safetensors are"):
        cogvideox.files_of(paths[0].name)


def test_other_files_are_refused_with_what_they_hold(tmp_path):
    path = tmp_path / "other.safetensors"
    save_file({"some.weight": torch.zeros(2)}, path)
    with pytest.raises(ModelFolderError, match="no CogVideoX transformer: it holds 1 tensors such as 'some.weight'"):
        cogvideox.load_cogvideox([path])
    save_file({"transformer_blocks.0.norm1.linear.weight": torch.zeros(6 * 30 * 64, 2)}, path)
    with pytest.raises(ModelFolderError, match="it is CogVideoX-2B, whose positions"):
        cogvideox.load_cogvideox([path])


@pytest.mark.parametrize("dtype", ["bf16", "fp8_e4m3fn"])
def test_weights_are_kept_as_asked(released, dtype):
    model = cogvideox.load_cogvideox(released[1], weight_dtype=dtype)
    assert model.model.diffusion_model.blocks[0].q.weight.dtype == cogvideox.WEIGHT_DTYPES[dtype]
