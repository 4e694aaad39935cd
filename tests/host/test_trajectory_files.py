"""Trajectory files: what comes back, what is refused, and what a file may not do."""

import hashlib
import json
import logging
import os
import struct
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import comfy.hooks
import comfy.lora
import comfy.model_management
import comfy.model_sampling
import comfy.samplers
import folder_paths
import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file
from spacetime_edit.core.parametrization import NoiseSpace
from spacetime_edit.core.trajectory import Trajectory
from spacetime_edit.host import fingerprint, trajectory_files
from spacetime_edit.host.inversion import invert
from spacetime_edit.host.loaders.unet3d import EMBEDDED, load_folder
from spacetime_edit.host.sampling import TrajectorySampler
from spacetime_edit.host.trajectory_files import SUFFIX, file_path, list_files, load_trajectory, save_trajectory
from spacetime_edit.tests.host import support

FRAMES, SIDE, STEPS = 3, 8, 3
NAME = f"trajectories/clip_00001_{SUFFIX} [output]"


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """The host's input and output folders, of this test alone."""
    for name in ("input", "output"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(folder_paths, f"{name}_directory", str(tmp_path / name))
    return tmp_path


@pytest.fixture(scope="module")
def clip():
    return torch.randn(FRAMES, 4, SIDE, SIDE, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def source(tiny):
    with torch.inference_mode():
        return support.encode(tiny)


@pytest.fixture(scope="module")
def trajectory(tiny, clip, source):
    with torch.inference_mode():
        sigmas = comfy.samplers.calculate_sigmas(tiny.model.get_model_object("model_sampling"), "simple", STEPS)
        return invert(tiny.model, source, clip, sigmas, refinements=0)


@pytest.fixture
def saved(trajectory):
    """Path of the trajectory's file."""
    return save_trajectory(trajectory, "trajectories/clip")


def metadata_of(path):
    with safetensors.safe_open(path, "pt") as file:
        return file.metadata()


def rewrite(path, *, tensors=None, fingerprint=None, **metadata):
    """Changes what a file holds, as another program would write it."""
    old = metadata_of(path)
    if fingerprint is not None:
        old["fingerprint"] = json.dumps({**json.loads(old["fingerprint"]), **fingerprint})
    save_file({**load_file(path), **(tensors or {})}, path, {**old, **metadata})


def edit(trajectory, positive):
    guider = support.guider_of(trajectory.model, positive)
    empty = torch.zeros(trajectory.shape)
    return guider.sample(empty, empty, TrajectorySampler(trajectory), trajectory.sigmas, disable_pbar=True, seed=7)


# what comes back


def test_a_loaded_trajectory_edits_bit_for_bit_like_the_saved_one(tiny, trajectory, clip, saved, source):
    loaded = load_trajectory(NAME, tiny.model, support.encode(tiny), clip)
    assert torch.equal(loaded.latents, trajectory.latents) and torch.equal(loaded.sigmas, trajectory.sigmas)
    assert loaded.space is trajectory.space and loaded.model is tiny.model
    positive = support.encode(tiny, support.EDIT_PROMPT)
    assert torch.equal(edit(loaded, positive), edit(trajectory, positive))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_latents_keep_their_dtype(tiny, trajectory, source, dtype):
    latents = trajectory.latents.to(dtype)
    save_trajectory(replace(trajectory, latents=latents), "trajectories/clip")
    loaded = load_trajectory(NAME, tiny.model, source).latents
    assert loaded.dtype is dtype and torch.equal(loaded, latents)


def test_loaded_latents_outlive_their_file(tiny, trajectory, saved, source):
    loaded = load_trajectory(NAME, tiny.model, source)
    saved.write_bytes(b"\0" * saved.stat().st_size)
    assert torch.equal(loaded.latents, trajectory.latents)


def test_the_file_holds_little_beside_the_latents(tiny, source):
    """50 steps at Zeroscope's size."""
    latents = torch.zeros(51, 16, 4, 40, 72)
    path = save_trajectory(
        Trajectory(latents, torch.linspace(14, 0, 51), NoiseSpace.VE, tiny.model, source), "trajectories/clip"
    )
    assert latents.nbytes < path.stat().st_size <= latents.nbytes + 64 * 2**10
    assert load_trajectory(NAME, tiny.model, source).shape == (16, 4, 40, 72)


def test_the_metadata_is_what_the_format_says(tiny, trajectory, saved, source):
    metadata = metadata_of(saved)
    assert (metadata["format"], metadata["version"]) == ("spacetime_edit.trajectory", "1")
    facts = json.loads(metadata["fingerprint"])
    assert facts["base_model"] == "UNet3DVideoModel" and facts["diffusion_model"] == "SpacetimeUNet3D"
    assert (facts["space"], facts["inflation"], facts["shape"]) == ("VE", "none", [FRAMES, 4, SIDE, SIDE])
    sampling = tiny.model.model.model_sampling
    assert facts["sigma_range"] == [float(sampling.sigma_min), float(sampling.sigma_max)]
    clean = trajectory.latents[-1]
    plain = hashlib.sha256(f"{tuple(clean.shape)}".encode() + clean.numpy().tobytes()).hexdigest()
    assert facts["clip"] == plain and len(facts["weights"]) == 16


def test_files_are_numbered_and_listed_by_folder(trajectory, folders):
    for prefix in ("trajectories/clip", "trajectories/clip", "top"):
        save_trajectory(trajectory, prefix)
    (folders / "input" / f"given{SUFFIX}").touch()
    (folders / "output" / "lora.safetensors").touch()
    assert list_files() == [
        f"given{SUFFIX}",
        f"top_00001_{SUFFIX} [output]",
        NAME,
        f"trajectories/clip_00002_{SUFFIX} [output]",
    ]
    assert all(file_path(name).is_file() for name in list_files())


def test_a_file_in_the_input_folder_loads_too(tiny, trajectory, saved, source, folders):
    os.replace(saved, folders / "input" / f"moved{SUFFIX}")
    loaded = load_trajectory(f"moved{SUFFIX}", tiny.model, source)
    assert torch.equal(loaded.latents, trajectory.latents)


def test_a_write_that_fails_leaves_no_file(trajectory, folders, monkeypatch):
    def full(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(trajectory_files, "save_file", full)
    with pytest.raises(OSError, match="no space left"):
        save_trajectory(trajectory, "trajectories/clip")
    assert [path for path in folders.rglob("*") if path.is_file()] == []


def test_saving_and_loading_leave_the_model_alone(tiny, trajectory, source):
    untouched = support.Untouched(tiny.model)
    save_trajectory(trajectory, "trajectories/clip")
    load_trajectory(NAME, tiny.model, source)
    assert untouched.changed() == []


# the model's fingerprint


def with_lora(model, strength=1.0):
    """A clone with a LoRA on every weight that the fingerprint samples, loaded into memory by the host."""
    weights = {k: w for k, w in model.model_state_dict().items() if k.startswith("diffusion_model.") and w.ndim == 2}
    state = {}
    for key, weight in weights.items():
        name = key.removesuffix(".weight")
        state[f"{name}.lora_up.weight"] = torch.ones(weight.shape[0], 1)
        state[f"{name}.lora_down.weight"] = torch.ones(1, weight.shape[1])
    clone = model.clone()
    clone.add_patches(comfy.lora.load_lora(state, comfy.lora.model_lora_keys_unet(model.model, {})), strength)
    return clone


def test_a_lora_of_the_inversion_is_missed_by_name(tiny, source, clip):
    """On the model, or on the prompt by a hook; of another strength, or at another time."""
    hooks = lambda strength, start=0.0: hooked(source, strength, start)  # noqa: E731
    kinds = {
        "none": (tiny.model, source),
        "lora": (with_lora(tiny.model), source),
        "weaker": (with_lora(tiny.model, 0.5), source),
        "hook": (tiny.model, hooks(1.0)),
        "weaker hook": (tiny.model, hooks(0.5)),
        "later hook": (tiny.model, hooks(1.0, 0.5)),
    }
    prints = {name: fingerprint.Fingerprint.of(*kind, clip) for name, kind in kinds.items()}
    assert prints["none"].loras == "none" and len({own.loras for own in prints.values()}) == len(kinds)
    for name, (model, prompt) in kinds.items():
        assert prints[name] == fingerprint.Fingerprint.of(model.clone(), prompt, clip)
        for other, saved in prints.items():
            found = [
                d for d in fingerprint.differences(saved, clip, model, prompt, None) if d.field.startswith("LoRAs")
            ]
            assert len(found) == (name != other) and not any(d.final for d in found)


def hooked(conditioning, strength, start):
    """As Create Hook LoRA makes it, in force from `start`."""
    hook, frames = comfy.hooks.WeightHook(strength_model=strength, strength_clip=0.0), comfy.hooks.HookKeyframeGroup()
    hook.weights, hook.need_weight_init = {"diffusion_model.a.weight": ("diff", (torch.ones(2, 2),))}, False
    frames.add(comfy.hooks.HookKeyframe(strength=1.0, start_percent=start))
    hook.hook_keyframe, group = frames, comfy.hooks.HookGroup()
    group.add(hook)
    return comfy.hooks.set_hooks_for_conditioning(conditioning, group)


class Packed(torch.Tensor):
    """As the weights of ComfyUI-GGUF: bytes, whose shape is said to be that of the weight."""

    @property
    def shape(self):
        return self.logical


def test_packed_weights_agree_with_themselves_alone(clip):
    def packed_copy(seed):
        copy = support.sd15_model()
        for module in copy.model.diffusion_model.modules():
            if isinstance(module, torch.nn.Linear):
                generator = torch.Generator().manual_seed(seed)
                blocks = torch.randint(256, (len(module.weight), 7), dtype=torch.uint8, generator=generator)
                logical, blocks = module.weight.shape, blocks.as_subclass(Packed)
                blocks.logical = logical
                module.weight = torch.nn.Parameter(blocks, requires_grad=False)
                module.weight.logical = logical
        return copy

    conditioning = support.sd15_conditioning()
    assert fields(packed_copy(0), packed_copy(0), conditioning, clip) == []
    for other in (packed_copy(1), support.sd15_model()):
        (found,) = fields(packed_copy(0), other, conditioning, clip)
        assert found.startswith("weights (")


def test_a_lora_does_not_change_the_weights_of_the_fingerprint_loaded_or_not(tiny):
    before = fingerprint.weight_samples(tiny.model)
    model = with_lora(tiny.model)
    assert fingerprint.weight_samples(model) == before
    comfy.model_management.load_models_gpu([model])
    patched = SimpleNamespace(model=model.model, backup={}, hook_backup={})
    assert fingerprint.weight_samples(patched) != before, "the host did not patch the weights in place"
    assert fingerprint.weight_samples(model) == before
    patched.hook_backup = {key: (kept.weight, kept.weight.device) for key, kept in model.backup.items()}
    assert fingerprint.weight_samples(patched) == before
    model.detach()
    assert fingerprint.weight_samples(model) == before


def cast_copy(model, dtypes):
    """The same weights, rounded to one dtype after the other."""
    copy = support.sd15_model()
    for name, weight in model.model.diffusion_model.named_parameters():
        weight = weight.clone()
        for dtype in dtypes:
            weight = weight.to(dtype)
        owner, _, attribute = name.rpartition(".")
        setattr(
            copy.model.diffusion_model.get_submodule(owner), attribute, torch.nn.Parameter(weight, requires_grad=False)
        )
    return copy


def fields(saved_by, given, conditioning, clean):
    saved = fingerprint.Fingerprint.of(saved_by, conditioning, clean)
    return [difference.field for difference in fingerprint.differences(saved, clean, given, conditioning, None)]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ([torch.float16], [torch.float32]),
        ([torch.float16], [torch.bfloat16]),
        ([torch.float16], [torch.float16, torch.bfloat16]),
        ([torch.float16], [torch.float8_e4m3fn]),
        ([torch.float8_e4m3fn], [torch.bfloat16]),
        ([torch.float8_e5m2], [torch.float8_e4m3fn]),
    ],
)
def test_a_copy_in_another_dtype_is_the_same_model(clip, first, second):
    model = support.sd15_model()
    conditioning = support.sd15_conditioning()
    assert fields(cast_copy(model, first), cast_copy(model, second), conditioning, clip) == []


def test_the_fp8_copy_of_the_embedded_model_takes_its_trajectory(trajectory, saved, source, clip):
    copy = load_folder(EMBEDDED, weight_dtype="fp8_e4m3fn")[0]
    assert torch.equal(load_trajectory(NAME, copy, source, clip).latents, trajectory.latents)


def test_weights_quantised_by_the_host_are_the_same_model(clip):
    from comfy.quant_ops import QuantizedTensor

    model, copy, conditioning = support.sd15_model(), support.sd15_model(), support.sd15_conditioning()
    for module in copy.model.diffusion_model.modules():
        if isinstance(module, torch.nn.Linear):
            quantised = QuantizedTensor.from_float(module.weight, "TensorCoreFP8E4M3Layout")
            module.weight = torch.nn.Parameter(quantised, requires_grad=False)
    assert fields(model, copy, conditioning, clip) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_fine_tune_has_other_weights(clip, dtype):
    """A relative change of 3 %."""
    model, conditioning = support.sd15_model(), support.sd15_conditioning()
    tuned = cast_copy(model, [dtype])
    for weight in tuned.model.diffusion_model.parameters():
        weight.copy_(weight.float() * 1.03)
    (field,) = fields(model, tuned, conditioning, clip)
    assert field.startswith("weights (") and "of 16 samples" in field


# what does not belong to the file


@pytest.fixture
def other():
    """An SD 1.5 network with its own prompt and a clip of four frames."""
    return support.sd15_model(), support.sd15_conditioning(), torch.ones(4, 4, SIDE, SIDE)


def with_sampling(model, kind, **settings):
    class Config:
        sampling_settings = settings

    host = comfy.model_sampling
    schedule = host.ModelSamplingDiscreteFlow if kind is host.CONST else host.ModelSamplingDiscrete
    clone = model.clone()
    clone.add_object_patch("model_sampling", type("Sampling", (schedule, kind), {})(Config()))
    return clone


def error_of(*args, **options):
    with pytest.raises(ValueError) as caught:
        load_trajectory(NAME, *args, **options)
    return str(caught.value)


@pytest.mark.parametrize("use_anyway", [False, True])
def test_one_error_names_every_field_that_differs(saved, other, use_anyway):
    message = error_of(*other, use_anyway=use_anyway)
    assert message.startswith(f"file: '{saved.name}' does not belong to what is connected:\n")
    listed = [line for line in message.splitlines() if line.startswith("- ")]
    beginnings = ("model class", "diffusion model class", "latent format", "weights (", "clip shape", "prompt")
    for begin in beginnings:
        assert sum(line.startswith(f"- {begin}") for line in listed) == 1, (begin, message)
    assert "- model class: UNet3DVideoModel in the file, BaseModel connected" in listed
    assert f"- clip shape: ({FRAMES}, 4, 8, 8) in the file, (4, 4, 8, 8) connected" in listed
    assert "use_anyway does not help with: model class" in message


@pytest.mark.parametrize(
    ("kind", "settings", "field"),
    [
        (comfy.model_sampling.CONST, {"shift": 3.0}, "noise space: VE in the file, RF connected"),
        (comfy.model_sampling.V_PREDICTION_DDPM, {}, "noise space: VE in the file, VP connected"),
        (comfy.model_sampling.EPS, {"linear_start": 0.0001, "linear_end": 0.5}, "sigmas of the model: "),
    ],
)
def test_another_noise_schedule_is_always_refused(tiny, saved, source, kind, settings, field):
    message = error_of(with_sampling(tiny.model, kind, **settings), source, use_anyway=True)
    assert f"- {field}" in message and "use_anyway does not help" in message


@pytest.mark.parametrize("what", ["prompt", "clip", "weights"])
def test_use_anyway_accepts_another_prompt_clip_or_fine_tune(tiny, trajectory, clip, saved, source, caplog, what):
    given = {"prompt": [tiny.model, support.encode(tiny, support.EDIT_PROMPT), clip], "clip": [tiny.model, source]}
    given["clip"].append(clip + 0.1)
    given["weights"] = [tiny.model, source, clip]
    if what == "weights":
        rewrite(saved, fingerprint={"weights": [[1.0, 1e-3]] * 16})
    message = error_of(*given[what])
    (listed,) = [line for line in message.splitlines() if line.startswith("- ")]
    assert listed.startswith(f"- {what}") and "or turn on use_anyway" in message
    with caplog.at_level(logging.WARNING, "spacetime_edit"):
        loaded = load_trajectory(NAME, *given[what], use_anyway=True)
    assert torch.equal(loaded.latents, trajectory.latents) and loaded.conditioning is given[what][1]
    assert listed in caplog.text


@pytest.mark.parametrize(("distance", "belongs"), [(0.9e-3, True), (1.1e-3, False), (float("nan"), False)])
def test_a_clip_may_differ_by_the_rounding_of_another_device(tiny, saved, source, clip, distance, belongs):
    """In the model's scale, where the tiny model's latents are clip * scale_factor."""
    latent = clip.clone()
    latent[1, 2, 3, 4] += distance / tiny.model.model.latent_format.scale_factor
    if belongs:
        load_trajectory(NAME, tiny.model, source, latent)
    else:
        assert "- clip: " in error_of(tiny.model, source, latent)


def test_an_empty_clip_is_compared_as_the_sampler_takes_it(source, tiny, trajectory):
    """The host does not shift a latent of zeros into the model's scale."""
    latents = trajectory.latents.clone()
    latents[-1] = 0
    save_trajectory(replace(trajectory, latents=latents), "trajectories/clip")
    load_trajectory(NAME, tiny.model, source, torch.zeros(trajectory.shape))


def test_positive_without_prompt(tiny, saved):
    assert error_of(tiny.model, []).startswith("positive: it holds no prompt; connect the CLIP Text Encode")


# bad files


def header(path):
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def with_header(path, change):
    entries, body = header(path)
    change(entries)
    text = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def declare_more(entries):
    start, end = entries["latents"]["data_offsets"]
    entries["latents"]["data_offsets"] = [start, end + 4 * 10**12]
    entries["latents"]["shape"][0] += 10**12


BYTES = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_bytes(b"not safetensors at all, but long enough to look"),
    "pickle": lambda path: torch.save({"latents": torch.ones(2, 3, 4, 8, 8)}, path),
    "truncated data": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "truncated header": lambda path: path.write_bytes(path.read_bytes()[:100]),
    "longer than declared": lambda path: path.write_bytes(path.read_bytes() + b"more"),
    "a header of exabytes": lambda path: path.write_bytes(struct.pack("<Q", 2**62) + b"{}"),
    "tensors larger than the file": lambda path: with_header(path, declare_more),
}


@pytest.mark.parametrize("damage", BYTES)
def test_damaged_files(tiny, saved, source, damage):
    BYTES[damage](saved)
    message = error_of(tiny.model, source)
    assert message.startswith(f"file: '{saved.name}' is damaged or not a safetensors file")
    assert message.endswith("save the trajectory again")


def lora_file(path):
    save_file({"lora_unet_x.lora_up.weight": torch.ones(4, 2)}, path, {"ss_network_dim": "2"})


def bare_file(path):
    save_file({"latents": torch.ones(3, 3, 4, 8, 8), "sigmas": torch.ones(3)}, path)


@pytest.mark.parametrize("write", [lora_file, bare_file])
def test_safetensors_of_something_else(tiny, saved, source, write):
    write(saved)
    assert error_of(tiny.model, source).startswith(f"file: '{saved.name}' holds something else than a trajectory")


def test_another_version(tiny, saved, source):
    rewrite(saved, version="2")
    assert "has version '2' of the format, this pack reads '1'; update the pack" in error_of(tiny.model, source)


LATENTS = torch.ones(STEPS + 1, FRAMES, 4, SIDE, SIDE)


@pytest.mark.parametrize(
    "tensors",
    [
        {"latents": LATENTS[0]},
        {"latents": LATENTS[:-1]},
        {"latents": LATENTS[:, :0]},
        {"latents": LATENTS.int()},
        {"latents": LATENTS.to(torch.float8_e4m3fn)},
        {"sigmas": torch.ones(STEPS + 1, 1)},
        {"extra": torch.ones(2)},
        {"latents": LATENTS[:1], "sigmas": torch.zeros(1)},
    ],
    ids=["dimensions", "a latent missing", "no frame", "integers", "fp8", "2-D sigmas", "one more", "no step"],
)
def test_tensors_that_are_no_trajectory(tiny, saved, source, tensors):
    rewrite(saved, tensors={name: tensor.contiguous() for name, tensor in tensors.items()})
    message = error_of(tiny.model, source)
    assert message.startswith(f"file: '{saved.name}' holds ") and "expected floating point latents" in message


def test_the_size_is_refused_by_the_header_alone(tiny, saved, source, monkeypatch):
    """A sparse file of 10 GiB that is whole in every other way."""
    entries, _ = header(saved)
    frames = 10 * 2**30 // (4 * (STEPS + 1) * 4 * SIDE * SIDE)
    sigmas, size = 4 * (STEPS + 1), 10 * 2**30
    entries["sigmas"]["data_offsets"], entries["latents"]["data_offsets"] = [0, sigmas], [sigmas, sigmas + size]
    entries["latents"]["shape"][1] = frames
    text = json.dumps(entries).encode()
    with open(saved, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + sigmas + size)
    assert "has 10240 MiB of latents, at most 8192 are read" in error_of(tiny.model, source)


def test_what_could_not_be_loaded_is_not_saved(trajectory, monkeypatch):
    monkeypatch.setattr(trajectory_files, "MAX_BYTES", 2**10)
    with pytest.raises(ValueError, match="^trajectory: it has 0 MiB, a file may have 0; invert fewer frames"):
        save_trajectory(trajectory, "trajectories/clip")


def spoiled(tensor, value):
    tensor = tensor.clone()
    tensor[1, 0, 0, 0, 0] = value
    return tensor


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_latents_that_are_not_finite(tiny, trajectory, saved, source, value):
    rewrite(saved, tensors={"latents": spoiled(trajectory.latents, value)})
    assert error_of(tiny.model, source).startswith("file: the latents hold NaN or infinity in")
    with pytest.raises(ValueError, match="^trajectory: the latents hold NaN or infinity; .* invert again"):
        save_trajectory(replace(trajectory, latents=spoiled(trajectory.latents, value)), "trajectories/clip")


@pytest.mark.parametrize(
    "sigmas", [[3, 2, 1, 0.5], [0, 1, 2, 3], [3, 1, 2, 0], [3, float("nan"), 1, 0], [float("inf"), 2, 1, 0], [0] * 4]
)
def test_sigmas_that_do_not_fall_to_0(tiny, trajectory, saved, source, sigmas):
    sigmas = torch.tensor(sigmas, dtype=torch.float32)
    rewrite(saved, tensors={"sigmas": sigmas})
    assert error_of(tiny.model, source).startswith("file: the sigmas do not fall to 0 in")
    with pytest.raises(ValueError, match="^trajectory: the sigmas do not fall to 0; .* invert again"):
        save_trajectory(replace(trajectory, sigmas=sigmas), "trajectories/clip")


def test_sigmas_clamped_at_the_top_belong_to_a_rectified_flow(trajectory):
    save_trajectory(replace(trajectory, sigmas=torch.tensor([0.999, 0.999, 0.5, 0.0])), "trajectories/clip")


def test_a_clean_latent_of_another_file(tiny, trajectory, saved, source):
    rewrite(saved, tensors={"latents": trajectory.latents + 1})
    assert "are not those of its fingerprint" in error_of(tiny.model, source)


def test_latents_of_another_layout_than_the_models(tiny, trajectory, source):
    """A whole file whose fingerprint claims this model for the latents of a video transformer."""
    latents = torch.ones(STEPS + 1, 1, 16, 2, SIDE, SIDE)
    save_trajectory(replace(trajectory, latents=latents), "trajectories/clip")
    assert "latent shape: (1, 16, 2, 8, 8) in the file, a model of 4 dimensions" in error_of(
        tiny.model, source, use_anyway=True
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        '{"shape": 3}',
        "[" * 50_000,
        '"' + "x" * 70_000 + '"',
    ],
    ids=["empty", "list", "null", "fields missing", "deep", "long"],
)
def test_a_fingerprint_that_is_none(tiny, saved, source, text):
    save_file(load_file(saved), saved, {**metadata_of(saved), "fingerprint": text})
    assert error_of(tiny.model, source).startswith(f"file: the fingerprint in '{saved.name}' is damaged (")


@pytest.mark.parametrize(
    "change",
    [
        {"weights": [[0.0, 1.0]] * 15},
        {"weights": [["x", 1.0]] * 16},
        {"weights": [[1.0]] * 16},
        {"sigma_range": [1.0]},
        {"sigma_range": 1.0},
        {"shape": [float("inf")]},
        {"shape": [None]},
    ],
    ids=str,
)
def test_a_fingerprint_with_wrong_values(tiny, saved, source, change):
    rewrite(saved, fingerprint=change)
    assert error_of(tiny.model, source).startswith(f"file: the fingerprint in '{saved.name}' is damaged (")


# paths


@pytest.mark.parametrize(
    "name",
    [
        "../secret" + SUFFIX,
        "../secret" + SUFFIX + " [output]",
        "../output/trajectories/clip_00001_" + SUFFIX,
        "trajectories/../trajectories/clip_00001_" + SUFFIX + " [output]",
        "..\\secret" + SUFFIX,
        "{tmp}/secret" + SUFFIX,
        "{tmp}/output/trajectories/clip_00001_" + SUFFIX + " [output]",
        "secret" + SUFFIX + " [temp]",
        "link/secret" + SUFFIX,
        "trajectories/clip.safetensors [output]",
        "nul\0" + SUFFIX,
        "",
        "[output]",
    ],
)
def test_names_that_leave_the_folders(tiny, saved, folders, source, name):
    (folders / f"secret{SUFFIX}").write_bytes(saved.read_bytes())
    (folders / "input" / "link").symlink_to(folders)
    name = name.replace("{tmp}", str(folders))
    with pytest.raises(ValueError, match="^file: .* is not the name of a trajectory; expected a .* without '..'"):
        load_trajectory(name, tiny.model, source)
    assert not [listed for listed in list_files() if "secret" in listed]


def test_a_file_that_is_not_there(tiny, saved, source):
    saved.unlink()
    assert error_of(tiny.model, source).startswith(f"file: {NAME!r} is not there; choose a file of Save Trajectory")


@pytest.mark.parametrize(
    "prefix", ["../clip", "a/../b", "{tmp}/clip", "{tmp}/output/clip", "link/clip", "a\\..\\b", ""]
)
def test_prefixes_that_leave_the_output_folder(trajectory, folders, prefix):
    (folders / "output" / "link").symlink_to(folders)
    with pytest.raises(ValueError, match="^filename_prefix: .* is not a name below ComfyUI's output folder; expected"):
        save_trajectory(trajectory, prefix.replace("{tmp}", str(folders)))
    assert [path for path in folders.rglob("*") if path.is_file()] == []
