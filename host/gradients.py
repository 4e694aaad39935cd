"""Gradients of a loss with respect to the latent, through any natively loaded model, inside a sampler step.

ComfyUI runs nodes under inference mode with weights that autograd must not save: they may be cast, patched, quantised
or streamed from another device. So no weight enters the graph here: linear layers and convolutions fetch their weight
again in the backward pass, as the host fetches it in the forward pass.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from itertools import chain

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .attention_tap import AttentionTap
from .families import AttentionKind
from .kernels import plain_kernels, uncompiled
from .model_pass import call_model


@contextlib.contextmanager
def differentiable(base_model, *, mutates: bool = False, beside: Iterable[torch.nn.Module] = ()):
    """Within, calls of `base_model` (the host's BaseModel) build a graph from their latent; restored on exit.

    Leaves inference mode, trades fused kernels without a backward for plain ones, and keeps weights out of the graph.
    mutates: the family's blocks change their activations in place, so autograd must keep copies (slower). beside:
    networks that run beside the model's, as ControlNets.
    """
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        uncompiled(),
        plain_kernels(),
        torch.autograd.graph.allow_mutation_on_saved_tensors() if mutates else contextlib.nullcontext(),
        _weight_free_layers(chain(base_model.diffusion_model.modules(), *(n.modules() for n in beside))),
        NormalTensors(),
    ):
        yield


@contextlib.contextmanager
def prediction_with_graph(
    base_model,
    latent: Tensor,
    sigma: Tensor,
    cond: dict,
    *,
    model_options: dict,
    tap: AttentionTap | None = None,
    needs: frozenset[AttentionKind] = frozenset(),
    mutates: bool = False,
    place: int = 0,
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Within: x, a copy of the latent, and the prediction of x0 with a graph from it; None where a listener ended it.

    latent: as the sampler holds it; sigma: scalar; cond: one processed conditioning. tap, needs, place: see
    `model_pass.call_model`; mutates: see `differentiable`. The backward pass, too, is to run within.
    """
    with differentiable(base_model, mutates=mutates, beside=_control_networks(cond)):
        x = latent.clone().requires_grad_()
        conds, level = [_normal_cond(cond)], normal_tensor(sigma)
        yield x, call_model(base_model, conds, x, level, model_options, tap=tap, needs=needs, place=place)


def gradient_at(x: Tensor, loss: Tensor, loss_scale: float = 1.0, *, last: bool = True) -> Tensor:
    """d loss / d x; last: no other loss of the same prediction follows, so its graph may go.

    `loss_scale` keeps half-precision gradients out of underflow and is divided out.
    """
    return torch.autograd.grad(loss * loss_scale, x, retain_graph=not last)[0] / loss_scale


def latent_gradient(
    base_model,
    latent: Tensor,
    sigma: Tensor,
    cond: dict,
    loss: Callable[[Tensor | None], Tensor],
    *,
    loss_scale: float = 1.0,
    **options,
) -> tuple[Tensor, Tensor]:
    """(loss, d loss / d latent) of one conditional prediction, both detached.

    `loss` gets the prediction of x0 and may use what listeners recorded. The rest as in `prediction_with_graph`.
    """
    with prediction_with_graph(base_model, latent, sigma, cond, **options) as (x, denoised):
        value = loss(denoised)
        del denoised  # where memory is short
        return value.detach(), gradient_at(x, value, loss_scale)


def normal_tensor(tensor: Tensor) -> Tensor:
    """A copy that autograd may save, of a tensor made under inference mode."""
    with torch.inference_mode(False):
        return tensor.clone()


def _of_layer(output: Tensor) -> Tensor:
    """What a layer has put out under inference mode, as a tensor that autograd may save: in its own memory, which is
    nobody else's."""
    if type(output) is not Tensor:
        return normal_tensor(output)
    memory = output.untyped_storage(), output.storage_offset(), output.shape, output.stride()
    return torch.empty(0, dtype=output.dtype, device=output.device).set_(*memory)


def _control_networks(cond: dict) -> Iterator[torch.nn.Module]:
    """Of the ControlNets of one processed conditioning."""
    control = cond.get("control")
    while control is not None:
        network = getattr(control, "control_model", None)
        if isinstance(network, torch.nn.Module):
            yield network
        control = control.previous_controlnet


def _normal_cond(cond: dict) -> dict:
    """A copy of one processed conditioning with its tensors fit for autograd."""
    copy = dict(cond)
    copy["model_conds"] = {
        key: value._copy_with(value.cond.clone()) if isinstance(getattr(value, "cond", None), Tensor) else value
        for key, value in cond["model_conds"].items()
    }
    if isinstance(cond.get("mask"), Tensor):
        copy["mask"] = cond["mask"].clone()
    return copy


class NormalTensors(TorchFunctionMode):
    """Clones tensors born under inference mode as they enter an operation that records a graph.

    What an operation writes into (`add_`, `out=`) is left alone: a clone would swallow the result without an error.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__get__" or not torch.is_grad_enabled():  # shape, dtype, device: most calls, and no operation
            return func(*args, **kwargs)
        written = 1 if name.endswith("_") and not name.endswith("__") or name == "__setitem__" else 0
        if any(map(_is_inference, args[written:])):
            args = (*args[:written], *map(_normal, args[written:]))
        if kwargs:
            kwargs = {key: value if key == "out" else _normal(value) for key, value in kwargs.items()}
        return func(*args, **kwargs)


def _is_inference(value) -> bool:
    """Whether an argument of an operation is or holds a tensor made under inference mode."""
    kind = type(value)
    if kind in (Tensor, torch.nn.Parameter):
        return value.is_inference()
    return kind in (list, tuple) and any(map(_is_inference, value))


def _normal(value):
    """An argument of an operation, a tensor or a nest of them, with inference tensors cloned."""
    if isinstance(value, Tensor):
        return value.clone() if _is_inference(value) else value
    return type(value)(map(_normal, value)) if type(value) in (list, tuple) else value


@contextlib.contextmanager
def _weight_free_layers(modules: Iterable[torch.nn.Module]):
    """None of the layers saves one of the host's weight buffers for its backward while this is open.

    Linear layers and convolutions fetch their weight again, norms keep a copy of theirs. A layer whose forward another
    pack has replaced is left to autograd.
    """
    replaced = []
    for module in modules:
        if "forward" in module.__dict__:
            continue
        if _is_linear(module) or _is_convolution(module):
            module.forward = _weight_free(module)
        elif isinstance(module, tuple(NORMS)) and hasattr(module, "comfy_cast_weights"):
            module.forward = _copied_norm(module)
        else:
            continue
        replaced.append(module)
    try:
        yield
    finally:
        for module in replaced:
            del module.__dict__["forward"]


NORMS = {
    torch.nn.GroupNorm: lambda m, x, w, b: torch.nn.functional.group_norm(x, m.num_groups, w, b, m.eps),
    torch.nn.LayerNorm: lambda m, x, w, b: torch.nn.functional.layer_norm(x, m.normalized_shape, w, b, m.eps),
    torch.nn.RMSNorm: lambda m, x, w, b: torch.nn.functional.rms_norm(x, m.normalized_shape, w, m.eps),
}


def _copied_norm(module):
    """A forward of one of NORMS with weights of its own: the host may reuse the buffer that it streams weights into."""
    function = next(f for kind, f in NORMS.items() if isinstance(module, kind))
    original = module.forward

    def forward(x):
        if not (torch.is_grad_enabled() and x.requires_grad) or module.weight is None:
            return original(x)
        with _cast_weights(module, x) as (weight, bias):
            weight, bias = (None if t is None else normal_tensor(t) for t in (weight, bias))
        return function(module, x, weight, bias)

    return forward


@contextlib.contextmanager
def _cast_weights(module, like: Tensor):
    """(weight, bias) as the host hands them to this layer's operation, in the dtype and on the device of `like`."""
    import comfy.ops

    if hasattr(module, "cast_bias_weight"):  # as layers of ComfyUI-GGUF have it
        with torch.inference_mode():
            weight, bias = module.cast_bias_weight(like.detach())
        yield weight, bias
        return
    if not hasattr(module, "weight_function"):
        yield module.weight, module.bias
        return
    with torch.inference_mode():
        weight, bias, stream = comfy.ops.cast_bias_weight(module, like.detach(), offloadable=True)
    try:
        yield weight, bias
    finally:
        with torch.inference_mode():
            comfy.ops.uncast_bias_weight(module, weight, bias, stream)


def _is_linear(module) -> bool:
    """Also the host's quantised Linear, which is not an nn.Linear."""
    return isinstance(module, torch.nn.Linear) or (type(module).__name__ == "Linear" and hasattr(module, "in_features"))


def _is_convolution(module) -> bool:
    kinds = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
    return isinstance(module, kinds) and module.padding_mode == "zeros"


def _weight_free(module):
    original = module.forward

    def forward(x, *args, **kwargs):
        if args or kwargs or not isinstance(x, Tensor) or not torch.is_grad_enabled():
            return original(x, *args, **kwargs)
        if not x.requires_grad:  # of the prompt or the time, say: nothing to record, so the very kernel of sampling
            with torch.inference_mode():
                y = original(x)
            return _of_layer(y)
        return _WeightFree.apply(x, module, original)

    return forward


class _WeightFree(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, module, original):
        ctx.module, ctx.shape = module, x.shape
        with torch.inference_mode():
            y = original(x)
        return _of_layer(y)

    @staticmethod
    def backward(ctx, grad):
        return _input_gradient(ctx.module, grad, ctx.shape), None, None


@torch.no_grad()
def _input_gradient(module, grad: Tensor, shape) -> Tensor:
    """Gradient of a linear layer or convolution with respect to its input, with the weight as the host casts it."""
    import comfy.model_management
    from comfy.quant_ops import QuantizedTensor

    comfy.model_management.throw_exception_if_processing_interrupted()
    with _cast_weights(module, grad) as (weight, _):
        weight = weight.dequantize() if isinstance(weight, QuantizedTensor) else weight
        inputs, outputs = (shape[-1], grad.shape[-1]) if _is_linear(module) else (shape[1], grad.shape[1])
        expected = (outputs, inputs) if _is_linear(module) else (outputs, inputs // module.groups)
        if not weight.is_floating_point() or weight.shape[:2] != expected:
            raise ValueError(
                f"model: its {type(module).__name__} layers keep weights in a form that gives no gradient "
                f"({weight.dtype}, {tuple(weight.shape)}); load the model in bf16, fp16 or fp8"
            )
        if _is_linear(module):
            return grad @ weight
        dims = len(module.stride)
        function = {1: torch.nn.grad.conv1d_input, 2: torch.nn.grad.conv2d_input, 3: torch.nn.grad.conv3d_input}[dims]
        return function(shape, weight, grad, module.stride, module.padding, module.dilation, module.groups)
