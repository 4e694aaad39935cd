"""What the host tests share: small models, one-step runs of the real sampler stack, and what a run must leave alone."""

from __future__ import annotations

import json
import random
import shutil

import comfy.model_management as management
import comfy.model_patcher
import comfy.ops
import comfy.samplers
import comfy.supported_models
import diffusers
import nodes
import torch
from comfy.patcher_extension import WrappersMP
from safetensors.torch import save_file
from spacetime_edit.host.animatediff import SLOT
from spacetime_edit.host.kernels import FUSED_KERNELS
from spacetime_edit.host.loaders import lavie_model, show1_model, t5_text
from spacetime_edit.host.loaders.diffusers_folder import EMBEDDED_PATH, ModelFolder
from spacetime_edit.host.loaders.unet3d import load_model
from spacetime_edit.host.loaders.unet3d_model import build

SOURCE_PROMPT = "a red circle on a gray background"
EDIT_PROMPT = "a blue square on a gray background"
SD15 = dict(
    image_size=32,
    in_channels=4,
    out_channels=4,
    model_channels=32,
    num_res_blocks=[1, 1],
    channel_mult=[1, 2],
    num_heads=8,
    use_spatial_transformer=True,
    context_dim=16,
    transformer_depth=[1, 1],
    transformer_depth_output=[1, 1, 1, 1],
    transformer_depth_middle=1,
    use_linear_in_transformer=False,
    adm_in_channels=None,
    legacy=False,
)


def encode(tiny, prompt=SOURCE_PROMPT):
    return nodes.CLIPTextEncode().encode(tiny.clip, prompt)[0]


def sd15_model():
    """A ModelPatcher with the host's UNetModel in SD 1.5's layout, 32 channels and random weights."""
    config = comfy.supported_models.SD15(SD15)
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, "")
    generator = torch.Generator().manual_seed(1)
    for name, weight in model.diffusion_model.named_parameters():
        is_scale = weight.ndim == 1 and name.endswith("weight")
        weight.copy_(torch.ones_like(weight) if is_scale else 0.1 * torch.randn(weight.shape, generator=generator))
    devices = management.get_torch_device(), management.unet_offload_device()
    return comfy.model_patcher.CoreModelPatcher(model, *devices)


SHOW1 = {  # entries and their order of size as in show-1-base, whose widths are 320, 640, 960, 1280 and heads 64 wide
    "_class_name": "UNet3DConditionModel",
    "act_fn": "gelu",
    "addition_embed_type": "text",
    "addition_embed_type_num_heads": 4,
    "attention_head_dim": 8,
    "block_out_channels": [32, 64, 96],
    "cross_attention_dim": 64,
    "cross_attention_norm": "group_norm",
    "down_block_types": ["ResnetDownsampleBlock3D", "SimpleCrossAttnDownBlock3D", "SimpleCrossAttnDownBlock3D"],
    "encoder_hid_dim": 16,
    "encoder_hid_dim_type": "text_proj",
    "in_channels": 3,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock3DSimpleCrossAttn",
    "norm_num_groups": 32,
    "out_channels": 6,
    "resnet_time_scale_shift": "scale_shift",
    "up_block_types": ["SimpleCrossAttnUpBlock3D", "SimpleCrossAttnUpBlock3D", "ResnetUpsampleBlock3D"],
}
TINY_T5 = {
    "architectures": ["T5EncoderModel"],
    "d_ff": 32,
    "d_kv": 4,
    "d_model": 16,
    "feed_forward_proj": "gated-gelu",
    "num_heads": 4,
    "num_layers": 2,
    "vocab_size": 32128,
}
PIXEL_SCHEDULER = {
    "_class_name": "DDPMScheduler",
    "beta_schedule": "squaredcos_cap_v2",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "variance_type": "learned_range",
}


def show1_folder(folder):
    """A folder in the layout of showlab/show-1-base, tiny, with random weights."""
    configs = {"unet": SHOW1, "text_encoder": TINY_T5}
    nets = {"unet": show1_model.build(SHOW1), "text_encoder": t5_text.empty(TINY_T5)}
    names = {"unet": "diffusion_pytorch_model.safetensors", "text_encoder": "model.safetensors"}
    for part, config in configs.items():
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text(json.dumps(config))
        save_file(random_weights(nets[part]), folder / part / names[part])
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(PIXEL_SCHEDULER))
    return folder


LAVIE = {
    "attention_head_dim": 8,  # diffusers' name for the number of heads
    "block_out_channels": [32, 64],
    "cross_attention_dim": 16,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "layers_per_block": 1,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}


def lavie_weights(context=16):
    """Random weights under the names of the released lavie_base.pt, of a tiny network; context: width of prompts."""
    return released_lavie_names(random_weights(lavie_model.build(LAVIE | {"cross_attention_dim": context})))


def released_lavie_names(weights):
    """As in lavie_base.pt."""
    return {
        name.replace(".norm1.norm.", ".norm1.").replace(".norm2.norm.", ".norm2.").replace("out.norm.", "out."): w
        for name, w in weights.items()
    }


COGVIDEOX = dict(
    num_attention_heads=1,
    attention_head_dim=64,
    num_layers=2,
    time_embed_dim=32,
    use_rotary_positional_embeddings=True,
)


def cogvideox_pieces(folder, context=32, layers=2, **options):
    """diffusers' CogVideoX, tiny, with random weights, and its two files, as released; context: width of prompts."""
    sizes = COGVIDEOX | {"num_layers": layers}
    net = diffusers.CogVideoXTransformer3DModel(**sizes, text_embed_dim=context, **options).eval()
    weights = random_weights(net)
    net.load_state_dict(weights)
    names = sorted(weights)
    paths = [folder / f"diffusion_pytorch_model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    folder.mkdir(parents=True, exist_ok=True)
    for path, part in zip(paths, (names[::2], names[1::2]), strict=True):
        save_file({name: weights[name] for name in part}, path)
    return net, paths


def random_weights(net):
    """Scales of norms 1, the rest noise by the width of its input, from a fixed seed."""
    generator = torch.Generator().manual_seed(1)
    weights = {}
    for name, weight in net.state_dict().items():
        is_scale = weight.ndim == 1 and name.endswith("weight")
        noise = torch.randn(weight.shape, generator=generator)
        weights[name] = torch.ones(weight.shape) if is_scale else noise * max(weight[0].numel(), 1) ** -0.5
    return weights


def unet3d_model(folder, make_weights=random_weights, weight_dtype="default", **config):
    """A ModelPatcher of the embedded model's layout with `config` changed in its UNet and random weights."""
    shutil.copytree(EMBEDDED_PATH, folder, dirs_exist_ok=True)
    path = folder / "unet" / "config.json"
    settings = json.loads(path.read_text()) | config
    path.write_text(json.dumps(settings))
    save_file(make_weights(build(settings)), folder / "unet" / "diffusion_pytorch_model.safetensors")
    return load_model(ModelFolder(folder), weight_dtype=weight_dtype)


def sd15_conditioning(seed=0, tokens=7):
    return [[torch.randn(1, tokens, 16, generator=torch.Generator().manual_seed(seed)), {}]]


def guider_of(model, positive, negative=None, cfg=1.0):
    guider = comfy.samplers.CFGGuider(model)
    guider.inner_set_conds({"positive": positive} if negative is None else {"positive": positive, "negative": negative})
    guider.set_cfg(cfg)
    return guider


class AtOneSigma(comfy.samplers.Sampler):
    """A sampler that calls `function(guider, x, sigma, extra_args)` once and keeps what it returns in `result`."""

    def __init__(self, function):
        self.function = function

    def sample(self, model_wrap, sigmas, extra_args, callback, noise, *args, **kwargs):
        self.result = self.function(model_wrap, noise, sigmas[0], extra_args)
        return noise


def at_one_sigma(guider, latent, function, sigma=2.0):
    """What `function(guider, x, sigma, extra_args)` returns inside a real run of the host, at one noise level."""
    sampler = AtOneSigma(function)
    guider.sample(latent, torch.zeros_like(latent), sampler, torch.tensor([sigma, 0.0]), disable_pbar=True, seed=0)
    return sampler.result


def prediction(model, positive, latent, negative=None, cfg=2.0, sigma=2.0, options=None):
    """The guider's prediction for `latent`; options: use these model options, or what this makes of the run's."""

    def predict(guider, x, sigma, extra_args):
        own = options(extra_args["model_options"]) if callable(options) else options
        given = extra_args if options is None else {**extra_args, "model_options": own}
        return guider(x, sigma * x.new_ones(x.shape[0]), **given)

    return at_one_sigma(guider_of(model, positive, negative, cfg), latent, predict, sigma)


class CallCounter:
    """A clone of a model that counts its calls; `on_call(count)` runs before each."""

    def __init__(self, model, on_call=None):
        self.calls, self.on_call = 0, on_call
        self.model = model.clone()
        self.model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "test_counter", self._count)

    def _count(self, executor, *args, **kwargs):
        self.calls += 1
        if self.on_call is not None:
            self.on_call(self.calls)
        return executor(*args, **kwargs)


def stream_weights(monkeypatch):
    """From now on each cast gives a view of a shared buffer without a version counter, overwritten afterwards.

    Returns the buffers, which fill up by their size.
    """
    cast, buffers = comfy.ops.cast_bias_weight, {}

    def into_buffer(tensor, role):
        if tensor is None:
            return None
        with torch.inference_mode(False):
            key = role, tuple(tensor.shape), tensor.dtype
            buffer = buffers.setdefault(key, torch.empty(tensor.shape, dtype=tensor.dtype))
            buffer.data.copy_(tensor)
            return buffer.data

    def streaming_cast(module, *args, **kwargs):
        weight, bias, *stream = cast(module, *args, **kwargs)
        return into_buffer(weight, "weight"), into_buffer(bias, "bias"), *stream

    def poison(module, weight, bias, stream):
        for tensor in (weight, bias):
            if tensor is not None:
                tensor.data.fill_(float("nan"))

    monkeypatch.setattr(comfy.ops, "cast_bias_weight", streaming_cast)
    monkeypatch.setattr(comfy.ops, "uncast_bias_weight", poison)
    return buffers


class Untouched:
    """What every run must leave as it was, weights included; `changed()` names what is not."""

    def __init__(self, model):
        self._model, self._before = model, self._look(model)
        dirt = [n for n in ("hooks", "instance forwards", "in_training", "interrupt flag") if self._before[n]]
        assert not dirt, f"an earlier test left behind: {dirt}"

    def changed(self) -> list[str]:
        after = self._look(self._model)
        return [name for name, value in self._before.items() if not same(value, after[name])]

    @staticmethod
    def _look(model):
        import comfy_kitchen

        network = model.model.diffusion_model
        weights = {**dict(network.named_parameters()), **dict(network.named_buffers())}
        return {
            "hooks": hook_count(network),
            "instance forwards": [path for path, module in network.named_modules() if "forward" in vars(module)],
            "identity of the weights": {name: id(weight) for name, weight in weights.items()},
            "values of the weights": {name: weight.clone() for name, weight in weights.items()},
            "kind of the weights": {n: (w.is_inference(), w.requires_grad, w.dtype) for n, w in weights.items()},
            "kernels of AnimateDiff": [id(vars(m)[SLOT]) for m in network.modules() if SLOT in vars(m)],
            "in_training": management.in_training,
            "interrupt flag": management.processing_interrupted(),
            "kitchen functions": [getattr(comfy_kitchen, n, None) for names in FUSED_KERNELS.values() for n in names],
            "torch RNG": torch.get_rng_state(),
            "python RNG": random.getstate(),
            "autograd": (torch.is_inference_mode_enabled(), torch.is_grad_enabled()),
            "model options": str(model.model_options),
            "wrappers": {k: {key: len(v) for key, v in w.items()} for k, w in model.wrappers.items()},
            "patches": model.patches_uuid,
        }


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return a == b


def hook_count(network):
    stores = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, store)) for module in network.modules() for store in stores)


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())
