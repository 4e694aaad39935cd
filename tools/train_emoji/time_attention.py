"""Attention over a few frames for training on a card: millions of sequences of 8 tokens.

Matrix products of that size keep a card waiting, so there are three other ways, and the quickest on the card at hand is
taken. Shape letters: M sequences (clips times cells), H heads, F frames, D channels of a head.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

try:
    import triton
    from triton import language as tl
except ImportError:
    triton = None

if TYPE_CHECKING:
    from diffusers import UNet3DConditionModel

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Queries, keys and values (M, H, F, D) to (M, H, F, D)."""
SEQUENCES = 4
"""Of one program of the kernels."""
TOLERANCE = 0.02


def by_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """By two batched matrix products."""
    shape = v.shape
    q, k, v = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
    return torch.bmm((torch.bmm(q, k.mT) * q.shape[-1] ** -0.5).softmax(-1).to(v), v).view(shape)


def by_sums(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """By sums of products of single numbers."""
    weights = ((q.unsqueeze(-2) * k.unsqueeze(-3)).sum(-1) * q.shape[-1] ** -0.5).softmax(-1).to(v)
    return (weights.unsqueeze(-1) * v.unsqueeze(-3)).sum(-2)


def by_torch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """By torch's function."""
    return scaled_dot_product_attention(q, k, v)


def by_kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """By one Triton kernel, and one for the gradients; F and D must be powers of two."""
    return _ByKernel.apply(*(x.transpose(1, 2).contiguous() for x in (q, k, v))).transpose(1, 2)


ATTENTIONS: tuple[Attention, ...] = (by_products, by_sums, by_torch, *([by_kernel] if triton else []))


if triton:

    @triton.jit
    def _weights(q, k, scale):
        scores = tl.sum(q[:, :, None, :] * k[:, None, :, :], axis=3) * scale
        scores = tl.exp(scores - tl.max(scores, axis=2)[:, :, None])
        return scores / tl.sum(scores, axis=2)[:, :, None]

    @triton.jit
    def _offsets(heads, F: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
        row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        first = (row // heads) * (F * heads * D) + (row % heads) * D
        inside = tl.arange(0, F)[None, :, None] * (heads * D) + tl.arange(0, D)[None, None, :]
        return row[:, None, None], first[:, None, None] + inside

    @triton.jit
    def _forward(q_at, k_at, v_at, out_at, count, heads, scale, F: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
        row, at = _offsets(heads, F, D, BLOCK)
        there = (row < count) & (at >= 0)
        q = tl.load(q_at + at, mask=there, other=0.0).to(tl.float32)
        k = tl.load(k_at + at, mask=there, other=0.0).to(tl.float32)
        v = tl.load(v_at + at, mask=there, other=0.0).to(tl.float32)
        weights = _weights(q, k, scale)
        tl.store(out_at + at, tl.sum(weights[:, :, :, None] * v[:, None, :, :], axis=2), mask=there)

    @triton.jit
    def _backward(
        q_at, k_at, v_at, grad_at, dq_at, dk_at, dv_at, count, heads, scale,
        F: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        row, at = _offsets(heads, F, D, BLOCK)
        there = (row < count) & (at >= 0)
        q = tl.load(q_at + at, mask=there, other=0.0).to(tl.float32)
        k = tl.load(k_at + at, mask=there, other=0.0).to(tl.float32)
        v = tl.load(v_at + at, mask=there, other=0.0).to(tl.float32)
        grad = tl.load(grad_at + at, mask=there, other=0.0).to(tl.float32)
        weights = _weights(q, k, scale)
        tl.store(dv_at + at, tl.sum(weights[:, :, :, None] * grad[:, :, None, :], axis=1), mask=there)
        of_weights = tl.sum(grad[:, :, None, :] * v[:, None, :, :], axis=3)
        of_scores = weights * (of_weights - tl.sum(of_weights * weights, axis=2)[:, :, None]) * scale
        tl.store(dq_at + at, tl.sum(of_scores[:, :, :, None] * k[:, None, :, :], axis=2), mask=there)
        tl.store(dk_at + at, tl.sum(of_scores[:, :, :, None] * q[:, :, None, :], axis=1), mask=there)


class _ByKernel(torch.autograd.Function):
    """Of contiguous tensors (M, F, H, D)."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        out = torch.empty_like(q)
        sizes, grid = _sizes(q)
        _forward[grid](q, k, v, out, *sizes, BLOCK=SEQUENCES)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        saved = ctx.saved_tensors
        grads = tuple(torch.empty_like(x) for x in saved)
        sizes, grid = _sizes(saved[0])
        _backward[grid](*saved, grad.contiguous(), *grads, *sizes, BLOCK=SEQUENCES)
        return grads


def _sizes(q: Tensor) -> tuple[tuple, tuple[int]]:
    m, frames, heads, channels = q.shape
    return (m * heads, heads, channels**-0.5, frames, channels), (-(-m * heads // SEQUENCES),)


# --- in the U-Net -------------------------------------------------------


class TimeAttention:
    """An attention processor of diffusers by one of `ATTENTIONS`."""

    def __init__(self, function: Attention):
        self.function = function

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None, **options):
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        projected = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        q, k, v = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in projected)
        return attn.to_out[0](self.function(q, k, v).transpose(1, 2).flatten(2))


def use_attention(unet: UNet3DConditionModel, function: Attention) -> None:
    """All attention over time by this function."""
    for name, module in unet.named_modules():
        if hasattr(module, "set_processor") and ("temp" in name or "transformer_in" in name):
            module.set_processor(TimeAttention(function))


def quickest(shape: tuple[int, int, int, int], device: torch.device) -> Attention:
    """Of `ATTENTIONS` that give right gradients, the quickest forward and backward on a card, for (M, H, F, D)."""
    seconds: dict[Attention, float] = {}
    torch.manual_seed(0)
    m, heads, frames, channels = shape
    columns = [torch.randn(m, frames, heads * channels, device=device, dtype=torch.bfloat16) for _ in range(4)]
    wanted = None
    for function in ATTENTIONS:
        try:
            gradients, taken = _tried(function, columns, heads)
        except Exception as reason:  # noqa: BLE001 (a compiler's errors are of any kind, and there are other ways)
            print(f"{function.__name__}: {type(reason).__name__} {str(reason)[:300]}", flush=True)
            continue
        wanted = gradients if wanted is None else wanted
        if all((a - b).norm() < TOLERANCE * b.norm() for a, b in zip(gradients, wanted, strict=True)):
            seconds[function] = taken
    times = ", ".join(f"{function.__name__} {value * 1000:.2f} ms" for function, value in seconds.items())
    print(f"attention over time: {times}", flush=True)
    return min(seconds, key=seconds.get, default=by_products)


def _tried(function: Attention, columns: list[Tensor], heads: int, repeats: int = 5) -> tuple[list[Tensor], float]:
    """The gradients, in float32, and the seconds of forward and backward."""
    *inputs, grad = columns
    inputs = [x.detach().requires_grad_() for x in inputs]
    for i in range(repeats + 3):
        if i == 3:
            _wait(grad)
            began = time.monotonic()
        for x in inputs:
            x.grad = None
        out = function(*(x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in inputs))
        out.transpose(1, 2).flatten(2).backward(grad)
    _wait(grad)
    return [x.grad.float() for x in inputs], (time.monotonic() - began) / repeats


def _wait(tensor: Tensor) -> None:
    """For the card to finish."""
    tensor.flatten()[:1].item()
