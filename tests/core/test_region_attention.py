"""Region attention against its definition written out with dense tokens x tokens tensors in float64."""

import importlib.util
import sys

import pytest
import torch
from spacetime_edit.core import region_attention
from spacetime_edit.core.live_memory import PeakMemory
from spacetime_edit.core.region_attention import modulated_attention, modulation_strength
from torch.nn.functional import scaled_dot_product_attention


def dense(query, key, value, u, v, strength, *, overlap="any", mask=None, scale=None, blocks=None, alone=None):
    """Softmax of s + a R (hi - s) - a (1 - R) (s - lo), per row and block of keys, padding left out of hi and lo."""
    batch, heads, n, width = query.shape
    scale = width**-0.5 if scale is None else scale
    scores = torch.einsum("bhnd,bhmd->bhnm", query, key) * scale
    hidden = torch.zeros_like(scores, dtype=torch.bool)
    if mask is not None:
        hidden = (mask <= -1e4).expand_as(scores)
        scores = scores + mask.masked_fill(mask <= -1e4, 0)
    u, v = (t.double().expand(batch, *t.shape[-2:]) for t in (u, v))
    pairs = torch.einsum("bnk,bmk->bnmk", u, v)
    shared = (pairs.sum(-1) if overlap == "product" else 1 - (1 - pairs).prod(-1))[:, None]
    strength = torch.as_tensor(strength, dtype=torch.float64)
    a = (strength[:, None] if strength.ndim == 2 else strength).expand(batch, heads, n)[..., None]
    moved, start = [], 0
    for length in blocks or [key.shape[2]]:
        at = slice(start, start + length)
        s, r, away = scores[..., at], shared[..., at], hidden[..., at]
        away = away if alone is None else away | alone[at]
        low = s.masked_fill(away, float("inf")).amin(-1, keepdim=True)
        high = s.masked_fill(away, float("-inf")).amax(-1, keepdim=True)
        if away.all():
            low = high = torch.zeros_like(low)
        pulled = s + a * r * (high - s) - a * (1 - r) * (s - low)
        moved.append(pulled if alone is None else torch.where(alone[at], s, pulled))
        start += length
    return torch.cat(moved, -1).masked_fill(hidden, float("-inf")).softmax(-1) @ value


def problem(seed=0, batch=2, heads=2, n=37, m=41, width=8, regions=3, *, soft=False, batched=False, spread=1.0):
    g = torch.Generator().manual_seed(seed)
    query, key, value = (
        spread * torch.randn(batch, heads, t, width, generator=g, dtype=torch.float64) for t in (n, m, m)
    )
    shape = (batch,) if batched else ()
    u, v = (torch.rand(*shape, t, regions, generator=g, dtype=torch.float64) for t in (n, m))
    if not soft:
        u, v = (u > 0.6).double(), (v > 0.6).double()  # overlaps, and tokens of no region
    return query, key, value, u, v, torch.rand(batch, heads, n, generator=g, dtype=torch.float64) * 0.9


def partition(u):
    """Memberships that sum to at most 1."""
    return u / u.sum(-1, keepdim=True).clamp(min=1)


PADDING = torch.zeros(2, 1, 1, 41, dtype=torch.float64)
PADDING[0, ..., 30:] = -1e9
PADDING[1, ..., 5:9] = float("-inf")
BIAS = torch.linspace(-2, 1, 41, dtype=torch.float64).expand(2, 1, 1, 41)
FULL = torch.zeros(2, 1, 37, 41, dtype=torch.float64).masked_fill(torch.ones(37, 41).tril(10) == 0, float("-inf"))
BLOCK = torch.zeros(1, 1, 1, 41, dtype=torch.float64)
BLOCK[..., :4] = float("-inf")

CASES = {
    "any": {},
    "product": {"overlap": "product"},
    "memberships of each batch item": {"batched": True},
    "one region": {"regions": 1},
    "sixteen regions": {"regions": 16, "overlap": "product"},
    "five overlapping": {"regions": 5},
    "large scores": {"spread": 8.0},
    "two blocks of keys": {"blocks": [11, 30]},
    "two blocks, product, three": {"blocks": [11, 7, 23], "overlap": "product"},
    "padding": {"mask": PADDING},
    "padding and blocks": {"mask": PADDING, "blocks": [11, 30]},
    "a hidden block": {"mask": BLOCK, "blocks": [4, 37]},
    "a hidden block, and keys left alone": {"mask": BLOCK, "blocks": [4, 37], "alone": torch.arange(41) > 30},
    "a bias on keys": {"mask": BIAS},
    "a bias and padding": {"mask": BIAS + PADDING},
    "a mask of rows and keys": {"mask": FULL},
    "soft, product": {"soft": True, "overlap": "product"},
    "soft, any": {"soft": True},
    "another scale": {"scale": 0.7},
    "a narrower value": {"value_width": 5},
    "a small tile": {"tile": 200},
    "keys left alone": {"alone": torch.arange(41) < 7},
    "keys left alone, padding and blocks": {"alone": torch.arange(41) % 5 == 0, "mask": PADDING, "blocks": [11, 30]},
    "a whole block left alone": {"alone": torch.arange(41) < 11, "blocks": [11, 30], "overlap": "product"},
}


def prepared(case):
    case = dict(case)
    made = {k: case.pop(k) for k in ("regions", "batched", "soft", "spread") if k in case}
    query, key, value, u, v, strength = problem(**made)
    value = value[..., : case.pop("value_width", 8)]
    if case.get("overlap") == "product":
        u, v = partition(u), partition(v)
    return (query, key, value, u, v, strength), case


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("form", ["channels", "tiles"])
def test_values_and_gradients_are_those_of_the_definition(case, form, monkeypatch):
    if form == "tiles":
        monkeypatch.setattr(region_attention, "MAX_WIDTH", 0)
    arguments, options = prepared(case)
    flow = torch.randn(*arguments[0].shape[:3], arguments[2].shape[-1], dtype=torch.float64)
    results = []
    for function in (modulated_attention, dense):
        if function is dense:
            options.pop("tile", None)
        leaves = [t.clone().requires_grad_() for t in arguments[:3]]
        out = function(*leaves, *arguments[3:], **options)
        results.append((out.detach(), *torch.autograd.grad(out, leaves, flow)))
    tolerances = [1e-12] + [1e-10] * 3
    for ours, wanted, tolerance in zip(*results, tolerances, strict=True):
        scale = max(1.0, float(wanted.abs().max()))
        assert float((ours - wanted).abs().max()) <= tolerance * scale


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("parts", [1, 4])
def test_without_a_graph_the_values_are_the_same(case, parts, monkeypatch):
    """At once, and one batch item and head after another."""
    if parts > 1:
        monkeypatch.setattr(region_attention, "TOGETHER", 1)
    arguments, options = prepared(case)
    with torch.inference_mode():
        ours = modulated_attention(*arguments, **options)
    options.pop("tile", None)
    wanted = dense(*arguments, **options)
    torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", ["scalar", "(N,)", "(B, N)", "(B, H, N)"])
def test_strength_in_each_shape(shape):
    (*arguments, strength), _ = prepared({})
    strength = {"scalar": 0.3, "(N,)": strength[0, 0], "(B, N)": strength[:, 0], "(B, H, N)": strength}[shape]
    ours = modulated_attention(*arguments, strength)
    torch.testing.assert_close(ours, dense(*arguments, strength), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strength_zero_is_plain_attention_to_the_bit(dtype):
    (*arguments, _), _ = prepared({})
    arguments = [t.to(dtype) for t in arguments]
    assert torch.equal(modulated_attention(*arguments, 0.0), scaled_dot_product_attention(*arguments[:3]))


@pytest.mark.parametrize("n", [37, 300, 2000])
@pytest.mark.parametrize("zero", ["one batch item", "some rows", "one row", "all rows but one", "rows of one head"])
def test_rows_of_strength_zero_are_untouched_to_the_bit(n, zero):
    query, key, value, u, v, strength = (t.float() for t in problem(n=n, width=40))
    strength = strength.clamp(min=0.05)
    rows = {"some rows": slice(3, n, 2), "one row": slice(5, 6), "all rows but one": slice(1, n)}
    at = {"one batch item": (1,), "rows of one head": (0, 1)}
    strength[at[zero] if zero in at else (slice(None), slice(None), rows[zero])] = 0
    ours = modulated_attention(query, key, value, u, v, strength)
    plain = scaled_dot_product_attention(query, key, value)
    untouched = strength == 0
    assert torch.equal(ours[untouched], plain[untouched])
    wanted = dense(*(t.double() for t in (query, key, value, u, v, strength)))
    torch.testing.assert_close(ours.double(), wanted, rtol=1e-5, atol=1e-5)


def test_zero_rows_are_no_detour_for_the_gradients():
    query, key, value, u, v, strength = problem(n=300, m=50)
    strength[:, :, :100], strength[1] = 0, 0
    flow, results = torch.randn_like(query), []
    for function in (modulated_attention, dense):
        leaves = [t.clone().requires_grad_() for t in (query, key, value)]
        results.append(torch.autograd.grad(function(*leaves, u, v, strength), leaves, flow))
    for ours, wanted in zip(*results, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("options", [{}, {"blocks": [11, 30]}, {"mask": PADDING}], ids=["", "blocks", "padding"])
def test_in_bfloat16_the_error_is_about_that_of_the_dense_form(options):
    """Both start from the same bfloat16 tensors, the dense form rounding its scores as autocast would."""
    ratios = []
    for seed in range(6):
        query, key, value, u, v, strength = problem(seed, n=64, m=41, width=40, spread=2.0)
        half = [t.bfloat16() for t in (query, key, value)]
        exact = dense(*(t.double() for t in half), u, v, strength.float().double(), **options)
        given = {k: m.bfloat16() if k == "mask" else m for k, m in options.items()}
        ours = modulated_attention(*half, u.float(), v.float(), strength.float(), **given)
        rounded = dense_in_half(*half, u, v, strength, **options)
        ratios.append(float((ours - exact).square().mean().sqrt() / (rounded - exact).square().mean().sqrt()))
    assert sum(ratios) / len(ratios) <= 1.5


def dense_in_half(query, key, value, u, v, strength, *, mask=None, blocks=None):
    """The dense form as it runs in half precision: scores and their shifts rounded, softmax in float32."""
    scores = (query @ key.mT) * query.shape[-1] ** -0.5
    hidden = torch.zeros_like(scores, dtype=torch.bool) if mask is None else (mask <= -1e4).expand_as(scores)
    shared, a = (1 - (1 - u[:, None] * v[None]).prod(-1)).bfloat16(), strength[..., None].bfloat16()
    moved, start = [], 0
    for length in blocks or [key.shape[2]]:
        at = slice(start, start + length)
        s, r, away = scores[..., at], shared[..., at], hidden[..., at]
        low = s.masked_fill(away, float("inf")).amin(-1, keepdim=True)
        high = s.masked_fill(away, float("-inf")).amax(-1, keepdim=True)
        moved.append(s + a * r * (high - s) - a * (1 - r) * (s - low))
        start += length
    weights = torch.cat(moved, -1).masked_fill(hidden, float("-inf")).float().softmax(-1).bfloat16()
    return weights @ value


def test_scores_stay_between_the_extrema_and_regions_draw_together():
    query, key, value, *_ = problem(n=20, m=20)
    u = torch.zeros(20, 2, dtype=torch.float64)
    u[:10, 0], u[10:, 1] = 1, 1
    inside = torch.stack([torch.arange(20) < 10, torch.arange(20) >= 10], -1).double()
    attended = modulated_attention(query, key, inside.expand(2, 2, 20, 2), u, u, 0.9)  # mass on each region
    plain = scaled_dot_product_attention(query, key, inside.expand(2, 2, 20, 2))
    own = torch.where(torch.arange(20) < 10, 0, 1)[:, None].expand(2, 2, 20, 1)
    assert (attended.gather(-1, own) > plain.gather(-1, own)).all()
    assert attended.gather(-1, own).mean() > 0.9


def test_strength_follows_the_schedule():
    assert float(modulation_strength(0.98, 1.0)) == pytest.approx(0.271, abs=5e-4)
    assert float(modulation_strength(0.98, 1.0, to_words=True)) == pytest.approx(0.904, abs=5e-4)
    assert float(modulation_strength(0.70, 1.0, to_words=True)) == pytest.approx(0.168, abs=5e-4)
    assert modulation_strength(0.0, 1.0) == 0
    size = torch.tensor([-1.0, 0.0, 0.4, 2.0])
    torch.testing.assert_close(modulation_strength(1.0, size, to_words=True), torch.tensor([0.0, 0.0, 0.4, 1.0]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u": torch.ones(5, 3)}, r"region_query: it has shape \(1, 5, 3\)"),
        ({"v": torch.ones(3, 41, 3)}, r"region_key: it has shape \(3, 41, 3\)"),
        ({"v": torch.ones(41, 2)}, "region_key: it has 2 regions, region_query 3"),
        ({"blocks": [1, 2]}, "blocks: they hold 3 keys, there are 41"),
        ({"mask": torch.zeros(41)}, "mask: it has shape"),
        ({"mask": torch.ones(1, 1, 1, 41, dtype=torch.bool)}, "mask: it is torch.bool; expected an additive one"),
    ],
)
def test_shapes_that_do_not_fit_are_named(change, message):
    query, key, value, u, v, strength = problem()
    u, v = change.pop("u", u), change.pop("v", v)
    with pytest.raises(ValueError, match=message):
        modulated_attention(query, key, value, u, v, strength, **change)


@pytest.mark.parametrize(("together", "calls"), [(None, [(2, 2)]), (1, [(1, 1)] * 4)])
def test_what_is_worked_on_at_once(together, calls, monkeypatch):
    """Batch items and heads of each call of the stock attention."""
    if together:
        monkeypatch.setattr(region_attention, "TOGETHER", together)
    arguments, seen = prepared({})[0], []

    def attention(query, *others, **options):
        seen.append(tuple(query.shape[:2]))
        return scaled_dot_product_attention(query, *others, **options)

    with torch.inference_mode():
        modulated_attention(*arguments, attention=attention)
    assert seen == calls


def test_the_slower_form_is_told_once(monkeypatch, caplog):
    spec = region_attention.__spec__  # a fresh copy of the module, which has told nobody
    fresh = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, fresh)
    spec.loader.exec_module(fresh)
    monkeypatch.setattr(fresh, "TOGETHER", 1)
    arguments, options = prepared(CASES["keys left alone"])
    with caplog.at_level("INFO", "spacetime_edit"):
        for _ in range(2):
            fresh.modulated_attention(*arguments, **options)
    assert len(caplog.records) == 1


def test_a_mask_of_rows_and_keys_is_looked_at_a_tile_at_a_time():
    """Beyond the output: no copy of the mask, 9 MB, in the tiles of a few rows."""
    query, key, value, u, v, strength = (t.float() for t in problem(batch=1, heads=1, n=1500, m=1500))
    mask = torch.zeros(1, 1, 1500, 1500).masked_fill(torch.ones(1500, 1500).tril(10) == 0, -torch.inf)
    with torch.no_grad(), PeakMemory() as peak:
        modulated_attention(query, key, value, u, v, strength, mask=mask, tile=2**16)
    assert peak.peak < 0.5 * mask.nbytes
