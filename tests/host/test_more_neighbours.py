"""Graphs that an attack on the matrix of `test_neighbours` found wrong; the same methods and kinds of statements."""

from __future__ import annotations

from dataclasses import replace

import comfy.hooks
import comfy.samplers
import nodes
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_pag import PerturbedAttentionGuidance
from spacetime_edit.core import region_attention
from spacetime_edit.core.inflation import Inflation
from spacetime_edit.core.parametrization import NoiseSpace, ddim_inversion_step
from spacetime_edit.core.regions import Region
from spacetime_edit.host.attention_tap import AttentionTap
from spacetime_edit.host.distillation import SPATIAL, Distillation, optimise
from spacetime_edit.host.families import noise_space
from spacetime_edit.host.features import key_blocks
from spacetime_edit.host.inflation import inflate_attention
from spacetime_edit.host.inversion import RF_SIGMA_MAX
from spacetime_edit.host.layers import attention_layers
from spacetime_edit.host.model_pass import call_model
from spacetime_edit.host.region_patch import RegionModulation, patch_regions
from spacetime_edit.host.region_prompt import LAYOUT, digests_of, encode_regional_prompt
from spacetime_edit.host.token_attention import WordRecorder, token_attention
from spacetime_edit.tests.host import support
from spacetime_edit.tests.host.test_neighbours import (
    EXACT,
    GUIDERS,
    METHODS,
    PERCENT,
    STRONG,
    WORDS_SHOWN,
    clip_of,
    every_model,
    family,
    graph,
    inverted,
    layout_of,
    lora_hooks,
    nothing_kept,
    predicted,
    regional,
    run_str,
    sigma_at,
    sigmas_of,
    trajectory_of,
    with_hooks,
)
from spacetime_edit.tests.host.tiny_families import families_named

__all__ = ["family", "graph", "nothing_kept"]  # fixtures

# --- schedules of hooks, where sigmas do not fall -----------------------


@every_model
def test_a_lora_that_ends_acts_in_an_inversion_below_its_noise_only(graph):
    """Each step by a run of the host of its own, whose schedule begins at that sigma."""
    hooked = graph.with_prompts(lambda c: with_hooks(c, lora_hooks(graph.inverted, 1.0, falls_at=0.5)))
    sigmas, space = sigmas_of(graph).flip(0), noise_space(graph.inverted)
    sigmas = sigmas.clamp(max=RF_SIGMA_MAX) if space is NoiseSpace.RF else sigmas

    def denoise(x, sigma):
        predict = lambda guider, _, s, extra: guider(x, sigma * x.new_ones(x.shape[0]), **extra)  # noqa: E731
        guider = support.guider_of(graph.inverted, hooked.source)
        return support.at_one_sigma(guider, torch.zeros_like(x), predict, max(float(sigma), 1e-6))

    expected = [graph.inverted.model.process_latent_in(clip_of(graph))]
    for k in range(len(sigmas) - 1):
        x, _ = ddim_inversion_step(expected[-1], denoise, sigmas[k], sigmas[k + 1], space, 0)
        expected.append(x)
    found = inverted(hooked).latents
    torch.testing.assert_close(found, torch.stack(expected[::-1]), **EXACT)
    assert support.relative(found, inverted(graph).latents) > 1e-5


@every_model
def test_a_lora_that_ends_acts_by_the_noise_that_dds_has_drawn(graph, monkeypatch):
    hooks = lora_hooks(graph.inverted, 1.0, falls_at=0.5)
    hooked = graph.with_prompts(lambda c: with_hooks(c, hooks))
    settings = Distillation(steps=6, cfg=3.0, weights={}, blocks=frozenset(), t_range=(0.05, 0.95))
    seen, calculate = [], comfy.samplers.calc_cond_batch

    def spy(base, conds, x, timestep, options):
        made = calculate(base, conds, x, timestep, options)
        seen.extend((float(timestep[0]), h.strength) for c in conds for d in c or () for h in d["hooks"].hooks)
        return made

    monkeypatch.setattr(comfy.samplers, "calc_cond_batch", spy)
    optimise(graph.model, hooked.source, hooked.positive, hooked.negative, clip_of(graph), settings, seed=0)
    ends = sigma_at(graph, 0.5)
    assert [strength for _, strength in seen] == [float(sigma > ends) for sigma, _ in seen]
    levels = list(dict.fromkeys(sigma > ends for sigma, _ in seen))
    rises = any(a[0] < ends < b[0] for a, b in zip(seen, seen[1:], strict=False))
    assert len(levels) == 2 and rises, "the seed draws no level above the end after one below"


# --- several taps of ours in one run ------------------------------------


@every_model
def test_who_listens_changes_nothing(graph):
    """A look at the attention to words, beside the patch: neither the prediction nor what is seen."""
    height, width = (2 * side for side in graph.family.grid[1:])
    made = []

    def ask(guider, x, sigma, extra):
        (cond,) = guider.conds["positive"]
        for times in range(3):
            recorders = [
                WordRecorder((5, 6), graph.family.words, (height, width), None, ("cross", "joint"))
                for _ in range(times)
            ]
            tap = AttentionTap(graph.inverted, recorders) if times else None
            made.append(call_model(guider.inner_model, [cond], x, sigma, extra["model_options"], tap=tap))
        assert torch.equal(recorders[0].attention, recorders[1].attention)

    support.at_one_sigma(support.guider_of(graph.model, graph.positive), graph.family.clip(), ask, sigma_at(graph))
    assert torch.equal(made[0], made[1]) and torch.equal(made[0], made[2])


@every_model
def test_without_the_patch_is_without_it_where_the_patched_model_was_inverted(graph):
    """One wire of MODEL into everything."""
    plain = trajectory_of(graph.family.name)
    size = tuple(2 * side for side in graph.family.grid[1:])
    look = lambda model, own=None: token_attention(  # noqa: E731
        replace(plain, model=model), graph.positive, WORDS_SHOWN, size, percent=PERCENT, model=own
    )
    assert torch.equal(look(graph.model), look(graph.inverted))
    assert torch.equal(look(graph.model, graph.model), look(graph.inverted, graph.model))
    assert support.relative(look(graph.model, graph.model), look(graph.model)) > 1e-3


def patched_twice(graph, first, second):
    patches = (RegionModulation(**(STRONG | options)) for options in (first, second))
    model = graph.inverted
    for patch in patches:
        model = patch_regions(model, patch)
    return predicted(replace(graph, model=model))


def patched_once(graph, **options):
    return predicted(replace(graph, model=patch_regions(graph.inverted, RegionModulation(**(STRONG | options)))))


@every_model
def test_two_patches_may_share_the_work(graph):
    apart = [({"end": 0.3}, {"start": 0.5}, {"end": 0.3})]
    apart += [({"levels": frozenset({1})}, {"levels": frozenset({2, 4})}, {"levels": frozenset({1, 2, 4})})]
    if {"cross", "joint"} & {layer.kind for layer in attention_layers(graph.inverted).values()} != {"joint"}:
        apart += [({"self_strength": 0.0}, {"cross_strength": 0.0}, {})]
    for first, second, one in apart:
        for pair in ((first, second), (second, first)):
            torch.testing.assert_close(patched_twice(graph, *pair), patched_once(graph, **one), rtol=0, atol=0)


@every_model
def test_two_patches_on_one_call_are_refused(graph):
    with pytest.raises(ValueError, match="two ST-Layout Attention Patches act on .* at once; remove one"):
        patched_twice(graph, {}, {"cross_strength": 0.5})


@pytest.mark.parametrize("keys", ["all frames", "first + previous"])
@pytest.mark.parametrize("prompt", ["one", "released", "two"])
@families_named("SD 1.5")
def test_inflation_and_patch_in_either_order(graph, keys, prompt, monkeypatch):
    """Also where only some rows of the batch are modulated."""
    made = layout_of(graph.family)
    released = [
        [e, {**d, LAYOUT: replace(made, mode="released", digests=digests_of(e))}]
        for e, d in graph.family.conditioning(1)
    ]
    two = graph.positive + regional(graph.family.conditioning(4), graph.family, flip=True)
    positive = {"one": graph.positive, "released": released, "two": two}[prompt]
    inflate = lambda model: inflate_attention(model, Inflation(keys, None, False))  # noqa: E731
    patch = lambda model: patch_regions(model, RegionModulation(**STRONG))  # noqa: E731
    first, last = (
        predicted(replace(graph, model=model, positive=positive))
        for model in (patch(inflate(graph.inverted)), inflate(patch(graph.inverted)))
    )
    torch.testing.assert_close(first, last, rtol=0, atol=0)
    monkeypatch.setattr(region_attention, "SMALL", 10**9)  # all rows at once
    whole = predicted(replace(graph, model=patch(inflate(graph.inverted)), positive=positive))
    torch.testing.assert_close(first, whole, **EXACT)


# --- which prompt a pass is of ------------------------------------------


@every_model
def test_dds_tells_the_negative_prompt_from_the_positive(graph, monkeypatch):
    """As nodes know them that treat the two differently (IPAdapter, SAG), by their places."""
    places, calculate = [], comfy.samplers.calc_cond_batch
    prompts = graph.source, graph.positive, graph.negative
    named = {float(c[0][0].double().sum()): n for n, c in zip("spn", prompts, strict=True)}

    def spy(base, conds, x, timestep, options):
        places.extend((named[float(c[0]["cross_attn"].double().sum())], i) for i, c in enumerate(conds) if c)
        return calculate(base, conds, x, timestep, options)

    monkeypatch.setattr(comfy.samplers, "calc_cond_batch", spy)
    for weights in ({}, {SPATIAL: 0.5}):
        settings = Distillation(steps=1, cfg=3.0, weights=weights, blocks=key_blocks(graph.model), t_range=(0.4, 0.9))
        optimise(graph.model, *prompts, clip_of(graph), settings, seed=0)
    assert set(places) == {("s", 0), ("p", 0), ("n", 1)}


@pytest.mark.parametrize("inside", [True, False], ids=["within ours", "around ours"])
@pytest.mark.parametrize("guider", [name for name in GUIDERS if "Model" not in name])
@every_model
def test_one_list_at_a_time(graph, guider, inside):
    """A pack that asks the host for each prompt by itself, as the first."""

    def one_by_one(executor, base, conds, x, timestep, options):
        return [executor(base, [each], x, timestep, options)[0] for each in conds]

    alone = graph.model.clone()
    if inside:
        alone.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, "one_by_one", one_by_one)
    else:
        wrappers = alone.model_options["transformer_options"]["wrappers"]
        own = wrappers[WrappersMP.CALC_COND_BATCH]
        wrappers[WrappersMP.CALC_COND_BATCH] = {"one_by_one": [one_by_one], **own}
    guided = replace(graph, guider=GUIDERS[guider][0])
    torch.testing.assert_close(predicted(replace(guided, model=alone)), predicted(guided), **EXACT)


# --- parts of the frame -------------------------------------------------


def masked(conditioning, side):
    mask = torch.zeros(1, 8, 8)
    mask[..., slice(0, 4) if side == "left" else slice(4, 8)] = 1
    return nodes.ConditioningSetMask().append(conditioning, mask, "default", 1.0)[0]


@every_model
def test_a_masked_prompt_does_not_stand_for_the_clip(graph):
    """It is not the one that is matched, wherever it stands."""
    other = masked(graph.family.conditioning(4), "left")
    for positive in (other + graph.positive, graph.positive + other):
        torch.testing.assert_close(run_str(replace(graph, positive=positive)), run_str(graph), **EXACT)
    parts = masked(graph.positive, "left") + masked(graph.family.conditioning(4), "right")
    for method in ("STR", "DDS"):
        with pytest.raises(ValueError, match="positive: no conditioning covers the whole frame .* area or mask"):
            METHODS[method](replace(graph, positive=parts))


@every_model
def test_an_area_of_everything_covers_everything(graph):
    size = (graph.family.shape[2], 1.0, 1.0) if graph.family.patched else (1.0, 1.0)
    place = (0.0,) * len(size)
    area = ("percentage", *(1.0 for _ in size), *place)
    everywhere = [[e, {**about, "area": area}] for e, about in graph.positive]
    torch.testing.assert_close(run_str(replace(graph, positive=everywhere)), run_str(graph), **EXACT)


def tiled(model, in_batch):
    """Tiled Diffusion's kind: the network sees two halves of the picture, one after the other or in one batch."""

    def halves(apply, args):
        x, level, given = args["input"], args["timestep"], args["c"]
        left, right = x.chunk(2, -1)
        if not in_batch:
            return torch.cat([apply(left, level, **given), apply(right, level, **given)], -1)
        twice = lambda v: torch.cat([v, v]) if isinstance(v, torch.Tensor) and len(v) == len(x) else v  # noqa: E731
        made = apply(torch.cat([left, right]), twice(level), **{name: twice(v) for name, v in given.items()})
        return torch.cat(made.chunk(2), -1)

    cut = model.clone()
    cut.set_model_unet_function_wrapper(halves)
    return cut


@pytest.mark.parametrize("in_batch", [False, True], ids=["one by one", "in one batch"])
@every_model
def test_tiles_are_refused(graph, in_batch):
    cut = graph.with_model(lambda model: tiled(model, in_batch))
    with pytest.raises(ValueError, match="runs it on 4 x 8 of the latent's 8 x 8 cells.*Tiled Diffusion"):
        predicted(cut)
    for method in ("STR", "DDS"):
        with pytest.raises(ValueError, match="calls it several times .* Tiled Diffusion"):
            METHODS[method](cut)


@families_named("Wan", "CogVideoX 1.0")
def test_an_area_in_time_is_refused(graph):
    in_time = [[e, {**about, "area": ("percentage", 0.5, 1.0, 1.0, 0.5, 0.0, 0.0)}] for e, about in graph.positive]
    with pytest.raises(ValueError, match="positive: an area of a regional prompt is of some of the frames"):
        predicted(replace(graph, positive=in_time))


# --- prompts ------------------------------------------------------------


@families_named("HunyuanVideo")
def test_a_picture_among_the_words_is_refused(graph):
    """As HunyuanVideo's image-to-video node puts it there in guidance_type custom."""
    pictured = [[e, {**about, "ref_latent": graph.family.clip()[:, :, :1]}] for e, about in graph.positive]
    with pytest.raises(ValueError, match="positive: HunyuanVideo's image-to-video node in guidance_type custom"):
        predicted(replace(graph, positive=pictured))


@every_model
def test_modes_are_not_mixed_on_one_regions_wire(graph):
    (embedding, about), *_ = graph.positive
    released = [[embedding + 1e-3, {**about, LAYOUT: replace(about[LAYOUT], mode="released", digests=())}]]
    with pytest.raises(ValueError, match="mode: regional prompts of one run are encoded in modes"):
        predicted(replace(graph, positive=graph.positive + released))


def test_spliced_phrases_follow_a_schedule_of_the_text_encoder(tiny):
    """Each time's entry gets the phrase of that time."""
    clip = tiny.clip.clone(disable_dynamic=False)
    weights = {
        name: ("diff", (0.2 * torch.randn(value.shape, generator=torch.Generator().manual_seed(0)),))
        for name, value in clip.patcher.model.state_dict().items()
        if value.is_floating_point() and value.ndim == 2 and "layers" in name
    }
    hook = comfy.hooks.WeightHook(strength_model=0.0, strength_clip=1.0)
    hook.weights, hook.weights_clip, hook.need_weight_init = {}, weights, False
    group, times = comfy.hooks.HookGroup(), comfy.hooks.HookKeyframeGroup()
    group.add(hook)
    for strength, start in ((0.0, 0.0), (1.0, 0.5)):
        times.add(comfy.hooks.HookKeyframe(strength, start))
    group.set_keyframes_on_hooks(times)
    clip.apply_hooks_to_conds, clip.use_clip_schedule = None, True
    clip.patcher.forced_hooks = group.clone()
    clip.patcher.register_all_hook_patches(group, comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Clip))
    phrase = clip.encode_from_tokens_scheduled(clip.tokenize("red circle"))
    region = Region("red circle", torch.ones(1, 8, 8))
    spliced = encode_regional_prompt(clip, "a red circle on a gray background", [region], splice=True)
    places = list(spliced[0][1][LAYOUT].positions[0])
    assert len(phrase) == len(spliced) == 2 and not torch.equal(phrase[0][0], phrase[1][0])
    for (made, _), (alone, _) in zip(spliced, phrase, strict=True):
        assert torch.equal(made[:, places], alone[:, [1, 2]])


@pytest.mark.parametrize("percent", [0.1, 0.7])
@every_model
def test_a_preview_shows_the_prompt_of_its_time(graph, percent):
    early, late = (
        nodes.ConditioningSetTimestepRange().set_range(conditioning, *span)[0]
        for conditioning, span in (
            (graph.positive, (0.0, 0.5)),
            (regional(graph.family.conditioning(4), graph.family), (0.5, 1.0)),
        )
    )
    plain, size = trajectory_of(graph.family.name), tuple(2 * side for side in graph.family.grid[1:])
    look = lambda positive: token_attention(plain, positive, WORDS_SHOWN, size, percent=percent)  # noqa: E731
    assert torch.equal(look(early + late), look(early if percent < 0.5 else late))


# --- what is said -------------------------------------------------------


@families_named("UNet3D", "SD 1.5")
def test_guidance_that_disturbs_attention_on_purpose_is_not_reported(graph):
    predicted(replace(graph, model=PerturbedAttentionGuidance.execute(graph.model, 3.0).result[0]))
    assert not [text for text in graph.said if "replaces" in text]


@pytest.mark.parametrize(
    ("mask", "about"), [(torch.ones(0, 8, 8), "no frame"), (torch.full((1, 8, 8), torch.nan), "NaN")]
)
def test_masks_without_sense_are_refused_at_once(about, mask):
    with pytest.raises(ValueError, match=f"mask of 'a cat': it .*{about}"):
        Region("a cat", mask)


def test_no_text_encoder_is_named():
    with pytest.raises(ValueError, match="clip: there is none"):
        encode_regional_prompt(None, "a cat", [])
