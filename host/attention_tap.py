"""Look into, or replace, every attention call of a model run, whatever the family and the attention back end.

The host routes its attention through one slot, `optimized_attention_override`. The tap chains itself into that slot
and learns from module hooks, which live only while the model runs, which layer is calling.
"""

import contextlib
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from math import prod

import torch
from torch import Tensor
from torch.nn import Module

from ..core.inflation import Inflation
from ..core.parametrization import noise_fraction
from .animatediff import bridged, window_of
from .families import IN_SPACE, Ends, Kind, Layer, attention_layers, family_of, patch_size

KEY = "spacetime_edit_tap"
ONE_GPU = "model: editing runs on one GPU; remove the multi-GPU node from this model"
INFLATION = "spacetime_edit_inflation"
"""Key of the `Inflation` in the transformer_options of a model whose spatial attention spans frames."""


@dataclass(frozen=True)
class Row:
    """What one batch row of a call belongs to: index and uuid of its prompt, the frames of its queries and, but in
    cross-attention, of its keys."""

    prompt: int
    uuid: object
    frames: tuple[int, ...]
    key_frames: tuple[int, ...] = ()


@dataclass(frozen=True)
class AttentionCall:
    """One attention call. query (B, H, N, D), key and value (B, H, M, D), logits are `scale` q k + `mask`.

    attend: the attention that would have been computed, for other arguments (query, key, value, scale, attn_mask).
    grid: (F, h, w) of the layer's tokens. Spatial and cross attention of a U-Net: B = prompts * F, N = h w; temporal:
    B = prompts * h w, N = F. Of a transformer: B = prompts, N = F h w, and what else is in `extra`. Rows are
    prompt-major. Of an inflated model, spatial calls are those of the single frames; what is computed is `over_frames`.
    inflation: what a spatial call has yet to be, or, if `inflated`, already is.
    """

    layer: Layer
    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    grid: tuple[int, int, int]
    run: "_Run" = field(repr=False)
    mask: Tensor | None = None
    attend: Callable[..., Tensor] | None = field(default=None, repr=False)
    inflation: Inflation | None = None
    inflated: bool = False

    @property
    def kind(self) -> Kind:
        return self.layer.kind

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        run, frames = self.run, self.run.frames
        if self.kind == "temporal":
            of_row = [(frames, frames)] * (self.grid[1] * self.grid[2])
        elif run.patch is not None:
            of_row = [(frames, () if self.kind == "cross" else frames)]
        elif self.kind == "cross":
            of_row = [((f,), ()) for f in frames]
        elif self.inflated:
            places = self.inflation.frames_of_rows(len(frames))
            of_row = [tuple(tuple(frames[i] for i in part) for part in parts) for parts in places]
        else:
            of_row = [((f,), (f,)) for f in frames]
        return tuple(Row(p, u, *of) for p, u in zip(run.prompts, run.uuids, strict=True) for of in of_row)

    def over_frames(self) -> "AttentionCall":
        """The call as it is computed: itself, or of an inflated model with the tokens of several frames in a row."""
        if self.inflation is None or self.inflated:
            return self
        query, key, value = self.inflation.inflate(self.query, self.key, self.value, self.grid[0])
        return replace(self, query=query, key=key, value=value, inflated=True)

    def by_frame(self, output: Tensor) -> Tensor:
        """What attention gives for the queries of `over_frames`, in the shape of this call's own."""
        if self.inflation is None or self.inflated:
            return output
        return self.inflation.deflate(output, self.grid[0])

    @property
    def over_time(self) -> bool:
        """Whether each token of self-attention sees those of all frames, and there is no other attention over time."""
        joined = self.inflation is not None and self.inflation.keys == "all frames"
        if self.run.patch is not None:
            return self.kind in IN_SPACE
        return self.kind == "spatial" and joined and "temporal" not in self.run.kinds

    def of_clip(self, tensor: Tensor) -> Tensor:
        """(prompts F, H, N, D): the clip's own tokens in a query, key or value of self-attention, frame by frame."""
        frames, height, width = self.grid
        if self.run.patch is None and not (self.inflated and self.inflation.keys == "all frames"):
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


@dataclass
class _Entered:
    """An attention module that is running, and how many calls it has made."""

    layer: Layer
    calls: int = 0


Listener = Callable[[AttentionCall], Tensor | None]


class EnoughSeen(Exception):
    """Raised by a listener that needs no later layer; `until_enough_seen` ends the run there."""


def until_enough_seen(predict: Callable[[], Tensor]) -> Tensor | None:
    """The prediction of a model run, or None where a listener ended it early."""
    try:
        return predict()
    except EnoughSeen:
        return None


@dataclass(frozen=True)
class _Run:
    """One call of the model: the host's BaseModel, sigma (B,), latent size, prompts in the batch, frames (indices in
    the whole clip, as tokens count them), the transformer_options, and the kinds of attention that the model has.
    patch, clip_at: of a transformer, see `Family`; before: tokens in front of a clip that comes first; pictures:
    whether the first call of a cross-attention module is not for the prompt; crops_text: whether padding of prompts is
    gone."""

    base_model: object
    sigma: Tensor
    size: tuple[int, int]
    prompts: tuple[int, ...]
    uuids: tuple[object, ...]
    frames: tuple[int, ...]
    options: dict = field(repr=False)
    kinds: frozenset[Kind] = frozenset()
    patch: tuple[int, int, int] | None = None
    clip_at: Ends | None = None
    before: int = 0
    pictures: bool = False
    crops_text: bool = False

    @property
    def network(self) -> Module:
        return self.base_model.diffusion_model

    @property
    def clip_frames(self) -> int:
        """Frames of the whole clip, of which a context window shows some."""
        window = _window(self.options)
        return len(self.frames) if window is None else -(-window[1] // (self.patch or (1,))[0])

    @cached_property
    def percent(self) -> float:
        """Progress of denoising in [0, 1], as in Apply ControlNet."""
        sampling = self.base_model.model_sampling
        return 1 - noise_fraction(float(self.sigma.flatten()[0]), sampling.percent_to_sigma)


_running: ContextVar[tuple[tuple["AttentionTap", _Run], ...]] = ContextVar("running_taps", default=())


def running_taps() -> tuple[tuple["AttentionTap", _Run], ...]:
    """The taps that follow the model run that is going on here, each with its account of it: also those of patches."""
    return _running.get()


class AttentionTap:
    """Hands each attention call of a run to `listeners`; the first that returns an output (B, H, N, D) replaces it.

    differentiable: route attention through PyTorch's own kernel, because fused kernels have no backward.
    """

    def __init__(self, model, listeners: Sequence[Listener], *, differentiable: bool = False):
        self._layers, self._family = attention_layers(model), family_of(model)
        self._listeners = tuple(listeners)
        self._differentiable = differentiable
        self._stack: list[_Entered] = []
        self._run: _Run | None = None

    def install(self, model_options: dict) -> dict:
        """A copy of `model_options` with the tap in it; overrides and wrappers of others stay in the chain."""
        from comfy.model_patcher import create_model_options_clone
        from comfy.patcher_extension import WrappersMP, add_wrapper_with_key

        options = create_model_options_clone(model_options)
        inner = options.setdefault("transformer_options", {})
        previous = inner.get("optimized_attention_override")
        inner["optimized_attention_override"] = lambda func, *a, **k: self._attention(previous, func, *a, **k)
        add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, self._track, options, is_model_options=True)
        return options

    def _track(self, executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **kw):
        """APPLY_MODEL wrapper: follows the run of the model."""
        options = transformer_options or {}
        if "multigpu_thread_device" in options:  # threads would share this tap's account of the run
            raise ValueError(ONE_GPU)
        with self._following(self._describe_run(executor.class_obj, x, t, options, kw)):
            return executor(x, t, c_concat, c_crossattn, control, options, **kw)

    def _describe_run(self, base_model, x: Tensor, sigma: Tensor, options: dict, given: dict) -> "_Run":
        prompts = tuple(options.get("cond_or_uncond", (0,)))
        frames = x.shape[0] // len(prompts) if x.ndim == 4 else x.shape[2]
        window = _window(options)
        indices = tuple(range(frames)) if window is None else window[0]
        family, network = self._family, base_model.diffusion_model
        patch, before = patch_size(network) if family.patched else None, 0
        if patch is not None:
            indices = _token_frames(indices, patch[0])
        if (reads := family.references) and given.get(reads[0]) is not None and getattr(network, reads[1], None):
            height, width = given[reads[0]].shape[-2:]
            before = (height // patch[1]) * (width // patch[2])
        return _Run(
            base_model,
            sigma,
            tuple(x.shape[-2:]),
            prompts,
            tuple(options.get("uuids", (None,) * len(prompts))),
            indices,
            options,
            frozenset(layer.kind for layer in self._layers.values()),
            patch,
            family.patched,
            before,
            bool(family.pictures) and getattr(network, family.pictures, None) is not None,
            family.crops_text,
        )

    @contextlib.contextmanager
    def again(self, run: _Run, block: str, listeners: Sequence[Listener] | None = None):
        """Within, the module `block` of an ended `run` may be called again, and `listeners` hear of it; None: its own.

        What recomputation in a backward pass needs, of every tap of the run: the hooks are gone by then.
        """
        before = self._listeners
        self._listeners = before if listeners is None else tuple(listeners)
        try:
            with self._following(run, block):
                yield
        finally:
            self._listeners = before

    @contextlib.contextmanager
    def _following(self, run: "_Run", block: str = ""):
        """Keeps a stack of the attention modules that are running. block: of those inside this module, which may be one
        itself, whose forward is then called by hand."""
        before = self._run, self._stack
        handles, token = [], _running.set((*_running.get(), (self, run)))
        paths = [path for path in self._layers if not block or path.startswith(f"{block}.")]
        modules = {path: run.network.get_submodule(path) for path in paths}
        try:
            for path, module in modules.items():
                enter = lambda *_, layer=self._layers[path]: self._stack.append(_Entered(layer))  # noqa: E731
                leave = lambda *_: (self._stack.pop(), None)[1]  # noqa: E731
                handles.append(module.register_forward_pre_hook(enter))
                handles.append(module.register_forward_hook(leave, always_call=True))
            self._run, self._stack = run, [_Entered(self._layers[block])] if block in self._layers else []
            with bridged(modules.values(), self._attention):
                yield
        finally:
            _running.reset(token)
            self._run, self._stack = before
            for handle in handles:
                handle.remove()

    def _attention(self, previous, func, *args, **kwargs):
        if self._differentiable:
            func = _differentiable_attention()
            kwargs["low_precision_attention"] = False  # what has no gradient, as packs with 8-bit kernels know it
        proceed = func if previous is None else lambda *a, **k: _checked(previous(func, *a, **k), a[0])
        if self._run is None or not self._stack:
            return proceed(*args, **kwargs)
        entered = self._stack[-1]
        entered.calls += 1
        if entered.layer.kind == "cross" and self._run.pictures and entered.calls == 1:
            return proceed(*args, **kwargs)
        call = self._describe(args, kwargs, proceed)
        outputs = (listener(call) for listener in self._listeners)
        output = next((o for o in outputs if o is not None), None)
        if output is None and call.inflation is not None and not call.inflated:
            wide = call.over_frames()
            output = call.by_frame(wide.attend(wide.query, wide.key, wide.value, wide.scale))
        if output is None:
            return proceed(*args, **kwargs)
        return output if kwargs.get("skip_output_reshape") else output.transpose(1, 2).flatten(2)

    def _describe(self, args: tuple, kwargs: dict, proceed: Callable) -> AttentionCall:
        query, key, value = args[:3]
        heads = args[3] if len(args) > 3 else kwargs["heads"]
        if not kwargs.get("skip_reshape"):
            query, key, value = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (query, key, value))
        scale = kwargs.get("scale") or query.shape[-1] ** -0.5
        layer = self._stack[-1].layer
        mask, attend = args[4] if len(args) > 4 else kwargs.get("mask"), partial(_attend, proceed, kwargs)
        mask = None if mask is None else _for_all_heads(mask)
        inflation, inflated = _inflation_of(layer.kind, query, key, self._run)
        joined = len(self._run.frames) if inflated and inflation.keys == "all frames" else 1
        grid = _grid(layer, query.shape[0], query.shape[2] // joined, self._run)
        call = AttentionCall(layer, query, key, value, scale, grid, self._run, mask, attend, inflation, inflated)
        if inflation is None:
            return call
        if not inflation.at(call.level):
            return replace(call, inflation=None)
        if mask is not None:
            raise ValueError(f"model: {layer.path} masks its attention, which cannot be inflated to several frames")
        return call


def _window(options: dict) -> tuple[tuple[int, ...], int] | None:
    """(latent frames that a run sees, in its order; those of the whole clip), where it sees a context window.

    In front of the host's there may be the frame before it, for models whose first latent frame is of another kind.
    """
    window = options.get("context_window")
    if window is None:
        return window_of(options)
    anchor = getattr(window, "causal_anchor_index", None)
    before = () if anchor is None or anchor < 0 else (anchor,)
    return (*before, *window.index_list), window.total_frames


def _token_frames(frames: tuple[int, ...], together: int) -> tuple[int, ...]:
    """Which frames of tokens these latent frames make, `together` of them one."""
    parts = [frames[i : i + together] for i in range(0, len(frames), together)]
    if any(len({frame // together for frame in part}) > 1 for part in parts):
        raise ValueError(
            f"model: it joins {together} latent frames in a token, and the context window begins in the middle of one; "
            f"choose a context length, overlap and stride that {together} divides"
        )
    return tuple(part[0] // together for part in parts)


def _inflation_of(kind: Kind, query: Tensor, key: Tensor, run: _Run) -> tuple[Inflation | None, bool]:
    """The inflation that the run asks of a call, and whether another tap has already done it."""
    inflation = run.options.get(INFLATION)
    if kind != "spatial" or inflation is None or inflation.keys == "per frame" or len(run.frames) == 1:
        return None, False
    if inflation.keys == "all frames":
        return inflation, query.shape[0] == len(run.prompts)
    return inflation, key.shape[2] != query.shape[2]


def _grid(layer: Layer, rows: int, tokens: int, run: _Run) -> tuple[int, int, int]:
    """(F, h, w) of a call's tokens.

    Of a U-Net the latent's size halved, rounding up, until it holds as many tokens as the call has; of a transformer
    its patches, beside which there may be other tokens.
    """
    height, width = run.size
    if run.patch is not None:
        grid = len(run.frames), -(-height // run.patch[1]), -(-width // run.patch[2])
        if prod(grid) > tokens:
            raise ValueError(
                f"model: {layer.path} sees {tokens} tokens, fewer than the {prod(grid)} of a clip of {grid}; remove "
                f"guide frames of LTX-Video from the conditioning, or a node that merges tokens"
            )
        return grid
    tokens = rows // len(run.prompts) if layer.kind == "temporal" else tokens
    while height * width > tokens:
        height, width = (height + 1) // 2, (width + 1) // 2
    if height * width != tokens:
        raise ValueError(
            f"model: attention with {tokens} tokens does not fit a latent of {run.size[0]} x {run.size[1]}; remove a "
            f"node that merges tokens"
        )
    return len(run.frames), height, width


def _for_all_heads(mask: Tensor) -> Tensor:
    """A mask (N, M), (B, N, M) or (B, H, N, M) as the last of these, H and B being 1 where it is for all."""
    while mask.ndim < 3:
        mask = mask[None]
    return mask[:, None] if mask.ndim == 3 else mask


OF_THE_CALL = ("heads", "mask", "scale", "skip_reshape", "skip_output_reshape", "enable_gqa")
"""Keyword arguments of the host's attention that describe its tensors; the others pass through."""


def _attend(proceed: Callable, kwargs: dict, query: Tensor, key: Tensor, value: Tensor, scale: float, attn_mask=None):
    """(B, H, N, D) by the host's attention. Without its 8-bit kernels: extra channels may be far larger than others."""
    passed = {name: value for name, value in kwargs.items() if name not in OF_THE_CALL}
    options = {"mask": attn_mask, "skip_reshape": True, "scale": scale, "low_precision_attention": False}
    heads = query.shape[1]
    return proceed(query, key, value, heads, **passed | options).unflatten(-1, (heads, -1)).transpose(1, 2)


def _checked(output: Tensor, query: Tensor) -> Tensor:
    """What another pack's attention gives; ValueError where it has cut the graph, whose gradient would be wrong."""
    if torch.is_grad_enabled() and query.requires_grad and not output.requires_grad:
        raise ValueError(
            "model: another pack has put an attention into it that gives no gradient (as Sage attention); remove that "
            "node before the edit"
        )
    return output


def _differentiable_attention():
    from comfy.ldm.modules.attention import attention_pytorch

    return attention_pytorch
