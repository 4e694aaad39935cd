"""A diffusers `vae` (AutoencoderKL of any widths) as a native VAE: images [F,H,W,3] <-> latents [F,C,h,w].

Latents in the graph are not scaled; the scaling factor belongs to the model's latent format.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import comfy.latent_formats
import comfy.model_management as management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import torch

from .comfy_ops import load_weights, replace_layers, shapes
from .diffusers_folder import ModelFolder, ModelFolderError, read_json, read_weights

STABLE_DIFFUSION = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 4}
OLD_ATTENTION_KEYS = {
    ".query.": ".to_q.",
    ".key.": ".to_k.",
    ".value.": ".to_v.",
    ".proj_attn.": ".to_out.0.",
}


def load_vae(folder: ModelFolder, *, disable_dynamic: bool = False) -> comfy.sd.VAE:
    """The folder's autoencoder: the host's own VAE for Stable Diffusion's sizes, `FolderVAE` for any other.

    Raises ModelFolderError naming the file and the entry or key at fault.
    """
    config = _checked(folder)
    net = _build(folder, config)
    weights = read_weights(folder.weights_files("vae"), shapes(net), _current_key)
    if _is_stable_diffusion(config):
        vae = comfy.sd.VAE(sd=weights)
    else:
        vae = FolderVAE(net, weights, config, disable_dynamic=disable_dynamic)
    vae.patcher.cached_patcher_init = (reload_vae, (str(folder.path),))
    return vae


def reload_vae(path: str, disable_dynamic: bool = False):
    """The patcher of a freshly loaded VAE, for clones that may share no weights."""
    return load_vae(ModelFolder(path), disable_dynamic=disable_dynamic).patcher


def latent_format(folder: ModelFolder) -> comfy.latent_formats.LatentFormat:
    """Scale, channels and pixels per latent cell of the folder's autoencoder, for the model."""
    config = _checked(folder)
    channels, ratio = config.get("latent_channels", 4), _ratio(config)
    known = (channels, ratio) == (4, 8)
    result = comfy.latent_formats.SD15() if known else comfy.latent_formats.LatentFormat()
    result.scale_factor = config.get("scaling_factor", 0.18215)
    result.latent_channels, result.spacial_downscale_ratio = channels, ratio
    preview = folder.path / "vae" / "latent_rgb.json"  # optional: how to preview latents of an unknown autoencoder
    if not known and preview.is_file():
        fit = read_json(preview)
        result.latent_rgb_factors, result.latent_rgb_factors_bias = fit["factors"], fit["bias"]
    return result


class ModeAutoencoder(torch.nn.Module):
    """diffusers' AutoencoderKL with the host's calls. Encoding takes the mode of the posterior."""

    def __init__(self, net: torch.nn.Module):
        super().__init__()
        self.net = net

    def encode(self, pixels: torch.Tensor, **_) -> torch.Tensor:
        """Pixels [F,3,H,W] in -1..1 to latents [F,C,h,w]."""
        return self.net.encode(pixels).latent_dist.mode()

    def decode(self, latents: torch.Tensor, **_) -> torch.Tensor:
        """Latents [F,C,h,w] to pixels [F,3,H,W] in -1..1."""
        return self.net.decode(latents).sample


class FolderVAE(comfy.sd.VAE):
    """A VAE of any AutoencoderKL config. `net` is the model on the meta device, `weights` its state dict."""

    def __init__(self, net: torch.nn.Module, weights: dict, config: dict, *, disable_dynamic: bool = False):
        with _without_warning("No VAE weights detected"):
            super().__init__(sd={})  # sets the host's defaults and returns before it builds a model
        self.downscale_ratio = self.upscale_ratio = ratio = _ratio(config)
        self.latent_channels = config.get("latent_channels", 4)
        self.device, self.output_device = management.vae_device(), management.intermediate_device()
        self.vae_dtype = management.vae_dtype(self.device, self.working_dtypes)
        self._estimate_memory(config["block_out_channels"][0] / 128, ratio)
        replace_layers(net, comfy.ops.pick_operations(self.vae_dtype, None), self.vae_dtype)
        load_weights(net, {key: tensor.to(self.vae_dtype) for key, tensor in weights.items()})
        self.first_stage_model = ModeAutoencoder(net).eval()
        management.archive_model_dtypes(self.first_stage_model)
        patcher = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
        self.patcher = patcher(self.first_stage_model, self.device, management.vae_offload_device())
        self.model_size()

    def _estimate_memory(self, width: float, ratio: int) -> None:
        """The host's estimate for Stable Diffusion (128 channels at full size), scaled by `width`."""
        size = management.dtype_size
        self.memory_used_encode = lambda shape, dtype: 1767 * width * shape[2] * shape[3] * size(dtype)
        self.memory_used_decode = lambda shape, dtype: 2178 * width * shape[2] * shape[3] * ratio**2 * size(dtype)


def _checked(folder: ModelFolder) -> dict:
    path, config = folder.file("vae", "config.json"), folder.config("vae")
    for key in ("shift_factor", "latents_mean", "latents_std"):
        if config.get(key) is not None:
            raise ModelFolderError(f"{path}: {key} is set; this loader reads latents with a scaling factor only")
    scale = config.get("scaling_factor", 0.18215)
    if not isinstance(scale, int | float) or not 0 < scale < 1000:
        raise ModelFolderError(f"{path}: scaling_factor is {scale!r}; expected a positive number")
    return config


def _build(folder: ModelFolder, config: dict) -> torch.nn.Module:
    from diffusers import AutoencoderKL

    try:
        with torch.device("meta"):
            return AutoencoderKL.from_config(config)
    except (TypeError, ValueError) as error:
        raise ModelFolderError(
            f"{folder.file('vae', 'config.json')}: no AutoencoderKL has these sizes: {error}"
        ) from error


def _ratio(config: dict) -> int:
    return 2 ** (len(config["block_out_channels"]) - 1)


def _is_stable_diffusion(config: dict) -> bool:
    sizes = {key: config.get(key, value) for key, value in STABLE_DIFFUSION.items()}
    whole = all(config.get(key, True) for key in ("mid_block_add_attention", "use_quant_conv", "use_post_quant_conv"))
    return sizes == STABLE_DIFFUSION and whole and config.get("norm_num_groups", 32) == 32


def _current_key(key: str) -> str:
    """Attention keys of files written before diffusers 0.15."""
    for old, new in OLD_ATTENTION_KEYS.items():
        key = key.replace(old, new) if ".attentions." in key else key
    return key


@contextmanager
def _without_warning(text: str) -> Iterator[None]:
    """Leave out one message of the root logger: the host warns about a VAE that is built by hand."""
    root = logging.getLogger()

    def keep(record: logging.LogRecord) -> bool:
        return text not in record.getMessage()

    root.addFilter(keep)
    try:
        yield
    finally:
        root.removeFilter(keep)
