"""float16 on a machine that has none: what goes into and comes out of every layer, and its gradients, are rounded.

Sums within a layer stay in float32, as the tensor cores of a card keep them. No model, no host.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.half().to(x.dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient.half().to(gradient.dtype)


def _rounded(value):
    return _Rounded.apply(value) if isinstance(value, Tensor) and value.dtype == torch.float32 else value


@contextlib.contextmanager
def float16_layers(network: nn.Module) -> Iterator[None]:
    """Within: every layer of the network that has no layers inside takes and gives numbers that float16 holds."""
    layers = [module for module in network.modules() if not any(True for _ in module.children())]
    with contextlib.ExitStack() as hooks:
        for layer in layers:
            hooks.callback(layer.register_forward_pre_hook(lambda _, given: tuple(map(_rounded, given))).remove)
            hooks.callback(layer.register_forward_hook(lambda _, given, result: _rounded(result)).remove)
        yield
