"""Folders in diffusers layout: which there are, what their JSON files say, and their weights.

Nothing in a folder is trusted: class names come from a table, sizes are bounded, and tensor shapes are
compared with the architecture before a weight is read.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath

import comfy.utils
import folder_paths
import safetensors
import torch

EMBEDDED = "embedded tiny model"
EMBEDDED_PATH = Path(__file__).resolve().parents[2] / "assets" / "tiny_t2v"
WHERE_TO_GET = (
    "Download the folder damo-vilab/text-to-video-ms-1.7b, cerspense/zeroscope_v2_576w or showlab/show-1-base from "
    "the Hugging Face hub into models/diffusers."
)
WEIGHT_FILES = tuple(
    stem + variant
    for variant in (".safetensors", ".fp16.safetensors", ".bin", ".fp16.bin")
    for stem in ("diffusion_pytorch_model", "model", "pytorch_model")
)
PIECE = re.compile(r"(\w+)(\.fp16)?-(\d{5})-of-(\d{5})(\.fp16)?(\.safetensors|\.bin)")
CONFIG_FILES = {
    "unet": "config.json",
    "vae": "config.json",
    "text_encoder": "config.json",
    "scheduler": "scheduler_config.json",
    "tokenizer": "tokenizer_config.json",
}
PIXEL_CONFIG_FILES = {"unet": "config.json", "text_encoder": "config.json", "scheduler": "scheduler_config.json"}
"""Of a pixel-space model: without autoencoder, and the host has T5's tokenizer."""
PIXEL_BLOCKS = ("ResnetDownsampleBlock3D", "SimpleCrossAttnDownBlock3D")
CLASSES = {
    "unet": ("UNet3DConditionModel", "ShowOneUNet3DConditionModel"),
    "vae": ("AutoencoderKL",),
    "text_encoder": ("CLIPTextModel",),
    "pixel text_encoder": ("T5EncoderModel",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "scheduler": (
        "DDIMScheduler",
        "DDPMScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler",
        "EulerAncestralDiscreteScheduler",
        "EulerDiscreteScheduler",
        "PNDMScheduler",
        "UniPCMultistepScheduler",
    ),
}
SIZE_LIMITS = {
    "unet": {
        "attention_head_dim": 1024,
        "block_out_channels": 8192,
        "cross_attention_dim": 8192,
        "in_channels": 64,
        "layers_per_block": 8,
        "norm_num_groups": 1024,
        "out_channels": 64,
    },
    "vae": {
        "block_out_channels": 8192,
        "in_channels": 4,
        "latent_channels": 64,
        "layers_per_block": 8,
        "norm_num_groups": 1024,
        "out_channels": 4,
    },
    "text_encoder": {
        "hidden_size": 8192,
        "intermediate_size": 32768,
        "max_position_embeddings": 4096,
        "num_attention_heads": 256,
        "num_hidden_layers": 64,
        "vocab_size": 500_000,
    },
    "scheduler": {"num_train_timesteps": 100_000},
    "pixel unet": {
        "addition_embed_type_num_heads": 1024,
        "attention_head_dim": 1024,
        "block_out_channels": 8192,
        "cross_attention_dim": 8192,
        "encoder_hid_dim": 8192,
        "in_channels": 64,
        "layers_per_block": 8,
        "norm_num_groups": 1024,
        "out_channels": 64,
    },
    "pixel text_encoder": {
        "d_ff": 65536,
        "d_kv": 1024,
        "d_model": 8192,
        "num_heads": 256,
        "num_layers": 64,
        "vocab_size": 500_000,
    },
}
REQUIRED = {
    "unet": ("block_out_channels", "cross_attention_dim", "down_block_types", "up_block_types"),
    "vae": ("block_out_channels", "down_block_types", "up_block_types"),
    "text_encoder": (*SIZE_LIMITS["text_encoder"], "hidden_act"),
    "pixel unet": (
        *("block_out_channels", "cross_attention_dim", "down_block_types", "up_block_types"),
        *("encoder_hid_dim", "in_channels", "out_channels", "act_fn"),
    ),
    "pixel text_encoder": tuple(SIZE_LIMITS["pixel text_encoder"]),
}
BLOCK_TYPES = {
    "unet": ("CrossAttnDownBlock3D", "DownBlock3D", "CrossAttnUpBlock3D", "UpBlock3D"),
    "vae": ("DownEncoderBlock2D", "UpDecoderBlock2D"),
    "pixel unet": (*PIXEL_BLOCKS, "ResnetUpsampleBlock3D", "SimpleCrossAttnUpBlock3D"),
}
MAX_LEVELS = 8
MAX_TEXT_FILE = 32 * 2**20


class ModelFolderError(ValueError):
    """A model folder lacks a file, or a file is not what it should be. The message names the file."""


class ModelFolder:
    """A diffusers folder that is complete, names known classes and sizes within bounds, in whole files.

    path: the folder. Raises ModelFolderError naming the folder, the file and the offending entry.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        files = PIXEL_CONFIG_FILES if self.pixel else CONFIG_FILES
        for part, name in files.items():
            _check_config(self.file(part, name), f"pixel {part}" if self.pixel else part, self.config(part))
        for part in ("unet", "vae", "text_encoder"):
            for weights in self.weights_files(part) if part in files else ():
                read_shapes(weights)

    @cached_property
    def pixel(self) -> bool:
        """Whether the model works on pixels: Show-1's key frames."""
        blocks = self.config("unet").get("down_block_types")
        return isinstance(blocks, list) and any(name in PIXEL_BLOCKS for name in blocks)

    def file(self, *parts: str) -> Path:
        """Path of a file that must exist."""
        path = self.path.joinpath(*parts)
        if not path.is_file():
            raise ModelFolderError(f"model folder {self.path}: {'/'.join(parts)} is missing. {WHERE_TO_GET}")
        return path

    def config(self, part: str) -> dict:
        """The JSON object that describes one part, a key of `CONFIG_FILES`."""
        return read_json(self.file(part, CONFIG_FILES[part]))

    def weights_files(self, part: str) -> list[Path]:
        """The weights of one part, safetensors before `.bin`: one file, or all its numbered pieces."""
        found = (self.path / part / name for name in WEIGHT_FILES)
        path = next((candidate for candidate in found if candidate.is_file()), None)
        return self._pieces(part) if path is None else [path]

    def _pieces(self, part: str) -> list[Path]:
        whole: dict[tuple[str, str], dict[int, Path]] = {}
        for path in sorted((self.path / part).glob("*-of-*")):
            if match := PIECE.fullmatch(path.name):
                stem, before, index, count, after, suffix = match.groups()
                whole.setdefault((f"{stem}{before or after or ''}{suffix}", count), {})[int(index)] = path
        complete = [
            (name, pieces) for (name, count), pieces in whole.items() if set(pieces) == set(range(1, int(count) + 1))
        ]
        named = {name: [pieces[i] for i in sorted(pieces)] for name, pieces in complete if name in WEIGHT_FILES}
        chosen = next((named[name] for name in WEIGHT_FILES if name in named), None)
        if chosen is None:
            raise ModelFolderError(
                f"model folder {self.path}: {part} holds no weights (for example {part}/{WEIGHT_FILES[0]}). "
                f"{WHERE_TO_GET}"
            )
        return chosen


def list_folders() -> list[str]:
    """Names, below the host's `models/diffusers` roots, of the folders that hold a UNet3DConditionModel."""
    names = {
        Path(root, name).relative_to(base).as_posix()
        for base in folder_paths.get_folder_paths("diffusers")
        for root, folders, _ in _walk(base)
        for name in folders
        if _is_unet3d(Path(root, name))
    }
    return sorted(names)


def folder_path(name: str) -> Path:
    """The folder that a widget's `name` stands for: `EMBEDDED`, or a path below a `models/diffusers` root.

    Raises ModelFolderError for an absolute path, for `..`, and for a name that is in no root.
    """
    if name == EMBEDDED:
        return EMBEDDED_PATH
    relative = PurePosixPath(name.replace("\\", "/"))
    if not relative.parts or relative.is_absolute() or ".." in relative.parts or ":" in name:
        raise ModelFolderError(f"model name {name!r}: expected a folder below models/diffusers, without '..'")
    candidates = [Path(base, *relative.parts) for base in folder_paths.get_folder_paths("diffusers")]
    path = next((candidate for candidate in candidates if candidate.is_dir()), None)
    if path is None:
        raise ModelFolderError(f"model folder {name!r} is not in models/diffusers. {WHERE_TO_GET}")
    return path


def folder_stamp(path: Path) -> list[tuple[str, int, int]]:
    """Name, size and modification time of the files a folder is loaded from: equal stamps, equal files."""
    files = sorted(file for part in CONFIG_FILES for file in (path / part).glob("*") if file.is_file())
    stats = [(file.relative_to(path).as_posix(), file.stat()) for file in files]
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]


def read_json(path: Path) -> dict:
    """A JSON file that holds one object, at most 32 MiB."""
    if path.stat().st_size > MAX_TEXT_FILE:
        raise ModelFolderError(f"{path} is larger than {MAX_TEXT_FILE >> 20} MiB; expected a short JSON file")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ModelFolderError(f"{path} is not valid JSON: {error}. {WHERE_TO_GET}") from error
    if not isinstance(data, dict):
        raise ModelFolderError(f"{path}: expected a JSON object, found {type(data).__name__}")
    return data


def read_weights(
    paths: Sequence[Path], expected: Mapping[str, torch.Size], rename: Callable[[str], str | None] = lambda key: key
) -> dict[str, torch.Tensor]:
    """The tensors of one file, or of the pieces of one, after keys and shapes have been compared with the architecture.

    expected: key -> shape. rename: the file's key -> our key, or None to drop it.
    Raises ModelFolderError naming the file and the first key that is missing, unknown or of another shape.
    """
    shapes, weights = {}, {}
    for path in paths:
        shapes |= {rename(key): shape for key, shape in read_shapes(path).items() if rename(key) is not None}
    _compare(paths[0], expected, shapes)
    for path in paths:
        state = comfy.utils.load_torch_file(str(path)) if path.suffix == ".safetensors" else _load_bin(path)
        for key, tensor in state.items():
            if rename(key) is None:
                continue
            if not tensor.is_floating_point():
                raise ModelFolderError(f"{path}: key {key!r} is {tensor.dtype}; expected floating point weights")
            weights[rename(key)] = tensor
    return weights


def _walk(base: str) -> Iterator[tuple[str, list[str], list[str]]]:
    """`os.walk` four levels deep that follows links and does not enter model folders."""
    for root, folders, files in os.walk(base, followlinks=True):
        yield root, folders, files
        deep = len(Path(root).relative_to(base).parts) >= 3
        folders[:] = [] if deep else [name for name in folders if not Path(root, name, "unet").is_dir()]


def _is_unet3d(path: Path) -> bool:
    config = path / "unet" / "config.json"
    if not config.is_file():
        return False
    try:
        return read_json(config).get("_class_name") in CLASSES["unet"]
    except ModelFolderError:
        return False


def _class_name(part: str, config: dict) -> object:
    if part == "tokenizer":
        return config.get("tokenizer_class", "CLIPTokenizer")
    if part.endswith("text_encoder"):
        architectures = config.get("architectures")
        return architectures[0] if isinstance(architectures, list) and architectures else None
    return config.get("_class_name")


def _check_config(path: Path, part: str, config: dict) -> None:
    name, classes = _class_name(part, config), _rule(CLASSES, part, ())
    if name not in classes:
        allowed = " or ".join(classes)
        raise ModelFolderError(f"{path} names the class {name!r}; this loader reads {allowed}. {WHERE_TO_GET}")
    for key in _rule(REQUIRED, part, ()):
        if config.get(key) is None:
            raise ModelFolderError(f"{path}: entry {key!r} is missing. {WHERE_TO_GET}")
    for key, limit in _rule(SIZE_LIMITS, part, {}).items():
        _check_size(path, key, config.get(key), limit)
    for key in ("down_block_types", "up_block_types") if part in BLOCK_TYPES else ():
        _check_blocks(path, key, config[key], BLOCK_TYPES[part], len(config["block_out_channels"]))


def _rule(table: dict, part: str, default):
    """The row of a part; of a part of a pixel-space model that has no row of its own, that of any model."""
    return table.get(part, table.get(part.removeprefix("pixel "), default))


def _check_size(path: Path, key: str, value: object, limit: int) -> None:
    """An int, a list of at most eight ints, or None for the class's default; each int in 1..limit."""
    if value is None:
        return
    values = value if isinstance(value, list) else [value]
    if key == "block_out_channels" and not isinstance(value, list):
        raise ModelFolderError(f"{path}: {key} is {value!r}; expected a list")
    fits = all(type(number) is int and 1 <= number <= limit for number in values)
    if not fits or not 1 <= len(values) <= MAX_LEVELS:
        raise ModelFolderError(f"{path}: {key} is {value!r}; expected whole numbers from 1 to {limit}")


def _check_blocks(path: Path, key: str, value: object, allowed: tuple[str, ...], count: int) -> None:
    if not isinstance(value, list) or len(value) != count:
        raise ModelFolderError(f"{path}: {key} is {value!r}; expected {count} block names, one per block_out_channels")
    for name in value:
        if name not in allowed:
            raise ModelFolderError(f"{path}: {key} names the block {name!r}; this loader reads {', '.join(allowed)}")


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Key -> shape, of a safetensors file from its header only. ModelFolderError for a file that is damaged."""
    if path.suffix != ".safetensors":
        return {key: tuple(tensor.shape) for key, tensor in _load_bin(path).items()}
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except safetensors.SafetensorError as error:
        raise _unreadable(path, error) from error


def _load_bin(path: Path) -> dict[str, torch.Tensor]:
    """A `.bin` or `.pt` file, memory-mapped, tensors only; of a training checkpoint the averaged weights ("ema")."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise _unreadable(path, error) from error
    if isinstance(state, dict) and isinstance(state.get("ema"), dict):
        state = state["ema"]
    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise ModelFolderError(f"{path}: expected a dictionary of tensors. {WHERE_TO_GET}")
    return state


def _unreadable(path: Path, error: Exception) -> ModelFolderError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return ModelFolderError(f"{path} is damaged or incomplete ({reason}). Download it again. {WHERE_TO_GET}")


def _compare(path: Path, expected: Mapping[str, torch.Size], found: Mapping[str, tuple[int, ...]]) -> None:
    for key, shape in expected.items():
        if key not in found:
            raise ModelFolderError(f"{path}: key {key!r} is missing; the file does not fit its config.json")
        if tuple(shape) != tuple(found[key]):
            raise ModelFolderError(
                f"{path}: key {key!r} has shape {tuple(found[key])}; its config.json needs {tuple(shape)}"
            )
    for key in found:
        if key not in expected:
            raise ModelFolderError(f"{path}: key {key!r} is unknown; the file does not fit its config.json")
