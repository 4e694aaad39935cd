"""The three methods on each family that the host loads: tiny models of its own classes, with random weights."""

import contextlib
import gc
import json
from dataclasses import replace
from types import SimpleNamespace

import comfy.lora
import comfy.samplers
import comfy.sd
import pytest
import torch
from comfy.context_windows import (
    IndexListContextHandler,
    IndexListContextWindow,
    get_matching_context_schedule,
    get_matching_fuse_method,
)
from comfy.patcher_extension import WrappersMP
from comfy.quant_ops import QuantizedTensor
from spacetime_edit.core.live_memory import PeakMemory
from spacetime_edit.core.parametrization import noise_fraction
from spacetime_edit.core.regions import Region
from spacetime_edit.core.relevance import matching_loss
from spacetime_edit.host.attention_tap import AttentionTap
from spacetime_edit.host.checkpointing import checkpointed
from spacetime_edit.host.conditioning import PICTURE
from spacetime_edit.host.distillation import SPATIAL, TEMPORAL, Distillation, optimise
from spacetime_edit.host.families import family_of, noise_space
from spacetime_edit.host.features import FeatureRecorder, key_blocks
from spacetime_edit.host.gradients import latent_gradient, normal_tensor
from spacetime_edit.host.inflation import inflation_of
from spacetime_edit.host.inversion import invert
from spacetime_edit.host.latents import time_of
from spacetime_edit.host.layers import attention_layers
from spacetime_edit.host.memory import ActivationMeter
from spacetime_edit.host.model_pass import call_model, call_on_trajectory
from spacetime_edit.host.region_finding import regions_from_attention
from spacetime_edit.host.region_patch import RegionModulation, patch_regions
from spacetime_edit.host.region_prompt import LAYOUT, Layout, with_layout
from spacetime_edit.host.regional_prompts import Placed
from spacetime_edit.host.relevance_matching import RelevanceMatching, str_score_of
from spacetime_edit.host.relevance_preview import check_images, relevance_of
from spacetime_edit.host.sampling import TrajectorySampler
from spacetime_edit.host.token_attention import share_inside, token_attention
from spacetime_edit.host.trajectory_files import save_trajectory
from spacetime_edit.tests.host import plain_distillation, support
from spacetime_edit.tests.host.tiny_families import BY_NAME, DITS, KNOWN, MASK, by_hand, families, families_named

MIDDLE = 0.5  # of the denoising
PERCENT = 0.1  # where regions act strongly


every_family = families()
matched_families = families(lambda family: family.matched)
transformers = families(lambda family: family.patched)


@pytest.fixture(scope="module")
def family(request):
    return BY_NAME[request.param]


@pytest.fixture(scope="session")
def kept():
    """Models and trajectories by family: tests of other choices of families come between those that share them."""
    return {}


@pytest.fixture(scope="module")
def model(family, kept):
    if family.name not in kept:
        with torch.inference_mode():
            kept[family.name] = family.model()
    return kept[family.name]


def watched(model, family):
    """What a run must leave alone. The model has just run, so that another pack's modules are in it."""
    predicted(model, family)
    return support.Untouched(model)


def sigma_at(model, percent):
    return float(model.get_model_object("model_sampling").percent_to_sigma(percent))


def predicted(model, family, positive=None, *, negative=None, cfg=2.0, options=None, clip=None, percent=MIDDLE):
    positive = family.conditioning() if positive is None else positive
    clip = family.clip() if clip is None else clip
    return support.prediction(model, positive, clip, negative, cfg, sigma_at(model, percent), options)


def calls_of(model, family, negative=None, **options):
    """All calls of one prediction, and the prediction."""
    calls = []
    tap = AttentionTap(model, [calls.append])
    out = predicted(model, family, negative=negative, options=tap.install, **options)
    return calls, out


def halves(family):
    """Two regions side by side, each with a word."""
    frames, height, width = family.grid
    left = torch.zeros(1, 4 * height, 4 * width)
    left[..., : 2 * width] = 1
    places = ((1, 2), (4,)) if family.words > 1 else ((), ())
    return Layout("a prompt", (Region("a", left), Region("b", 1 - left)), places, family.words)


def regional(family, layout=None, seed=0):
    """The prompt of this seed with a layout, by default `halves`."""
    return with_layout(family.conditioning(seed), layout or halves(family))


# --- what the tap sees --------------------------------------------------


@every_family
def test_every_attention_is_classified(family, model):
    """Against a count of the host's own calls; the tokens of the clip are where the family's row says."""
    raw = []

    def count(func, *args, **kwargs):
        raw.append(args[0].shape)
        return func(*args, **kwargs)

    counted = model.clone()
    counted.model_options["transformer_options"]["optimized_attention_override"] = count
    calls, _ = calls_of(counted, family, family.conditioning(1))
    assert len(calls) == family.calls and len(raw) == family.calls - family.hidden + sum(family.others.values())
    assert sorted(call.layer.path for call in calls) == sorted(attention_layers(model))
    for call in calls:
        assert call.grid[0] == family.grid[0] and [row.prompt for row in call.rows] == sorted(
            (row.prompt for row in call.rows), reverse=True
        )
        assert len(call.rows) == call.query.shape[0]
        if not family.patched:
            assert call.grid[1:] in [tuple(side // 2**k for side in family.grid[1:]) for k in range(4)]
            alone, places = call.per_frame, call.grid[1] * call.grid[2]
            of_kind = {"spatial": (places, places), "cross": (places, family.words), "temporal": (call.grid[0],) * 2}
            assert (alone.query.shape[2], alone.key.shape[2]) == of_kind[call.kind]
            assert len(alone.rows) == 2 * (places if call.kind == "temporal" else call.grid[0])
            over = call.grid[0] if call.kind == "spatial" and inflation_of(model) is not None else 1
            assert (call.query.shape[2], call.key.shape[2]) == tuple(over * n for n in of_kind[call.kind])
            continue
        assert call.grid == family.grid
        frames, height, width = family.grid
        tokens = frames * height * width
        assert [row.prompt for row in call.rows] == [1, 0]
        if call.kind == "cross":
            assert call.parts(call.query) == (0, tokens, family.behind) and call.rows[0].key_frames == ()
            continue
        assert call.of_clip(call.key).shape[::2] == (2 * frames, height * width)
        assert call.extra(call.key).shape[2] == call.key.shape[2] - tokens
        assert call.rows[0].frames == call.rows[0].key_frames == tuple(range(frames))


@transformers
def test_the_clips_tokens_are_the_clips(family, model):
    """A change of the prompt changes the other tokens of the first layer only, one of a frame that frame's most."""
    first = next(iter(attention_layers(model)))

    def keys(**changes):
        calls, _ = calls_of(model, family, cfg=1.0, **changes)
        call = next(c for c in calls if c.layer.path == first)
        return call.of_clip(call.key), call.extra(call.key)

    of_clip, other = keys()
    with_prompt = keys(positive=family.conditioning(5))
    change = (with_prompt[0] - of_clip).abs().max()  # some modulate a clip's tokens by a summary of the prompt
    assert change <= 1e-5 or change < 0.1 * (with_prompt[1] - other).abs().max()
    assert other.shape[2] == family.behind or (with_prompt[1] - other).abs().max() > 1e-2
    changed = family.clip()
    per_token = family.shape[2] // family.grid[0]
    changed[:, :, -per_token:] += 1.0
    moved = (keys(clip=changed)[0] - of_clip).abs().amax((1, 2, 3))
    assert moved[-1] > 1e-2 and moved[:-1].max() <= 1e-5


@every_family
def test_query_key_and_value_are_what_attention_gets(family, model):
    """Attention written out from them gives the same prediction: they are past norms and rotation."""

    def own(call):
        logits = call.query.double() @ call.key.double().mT * call.scale
        logits = logits if call.mask is None else logits + call.mask.double()
        return (logits.softmax(-1) @ call.value.double()).to(call.query)

    plain, replaced, absent = (
        predicted(model, family, options=AttentionTap(model, listeners).install)
        for listeners in ([], [own], [lambda call: torch.zeros_like(call.query)])
    )
    effect = (absent - plain).norm()
    assert effect > 0 and (replaced - plain).norm() <= 2e-2 * effect


@every_family
def test_others_are_called_as_often_as_without_us(family, model):
    """A foreign override and a foreign wrapper; rows that regions leave alone may be a call of their own."""
    seen = {"override": 0, "wrapper": 0}

    def override(func, *args, **kwargs):
        seen["override"] += 1
        return func(*args, **kwargs)

    def wrapper(executor, *args, **kwargs):
        seen["wrapper"] += 1
        return executor(*args, **kwargs)

    foreign = model.clone()
    foreign.model_options["transformer_options"]["optimized_attention_override"] = override
    foreign.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "foreign", wrapper)
    predicted(foreign, family)
    alone = dict(seen)
    seen.update(override=0, wrapper=0)
    predicted(foreign, family, options=AttentionTap(foreign, [lambda call: None]).install)
    inflated = family_of(model).patched is None and inflation_of(model) is not None
    assert seen == alone or inflated and seen["wrapper"] == alone["wrapper"]
    seen.update(override=0, wrapper=0)
    patched = patch_regions(foreign, RegionModulation(end=1.0))
    predicted(patched, family, regional(family))
    assert seen["wrapper"] == alone["wrapper"] and seen["override"] >= alone["override"]
    assert alone["override"] >= family.calls - family.hidden


@families(lambda family: family.of_host)
def test_a_replaced_attention_is_called_as_often_as_without_us(family, model):
    """An attn2 replace patch, as reference-image packs set it, which only these blocks ask the host for."""
    assert family_of(model).diffusion_model in ("UNetModel", "VideoUNet")
    seen = []

    def replace(q, k, v, extra_options):
        seen.append(q.shape)
        return torch.zeros_like(q)

    foreign = model.clone()
    foreign.set_model_attn2_replace(replace, "middle", 0)
    predicted(foreign, family)
    alone = len(seen)
    predicted(patch_regions(foreign, RegionModulation(end=1.0)), family, regional(family))
    assert alone > 0 and len(seen) == 2 * alone


# --- gradients ----------------------------------------------------------


def gradient(model, family, clip, *, low_memory=False, source_seed=7, only_loss=False):
    """(loss, gradient) of the matching loss of all layers and of the prediction, at the middle of denoising."""
    recorder_blocks = str_blocks(model)

    def at(guider, x, sigma, extra_args):
        base, cond, options = guider.inner_model, guider.conds["positive"][0], extra_args["model_options"]
        given = FeatureRecorder(recorder_blocks)
        tap = AttentionTap(model, [given], differentiable=True)
        call_model(base, [cond], family.clip(source_seed), sigma, options, tap=tap)
        source = {path: f.map(normal_tensor) for path, f in given.features.items()}
        recorder = FeatureRecorder(recorder_blocks)
        tap = AttentionTap(model, [recorder], differentiable=True)

        def loss(denoised):
            matched = sum((matching_loss(f, recorder.features[path]) for path, f in source.items()), start=0.0)
            return matched + torch.tanh(denoised).double().square().mean()

        if only_loss:
            return loss(call_model(base, [cond], x, sigma, options, tap=tap)), None
        blocks = checkpointed(base.diffusion_model, family_of(model), tap, recorder)
        given = dict(model_options=options, tap=tap, mutates=family_of(model).mutates)
        if not low_memory:
            return latent_gradient(base, x, sigma, cond, loss, **given)
        with blocks:
            return latent_gradient(base, x, sigma, cond, loss, **given)

    guider = support.guider_of(model, family.conditioning())
    return support.at_one_sigma(guider, clip, at, sigma_at(model, MIDDLE))


def str_blocks(model):
    names = {layer.block for layer in attention_layers(model).values()}
    return frozenset(names)


@every_family
def test_gradients_are_those_of_finite_differences(family, model):
    """With activations and without; along the gradient, and along another direction, which an error across the
    gradient would show in."""
    before = watched(model, family)
    clip = family.clip()
    both = [gradient(model, family, clip, low_memory=low_memory)[1] for low_memory in (False, True)]
    along = both[0] / both[0].norm()
    other = torch.randn(clip.shape, generator=torch.Generator().manual_seed(3))
    other = along + (other - (other * along).sum() * along) / clip.numel() ** 0.5
    for direction in (along, other / other.norm()):

        def slope(h, direction=direction):
            moved = (clip + step * direction for step in (h, -h))
            ahead, behind = (gradient(model, family, there, only_loss=True)[0] for there in moved)
            return float(ahead - behind) / (2 * h)

        expected = (4 * slope(0.05) - slope(0.1)) / 3
        for found in both:
            assert abs(expected - float((found * direction).sum())) <= 1e-3 * float(found.norm())
    assert before.changed() == []


@every_family
def test_nothing_of_a_gradient_outlives_it(family, model):
    """Recomputed blocks and what they recorded could, in a circle through autograd, which no collector sees."""
    gradient(model, family, family.clip(), low_memory=True)  # what the host keeps after its first run is kept once
    with PeakMemory() as memory:
        _, found = gradient(model, family, family.clip(), low_memory=True)
        gc.collect()
    assert memory.live <= 2 * found.nbytes + 4096 and memory.peak > 10 * found.nbytes


@every_family
def test_an_attention_without_gradient_is_named(family, model):
    """As packs with 8-bit kernels put in: its output has no graph, and a gradient around it would be wrong."""

    def kernel(func, *args, **kwargs):
        with torch.no_grad():
            return func(*(a.detach() if isinstance(a, torch.Tensor) else a for a in args), **kwargs)

    foreign = model.clone()
    foreign.model_options["transformer_options"]["optimized_attention_override"] = kernel
    with pytest.raises(ValueError, match="model: another pack has put an attention into it that gives no gradient"):
        gradient(foreign, family, family.clip())


@pytest.mark.parametrize("own_cast", [False, True])
@families_named("Wan")
def test_weights_in_a_foreign_format(family, model, own_cast):
    """Bytes that another pack unpacks in its layers' forward: with its own way to a weight the gradient is right, else
    the layer is named."""
    layer = model.model.diffusion_model.blocks[0].ffn[0]
    weight, bias = layer.weight.clone(), layer.bias.clone()

    class Linear(torch.nn.Module):
        in_features, out_features = weight.shape[1], weight.shape[0]

        def __init__(self):
            super().__init__()
            self.weight, self.bias = torch.zeros(len(weight), 3, dtype=torch.uint8), None
            if own_cast:
                self.cast_bias_weight = lambda like: (weight, bias)

        def forward(self, x):
            return torch.nn.functional.linear(x, weight, bias)

    exact = gradient(model, family, family.clip())[1]
    foreign = family.model()
    foreign.model.diffusion_model.blocks[0].ffn[0] = Linear()
    if own_cast:
        torch.testing.assert_close(gradient(foreign, family, family.clip())[1], exact, rtol=1e-4, atol=1e-7)
        return
    with pytest.raises(ValueError, match=r"model: its Linear layers keep weights in a form that gives no gradient"):
        gradient(foreign, family, family.clip())


@pytest.mark.parametrize("low_memory", [False, True])
@transformers
def test_predicted_memory_is_what_a_gradient_takes(family, model, low_memory):
    """Of a whole pass over a larger clip, within 0.8 and 1.4 of what lives at its peak."""
    clip = torch.randn(*family.shape[:-2], 4 * family.shape[-2], 4 * family.shape[-1])

    def at(guider, x, sigma, extra_args):
        base, cond, own = guider.inner_model, guider.conds["positive"][0], family_of(model)
        meter, recorder = ActivationMeter(base.diffusion_model, own), FeatureRecorder(frozenset())
        with meter.open():
            call_model(base, [cond], x, sigma, extra_args["model_options"])
        tap = AttentionTap(model, [recorder], differentiable=True)
        options = dict(model_options=extra_args["model_options"], tap=tap, mutates=own.mutates)
        blocks = checkpointed(base.diffusion_model, own, tap, recorder) if low_memory else contextlib.nullcontext()
        with PeakMemory() as peak, blocks:
            latent_gradient(base, x, sigma, cond, lambda denoised: denoised.square().mean(), **options)
        return meter.memory.total(checkpointing=low_memory) / peak.peak

    guider = support.guider_of(model, family.conditioning())
    assert 0.8 <= support.at_one_sigma(guider, clip, at, sigma_at(model, MIDDLE)) <= 1.4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
@every_family
def test_gradients_with_smaller_weights_point_the_same_way(family, model, dtype):
    """And are exactly those of a model in float32 whose weights are rounded so."""
    small, rounded = family.model(dtype=dtype), family.model()
    weights = dict(small.model.diffusion_model.named_parameters())
    for name, weight in rounded.model.diffusion_model.named_parameters():
        weight.copy_(weights[name])
    exact, rough, same = (gradient(m, family, family.clip())[1].flatten().double() for m in (model, small, rounded))
    assert torch.cosine_similarity(exact, rough, 0) > (0.99 if dtype is torch.bfloat16 else family.fp8)
    assert not torch.equal(exact, rough) and support.relative(rough, same) <= 1e-6


def quantised(family, kind):
    """The model with its blocks' weights in one of the host's own formats, as such checkpoints name them."""
    top = {"float8_e4m3fn": 448.0, "int8_tensorwise": 127.0}[kind]
    dtype = {"float8_e4m3fn": torch.float8_e4m3fn, "int8_tensorwise": torch.int8}[kind]
    state = dict(family.weights())
    layers = [name.removesuffix(".weight") for name, w in state.items() if w.ndim == 2 and name.startswith("blocks.")]
    for layer in layers:
        weight = state[f"{layer}.weight"]
        scale = weight.abs().max() / top
        state[f"{layer}.weight"] = (
            (weight / scale).round().to(dtype) if dtype is torch.int8 else (weight / scale).to(dtype)
        )
        state[f"{layer}.weight_scale"] = scale
        words = json.dumps({"format": kind}).encode()
        state[f"{layer}.comfy_quant"] = torch.tensor(list(words), dtype=torch.uint8)
    small = comfy.sd.load_diffusion_model_state_dict(state)
    weights = [small.model.diffusion_model.get_submodule(layer).weight for layer in layers]
    assert layers and all(isinstance(weight, QuantizedTensor) for weight in weights)
    return small


quantised_kinds = pytest.mark.parametrize("kind", ["float8_e4m3fn", "int8_tensorwise"])


@families_named("CogVideoX 1.0")
@quantised_kinds
def test_gradients_of_quantised_checkpoints_point_the_same_way(family, model, kind):
    exact, rough = (gradient(m, family, family.clip())[1].flatten().double() for m in (model, quantised(family, kind)))
    assert torch.cosine_similarity(exact, rough, 0) > 0.97 and not torch.equal(exact, rough)


@families_named("CogVideoX 1.0")
@quantised_kinds
def test_source_and_target_are_seen_by_the_same_kernels(family, kind):
    """What is recorded without a gradient is what a gradient pass records, to the bit, so that one clip matches itself
    in full."""
    small, seen = quantised(family, kind), []

    def passes(guider, x, sigma, extra_args):
        base, conds, options = guider.inner_model, guider.conds["positive"], extra_args["model_options"]
        for call in (call_model, with_graph):
            recorder = FeatureRecorder(None)
            tap = AttentionTap(small, [recorder], differentiable=True)
            call(base, conds, x, sigma, options, tap=tap)
            seen.append({path: own.map(torch.Tensor.detach) for path, own in recorder.features.items()})

    def with_graph(base, conds, x, sigma, options, tap):
        latent_gradient(base, x, sigma, conds[0], lambda denoised: denoised.sum(), model_options=options, tap=tap)

    guider = support.guider_of(small, family.conditioning())
    support.at_one_sigma(guider, family.clip(), passes, sigma_at(small, MIDDLE))
    plain, graph = seen
    assert plain and plain.keys() == graph.keys()
    for path, own in plain.items():
        assert torch.equal(own.query, graph[path].query) and torch.equal(own.key, graph[path].key)


# --- the methods --------------------------------------------------------


def sigmas_of(model, steps):
    return comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", steps)


@pytest.fixture(scope="module")
def inverted(family, model, kept):
    """A trajectory of 16 steps, of a clip that is not pure noise to the model."""
    name = f"inverted {family.name}"
    if name not in kept:
        with torch.inference_mode():
            kept[name] = invert(model, family.conditioning(), 0.5 * family.clip(), sigmas_of(model, 16), refinements=6)
    return kept[name]


def relevance_at(model, positive, latent, sigma, blocks):
    """The features of the STR score of one latent, as the sampler holds it."""
    recorder = FeatureRecorder(blocks)
    options = AttentionTap(model, [recorder]).install
    support.prediction(model, positive, latent, cfg=1.0, sigma=sigma, options=options)
    return recorder.features


@pytest.mark.parametrize("cfg", [1.0, 2.0])
@matched_families
def test_a_run_with_regions_and_matching_is_its_steps(family, model, inverted, cfg):
    """The target's score, under the regions, is compared with the source's, without them; from the latent that is moved
    so, a DDIM step goes by the prediction under regions and guidance."""
    sigmas, score, space = inverted.sigmas[:4], str_score_of(inverted), noise_space(model)
    matching = RelevanceMatching(score, max(family.step, 1e-3))
    patched = patch_regions(model, RegionModulation(end=1.0, self_strength=3.0, cross_strength=3.0))
    positive, negative, seen = regional(family, seed=1), family.conditioning(2) if cfg > 1 else None, []

    def watched(x, step):
        seen.append((x.clone(), matching(x, step)))
        return seen[-1][1]

    guider, empty = support.guider_of(patched, positive, negative, cfg), torch.zeros(inverted.shape)
    sampler = TrajectorySampler(inverted, before_step=[watched])
    records = sampler.records_of(guider.sample(empty, empty, sampler, sigmas, disable_pbar=True, seed=0))
    for k, (before, after) in enumerate(seen):
        source = relevance_at(model, family.conditioning(), inverted.latents[k], sigmas[k], score.blocks)

        def cosine(model, k=k, before=before, source=source):
            target = relevance_at(model, positive, before, sigmas[k], score.blocks)
            losses = [matching_loss(features, target[path], **score.form) for path, features in source.items()]
            return -float(torch.stack(losses).mean())

        under, without = cosine(patched), cosine(model)
        assert abs(records[k].cosines[0] - under) <= 1e-5 + 0.01 * abs(under - without)
        assert not torch.equal(after, before)
        if k + 1 < len(seen):
            (a, s), (a_then, s_then) = (space.signal_and_noise(sigma) for sigma in sigmas[k : k + 2])
            denoised = support.prediction(patched, positive, after, negative, cfg, sigmas[k])
            expected = a_then * denoised + s_then * (after - a * denoised) / s
            assert support.relative(seen[k + 1][0], expected) <= 1e-5


def sampled(model, family, trajectory, before_step=(), *, positive=None, cfg=2.0):
    negative = family.conditioning(2)
    guider = support.guider_of(model, positive or family.conditioning(1), negative if cfg != 1 else None, cfg)
    empty = torch.zeros(trajectory.shape)
    sampler = TrajectorySampler(trajectory, before_step=before_step)
    return guider.sample(empty, empty, sampler, trajectory.sigmas, disable_pbar=True, seed=0)


@every_family
def test_an_inverted_clip_comes_back(family, model, inverted):
    """And closer than by another prompt, which moves these quiet models a little only."""
    assert inverted.latents.isfinite().all()
    clip = 0.5 * family.clip()
    back, by_another = (
        support.relative(sampled(model, family, inverted, positive=family.conditioning(seed), cfg=1.0), clip)
        for seed in (0, 1)
    )
    assert back < 0.03 and back < by_another
    if not family.patched:
        assert back < 0.5 * by_another


@families(lambda family: not family.matched)
def test_matching_is_refused_without_temporal_attention(family, inverted):
    with pytest.raises(ValueError, match="has no temporal attention, which the STR score is built from"):
        str_score_of(inverted)


@matched_families
def test_matching_brings_the_relevance_closer_and_is_neutral_at_zero(family, model, inverted):
    before = watched(model, family)
    score = str_score_of(inverted)

    whole, last = inverted.sigmas[-9:], inverted.sigmas[-3:]

    def with_strength(strength, sigmas):
        matching = [] if strength is None else [RelevanceMatching(score, strength)]
        sampler = TrajectorySampler(inverted, before_step=matching)
        guider = support.guider_of(model, family.conditioning(1), family.conditioning(2), 2.0)
        empty = torch.zeros(inverted.shape)
        out = guider.sample(empty, empty, sampler, sigmas, disable_pbar=True, seed=0)
        records = sampler.records_of(out)
        return out, None if records is None else [r.cosines[0] for r in records]

    assert torch.equal(with_strength(0.0, last)[0], with_strength(None, last)[0])
    weak, strong = with_strength(1e-9, whole)[1], with_strength(0.5, whole)[1]
    assert all(torch.isfinite(torch.tensor(strong))) and len(strong) == 8
    assert sum(strong[1:]) > sum(weak[1:])
    assert before.changed() == []


@every_family
def test_regions_act_and_are_neutral_at_zero(family, model):
    before = watched(model, family)
    positive, negative = regional(family), family.conditioning(1)
    plain = predicted(model, family, family.conditioning(), negative=negative)
    assert torch.equal(predicted(model, family, positive, negative=negative), plain)
    for options in ({"self_strength": 0.0, "cross_strength": 0.0}, {"start": 0.9, "end": 1.0}):
        neutral = patch_regions(model, RegionModulation(**options))
        assert torch.equal(predicted(neutral, family, positive, negative=negative), plain)
    patched = patch_regions(model, RegionModulation(end=1.0))
    assert not torch.equal(predicted(patched, family, positive, negative=negative), plain)
    assert before.changed() == []


def memberships(family):
    """Of the clip's tokens and of the prompt's words in the regions of `halves`, in float64."""
    frames, height, width = family.grid
    right = (torch.arange(width) >= width / 2).expand(frames, height, width).flatten()
    sides = torch.stack([~right, right], 1).double()
    if width % 2:  # a column that is half of each
        sides[(torch.arange(width) == width // 2).expand(frames, height, width).flatten()] = 0.5
    words = torch.zeros(family.words, 2, dtype=torch.float64)
    words[[1, 2], 0] = words[4, 1] = 1
    return sides, words


def by_definition(call, t, sides, words, strength, text_first, share=None):
    """(output with regions, without them) of an attention of a transformer, dense and in float64, for every row.

    share: (K,) of the clip that each region covers, or (tokens, K); None: as the tokens of the call do.
    """
    before, clip, after = call.parts(call.query) if call.kind != "joint" else (0, len(sides), 0)
    sides = torch.nn.functional.pad(sides, (0, 0, before, after))  # those of reference pictures
    if share is not None and share.ndim == 2:
        share = torch.nn.functional.pad(share, (0, 0, before, after))
    of_clip = torch.zeros(len(sides), dtype=torch.bool)
    of_clip[before : before + clip] = True
    size = 1 - (sides * (sides[of_clip].mean(0) if share is None else share)).sum(1)
    strength = strength * t**5 * size * of_clip * (1.0 if call.kind == "cross" else 0.3)
    queries, keys, together = sides, sides, [of_clip]
    if call.kind == "cross":
        keys, together = words, [torch.ones(len(words), dtype=torch.bool)]
    if call.kind == "joint":
        order = (lambda text, clip: [text, clip]) if text_first else (lambda text, clip: [clip, text])
        queries = keys = torch.cat(order(words, sides))
        strength = torch.cat(order(words.new_zeros(len(words)), strength))
        own = torch.cat(order(torch.zeros(len(words), dtype=torch.bool), of_clip))
        together = [own, ~own]
    assert call.key.shape[2] == len(keys) and call.query.shape[2] == len(queries)
    shared, a = queries @ keys.T, strength[:, None]
    q, k, v = (x.double() for x in (call.query, call.key, call.value))
    scores = q @ k.mT * call.scale
    scores = scores if call.mask is None else scores + call.mask.double()
    pulled = scores.clone()
    for block in together:
        own = scores[..., block]
        low, high = own.amin(-1, keepdim=True), own.amax(-1, keepdim=True)
        pulled[..., block] = (1 - a) * own + a * (low + shared[:, block] * (high - low))
    return pulled.softmax(-1) @ v, scores.softmax(-1) @ v


@transformers
def test_regions_are_the_methods_own_scores(family, model):
    """Against the definition: two halves of the clip, two words for the left one, one for the right, the rest of the
    prompt in neither. Half of the clip each, so that the size term is a half."""
    no_level = patch_regions(model, RegionModulation(end=1.0, levels=frozenset({2**20})))
    calls, _ = calls_of(no_level, family, family.conditioning(1), positive=regional(family), percent=PERCENT)
    modulation = RegionModulation(end=1.0, self_strength=1.5, cross_strength=1.5)
    text_first = family_of(model).patched == "last"
    for call in calls:
        expected, plain = by_definition(call, 1 - PERCENT, *memberships(family), 1.5, text_first)
        rows = torch.tensor([row.prompt for row in call.rows])
        modulated = rows == 0 if call.kind in ("cross", "joint") else rows >= 0
        out = modulation(call).double()
        assert support.relative(out[modulated], expected[modulated]) <= 1e-5
        assert support.relative(expected[modulated], plain[modulated]) > 1e-4
        assert (out[~modulated] - plain[~modulated]).abs().max() <= 1e-5 if (~modulated).any() else True


def prompts_of(family):
    """Of the source, of the edit, negative."""
    return [family.conditioning(seed) for seed in range(3)]


@transformers
def test_regions_move_with_the_clips_frames(family, model):
    """Against the definition, of a mask that is another in each frame of the clip; the last ones the VAE drops."""
    latents, step = family.shape[2], family_of(model).frames.step
    count, height, width = family.grid
    of_latent = [[0]] + [list(range(step * n + 1, step * n + step + 1)) for n in range(latents - 1)]
    of_token = [of_latent[t * latents // count : (t + 1) * latents // count] for t in range(count)]
    moving = torch.zeros(step * (latents - 1) + step, 4 * height, 4 * width)
    for frame, mask in enumerate(moving):
        mask[:, : 4 * (1 + frame % (width - 1))] = 1
    layout = replace(halves(family), regions=(Region("a", moving),), positions=((1,),))
    columns = torch.nn.functional.adaptive_avg_pool2d(moving, (height, width)).double().flatten(1)
    inside = torch.cat([torch.stack([columns[held].mean(0) for held in token]).mean(0) for token in of_token])
    words = torch.zeros(family.words, 2, dtype=torch.float64)
    words[1, 0] = 1
    no_level = patch_regions(model, RegionModulation(end=1.0, levels=frozenset({2**20})))
    calls, _ = calls_of(no_level, family, family.conditioning(1), positive=regional(family, layout), percent=PERCENT)
    modulation = RegionModulation(end=1.0, self_strength=1.5, cross_strength=1.5)
    sides, text_first = torch.stack([inside, 1 - inside], 1), family_of(model).patched == "last"
    for call in calls:
        in_frame = sides.unflatten(0, (count, -1)).mean(1).repeat_interleave(height * width, 0)
        share = in_frame if call.kind == "cross" else None
        expected, _ = by_definition(call, 1 - PERCENT, sides, words, 1.5, text_first, share)
        positive = [row.prompt for row in call.rows].index(0)
        assert support.relative(modulation(call).double()[positive], expected[positive]) <= 1e-5


@every_family
def test_dds_is_its_two_steps_and_stays_for_equal_prompts(family, model):
    """Against the same written down once more; in the first step source and target are one, so nothing else pulls."""
    before, clip = watched(model, family), 0.5 * family.clip()
    source, edit, negative = prompts_of(family)
    options = dict(steps=2, weights={SPATIAL: 0.3, TEMPORAL: 0.1}, blocks=key_blocks(model), cfg=3.0)
    expected = plain_distillation.optimised(model, source, edit, negative, clip, Distillation(**options), 0)
    free = plain_distillation.optimised(
        model, source, edit, negative, clip, Distillation(**options | {"weights": {}}), 0
    )
    pull = (expected - free).norm()
    assert pull > 1e-3 * (expected - clip).norm() > 0
    for low_memory in (False, True):
        settings = Distillation(**options, low_memory=low_memory)
        moved, curve = optimise(model, source, edit, negative, clip, settings, seed=0)
        assert (moved - expected).norm() <= 1e-3 * pull + 1e-6 * clip.norm() and len(curve) == 2
    torch.testing.assert_close(
        optimise(model, source, source, negative, clip, settings, seed=0)[0], clip, rtol=0, atol=1e-4
    )
    assert before.changed() == []


# --- conditionings ------------------------------------------------------


@every_family
def test_prompts_of_other_lengths_and_split_batches_agree(family, model, monkeypatch):
    """The regions act on both prompts whether they run beside one another or, as where memory is short, one by one."""
    patched = patch_regions(model, RegionModulation(end=1.0))
    positive = regional(family)
    joint = "joint" in {layer.kind for layer in attention_layers(model).values()}
    for words in (family.words, 2 * family.words):
        negative = family.conditioning(1, words=words)
        rows = []
        tap = AttentionTap(patched, [lambda call, rows=rows: rows.append({row.prompt for row in call.rows})])
        together = predicted(patched, family, positive, negative=negative, options=tap.install)
        repeated = words > family.words and {0, 1} in rows  # to the longer prompt's length
        if joint:  # the negative prompt has no regions
            again = 2 if repeated else 1
            extra = {key: v.repeat(1, again) if key == MASK else v for key, v in positive[0][1].items()}
            layout, steps = extra[LAYOUT], [turn * family.words for turn in range(again)]
            places = tuple(tuple(place + step for step in steps for place in own) for own in layout.positions)
            layout = replace(layout, positions=places, length=again * family.words)
            longer = with_layout([[positive[0][0].repeat(1, again, 1), extra]], layout)
            alone = predicted(patched, family, longer, cfg=1.0), predicted(model, family, negative, cfg=1.0)
            torch.testing.assert_close(together, alone[1] + 2.0 * (alone[0] - alone[1]), rtol=1e-4, atol=1e-4)
        if joint and repeated:
            continue  # a word more often has more of the attention, so one by one is something else
        effect = (together - predicted(model, family, positive, negative=negative)).norm()
        rows.clear()
        with monkeypatch.context() as patch:
            patch.setattr(model.model, "memory_required", lambda *_, **__: 2**60)
            apart = predicted(patched, family, positive, negative=negative, options=tap.install)
        assert all(len(prompts) == 1 for prompts in rows) and {p for prompts in rows for p in prompts} == {0, 1}
        assert (together - apart).norm() <= 2e-2 * effect


@every_family
def test_a_latents_own_mask_is_the_samplers(family, model):
    """Also where the model reads a noise mask itself: in this loop no token is clean and no frame known."""
    trajectory = invert(model, family.conditioning(), 0.5 * family.clip(), sigmas_of(model, 2))
    frames, size = family.shape[2 if family.patched else 0], family.shape[-2:]
    mask = torch.zeros(frames, *size)
    mask[:, :, : size[1] // 2] = 1
    empty, made = torch.zeros(trajectory.shape), []
    for own in (True, False):
        guider = support.guider_of(model, family.conditioning(1))
        sampler = TrajectorySampler(trajectory, mask=mask if own else None)
        noise_mask = None if own else mask[:, None]
        options = dict(denoise_mask=noise_mask, disable_pbar=True, seed=0)
        made.append(guider.sample(empty, empty, sampler, trajectory.sigmas, **options))
    assert torch.equal(*made)


@families_named("Wan", "CogVideoX 1.0")
def test_a_latents_own_mask_that_moves_is_refused_where_a_latent_frame_holds_several(family, model):
    trajectory = invert(model, family.conditioning(), 0.5 * family.clip(), sigmas_of(model, 2))
    moving = torch.zeros(family.shape[2], 1, *family.shape[-2:])
    moving[0, ..., :4] = 1
    guider, empty = support.guider_of(model, family.conditioning(1)), torch.zeros(trajectory.shape)
    for mask in (moving, torch.zeros_like(moving)):
        with pytest.raises(ValueError, match="mask: the latent carries a mask for each frame, or an empty one"):
            sampler, options = TrajectorySampler(trajectory), dict(denoise_mask=mask, disable_pbar=True, seed=0)
            guider.sample(empty, empty, sampler, trajectory.sigmas, **options)


@families(lambda family: PICTURE in family.extra)
def test_a_model_that_wants_a_picture_is_refused_without_one(family, model):
    without = [[embedding, {}] for embedding, _ in family.conditioning()]
    with pytest.raises(ValueError, match="positive: this .* draws on from a picture .* holds none"):
        invert(model, without, family.clip(), sigmas_of(model, 2))
    with pytest.raises(ValueError, match="negative: this .* draws on from a picture"):
        optimise(model, family.conditioning(), family.conditioning(), without, family.clip(), Distillation(), seed=0)


@every_family
def test_masks_follow_the_clip_or_the_latent(family, model):
    """Outside the mask the source stays, for a mask of the clip's frames as for one of the latent's."""
    trajectory = invert(model, family.conditioning(), 0.5 * family.clip(), sigmas_of(model, 2))
    together, frames = family_of(model).frames.step, family.shape[2 if family.patched else 0]
    height, width = family.shape[-2:]
    of_latent = torch.zeros(frames, 8 * height, 8 * width)
    of_latent[-1, :, : 4 * width] = 1
    of_clip = torch.cat([of_latent[:1], of_latent[1:].repeat_interleave(together, 0)])
    made = []
    for mask in (of_latent, of_clip):
        guider = support.guider_of(model, family.conditioning(1))
        empty = torch.zeros(trajectory.shape)
        sampler = TrajectorySampler(trajectory, mask=mask)
        made.append(guider.sample(empty, empty, sampler, trajectory.sigmas, disable_pbar=True, seed=0))
    assert torch.equal(*made)
    source = model.model.process_latent_out(trajectory.latents[-1].float())
    kept, edited = (slice(0, -1), -1) if not family.patched else ((slice(None), slice(None), slice(0, -1)),) * 2
    assert torch.equal(made[0][kept], source[kept])
    assert torch.equal(made[0][..., width // 2 :], source[..., width // 2 :])
    assert not torch.equal(made[0], source)
    with pytest.raises(ValueError, match="mask: it has"):
        TrajectorySampler(trajectory, mask=torch.ones(frames + 1, 8, 8))


@pytest.fixture
def seen_clip(family, model):
    """(frames of the clip, for each its frame of tokens, a trajectory of two steps)."""
    own = family_of(model)
    latents, together = family.shape[2], own.frames.step
    joined = latents // family.grid[0]
    of_tokens = [
        (0 if frame == 0 else (frame - 1) // together + 1) // joined for frame in range(together * (latents - 1) + 1)
    ]
    return len(of_tokens), of_tokens, invert(model, family.conditioning(), family.clip(), sigmas_of(model, 2))


def calls_at_the_start(trajectory):
    """Of a pass over its noisiest latent."""
    calls = []
    call_on_trajectory(calls.append, trajectory, 0.0, frozenset({"spacetime", "joint"}))
    return calls


@transformers
def test_relevance_of_a_point_is_cross_frame_attention(family, model, seen_clip):
    """Against softmax written out per frame pair, in float64, in frames of the clip."""
    frames, of_tokens, trajectory = seen_clip
    count, height, width = family.grid
    region, asked = torch.zeros(2 * height, 2 * width), frames - 1
    region[1, 2] = 1
    found = relevance_of(region, asked, trajectory, percent=0.0, frames=frames)
    place, own = 1, of_tokens[asked]  # row 0, column 1 of tokens, two pixels a side each
    total = torch.zeros(count, height * width, dtype=torch.float64)
    calls = [call for call in calls_at_the_start(trajectory) if call.kind in ("spacetime", "joint")]
    for call in calls:
        q, k = (call.of_clip(t).double() for t in (call.query, call.key))
        for j in range(count):
            there = (q[own] @ k[j].mT * call.scale).softmax(-1)[:, place]
            back = (q[j] @ k[own].mT * call.scale).softmax(-1)[:, :, place]
            total[j] += height * width / 2 * (there + back).mean(0) / len(calls)
    maps = torch.nn.functional.interpolate(total.view(count, 1, height, width), region.shape, mode="bilinear")[:, 0]
    assert found.shape == (frames, *region.shape)
    torch.testing.assert_close(found.double(), maps[of_tokens], rtol=1e-3, atol=1e-4)


@transformers
def test_attention_to_words_is_their_share_of_the_softmax(family, model, seen_clip):
    frames, of_tokens, trajectory = seen_clip
    count, height, width = family.grid
    words = ("a", "red", "ball", "on", "a", "blue", "sea")
    layout = replace(halves(family), words=words, tokenize=lambda text: text.split())
    found = token_attention(
        trajectory, regional(family, layout), "blue sea", (height, width), percent=0.0, frames=frames
    )
    total = torch.zeros(count, height * width, dtype=torch.float64)
    calls = [call for call in calls_at_the_start(trajectory) if call.kind in ("cross", "joint")]
    for call in calls:
        scores = call.query.double() @ call.key.double().mT * call.scale
        weights = (scores if call.mask is None else scores + call.mask.double()).softmax(-1)
        clip = len(total.flatten())
        first = clip if call.kind == "joint" and family_of(model).patched == "first" else 0
        queries = slice(0, clip) if call.kind == "cross" or first else slice(call.query.shape[2] - clip, None)
        own = weights[0, :, queries, [first + 5, first + 6]].sum(-1).mean(0)
        total += own.view(count, -1) / len(calls)
    assert 0 < float(total.mean()) < 1
    of_latents = replace(layout.regions[0], mask=layout.regions[0].mask.expand(family.shape[2], -1, -1))
    shares = [
        share_inside(found, replace(layout, regions=(r, layout.regions[1])), "red", time_of(trajectory.clean, model))
        for r in (of_latents, layout.regions[0])
    ]
    assert shares[0] == pytest.approx(shares[1])
    torch.testing.assert_close(found.double().flatten(1), total[of_tokens], rtol=1e-3, atol=1e-4)


@transformers
def test_regions_of_a_transformers_attention_have_the_clips_frames(family, model, seen_clip):
    frames, of_tokens, trajectory = seen_clip
    masks = torch.stack(regions_from_attention(trajectory, 2, (16, 16), seed=0, instances=False, frames=frames))
    assert masks.shape[1:] == (frames, 16, 16) and masks.sum(0).eq(1).all() and len(masks) == 2
    same = [f for f in range(1, frames) if of_tokens[f] == of_tokens[f - 1]]
    assert all(torch.equal(masks[:, f], masks[:, f - 1]) for f in same) and same


@transformers
def test_a_clip_of_other_frames_is_refused(family, model, seen_clip):
    frames, _, trajectory = seen_clip
    with pytest.raises(
        ValueError, match=f"images: they are {frames + 1}, the trajectory's clip has {frames} .*in the latent"
    ):
        check_images(torch.zeros(frames + 1, 8, 8, 3), trajectory)


@families_named("Wan", "CogVideoX 1.0", "UNet3D")
def test_two_models_of_one_schedule_do_what_one_does(family):
    """Two loaded copies of one model, the second for the noisy half, as the experts of Wan 2.2: inversion and edit."""
    low, high = family.model(), family.model()
    sigmas, clip, source = sigmas_of(low, 8), 0.5 * family.clip(), family.conditioning()
    whole = invert(low, source, clip, sigmas)
    middle = 1 - noise_fraction(float(whole.sigmas[4]), low.get_model_object("model_sampling").percent_to_sigma)
    lower = invert(low, source, clip, sigmas, to_percent=middle - 0.01)
    upper = invert(high, source, clip, sigmas, before=lower)
    assert torch.equal(torch.cat([upper.latents[:-1], lower.latents]), whole.latents)
    assert torch.equal(torch.cat([upper.sigmas[:-1], lower.sigmas]), whole.sigmas)
    assert lower.is_part and upper.is_part and upper.schedule_steps == 8 and torch.equal(upper.clean, lower.clean)
    mask, empty = torch.zeros(1, 8, 8), torch.zeros(whole.shape)
    mask[..., :4] = 1

    def edited(model, trajectory, latent, **options):
        guider = support.guider_of(model, family.conditioning(1), family.conditioning(2), 2.0)
        matching = RelevanceMatching(str_score_of(trajectory), family.step)
        sampler = TrajectorySampler(trajectory, mask=mask, before_step=[matching], **options)
        return guider.sample(empty, latent, sampler, trajectory.sigmas, disable_pbar=True, seed=0)

    expected = edited(low, whole, empty)
    half = edited(high, upper, empty)
    assert support.relative(edited(low, lower, half, continue_from_latent=True), expected) <= 1e-4
    assert support.relative(edited(low, lower, half), expected) > 1e-3  # from the inverted clip: another edit
    with pytest.raises(ValueError, match="guider: its model is not the one that was inverted"):
        edited(low, upper, empty)
    with pytest.raises(ValueError, match="latent: it is not the clip of the connected trajectory"):
        invert(high, source, family.clip(1), sigmas, before=lower)
    with pytest.raises(ValueError, match="trajectory: its noisiest sigma is .* which is no step of this schedule"):
        invert(high, source, clip, sigmas_of(low, 7), before=lower)
    with pytest.raises(ValueError, match="to_percent: at 0.9999 none of the 8 steps is left"):
        invert(low, source, clip, sigmas, to_percent=0.9999)
    with pytest.raises(ValueError, match="trajectory: it is a part of an inversion by two models"):
        save_trajectory(lower, "part")


def long_clip(family):
    """Seven latent frames."""
    first, channels, *size = family.shape[0], family.shape[1], *family.shape[-2:]
    return torch.randn(first, channels, 7, *size) if family.patched else torch.randn(7, channels, *size)


anchors = pytest.mark.parametrize("anchored", [False, True], ids=["own frames", "with the frame before"])
"""Whether the host puts the frame before a window in front of it."""


def windowed_copy(model, family, **options):
    """A clone of a model that sees 4 frames at a time, the last of which begins the next window."""
    windowed = model.clone()
    windowed.model_options["context_handler"] = IndexListContextHandler(
        get_matching_context_schedule("standard_static"),
        get_matching_fuse_method("pyramid"),
        context_length=4,
        context_overlap=1,
        dim=2 if family.patched else 0,
        **options,
    )
    return windowed


@anchors
@families_named("Wan", "Wan VACE", "CogVideoX 1.0", "UNet3D")
def test_matching_in_windows_blends_what_each_window_says(family, model, anchored):
    """Against edits of the windows' frames as clips of their own, weighted as the host weights predictions."""
    dim, clip = (2 if family.patched else 0), long_clip(family)
    windowed = windowed_copy(model, family, causal_window_fix=anchored)
    trajectory = invert(model, family.conditioning(), 0.5 * clip, sigmas_of(model, 3))  # not in windows: other clips
    moves = []

    def first_move(model, trajectory):
        guider = support.guider_of(model, family.conditioning(1))
        act, empty = RelevanceMatching(str_score_of(trajectory), 0.1), torch.zeros(trajectory.shape)

        def watched(x, step):
            moves.append((act(x, step) - x, step.run.records[-1].cosines[0]))
            return x

        moves.clear()
        sampler = TrajectorySampler(trajectory, before_step=[watched])
        guider.sample(empty, empty, sampler, trajectory.sigmas, disable_pbar=True, seed=0)
        return -moves[0][1], moves[0][0]

    found = first_move(windowed, replace(trajectory, model=windowed))
    total, counts, losses = torch.zeros_like(found[1]), torch.zeros(7), []
    for before, frames in (([], [0, 1, 2, 3]), ([2] if anchored else [], [3, 4, 5, 6])):
        shown = torch.tensor([*before, *frames])
        part = replace(trajectory, latents=trajectory.latents.index_select(dim + 1, shown))
        loss, slope = first_move(model, part)
        whole, slope = slope.square().sum(), slope.narrow(dim, len(before), len(frames))
        slope = slope * (whole / slope.square().sum())  # without the frame before, as far towards the match
        weights = torch.tensor([1.0, 2.0, 2.0, 1.0])
        shape = [-1 if i == dim else 1 for i in range(slope.ndim)]
        total.index_add_(dim, torch.tensor(frames), slope * weights.view(shape))
        counts[frames] += weights
        losses.append(loss)
    torch.testing.assert_close(found[1], total / counts.view(shape), rtol=1e-3, atol=1e-5)
    assert found[0] == pytest.approx(sum(losses) / len(losses), rel=1e-6, abs=1e-9)


@anchors
@pytest.mark.parametrize("balanced", [True, False], ids=["one gradient each", "one of their sum"])
@families_named("Wan", "Wan VACE", "CogVideoX 1.0", "UNet3D")
def test_distillation_in_windows_blends_what_each_window_says(family, model, balanced, anchored):
    """Against predictions and gradients of the windows' frames as clips of their own."""
    dim, clip = (2 if family.patched else 0), 0.5 * long_clip(family)
    weights = {SPATIAL: 0.3, TEMPORAL: 0.1} if balanced else {SPATIAL: 300.0, TEMPORAL: 30.0}
    settings = Distillation(steps=2, weights=weights, blocks=key_blocks(model), cfg=3.0, balanced=balanced)
    over = plain_distillation.windows(dim, [0, 1, 2, 3], [3, 4, 5, 6], anchored=anchored)
    expected = plain_distillation.optimised(model, *prompts_of(family), clip, settings, 0, over)
    free = plain_distillation.optimised(model, *prompts_of(family), clip, replace(settings, weights={}), 0, over)
    windowed = windowed_copy(model, family, causal_window_fix=anchored)
    found, _ = optimise(windowed, *prompts_of(family), clip, settings, seed=0)
    pull = (expected - free).norm()
    assert pull > 1e-3 * (expected - clip).norm() > 0
    assert (found - expected).norm() <= 1e-3 * pull + 1e-6 * clip.norm()


@families_named("Wan", "UNet3D")
def test_windows_that_cannot_be_followed_are_refused(family, model):
    windowed = windowed_copy(model, family)
    clip, prompt = family.clip(), family.conditioning()
    foreign = model.clone()
    foreign.model_options["context_handler"] = object()
    with pytest.raises(ValueError, match="model: its context windows are of a kind"):
        optimise(foreign, prompt, prompt, prompt, clip, Distillation(), seed=0)
    trajectory = invert(model, prompt, clip, sigmas_of(model, 2))
    with pytest.raises(ValueError, match="model: only one of the inverted model and the edit's has context windows"):
        sampled(windowed, family, trajectory, [RelevanceMatching(str_score_of(trajectory), 0.01)])


def swaying(family, eighths=(2, 6, 4, 4, 1, 6, 5)):
    """A layout of one region that covers so many eighths of each frame.

    In the windows of four of these seven frames it covers as much on average as in the clip, with the frame before them
    too, so that its size, a share of the whole clip, is the same in a clip of a window's frames alone.
    """
    height, width = family.grid[1:]
    mask = torch.zeros(len(eighths), 4 * height, 4 * width)
    for i, part in enumerate(eighths):
        mask[i, :, : width * part // 2] = 1
    return replace(halves(family), regions=(Region("a", mask),), positions=((1,),))


def of_frames(layout, frames):
    return replace(layout, regions=tuple(Region(r.phrase, r.mask[frames]) for r in layout.regions))


@anchors
@families_named("Wan", "CogVideoX 1.0", "UNet3D")
def test_masks_follow_the_frames_of_context_windows(family, model, anchored):
    """The host's own windows: each is a clip of the frames that it sees, one before it included, with their masks."""
    layout, clip, dim = swaying(family), long_clip(family), 2 if family.patched else 0

    def edited(model, layout, clip):
        patched = patch_regions(model, RegionModulation(end=1.0, self_strength=3.0, cross_strength=3.0))
        positive, negative = regional(family, layout), family.conditioning(1)
        return predicted(patched, family, positive, negative=negative, clip=clip, percent=PERCENT)

    found = edited(windowed_copy(model, family, causal_window_fix=anchored), layout, clip)
    anchor = [2] if anchored else []  # the first window has no frame before it

    def seen(part, frames, before=()):
        shown = [*before, *frames]
        out = edited(model, of_frames(layout, shown), part.index_select(dim, torch.tensor(shown)))
        return out.narrow(dim, len(before), len(frames))

    parts = {0: seen(clip, range(4)), 3: seen(clip, range(3, 7), anchor)}
    over = plain_distillation.windows(dim, [0, 1, 2, 3], [3, 4, 5, 6])
    starts = iter(parts)
    expected = over(clip, lambda *_: {"": parts[next(starts)]})[""]
    other = edited(windowed_copy(model, family, causal_window_fix=anchored), of_frames(layout, [0] * 7), clip)
    assert support.relative(found, expected) <= 1e-3 * support.relative(other, expected) + 1e-7


@families_named("Wan", "CogVideoX 1.0")
def test_in_a_context_window_sizes_are_those_of_the_clip(family, model):
    """Against the definition, with shares of all seven frames, where the model sees three in which they are others."""
    layout, shown = swaying(family), [0, 4, 6]
    windowed = patch_regions(model, RegionModulation(end=1.0, levels=frozenset({2**20})))
    windowed.model_options["transformer_options"]["context_window"] = IndexListContextWindow(shown, 2, 7)
    calls, _ = calls_of(windowed, family, family.conditioning(1), positive=regional(family, layout), percent=PERCENT)
    covered = torch.nn.functional.adaptive_avg_pool2d(layout.regions[0].mask, family.grid[1:]).double().flatten(1)
    sides = torch.stack([covered, 1 - covered], 2)
    words = torch.zeros(family.words, 2, dtype=torch.float64)
    words[1, 0] = 1
    modulation, text_first = RegionModulation(2.0, 2.0, end=1.0), family_of(model).patched == "last"
    heard = [call for call in calls if call.kind != "cross"]
    for call in heard:
        arguments = call, 1 - PERCENT, sides[shown].flatten(0, 1), words, 2.0, text_first
        expected, other = (by_definition(*arguments, share)[0] for share in (sides.mean((0, 1)), None))
        out, positive = modulation(call).double(), [row.prompt == 0 for row in call.rows].index(True)
        found, expected, other = (t[positive] for t in (out, expected, other))
        assert support.relative(found, expected) <= 1e-5 < 0.1 * support.relative(other, expected)
    assert heard


@pytest.mark.parametrize("reads", [True, False], ids=["a model that reads it", "a model that does not"])
@families_named("Wan")
def test_regions_leave_the_tokens_of_a_reference_picture_alone(family, reads):
    """Wan puts them before the clip's; in a network with the layer that makes them and in one without.

    To STR they are keys of no frame. Regions act on the clip's tokens by the definition, and the reference's see and
    are seen as without regions.
    """
    model = by_hand(KNOWN.WAN21_T2V, DITS["wan"] | ({"in_dim_ref_conv": 16} if reads else {}))(family.weights())
    picture = torch.randn(1, 16, 1, 8, 8, generator=torch.Generator().manual_seed(6))
    positive = [[embedding, about | {"reference_latents": [picture]}] for embedding, about in regional(family)]
    modulation, calls = RegionModulation(end=1.0, self_strength=3.0, cross_strength=3.0), []

    def definition(call):
        calls.append(call)
        return by_definition(call, 1 - call.percent, *memberships(family), 3.0, False)[0].to(call.query)

    given = dict(cfg=1.0, percent=PERCENT)
    plain = predicted(model, family, positive, **given)
    found = predicted(patch_regions(model, modulation), family, positive, **given)
    expected = predicted(model, family, positive, options=AttentionTap(model, [definition]).install, **given)
    assert support.relative(found, expected) <= 1e-3 * support.relative(plain, expected)
    assert len(calls) == 4 and all(call.parts(call.query) == (16 * reads, 48, 0) for call in calls)
    for call in calls:
        if call.kind == "spacetime":
            frames = call.of_clip(call.key).transpose(0, 1).flatten(1, 2)[None]
            assert torch.equal(frames, call.key[:, :, 16 * reads :])
            assert torch.equal(call.extra(call.key), call.key[:, :, : 16 * reads])
    without = predicted(model, family, family.conditioning(), **given)
    assert torch.equal(without, plain) is not reads


@families_named("AnimateDiff")
def test_masks_follow_animatediffs_own_windows(family, model):
    """That pack says in the options of a run which frames it sees: it is the same with the masks of these alone."""
    layout, frames = swaying(family, (4, 2, 5, 3, 4, 6, 4)), [1, 4, 5]  # a half on average, as of all
    windowed = model.clone()
    windowed.model_options["transformer_options"]["ad_params"] = {"sub_idxs": frames, "full_length": 7}
    found, alone, other = (
        predicted(patch_regions(model, RegionModulation(end=1.0)), family, regional(family, layout), percent=PERCENT)
        for model, layout in (
            (windowed, layout),
            (model, of_frames(layout, frames)),
            (model, of_frames(layout, [0, 1, 2])),
        )
    )
    assert support.relative(found, alone) <= 1e-3 * support.relative(other, alone)


def test_words_stand_behind_pictures_and_written_letters():
    """Where HunyuanVideo 1.5 gets what CLIP vision sees, and letters in quotation marks, beside the prompt."""
    family = BY_NAME["HunyuanVideo 1.5"]
    seen, model = {}, family.model()
    beside = {
        "clip_vision_output": SimpleNamespace(last_hidden_state=torch.randn(1, 11, 1152)),
        "conditioning_byt5small": torch.randn(1, family.words, 1472),
    }

    def first_call(word=None):
        conditioning = family.conditioning()
        if word is not None:
            conditioning[0][0][:, word] += 30.0
        conditioning[0][1].update(beside)
        calls = []
        tap = AttentionTap(model, [calls.append])
        support.prediction(model, conditioning, family.clip(), cfg=1.0, sigma=0.9, options=tap.install)
        return calls[0]

    plain = first_call()
    keys = plain.extra(plain.key)
    assert keys.shape[2] == 11 + 2 * family.words
    for word in (1, 4):
        placed = Placed(Layout("a", (Region("a", torch.ones(1, 8, 8)),), ((word,),), family.words), family.words, 0)
        changed = first_call(word)
        most = (changed.extra(changed.key) - keys).abs().sum((0, 1, 3)).argmax()
        seen[word] = placed.words(keys.shape[2], changed.run.text)[:, 0].nonzero().flatten().tolist()
        assert seen[word] == [int(most)]
    assert seen[4][0] - seen[1][0] == 3


@pytest.mark.parametrize(
    ("base_model", "network", "message"),
    [
        ("WAN22_Animate", "AnimateWanModel", "is not a model to edit with: it draws a character from a reference"),
        (
            "WAN22_Animate2",
            "AnimateWanModel",
            r"is not a supported model family \(the nearest is Wan( VACE)?\); expected one",
        ),
        ("LTXAV2", "LTXAVModel", r"\(the nearest is LTX-2\)"),
        ("Lumina2", "NextDiT", "is not a supported model family; expected one of: UNet3D"),
    ],
)
def test_what_is_no_family_is_refused_by_name(base_model, network, message):
    inner = type(network, (), {})()
    model = SimpleNamespace(model=type(base_model, (), {"diffusion_model": inner})(), injections={})
    with pytest.raises(ValueError, match=f"^model: {base_model} .*{message}"):
        family_of(model)


# --- LoRA ---------------------------------------------------------------


@every_family
def test_a_lora_before_or_after_the_patch_is_the_same(family, model):
    matrices = (n for n, w in model.model.diffusion_model.named_parameters() if w.ndim == 2 and n.endswith("weight"))
    of_attention = tuple(f"{path}." for path in attention_layers(model))
    weight_name = [name for name in matrices if name.startswith(of_attention) and "txt" not in name][-1]
    weight = model.model.diffusion_model.get_parameter(weight_name)
    key = f"diffusion_model.{weight_name}"
    patch = {key: ("diff", (torch.randn(weight.shape),))}

    def with_lora(m):
        m = m.clone()
        m.add_patches(patch, 1.0)
        return m

    modulation, positive = RegionModulation(end=1.0), regional(family)
    after, before = with_lora(patch_regions(model, modulation)), patch_regions(with_lora(model), modulation)
    a, b = predicted(after, family, positive), predicted(before, family, positive)
    assert torch.equal(a, b)
    assert not torch.equal(a, predicted(patch_regions(model, modulation), family, positive))
    changed = family.model()  # and gradients are those of a model whose weights are so
    with torch.no_grad():
        changed.model.diffusion_model.get_parameter(weight_name).add_(patch[key][1][0])
    expected = gradient(changed, family, family.clip())[1]
    effect = support.relative(gradient(model, family, family.clip())[1], expected)
    for low_memory in (False, True):
        found = gradient(with_lora(model), family, family.clip(), low_memory=low_memory)[1]
        assert effect > 0 and support.relative(found, expected) <= 0.05 * effect
