"""The loader of diffusers folders, against plain diffusers and transformers, and against damaged folders."""

import json
import shutil
from pathlib import Path

import comfy.lora
import comfy.model_management
import comfy.samplers
import diffusers
import folder_paths
import nodes
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from spacetime_edit.host.loaders import unet3d
from spacetime_edit.host.loaders.autoencoder import load_vae
from spacetime_edit.host.loaders.clip_text import load_clip
from spacetime_edit.host.loaders.diffusers_folder import EMBEDDED_PATH, ModelFolder, ModelFolderError

FRAMES, SIDE = 8, 16
COLORS = ("red", "green", "blue", "yellow")
PROMPT = "a red circle on a gray background"
UNET_FILE = "unet/diffusion_pytorch_model.safetensors"
ATTENTION = "diffusion_model.up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight"
TEMPORAL_CONV = "diffusion_model.down_blocks.0.temp_convs.0.conv1.2.weight"


@pytest.fixture(scope="module")
def plain() -> diffusers.UNet3DConditionModel:
    """The embedded UNet as diffusers loads it, in fp32."""
    with torch.inference_mode():
        return plain_unet(load_file(EMBEDDED_PATH / UNET_FILE))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the embedded folder, to damage."""
    return Path(shutil.copytree(EMBEDDED_PATH, tmp_path / "model"))


def plain_unet(weights: dict[str, torch.Tensor]) -> diffusers.UNet3DConditionModel:
    net = diffusers.UNet3DConditionModel.from_config(config("unet"))
    net.load_state_dict({key: tensor.float() for key, tensor in weights.items()})
    return net.eval()


def config(part: str, name: str = "config.json") -> dict:
    return json.loads((EMBEDDED_PATH / part / name).read_text())


def noise(rows: int, height: int = SIDE, width: int = SIDE) -> torch.Tensor:
    return torch.randn(rows, 4, height, width)


def encode(tiny, prompt: str = PROMPT) -> torch.Tensor:
    """Conditioning [1,24,64]."""
    return nodes.CLIPTextEncode().encode(tiny.clip, prompt)[0][0][0]


def predict(model, x: torch.Tensor, context: torch.Tensor, chunks: int = 1, time: float = 400.0, **options):
    """One call of the diffusion model as the host makes it; context [1 or rows,L,C]."""
    options = {"cond_or_uncond": list(range(chunks)), **options}
    dtype = model.model.get_dtype_inference()
    context = context.expand(x.shape[0], -1, -1).to(dtype)
    times = torch.full((x.shape[0],), time)
    net = model.model.diffusion_model
    return net(x.to(dtype), times, context=context, transformer_options=options).float()


def predict_plain(net, x: torch.Tensor, context: torch.Tensor, time: float = 400.0) -> torch.Tensor:
    """diffusers' own call for one clip [F,4,h,w] and one prompt [1,L,C]."""
    return net(x.movedim(0, 1)[None], torch.tensor([time]), context).sample[0].movedim(1, 0)


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def load_with(weight_dtype: str):
    return unet3d.load_model(ModelFolder(EMBEDDED_PATH), weight_dtype=weight_dtype)


# the diffusion model


def test_two_chunks_equal_diffusers(tiny, plain):
    x, contexts = noise(2 * FRAMES), torch.cat([encode(tiny, PROMPT), encode(tiny, "")])
    got = predict(tiny.model, x, contexts.repeat_interleave(FRAMES, 0), chunks=2)
    want = [predict_plain(plain, clip, context[None]) for clip, context in zip(x.chunk(2), contexts, strict=True)]
    assert difference(got, torch.cat(want)) <= 1e-5


@pytest.mark.parametrize(("frames", "height", "width"), [(1, 16, 16), (5, 18, 14), (3, 7, 9)])
def test_any_size_equals_diffusers(tiny, plain, frames, height, width):
    x, context = noise(frames, height, width), encode(tiny)
    assert difference(predict(tiny.model, x, context), predict_plain(plain, x, context)) <= 1e-5


def test_a_batch_of_chunks_equals_single_calls(tiny):
    x, context = noise(2 * FRAMES), encode(tiny)
    split = torch.cat([predict(tiny.model, clip, context) for clip in x.chunk(2)])
    assert difference(predict(tiny.model, x, context, chunks=2), split) <= 1e-5


def test_several_clips_in_a_batch(tiny):
    x, context = noise(8), encode(tiny)
    split = torch.cat([predict(tiny.model, clip, context) for clip in x.chunk(2)])
    assert difference(predict(tiny.model, x, context, ste_frames=4), split) <= 1e-5
    assert difference(predict(tiny.model, x, context), split) > 1e-2


def test_one_prompt_per_frame(tiny, plain):
    x, contexts = noise(4), torch.cat([encode(tiny, f"a {color} circle") for color in COLORS])

    def each_frame(module, args, kwargs):
        given = kwargs.get("encoder_hidden_states")
        return args, kwargs if given is None else {**kwargs, "encoder_hidden_states": contexts}

    blocks = [*plain.down_blocks, plain.mid_block, *plain.up_blocks]
    hooks = [block.register_forward_pre_hook(each_frame, with_kwargs=True) for block in blocks]
    want = predict_plain(plain, x, contexts[:1])
    for hook in hooks:
        hook.remove()
    assert difference(predict(tiny.model, x, contexts), want) <= 1e-5


def test_rows_that_are_no_clips_are_refused(tiny):
    with pytest.raises(ValueError, match="9 latent frames in 2 prompts"):
        predict(tiny.model, noise(9), encode(tiny), chunks=2)


def test_controlnet_is_refused(tiny):
    with pytest.raises(ValueError, match="no ControlNet"):
        tiny.model.model.diffusion_model(noise(1), torch.zeros(1), torch.zeros(1, 24, 64), control={})


def test_ksampler_ddim_equals_diffusers(tiny, plain):
    steps, cfg, samples = 4, 4.0, torch.zeros(FRAMES, 4, SIDE, SIDE)
    positive, negative = encode(tiny, PROMPT), encode(tiny, "")
    conds = [[positive, {}]], [[negative, {}]]
    got = nodes.common_ksampler(tiny.model, 1, steps, cfg, "ddim", "ddim_uniform", *conds, {"samples": samples})
    sampling = tiny.model.get_model_object("model_sampling")
    sigma = comfy.samplers.calculate_sigmas(sampling, "ddim_uniform", steps)[0]
    x = torch.randn(samples.shape, generator=torch.manual_seed(1)).movedim(0, 1)[None]
    x = x * sigma / (1 + sigma**2).sqrt()
    scheduler = diffusers.DDIMScheduler.from_config(config("scheduler", "scheduler_config.json"), set_alpha_to_one=True)
    scheduler.set_timesteps(steps)
    for time in scheduler.timesteps:
        both = plain(torch.cat([x, x]), time, torch.cat([negative, positive])).sample
        x = scheduler.step(both[:1] + cfg * (both[1:] - both[:1]), time, x).prev_sample
    want = x[0].movedim(1, 0) / config("vae")["scaling_factor"]
    assert relative(got[0]["samples"], want) <= 1e-4


def test_every_attention_reaches_the_override(tiny):
    seen = []

    def override(original, *args, transformer_options, **kwargs):
        seen.append((transformer_options["ste_unet3d"]["path"], transformer_options["ste_unet3d"]["kind"]))
        return original(*args, transformer_options=transformer_options, **kwargs)

    x, context = noise(2), encode(tiny)
    with_override = predict(tiny.model, x, context, optimized_attention_override=override)
    net = tiny.model.model.diffusion_model
    paths = {name for name, module in net.named_modules() if type(module).__name__ == "Attention"}
    assert len(seen) == len(paths) and {path for path, _ in seen} == paths
    assert {kind for _, kind in seen} == {"spatial", "cross", "temporal1", "temporal2"}
    assert torch.equal(with_override, predict(tiny.model, x, context))


# storage


@pytest.mark.parametrize("name", ["fp16", "bf16", "fp8_e4m3fn"])
def test_storage(tiny, name):
    """Predictions are those of diffusers with weights rounded so; fp8 leaves norms and biases as they are."""
    model, x, context = load_with(name), noise(2), encode(tiny)
    stored = unet3d.WEIGHT_DTYPES[name]
    assert model.model.get_dtype() == stored
    weights = load_file(EMBEDDED_PATH / UNET_FILE)
    rounded = {key: w if w.ndim == 1 and stored.itemsize == 1 else w.to(stored) for key, w in weights.items()}
    assert relative(predict(model, x, context), predict_plain(plain_unet(rounded), x, context)) <= 1e-5
    conds = [[context, {}]], [[context, {}]]
    out = nodes.common_ksampler(model, 0, 1, 4.0, "euler", "normal", *conds, {"samples": torch.zeros(2, 4, 16, 16)})
    assert out[0]["samples"].isfinite().all()


def test_norms_and_biases_stay_out_of_fp8():
    parameters = list(load_with("fp8_e4m3fn").model.diffusion_model.parameters())
    assert all((p.dtype == torch.float8_e4m3fn) == (p.ndim > 1) for p in parameters)


def test_clone_without_shared_weights(tiny):
    clone = tiny.model.clone(force_deepcopy=True)
    x, context = noise(2), encode(tiny)
    assert clone.model is not tiny.model.model
    assert torch.equal(predict(clone, x, context), predict(tiny.model, x, context))


def lora(model, keys: list[str], prefix: str) -> tuple[dict, dict]:
    """A LoRA of rank 2 in the kohya or generic naming, and the weight differences it stands for."""
    state, deltas = {}, {}
    for key in keys:
        weight = model.model_state_dict()[key]
        up, down = torch.randn(weight.shape[0], 2), torch.randn(2, weight[0].numel()) * 0.05
        path = key.removeprefix("diffusion_model.").removesuffix(".weight")
        name = prefix + (path.replace(".", "_") if prefix == "lora_unet_" else path)
        convolution = weight.ndim > 2
        state[name + ".lora_up.weight"] = up.reshape(*up.shape, 1, 1, 1) if convolution else up
        state[name + ".lora_down.weight"] = down.reshape(2, *weight.shape[1:])
        deltas[key.removeprefix("diffusion_model.")] = (up @ down).reshape(weight.shape)
    return state, deltas


@pytest.mark.parametrize("prefix", ["lora_unet_", "diffusion_model."])
def test_lora_by_key(tiny, prefix):
    state, deltas = lora(tiny.model, [ATTENTION, TEMPORAL_CONV], prefix)
    patches = comfy.lora.load_lora(state, comfy.lora.model_lora_keys_unet(tiny.model.model, {}))
    assert set(patches) == {ATTENTION, TEMPORAL_CONV}
    before = {key: tensor.clone() for key, tensor in tiny.model.model_state_dict().items()}
    weights = {key: tensor.float() for key, tensor in load_file(EMBEDDED_PATH / UNET_FILE).items()}
    merged = plain_unet({key: tensor + deltas.get(key, 0.0) for key, tensor in weights.items()})
    x, context = noise(2), encode(tiny)
    model = tiny.model.clone()
    model.add_patches(patches, 1.0)
    comfy.model_management.load_models_gpu([model])
    assert difference(predict(model, x, context), predict_plain(merged, x, context)) <= 1e-4
    model.detach()
    after = tiny.model.model_state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_low_vram_streams_every_layer(tiny):
    model, x, context = load_with("fp32"), noise(2), encode(tiny)
    model.patch_model(device_to=torch.device("cpu"), lowvram_model_memory=1)
    layers = [m for m in model.model.diffusion_model.modules() if hasattr(m, "comfy_cast_weights")]
    assert layers and all(layer.comfy_cast_weights for layer in layers)
    assert torch.equal(predict(model, x, context), predict(tiny.model, x, context))
    model.unpatch_model(torch.device("cpu"))


# CLIP and VAE


def hidden_state(path: Path, prompt: str, pad: str) -> torch.Tensor:
    """transformers' last hidden state for a prompt, padded to the full length."""
    tokenizer = transformers.CLIPTokenizer.from_pretrained(path / "tokenizer", pad_token=pad)
    encoder = transformers.CLIPTextModel.from_pretrained(path / "text_encoder", dtype=torch.float32).eval()
    length = encoder.config.max_position_embeddings
    tokens = tokenizer(prompt, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return encoder(tokens["input_ids"]).last_hidden_state


@pytest.mark.parametrize("prompt", [PROMPT, ""])
def test_clip_equals_transformers(tiny, prompt):
    conditioning = nodes.CLIPTextEncode().encode(tiny.clip, prompt)[0]
    want = hidden_state(EMBEDDED_PATH, prompt, "<|endoftext|>")
    assert difference(conditioning[0][0], want) <= 1e-5
    assert conditioning[0][1]["pooled_output"].isfinite().all()


def test_openclip_layout(folder):
    """23 layers, gelu, 49408 BPE tokens, "!" as padding, ids in the config that nobody uses: as in Zeroscope."""
    sizes = {"vocab_size": 49408, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 23}
    entries = {"num_attention_heads": 2, "hidden_act": "gelu", "eos_token_id": 2, "pad_token_id": 1}
    encoder = transformers.CLIPTextModel(transformers.CLIPTextConfig(**sizes, **entries)).eval()
    shutil.rmtree(folder / "text_encoder")
    encoder.save_pretrained(folder / "text_encoder")
    bpe = Path(nodes.__file__).parent / "comfy" / "sd1_tokenizer"
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copy(bpe / name, folder / "tokenizer" / name)
    (folder / "tokenizer" / "tokenizer.json").unlink()
    (folder / "tokenizer" / "special_tokens_map.json").write_text('{"pad_token": "!"}')
    clip = load_clip(ModelFolder(folder))
    got = clip.encode_from_tokens_scheduled(clip.tokenize("a cat, (in the snow)"))[0][0]
    assert clip.tokenize("a cat")["h"][0][-1][0] == 0
    assert relative(got, hidden_state(folder, "a cat, in the snow", "!")) <= 0.1  # the weight of the brackets
    got = clip.encode_from_tokens_scheduled(clip.tokenize("a cat in the snow"))[0][0]
    assert relative(got, hidden_state(folder, "a cat in the snow", "!")) <= 2e-3  # stored in fp16


def test_vae_equals_diffusers(tiny):
    vae = diffusers.AutoencoderKL.from_pretrained(EMBEDDED_PATH / "vae").eval()
    images = torch.rand(FRAMES, 64, 48, 3)
    latents = nodes.VAEEncode().encode(tiny.vae, images)[0]["samples"]
    want = vae.encode(images.movedim(-1, 1) * 2 - 1).latent_dist.mode()
    assert latents.shape == (FRAMES, 4, 16, 12) and difference(latents, want) <= 1e-4
    decoded = nodes.VAEDecode().decode(tiny.vae, {"samples": latents})[0]
    want = (vae.decode(want).sample / 2 + 0.5).clamp(0, 1).movedim(1, -1)
    assert decoded.shape == images.shape and difference(decoded, want) <= 1e-4


def test_vae_of_an_older_diffusers(folder):
    """Groups of 32, attention in the middle, and its keys as diffusers wrote them before 0.15."""
    sizes = {"block_out_channels": [32, 64], "norm_num_groups": 32, "mid_block_add_attention": True}
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    edit_json(folder / "vae/config.json", **sizes, **blocks)
    vae = diffusers.AutoencoderKL.from_config(json.loads((folder / "vae/config.json").read_text())).eval()
    weights = vae.state_dict()
    for new, old in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
        weights = {key.replace(f".{new}.", f".{old}."): tensor for key, tensor in weights.items()}
    save_file(weights, folder / "vae/diffusion_pytorch_model.safetensors")
    images = torch.rand(2, 16, 16, 3)
    want = vae.encode(images.movedim(-1, 1) * 2 - 1).latent_dist.mode()
    assert difference(load_vae(ModelFolder(folder)).encode(images), want) <= 1e-5


# folders


def edit_json(path: Path, **entries) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def edit_weights(path: Path, change) -> None:
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def rename_first(weights: dict[str, torch.Tensor]) -> None:
    weights["conv_in.other"] = weights.pop("conv_in.weight")


def reshape_first(weights: dict[str, torch.Tensor]) -> None:
    weights["conv_in.bias"] = torch.zeros(33)


DAMAGE = {
    "no config": (
        lambda f: (f / "unet/config.json").unlink(),
        "unet/config.json is missing.*zeroscope_v2_576w",
    ),
    "no weights": (
        lambda f: (f / "vae/diffusion_pytorch_model.safetensors").unlink(),
        "vae holds no weights",
    ),
    "no vocabulary": (lambda f: (f / "tokenizer/vocab.json").unlink(), "tokenizer/vocab.json is missing"),
    "cut weights": (lambda f: truncate(f / UNET_FILE), f"{UNET_FILE} is damaged or incomplete"),
    "cut text": (lambda f: truncate(f / "vae/config.json"), "vae/config.json is not valid JSON"),
    "class": (
        lambda f: edit_json(f / "unet/config.json", _class_name="UNet2DConditionModel"),
        "unet/config.json names the class 'UNet2DConditionModel'",
    ),
    "text class": (
        lambda f: edit_json(f / "text_encoder/config.json", architectures=["T5EncoderModel"]),
        "text_encoder/config.json names the class 'T5EncoderModel'",
    ),
    "block": (
        lambda f: edit_json(f / "unet/config.json", down_block_types=["DownBlockSpatioTemporal"] * 3),
        "unet/config.json: down_block_types names the block 'DownBlockSpatioTemporal'",
    ),
    "size": (
        lambda f: edit_json(f / "unet/config.json", cross_attention_dim=10**9),
        "cross_attention_dim is 10+;",
    ),
    "layers": (
        lambda f: edit_json(f / "vae/config.json", layers_per_block=10**6),
        "layers_per_block is 10+;",
    ),
    "groups": (
        lambda f: edit_json(f / "unet/config.json", norm_num_groups=7),
        "no UNet3DConditionModel has these",
    ),
    "schedule": (
        lambda f: edit_json(f / "scheduler/scheduler_config.json", beta_schedule="sigmoid"),
        "scheduler_config.json: beta_schedule 'sigmoid'",
    ),
    "key": (
        lambda f: edit_weights(f / UNET_FILE, rename_first),
        f"{UNET_FILE}: key 'conv_in.weight' is missing",
    ),
    "shape": (lambda f: edit_weights(f / UNET_FILE, reshape_first), r"key 'conv_in.bias' has shape \(33,\)"),
    "not the clip's": (
        lambda f: edit_json(f / "text_encoder/config.json", vocab_size=100),
        "text_encoder/model.safetensors: key 'text_model.embeddings.token_embedding.weight' has shape",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_folder(folder, kind):
    damage, message = DAMAGE[kind]
    damage(folder)
    with pytest.raises(ModelFolderError, match=message) as error:
        unet3d.load_folder(folder)
    assert str(folder) in str(error.value)


def test_bin_weights_are_read_without_pickled_code(folder, tiny):
    part = folder / "unet"
    state = load_file(folder / UNET_FILE)
    (folder / UNET_FILE).unlink()
    torch.save(state, part / "diffusion_pytorch_model.bin")
    x, context = noise(1), encode(tiny)
    model = unet3d.load_model(ModelFolder(folder))
    assert torch.equal(predict(model, x, context), predict(tiny.model, x, context))
    torch.save({"conv_in.weight": Path("anything")}, part / "diffusion_pytorch_model.bin")
    with pytest.raises(ModelFolderError, match=r"diffusion_pytorch_model.bin is damaged"):
        unet3d.load_folder(folder)


def test_names_in_the_widget(folder, monkeypatch):
    root = folder.parent
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "diffusers", ([str(root)], {"folder"}))
    shutil.copytree(folder, root / "collection" / "second")
    (root / "unrelated" / "unet").mkdir(parents=True)
    assert unet3d.list_folders() == ["collection/second", "model"]
    assert unet3d.folder_path("collection/second") == root / "collection" / "second"
    assert unet3d.folder_path(unet3d.EMBEDDED) == EMBEDDED_PATH


@pytest.mark.parametrize("name", ["../model", "a/../../b", "/etc", "C:\\models", "..\\model", "", "nowhere"])
def test_names_that_leave_the_folder(name):
    with pytest.raises(ModelFolderError, match="models/diffusers"):
        unet3d.folder_path(name)


def test_fingerprint_follows_the_files(folder, monkeypatch):
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "diffusers", ([str(folder.parent)], {"folder"}))
    before = unet3d.fingerprint("model")
    assert before == unet3d.fingerprint("model")
    edit_json(folder / "unet/config.json", sample_size=32)
    assert before != unet3d.fingerprint("model")
