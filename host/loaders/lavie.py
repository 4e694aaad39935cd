"""LaVie's base model (one file, `lavie_base.pt` or the same as safetensors) as a MODEL.

Text encoder and autoencoder are those of Stable Diffusion 1.x, which the host loads. Latents are frames in the batch,
[F,4,h,w]; a batch is one clip.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path

import comfy.latent_formats
import comfy.model_base
import comfy.utils
import folder_paths

from .comfy_ops import shapes
from .diffusers_folder import ModelFolderError, read_shapes, read_weights
from .unet3d import UNet3DConfig, patcher_of

log = logging.getLogger("spacetime_edit")

WHERE_TO_GET = "Download lavie_base.pt from Vchitect/LaVie on the Hugging Face hub into models/diffusion_models."
SCHEDULE = {"beta_schedule": "sqrt_linear", "linear_start": 0.0001, "linear_end": 0.02, "timesteps": 1000}
"""Betas linear from 1e-4 to 0.02, which the host calls sqrt_linear."""
EPS = comfy.model_base.ModelType.EPS
CLIP_NORM = re.compile(r"((?:\.norm[12]|^conv_norm_out))\.(weight|bias)$")


def list_files() -> list[str]:
    """Names in the host's `models/diffusion_models`."""
    return folder_paths.get_filename_list("diffusion_models")


def file_path(name: str) -> Path:
    """The file that a widget's `name` stands for; ModelFolderError where there is none."""
    path = folder_paths.get_full_path("diffusion_models", name)
    if path is None:
        raise ModelFolderError(f"model name {name!r} is not in models/diffusion_models. {WHERE_TO_GET}")
    return Path(path)


def fingerprint(name: str) -> tuple[int, int]:
    """Changes when the file behind a widget's `name` does."""
    stat = file_path(name).stat()
    return stat.st_size, stat.st_mtime_ns


def load_lavie(path: str | Path, *, weight_dtype: str = "default", disable_dynamic: bool = False):
    """The file's network as a ModelPatcher.

    weight_dtype: as in `unet3d.load_folder`. Raises ModelFolderError naming the file and what it holds instead.
    """
    from .lavie_model import build, config_of

    path = Path(path)
    found = {_own_key(key): shape for key, shape in read_shapes(path).items() if _own_key(key) is not None}
    if not any(".attn_temp." in key for key in found):
        raise ModelFolderError(f"{path}: it is no LaVie base model: {_described(found)}. {WHERE_TO_GET}")
    try:
        config = config_of(found)
    except KeyError as error:
        raise ModelFolderError(f"{path}: it is no LaVie base model: it lacks {error}. {WHERE_TO_GET}") from error
    try:
        net = build(config)
    except ValueError as error:
        raise ModelFolderError(f"{path}: no LaVie base model has these sizes: {error}. {WHERE_TO_GET}") from error
    weights = read_weights([path], shapes(net), _own_key)
    model_config = UNet3DConfig(dict(SCHEDULE), comfy.latent_formats.SD15())
    reload = reload_lavie, (str(path), weight_dtype)
    patcher = patcher_of(net, weights, model_config, EPS, weight_dtype, reload, disable_dynamic=disable_dynamic)
    log.info("loaded %s: diffusion model in %s", path.name, patcher.model.get_dtype())
    return patcher


def reload_lavie(path: str, weight_dtype: str, disable_dynamic: bool = False):
    """A freshly loaded patcher, for clones that may share no weights (training nodes, several GPUs)."""
    return load_lavie(path, weight_dtype=weight_dtype, disable_dynamic=disable_dynamic)


def _own_key(key: str) -> str | None:
    """Norms that see the clip are wrapped; rotary frequencies are constants."""
    if "rotary_emb" in key:
        return None
    inside = ".transformer_blocks." in key
    return key if inside else CLIP_NORM.sub(r"\1.norm.\2", key)


def _described(found: dict[str, tuple[int, ...]]) -> str:
    """What a file holds that has no attention over time."""
    if not found:
        return "it holds no tensors"
    if any(key.startswith("down_blocks.") for key in found):
        return "its U-Net has no attention over time (attn_temp)"
    return f"it holds {len(found)} tensors such as {sorted(found)[0]!r}"
