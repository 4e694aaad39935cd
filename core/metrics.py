"""Figures of merit. Each is one function of frames in [0, 1]."""

import torch
from torch import Tensor


def psnr_db(result: Tensor, reference: Tensor, mask: Tensor | None = None) -> float:
    """Peak signal-to-noise ratio in dB of frames in [0, 1], within `mask` (broadcastable, weights) if given.

    Equal frames give 100 dB. Raises ValueError if the mask selects nothing.
    """
    error = (result.double() - reference.double()).square()
    weight = torch.ones_like(error) if mask is None else mask.to(error).expand_as(error)
    if weight.sum() == 0:
        raise ValueError("mask: it selects no pixel, so there is nothing to measure; expected a non-empty mask")
    mean = (error * weight).sum() / weight.sum()
    return float(-10 * torch.log10(mean.clamp_min(1e-10)))
