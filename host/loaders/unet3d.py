"""Folders of the UNet3D family (ModelScope 1.7b, Zeroscope v2, the embedded one) and Show-1's as MODEL, CLIP, VAE.

Latents are frames in the batch, [F,4,h,w]; a batch is one clip. The UNet is diffusers' own class with
ComfyUI's layers. Show-1's key frame model works on pixels, [F,3,h,w] in -1..1, which the host's pixel-space VAE gives.
"""

from __future__ import annotations

import logging
import os

import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.model_management as management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.supported_models_base
import comfy.utils
import torch

from .autoencoder import latent_format, load_vae
from .clip_text import load_clip
from .comfy_ops import load_weights, replace_layers, shapes
from .diffusers_folder import (
    EMBEDDED,
    ModelFolder,
    ModelFolderError,
    folder_path,
    folder_stamp,
    list_folders,
    read_weights,
)
from .t5_text import load_t5

__all__ = [
    "EMBEDDED",
    "ModelFolderError",
    "UNet3DVideoModel",
    "WEIGHT_DTYPES",
    "fingerprint",
    "folder_path",
    "list_folders",
    "load_folder",
]

log = logging.getLogger("spacetime_edit")

WEIGHT_DTYPES = {
    "default": None,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8_e4m3fn": torch.float8_e4m3fn,
}
BETA_SCHEDULES = {  # diffusers' names -> the host's
    "scaled_linear": "linear",
    "linear": "sqrt_linear",
    "squaredcos_cap_v2": "cosine",
}
PREDICTIONS = {
    "epsilon": comfy.model_base.ModelType.EPS,
    "v_prediction": comfy.model_base.ModelType.V_PREDICTION,
}


def load_folder(path: str | os.PathLike, *, weight_dtype: str = "default"):
    """Load a diffusers folder.

    path: the folder, or `EMBEDDED`. Widget values pass through `folder_path` first.
    weight_dtype: storage of the diffusion model, a key of `WEIGHT_DTYPES`; "default" leaves it to the host.
    Returns (ModelPatcher, comfy.sd.CLIP, comfy.sd.VAE).
    Raises ModelFolderError naming the folder, the file and what is wrong with it, before it reads weights.
    """
    folder = ModelFolder(folder_path(path) if path == EMBEDDED else path)
    if folder.pixel:
        vae, clip = comfy.sd.VAE(sd={"pixel_space_vae": torch.tensor(1.0)}), load_t5(folder)
    else:
        vae, clip = load_vae(folder), load_clip(folder)
    model = load_model(folder, weight_dtype=weight_dtype)
    log.info("loaded %s: diffusion model in %s", folder.path.name, model.model.get_dtype())
    return model, clip, vae


def fingerprint(name: str) -> list[tuple[str, int, int]]:
    """Changes when a file of the folder behind a widget's `name` does."""
    return folder_stamp(folder_path(name))


def load_model(folder: ModelFolder, *, weight_dtype: str = "default", disable_dynamic: bool = False):
    """The folder's UNet as a ModelPatcher. Arguments and errors as in `load_folder`."""
    model_config = _model_config(folder)
    prediction = _prediction(folder)
    net = _build(folder)
    weights = read_weights(folder.weights_files("unet"), shapes(net))
    reload = reload_model, (str(folder.path), weight_dtype)
    return patcher_of(net, weights, model_config, prediction, weight_dtype, reload, disable_dynamic=disable_dynamic)


def patcher_of(
    net: torch.nn.Module,
    weights: dict[str, torch.Tensor],
    model_config: UNet3DConfig,
    prediction: comfy.model_base.ModelType,
    weight_dtype: str,
    reload: tuple,
    *,
    disable_dynamic: bool,
):
    """A network on the meta device and its weights as a ModelPatcher; reload: a function and its arguments."""
    storage, compute = _choose_dtypes(weights, model_config, weight_dtype)
    model_config.set_inference_dtype(storage, compute)
    replace_layers(net, comfy.ops.pick_operations(storage, compute, model_config=model_config), storage)
    load_weights(net, {key: tensor.to(_stored(tensor, storage, compute)) for key, tensor in weights.items()})
    net.storage_dtype = storage
    management.archive_model_dtypes(net)
    model = UNet3DVideoModel(model_config, prediction, net)
    kind = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    patcher = kind(model, management.get_torch_device(), management.unet_offload_device())
    patcher.cached_patcher_init = reload
    return patcher


def reload_model(path: str, weight_dtype: str, disable_dynamic: bool = False):
    """A freshly loaded patcher, for clones that may share no weights (training nodes, several GPUs)."""
    return load_model(ModelFolder(path), weight_dtype=weight_dtype, disable_dynamic=disable_dynamic)


class UNet3DConfig(comfy.supported_models_base.BASE):
    """What the host asks a model's config for: noise schedule, latent format, dtypes."""

    unet_extra_config = {}
    supported_inference_dtypes = [torch.float16, torch.bfloat16, torch.float32]

    def __init__(self, sampling: dict, latent: comfy.latent_formats.LatentFormat):
        super().__init__({"disable_unet_model_creation": True})
        self.sampling_settings, self.latent_format = sampling, latent


class PixelFormat(comfy.latent_formats.LatentFormat):
    """Pixels in -1..1 as latents; a preview shows them as they are."""

    latent_channels = 3
    spacial_downscale_ratio = 1

    def __init__(self):
        self.latent_rgb_factors = torch.eye(3).tolist()


class UNet3DVideoModel(comfy.model_base.BaseModel):
    """The host's model around one of the networks that are called with the frames in the batch."""

    def __init__(self, config: UNet3DConfig, prediction: comfy.model_base.ModelType, net: torch.nn.Module):
        super().__init__(config, prediction)
        self.diffusion_model = net

    def extra_conds(self, **kwargs) -> dict:
        """As the base, but prompts of unequal length run one by one, never repeated to a common length."""
        conds = super().extra_conds(**kwargs)
        if kwargs.get("cross_attn") is not None:
            conds["c_crossattn"] = comfy.conds.CONDRegular(kwargs["cross_attn"])
        return conds


def _build(folder: ModelFolder) -> torch.nn.Module:
    if folder.pixel:
        from .show1_model import build
    else:
        from .unet3d_model import build

    try:
        return build(folder.config("unet"))
    except (NotImplementedError, TypeError, ValueError) as error:
        path = folder.file("unet", "config.json")
        raise ModelFolderError(f"{path}: no UNet3DConditionModel has these sizes: {error}") from error


def _model_config(folder: ModelFolder) -> UNet3DConfig:
    path, schedule = folder.file("scheduler", "scheduler_config.json"), folder.config("scheduler")
    name = schedule.get("beta_schedule", "linear")
    if name not in tuple(BETA_SCHEDULES) or schedule.get("trained_betas") is not None:
        raise ModelFolderError(f"{path}: beta_schedule {name!r}; expected {' or '.join(BETA_SCHEDULES)}")
    settings = {
        "beta_schedule": BETA_SCHEDULES[name],
        "linear_start": schedule.get("beta_start", 0.0001),
        "linear_end": schedule.get("beta_end", 0.02),
        "timesteps": schedule.get("num_train_timesteps", 1000),
        "zsnr": bool(schedule.get("rescale_betas_zero_snr", False)),
    }
    start, end = settings["linear_start"], settings["linear_end"]
    if not all(isinstance(beta, float) for beta in (start, end)) or not 0 < start <= end < 1:
        raise ModelFolderError(f"{path}: beta_start {start!r} and beta_end {end!r}; expected 0 < start <= end < 1")
    return UNet3DConfig(settings, PixelFormat() if folder.pixel else latent_format(folder))


def _prediction(folder: ModelFolder) -> comfy.model_base.ModelType:
    name = folder.config("scheduler").get("prediction_type", "epsilon")
    if name not in tuple(PREDICTIONS):
        path = folder.file("scheduler", "scheduler_config.json")
        raise ModelFolderError(f"{path}: prediction_type {name!r}; expected {' or '.join(PREDICTIONS)}")
    return PREDICTIONS[name]


def _choose_dtypes(
    weights: dict[str, torch.Tensor], model_config: UNet3DConfig, weight_dtype: str
) -> tuple[torch.dtype, torch.dtype | None]:
    """Storage dtype, and the dtype to compute in (None: the same)."""
    supported = model_config.supported_inference_dtypes
    storage = WEIGHT_DTYPES[weight_dtype]
    if storage is None:
        count = comfy.utils.calculate_parameters(weights)
        own = comfy.utils.weight_dtype(weights)
        storage = management.unet_dtype(model_params=count, supported_dtypes=supported, weight_dtype=own)
    return storage, management.unet_manual_cast(storage, management.get_torch_device(), supported)


def _stored(tensor: torch.Tensor, storage: torch.dtype, compute: torch.dtype | None) -> torch.dtype:
    """Norms and biases stay out of fp8: they are small, and rounding them costs the most accuracy."""
    return compute if storage.itemsize == 1 and tensor.ndim == 1 and compute is not None else storage
