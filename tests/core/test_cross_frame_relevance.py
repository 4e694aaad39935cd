"""Cross-frame relevance against a loop over token pairs, and the regions that go in and come out."""

import pytest
import torch
from spacetime_edit.core.cross_frame_relevance import (
    cross_frame_relevance,
    point_region,
    region_weight,
    relevant_region,
)
from torch.utils._python_dispatch import TorchDispatchMode

F, H, N, D = 3, 2, 6, 4


def random_features(dtype=torch.float64, tokens=N):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(F, H, tokens, D, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2)]


def random_weight(tokens=N):
    weight = torch.rand(tokens, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    weight[0] = 0
    return weight / weight.sum()


def attention(query, key, h, i, p, j, q, scale):
    """S_ij(p, q) of one head, by the definition."""
    logits = [scale * float(query[i, h, p] @ key[j, h, t]) for t in range(N)]
    return float(
        torch.tensor(logits, dtype=torch.float64).exp()[q] / torch.tensor(logits, dtype=torch.float64).exp().sum()
    )


@pytest.mark.parametrize("frame", range(F))
@pytest.mark.parametrize("scale", [None, 0.9])
def test_it_is_the_sum_over_token_pairs_of_its_definition(frame, scale):
    query, key = random_features()
    weight, factor = random_weight(), D**-0.5 if scale is None else scale
    expected = torch.zeros(F, N, dtype=torch.float64)
    for j in range(F):
        for q in range(N):
            for h in range(H):
                for p in range(N):
                    looked_at = attention(query, key, h, frame, p, j, q, factor)
                    looks = attention(query, key, h, j, q, frame, p, factor)
                    expected[j, q] += N / 2 / H * weight[p] * (looked_at + looks)
    torch.testing.assert_close(cross_frame_relevance(query, key, weight, frame, scale=scale), expected)


@pytest.mark.parametrize("rows", [1, 4, 5, 100])
def test_blocks_change_nothing(rows):
    query, key = random_features()
    whole = cross_frame_relevance(query, key, random_weight(), 1)
    torch.testing.assert_close(cross_frame_relevance(query, key, random_weight(), 1, rows=rows), whole)


def test_no_map_of_all_token_pairs_is_made():
    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            self.elements = max(self.elements, out.numel() if isinstance(out, torch.Tensor) else 0)
            return out

    tokens, rows = 400, 8
    query, key = random_features(torch.float32, tokens)
    with Largest() as largest:
        cross_frame_relevance(query, key, random_weight(tokens), 0, rows=rows)
    assert largest.elements <= max(H * rows * tokens, query.numel())


def test_uniform_attention_has_relevance_one():
    query, key = random_features()
    torch.testing.assert_close(
        cross_frame_relevance(0 * query, key, random_weight(), 0), torch.ones(F, N, dtype=torch.float64)
    )


def test_it_follows_tokens_that_move():
    """A later frame that holds the same tokens at other places: the relevance moves with them."""
    query, key = random_features()
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    query[2], key[2] = query[0][:, order], key[0][:, order]
    relevance = cross_frame_relevance(query, key, random_weight(), 0)
    torch.testing.assert_close(relevance[2], relevance[0][order])


def test_half_precision_is_worked_out_in_single():
    query, key = random_features(torch.float16)
    exact = cross_frame_relevance(query.double(), key.double(), random_weight(), 0)
    found = cross_frame_relevance(query, key, random_weight(), 0)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (1, 1), (16, 32)])
def test_a_point_weighs_the_cell_that_holds_it(grid):
    height, width = grid
    region = point_region(19, 5, 8, 32)
    weight = region_weight(region, height, width)
    assert weight.sum() == pytest.approx(1)
    y, x = 5 * height // 8, 19 * width // 32
    rows, columns = weight.view(height, width).nonzero().T
    assert weight.view(height, width)[y, x] > 0
    assert (rows - y).abs().max() <= 1 and (columns - x).abs().max() <= 1  # cells that do not divide the clip overlap


def test_a_region_weighs_cells_by_the_share_it_covers():
    region = torch.zeros(4, 4)
    region[:2, :2] = 1
    region[0, 2] = 1
    torch.testing.assert_close(region_weight(region, 2, 2), torch.tensor([0.8, 0.2, 0, 0]))


@pytest.mark.parametrize("point", [(-1, 0), (0, -1), (12, 0), (0, 7)])
def test_a_point_outside_the_clip_is_an_error_that_says_its_size(point):
    with pytest.raises(
        ValueError, match=r"^x, y: the point .* outside the clip of 12 x 7 pixels; .* 0 to 11 .* 0 to 6"
    ):
        point_region(*point, 7, 12)


def test_the_mask_holds_what_reaches_the_share_of_the_clips_maximum():
    relevance = torch.tensor([[[0.0, 1.0], [2.0, 8.0]], [[1.9, 2.1], [0.5, 0.0]]])
    assert relevant_region(relevance, 0.25).tolist() == [[[0, 0], [1, 1]], [[0, 1], [0, 0]]]
