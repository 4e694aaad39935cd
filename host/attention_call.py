"""One attention call of a model, and the model run that it belongs to: its tensors, its rows, its grid of tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from math import prod
from typing import Literal

import torch
from torch import Tensor
from torch.nn import Module

from ..core.frames import FrameMap
from ..core.inflation import Inflation
from ..core.parametrization import noise_fraction
from .animatediff import window_of
from .families import IN_SPACE, AttentionKind, Ends, Family, TextKeys, patch_size
from .latents import clip_shape
from .layers import Layer

SOURCE_RUN = "spacetime_edit_source"
"""Key in transformer_options of runs that see the source clip; region patches are inactive there."""
RETAINED = "spacetime_edit_retained"
"""Key in transformer_options of the frames that every context window of a run shows."""
INFLATION = "spacetime_edit_inflation"
"""Key of the `Inflation` in the transformer_options of a model whose spatial attention spans frames."""


@dataclass(frozen=True)
class Row:
    """What one batch row of a call belongs to.

    chunk: which of the run's prompts, by its place in the batch; prompt: the host's number of it; uuid: of its
    conditioning; frames: of its queries; key_frames: of its keys, but in cross-attention.
    """

    chunk: int
    prompt: int
    uuid: object
    frames: tuple[int, ...]
    key_frames: tuple[int, ...] = ()


@dataclass(frozen=True)
class ModelRun:
    """One call of the model.

    base_model: the host's; sigma (B,); size: (h, w) of the latent that it gets; prompts, uuids: of the batch; time: of
    the whole clip; frames: those of its frames of tokens that the run sees; kinds: of attention that the model has.
    patch, clip_at, text: of a transformer, see `Family`; before: tokens in front of a clip that comes first.
    """

    base_model: object
    sigma: Tensor
    size: tuple[int, int]
    prompts: tuple[int, ...]
    uuids: tuple[object, ...]
    time: FrameMap
    frames: tuple[int, ...]
    options: dict = field(repr=False)
    kinds: frozenset[AttentionKind] = frozenset()
    patch: tuple[int, int, int] | None = None
    clip_at: Ends | None = None
    before: int = 0
    text: TextKeys = "as encoded"

    @property
    def network(self) -> Module:
        network = self.base_model.diffusion_model
        return getattr(network, "_orig_mod", network)  # of torch.compile

    @property
    def of_source(self) -> bool:
        """Whether it sees the source clip."""
        return bool(self.options.get(SOURCE_RUN))

    @property
    def inflation(self) -> Inflation | None:
        """How its spatial attention spans frames; None: each frame attends to itself."""
        return self.options.get(INFLATION)

    @cached_property
    def percent(self) -> float:
        """Progress of denoising in [0, 1], as in Apply ControlNet."""
        sampling = self.base_model.model_sampling
        return 1 - noise_fraction(float(self.sigma.flatten()[0]), sampling.percent_to_sigma)


def describe_run(
    family: Family, kinds: frozenset[AttentionKind], base_model, x: Tensor, sigma: Tensor, options: dict, given: dict
) -> ModelRun:
    """The record of a call of the host's `apply_model`; given: its further arguments.

    ValueError for a context window that begins in the middle of a token.
    """
    prompts = tuple(options.get("cond_or_uncond", (0,)))
    shape = clip_shape(x.shape, given.get("latent_shapes"))
    frames = shape[0] // len(prompts) if len(shape) == 4 else shape[2]
    window = _window(options)
    shown, total = (range(frames), frames) if window is None else window
    network = base_model.diffusion_model
    patch, before = patch_size(network) if family.patched else None, 0
    time = family.frames.of(total, 1 if patch is None else patch[0])
    if (reads := family.references) and given.get(reads[0]) is not None and getattr(network, reads[1], None):
        height, width = given[reads[0]].shape[-2:]
        before = (height // patch[1]) * (width // patch[2])
    return ModelRun(
        base_model,
        sigma,
        tuple(shape[-2:]),
        prompts,
        tuple(options.get("uuids", (None,) * len(prompts))),
        time,
        time.tokens_of(shown),
        options,
        kinds,
        patch,
        family.patched,
        before,
        family.text,
    )


@dataclass(frozen=True)
class AttentionCall:
    """One attention call. query (B, H, N, D), key and value (B, H, M, D), logits are `scale` q k + `mask`.

    mask: additive, (B or 1, H or 1, N or 1, M). attend: the attention that would have been computed, for other
    arguments (query, key, value, scale, attn_mask, asking; see `who_asks`). grid: (F, h, w) of the layer's tokens.
    Spatial and cross-attention of a U-Net: B = prompts * F, N = h w; temporal: B = prompts * h w, N = F. Of a
    transformer: B = prompts, N = F h w, and what else is in `extra`. Rows are prompt-major. inflation: how spatial
    attention spans frames; query, key and value are those of several frames then; uninflated: the call as the model
    made it. first: the place of the first query among the layer's, of which another pack may ask for some at a time.
    stock: whether no other pack has put an attention of its own in the place of the host's.
    """

    layer: Layer
    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    grid: tuple[int, int, int]
    run: ModelRun = field(repr=False)
    mask: Tensor | None = None
    attend: Callable[..., Tensor] | None = field(default=None, repr=False)
    inflation: Inflation | None = None
    first: int = 0
    uninflated: AttentionCall | None = field(default=None, repr=False)
    stock: bool = False

    @property
    def kind(self) -> AttentionKind:
        return self.layer.kind

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """One for each batch row. ValueError where another pack has put rows into the batch."""
        run, frames = self.run, self.run.frames
        if self.kind == "temporal":
            of_row = [(frames, frames)] * (self.grid[1] * self.grid[2])
        elif run.patch is not None:
            of_row = [(frames, () if self.kind == "cross" else frames)]
        elif self.kind == "cross":
            of_row = [((f,), ()) for f in frames]
        elif self.inflation is not None:
            places = self.inflation.frames_of_rows(len(frames))
            of_row = [tuple(tuple(frames[i] for i in part) for part in parts) for parts in places]
        else:
            of_row = [((f,), (f,)) for f in frames]
        prompts = enumerate(zip(run.prompts, run.uuids, strict=True))
        rows = tuple(Row(chunk, p, u, *of) for chunk, (p, u) in prompts for of in of_row)
        if len(rows) != self.query.shape[0]:
            raise ValueError(
                f"model: {self.layer.path} attends in {self.query.shape[0]} batch rows, expected {len(rows)} for "
                f"{len(run.prompts)} prompts; give it one clip at a time (batch_size 1), and remove a node that adds "
                f"prompts of its own to the batch or cuts frames into tiles (NAG for a whole batch, HyperTile)"
            )
        return rows

    @property
    def per_frame(self) -> AttentionCall:
        """The call as the model made it: spatial attention of a U-Net with the tokens of single frames."""
        return self.uninflated or self

    @property
    def over_time(self) -> bool:
        """Whether each token of self-attention sees those of all frames, and there is no other attention over time."""
        joined = self.run.inflation is not None and self.run.inflation.keys == "all frames"
        if self.run.patch is not None:
            return self.kind in IN_SPACE
        return self.kind == "spatial" and joined and "temporal" not in self.run.kinds

    @property
    def _joined(self) -> bool:
        """Whether frames stand one behind another in the tokens of a U-Net."""
        return self.inflation is not None and self.inflation.keys == "all frames"

    def answered(self, output: Tensor, kwargs: dict) -> Tensor:
        """What the caller of the host's attention expects, with these keyword arguments, of an output (B, H, N, D)."""
        output = output if self.uninflated is None else self.inflation.deflate(output, self.grid[0])
        return output if kwargs.get("skip_output_reshape") else output.transpose(1, 2).flatten(2)

    def of_clip(self, tensor: Tensor) -> Tensor:
        """(prompts F, H, N, D): the clip's own tokens in a query, key or value of self-attention, frame by frame."""
        frames, height, width = self.grid
        if self.run.patch is None and not self._joined:
            return tensor[:, :, tensor.shape[2] - height * width :]
        return tensor[:, :, self._clip(tensor)].unflatten(2, (frames, -1)).transpose(1, 2).flatten(0, 1)

    def extra(self, tensor: Tensor) -> Tensor:
        """(prompts, H, E, D): of a transformer's query, key or value, the tokens that are not the clip's."""
        clip = self._clip(tensor)
        return torch.cat([tensor[:, :, : clip.start], tensor[:, :, clip.stop :]], 2)

    def parts(self, tensor: Tensor) -> tuple[int, int, int]:
        """How many tokens of a transformer's query, key or value stand before the clip's, are the clip's, and after."""
        clip = self._clip(tensor)
        return clip.start, clip.stop - clip.start, tensor.shape[2] - clip.stop

    def _clip(self, tensor: Tensor) -> slice:
        """Where the clip's tokens are, of all frames."""
        own = prod(self.grid)
        start = self.run.before if self.run.clip_at == "first" else tensor.shape[2] - own
        return slice(start, start + own)

    @property
    def percent(self) -> float:
        """Progress of denoising in [0, 1]."""
        return self.run.percent

    @property
    def options(self) -> dict:
        """The transformer_options of the run."""
        return self.run.options

    @property
    def level(self) -> int:
        """How much coarser than the latent the layer's grid is: 1, 2, 4, ..., each a side halved, rounding up."""
        height, level = self.run.size[0], 1
        while height > self.grid[1]:
            height, level = (height + 1) // 2, 2 * level
        return level

    @property
    def at_latent_resolution(self) -> bool:
        """Whether the layer works on the latent's own grid, the finest there is."""
        return self.grid[1:] == self.run.size


def describe_call(
    layer: Layer,
    run: ModelRun,
    args: tuple,
    kwargs: dict,
    proceed: Callable,
    tokens: int | None = None,
    first: int = 0,
    stock: bool = False,
) -> AttentionCall:
    """The record of a call of the host's attention, with one layout of tensors and one kind of mask.

    args, kwargs: as the host's attention functions take them; tokens: queries of the whole layer, where they are
    known; first: how many of them other calls had; stock: as in `AttentionCall`. ValueError for tokens of no grid.
    """
    query, key, value = args[:3]
    heads = args[3] if len(args) > 3 else kwargs["heads"]
    if not kwargs.get("skip_reshape"):
        query, key, value = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (query, key, value))
    if key.shape[1] != query.shape[1]:  # grouped queries
        key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
    scale = kwargs.get("scale") or query.shape[-1] ** -0.5
    mask = args[4] if len(args) > 4 else kwargs.get("mask")
    mask = None if mask is None else _additive(mask, query.dtype)
    grid, attend = _grid(layer, query, run, kwargs, tokens), partial(_attend, proceed, kwargs)
    call = AttentionCall(layer, query, key, value, scale, grid, run, mask, attend, None, first, stock=stock)
    if not _spans_frames(run, layer) or not run.inflation.at(call.level):
        return call
    if mask is not None:
        raise ValueError(f"model: {layer.path} masks its attention, which cannot be inflated to several frames")
    query, key, value = run.inflation.inflate(query, key, value, grid[0])
    return replace(call, query=query, key=key, value=value, inflation=run.inflation, uninflated=call)


def _spans_frames(run: ModelRun, layer: Layer) -> bool:
    """Whether a layer's attention spans several frames by inflation, at some levels."""
    inflation = run.inflation
    return layer.kind == "spatial" and inflation is not None and inflation.keys != "per frame" and len(run.frames) > 1


# --- geometry -----------------------------------------------------------


def _window(options: dict) -> tuple[tuple[int, ...], int] | None:
    """(latent frames that a run sees, in its order; those of the whole clip), where it sees a context window.

    In front of the host's there may be the frame before it, for models whose first latent frame is of another kind.
    """
    window = options.get("context_window")
    if window is None:
        return window_of(options)
    return shown_frames(window, options.get(RETAINED, ())), window.total_frames


def has_anchor(window) -> bool:
    """Whether a window of the host shows the frame before its own in front of them."""
    anchor = getattr(window, "causal_anchor_index", None)
    return anchor is not None and anchor >= 0


def shown_frames(window, retained: Sequence[int]) -> tuple[int, ...]:
    """Latent frames of the clip that a window of the host shows, in its order; retained: frames that it shows at their
    own places, whatever else stood there."""
    frames = [*([window.causal_anchor_index] if has_anchor(window) else []), *window.index_list]
    for place in retained:
        frames[place] = place
    return tuple(frames)


def _grid(layer: Layer, query: Tensor, run: ModelRun, kwargs: dict, tokens: int | None) -> tuple[int, int, int]:
    """(F, h, w) of a call's tokens.

    Of a U-Net what the host says of a layer, or the latent's size halved, rounding up, until it holds as many tokens as
    the layer has; of a transformer its patches, beside which there may be other tokens.
    """
    frames, (height, width) = len(run.frames), run.size
    if run.patch is not None:
        grid, seen = (frames, -(-height // run.patch[1]), -(-width // run.patch[2])), tokens or query.shape[2]
        if prod(grid) > seen:
            raise ValueError(
                f"model: {layer.path} sees {seen} tokens, fewer than the {prod(grid)} of a clip of {grid}; remove "
                f"guide frames of LTX-Video from the conditioning, or a node that merges tokens"
            )
        return grid
    seen, known = tokens or query.shape[2], None
    if layer.kind == "temporal":
        seen = query.shape[0] // len(run.prompts)
    elif known := (kwargs.get("transformer_options") or {}).get("activations_shape"):
        height, width = known[-2:]
    while height * width > seen and not known:
        height, width = (height + 1) // 2, (width + 1) // 2
    if height * width != seen:
        raise ValueError(
            f"model: attention with {seen} tokens does not fit a latent of {run.size[0]} x {run.size[1]}; remove a "
            f"node that merges tokens (ToMe) or cuts frames into tiles (HyperTile)"
        )
    return frames, height, width


# --- the host's attention -----------------------------------------------


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask (N, M), (B, N, M) or (B, H, N, M), boolean with True where a query sees a key or additive, as an additive
    one of the last shape, B and H being 1 where it is for all."""
    while mask.ndim < 3:
        mask = mask[None]
    mask = mask[:, None] if mask.ndim == 3 else mask
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, -torch.finfo(dtype).max)


OF_THE_CALL = ("heads", "mask", "scale", "skip_reshape", "skip_output_reshape", "enable_gqa")
"""Keyword arguments of the host's attention that describe its tensors; the others pass through."""


Asking = Literal["the model", "a patch", "a probe"]

_asking: ContextVar[Asking] = ContextVar("asking", default="the model")


def who_asks() -> Asking:
    """Whose the attention is that is asked for here: the model's own, or a listener's.

    A patch: that replaces the call, and asks for a part of it, or with more channels; no other tap is asked. A probe:
    what the call would give, with the patches of other taps.
    """
    return _asking.get()


def _attend(
    proceed: Callable,
    kwargs: dict,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    attn_mask: Tensor | None = None,
    asking: Asking = "a patch",
) -> Tensor:
    """(B, H, N, D) by the host's attention. Without its 8-bit kernels: extra channels may be far larger than others."""
    passed = {name: value for name, value in kwargs.items() if name not in OF_THE_CALL}
    options = {"mask": attn_mask, "skip_reshape": True, "scale": scale, "low_precision_attention": False}
    heads, before = query.shape[1], _asking.set(asking)
    try:
        return proceed(query, key, value, heads, **passed | options).unflatten(-1, (heads, -1)).transpose(1, 2)
    finally:
        _asking.reset(before)
