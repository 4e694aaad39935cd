"""Which code runs while a model is watched or differentiated: none that is compiled or fused; after it, as before."""

import contextlib
import inspect

import comfy.cli_args
import comfy.model_management as management
import comfy_kitchen
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from spacetime_edit.host import attention_tap, gradients, kernels
from spacetime_edit.host.gradients import differentiable
from spacetime_edit.tests.host.test_neighbours import (  # noqa: F401 (fixtures)
    EXACT,
    METHODS,
    every_model,
    family,
    graph,
    nothing_kept,
)
from spacetime_edit.tests.host.tiny_families import families_named

SWITCH = "disable_comfy_compiler"
NAMES = [name for names in kernels.FUSED_KERNELS.values() for name in names if hasattr(comfy_kitchen, name)]


# --- the host's compiler ------------------------------------------------


def replayed(model):
    """A stand-in for the compiler of ComfyUI 0.34: unless it is off as a forward begins, no module hook runs in it."""

    def forward(executor, *args, **kwargs):
        if getattr(comfy.cli_args.args, SWITCH):
            return executor(*args, **kwargs)
        network = executor.class_obj
        stores = [getattr(m, name) for m in network.modules() for name in ("_forward_hooks", "_forward_pre_hooks")]
        before = [dict(store) for store in stores]
        for store in stores:
            store.clear()
        try:
            return executor(*args, **kwargs)
        finally:
            for store, hooks in zip(stores, before, strict=True):
                store.update(hooks)

    fast = model.clone()
    fast.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "compiler", forward)
    return fast


@pytest.fixture
def compiler(monkeypatch):
    """A host that has one, and has it on."""
    monkeypatch.setattr(comfy.cli_args.args, SWITCH, False, raising=False)


@pytest.mark.parametrize("method", METHODS)
@every_model
def test_the_hosts_compiler_is_off_where_attention_is_watched(graph, method, compiler):  # noqa: F811
    run = METHODS[method]
    torch.testing.assert_close(run(graph.with_model(replayed)), run(graph), **EXACT)
    assert comfy.cli_args.args.disable_comfy_compiler is False


@families_named("Wan")
def test_without_the_switch_the_stand_in_is_noticed(graph, compiler, monkeypatch):  # noqa: F811
    before = METHODS["regions"](graph)
    for module in (attention_tap, gradients):
        monkeypatch.setattr(module, "uncompiled", contextlib.nullcontext)
    with pytest.raises((AssertionError, ValueError)):
        torch.testing.assert_close(METHODS["regions"](graph.with_model(replayed)), before, **EXACT)


@families_named("Wan")
def test_a_plain_run_keeps_the_compiler(graph, compiler):  # noqa: F811
    """Nothing of ours is in it: the inversion without the patch, say."""
    seen = []

    def look(executor, *args, **kwargs):
        seen.append(comfy.cli_args.args.disable_comfy_compiler)
        return executor(*args, **kwargs)

    watched = graph.inverted.clone()
    watched.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "look", look)
    graph.inverted = watched
    METHODS["inversion"](graph)
    assert seen and not any(seen)


@pytest.mark.parametrize("there", [True, False])
def test_the_switch_is_set_back_after_an_error(monkeypatch, there):
    """To what it was; a host without one does not get one."""
    if there:
        monkeypatch.setattr(comfy.cli_args.args, SWITCH, "as it was", raising=False)
    else:
        monkeypatch.delattr(comfy.cli_args.args, SWITCH, raising=False)
    with pytest.raises(ZeroDivisionError), kernels.uncompiled():
        assert getattr(comfy.cli_args.args, SWITCH, None) is (True if there else None)
        1 / 0  # noqa: B018
    assert getattr(comfy.cli_args.args, SWITCH, None) == ("as it was" if there else None)


# --- fused kernels ------------------------------------------------------


class Base:
    diffusion_model = torch.nn.Linear(2, 2)


def called(name, x):
    """What an operation of comfy_kitchen makes of activations x (2, 3, 4, 8), all its outputs as one."""
    turn = torch.linspace(0, 3, 3 * 4).reshape(1, 3, 1, 4)  # half of the width
    cos, sin = turn.cos(), turn.sin()
    freqs = torch.stack([cos, -sin, sin, cos], -1).unflatten(-1, (2, 2))
    scale = torch.linspace(0.5, 1.5, 8)
    inputs = {
        **dict.fromkeys(("x", "xq", "q", "activation"), x),
        **{key: x.flip(1) for key in ("xk", "k", "residual")},
        **dict.fromkeys(("scale", "q_scale", "k_scale", "norm_weight"), scale),
        **{"freqs_cis": freqs, "shift": scale.flip(0), "gate": scale, "epsilon": 1e-6, "eps": 1e-6},
    }
    function = getattr(comfy_kitchen, name)
    given = {key: value + 0 if torch.is_tensor(value) else value for key, value in inputs.items()}
    given = {key: given[key] for key in inspect.signature(function).parameters if key in given}
    made = function(**given)
    if name.endswith("_"):  # in place
        made = [given[key] for key in ("x", "xq", "q", "xk", "k") if key in given]
    return torch.cat([t.flatten() for t in (made if isinstance(made, (tuple, list)) else (made,))])


@pytest.mark.parametrize("name", NAMES)
def test_fused_kernels_are_traded_for_ones_with_a_gradient(name):
    fused = getattr(comfy_kitchen, name)
    x = torch.randn(2, 3, 4, 8, generator=torch.Generator().manual_seed(3))
    expected = called(name, x)
    way = torch.randn(x.shape, generator=torch.Generator().manual_seed(4))
    with differentiable(Base):
        assert getattr(comfy_kitchen, name) is not fused
        at, way = gradients.normal_tensor(x).requires_grad_(), gradients.normal_tensor(way)
        made = called(name, at)
        torch.testing.assert_close(made.detach(), expected, rtol=1e-5, atol=1e-6)
        (gradient,) = torch.autograd.grad(made.square().sum(), at)
        step = 1e-2
        with torch.no_grad():
            ahead, behind = (called(name, at + s * step * way).double().square().sum() for s in (1, -1))
        slope = float((gradient * way).sum())
        assert slope == pytest.approx(float(ahead - behind) / (2 * step), rel=2e-3, abs=2e-2)
    assert getattr(comfy_kitchen, name) is fused


NOT_OF_NETWORKS = (
    *("quantize", "dequantize", "scaled_mm", "stochastic_rounding", "int8_", "mm_int8", "gemv_awq", "convrot_w4a4"),
    *("w4a8_int8", "fp16_linear"),  # inside the host's layers, whose gradient is ours
    *("flash_attention", "sage_attention", "int8_attention", "sol_attn", "prequantize_int8_attention", "na2d", "na3d"),
    *("fp16_conv3d", "group_norm_", "gated_delta", "deltanet_"),  # of autoencoders and of language models
    *("delaunay3d", "mesh_bvh", "closest_point", "connected_components", "edge_collapse", "min_cut"),  # of meshes
    *("swap_nibbles", "to_blocked", "from_blocked", "list_backends", "disable_backend", "enable_backend"),
    *("set_backend_priority", "use_backend", "set_allocation_context"),
)
"""How functions of comfy_kitchen begin that no network of ours calls on activations with a gradient."""


def test_every_function_of_the_kitchen_is_known():
    """A new one may be a fused kernel that cuts the gradient: put it into FUSED_KERNELS, or here."""
    functions = {name for name, value in vars(comfy_kitchen).items() if inspect.isfunction(value) and name[0] != "_"}
    unknown = {name for name in functions - set(NAMES) if not name.startswith(NOT_OF_NETWORKS)}
    assert not unknown


def test_layouts_of_quantised_weights_compose_their_operations(monkeypatch):
    """From 0.2.40 they have methods that do several at once by a kernel, and answer NotImplemented where it is not."""
    from comfy_kitchen.tensor import TensorWiseINT8Layout

    fused = classmethod(lambda cls, *args: "by a kernel")
    monkeypatch.setattr(TensorWiseINT8Layout, "fused_rms_modulated", fused, raising=False)
    before = vars(TensorWiseINT8Layout)["fused_rms_modulated"]
    with differentiable(Base):
        assert TensorWiseINT8Layout.fused_rms_modulated(1, 2) is NotImplemented
    assert vars(TensorWiseINT8Layout)["fused_rms_modulated"] is before


def test_a_tap_that_prepares_a_comparison_uses_the_same_kernels(tiny):
    """So that the source's features are those that the target's would be, to the bit, whatever the weights are."""
    from spacetime_edit.host.attention_tap import AttentionTap
    from spacetime_edit.tests.host import support

    def states(**options):
        seen = []
        tap = AttentionTap(tiny.model, [lambda call: seen.append((management.in_training, comfy_kitchen.apply_rope))])
        tap = AttentionTap(tiny.model, tap.listeners, **options)
        latent = torch.zeros(8, 4, 16, 16)
        support.prediction(tiny.model, support.encode(tiny), latent, cfg=1.0, options=tap.install)
        return set(seen)

    fused = comfy_kitchen.apply_rope
    assert states() == {(False, fused)}
    ((training, kernel),) = states(differentiable=True)
    assert training and kernel is not fused
    assert comfy_kitchen.apply_rope is fused and not management.in_training
