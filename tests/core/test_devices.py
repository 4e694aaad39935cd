"""Losses on devices without float64, as Metal is: their operations, on tensors without data of such a device."""

import pytest
import torch
from spacetime_edit.core import float64
from spacetime_edit.core.relevance import AttentionFeatures, matching_loss
from spacetime_edit.core.self_similarity import spatial_self_similarity_loss, temporal_self_similarity_loss
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class NoFloat64(TorchDispatchMode):
    """Refuses operations that make a float64 tensor on the device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "cpu" and tensor.dtype == torch.float64:
                raise TypeError(f"{function}: the device has no float64")
        return result


@pytest.fixture
def device(monkeypatch):
    """A kind that has float64, taken for one that has not."""
    monkeypatch.setattr(float64, "WITHOUT_FLOAT64", {"cuda"})
    with FakeTensorMode(), NoFloat64():
        yield torch.device("cuda")


def test_the_guard_is_awake(device):
    with pytest.raises(TypeError, match="no float64"):
        torch.ones(2, device=device).double()


@pytest.mark.parametrize("tokens", [4, 40], ids=["fewer tokens than channels", "more"])
@pytest.mark.parametrize("loss", [spatial_self_similarity_loss, temporal_self_similarity_loss])
def test_self_similarity(device, loss, tokens):
    source, target = torch.randn(3, tokens, 16, device=device), torch.randn(3, tokens, 16, device=device)
    assert loss(source, target.requires_grad_()).shape == ()  # the spatial one forms its gradient along with it


def test_relevance(device):
    source, target = (
        AttentionFeatures(
            torch.randn(3, 2, 8, 4, device=device),
            torch.randn(3, 2, 8, 4, device=device),
            torch.rand(8, 2, 3, 3, device=device),
        )
        for _ in range(2)
    )
    assert matching_loss(source, target, rows=4).shape == ()
