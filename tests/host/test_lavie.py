"""LaVie's base model: loader against the network written down once more, taps. The methods: `test_families`."""

import comfy.sd
import pytest
import torch
from safetensors.torch import save_file
from spacetime_edit.core.parametrization import NoiseSpace
from spacetime_edit.host.attention_tap import AttentionTap
from spacetime_edit.host.families import family_of, noise_space
from spacetime_edit.host.features import FeatureRecorder
from spacetime_edit.host.layers import attention_layers
from spacetime_edit.host.loaders import lavie
from spacetime_edit.host.loaders.diffusers_folder import ModelFolderError
from spacetime_edit.host.loaders.lavie_model import distance_buckets, rotate
from spacetime_edit.tests.host import support
from spacetime_edit.tests.host.plain_lavie import PlainLaVie, bucket, rotated

FRAMES, SIDE, WIDTH = 4, 8, 16


@pytest.fixture(scope="module")
def weights():
    with torch.inference_mode():
        return support.lavie_weights()


@pytest.fixture(scope="module")
def file(weights, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "lavie_base.pt"
    torch.save({"ema": weights | {f"{name}.rotary_emb.freqs": torch.ones(2) for name in temporal(weights)}}, path)
    return path


@pytest.fixture(scope="module")
def model(file):
    with torch.inference_mode():
        return lavie.load_lavie(file)


def temporal(weights):
    return [name.removesuffix(".to_q.weight") for name in weights if name.endswith("attn_temp.to_q.weight")]


def clip(seed=0, frames=FRAMES):
    return torch.randn(frames, 4, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def conditioning(seed=0, tokens=7):
    return [[torch.randn(1, tokens, WIDTH, generator=torch.Generator().manual_seed(seed)), {}]]


def test_the_network_equals_one_that_is_written_by_hand(model, weights):
    plain, contexts = PlainLaVie(weights), torch.cat([conditioning(seed)[0][0] for seed in (0, 1)])
    x = torch.stack([clip(2), clip(3)])
    times = torch.tensor([300.0, 700.0])
    wanted = plain(x.movedim(1, 2), times, contexts).movedim(2, 1).flatten(0, 1)
    each = times.repeat_interleave(FRAMES), contexts.repeat_interleave(FRAMES, 0)
    got = model.model.diffusion_model(x.flatten(0, 1), *each, transformer_options={"cond_or_uncond": [0, 1]})
    assert got.std() > 0.05 and (got - wanted).abs().max() <= 2e-5


def test_places_in_time():
    """Heads wider than the rotary part, and the buckets of all distances up to 40 frames."""
    x = torch.randn(2, 3, 5, 40)
    assert (rotate(x) - rotated(x)).abs().max() <= 1e-5 and torch.equal(rotate(x)[..., 32:], x[..., 32:])
    assert distance_buckets(40).tolist() == [[bucket(i, j) for j in range(40)] for i in range(40)]


def test_the_noise_schedule_is_linear_in_beta(model):
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    alphas = (1 - betas).cumprod(0)
    wanted = ((1 - alphas) / alphas).sqrt()
    assert torch.allclose(model.get_model_object("model_sampling").sigmas.double(), wanted, rtol=1e-4)
    assert noise_space(model) is NoiseSpace.VE and family_of(model).name == "LaVie"


def test_every_attention_is_classified_and_pairs_share_a_block(model):
    layers = attention_layers(model)
    kinds = [layer.kind for layer in layers.values()]
    assert kinds.count("spatial") == kinds.count("cross") == kinds.count("temporal") == 4
    assert {layer.block for layer in layers.values()} == {"d0", "m0", "u0", "u1"}
    seen = {}
    tap = AttentionTap(model, [lambda call: seen.update({call.layer.path: call})])
    support.prediction(model, conditioning(), clip(), cfg=1.0, options=tap.install(model.model_options))
    assert set(seen) == set(layers)
    for call in seen.values():
        frames, height, width = call.grid
        rows = height * width if call.kind == "temporal" else frames
        tokens = frames if call.kind == "temporal" else height * width
        assert call.query.shape[:3] == (rows, 8, tokens) and len(call.rows) == rows
        assert (call.mask is not None) == (call.kind == "temporal")


def test_temporal_maps_hold_the_bias_of_time(model):
    """The recorded map times the values is what the layer's attention gave."""
    recorder, outputs, values = FeatureRecorder(frozenset({"m0"})), {}, {}

    def listen(call):
        recorder(call)
        if call.kind == "temporal" and call.layer.block == "m0":
            values["value"] = call.value
            outputs["out"] = call.attend(call.query, call.key, call.value, call.scale, call.mask)

    tap = AttentionTap(model, [listen])
    support.prediction(model, conditioning(), clip(), cfg=1.0, options=tap.install(model.model_options))
    (features,) = recorder.features.values()
    assert (features.temporal @ values["value"].float() - outputs["out"].float()).abs().max() <= 1e-5


def test_a_lora_of_stable_diffusion_fits_the_spatial_layers(model):
    """In kohya's names, which are those of diffusers' U-Net."""
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q"
    weight = model.model.diffusion_model.get_submodule(layer).weight
    up, down = torch.randn(weight.shape[0], 2), torch.randn(2, weight.shape[1])
    name = "lora_unet_" + layer.replace(".", "_")
    lora = {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down, f"{name}.alpha": torch.tensor(2.0)}
    patched, _ = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)
    assert list(patched.patches) == [f"diffusion_model.{layer}.weight"]
    plain, seen = (support.prediction(m, conditioning(), clip()) for m in (model, patched))
    assert support.relative(seen, plain) > 1e-3
    assert torch.equal(support.prediction(model, conditioning(), clip()), plain)


@pytest.mark.parametrize("dtype", ["bf16", "fp8_e4m3fn"])
def test_smaller_weights_are_the_rounded_ones(file, dtype):
    """Those of layers that compute; the prediction is that of a model in float32 whose weights are rounded so."""
    small, rounded = lavie.load_lavie(file, weight_dtype=dtype), lavie.load_lavie(file)
    weights = dict(small.model.diffusion_model.named_parameters())
    changed = 0
    for name, weight in rounded.model.diffusion_model.named_parameters():
        changed += not torch.equal(weight, weights[name].to(weight))
        weight.copy_(weights[name])
    assert changed
    seen, expected = (support.prediction(m, conditioning(), clip()) for m in (small, rounded))
    assert support.relative(seen, expected) <= 1e-6


def test_a_file_of_something_else_is_refused_with_what_it_holds(tmp_path, weights):
    path = tmp_path / "other.safetensors"
    save_file({k: v.clone() for k, v in weights.items() if ".attn_temp." not in k and "norm_temp" not in k}, path)
    with pytest.raises(ModelFolderError, match="no LaVie base model: its U-Net has no attention over time"):
        lavie.load_lavie(path)
    save_file({"model.diffusion_model.weight": torch.zeros(2)}, path)
    with pytest.raises(ModelFolderError, match="it holds 1 tensors such as 'model.diffusion_model.weight'"):
        lavie.load_lavie(path)
    save_file({k: v.clone() for k, v in weights.items() if k != "mid_block.resnets.1.conv1.bias"}, path)
    with pytest.raises(ModelFolderError, match="key 'mid_block.resnets.1.conv1.bias' is missing"):
        lavie.load_lavie(path)
    save_file({k: v.clone() for k, v in weights.items() if not k.startswith("down_blocks.")}, path)
    with pytest.raises(ModelFolderError, match="it lacks 'down_blocks.'"):
        lavie.load_lavie(path)
    odd = torch.zeros(33, 32, 3, 3)  # no width that 32 groups divide
    save_file({**weights, "down_blocks.0.resnets.0.conv1.weight": odd}, path)
    with pytest.raises(ModelFolderError, match="no LaVie base model has these sizes"):
        lavie.load_lavie(path)
    with pytest.raises(ModelFolderError, match="'nothing.pt' is not in models/diffusion_models"):
        lavie.file_path("nothing.pt")
