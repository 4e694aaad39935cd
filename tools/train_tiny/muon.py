"""Muon for matrices and convolutions, Adam for the rest."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable

import torch
from torch import Tensor, nn

NEWTON_SCHULZ = (3.4445, -4.775, 2.0315)
SMALLEST_SIDE = 8


def orthogonalised(matrices: Tensor, iterations: int = 5) -> Tensor:
    """(B, M, N): about U V^T of each matrix' singular value decomposition (Newton-Schulz, quintic)."""
    x = matrices / (matrices.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    a, b, c = NEWTON_SCHULZ
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x


class Muon:
    """Muon (Jordan et al. 2024) with Nesterov momentum for every parameter that makes a matrix of at least 8 x 8, a
    convolution as (out, in * kernel); AdamW without decay for the others and for names with one of `adam_names`.

    Unlike `torch.optim.Muon` it takes convolutions, and it steps all matrices of one shape as one batch: a small model
    has hundreds of small matrices. in_graph: for steps in a CUDA graph, whose rates are tensors.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        adam_names: Collection[str] = (),
        momentum: float = 0.95,
        in_graph: bool = False,
    ):
        self.momentum = momentum
        by_shape: dict[tuple[int, int], list[nn.Parameter]] = {}
        others = []
        for name, parameter in parameters:
            shape = (len(parameter), parameter[0].numel()) if parameter.dim() > 1 else (1, 1)
            if min(shape) < SMALLEST_SIDE or any(part in name for part in adam_names):
                others.append(parameter)
            else:
                by_shape.setdefault(shape, []).append(parameter)
        self.groups = list(by_shape.items())
        self.moments = [torch.zeros(len(members), *shape, device=members[0].device) for shape, members in self.groups]
        self.rows: dict[tuple, Tensor] = {}
        first = torch.tensor(0.0, device=others[0].device) if in_graph else 0.0
        self.adam = torch.optim.AdamW(
            others, first, betas=(0.9, 0.98), weight_decay=0.0, fused=True, capturable=in_graph
        )

    @torch.no_grad()
    def step(self, rate: float | Tensor, adam_rate: float | Tensor) -> None:
        """One step. Parameters without a gradient stay: Muon would make a full step of what is left of old moments."""
        for group in self.adam.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].copy_(adam_rate)
            else:
                group["lr"] = adam_rate
        self.adam.step()
        for (shape, members), moments in zip(self.groups, self.moments, strict=True):
            active = [i for i, parameter in enumerate(members) if parameter.grad is not None]
            if not active:
                continue
            gradients = torch.stack([members[i].grad.reshape(shape) for i in active])
            rows = self._rows(active, moments.device)
            moved = moments[rows].lerp(gradients, 1 - self.momentum)
            moments.index_copy_(0, rows, moved)
            steps = orthogonalised(gradients.lerp(moved, self.momentum)) * rate
            scale = -math.sqrt(max(1.0, shape[0] / shape[1]))
            for i, step in zip(active, steps, strict=True):
                members[i].add_(step.view_as(members[i]), alpha=scale)

    def _rows(self, active: list[int], device: torch.device) -> Tensor:
        """As a tensor that stays: in a CUDA graph none can be copied to the card."""
        key = tuple(active), device
        if key not in self.rows:
            self.rows[key] = torch.tensor(active, device=device)
        return self.rows[key]

    def state_dict(self) -> dict:
        return {"adam": self.adam.state_dict(), "moments": self.moments}

    def load_state_dict(self, state: dict) -> None:
        """The rates stay: each step is given its own."""
        rates = [group["lr"] for group in self.adam.param_groups]
        self.adam.load_state_dict(state["adam"])
        for group, rate in zip(self.adam.param_groups, rates, strict=True):
            group["lr"] = rate
        for mine, saved in zip(self.moments, state["moments"], strict=True):
            mine.copy_(saved)
