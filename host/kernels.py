"""Which code a model runs while it is watched or differentiated: its modules one by one, by operations with a gradient.

Compiled code and replayed CUDA graphs pass module hooks by, and reuse memory that a listener or a graph still holds.
Fused kernels have no backward.
"""

import contextlib
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from functools import partial, wraps

import torch

FUSED_KERNELS = {
    "rope": tuple(
        f"{first}{layout}{count}{in_place}"
        for first in ("apply_rope", "rms_rope")
        for layout in ("", "_split_half")
        for count in ("", "1")
        for in_place in ("", "_")
    ),
    "adaln": ("adaln", "rms_adaln"),
    "residual": ("rms_gated_residual",),
}
"""Operations of comfy_kitchen that models call on activations, by the file of its plain forms."""


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """Within, neither torch.compile nor ComfyUI's own compiler (0.34 and later) acts; restored on exit.

    The host reads its switch as a forward begins, and replays no CUDA graph without its compiler.
    """
    import comfy.cli_args

    switches, name = comfy.cli_args.args, "disable_comfy_compiler"
    with contextlib.ExitStack() as off:
        if "torch._dynamo" in sys.modules:  # else nothing is compiled, and the import would take seconds
            off.enter_context(torch.compiler.set_stance("force_eager"))
        if hasattr(switches, name):
            off.enter_context(_set(switches, name, True))
        yield


@contextlib.contextmanager
def plain_kernels() -> Iterator[None]:
    """Within, models compute as in training: by operations that have a gradient, not by fused kernels; restored on
    exit.

    A source pass without gradient uses the same, so that it sees what the target pass sees, to the bit.
    """
    import comfy.model_management as management

    with contextlib.ExitStack() as traded:
        traded.enter_context(_set(management, "in_training", True))
        for owner, name, plain in _plain_forms():
            traded.enter_context(_set(owner, name, plain))
        yield


def _plain_forms() -> Iterator[tuple[object, str, object]]:
    """(owner, name, plain form) of every fused operation that the installed comfy_kitchen has."""
    try:
        import comfy_kitchen
        import comfy_kitchen.tensor as layouts
    except ImportError:
        return
    for file, names in FUSED_KERNELS.items():
        try:
            plain = importlib.import_module(f"comfy_kitchen.backends.eager.{file}")
        except ModuleNotFoundError:  # of an older version
            continue
        for name in filter(partial(hasattr, comfy_kitchen), names):
            form = getattr(plain, name.removesuffix("_"))
            yield comfy_kitchen, name, _written(form) if name.endswith("_") else form
    for layout in vars(layouts).values():  # of quantised weights, from 0.2.40
        for name in vars(layout) if isinstance(layout, type) else ():
            if name.startswith("fused_"):
                yield layout, name, _not_fused


def _written(plain: Callable) -> Callable:
    """The operation that writes the outputs of `plain` into its first inputs; the kitchen's own take no gradient."""

    @wraps(plain)
    def in_place(*args, **kwargs):
        given = inspect.signature(plain).bind(*args, **kwargs).arguments
        kept = {k: v.clone() if isinstance(v, torch.Tensor) and v.requires_grad else v for k, v in given.items()}
        made = plain(**kept)  # of copies, for what its backward keeps must not be overwritten
        outputs = made if isinstance(made, tuple) else (made,)
        inputs = tuple(given.values())[: len(outputs)]
        for tensor, output in zip(inputs, outputs, strict=True):
            tensor.copy_(output)
        return inputs if isinstance(made, tuple) else inputs[0]

    return in_place


def _not_fused(*_args, **_kwargs):
    """The answer of a layout that has no fused form; its caller then composes the operations."""
    return NotImplemented


@contextlib.contextmanager
def _set(owner, name: str, value) -> Iterator[None]:
    """Within, an attribute of another package has this value; it is set again as it was found."""
    before = vars(owner)[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
