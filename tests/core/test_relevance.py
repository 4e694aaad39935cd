"""The lean matching loss against its dense statement, in float64."""

import itertools

import pytest
import torch
from spacetime_edit.core.relevance import AttentionFeatures, matching_loss, neighbours, str_score

FRAMES, HEADS, TOKENS, DIM = 4, 2, 13, 5


def features(seed, frames=FRAMES, tokens=TOKENS, dtype=torch.float64, scale=None):
    g = torch.Generator().manual_seed(seed)
    query, key = torch.randn(2, frames, HEADS, tokens, DIM, generator=g, dtype=torch.float64) * 1.5
    temporal = torch.randn(tokens, HEADS, frames, frames, generator=g, dtype=torch.float64).softmax(-1)
    return AttentionFeatures(query.to(dtype), key.to(dtype), temporal.to(dtype), scale)


def dense_loss(source, target, weight=None, **options):
    scores = []
    for f in (source, target):
        spatial = torch.softmax(f.query @ f.key.mT * f.logit_scale, -1)
        if weight is None:
            scores.append(plain_score(spatial, f.temporal, **options))
        else:
            scores.append(weighted_score(spatial, f.temporal, weight, **options))
    a, b = (s.flatten() for s in scores)
    return -(a @ b) / (a.norm() * b.norm())


def plain_score(spatial, temporal, *, radius=1, paths="spatial-temporal", bidirectional=True, per_pair=False):
    """Omega by single frame pairs in the letters of the specification, apart from the code under test."""
    if paths == "concat":
        return torch.cat([spatial.flatten(), temporal.flatten()])
    tau = lambda i, j: temporal[:, :, i, j].T  # noqa: E731  (H, N)
    scores = []
    for i in range(len(spatial)):
        terms = []
        for j in neighbours(i, len(spatial), radius):
            st = torch.einsum("hpq,hq->hpq", spatial[i], tau(i, j))
            st_back = torch.einsum("hqp,hp->hpq", spatial[j], tau(j, i))
            ts = torch.einsum("hp,hpq->hpq", tau(i, j), spatial[j])
            ts_back = torch.einsum("hq,hqp->hpq", tau(j, i), spatial[i])
            one_way = {"spatial-temporal": st, "temporal-spatial": ts, "both": st + ts}[paths]
            reverse = {"spatial-temporal": st_back, "temporal-spatial": ts_back, "both": st_back + ts_back}[paths]
            terms.append(one_way + reverse if bidirectional else one_way)
        scores += terms if per_pair else [sum(terms)]
    return torch.stack(scores)


def weighted_score(spatial, temporal, weight, *, radius, paths, bidirectional, per_pair):
    """w_i(p) w_j(q) inside the sum over j, by plain loops over single frame pairs."""
    frames = spatial.shape[0]
    if paths == "concat":
        spatial = torch.stack([spatial[i] * weight[i][:, None] * weight[i][None, :] for i in range(frames)])
        temporal = torch.stack(
            [temporal[p] * weight[:, p, None] * weight[None, :, p] for p in range(temporal.shape[0])]
        )
        return torch.cat([spatial.flatten(), temporal.flatten()])
    scores = []
    for i in range(frames):
        terms = []
        for j in neighbours(i, frames, radius):
            pair = torch.stack([spatial[i], spatial[j]])
            tau = temporal[:, :, [i, j]][:, :, :, [i, j]]
            term = str_score(pair, tau, radius=1, paths=paths, bidirectional=bidirectional)[0]
            terms.append(term * weight[i][:, None] * weight[j][None, :])
        scores += terms if per_pair else [sum(terms)]
    return torch.stack(scores)


def leaves(f):
    tensors = [t.clone().requires_grad_() for t in (f.query, f.key, f.temporal)]
    return AttentionFeatures(*tensors, f.scale), tensors


OPTIONS = [
    dict(paths=p, bidirectional=b, radius=r, per_pair=a)
    for p, b, r, a in itertools.product(
        ("spatial-temporal", "temporal-spatial", "both"), (True, False), (0, 1, 2), (False, True)
    )
]
OPTIONS.append(dict(paths="concat", bidirectional=True, radius=1, per_pair=False))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_value_and_gradient_equal_the_dense_form(options, weighted):
    source, target = features(0), features(1)
    weight = torch.rand(FRAMES, TOKENS, dtype=torch.float64) if weighted else None
    lean, lean_leaves = leaves(target)
    full, full_leaves = leaves(target)
    value = matching_loss(source, lean, rows=4, weight=weight, **options)
    reference = dense_loss(source, full, weight=weight, **options)
    assert abs(value - reference) <= 1e-10
    (3 * value).backward()
    (3 * reference).backward()
    for ours, theirs in zip(lean_leaves, full_leaves, strict=True):
        assert (ours.grad - theirs.grad).abs().max() <= 1e-10


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_dense_score_is_the_specifications(options):
    f = features(4)
    spatial = torch.softmax(f.query @ f.key.mT * f.logit_scale, -1)
    assert torch.allclose(str_score(spatial, f.temporal, **options), plain_score(spatial, f.temporal, **options))


@pytest.mark.parametrize("paths", ["spatial-temporal", "concat"])
def test_a_weight_that_leaves_nothing_gives_no_loss_and_no_gradient(paths):
    target, tensors = leaves(features(1))
    loss = matching_loss(features(0), target, weight=torch.zeros(FRAMES, TOKENS), paths=paths)
    loss.backward()
    assert loss == 0
    assert all(not t.grad.any() for t in tensors)


def test_what_the_weight_hides_does_not_matter():
    """Deletion and addition: rows and columns inside the mask may be anything."""
    source, target = features(0), features(1)
    weight = torch.ones(FRAMES, TOKENS, dtype=torch.float64)
    weight[:, 3:6] = 0
    value = matching_loss(source, target, weight=weight)
    target.temporal[3:6] = features(2).temporal[3:6]
    assert torch.isclose(matching_loss(source, target, weight=weight), value, rtol=1e-12)


def test_gradient_by_finite_differences():
    source, target = features(0, frames=3, tokens=6), features(1, frames=3, tokens=6)
    _, tensors = leaves(target)
    run = lambda q, k, t: matching_loss(source, AttentionFeatures(q, k, t), rows=4)  # noqa: E731
    assert torch.autograd.gradcheck(run, tensors, atol=1e-8)


def test_score_by_the_letter():
    """One entry of Omega written out by hand."""
    f = features(3)
    spatial = torch.softmax(f.query @ f.key.mT * f.logit_scale, -1)
    tau = lambda i, j, h, p: f.temporal[p, h, i, j]  # noqa: E731
    i, h, p, q = 1, 1, 4, 9
    expected = sum(spatial[i, h, p, q] * tau(i, j, h, q) + spatial[j, h, q, p] * tau(j, i, h, p) for j in (0, 2))
    assert torch.isclose(str_score(spatial, f.temporal)[i, h, p, q], expected, rtol=1e-12)


def test_equal_clips_give_minus_one_and_no_gradient():
    source = features(5)
    target, tensors = leaves(source)
    loss = matching_loss(source, target)
    loss.backward()
    assert abs(loss + 1) < 1e-12
    assert all(t.grad.abs().max() < 1e-12 for t in tensors)


def test_block_size_does_not_matter_in_float32():
    source, target = features(0, dtype=torch.float32), features(1, dtype=torch.float32)
    values = [float(matching_loss(source, target, rows=r)) for r in (1, 5, 64)]
    assert max(values) - min(values) < 1e-7
    assert abs(values[0] - float(dense_loss(features(0), features(1)))) < 1e-6


def test_custom_scale_is_used():
    source, target = features(0, scale=0.9), features(1, scale=0.1)
    assert abs(matching_loss(source, target) - dense_loss(source, target)) <= 1e-10


def test_no_map_is_saved_and_the_peak_is_a_block():
    """No tensor of N x N elements is saved for backward or allocated on the way."""
    source, target = features(0, tokens=200), features(1, tokens=200)
    target, _ = leaves(target)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        loss = matching_loss(source, target, rows=16)
    assert max(s.numel() for s in saved) <= FRAMES * HEADS * 200 * max(DIM, FRAMES)
    with LargestTensor() as largest:
        loss.backward()
    assert largest.numel < HEADS * 200 * 200


class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """Size of the largest tensor that any operation returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor):
                self.numel = max(self.numel, t.numel())
        return out


def test_sizes_that_differ_are_refused():
    with pytest.raises(ValueError, match="source and target attention differ in size"):
        matching_loss(features(0), features(1, frames=3))
    with pytest.raises(ValueError, match="do not fit together"):
        f = features(0)
        AttentionFeatures(f.query, f.key[:, :, :-1], f.temporal)


@pytest.mark.parametrize("temporal", [True, False], ids=["through space and time", "full attention"])
def test_a_loss_stops_before_any_tile(temporal):
    """What is called before a tile may raise, in the forward and in the backward pass."""
    calls = []

    class Stopped(Exception):
        pass

    def stop_at(n):
        calls.append(None)
        if len(calls) == n:
            raise Stopped

    source, target = (f if temporal else AttentionFeatures(f.query, f.key) for f in (features(0), features(1)))
    target = target.map(lambda t: t.clone().requires_grad_())

    def value_and_gradient(n):
        calls.clear()
        loss = matching_loss(source, target, rows=4, on_tile=lambda: stop_at(n))
        before = len(calls)
        loss.backward()
        return before, len(calls)

    of_forward, of_both = value_and_gradient(None)
    tiles = -(-TOKENS // 4)
    assert of_forward >= tiles * (tiles + 1) // 2 and of_both - of_forward >= tiles * (tiles + 1) // 2
    for n in range(1, of_both + 1):
        with pytest.raises(Stopped):
            value_and_gradient(n)
