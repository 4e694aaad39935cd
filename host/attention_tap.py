"""Look into, or replace, every attention call of a model run, whatever the family and the attention back end.

The host routes its attention through one slot, `optimized_attention_override`. The tap chains itself into that slot as
the model is applied, where no later node can overwrite it, and learns from module hooks, which live only while the
model runs, which layer is calling.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar

import torch
from torch import Tensor
from torch.nn import Module

from .animatediff import bridged
from .attention_call import AttentionCall, ModelRun, describe_call, describe_run, who_asks
from .families import AttentionKind, family_of
from .kernels import plain_kernels, uncompiled
from .layers import Layer, attention_layers, layers_in

KEY = "spacetime_edit_tap"
ONE_GPU = "model: editing runs on one GPU; remove the multi-GPU node from this model"

REPLACED = {"spatial": "attn1", "cross": "attn2"}
"""Kinds of attention that packs replace block by block, by the host's names of such patches."""

Listener = Callable[[AttentionCall], Tensor | None]


class EnoughSeen(BaseException):
    """Raised by a listener that needs no later layer; `until_enough_seen` ends the run there.

    It is control flow and no error: other packs' `except Exception` must not stop it.
    """


def until_enough_seen(predict: Callable[[], Tensor]) -> Tensor | None:
    """The prediction of a model run, or None where a listener ended it early."""
    try:
        return predict()
    except EnoughSeen:
        return None


class _Entered:
    """An attention module that is running.

    tokens: of its input, where they are known; asked: how many of its queries have been in calls; key: of its prompt;
    pictures: addresses of keys that are a picture's.
    """

    def __init__(self, layer: Layer, inputs: tuple = ()):
        self.layer, self.asked = layer, 0
        self.key: Tensor | None = None
        self.pictures: set[int] = set()
        hidden = inputs[0] if inputs and isinstance(inputs[0], Tensor) and inputs[0].ndim == 3 else None
        self.tokens = hidden.shape[1] if hidden is not None and layer.kind == "cross" else None

    def is_prompts(self, key: Tensor) -> bool:
        """Whether a cross-attention call with this key is for the prompt of the batch.

        The first is, and others with equal keys, for some of the queries at a time; another key is that of a picture,
        or of a prompt that another pack has brought along.
        """
        if key.data_ptr() in self.pictures:
            return False
        if self.key is None:
            self.key = key
        return key is self.key or (key.shape == self.key.shape and torch.equal(key, self.key))


_running: ContextVar[tuple[tuple["AttentionTap", ModelRun], ...]] = ContextVar("running_taps", default=())


def running_taps() -> tuple[tuple["AttentionTap", ModelRun], ...]:
    """The taps that follow the model run that is going on here, each with its account of it: also those of patches."""
    return _running.get()


class AttentionTap:
    """Hands each attention call of a run to `listeners`; the first that returns an output (B, H, N, D) replaces it.

    differentiable: by operations that have a gradient, attention by PyTorch's own kernel. acts_in:
    whether there is anything to do in a run; else the model runs as if there were no tap. unheard: called after a whole
    run with its `silent` layers, if there are any. heard: paths of the layers whose attention came here in the last
    run.
    """

    def __init__(
        self,
        model,
        listeners: Sequence[Listener],
        *,
        differentiable: bool = False,
        acts_in: Callable[[ModelRun], bool] = lambda run: True,
        unheard: Callable[[ModelRun, list[Layer]], None] = lambda run, layers: None,
    ):
        self._layers, self._family = attention_layers(model), family_of(model)
        self._network = model.model.diffusion_model
        self._listeners = tuple(listeners)
        self._differentiable, self._acts_in, self._unheard = differentiable, acts_in, unheard
        self._stack: list[_Entered] = []
        self._run: ModelRun | None = None
        self._entered: set[str] = set()
        self.heard: set[str] = set()

    def install(self, model_options: dict) -> dict:
        """A copy of `model_options` with the tap in it; overrides and wrappers of others stay in the chain."""
        from comfy.model_patcher import create_model_options_clone
        from comfy.patcher_extension import WrappersMP, add_wrapper_with_key

        options = create_model_options_clone(model_options)
        add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, self._track, options, is_model_options=True)
        return options

    def _track(self, executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **kw):
        """APPLY_MODEL wrapper: follows the run of the model."""
        options = transformer_options or {}
        if "multigpu_thread_device" in options:  # threads would share this tap's account of the run
            raise ValueError(ONE_GPU)
        base_model = executor.class_obj
        fits = self._family.fits(base_model)  # a guider may call a second model with the options of the first
        run = describe_run(self._family, self._kinds, base_model, x, t, options, kw) if fits else None
        if run is None or not self._acts_in(run):
            return executor(x, t, c_concat, c_crossattn, control, options, **kw)
        previous = options.get("optimized_attention_override")
        override = lambda func, *a, **k: self._attention(previous, func, *a, **k)  # noqa: E731
        with self._following(run):
            out = executor(
                x, t, c_concat, c_crossattn, control, {**options, "optimized_attention_override": override}, **kw
            )
        if silent := self.silent(run):
            self._unheard(run, silent)
        return out

    def silent(self, run: ModelRun) -> list[Layer]:
        """Layers whose attention did not come here in the last run, though they ran or another pack stood in for them.

        A pack that swaps the host's attention function, or replaces the attention of a block, keeps it from us.
        """
        stands_in = run.options.get("patches_replace", {})
        replaced = {kind for kind, name in REPLACED.items() if stands_in.get(name)}
        return [
            layer
            for path, layer in self._layers_in(run.network).items()
            if path not in self.heard and (path in self._entered or layer.kind in replaced)
        ]

    @property
    def listeners(self) -> tuple[Listener, ...]:
        return self._listeners

    @property
    def entered(self) -> bool:
        """Whether any attention module ran in the last run."""
        return bool(self._entered)

    @property
    def heard_kinds(self) -> set[AttentionKind]:
        """Kinds of attention that came here in the last run."""
        return {self._layers[path].kind for path in self.heard}

    @contextlib.contextmanager
    def again(self, run: ModelRun, block: str, listeners: Sequence[Listener] | None = None):
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
    def _following(self, run: ModelRun, block: str = ""):
        """Keeps a stack of the attention modules that are running. block: of those inside this module, which may be one
        itself, whose forward is then called by hand."""
        before, token = (self._run, self._stack), None
        handles: list = []
        try:
            layers = self._layers_in(run.network)
            paths = [path for path in layers if not block or path.startswith(f"{block}.")]
            modules = {path: run.network.get_submodule(path) for path in paths}
            handles.extend(handle for path in paths for handle in self._hooked(layers[path], modules[path]))
            self._run, self._stack = run, [_Entered(layers[block])] if block in layers else []
            self._entered, self.heard = set(), set()
            token = _running.set((*_running.get(), (self, run)))
            plain = plain_kernels() if self._differentiable else contextlib.nullcontext()
            with uncompiled(), plain, bridged(modules.values(), self._attention):
                yield
        finally:
            if token is not None:
                _running.reset(token)
            self._run, self._stack = before
            for handle in handles:
                handle.remove()

    def _layers_in(self, network: Module) -> Mapping[str, Layer]:
        return self._layers if network is self._network else layers_in(self._family, network)

    @property
    def _kinds(self) -> frozenset[AttentionKind]:
        return frozenset(layer.kind for layer in self._layers.values())

    def _hooked(self, layer: Layer, module: Module) -> Iterator:
        """Hooks that put the module on the stack while it runs."""

        def enter(_, inputs):
            self._entered.add(layer.path)
            self._stack.append(_Entered(layer, inputs))

        def leave(*_):
            self._stack.pop()

        def note_picture(_, __, key):
            self._stack[-1].pictures.add(key.data_ptr())

        yield module.register_forward_pre_hook(enter)
        yield module.register_forward_hook(leave, always_call=True)
        if of_picture := getattr(module, self._family.picture_keys, None) if self._family.picture_keys else None:
            yield of_picture.register_forward_hook(note_picture)

    def _attention(self, previous, func, *args, **kwargs):
        if self._differentiable:
            func = _differentiable_attention()
            kwargs["low_precision_attention"] = False  # what has no gradient, as packs with 8-bit kernels know it
        proceed = func if previous is None else lambda *a, **k: _checked(previous(func, *a, **k), a[0])
        if self._run is None or not self._stack:
            return proceed(*args, **kwargs)
        entered = self._stack[-1]
        layer, count = entered.layer, args[0].shape[2 if kwargs.get("skip_reshape") else 1]
        self.heard.add(layer.path)
        asking = who_asks()
        if asking == "a patch" or (asking == "the model" and layer.kind == "cross" and not entered.is_prompts(args[1])):
            return proceed(*args, **kwargs)
        tokens = entered.tokens if entered.tokens and entered.tokens >= count else None
        call = describe_call(layer, self._run, args, kwargs, proceed, tokens, entered.asked, previous is None)
        entered.asked += count if asking == "the model" else 0
        outputs = (listener(call) for listener in self._listeners)
        output = next((o for o in outputs if o is not None), None)
        if output is None and (call.uninflated is None or running_taps()[0][0] is not self):
            return proceed(*args, **kwargs)  # the last tap of the chain is the one to inflate
        if output is None:
            output = call.attend(call.query, call.key, call.value, call.scale)
        return call.answered(output, kwargs)


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
