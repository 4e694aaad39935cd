"""Self-similarity losses against similarity maps written out in float64, and the numerics near equality."""

import pytest
import torch
from spacetime_edit.core import self_similarity
from spacetime_edit.core.live_memory import PeakMemory
from spacetime_edit.core.self_similarity import spatial_self_similarity_loss, temporal_self_similarity_loss
from torch.nn.functional import cosine_similarity

FRAMES = 3
SIZES = {"fewer channels than tokens": (40, 8), "more": (10, 24)}


def keys(n, c, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(FRAMES, n, c, dtype=torch.float64, generator=generator) + 0.5).to(dtype)


def dense_spatial(source, target, paper_sum=False):
    total = 0.0
    for s, t in zip(source.double(), target.double(), strict=True):
        maps = [cosine_similarity(k[:, None], k[None], dim=-1) for k in (s, t)]
        difference = (maps[1] - maps[0]).square()
        total = total + (difference.sum() if paper_sum else difference.mean())
    return total / len(source)


def dense_temporal(source, target, paper_sum=False):
    maps = []
    for k in (source.double().mean(1), target.double().mean(1)):
        maps.append(cosine_similarity(k[:, None], k[None], dim=-1))
    difference = (maps[1] - maps[0]).square()
    return difference.sum() if paper_sum else difference.mean()


PAIRS = {
    "spatial": (spatial_self_similarity_loss, dense_spatial),
    "temporal": (temporal_self_similarity_loss, dense_temporal),
}


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
@pytest.mark.parametrize("paper_sum", [False, True])
@pytest.mark.parametrize("tile", [1, 10**9], ids=["row by row", "at once"])
def test_values_and_gradients_are_those_of_the_definition(size, pair, paper_sum, tile, monkeypatch):
    monkeypatch.setattr(self_similarity, "TILE_ELEMENTS", tile)
    source, results = keys(*size), []
    for loss in pair:
        target = keys(*size, seed=1).requires_grad_()
        value = loss(source, target, paper_sum=paper_sum)
        results.append((value.detach(), torch.autograd.grad(3 * value, target)[0]))
    (ours, slope), (wanted, reference) = results
    assert abs(ours - wanted) <= 1e-12 * max(1, abs(wanted))
    assert (slope - reference).norm() <= 1e-10 * reference.norm()


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("loss", [spatial_self_similarity_loss, temporal_self_similarity_loss])
def test_finite_differences_agree(size, loss):
    source = keys(*size)
    assert torch.autograd.gradcheck(lambda t: loss(source, t), keys(*size, seed=1).requires_grad_())


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("loss", [spatial_self_similarity_loss, temporal_self_similarity_loss])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_at_equality_loss_and_gradient_are_zero(size, loss, dtype):
    target = keys(*size, dtype=dtype).requires_grad_()
    value = loss(keys(*size, dtype=dtype), target)
    assert value == 0 and torch.autograd.grad(value, target)[0].eq(0).all()


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("distance", [1.0, 1e-2, 1e-4])
def test_small_differences_are_not_lost_in_float32(size, distance):
    """Where the plain difference of Gram matrices turns negative."""
    source = keys(*size, dtype=torch.float32)
    target = source + distance * keys(*size, seed=1, dtype=torch.float32)
    ours, wanted = spatial_self_similarity_loss(source, target), dense_spatial(source, target)
    assert abs(ours - wanted) <= 2e-3 * wanted


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keys_are_summed_in_float32(dtype):
    source, target = keys(40, 8, dtype=dtype), keys(40, 8, seed=1, dtype=dtype).requires_grad_()
    value = spatial_self_similarity_loss(source, target)
    assert value.dtype == torch.float32
    assert float(value.detach()) == pytest.approx(float(dense_spatial(source, target.detach())), rel=1e-5)
    assert torch.autograd.grad(value, target)[0].dtype == dtype


def test_it_forgets_length_and_sees_direction():
    source = keys(20, 8)
    assert float(spatial_self_similarity_loss(source, 7 * source)) == pytest.approx(0, abs=1e-25)
    rotation = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2)))[0]
    assert float(spatial_self_similarity_loss(source, source @ rotation)) == pytest.approx(0, abs=1e-15)
    assert float(spatial_self_similarity_loss(source, source.flip(1))) > 1e-3


def test_keys_of_zeros_give_no_nan():
    source = keys(20, 8)
    target = torch.zeros_like(source).requires_grad_()
    value = spatial_self_similarity_loss(source, target)
    assert value.isfinite() and torch.autograd.grad(value, target)[0].isfinite().all()


def test_no_map_of_tokens_is_kept():
    n, c = 2000, 32
    source, target = (torch.randn(1, n, c, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    target.requires_grad_()
    with PeakMemory() as peak:
        torch.autograd.grad(spatial_self_similarity_loss(source, target), target)
    assert peak.peak < 0.2 * 4 * n * n


def test_shapes_that_differ_are_named():
    with pytest.raises(ValueError, match=r"source \(3, 40, 8\) and target \(3, 39, 8\)"):
        spatial_self_similarity_loss(keys(40, 8), keys(39, 8))
