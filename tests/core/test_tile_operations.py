"""Products in TF32, emulated: its operands keep ten bits behind the first, its sums are in float32."""

import pytest
import torch
from spacetime_edit.core.relevance import AttentionFeatures, matching_loss
from spacetime_edit.core.tile_operations import tensor_cores
from torch.nn.functional import cosine_similarity
from torch.utils._python_dispatch import TorchDispatchMode

FRAMES, HEADS, TOKENS, DIM = 4, 2, 30, 40
KINDS = pytest.mark.parametrize("joint", [False, True], ids=["frames by themselves", "all frames"])


class TF32(TorchDispatchMode):
    """Rounds the operands of scores of float32, and of their gradients, to ten bits, to nearest; counts them. The last
    product, with the temporal map, is another operation, and stays in float32."""

    products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.baddbmm.out, torch.ops.aten.baddbmm.default):
            self.products += 1
            args = args[0], *map(rounded, args[1:3])
        return func(*args, **(kwargs or {}))


def rounded(tensor):
    if tensor.dtype != torch.float32:
        return tensor
    bits = tensor.contiguous().view(torch.int32)
    made = ((bits + 0x0FFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)
    return tensor if torch.equal(made, tensor) else made  # in its own layout, on which the order of sums depends


def drawn(seed, joint, noise=0.0, dtype=torch.bfloat16):
    """Features in half precision, and of the same seed others that are off by some noise."""
    generator = torch.Generator().manual_seed(seed)
    query, key = torch.randn(2, FRAMES, HEADS, TOKENS, DIM, generator=generator) * 1.5
    logits = torch.randn(TOKENS, HEADS, FRAMES, FRAMES, generator=generator)
    query, key, logits = (t + noise * t.std() * torch.randn(t.shape, generator=generator) for t in (query, key, logits))
    return AttentionFeatures(query.to(dtype), key.to(dtype), None if joint else logits.softmax(-1).to(dtype))


def gradient_of(source, target, **options):
    """The loss, and its gradient in query and key as float64."""
    leaves = [t.clone().requires_grad_() for t in target.tensors]
    loss = matching_loss(source, AttentionFeatures(*leaves), radius=0, **options)
    return float(loss.detach()), torch.cat([g.double().flatten() for g in torch.autograd.grad(loss, leaves[:2])])


@KINDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_loss_of_half_precision_loses_nothing_in_tf32(joint, dtype):
    source, target = drawn(0, joint, dtype=dtype), drawn(0, joint, 0.2, dtype)
    plain = matching_loss(source, target, radius=0, rows=13)
    with TF32() as mode:
        in_tf32 = matching_loss(source, target, radius=0, rows=13)
    assert mode.products
    assert torch.equal(in_tf32, plain)


@KINDS
@pytest.mark.parametrize(("cosine", "noise"), [(0.5, 1.0), (0.9, 0.3), (0.99, 0.1), (0.999, 0.03)])
def test_what_is_left_and_the_gradient_in_tf32(joint, cosine, noise):
    """Against float64, of features in bfloat16, at several cosines: the step of STR-Match follows 1 + loss."""
    source = drawn(1, joint)
    for _ in range(40):  # the noise that makes this cosine, by halving
        target = drawn(1, joint, noise)
        found = -float(matching_loss(source.map(torch.Tensor.double), target.map(torch.Tensor.double), radius=0))
        noise *= ((1 - cosine) / (1 - found)) ** 0.5
    assert abs((1 - found) / (1 - cosine) - 1) < 0.1
    loss, exact = gradient_of(source.map(torch.Tensor.double), target.map(torch.Tensor.double), rows=13)
    with TF32() as mode:
        in_tf32, gradient = gradient_of(source, target, rows=13)
    assert mode.products
    assert abs((1 + in_tf32) / (1 + loss) - 1) < 1e-2
    assert cosine_similarity(gradient, exact, dim=0) > 0.9999


def test_the_setting_of_products_is_restored():
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    with pytest.raises(RuntimeError, match="of the test"), tensor_cores():
        assert settings.fp32_precision == "tf32"
        raise RuntimeError("of the test")
    assert settings.fp32_precision == before
