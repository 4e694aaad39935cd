"""What the tiles of a relevance score are made of: attention's scores, and sums over frames that keep no map.

Scores are formed in float32 or better, by the tensor cores of a card where these lose nothing. TF32 keeps ten bits of a
number behind the first, as float16 does, and bfloat16 keeps seven: products of such numbers are exact in it, and their
sums are in float32. So what was in half precision is multiplied in TF32. Gradients were not, and lose what is below ten
bits of each term.
"""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)


def working(tensor: Tensor) -> Tensor:
    """In float32 or better."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def scores(query: Tensor, key: Tensor, scale: float, exact: bool, less: Tensor | None = None) -> Tensor:
    """scale <query, key> - less, (..., N, M) of query (..., N, D), key (..., M, D) and less (..., N); differentiable
    once. exact: query and key hold only what half precision can.
    """
    return _Scores.apply(query, key, less, scale, exact)


class _Scores(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, less, scale, exact):
        ctx.save_for_backward(query, key)
        ctx.scale, ctx.exact = scale, exact
        return _product(query, key.mT, scale, exact, less)

    @staticmethod
    def backward(ctx, gradient):
        query, key = ctx.saved_tensors
        of_query, of_key, of_less = ctx.needs_input_grad[:3]
        return (
            _product(gradient, key, ctx.scale, ctx.exact) if of_query else None,
            _product(gradient.mT, query, ctx.scale, ctx.exact) if of_key else None,
            -gradient.sum(-1) if of_less else None,
            *(None, None),
        )


def _product(a: Tensor, b: Tensor, scale: float, exact: bool, less: Tensor | None = None) -> Tensor:
    """scale a b - less."""
    out = a.new_empty(*a.shape[:-1], b.shape[-1])
    behind = a.new_zeros(1, 1, 1) if less is None else less[..., None].reshape(-1, a.shape[-2], 1)
    a, b, beta = a.reshape(-1, *a.shape[-2:]), b.reshape(-1, *b.shape[-2:]), 0 if less is None else -1
    with tensor_cores() if exact and a.device.type == "cuda" else contextlib.nullcontext():
        torch.baddbmm(behind, a, b, beta=beta, alpha=scale, out=out.view(-1, *out.shape[-2:]))
    return out


@contextlib.contextmanager
def tensor_cores() -> Iterator[None]:
    """Within, products of float32 are formed in TF32 on the cards that have it."""
    settings = torch.backends.cuda.matmul
    name, value = ("fp32_precision", "tf32") if hasattr(settings, "fp32_precision") else ("allow_tf32", True)
    before = getattr(settings, name)
    setattr(settings, name, value)
    try:
        yield
    finally:
        setattr(settings, name, before)


# --- sums over frames ---------------------------------------------------


def frames_at(frames: int, d: int) -> tuple[slice, slice]:
    """The frames i that have a frame j = i + d, and those j."""
    return slice(max(0, -d), frames - max(0, d)), slice(max(0, d), frames + min(0, d))


class SumOverFrames:
    """The sum over j of w_i(p) w_j(q) g_ij(p, q), (F, H, P, Q), from parts that are each of all pairs j = i + d.

    weight: w (F, N), None: 1. A backward pass keeps none of the parts; what has no graph is added at once.
    """

    def __init__(self, frames: int, p: slice, q: slice, weight: Tensor | None):
        self._frames, self._p, self._q, self._weight = frames, p, q, weight
        self._places, self._parts, self._sum = [], [], None

    def add(self, d: int, part: Tensor) -> None:
        """part: g_ij (F - |d|, H, P, Q)."""
        near, far = frames_at(self._frames, d)
        place = near, None if self._weight is None else self._weight[far, None, None, self._q]
        if part.requires_grad:
            self._places.append(place)
            self._parts.append(part)
        else:
            self._sum = _added(self._frames, [place], [part], self._sum)

    @property
    def total(self) -> Tensor:
        total = _Added.apply(self._frames, self._places, *self._parts) if self._parts else self._sum
        return total if self._weight is None else total * self._weight[:, None, self._p, None]


def _added(frames: int, places: Sequence[tuple], parts: Sequence[Tensor], total: Tensor | None = None) -> Tensor:
    """total (F, ...) with each part at its frames, times its factor; places: (frames, factor or None) of each."""
    total = parts[0].new_zeros(frames, *parts[0].shape[1:]) if total is None else total
    for (near, factor), part in zip(places, parts, strict=True):
        total[near].add_(part) if factor is None else total[near].addcmul_(part, factor)
    return total


class _Added(torch.autograd.Function):
    @staticmethod
    def forward(ctx, frames, places, *parts):
        ctx.places = places
        return _added(frames, places, parts)

    @staticmethod
    def backward(ctx, gradient):
        of_parts = (gradient[near] if factor is None else gradient[near] * factor for near, factor in ctx.places)
        return None, None, *of_parts
