"""The attention tap on the embedded model and on an SD 1.5 UNet: what it sees, replaces, and leaves behind."""

import comfy.ldm.modules.attention as host_attention
import comfy.model_management as management
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from spacetime_edit.host.attention_tap import AttentionTap, EnoughSeen, until_enough_seen
from spacetime_edit.host.features import FeatureRecorder
from spacetime_edit.host.layers import attention_layers, select_blocks
from spacetime_edit.host.model_pass import call_model
from spacetime_edit.tests.host import support

FRAMES, SIDE = 3, 8
TEMPORAL = ("temporal1", "temporal2")


@pytest.fixture(scope="module")
def sd15():
    with torch.inference_mode():
        return support.sd15_model()


@pytest.fixture(params=["tiny", "sd15"])
def subject(request, tiny):
    """(model, positive, negative) of both families."""
    if request.param == "tiny":
        return tiny.model, support.encode(tiny), support.encode(tiny, support.EDIT_PROMPT)
    model = request.getfixturevalue("sd15")
    return model, support.sd15_conditioning(0), support.sd15_conditioning(1)


def clip(height=SIDE, width=SIDE):
    return 2 * torch.randn(FRAMES, 4, height, width, generator=torch.Generator().manual_seed(0))


def tapped(model, positive, negative, latent, *listeners, **options):
    """The prediction with a tap installed, and the tap."""
    tap = AttentionTap(model, listeners)
    return support.prediction(model, positive, latent, negative, options=tap.install(model.model_options), **options)


def recorder():
    calls = []
    return calls, lambda call: calls.append((call, call.rows))


def own_attention(call):
    """The same attention, written out."""
    logits = call.query.double() @ call.key.double().mT * call.scale
    return (torch.softmax(logits, -1) @ call.value.double()).to(call.query)


# what it sees


def test_every_call_is_seen_once(subject, monkeypatch):
    """Against a counter around the host's own attention function."""
    raw, original = [], host_attention.optimized_attention

    def counting(q, k, v, *args, **kwargs):
        raw.append((q.shape[0], q.shape[1], k.shape[1]))
        return original(q, k, v, *args, **kwargs)

    monkeypatch.setattr(host_attention, "optimized_attention", counting)
    model, positive, negative = subject
    calls, listener = recorder()
    tapped(model, positive, negative, clip(), listener)
    seen = [(call.query.shape[0], call.query.shape[2], call.key.shape[2]) for call, _ in calls]
    assert seen == raw
    assert sorted(call.layer.path for call, _ in calls) == sorted(attention_layers(model))


def test_kinds_paths_and_grids_of_the_embedded_model(tiny):
    """Against what the model's own attention processor reports of itself, and the shapes of each kind."""
    reports = []

    def other_pack(func, *args, **kwargs):
        reports.append(dict(kwargs["transformer_options"]["ste_unet3d"]))
        return func(*args, **kwargs)

    model = tiny.model.clone()
    model.model_options["transformer_options"]["optimized_attention_override"] = other_pack
    calls, listener = recorder()
    tapped(model, support.encode(tiny), support.encode(tiny, ""), clip(6, 10), listener)
    grids = {"d0": (6, 10), "d1": (3, 5), "d2": (2, 3), "m0": (2, 3)}
    grids |= {"u0": (2, 3), "u1": (2, 3), "u2": (3, 5), "u3": (3, 5), "u4": (6, 10), "u5": (6, 10)}
    assert len(reports) == len(calls) == len(attention_layers(tiny.model))
    for report, (call, _) in zip(reports, calls, strict=True):
        kind = "temporal" if report["kind"] in TEMPORAL else report["kind"]
        assert (call.layer.path, call.kind) == (report["path"], kind)
        grid = grids.get(call.layer.block, (6, 10))
        assert call.grid == (FRAMES, *grid), call.layer.path
        tokens = grid[0] * grid[1]
        rows, length = (2 * tokens, FRAMES) if kind == "temporal" else (2 * FRAMES, tokens)
        assert (call.query.shape[0], call.query.shape[2]) == (rows, length)
        assert len(call.rows) == rows
        assert call.at_latent_resolution == (grid == (6, 10))


def test_kinds_and_blocks_of_sd15(sd15):
    """Against the host's own block ids; there is no temporal layer."""
    blocks = []

    def other_pack(func, *args, **kwargs):
        blocks.append(kwargs["transformer_options"]["block"])
        return func(*args, **kwargs)

    model = sd15.clone()
    model.model_options["transformer_options"]["optimized_attention_override"] = other_pack
    calls, listener = recorder()
    tapped(model, support.sd15_conditioning(), support.sd15_conditioning(1), clip(), listener)
    names = {("input", 1): "d0", ("input", 3): "d1", ("middle", 0): "m0"} | {("output", n): f"u{n}" for n in range(4)}
    assert [call.layer.block for call, _ in calls] == [names[block] for block in blocks]
    assert [call.kind for call, _ in calls] == ["spatial", "cross"] * 7
    assert all(call.key.shape[2] == 7 for call, _ in calls if call.kind == "cross")
    assert {call.grid for call, _ in calls} == {(FRAMES, 8, 8), (FRAMES, 4, 4)}


def test_blocks_of_the_embedded_model(tiny):
    blocks = {layer.block for layer in attention_layers(tiny.model).values() if layer.kind == "spatial"}
    assert blocks == {"d0", "d1", "d2", "m0", "u0", "u1", "u2", "u3", "u4", "u5"}


def test_rows_name_prompt_and_frames(tiny):
    """A batch [1, 0, 0]: rows are told apart by the keys that the cross-attention makes of each prompt's text."""
    first, second, negative = (support.encode(tiny, p) for p in ("a red circle", "a blue square", ""))
    calls, listener = recorder()
    tap = AttentionTap(tiny.model, [listener])

    def run(guider, x, sigma, extra_args):
        options = tap.install(extra_args["model_options"])
        guider(x, sigma * x.new_ones(x.shape[0]), model_options=options, seed=0)
        return guider.conds

    conds = support.at_one_sigma(support.guider_of(tiny.model, first + second, negative, 2.0), clip(), run)
    text = {conds["positive"][0]["uuid"]: first, conds["positive"][1]["uuid"]: second}
    text[conds["negative"][0]["uuid"]] = negative
    for call, rows in calls:
        assert len(rows) == call.query.shape[0] == call.key.shape[0]
        assert {row.uuid for row in rows} == set(text)
        if call.kind == "temporal":
            assert {row.frames for row in rows} == {tuple(range(FRAMES))}
            continue
        assert [row.frames for row in rows] == [(f,) for f in range(FRAMES)] * 3
        if call.kind == "cross":
            to_k = tiny.model.model.diffusion_model.get_submodule(call.layer.path).to_k
            for row, key in zip(rows, call.key, strict=True):
                expected = to_k(text[row.uuid][0][0])[0].unflatten(-1, (key.shape[0], -1)).transpose(0, 1)
                assert torch.allclose(key, expected, atol=1e-5)
                assert (row.prompt == 1) == (text[row.uuid] is negative)


# what it leaves alone


def test_a_listener_without_opinion_changes_nothing(subject):
    model, positive, negative = subject
    latent = clip()
    expected = support.prediction(model, positive, latent, negative)
    assert torch.equal(tapped(model, positive, negative, latent, lambda call: None), expected)


def test_hooks_of_other_packs_are_called_as_often_as_without(subject):
    model, positive, negative = subject
    model, seen = model.clone(), []

    def override(func, *args, **kwargs):
        seen.append("attention")
        return func(*args, **kwargs)

    def wrapper(executor, *args, **kwargs):
        seen.append("model")
        return executor(*args, **kwargs)

    model.model_options["transformer_options"]["optimized_attention_override"] = override
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "other_pack", wrapper)
    latent = clip()
    expected = support.prediction(model, positive, latent, negative)
    alone = seen.copy()
    seen.clear()
    # the host merges a patcher's wrappers into the options of a run, so install the tap inside one
    tap = AttentionTap(model, [lambda call: None])

    def run(guider, x, sigma, extra_args):
        options = tap.install(extra_args["model_options"])
        return guider(x, sigma * x.new_ones(x.shape[0]), model_options=options, seed=0)

    result = support.at_one_sigma(support.guider_of(model, positive, negative, 2.0), latent, run)
    assert torch.equal(result, expected)
    assert seen == alone and set(seen) == {"attention", "model"}


def test_a_call_knows_whether_its_attention_is_the_hosts(subject):
    """A fused kernel may then stand in for it; another pack's attention is always asked."""
    model, positive, _ = subject
    calls, listener = recorder()
    tapped(model, positive, None, clip(), listener)
    assert calls and all(call.stock for call, _ in calls)
    calls.clear()
    model = model.clone()
    model.model_options["transformer_options"]["optimized_attention_override"] = lambda func, *a, **k: func(*a, **k)
    tapped(model, positive, None, clip(), listener)
    assert calls and not any(call.stock for call, _ in calls)


def test_installing_works_on_a_copy(tiny):
    """And only a wrapper is in it: an override would be lost where a later node puts its own into the slot."""
    before = support.Untouched(tiny.model)
    inner = AttentionTap(tiny.model, []).install(tiny.model.model_options)["transformer_options"]
    assert len(inner["wrappers"][WrappersMP.APPLY_MODEL]) == 1 and "optimized_attention_override" not in inner
    assert before.changed() == []


# what it replaces


def test_a_listener_may_replace_attention(subject):
    model, positive, negative = subject
    latent = clip()
    expected = support.prediction(model, positive, latent, negative)
    same = tapped(model, positive, negative, latent, own_attention)
    assert support.relative(same, expected) < 1e-5
    zeros = tapped(model, positive, negative, latent, lambda call: torch.zeros_like(call.query))
    assert support.relative(zeros, expected) > 1e-3


def test_the_first_listener_with_an_opinion_wins(tiny):
    later = []
    listeners = [lambda call: None, own_attention, later.append]
    tapped(tiny.model, support.encode(tiny), None, clip(), *listeners)
    assert later == []


def test_differentiable_attention_is_the_same_attention(subject):
    model, positive, _ = subject
    latent = clip()
    tap = AttentionTap(model, [], differentiable=True)
    result = support.prediction(model, positive, latent, options=tap.install(model.model_options))
    assert support.relative(result, support.prediction(model, positive, latent)) < 1e-5


# how it ends


@pytest.mark.parametrize("error", [ValueError, management.InterruptProcessingException])
def test_an_exception_in_the_model_leaves_nothing_behind(subject, error):
    """Also one that is no `Exception`, as the host's interrupt is."""
    model, positive, negative = subject
    before, inside, failing = support.Untouched(model), [], [True]

    def fail(call):
        inside.append(support.hook_count(model.model.diffusion_model))
        if failing and call.layer.block == "m0":
            raise error("in the middle")

    tap = AttentionTap(model, [fail])
    with pytest.raises(error):
        support.prediction(model, positive, clip(), negative, options=tap.install(model.model_options))
    assert before.changed() == []
    assert inside[0] > 0, "the tap has no hooks: this test proves nothing"
    failing.clear()
    inside.clear()  # the same tap again, as if nothing had been
    support.prediction(model, positive, clip(), negative, options=tap.install(model.model_options))
    assert len(inside) == len(attention_layers(model)) and before.changed() == []


def test_enough_seen_ends_the_run_early(tiny):
    before, seen, enough = support.Untouched(tiny.model), [], ["d1"]

    def stop(call):
        seen.append(call.layer.path)
        if call.layer.block in enough:
            raise EnoughSeen

    tap = AttentionTap(tiny.model, [stop])
    options = tap.install(tiny.model.model_options)
    run = lambda: support.prediction(tiny.model, support.encode(tiny), clip(), options=options)  # noqa: E731
    assert until_enough_seen(run) is None
    assert before.changed() == []
    assert "down_blocks.1" in seen[-1] and len(seen) < len(attention_layers(tiny.model)) / 2
    enough.clear()
    seen.clear()  # the same tap again, to the end
    assert torch.equal(run(), support.prediction(tiny.model, support.encode(tiny), clip()))
    assert sorted(seen) == sorted(attention_layers(tiny.model))


# choice of blocks


@pytest.mark.parametrize(
    ("selection", "blocks"),
    [
        ("d1-d2,m0", "d1 d2 m0"),
        ("d1-2", "d1 d2"),
        (" u0 , u0-u1 ,", "u0 u1"),
        ("m0", "m0"),
    ],
)
def test_selection_of_blocks(selection, blocks):
    assert select_blocks(selection, ["d0", "d1", "d2", "m0", "u0", "u1"]) == set(blocks.split())


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ("d7", r"layers: 'd7' asks for d7; this model has d0, d1, m0"),
        ("d0-d2", r"layers: 'd0-d2' asks for d2; this model has d0, d1, m0"),
        ("d1-d0", r"layers: 'd1-d0' is not a block or a range"),
        ("d0-m0", r"layers: 'd0-m0' is not a block or a range of blocks; write for example d1-d2,m0"),
        ("mid", r"layers: 'mid' is not a block"),
    ],
)
def test_a_wrong_selection_names_what_is_wrong_and_what_there_is(selection, message):
    with pytest.raises(ValueError, match=message):
        select_blocks(selection, ["d0", "d1", "m0"])


# features


def recorded(tiny, latent, blocks=None, last=None):
    """The features of one conditional prediction, and q and k of every attention module by plain hooks."""
    manual, handles = {}, []
    network = tiny.model.model.diffusion_model
    for path in attention_layers(tiny.model):
        module = network.get_submodule(path)
        for name in ("to_q", "to_k"):

            def keep(_, __, output, place=(path, name), heads=module.heads):
                manual[place] = output.unflatten(-1, (heads, -1)).transpose(1, 2)

            handles.append(module.get_submodule(name).register_forward_hook(keep))
    features = FeatureRecorder(blocks, last)
    tap = AttentionTap(tiny.model, [features])

    def run(guider, x, sigma, extra_args):
        return call_model(guider.inner_model, guider.conds["positive"], x, sigma, extra_args["model_options"], tap=tap)

    try:
        result = support.at_one_sigma(support.guider_of(tiny.model, support.encode(tiny)), latent, run)
    finally:
        for handle in handles:
            handle.remove()
    return features, manual, result


def test_features_equal_the_projections_of_the_modules(tiny):
    """And each spatial layer is paired with the first of the two temporal attentions that follow on its grid."""
    features, manual, _ = recorded(tiny, clip())
    for path, feature in features.features.items():
        partner = path.replace(".attentions.", ".temp_attentions.")
        assert partner.endswith("attn1")
        assert torch.equal(feature.query, manual[path, "to_q"]) and torch.equal(feature.key, manual[path, "to_k"])
        q, k = (manual[partner, name].double() for name in ("to_q", "to_k"))
        logits = q @ k.mT / q.shape[-1] ** 0.5
        rounding = torch.finfo(torch.float32).eps * logits.abs().max().clamp(min=1)
        assert (feature.temporal - torch.softmax(logits, -1)).abs().max() < rounding
        assert feature.logit_scale == q.shape[-1] ** -0.5


def test_the_finest_grid_is_left_out_unless_it_is_asked_for(tiny):
    """By default all blocks but those on the latent's own grid, as the paper has it."""
    layers = attention_layers(tiny.model)
    features, _, _ = recorded(tiny, clip())
    assert {layers[path].block for path in features.features} == {"d1", "d2", "m0", "u0", "u1", "u2", "u3"}
    features, _, _ = recorded(tiny, clip(), blocks=frozenset({"d0", "u5"}))
    assert {layers[path].block for path in features.features} == {"d0", "u5"}
    assert features.unpaired == []


def test_the_run_ends_after_the_last_layer_that_is_needed(tiny):
    latent = clip()
    features, manual, result = recorded(tiny, latent)
    assert result is not None
    early, fewer, nothing = recorded(tiny, latent, last=list(features.features)[-1])
    assert nothing is None and len(fewer) < len(manual)
    assert list(early.features) == list(features.features)
    for path, feature in features.features.items():
        assert torch.equal(early.features[path].temporal, feature.temporal)


def test_spatial_layers_without_temporal_partner_are_listed(sd15):
    features = FeatureRecorder(frozenset({"d0", "m0"}))
    tapped(sd15, support.sd15_conditioning(), None, clip(), features)
    assert features.features == {}
    assert [path.split(".")[0] for path in features.unpaired] == ["input_blocks", "middle_block"]


def test_levels_are_halvings_of_sides_of_any_size(tiny):
    """9 rows, then 5, then 3: coarser by 1, 2, 4."""
    calls = []
    tap = AttentionTap(tiny.model, [calls.append])
    clip = torch.randn(2, 4, 9, 9, generator=torch.Generator().manual_seed(0))
    support.prediction(tiny.model, support.encode(tiny), clip, options=tap.install)
    assert {(call.grid[1], call.level) for call in calls} == {(9, 1), (5, 2), (3, 4)}
