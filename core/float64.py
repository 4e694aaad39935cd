"""Sums in float64, also for devices that have none."""

import torch
from torch import Tensor

WITHOUT_FLOAT64 = {"mps", "privateuseone"}
"""Types of devices: Metal, and DirectML. Of Intel's, some."""


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Sum over each row in the working precision, over the rows in float64; see `in_float64`."""
    return in_float64((a * b).sum(-1)).sum()


def in_float64(tensor: Tensor) -> Tensor:
    """On the CPU where the device has no float64."""
    device = tensor.device
    if device.type == "xpu":
        lacks = not torch.xpu.get_device_properties(device).has_fp64
    else:
        lacks = device.type in WITHOUT_FLOAT64
    return (tensor.cpu() if lacks else tensor).double()
