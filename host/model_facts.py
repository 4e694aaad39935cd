"""What a model is and what is around it, by name: nothing of a prompt, of a clip, or of a file."""

import platform
from collections import Counter
from collections.abc import Mapping

import comfyui_version
import torch
from comfy.ldm.modules import attention
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from .families import family_of, noise_space
from .layers import attention_layers
from .model_pass import HANDLER
from .step_caches import caches_in


def facts_of(model, latent: Tensor) -> dict[str, object]:
    """Of model and machine: what somebody who helps has to know first."""
    base, options = model.model, model.model_options
    device, inner = model.load_device, options.get("transformer_options", {})
    layers = attention_layers(model).values()
    others = sorted({str(key) for own in _wrappers(model).values() for key in own if "spacetime" not in str(key)})
    weights = {
        getattr(weight, "_layout_cls", None) or str(weight.dtype).removeprefix("torch.")
        for weight in base.diffusion_model.parameters()
    }
    return {
        "family": family_of(model).name,
        "classes": [type(base).__name__, type(base.diffusion_model).__name__],
        "blocks": len({layer.block for layer in layers}),
        "attention layers": dict(Counter(layer.kind for layer in layers)),
        "noise space": noise_space(model).name,
        "latent": list(latent.shape),
        "weights": sorted(weights),
        "computes in": str(base.get_dtype_inference()).removeprefix("torch."),
        "attention back end": attention.optimized_attention.__name__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "patched weights": len(model.patches),
        "context windows": HANDLER in options,
        "step caches": sorted(caches_in(options, model.wrappers)),
        "wrappers of other packs": others,
        "replaced attention": sorted(name for name, own in inner.get("patches_replace", {}).items() if own),
        "attention override": "optimized_attention_override" in inner,
        "compiled": hasattr(base.diffusion_model, "_orig_mod"),
        "ComfyUI": comfyui_version.__version__,
        "torch": torch.__version__,
        "Python": platform.python_version(),
        "system": platform.system(),
    }


def _wrappers(model) -> dict[str, Mapping]:
    """All wrappers of a ModelPatcher, by kind."""
    inside = model.model_options.get("transformer_options", {}).get("wrappers", {})
    kinds = [value for name, value in vars(WrappersMP).items() if isinstance(value, str) and name.isupper()]
    return {kind: {**model.wrappers.get(kind, {}), **inside.get(kind, {})} for kind in kinds}
