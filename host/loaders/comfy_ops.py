"""Layers of a torch module as ComfyUI ops, so that the host can cast, stream and patch each weight."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import nn

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def replace_layers(root: nn.Module, operations: type | ModuleType, dtype: torch.dtype) -> nn.Module:
    """Replace every Linear, Conv1d/2d/3d, GroupNorm, LayerNorm and Embedding below `root`; returns `root`.

    Each becomes a new instance of the op of the same name in `operations` (a class of `comfy.ops`), of the
    same sizes, without weights, on the meta device. New instances, because the host's quantised and streamed
    layers have constructors of their own. A module that is used twice stays one module.
    Raises TypeError if a parameter is left that no op holds, but of a module with `casts_own_parameters`.
    """
    replaced: dict[nn.Module, nn.Module] = {}
    for module in list(root.modules()):
        for name, child in list(module._modules.items()):
            if child is None:
                continue
            if child not in replaced:
                replaced[child] = _op(child, operations, {"device": "meta", "dtype": dtype}) or child
            setattr(module, name, replaced[child])
    casts = ("comfy_cast_weights", "casts_own_parameters")
    holders = [m for m in root.modules() if _holds_parameters(m)]
    plain = {type(m).__name__ for m in holders if not any(hasattr(m, name) for name in casts)}
    if plain:
        raise TypeError(f"{type(root).__name__}: layers without a ComfyUI op: {', '.join(sorted(plain))}")
    return root


def shapes(root: nn.Module) -> dict[str, torch.Size]:
    """State-dict key -> shape, of a module before its layers are replaced."""
    return {key: tensor.shape for key, tensor in root.state_dict().items()}


def load_weights(root: nn.Module, weights: dict[str, torch.Tensor]) -> nn.Module:
    """Put `weights` into a module on the meta device, without a copy. Keys must match exactly."""
    root.load_state_dict(weights, strict=True, assign=True)
    return root.eval().requires_grad_(False)


def _holds_parameters(module: nn.Module) -> bool:
    return any(True for _ in module.parameters(recurse=False))


def _op(layer: nn.Module, ops: type | ModuleType, options: dict) -> nn.Module | None:
    """The op for one layer, or None for a module that is no such layer."""
    kind = type(layer)
    if kind is nn.Linear:
        return ops.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, **options)
    if kind in CONVOLUTIONS:
        return _convolution(layer, ops, options)
    if kind is nn.GroupNorm:
        return ops.GroupNorm(layer.num_groups, layer.num_channels, eps=layer.eps, affine=layer.affine, **options)
    if kind is nn.LayerNorm:
        affine, bias = layer.elementwise_affine, layer.bias is not None
        return ops.LayerNorm(layer.normalized_shape, eps=layer.eps, elementwise_affine=affine, bias=bias, **options)
    if kind is nn.Embedding:
        return ops.Embedding(layer.num_embeddings, layer.embedding_dim, **options)
    return None


def _convolution(layer: nn.Module, ops: type | ModuleType, options: dict) -> nn.Module:
    return getattr(ops, type(layer).__name__)(
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,
        stride=layer.stride,
        padding=layer.padding,
        dilation=layer.dilation,
        groups=layer.groups,
        bias=layer.bias is not None,
        padding_mode=layer.padding_mode,
        **options,
    )
