"""The lean matching loss of attention over space and time at once against its dense statement, in float64."""

import itertools

import pytest
import torch
from spacetime_edit.core.relevance import AttentionFeatures, full_str_score, matching_loss
from torch.utils._python_dispatch import TorchDispatchMode

FRAMES, HEADS, TOKENS, DIM, EXTRA = 4, 2, 11, 5, 3
OPTIONS = [
    dict(bidirectional=b, radius=r, per_pair=a)
    for b, r, a in itertools.product((True, False), (0, 1, 2), (False, True))
]


def features(seed, extra=EXTRA, dtype=torch.float64, frames=FRAMES, tokens=TOKENS):
    g = torch.Generator().manual_seed(seed)
    query, key = torch.randn(2, frames, HEADS, tokens, DIM, generator=g, dtype=torch.float64) * 1.5
    others = torch.randn(HEADS, extra, DIM, generator=g, dtype=torch.float64)
    return AttentionFeatures(query, key, None, 0.4, others if extra else None).map(lambda t: t.to(dtype))


def plain_score(f, *, radius=1, bidirectional=True, per_pair=False, weight=None):
    """By a softmax over one row of all keys, in the letters of the definition."""
    frames, heads, tokens, _ = f.query.shape
    flat = lambda t: t.transpose(0, 1).reshape(heads, frames * tokens, -1)  # noqa: E731
    keys = flat(f.key) if f.extra_keys is None else torch.cat([flat(f.key), f.extra_keys], 1)
    attention = torch.softmax(flat(f.query) @ keys.mT * f.logit_scale, -1)[..., : frames * tokens]
    at = attention.reshape(heads, frames, tokens, frames, tokens)
    w = torch.ones(frames, tokens, dtype=torch.float64) if weight is None else weight
    scores = []
    for i in range(frames):
        terms = []
        for j in range(frames):
            if j == i or (radius and abs(i - j) > radius):
                continue
            term = at[:, i, :, j] + (at[:, j, :, i].mT if bidirectional else 0)
            terms.append(term * w[i][:, None] * w[j][None, :])
        scores += terms if per_pair else [sum(terms)]
    return torch.stack(scores)


@pytest.mark.parametrize("extra", [0, EXTRA])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_dense_score_is_the_definition(options, extra):
    f = features(1, extra)
    torch.testing.assert_close(full_str_score(f, **options), plain_score(f, **options), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("extra", [0, EXTRA])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_values_and_gradients_are_those_of_the_dense_loss(options, extra, weighted):
    source, target = features(1, extra), features(2, extra)
    weight = torch.rand(FRAMES, TOKENS, dtype=torch.float64) if weighted else None
    own = [t.clone().requires_grad_() for t in target.tensors]
    other = [t.clone().requires_grad_() for t in target.tensors]

    def of(tensors):
        query, key, *extra_keys = tensors
        return AttentionFeatures(query, key, None, 0.4, extra_keys[0] if extra_keys else None)

    loss = matching_loss(source, of(own), rows=4, weight=weight, **options)
    a, b = (plain_score(f, weight=weight, **options).flatten() for f in (source, of(other)))
    dense = -(a @ b) / (a.norm() * b.norm())
    assert abs(float((loss - dense).detach())) <= 1e-12
    for mine, theirs in zip(torch.autograd.grad(loss, own), torch.autograd.grad(dense, other), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)


def test_a_clip_matches_itself_and_gradients_reach_the_target_only():
    f = features(1)
    assert abs(float(matching_loss(f, f)) + 1) <= 1e-12
    source, target = features(1).map(leaf), features(2).map(leaf)
    matching_loss(source, target).backward()
    assert all(t.grad is None for t in source.tensors) and all(t.grad is not None for t in target.tensors)


def leaf(t):
    return t.clone().requires_grad_()


def test_weights_that_leave_nothing_give_no_gradient():
    source, target = features(1), features(2).map(leaf)
    loss = matching_loss(source, target, weight=torch.zeros(FRAMES, TOKENS))
    loss.backward()
    assert float(loss) == 0 and not target.query.grad.any()


def test_half_precision_is_summed_in_float32():
    source, target = features(1, dtype=torch.bfloat16), features(2, dtype=torch.bfloat16)
    exact = matching_loss(source.map(torch.Tensor.double), target.map(torch.Tensor.double))
    assert abs(float(matching_loss(source, target) - exact)) <= 1e-5


def test_no_map_of_all_tokens_is_formed():
    """Memory of forward and backward stays far below one map of the clip's tokens (4 frames of 400 tokens)."""
    largest = 0

    class Look(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    source, target = (features(n, dtype=torch.float32, tokens=400) for n in (1, 2))
    target = target.map(leaf)
    with Look():
        matching_loss(source, target, rows=32).backward()
    assert largest <= 2 * FRAMES * HEADS * 400 * DIM < (FRAMES * 400) ** 2 / 50
