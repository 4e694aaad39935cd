"""CogVideoX from diffusers' files, against diffusers' own network."""

import comfy.samplers
import folder_paths
import pytest
import torch
from safetensors.torch import save_file
from spacetime_edit.host.inversion import invert
from spacetime_edit.host.loaders import cogvideox
from spacetime_edit.host.loaders.diffusers_folder import ModelFolderError
from spacetime_edit.host.relevance_matching import RelevanceMatching, str_score_of
from spacetime_edit.host.sampling import TrajectorySampler
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


# --- what a fixture of one size in `test_families` does not show --------


def conditioning(seed=0):
    return [[torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(seed)), {}]]


def sigmas_of(model, steps):
    return comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", steps)


def test_the_score_looks_at_the_first_two_blocks(tmp_path):
    _, paths = support.cogvideox_pieces(tmp_path, layers=4)
    model = cogvideox.load_cogvideox(paths)
    trajectory = invert(model, conditioning(), 0.1 * torch.randn(1, 16, 3, 8, 8), sigmas_of(model, 2), refinements=0)
    assert str_score_of(trajectory).blocks == {"b0", "b1"}
    assert str_score_of(trajectory).radius == 1, "each pair of frames costs an attention"
    assert str_score_of(trajectory, radius=64).radius == 64
    assert str_score_of(trajectory, "b2-b3").blocks == {"b2", "b3"}


@pytest.mark.parametrize("frames", [3, 4, 5])
def test_an_odd_number_of_latent_frames_in_joined_pairs(tmp_path, frames):
    """CogVideoX 1.5 joins two latent frames in a token; 81 frames of a clip are 21."""
    _, paths = support.cogvideox_pieces(tmp_path, patch_size_t=2)
    model = cogvideox.load_cogvideox(paths)
    clip = 0.1 * torch.randn(1, 16, frames, 8, 8)
    trajectory = invert(model, conditioning(), clip, sigmas_of(model, 2), refinements=0)
    guider = support.guider_of(model, conditioning(1), conditioning(2), 2.0)
    empty, matching = torch.zeros(clip.shape), RelevanceMatching(str_score_of(trajectory), 0.01)
    sampler = TrajectorySampler(trajectory, before_step=[matching])
    out = guider.sample(empty, empty, sampler, trajectory.sigmas, disable_pbar=True, seed=0)
    assert out.shape == clip.shape and out.isfinite().all()


def test_an_image_to_video_model_without_its_picture_is_refused(tmp_path):
    _, paths = support.cogvideox_pieces(tmp_path, in_channels=32)
    model = cogvideox.load_cogvideox(paths)
    with pytest.raises(ValueError, match="positive: this CogVideoX model draws on from a picture .*32 channels"):
        invert(model, conditioning(), torch.randn(1, 16, 3, 8, 8), sigmas_of(model, 2))


def test_latents_of_another_model_are_refused(released):
    model = cogvideox.load_cogvideox(released[1])
    with pytest.raises(ValueError, match=r"^latent: its shape .* with 16 channels"):
        invert(model, conditioning(), torch.randn(1, 4, 3, 8, 8), sigmas_of(model, 2))
