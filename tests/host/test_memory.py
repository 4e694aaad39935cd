"""The predicted memory of a matching loss against what its gradient takes."""

import pytest
import torch
from spacetime_edit.core.live_memory import PeakMemory
from spacetime_edit.core.relevance import AttentionFeatures, matching_loss
from spacetime_edit.host.memory import SMALLER_TILES, loss_memory, small_tile

SIZES = {  # frames, heads, tokens, head width
    "one tile": (8, 4, 64, 32),
    "several tiles": (16, 4, 300, 40),
    "wide heads": (5, 6, 260, 128),
}


@pytest.mark.parametrize("smaller", [1, SMALLER_TILES])
@pytest.mark.parametrize("joint", [False, True], ids=["separate", "joint"])
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_a_loss_takes_what_is_predicted(size, joint, smaller):
    frames, heads, tokens, width = size
    generator = torch.Generator().manual_seed(0)

    def features():
        query, key = torch.randn(2, frames, heads, tokens, width, generator=generator)
        temporal = torch.randn(tokens, heads, frames, frames, generator=generator).softmax(-1)
        return AttentionFeatures(query, key, None if joint else temporal)

    with torch.inference_mode(False), torch.enable_grad():
        source, target = features(), features()
        leaves = [tensor.requires_grad_() for tensor in target.tensors]
        rows = None if smaller == 1 else small_tile(target)
        with PeakMemory() as memory:
            torch.autograd.grad(matching_loss(source, target, radius=1, rows=rows), leaves)
    assert 1 <= loss_memory([target], smaller) / memory.peak <= 2.5
