"""Regions from attention: profiles against the definition, K-means and connected parts against what is known."""

import pytest
import torch
from scipy.cluster.vq import kmeans2
from spacetime_edit.core import clustering
from spacetime_edit.core.clustering import attention_profiles, cluster_layout, k_means, on_grid


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("tile", [1, 10**9], ids=["row by row", "at once"])
def test_profiles_are_the_softmax_over_the_clip(monkeypatch, tile):
    monkeypatch.setattr(clustering, "TILE_ELEMENTS", tile)
    frames, heads, (h, w), width = 3, 2, (2, 4), 5
    query, key = torch.randn(2, frames, heads, h * w, width, generator=generator())
    found = attention_profiles(query, key, (h, w), 0.7)
    keys = key.double().transpose(0, 1).flatten(1, 2)
    for f in range(frames):
        wanted = (query[f].double() @ keys.mT * 0.7).softmax(-1).mean(0)
        assert torch.allclose(found[f].double(), wanted, atol=1e-6)


def test_profiles_of_many_tokens_are_summed_over_cells(monkeypatch):
    frames, heads, (h, w), width = 2, 2, (4, 6), 5
    query, key = torch.randn(2, frames, heads, h * w, width, generator=generator())
    whole = attention_profiles(query, key, (h, w), 0.7)
    monkeypatch.setattr(clustering, "MAX_LANDMARKS", 12)
    small = attention_profiles(query, key, (h, w), 0.7)
    wanted = whole.view(frames, h * w, frames, 2, 2, 3, 2).sum((4, 6)).flatten(2)
    assert small.shape == (frames, h * w, 12) and torch.allclose(small, wanted, atol=1e-6)


def test_grids_are_pooled_or_enlarged():
    tokens = torch.arange(16.0).view(1, 1, 16, 1)
    assert on_grid(tokens, (4, 4), (4, 4)) is tokens
    assert on_grid(tokens, (4, 4), (2, 2)).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert on_grid(tokens, (4, 4), (8, 8)).shape == (1, 1, 64, 1)


def blobs():
    centres = torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 5.0], [6.0, 6.0]])
    which = torch.arange(200) % 4
    return centres[which] + 0.6 * torch.randn(200, 2, generator=generator(1)), which


def test_k_means_finds_what_was_put_in():
    points, which = blobs()
    labels, centres = k_means(points, 4, generator())
    for number in range(4):
        assert len(labels[which == number].unique()) == 1
        inside = points[labels == number]
        assert torch.allclose(inside.mean(0), centres[number], atol=1e-5)


def test_k_means_is_as_tight_as_scipys():
    centres = 2 * torch.randn(6, 4, generator=generator(2))
    points = centres.repeat(50, 1) + torch.randn(300, 4, generator=generator(3))  # clusters that overlap
    labels, centres = k_means(points, 6, generator())
    ours = float((points - centres[labels]).square().sum())
    runs = (kmeans2(points.numpy(), 6, minit="++", seed=seed, iter=100) for seed in range(8))
    theirs = min(float(((points.numpy() - c[which]) ** 2).sum()) for c, which in runs)
    assert ours <= 1.001 * theirs


def test_the_seed_decides_and_global_state_does_not():
    points = torch.randn(300, 4, generator=generator(2))
    before = torch.get_rng_state()
    first = k_means(points, 6, generator(5))[0]
    torch.randn(3)
    assert torch.equal(first, k_means(points, 6, generator(5))[0])
    torch.set_rng_state(before)
    k_means(points, 6, generator(5))
    assert torch.equal(before, torch.get_rng_state())


def test_fewer_points_than_clusters_are_refused_and_equal_ones_are_not():
    with pytest.raises(ValueError, match="regions: 4 clusters of 3 tokens"):
        k_means(torch.randn(3, 2), 4, generator())
    labels, _ = k_means(torch.ones(9, 2), 3, generator())
    assert len(labels) == 9


F, H, W = 5, 8, 10


def scene():
    """Profiles of a clip with two things of one kind that move, a third of another kind, a speck, and the rest."""
    kinds = torch.zeros(F, H, W, dtype=torch.long)
    for f in range(F):
        kinds[f, 1:4, f : f + 3] = 1
        kinds[f, 1:4, 7:10] = 1
        kinds[f, 5:7, 2:6] = 2
    kinds[0, 7, 9] = 1
    return torch.eye(3)[kinds.flatten(1)] + 0.01 * torch.rand(F, H * W, 3, generator=generator(3)), kinds


def test_things_of_one_kind_that_do_not_touch_are_told_apart_over_time():
    profiles, kinds = scene()
    masks = cluster_layout(profiles, (H, W), 3, generator())
    assert torch.stack(masks).sum(0).eq(1).all()
    assert [int(m.sum()) for m in masks] == sorted((int(m.sum()) for m in masks), reverse=True)
    # in the last frame the moving thing touches the resting one: connected over time, they are one
    assert len(masks) == 3
    apart = cluster_layout(profiles[:4], (H, W), 3, generator())
    assert len(apart) == 4
    moving = next(m for m in apart if m[0, 2, 1] and not m[0, 2, 8])
    for f in range(4):
        assert moving[f].nonzero().tolist() == [[y, x] for y in range(1, 4) for x in range(f, f + 3)]


def test_specks_go_to_what_surrounds_them():
    profiles, _ = scene()
    speck = cluster_layout(profiles[:4], (H, W), 3, generator(), smallest=0.02)
    assert not any(m[0, 7, 9] and m.sum() < 5 for m in speck)
    assert torch.stack(speck).sum(0).eq(1).all()
    assert len(cluster_layout(profiles[:4], (H, W), 3, generator(), smallest=0)) == 5


def test_unsplit_regions_are_the_clusters():
    profiles, kinds = scene()
    masks = cluster_layout(profiles[:4], (H, W), 3, generator(), instances=False)
    assert {tuple(m.flatten().tolist()) for m in masks} == {
        tuple((kinds[:4] == kind).float().flatten().tolist()) for kind in range(3)
    }


def test_a_clip_of_one_colour_is_one_region():
    masks = cluster_layout(torch.ones(F, H * W, 3), (H, W), 3, generator())
    assert len(masks) == 1 and masks[0].eq(1).all()
