"""Show-1's key frame model in pixels: loader against diffusers' own parts, text encoder, taps, Video DDS."""

import json
from dataclasses import replace

import comfy.model_base
import diffusers
import nodes
import pytest
import torch
import transformers
from diffusers.models.attention_processor import AttnAddedKVProcessor2_0, AttnProcessor2_0
from safetensors.torch import load_file
from spacetime_edit.core.parametrization import NoiseSpace
from spacetime_edit.host import distillation
from spacetime_edit.host.attention_tap import AttentionTap
from spacetime_edit.host.distillation import MOTION, RELEVANCE, SPATIAL, TEMPORAL, Distillation, optimise
from spacetime_edit.host.families import family_of, noise_space
from spacetime_edit.host.features import key_blocks
from spacetime_edit.host.layers import attention_layers
from spacetime_edit.host.loaders import show1_model, unet3d
from spacetime_edit.host.loaders.diffusers_folder import ModelFolder, ModelFolderError
from spacetime_edit.host.region_patch import RegionModulation, patch_regions
from spacetime_edit.host.relevance_matching import lacks_for_relevance
from spacetime_edit.tests.host import plain_distillation, support

FRAMES, HEIGHT, WIDTH = 3, 8, 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with torch.inference_mode():
        return support.show1_folder(tmp_path_factory.mktemp("models") / "show-1-base")


@pytest.fixture(scope="module")
def show1(folder):
    with torch.inference_mode():
        return unet3d.load_folder(folder)


def pixels(seed=0, frames=FRAMES):
    return torch.randn(frames, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(seed))


def encode(clip, prompt):
    return nodes.CLIPTextEncode().encode(clip, prompt)[0]


def prompts(clip):
    return encode(clip, "a red circle"), encode(clip, "a blue square"), encode(clip, "low resolution, blur")


def test_the_network_equals_the_same_blocks_with_diffusers_own_attention(folder, show1):
    """The other network keeps diffusers' layers and attention processors."""
    model, clip, _ = show1
    plain = show1_model.PixelUNet3D(show1_model.completed(support.SHOW1)).eval()
    plain.load_state_dict(load_file(folder / "unet" / "diffusion_pytorch_model.safetensors"))
    for module in plain.modules():
        if isinstance(module, show1_model.Attention):
            module.set_processor(_WithoutOptions(module))
    context = encode(clip, "a red circle")[0][0].expand(FRAMES, -1, -1)
    arguments = pixels(), torch.full((FRAMES,), 300.0), context
    got = model.model.diffusion_model(*arguments, transformer_options={"cond_or_uncond": [0]})
    wanted = plain(*arguments, transformer_options={"cond_or_uncond": [0]})
    assert got.shape == (FRAMES, 3, HEIGHT, WIDTH) and got.std() > 0.01
    assert (got - wanted).abs().max() <= 1e-5


class _WithoutOptions:
    def __init__(self, attn):
        self._own = AttnAddedKVProcessor2_0() if attn.added_kv_proj_dim else AttnProcessor2_0()

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, transformer_options=None, **others):
        return self._own(attn, hidden_states, encoder_hidden_states, **others)


def test_a_batch_of_prompts_equals_single_calls(show1):
    model, clip, _ = show1
    x = torch.cat([pixels(1), pixels(2)])
    contexts = [encode(clip, p)[0][0].expand(FRAMES, -1, -1) for p in ("a red circle", "")]
    net, times = model.model.diffusion_model, torch.full((2 * FRAMES,), 500.0)
    both = net(x, times, torch.cat(contexts), transformer_options={"cond_or_uncond": [0, 1]})
    for part, own, context in zip(both.chunk(2), x.chunk(2), contexts, strict=True):
        alone = net(own, times[:FRAMES], context, transformer_options={"cond_or_uncond": [0]})
        assert (part - alone).abs().max() <= 1e-5


def test_the_noise_schedule_is_diffusers_own(show1):
    wanted = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod
    sigmas = show1[0].get_model_object("model_sampling").sigmas
    expected = ((1 - wanted.double()) / wanted.double()).sqrt()
    # the last sigmas are of the order of 1e4, where float32 holds 1 - alpha to few digits
    assert torch.allclose(sigmas[:990].double(), expected[:990], rtol=1e-3)
    assert noise_space(show1[0]) is NoiseSpace.VE
    assert show1[0].model.model_type is comfy.model_base.ModelType.EPS


def test_a_prompt_is_encoded_as_transformers_does_padded_to_77_tokens(folder, show1):
    config = transformers.T5Config(**{k: v for k, v in support.TINY_T5.items() if k != "architectures"})
    plain = transformers.T5EncoderModel(config).eval()
    weights = load_file(folder / "text_encoder" / "model.safetensors")
    weights = {name: weight.half().float() for name, weight in weights.items()}  # as the host keeps text encoders
    missing, unknown = plain.load_state_dict(weights, strict=False)
    assert not unknown and set(missing) <= {"encoder.embed_tokens.weight"}
    tokens = show1[1].tokenize("a red circle rolls")["t5"][0]
    ids = torch.tensor([[token for token, _ in tokens]])
    assert ids.shape == (1, 77) and (ids == 1).sum() == 1
    wanted = plain(
        ids, attention_mask=(torch.arange(77) <= int((ids[0] == 1).nonzero())).long()[None]
    ).last_hidden_state
    got = encode(show1[1], "a red circle rolls")[0][0]
    assert (got - wanted).abs().max() <= 1e-4


def test_the_vae_is_the_hosts_pixel_space(show1):
    images = torch.rand(FRAMES, HEIGHT, WIDTH, 3)
    latent = show1[2].encode(images)
    assert latent.shape == (FRAMES, 3, HEIGHT, WIDTH)
    assert torch.allclose(latent, images.movedim(-1, 1) * 2 - 1, atol=1e-6)
    assert torch.allclose(show1[2].decode(latent), images, atol=1e-6)


def test_every_attention_is_classified(show1):
    layers = attention_layers(show1[0])
    kinds = [layer.kind for layer in layers.values()]
    assert kinds.count("joint") == 4 + 1 + 6 and kinds.count("temporal") == 2 * kinds.count("joint")
    seen = {}
    tap = AttentionTap(show1[0], [lambda call: seen.update({call.layer.path: call})])
    support.prediction(show1[0], encode(show1[1], "a"), pixels(), cfg=1.0, options=tap.install(show1[0].model_options))
    assert set(seen) == set(layers)
    for call in seen.values():
        frames, height, width = call.grid
        if call.kind == "joint":
            assert call.query.shape[0] == frames == FRAMES and call.query.shape[2] == height * width
            assert call.key.shape[2] == 77 + height * width
        else:
            assert call.query.shape[0] == height * width and call.query.shape[2] == FRAMES
        assert len(call.rows) == call.query.shape[0]


def test_the_keys_compared_are_those_of_the_frames_own_tokens(show1):
    model, clip, _ = show1
    keys = distillation.KeyRecorder(key_blocks(model))
    tap = AttentionTap(model, [keys])
    inputs = {}
    net = model.model.diffusion_model
    path = next(iter(path for path in attention_layers(model) if path.startswith("up_blocks.0.attentions")))
    module = net.get_submodule(path)
    handle = module.to_k.register_forward_hook(lambda _, given, out: inputs.update(key=out))
    try:
        support.prediction(model, encode(clip, "a"), pixels(), cfg=1.0, options=tap.install(model.model_options))
    finally:
        handle.remove()
    assert torch.equal(keys.keys[f"{path} keys"], inputs["key"])


def test_dds_in_pixels_is_its_two_steps_and_leaves_the_model_alone(show1):
    """Against the same written down once more."""
    model, clip, _ = show1
    before = support.Untouched(model)
    source, target, negative = prompts(clip)
    weights = {SPATIAL: 0.3, TEMPORAL: 0.1, MOTION: 0.1}
    settings = Distillation(steps=2, weights=weights, blocks=key_blocks(model))
    expected, free = (
        plain_distillation.optimised(model, source, target, negative, pixels(), replace(settings, weights=w), 0)
        for w in (weights, {})
    )
    pull = (expected - free).norm()
    assert pull > 1e-3 * (expected - pixels()).norm() > 0
    for low_memory in (False, True):
        own = replace(settings, low_memory=low_memory)
        edited, curve = optimise(model, source, target, negative, pixels(), own, seed=0)
        assert (edited - expected).norm() <= 2e-3 * pull
        assert all(curve[-1][1][name] > 0 for name in weights)
    assert not before.changed()
    same, _ = optimise(model, source, source, negative, pixels(), settings, seed=0)
    assert torch.equal(same, pixels())


def test_its_gradients_are_those_of_finite_differences(show1):
    """Of the loss on keys, along itself."""
    model, clip, _ = show1
    x = 2 * pixels()
    source, target, _ = prompts(clip)
    spatial = plain_distillation.Regularisers(
        model, (source, target), x + pixels(5), torch.tensor(2.0), [SPATIAL], key_blocks(model)
    )
    gradient = spatial.gradients(x)[SPATIAL]
    direction, value = gradient / gradient.norm(), lambda x: spatial.losses(x)[SPATIAL]
    slopes = [(value(x + h * direction) - value(x - h * direction)) / (2 * h) for h in (0.1, 0.2)]
    assert abs((4 * slopes[0] - slopes[1]) / 3 / float(gradient.norm()) - 1) <= 1e-3


def test_what_does_not_apply_is_refused_by_name(show1):
    model, clip, _ = show1
    assert family_of(model).name.startswith("Show-1")
    assert lacks_for_relevance(model) == "spatial self-attention apart from the prompt's"
    with pytest.raises(ValueError, match="model: in Show-1.*regions do not act"):
        patch_regions(model, RegionModulation())
    settings = Distillation(steps=1, weights={RELEVANCE: 0.1}, blocks=key_blocks(model))
    with pytest.raises(ValueError, match="relevance: .*Show-1"):
        optimise(model, *prompts(clip), pixels(), settings, seed=0)


def test_sizes_that_do_not_halve_are_refused(show1):
    model, clip, _ = show1
    with pytest.raises(ValueError, match="10 x 8 pixels.*multiples of 4"):
        support.prediction(model, encode(clip, "a"), torch.randn(2, 3, 8, 10), cfg=1.0)


@pytest.mark.parametrize(
    ("part", "entry", "value", "message"),
    [
        ("unet", "class_embed_type", "timestep", "class_embed_type is 'timestep'.*show-1-base"),
        ("unet", "encoder_hid_dim", None, "entry 'encoder_hid_dim' is missing"),
        ("unet", "up_block_types", ["UpBlock3D"] * 3, "names the block 'UpBlock3D'"),
        ("unet", "block_out_channels", [32, 10**6, 96], "block_out_channels"),
        ("text_encoder", "feed_forward_proj", "relu", "feed_forward_proj is 'relu'"),
        ("text_encoder", "architectures", ["CLIPTextModel"], "names the class 'CLIPTextModel'"),
    ],
)
def test_folders_that_are_something_else_are_refused(tmp_path, part, entry, value, message):
    broken = support.show1_folder(tmp_path / "model")
    path = broken / part / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {entry: value}))
    with pytest.raises(ModelFolderError, match=message):
        unet3d.load_folder(broken)


def test_weights_in_pieces_are_put_together_and_a_missing_piece_is_noticed(tmp_path, show1):
    split = support.show1_folder(tmp_path / "model")
    whole = split / "text_encoder" / "model.safetensors"
    weights = load_file(whole)
    names = sorted(weights)
    for number, part in enumerate((names[::2], names[1::2]), 1):
        support.save_file({n: weights[n] for n in part}, whole.with_name(f"model-{number:05d}-of-00002.safetensors"))
    whole.unlink()
    clip = unet3d.load_folder(split)[1]
    assert torch.equal(encode(clip, "a red circle")[0][0], encode(show1[1], "a red circle")[0][0])
    whole.with_name("model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelFolderError, match="text_encoder holds no weights"):
        ModelFolder(split)
