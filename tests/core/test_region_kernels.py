"""The Triton kernels of region attention, in Triton's interpreter, against the definition in float64."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not there")

from spacetime_edit.core import attention_scores, region_attention, region_kernels  # noqa: E402
from spacetime_edit.core.region_attention import modulated_attention  # noqa: E402
from spacetime_edit.tests.core.test_region_attention import CASES, dense, partition, prepared, problem  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
NOT_TAKEN = ("a mask of rows and keys", "a narrower value")
TAKEN = {name: case for name, case in CASES.items() if name not in NOT_TAKEN}


@pytest.fixture
def kernels(monkeypatch):
    """Every call that the kernels take goes to them, and any other way to compute it fails."""

    def not_here(*_, **__):
        raise AssertionError("computed without the kernel")

    for module in (region_attention, attention_scores):
        monkeypatch.setattr(module, "kernels_for", lambda query, value: region_kernels)
    monkeypatch.setattr(region_attention, "_augmented", not_here)
    monkeypatch.setattr(region_attention, "_tiled", not_here)
    small = dict.fromkeys(region_kernels.CONFIGS, ((16, 16, 4, 1),))  # several tiles of rows and of keys
    monkeypatch.setattr(region_kernels, "CONFIGS", small)


def cast(tensors, dtype):
    return [t.to(dtype) for t in tensors]


def worst(found, expected):
    return float((found.double() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("name", TAKEN)
def test_values_are_those_of_the_definition(kernels, name):
    tensors, options = prepared({k: v for k, v in TAKEN[name].items() if k != "tile"})
    mask = options.get("mask")
    found = modulated_attention(
        *cast(tensors, torch.float32), **options | ({} if mask is None else {"mask": mask.float()})
    )
    rounded = [t.float().double() for t in tensors]
    assert worst(found, dense(*rounded, **options)) < 2e-5


@pytest.mark.parametrize("width", [8, 40, 64, 80, 96, 160])
def test_heads_of_every_width(kernels, width):
    query, key, value, u, v, strength = problem(1, width=width, n=21, m=35)
    tensors = cast((query, key, value, partition(u), partition(v), strength), torch.float32)
    found = modulated_attention(*tensors, overlap="product")
    assert worst(found, dense(*(t.double() for t in tensors), overlap="product")) < 2e-5


def test_half_precision_errs_as_its_own_rounding(kernels):
    query, key, value, u, v, strength = problem(2, width=40, n=33, m=50)
    tensors = [*cast((query, key, value), torch.float16), *cast((partition(u), partition(v), strength), torch.float32)]
    found = modulated_attention(*tensors, overlap="product")
    assert found.dtype == torch.float16
    assert worst(found, dense(*(t.double() for t in tensors), overlap="product")) < 3e-3


def test_rows_of_no_strength_are_plain_attention(kernels):
    query, key, value, u, v, strength = (t.float() for t in problem(3))
    strength[:, :, ::2] = 0
    found = modulated_attention(query, key, value, u, v, strength)
    plain = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    assert worst(found[:, :, ::2], plain[:, :, ::2].double()) < 1e-5
    assert worst(found[:, :, 1::2], plain[:, :, 1::2].double()) > 1e-2


@pytest.mark.parametrize("name", ["any", "padding and blocks", "keys left alone"])
def test_tiles_of_rows_of_no_strength(kernels, name):
    """Whole tiles of rows, and a whole batch item: no extrema are searched for them."""
    tensors, options = prepared(CASES[name])
    tensors = [*tensors[:5], tensors[5].clone()]
    tensors[5][:, :, :16] = 0
    tensors[5][-1] = 0
    mask = options.get("mask")
    found = modulated_attention(
        *cast(tensors, torch.float32), **options | ({} if mask is None else {"mask": mask.float()})
    )
    assert worst(found, dense(*(t.float().double() for t in tensors), **options)) < 2e-5


def test_any_layout_of_the_tensors_in_memory(kernels):
    """As the host splits heads off: tokens, heads, channels; keys and values as parts of one tensor."""
    query, key, value, u, v, strength = (t.float() for t in problem(4))
    expected = modulated_attention(query, key, value, u, v, strength)
    packed = torch.stack([key, value], 2).transpose(1, 3).contiguous().transpose(1, 3)
    turned = query.transpose(1, 2).contiguous().transpose(1, 2), packed[:, :, 0], packed[:, :, 1]
    assert not any(t.is_contiguous() for t in turned)
    assert torch.equal(modulated_attention(*turned, u, v, strength), expected)
    across = [t.mT.contiguous().mT for t in (query, key, value)]
    assert torch.allclose(modulated_attention(*across, u, v, strength), expected, atol=1e-6)


@pytest.mark.parametrize("name", ["any", "padding", "padding and blocks", "a bias and padding"])
def test_gradients_rest_on_extrema_from_the_kernel(monkeypatch, name):
    """Where a graph is recorded the attention is PyTorch's own, with the extrema from the kernel."""
    monkeypatch.setattr(region_attention, "kernels_for", lambda query, value: region_kernels)
    monkeypatch.setattr(attention_scores, "kernels_for", lambda query, value: region_kernels)
    monkeypatch.setattr(attention_scores, "_extrema_of", None)
    tensors, options = prepared(CASES[name])
    leaves = [t.requires_grad_() for t in tensors[:3]]
    expected = dense(*tensors, **options)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = modulated_attention(*tensors, **options)
    assert worst(found.detach(), expected.detach()) < 1e-6
    for ours, theirs in zip(*(torch.autograd.grad((o * weight).sum(), leaves) for o in (found, expected)), strict=True):
        assert worst(ours, theirs) < 1e-5


def test_a_card_without_room_takes_smaller_tiles(kernels, monkeypatch):
    tried = []

    class Kernel:
        def __getitem__(self, grid):
            def run(*_, ROWS, **__):
                tried.append(ROWS)
                if ROWS > 16:
                    raise region_kernels.OutOfResources(300, 200, "shared memory")

            return run

    monkeypatch.setattr(region_kernels, "_region_attention", Kernel())
    monkeypatch.setattr(region_kernels, "CONFIGS", {64: ((64, 32, 4, 2), (32, 32, 4, 1), (16, 16, 4, 1))})
    modulated_attention(*(t.float() for t in problem()))
    assert tried == [64, 32, 16]


@pytest.mark.parametrize(
    "fault",
    [RuntimeError("no C compiler"), OSError("no driver"), triton.TritonError("does not compile"), 0.5, float("nan")],
)
def test_a_kernel_that_does_not_run_or_errs_is_not_used(monkeypatch, caplog, fault):
    def run(*_):
        if isinstance(fault, Exception):
            raise fault
        return fault

    monkeypatch.setattr(region_kernels, "_error", run)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    region_kernels.works.cache_clear()
    assert not region_kernels.works(torch.device("cuda"), torch.float16, 64)
    assert "PyTorch's attention is used" in caplog.text
    region_kernels.works.cache_clear()


def test_old_cards_and_missing_memory(monkeypatch):
    def no_memory(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(region_kernels, "_error", no_memory)
    region_kernels.works.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not region_kernels.works(torch.device("cuda"), torch.float16, 64)
    region_kernels.works.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(torch.OutOfMemoryError):
        region_kernels.works(torch.device("cuda"), torch.float16, 64)


@pytest.mark.parametrize("kernel", ["region_attention", "extrema"])
def test_the_check_of_a_card_passes_no_nan(monkeypatch, kernel):
    original = getattr(region_kernels, kernel)

    def broken(*arguments, **options):
        out = original(*arguments, **options)
        (out if kernel == "region_attention" else out[0][0])[0, 0, 3] = torch.nan
        return out

    monkeypatch.setattr(region_kernels, kernel, broken)
    error = region_kernels._error(torch.device("cpu"), torch.float16, 16)
    assert not error <= region_kernels.MOST_ERROR[torch.float16]


def test_the_check_of_a_card_finds_the_kernels_right():
    """In float16: Triton's interpreter has no products of bfloat16."""
    assert region_kernels._error(torch.device("cpu"), torch.float16, 40) < region_kernels.MOST_ERROR[torch.float16]


COMPILE = """
import sys
sys.path.insert(0, {tools!r})
from pack import load_pack
load_pack(host=False)
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from spacetime_edit.core import region_kernels

half, numbers = "*fp16", ("scale", "hidden")
kinds = {{"OfQuery": half, "OfKey": half, "Strength": "*fp32", "Alone": "*i8", "Ends": "*i32"}}
kinds |= dict.fromkeys(("Low", "High"), "*fp32") | dict.fromkeys(("LowAt", "HighAt"), "*i64")
kinds |= dict.fromkeys(("Query", "Key", "Value", "Out", "Mask"), half) | dict.fromkeys(numbers, "fp32")
for width in (40, 128):
    wide, rest = region_kernels._split(width)
    rows, keys, warps, stages = next(configs for most, configs in region_kernels.CONFIGS.items() if width <= most)[0]
    fixed = dict(WIDTH=width, WIDE=wide, REST=rest, CHANNELS=16, BLOCKS=2, HAS_MASK=True, HAS_ALONE=True)
    fixed |= dict(ROWS=rows, KEYS=keys)
    for kernel in (region_kernels._region_attention, region_kernels._extrema):
        names = kernel.arg_names
        signature = {{name: "constexpr" if name in fixed else kinds.get(name, "i32") for name in names}}
        constants = {{(place,): fixed[name] for place, name in enumerate(names) if name in fixed}}
        source = ASTSource(kernel, signature=signature, constexprs=constants)
        made = triton.compile(source, GPUTarget("cuda", 80, 32), dict(num_warps=warps, num_stages=stages))
        print(made.metadata.shared)
"""


def test_the_kernels_compile_for_a_card_that_is_not_there(tmp_path):
    """With shared memory that compute capability 8.0 has."""
    code = COMPILE.format(tools=str(ROOT / "tools"))
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET")
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert all(0 < int(shared) <= 163 * 1024 for shared in run.stdout.split())
