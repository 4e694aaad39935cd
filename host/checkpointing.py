"""Block checkpointing (Chen et al. 2016) that is right for losses on what listeners recorded inside the blocks.

A block keeps its inputs only and runs again in the backward pass. What a recorder took from it (query, key, temporal
map) leaves the block as further outputs, so that losses are formed outside, over all layers, and the gradient enters
the block through them.
"""

import contextlib
import re
import weakref
from collections.abc import MutableSet, Sequence

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from .attention_tap import AttentionTap, EnoughSeen, running_taps
from .families import Family
from .features import FeatureRecorder
from .gradients import NormalTensors


@contextlib.contextmanager
def checkpointed(network: torch.nn.Module, family: Family, tap: AttentionTap, recorder: FeatureRecorder):
    """Within, the blocks of `network` that the family's row names keep no activation for the backward pass.

    tap: the one installed in the run; recorder: its listener. Taps of patches modulate again what they modulated.
    Restored on exit. A block whose forward another pack has replaced is left alone.
    """
    replaced, made = [], weakref.WeakSet()
    for path, module in network.named_modules():
        is_block = re.fullmatch(family.blocks, path) and any(module.children())
        if is_block and "forward" not in module.__dict__:
            module.forward = _checkpointed(path, module.forward, family.mutates, tap, recorder, made)
            replaced.append(module)
    try:
        yield
    finally:
        for module in replaced:
            del module.__dict__["forward"]
        for block in made:
            block.let_go()


def _checkpointed(path: str, original, mutates: bool, tap: AttentionTap, recorder: FeatureRecorder, made: MutableSet):
    def forward(*args, **kwargs):
        if not torch.is_grad_enabled():
            return original(*args, **kwargs)
        block = _Block(path, original, args, kwargs, mutates, tap, recorder)
        made.add(block)
        return block() if block.inputs else original(*args, **kwargs)

    return forward


class _Block:
    """One call of a block: what it takes to make it again."""

    def __init__(self, path, original, args, kwargs, mutates, tap, recorder):
        self._path, self._original, self._mutates = path, original, mutates
        self._tap, self._recorder, self._taps = tap, recorder, running_taps()
        values, self._structure = tree_flatten((args, kwargs), is_leaf=_is_options)
        self._live: list | None = values
        self._places = [i for i, v in enumerate(values) if isinstance(v, Tensor) and v.requires_grad]
        self._kept = [dict(v) if _is_options(v) else v for v in values]  # later blocks write into the options
        for place in self._places:
            self._kept[place] = None  # autograd keeps these, and lets go of each once it has passed
        self._names: list[str] = []
        self._ended = False

    @property
    def inputs(self) -> list[Tensor]:
        """The arguments that carry gradients."""
        return [self._live[i] for i in self._places]

    def __call__(self):
        outputs = _Checkpoint.apply(self, *self.inputs)
        self._live = None
        recorded = outputs[len(outputs) - len(self._names) :]
        self._recorder.tensors.update(zip(self._names, recorded, strict=True))
        if self._ended:
            raise EnoughSeen
        return tree_unflatten(list(outputs[: len(outputs) - len(self._names)]), self._output_structure)

    def first(self, inputs: Sequence[Tensor]) -> tuple:
        """The block's outputs, flat, then what the recorder took; within a forward pass without graph."""
        known = set(self._recorder.tensors)
        outputs = self._outputs(inputs, self._live)
        self._names = [name for name in self._recorder.tensors if name not in known]
        return *outputs, *(self._recorder.tensors[name] for name in self._names)

    def again(self, inputs: Sequence[Tensor]) -> tuple:
        """The same with a graph from `inputs`, long after the run."""
        recorder, held = self._recorder, self._recorder.tensors
        recorder.tensors = {}
        try:
            with contextlib.ExitStack() as within:
                for tap, run in self._taps:
                    listeners = [recorder.replay(self._names)] if tap is self._tap else None
                    within.enter_context(tap.again(run, self._path, listeners))
                outputs = self._outputs(inputs, self._kept)
            return *outputs, *(recorder.tensors[name] for name in self._names)
        finally:
            recorder.tensors = held

    def let_go(self) -> None:
        """Of all it holds: what was recorded holds the block through autograd, a circle that no collector sees."""
        vars(self).clear()

    def _outputs(self, inputs: Sequence[Tensor], values: list) -> list:
        values = [_copied(v) for v in values] if self._mutates else list(values)
        for place, tensor in zip(self._places, inputs, strict=True):
            values[place] = tensor.clone() if self._mutates else tensor
        args, kwargs = tree_unflatten(values, self._structure)
        try:
            outputs, self._output_structure = tree_flatten(self._original(*args, **kwargs))
        except EnoughSeen:
            outputs, self._ended = [], True
        return outputs


class _Checkpoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx, block: _Block, *inputs: Tensor):
        ctx.set_materialize_grads(False)
        ctx.block = block
        ctx.save_for_backward(*inputs)
        return block.first(inputs)

    @staticmethod
    def backward(ctx, *flow: Tensor | None):
        with torch.enable_grad(), NormalTensors():  # the mode of the forward pass does not reach into a backward pass
            inputs = [t.detach().requires_grad_() for t in ctx.saved_tensors]
            outputs = ctx.block.again(inputs)
        pairs = [(o, g) for o, g in zip(outputs, flow, strict=True) if g is not None and o.requires_grad]
        ends, gradients = zip(*pairs, strict=True)
        return None, *torch.autograd.grad(ends, inputs, gradients, allow_unused=True)


def _is_options(value) -> bool:
    """Whether an argument is the host's transformer_options."""
    return isinstance(value, dict) and "optimized_attention_override" in value


def _copied(value):
    return value.clone() if isinstance(value, Tensor) and value.is_floating_point() else value
