"""Each method beside what else people put into a graph: equal to the graph without the neighbour, or to its own dense
statement, or refused by name.

In every graph the edit's model has the ST-Layout Attention Patch and the positive prompt its regions. What is compared:
regions: the guider's prediction at one sigma; STR: the latent that matching moves at each step, from latents that are
given, so that what guider and cache do does not count; DDS: the optimised latent; preview: relevance of a point and
attention to words; inversion: its latents.
"""

from __future__ import annotations

import tempfile
import types
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import comfy.context_windows
import comfy.hooks
import comfy.samplers
import node_helpers
import nodes
import pytest
import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_custom_sampler import Guider_DualCFG, Guider_DualModel
from comfy_extras.nodes_easycache import EasyCacheNode, LazyCacheNode
from comfy_extras.nodes_perpneg import Guider_PerpNeg, perp_neg
from spacetime_edit.core.regions import Region
from spacetime_edit.host import model_pass, regional_prompts, step_caches
from spacetime_edit.host.distillation import SPATIAL, Distillation, optimise
from spacetime_edit.host.features import key_blocks
from spacetime_edit.host.inversion import invert
from spacetime_edit.host.layers import attention_layers
from spacetime_edit.host.region_patch import RegionModulation, patch_regions
from spacetime_edit.host.region_prompt import LAYOUT, Layout, digests_of, with_layout
from spacetime_edit.host.relevance_matching import RelevanceMatching, str_score_of
from spacetime_edit.host.relevance_preview import relevance_of
from spacetime_edit.host.sampling import TrajectorySampler
from spacetime_edit.host.token_attention import token_attention
from spacetime_edit.tests.host import support
from spacetime_edit.tests.host.tiny_families import (
    BY_NAME,
    DITS,
    FAST,
    KNOWN,
    UNET3D,
    by_hand,
    families_named,
    smooth,
)

PERCENT = 0.1  # where regions act strongly
STEPS = 4
WORDS_SHOWN = "blue sea"
STRONG = dict(self_strength=2.0, cross_strength=2.0, end=1.0)
EXACT = dict(rtol=1e-4, atol=1e-5)


# --- graphs -------------------------------------------------------------


@dataclass
class Graph:
    """One graph: the models of inversion and edit, the prompts, what guides; said: messages on nodes."""

    family: object
    model: object
    inverted: object
    source: list
    positive: list
    negative: list
    guider: Callable = None
    said: list = field(default_factory=list)

    def with_model(self, change):
        """The same with `change` of both models."""
        return replace(self, model=change(self.model), inverted=change(self.inverted))

    def with_prompts(self, change):
        """The same with `change` of every prompt."""
        return replace(self, source=change(self.source), positive=change(self.positive), negative=change(self.negative))

    def guided(self, positive=None, cfg=2.0):
        if self.guider is not None:
            return self.guider(self)
        return support.guider_of(self.model, positive or self.positive, self.negative, cfg)


def layout_of(family, flip=False, length=None):
    """Two regions side by side, each with a word; the first moves from frame to frame."""
    frames, height, width = family.grid
    left = torch.zeros(family.shape[2] if family.patched else frames, 4 * height, 4 * width)
    for f in range(len(left)):
        left[f, :, : 2 * width - 4 * (f % 2)] = 1
    masks = (1 - left, left) if flip else (left, 1 - left)
    words = ("a", "red", "ball", "on", "a", "blue", "sea", *("x",) * 99)[: family.words]
    return Layout(
        "a red ball on a blue sea", tuple(Region(n, m) for n, m in zip("ab", masks, strict=True)), ((1, 2), (5, 6)),
        length or family.words, words=words, tokenize=lambda text: text.split(),
    )  # fmt: skip


def regional(conditioning, family, **options):
    """As Encode Regional Prompt makes it."""
    made = layout_of(family, **options)
    return [with_layout([e], replace(made, digests=digests_of(e[0]), length=e[0].shape[1]))[0] for e in conditioning]


@pytest.fixture(scope="module")
def family(request):
    return BY_NAME[request.param]


@cache
def loaded(name):
    """One model a family for the whole module; the U-Net says more than the quiet one of `tiny_families`."""
    with torch.inference_mode():
        if name != "UNet3D":
            return BY_NAME[name].model()
        with tempfile.TemporaryDirectory() as folder:
            return support.unet3d_model(Path(folder), lambda net: smooth(net, quiet=0.05), "fp32", **UNET3D)


@cache
def second_copy(name):
    return loaded.__wrapped__(name)


@pytest.fixture(scope="module", autouse=True)
def nothing_kept():
    """The host's patchers must not end with the interpreter."""
    yield
    loaded.cache_clear()
    second_copy.cache_clear()
    trajectory_of.cache_clear()


@pytest.fixture
def graph(family):
    model, said = loaded(family.name), []
    patched = patch_regions(model, RegionModulation(**STRONG, say=said.append))
    positive = regional(family.conditioning(1), family)
    return Graph(family, patched, model, family.conditioning(), positive, family.conditioning(2), said=said)


every_model = families_named(*FAST)


# --- methods ------------------------------------------------------------


def sigma_at(graph, percent=PERCENT):
    return float(graph.inverted.get_model_object("model_sampling").percent_to_sigma(percent))


def sigmas_of(graph, steps=STEPS):
    return comfy.samplers.calculate_sigmas(graph.inverted.get_model_object("model_sampling"), "simple", steps)


def clip_of(graph, seed=0):
    return 0.5 * graph.family.clip(seed)


def predicted(graph, percent=PERCENT, guider=None, x=None):
    """The guider's prediction."""
    predict = lambda guider, x, sigma, extra: guider(x, sigma * x.new_ones(x.shape[0]), **extra)  # noqa: E731
    x = graph.family.clip() if x is None else x
    return support.at_one_sigma(guider or graph.guided(), x, predict, sigma_at(graph, percent))


def inverted(graph):
    return invert(graph.inverted, graph.source, clip_of(graph), sigmas_of(graph), refinements=0)


def run_inversion(graph):
    return inverted(graph).latents


@cache
def trajectory_of(name):
    """An inversion without any neighbour."""
    model, family = loaded(name), BY_NAME[name]
    with torch.inference_mode():
        sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", STEPS)
        return invert(model, family.conditioning(), 0.5 * family.clip(), sigmas, refinements=0)


def run_str(graph):
    """(steps, latent): what matching makes of latents that are given at every step, source and noise alike."""
    plain = trajectory_of(graph.family.name)
    trajectory = replace(plain, model=graph.inverted, conditioning=graph.source)
    given = [latent + 0.3 * latent.std() * graph.family.clip(7 + k) for k, latent in enumerate(trajectory.latents)]
    moved = []

    def give(x, step):
        return given[step.index].to(x)

    def keep(x, step):
        moved.append(x.clone())
        return x

    matching = RelevanceMatching(str_score_of(trajectory))
    sampler = TrajectorySampler(trajectory, before_step=[give, matching, keep], say=graph.said.append)
    empty = torch.zeros(trajectory.shape)
    graph.guided().sample(empty, empty, sampler, trajectory.sigmas, disable_pbar=True, seed=0)
    return torch.stack(moved)


def run_dds(graph):
    settings = Distillation(
        steps=2, step_size=2.0, cfg=3.0, weights={SPATIAL: 0.5}, blocks=key_blocks(graph.model), t_range=(0.4, 0.9)
    )
    prompts = graph.source, graph.positive, graph.negative
    return optimise(graph.model, *prompts, clip_of(graph), settings, seed=0, say=graph.said.append)[0]


def run_preview(graph):
    """Relevance of a point of the source; attention to words of the edit, with the patch."""
    plain = trajectory_of(graph.family.name)
    trajectory = replace(plain, model=graph.inverted, conditioning=graph.source)
    height, width = (2 * side for side in graph.family.grid[1:])
    region = torch.zeros(height, width)
    region[1, 2] = 1
    layers = ",".join(sorted({at.block for at in attention_layers(graph.inverted).values() if at.kind != "temporal"}))
    seen = relevance_of(region, 0, trajectory, percent=0.5, layers=layers)
    words = token_attention(
        trajectory, graph.positive, WORDS_SHOWN, (height, width), percent=PERCENT, model=graph.model, layers=layers
    )
    return torch.cat([seen, words])


METHODS = {
    "regions": predicted, "STR": run_str, "DDS": run_dds, "preview": run_preview, "inversion": run_inversion
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
@every_model
def test_each_method_does_something(graph, method):
    """Else equality with a neighbour would say nothing."""
    run, other = (
        METHODS[method],
        replace(graph, positive=graph.family.conditioning(5), source=graph.family.conditioning(6)),
    )
    if method == "preview":
        other = replace(other, positive=regional(other.positive, graph.family))
    assert support.relative(run(other), run(graph)) > 1e-3


# --- neighbours whose graph gives what it gives without them ------------


def both(changed):
    """Of a change of conditionings."""
    return lambda graph: graph.with_prompts(changed)


def of_edit(change):
    """Of a change of the edit's model."""
    return lambda graph: replace(graph, model=change(graph.model))


def twice(conditioning):
    return nodes.ConditioningCombine().combine(conditioning, conditioning)[0]


def averaged(conditioning):
    other = [[e.flip(1), {}] for e, _ in conditioning]
    return nodes.ConditioningAverage().addWeighted(conditioning, other, 1.0)[0]


def in_turns(conditioning):
    early = nodes.ConditioningSetTimestepRange().set_range(conditioning, 0.0, 0.5)[0]
    return early + nodes.ConditioningSetTimestepRange().set_range(conditioning, 0.5, 1.0)[0]


def masked_everywhere(conditioning):
    return nodes.ConditioningSetMask().append(conditioning, torch.ones(1, 8, 8), "default", 1.0)[0]


def split(graph):
    """As where memory is short: one prompt a call."""
    return graph.with_model(lambda model: short_of_memory(model))


def short_of_memory(model):
    cut = model.clone()

    def one_by_one(executor, base, conds, x, timestep, options):
        made = []
        for i in range(len(conds)):
            made.append(executor(base, [c if j == i else None for j, c in enumerate(conds)], x, timestep, options)[i])
        return made

    cut.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, "one_by_one", one_by_one)
    return cut


def cached(node, threshold):
    return lambda model: node.execute(model, threshold, 0.0, 1.0, False).result[0]


def controlled(conditioning):
    """A ControlNet that adds nothing, whose every call counts as one of the host's."""

    class Control:
        previous_controlnet, extra_hooks, control_model, multigpu_clones = None, None, None, {}
        get_models = get_extra_hooks = get_instance_for_device = lambda self, *_: []
        inference_memory_requirements = lambda self, dtype: 0  # noqa: E731
        pre_run = cleanup = lambda self, *_: None

        def get_control(self, x, t, cond, number, options):
            assert x.shape[0] % number == 0 and "sigmas" in options
            return {}

    return node_helpers.conditioning_set_values(conditioning, {"control": Control(), "control_apply_to_uncond": False})


def guidance_that_asks_again(model):
    """A post-CFG function that calls the model with the positive prompt alone, as SLG, PAG and their kind do."""
    asks = model.clone()

    def again(args):
        alone = comfy.samplers.calc_cond_batch(
            args["model"], [args["cond"]], args["input"], args["sigma"], args["model_options"]
        )[0]
        return args["denoised"] + 3.0 * (args["cond_denoised"] - alone)

    asks.set_model_sampler_post_cfg_function(again)
    return asks


def with_backend(model):
    """A node behind ours that sets the slot of attention, as Model Attention Backend of later hosts."""
    later = model.clone()
    later.model_options["transformer_options"]["optimized_attention_override"] = lambda f, *a, **k: f(*a, **k)
    return later


def asking_twice(weight, outputs=None):
    """A node that calls cross-attention with a prompt of its own too (NAG), of the same length; weight: of that.
    outputs: a list that gets what each layer gives for the own prompt and for the other."""

    def change(model):
        nag = model.clone()
        generator = torch.Generator().manual_seed(9)
        for path, layer in attention_layers(model).items():
            if layer.kind != "cross":
                continue
            module = model.model.diffusion_model.get_submodule(path)

            def forward(self, x, context=None, *args, own=module.forward, **kwargs):
                named = "encoder_hidden_states" if context is None and "encoder_hidden_states" in kwargs else None
                given = kwargs.pop(named) if named else context
                other = torch.randn(given.shape, generator=generator.manual_seed(9)).to(given)
                call = lambda text: own(x, *args, **{named: text}, **kwargs) if named else own(x, text, *args, **kwargs)  # noqa: E731
                out, of_other = call(given), call(other)
                if outputs is not None:
                    outputs.extend((out, of_other))
                return out + weight * (out - of_other)

            nag.add_object_patch(f"diffusion_model.{path}.forward", types.MethodType(forward, module))
        return nag

    return change


def in_chunks(model):
    """A node that computes cross-attention for a half of the queries at a time."""
    parts = model.clone()
    for path, layer in attention_layers(model).items():
        if layer.kind != "cross":
            continue
        module = model.model.diffusion_model.get_submodule(path)

        def forward(self, x, *args, own=module.forward, **kwargs):
            return torch.cat([own(part, *args, **kwargs) for part in x.chunk(2, 1)], 1)

        parts.add_object_patch(f"diffusion_model.{path}.forward", types.MethodType(forward, module))
    return parts


def compiled(model):
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    fast = model.clone()
    set_torch_compile_wrapper(fast, backend="eager")
    return fast


SAME = {
    "Conditioning (Combine) of a prompt with itself": both(twice),
    "Conditioning (Average) of strength 1": both(averaged),
    "prompts that take turns": both(in_turns),
    "Conditioning (Set Mask) of ones": both(masked_everywhere),
    "one prompt a call": split,
    "EasyCache that skips nothing": of_edit(cached(EasyCacheNode, 0.0)),
    "LazyCache that skips nothing": of_edit(cached(LazyCacheNode, 0.0)),
    "guidance that asks the model again": of_edit(guidance_that_asks_again),
    "Model Attention Backend behind the patch": lambda graph: graph.with_model(with_backend),
    "a prompt of another pack in cross-attention (NAG)": of_edit(asking_twice(0.0)),
    "cross-attention in parts": of_edit(in_chunks),
}
"""Neighbours with which each method gives what it gives without them."""


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("neighbour", SAME)
@every_model
def test_neighbours_that_change_nothing(graph, neighbour, method):
    run = METHODS[method]
    torch.testing.assert_close(run(SAME[neighbour](graph)), run(graph), **EXACT)


@pytest.mark.parametrize("method", METHODS)
@families_named("SD 1.5, inflated", "Wan", "CogVideoX 1.0")
def test_a_controlnet_that_adds_nothing(graph, method):
    """Its calls, its frames and its end are the host's; what one adds is in `test_controlnet`."""
    torch.testing.assert_close(METHODS[method](both(controlled)(graph)), METHODS[method](graph), **EXACT)


STRONG_CACHES = {
    "EasyCache": cached(EasyCacheNode, 3.0),
    "LazyCache": cached(LazyCacheNode, 3.0),
}


@pytest.mark.parametrize("method", [name for name in METHODS if name != "regions"])
@pytest.mark.parametrize("neighbour", STRONG_CACHES)
@every_model
def test_our_own_passes_leave_step_caches_out(graph, neighbour, method):
    """A cache that would answer at almost every step, on both models; that regions on the guider's own calls follow the
    cache is the cache's business."""
    run, before = METHODS[method], METHODS[method](graph)
    cut = graph.with_model(STRONG_CACHES[neighbour])
    torch.testing.assert_close(run(cut), before, **EXACT)
    told = [text for text in cut.said if "Step caches are left out" in text]
    assert bool(told) == (method == "DDS")


@every_model
def test_an_inversion_says_that_it_leaves_caches_out(graph):
    said = []
    model = cached(EasyCacheNode, 3.0)(graph.inverted)
    invert(model, graph.source, clip_of(graph), sigmas_of(graph), say=said.append)
    assert len(said) == 1 and "Step caches are left out of the inversion (easycache)" in said[0]


@pytest.mark.parametrize("method", METHODS)
@families_named("Wan")
def test_compiled_models_are_followed(graph, method):
    """torch.compile: hooks in code that is compiled would be passed by without a word."""
    run = METHODS[method]
    torch.testing.assert_close(run(graph.with_model(compiled)), run(graph), **EXACT)


# --- LoRA with hooks ----------------------------------------------------


def difference(model):
    """{key: patch} of one matrix of attention."""
    network = model.model.diffusion_model
    paths = [path for path, layer in attention_layers(model).items() if layer.kind != "temporal"]
    name = next(n for n, w in network.named_parameters() if any(n.startswith(p) for p in paths) and w.ndim == 2)
    shape = network.get_parameter(name).shape
    patch = 0.2 * torch.randn(shape, generator=torch.Generator().manual_seed(11))
    return {f"diffusion_model.{name}": ("diff", (patch,))}


def lora_hooks(model, strength, falls_at=None):
    """As Create Hook LoRA makes them; falls_at: percent of denoising from which it is gone."""
    hook = comfy.hooks.WeightHook(strength_model=strength, strength_clip=0.0)
    hook.weights, hook.need_weight_init = difference(model), False
    if falls_at is not None:
        frames = comfy.hooks.HookKeyframeGroup()
        frames.add(comfy.hooks.HookKeyframe(strength=1.0, start_percent=0.0))
        frames.add(comfy.hooks.HookKeyframe(strength=0.0, start_percent=falls_at))
        hook.hook_keyframe = frames
    group = comfy.hooks.HookGroup()
    group.add(hook)
    return group


def with_hooks(conditioning, hooks):
    return comfy.hooks.set_hooks_for_conditioning(conditioning, hooks)


def with_lora(model):
    patched = model.clone()
    patched.add_patches(difference(model), 1.0)
    return patched


@pytest.mark.parametrize("method", METHODS)
@every_model
def test_a_lora_by_hooks_is_a_lora(graph, method):
    hooks, run = lora_hooks(graph.inverted, 1.0), METHODS[method]
    found, expected = run(graph.with_prompts(lambda c: with_hooks(c, hooks))), run(graph.with_model(with_lora))
    torch.testing.assert_close(found, expected, **EXACT)
    assert support.relative(run(graph), expected) > 1e-4


@every_model
def test_a_lora_by_hooks_of_the_source_alone_is_in_its_passes(graph):
    """The guider's own prompts have none, so the host would not have registered it."""
    hooks = lora_hooks(graph.inverted, 1.0)
    found = run_str(replace(graph, source=with_hooks(graph.source, hooks)))
    assert support.relative(found, run_str(graph)) > 1e-6


@every_model
def test_a_lora_that_ends_acts_until_then(graph):
    hooks = lora_hooks(graph.inverted, 1.0, falls_at=0.5)
    hooked = graph.with_prompts(lambda c: with_hooks(c, hooks))
    for percent, expected in ((0.1, graph.with_model(with_lora)), (0.7, graph)):
        torch.testing.assert_close(predicted(hooked, percent), predicted(expected, percent), **EXACT)


# --- guiders ------------------------------------------------------------


def alone(graph, conditioning, percent=PERCENT):
    """The prediction of one prompt, beside the regional one of the graph: at CFG 0 the negative's."""
    return predicted(replace(graph, negative=conditioning, guider=None), percent, guided_by(graph, conditioning, 0.0))


def guided_by(graph, negative, cfg):
    return support.guider_of(graph.model, graph.positive, negative, cfg)


def own(graph, percent=PERCENT):
    return predicted(graph, percent, guided_by(graph, graph.negative, 1.0))


def dual(graph):
    guider = Guider_DualCFG(graph.model)
    guider.set_conds(graph.positive, graph.family.conditioning(4), graph.negative)
    guider.set_cfg(3.0, 2.0)
    return guider


def dual_nested(graph):
    guider = dual(graph)
    guider.set_cfg(3.0, 2.0, nested=True)
    return guider


def perpendicular(graph):
    guider = Guider_PerpNeg(graph.model)
    guider.set_conds(graph.positive, graph.negative, graph.family.conditioning(4))
    guider.set_cfg(3.0, 1.5)
    return guider


def two_models(graph):
    """The negative prompt by a second loaded copy, which the host calls with the first one's options."""
    guider = Guider_DualModel(graph.model, second_copy(graph.family.name))
    guider.set_conds(graph.positive, graph.negative)
    guider.set_cfg(3.0)
    return guider


def middle_first(graph):
    """A guider that gives the host its prompts in an order of its own, and one by one."""

    class Guider(comfy.samplers.CFGGuider):
        def predict_noise(self, x, timestep, model_options=None, seed=None):
            ask = lambda *names: comfy.samplers.calc_cond_batch(  # noqa: E731
                self.inner_model, [self.conds[n] for n in names], x, timestep, model_options
            )
            middle, (negative, positive) = ask("middle")[0], ask("negative", "positive")
            return middle + 2.0 * (positive - negative)

    guider = Guider(graph.model)
    prompts = {"middle": graph.family.conditioning(4), "negative": graph.negative, "positive": graph.positive}
    guider.inner_set_conds(prompts)
    return guider


def by_dual(n, m, p):
    return n + 2.0 * (m - n) + 3.0 * (p - m)


def by_nested(n, m, p):
    return n + 2.0 * (m + 3.0 * (p - m) - n)


GUIDERS = {
    "DualCFGGuider": (dual, by_dual),
    "DualCFGGuider, nested": (dual_nested, by_nested),
    "PerpNegGuider": (perpendicular, lambda n, m, p: perp_neg(None, p, n, m, 1.5, 3.0)),
    "DualModelGuider": (two_models, lambda n, m, p: n + 3.0 * (p - n)),
    "a guider that orders prompts otherwise": (middle_first, lambda n, m, p: m + 2.0 * (p - n)),
}


@pytest.mark.parametrize("neighbour", GUIDERS)
@every_model
def test_guiders_modulate_the_regional_prompt_and_no_other(graph, neighbour):
    """Against their own formulas, of predictions of each prompt by the host's plain guider."""
    guider, formula = GUIDERS[neighbour]
    n, m, p = alone(graph, graph.negative), alone(graph, graph.family.conditioning(4)), own(graph)
    found = predicted(replace(graph, guider=guider))
    torch.testing.assert_close(found, formula(n, m, p), rtol=1e-3, atol=1e-4)
    plain = replace(graph, model=graph.inverted)
    assert support.relative(predicted(replace(plain, guider=guider)), found) > 1e-4


@pytest.mark.parametrize("neighbour", GUIDERS)
@every_model
def test_matching_is_that_of_the_plain_guider(graph, neighbour):
    torch.testing.assert_close(run_str(replace(graph, guider=GUIDERS[neighbour][0])), run_str(graph), **EXACT)


@families_named("Wan")
def test_a_second_model_of_another_kind_is_left_alone(graph):
    """Of a guider that calls two models with the options of the first."""
    other = by_hand(KNOWN.WAN21_Vace, DITS["wan"] | {"model_type": "vace", "vace_layers": 1, "vace_in_dim": 96})({})
    for model in (graph.model, graph.inverted):
        guider = Guider_DualModel(model, other)
        guider.set_conds(graph.positive, graph.negative)
        guider.set_cfg(0.0)
        found = predicted(graph, guider=guider)
        expected = predicted(graph, guider=support.guider_of(other, graph.negative))
        torch.testing.assert_close(found, expected, **EXACT)


@every_model
def test_the_negative_prompt_shares_the_regions_in_self_attention_only(graph):
    """Dense: its prediction is that of a patch without cross_strength on the same prompt with the same regions."""
    if "joint" in {layer.kind for layer in attention_layers(graph.inverted).values()}:
        expected = predicted(
            replace(graph, model=graph.inverted), guider=support.guider_of(graph.inverted, graph.negative)
        )
    else:
        bare = replace(layout_of(graph.family), positions=((), ()))
        model = patch_regions(graph.inverted, RegionModulation(self_strength=2.0, cross_strength=0.0, end=1.0))
        expected = predicted(graph, guider=support.guider_of(model, with_layout(graph.negative, bare)))
    torch.testing.assert_close(alone(graph, graph.negative), expected, **EXACT)


# --- conditionings ------------------------------------------------------


@every_model
def test_combined_with_a_plain_prompt(graph):
    """The mean of both predictions, the plain one's without words of regions."""
    other = graph.family.conditioning(4)
    positive = nodes.ConditioningCombine().combine(graph.positive, other)[0]
    found = predicted(graph, guider=support.guider_of(graph.model, positive))
    torch.testing.assert_close(found, (own(graph) + alone(graph, other)) / 2, **EXACT)


@every_model
def test_two_regional_prompts_each_by_its_own_regions(graph):
    other = regional(graph.family.conditioning(4), graph.family, flip=True)
    positive = nodes.ConditioningCombine().combine(graph.positive, other)[0]
    parts = [predicted(graph, guider=support.guider_of(graph.model, p)) for p in (graph.positive, other)]
    found = predicted(graph, guider=support.guider_of(graph.model, positive, graph.negative, 2.0))
    plain = predicted(graph, guider=support.guider_of(graph.inverted, graph.negative))
    mean = sum(parts) / 2
    torch.testing.assert_close(found, plain + 2.0 * (mean - plain), rtol=1e-3, atol=1e-4)
    assert any("2 regional prompts" in text for text in graph.said)


@pytest.mark.parametrize("behind", [True, False], ids=["behind", "in front"])
@every_model
def test_concatenated_prompts_bind_their_own_words_only(graph, behind):
    other = graph.family.conditioning(4)
    if behind:
        joined, offset = nodes.ConditioningConcat().concat(graph.positive, other)[0], 0
    else:  # a pack that keeps the regional prompt's dict
        joined = [[torch.cat([other[0][0], graph.positive[0][0]], 1), graph.positive[0][1]]]
        offset = graph.family.words
    length = joined[0][0].shape[1]
    by_hand = layout_of(graph.family)
    places = tuple(tuple(offset + place for place in own) for own in by_hand.positions)
    plain = [[joined[0][0], {k: v for k, v in joined[0][1].items() if k != LAYOUT}]]
    expected = with_layout(plain, replace(by_hand, positions=places, length=length))
    guiders = (support.guider_of(graph.model, p, graph.negative, 2.0) for p in (joined, expected))
    found, wanted = (predicted(graph, guider=guider) for guider in guiders)
    torch.testing.assert_close(found, wanted, **EXACT)
    unbound = predicted(graph, guider=support.guider_of(graph.model, plain, graph.negative, 2.0))
    assert support.relative(unbound, wanted) > 1e-4


@every_model
def test_a_regional_prompt_that_was_zeroed_out_is_a_plain_one(graph):
    zeroed = nodes.ConditioningZeroOut().zero_out(graph.positive)[0]
    plain = [[zeroed[0][0], {}]]
    torch.testing.assert_close(alone(graph, zeroed), alone(graph, plain), rtol=0, atol=0)


CHANGES = {
    "Conditioning (Average)": lambda c, other: nodes.ConditioningAverage().addWeighted(c, other, 0.5)[0],
    "an embedding from elsewhere": lambda c, other: [[other[0][0], c[0][1]]],
}


@pytest.mark.parametrize("method", ["regions", "STR", "DDS", "preview"])
@pytest.mark.parametrize("change", CHANGES)
@every_model
def test_a_regional_prompt_that_was_changed_is_refused(graph, change, method):
    positive = CHANGES[change](graph.positive, graph.family.conditioning(4))
    with pytest.raises(
        ValueError, match="positive: the regional prompt 'a red ball.* was changed after Encode Regional"
    ):
        METHODS[method](replace(graph, positive=positive))


@pytest.mark.parametrize("kind", ["area", "mask bounds"])
@families_named("UNet3D", "SD 1.5")
def test_regions_in_an_area_are_those_of_the_area(graph, kind):
    """The right half of the picture has the masks of the right half; the host's copies for the negative prompt, which
    carry our layout and the same uuid, have none of its words."""
    h, w = graph.family.shape[-2:]
    if kind == "area":
        there = nodes.ConditioningSetArea().append(graph.positive, 4 * w, 8 * h, 4 * w, 0, 1.0)[0]
    else:
        mask = torch.zeros(1, 8 * h, 8 * w)
        mask[..., 4 * w :] = 1
        there = nodes.ConditioningSetMask().append(graph.positive, mask, "mask bounds", 1.0)[0]
    made = layout_of(graph.family)
    cut = tuple(replace(r, mask=r.mask[..., r.mask.shape[-1] // 2 :]) for r in made.regions)
    positive = with_layout(graph.family.conditioning(1), replace(made, regions=cut))
    part = graph.family.clip()[..., w // 2 :]
    found = predicted(graph, guider=support.guider_of(graph.model, there))
    expected = predicted(graph, guider=support.guider_of(graph.model, positive), x=part)
    torch.testing.assert_close(found[..., w // 2 :], expected, **EXACT)
    words = patch_regions(graph.inverted, RegionModulation(self_strength=0.0, cross_strength=2.0, end=1.0))
    of_negative = (
        predicted(graph, guider=support.guider_of(model, there, graph.negative, 0.0))
        for model in (words, graph.inverted)
    )
    torch.testing.assert_close(*of_negative, rtol=0, atol=1e-5)


@every_model
def test_a_mask_on_the_conditioning(graph):
    """Where the mask is 1 the regional prompt's own prediction, elsewhere the plain one's."""
    mask = torch.zeros(1, 8, 8)
    mask[..., :4] = 1
    left = nodes.ConditioningSetMask().append(graph.positive, mask, "default", 1.0)[0]
    right = nodes.ConditioningSetMask().append(graph.family.conditioning(4), 1 - mask, "default", 1.0)[0]
    found = predicted(graph, guider=support.guider_of(graph.model, left + right))
    width = graph.family.shape[-1] // 2
    torch.testing.assert_close(found[..., :width], own(graph)[..., :width], **EXACT)
    torch.testing.assert_close(found[..., width:], alone(graph, graph.family.conditioning(4))[..., width:], **EXACT)


def early_only(conditioning):
    return nodes.ConditioningSetTimestepRange().set_range(conditioning, 0.0, 0.3)[0]


@pytest.mark.parametrize("method", ["STR", "DDS"])
@every_model
def test_a_prompt_for_a_part_of_the_denoising_is_refused(graph, method):
    with pytest.raises(ValueError, match="positive: no conditioning covers the whole frame at sigma"):
        METHODS[method](replace(graph, positive=early_only(graph.positive)))


# --- who else is in the model -------------------------------------------


@families_named("UNet3D", "Wan")
def test_a_prompt_of_another_pack_is_left_as_it_is(graph):
    own_prompts_only(graph)


def masking_keys(model, boolean):
    """A node that hides the last word from cross-attention, by a mask of one kind or the other."""
    masked = model.clone()
    for path, layer in attention_layers(model).items():
        if layer.kind != "cross":
            continue

        def forward(self, x, context, transformer_options=None, **_):
            seen = torch.ones(1, context.shape[1], dtype=torch.bool)
            seen[:, -1] = False
            mask = seen if boolean else torch.zeros(seen.shape).masked_fill(~seen, -1e9)
            query, key, value = self.norm_q(self.q(x)), self.norm_k(self.k(context)), self.v(context)
            mask = mask.expand(x.shape[1], -1)
            options = {"heads": self.num_heads, "mask": mask, "transformer_options": transformer_options}
            return self.o(optimized_attention(query, key, value, **options))

        module = model.model.diffusion_model.get_submodule(path)
        masked.add_object_patch(f"diffusion_model.{path}.forward", types.MethodType(forward, module))
    return masked


@families_named("Wan")
def test_boolean_masks_hide_what_additive_ones_hide(graph):
    boolean, additive = (
        predicted(replace(graph, model=patch_regions(masking_keys(graph.inverted, kind), RegionModulation(**STRONG))))
        for kind in (True, False)
    )
    torch.testing.assert_close(boolean, additive, **EXACT)
    assert support.relative(predicted(graph), additive) > 1e-4


@families_named("Wan")
def test_rows_that_another_pack_adds_to_the_batch_are_refused(graph):
    """As NAG does where it runs its prompt beside the others."""
    wide = graph.inverted.clone()
    for path, layer in attention_layers(graph.inverted).items():
        if layer.kind == "cross":
            module = graph.inverted.model.diffusion_model.get_submodule(path)

            def forward(self, x, context, *args, own=module.forward, **kwargs):
                more = torch.cat([context, context[:1]])
                return own(torch.cat([x, x[:1]]), more, *args, **kwargs)[: x.shape[0]]

            wide.add_object_patch(f"diffusion_model.{path}.forward", types.MethodType(forward, module))
    patched = patch_regions(wide, RegionModulation(**STRONG))
    with pytest.raises(
        ValueError, match="model: blocks.0.cross_attn attends in 3 batch rows, expected 2 for 2 prompts"
    ):
        predicted(replace(graph, model=patched))


@families_named("SD 1.5")
def test_replaced_attention_is_said_on_the_node(graph):
    """IPAdapter's kind, in every block: regions cannot act there, and the node says so."""
    replaced = graph.model
    for block in ("input", "middle", "output"):
        for number in range(12):
            replaced.set_model_attn2_replace(lambda q, k, v, extra: q, block, number)
    predicted(graph)
    assert len(graph.said) == 1
    assert "Regions act in part: another node replaces the cross attention of 7 of 14 layers" in graph.said[0]


@families_named("Wan")
def test_a_swapped_attention_function_is_said_or_refused(graph, monkeypatch):
    """A pack that has put its own function in the place of the host's, in every module."""
    import comfy.ldm.wan.model as wan
    from comfy.ldm.modules.attention import attention_pytorch

    def other(*args, transformer_options=None, **kwargs):
        return attention_pytorch(*args, **{k: v for k, v in kwargs.items() if k != "_inside_attn_wrapper"})

    trajectory_of("Wan")
    monkeypatch.setattr(wan, "optimized_attention", other)
    predicted(graph)
    assert len(graph.said) == 1 and "Regions do nothing: another node replaces" in graph.said[0]
    for method in ("STR", "DDS", "preview"):
        with pytest.raises(ValueError, match="model: its attention does not reach this node"):
            METHODS[method](graph)


@families_named("Wan")
def test_a_cache_that_answers_in_the_networks_place_is_refused(graph):
    """TeaCache's kind: it replaces the network's forward and skips the blocks."""
    cut = graph.model.clone()
    cut.set_model_unet_function_wrapper(lambda apply, args: args["input"])
    for method in ("STR", "DDS"):
        with pytest.raises(ValueError, match="model: its network did not run.*TeaCache"):
            METHODS[method](replace(graph, model=cut, inverted=cut))


@families_named("SD 1.5")
def test_merged_tokens_are_refused(graph):
    """ToMe's kind, also where as many are left as a coarser layer has."""
    merged = graph.model.clone()

    def merge(n, context, value, extra):
        return n[:, ::4], n[:, ::4], n[:, ::4]

    def unmerge(n, extra):
        return n.repeat_interleave(4, 1)

    merged.set_model_attn1_patch(merge)
    merged.set_model_attn1_output_patch(unmerge)
    with pytest.raises(
        ValueError, match="model: attention with 16 tokens does not fit .* remove a node that merges tokens"
    ):
        predicted(replace(graph, model=merged))


@every_model
def test_a_patch_without_a_regional_prompt_says_so(graph):
    out = predicted(replace(graph, positive=graph.family.conditioning(1)))
    plain = predicted(replace(graph, positive=graph.family.conditioning(1), model=graph.inverted))
    assert torch.equal(out, plain)
    assert len(graph.said) == 1 and "No regional prompt reaches this model" in graph.said[0]


@every_model
def test_a_regional_prompt_without_the_patch_says_so(graph, caplog):
    for method in ("STR", "DDS"):
        caplog.clear()
        METHODS[method](replace(graph, model=graph.inverted))
        assert "The regions of this prompt do nothing" in caplog.text


# --- guidance functions in DDS ------------------------------------------


@every_model
def test_pre_cfg_functions_guide_dds(graph):
    """APG's kind: what it makes of both predictions is what guidance gets."""
    turned, seen = graph.model.clone(), []

    def pre_cfg(args):
        seen.append(len(args["conds_out"]))
        positive, negative = args["conds_out"]
        return [negative + 0.5 * (positive - negative), negative]

    turned.model_options["sampler_pre_cfg_function"] = [pre_cfg]
    with_it = run_dds(replace(graph, model=turned))
    assert set(seen) == {2} and support.relative(with_it, run_dds(graph)) > 1e-5


@every_model
def test_a_function_in_the_place_of_the_hosts_is_called_by_dds(graph):
    own_function, seen = graph.model.clone(), []

    def instead(args):
        seen.append([None if c is None else len(c) for c in args["conds"]])
        given = args["model"], args["conds"], args["input"], args["sigma"], args["model_options"]
        return comfy.samplers.calc_cond_batch(*given)

    own_function.set_model_sampler_calc_cond_batch_function(instead)
    torch.testing.assert_close(run_dds(replace(graph, model=own_function)), run_dds(graph), **EXACT)
    assert seen and all(counts == [1, 1] for counts in seen)


# --- windows ------------------------------------------------------------

FRAMES_OF_LONG = 8


def windowed(model, family, schedule="standard_static", fuse="pyramid", **options):
    handler = comfy.context_windows.IndexListContextHandler(
        comfy.context_windows.get_matching_context_schedule(schedule),
        comfy.context_windows.get_matching_fuse_method(fuse),
        **{"context_length": 4, "context_overlap": 2, "dim": 2 if family.patched else 0} | options,
    )
    long = model.clone()
    long.model_options["context_handler"] = handler
    return long


def long_clip(family, seed=0):
    shape = list(family.shape)
    shape[2 if family.patched else 0] = FRAMES_OF_LONG
    return 0.5 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def long_layout(family):
    made = layout_of(family)
    height, width = made.regions[0].mask.shape[1:]
    masks = torch.zeros(FRAMES_OF_LONG, height, width)
    for f in range(FRAMES_OF_LONG):
        masks[f, :, : width // 4 + 2 * f] = 1
    regions = (replace(made.regions[0], mask=masks), replace(made.regions[1], mask=1 - masks))
    return replace(made, regions=regions)


def frames_of(tensor, frames, family):
    return tensor.index_select(2 if family.patched else 0, torch.tensor(frames))


WINDOWS = {
    "static": {},
    "uniform": {"schedule": "standard_uniform"},
    "looped": {"schedule": "looped_uniform", "closed_loop": True},
    "batched": {"schedule": "batched"},
    "flat": {"fuse": "flat"},
    "relative": {"fuse": "relative"},
    "overlap-linear": {"fuse": "overlap-linear"},
    "without anchor": {"causal_window_fix": False},
    "a retained frame": {"latent_retain_index_list": "0"},
}


def shown_windows(graph, options, step=0):
    """[(frames that a window shows, of which the first may be its anchor; frames it is for; weights)]."""
    handler = windowed(graph.inverted, graph.family, **options).model_options["context_handler"]
    handler._step = step
    x = long_clip(graph.family)
    found = []
    for window in handler.get_context_windows(None, x, {}):
        own = list(window.index_list)
        anchor = [own[0] - 1] if handler.causal_window_fix and own[0] > 0 else []
        if handler.fuse_method.name == "relative":
            middle, reach = (own[0] + own[-1]) / 2, (own[-1] - own[0] + 1e-2) / 2
            weights = [max(1e-2, 1 - abs(i - middle) / reach) for i in own]
        else:
            given = len(own), FRAMES_OF_LONG, own, handler
            weights = comfy.context_windows.get_context_weights(*given, sigma=None, context_overlap=2)
        frames = anchor + own
        for place in handler.latent_retain_index_list:
            frames[place] = place
        found.append((frames, own, torch.as_tensor(weights, dtype=torch.float32), len(anchor)))
    return found


def blended(graph, parts, like):
    """Weighted means over windows: parts of (own frames, weights, latent of those frames)."""
    dim = 2 if graph.family.patched else 0
    shape = [-1 if i == dim else 1 for i in range(like.ndim)]
    total, count = torch.zeros_like(like), torch.zeros(FRAMES_OF_LONG)
    for own, weights, latent in parts:
        total.index_add_(dim, torch.tensor(own), latent * weights.view(shape))
        count.index_add_(0, torch.tensor(own), weights)
    return total / count.view(shape)


@pytest.mark.parametrize("options", WINDOWS.values(), ids=WINDOWS)
@every_model
def test_regions_follow_the_frames_of_each_window(graph, options):
    """Against predictions of the windows' frames as clips of their own with the masks of those frames, blended by the
    host's weights."""
    family, layout = graph.family, long_layout(graph.family)
    if family.name == "CogVideoX 1.0" and "looped" in options.get("schedule", ""):
        options = options | {"closed_loop": False}
    x, positive = long_clip(family), with_layout(family.conditioning(1), layout)
    model = windowed(graph.model, family, **options)
    found = predicted(graph, guider=support.guider_of(model, positive, graph.negative, 2.0), x=x)
    parts = []
    share = layout_share(layout)
    for frames, own, weights, anchor in shown_windows(graph, options):
        cut = tuple(replace(r, mask=r.mask[frames]) for r in layout.regions)
        prompt = with_layout(family.conditioning(1), replace(layout, regions=cut))
        with same_share(graph.model, share):
            whole = predicted(
                graph,
                guider=support.guider_of(graph.model, prompt, graph.negative, 2.0),
                x=frames_of(x, frames, family),
            )
        parts.append((own, weights, frames_of(whole, list(range(anchor, len(frames))), family)))
    torch.testing.assert_close(found, blended(graph, parts, x), rtol=2e-3, atol=2e-4)


def layout_share(layout):
    """Share of the whole clip that each region covers."""
    return [float(region.mask.mean()) for region in layout.regions]


class same_share:
    """Within, regions of a cut clip have the share of the whole clip: the size term is the clip's, not the window's."""

    def __init__(self, model, share):
        self._share = torch.tensor([*share, 0.0])

    def __enter__(self):
        self._before = regional_prompts.size_term

        def size_term(tokens, over="clip", *, covered_twice=False):
            if over != "clip":
                return self._before(tokens, over, covered_twice=covered_twice)
            return (1 - (tokens * self._share).sum(-1)).clamp(0, 1)

        regional_prompts.size_term = size_term

    def __exit__(self, *_):
        regional_prompts.size_term = self._before


def moved_at_first(graph, model, trajectory, x):
    """What matching makes of a latent at the first sigma, less that latent, in units of its step."""
    seen = []

    def give(_, step):
        return x

    def keep(y, step):
        seen.append(y - x)
        return x

    matching = RelevanceMatching(str_score_of(trajectory), 0.1)
    sampler = TrajectorySampler(trajectory, before_step=[give, matching, keep])
    guider, empty = support.guider_of(model, graph.family.conditioning(1)), torch.zeros(trajectory.shape)
    out = guider.sample(empty, empty, sampler, trajectory.sigmas, disable_pbar=True, seed=0)
    return seen[0], sampler.records_of(out)[0].cosines[0]


@pytest.mark.parametrize("options", WINDOWS.values(), ids=WINDOWS)
@every_model
def test_matching_in_windows_blends_what_each_window_says(graph, options):
    """Against matching of the windows' frames as clips of their own, anchors and retained frames included, blended by
    the host's weights; a retained frame has no gradient of the place that it takes."""
    family, model = graph.family, graph.inverted
    x = long_clip(family, 3)
    plain = invert(model, graph.source, long_clip(family), sigmas_of(graph, 2), refinements=0)
    long = windowed(model, family, **options)
    found, cosine = moved_at_first(graph, long, replace(plain, model=long), x)
    parts, cosines, dim = [], [], 3 if family.patched else 1
    retained = windowed(model, family, **options).model_options["context_handler"].latent_retain_index_list
    for frames, own, weights, anchor in shown_windows(graph, options):
        cut = replace(plain, latents=plain.latents.index_select(dim, torch.tensor(frames)))
        moved, each = moved_at_first(graph, model, cut, frames_of(x, frames, family))
        moved = frames_of(moved, list(range(len(frames))), family)
        whole = moved.square().sum()  # moves lie along the gradient
        for place in [*retained, *range(anchor)]:
            moved.index_fill_(dim - 1, torch.tensor([place]), 0.0)
        moved *= whole / moved.square().sum()  # the rest goes as far towards the match
        parts.append((own, weights, frames_of(moved, list(range(anchor, len(frames))), family)))
        cosines.append(each)
    assert cosine == pytest.approx(sum(cosines) / len(cosines), abs=1e-5)
    expected = blended(graph, parts, x)
    near = min(1.0, min(1 - c for c in cosines) / 1e-3)
    assert near == 1.0 and support.relative(found, expected) <= 1e-3


@every_model
def test_dds_in_windows_moves_on_with_the_steps(graph, monkeypatch):
    """Uniform windows are other ones at every step: which are asked for, and that all frames are optimised."""
    model, asked = windowed(graph.model, graph.family, schedule="standard_uniform"), []
    handler = model.model_options["context_handler"]
    inner = handler.context_schedule.func
    watch = lambda frames, own, options: asked.append(own._step) or inner(frames, own, options)  # noqa: E731
    handler.context_schedule = replace(handler.context_schedule, func=watch)
    settings = Distillation(steps=3, cfg=3.0, weights={SPATIAL: 0.5}, blocks=key_blocks(model))
    prompts = graph.source, with_layout(graph.family.conditioning(1), long_layout(graph.family)), graph.negative
    clip = long_clip(graph.family)
    moved = optimise(model, *prompts, clip, settings, seed=0)[0]
    assert asked == [0, 1, 2]
    change = (moved - clip).abs().movedim(2 if graph.family.patched else 0, 0).flatten(1).amax(1)
    assert moved.isfinite().all() and (change > 0).all()


def foreign_windows(model, family):
    """Another pack's windows: a wrapper that calls the model once a window (AnimateDiff-Evolved's context options)."""
    long, dim = model.clone(), 2 if family.patched else 0

    def sliding(executor, base, conds, x, timestep, options):
        out, count = [torch.zeros_like(x) for _ in conds], torch.zeros(FRAMES_OF_LONG)
        for own in ([0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6, 7]):
            inner = options["transformer_options"] | {"ad_params": {"sub_idxs": own, "full_length": FRAMES_OF_LONG}}
            at = torch.tensor(own)
            sigmas = timestep if dim else timestep[: len(own)]
            made = executor(base, conds, x.index_select(dim, at), sigmas, options | {"transformer_options": inner})
            for total, part in zip(out, made, strict=True):
                total.index_add_(dim, at, part)
            count.index_add_(0, at, torch.ones(4))
        shape = [-1 if i == dim else 1 for i in range(x.ndim)]
        return [total / count.view(shape) for total in out]

    long.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, "ADE", sliding)
    return long


@families_named("UNet3D", "Wan")
def test_windows_of_another_pack(graph):
    """Regions follow its frames; matching, DDS and previews, which would see one window only, are refused at their
    first call by the name of its wrapper."""
    family, layout = graph.family, long_layout(graph.family)
    x, positive = long_clip(family), with_layout(family.conditioning(1), layout)
    found = predicted(
        graph, guider=support.guider_of(foreign_windows(graph.model, family), positive, graph.negative, 2.0), x=x
    )
    parts = []
    for own in ([0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6, 7]):
        cut = tuple(replace(r, mask=r.mask[own]) for r in layout.regions)
        prompt = with_layout(family.conditioning(1), replace(layout, regions=cut))
        with same_share(graph.model, layout_share(layout)):
            guider = support.guider_of(graph.model, prompt, graph.negative, 2.0)
            parts.append((own, torch.ones(4), predicted(graph, guider=guider, x=frames_of(x, own, family))))
    torch.testing.assert_close(found, blended(graph, parts, x), rtol=2e-3, atol=2e-4)
    model = foreign_windows(graph.inverted, family)
    trajectory = invert(model, graph.source, long_clip(family), sigmas_of(graph, 2), refinements=0)
    refused = r"model: another pack \(ADE\) calls it several times for one prediction, or on a part of the clip"
    with pytest.raises(ValueError, match=refused):
        moved_at_first(graph, model, trajectory, x)
    settings = Distillation(steps=1, weights={SPATIAL: 0.5}, blocks=key_blocks(model))
    with pytest.raises(ValueError, match=refused):
        optimise(model, graph.source, graph.positive, graph.negative, long_clip(family), settings, seed=0)
    with pytest.raises(ValueError, match=refused):
        relevance_of(torch.ones(4, 4), 0, trajectory, percent=0.5)


@families_named("UNet3D")
def test_context_options_of_animatediff_are_refused_before_the_first_call(graph):
    """That pack keeps them with the model; its own wrapper would fail in our passes."""
    model, calls = graph.inverted.clone(), []
    model.set_attachments("ADE_params", types.SimpleNamespace(context_options=types.SimpleNamespace(context_length=4)))
    plain = invert(graph.inverted, graph.source, long_clip(graph.family), sigmas_of(graph, 2), refinements=0)
    counted = support.CallCounter(model, calls.append).model
    trajectory, refused = replace(plain, model=counted), "context options run it on 4 of the 8 frames at a time"
    settings = Distillation(steps=1, weights={SPATIAL: 0.5}, blocks=key_blocks(model))
    with pytest.raises(ValueError, match=refused):
        moved_at_first(graph, counted, trajectory, long_clip(graph.family))
    with pytest.raises(ValueError, match=refused):
        optimise(counted, graph.source, graph.positive, graph.negative, long_clip(graph.family), settings, seed=0)
    with pytest.raises(ValueError, match=refused):
        relevance_of(torch.ones(4, 4), 0, trajectory, percent=0.5)
    assert calls == []
    short = replace(plain, latents=plain.latents[:, :4], model=counted)
    moved_at_first(graph, counted, short, long_clip(graph.family)[:4])  # fits into one window


@families_named("UNet3D", "Wan")
def test_split_prompts_go_to_their_windows(graph):
    """Two prompts for the two halves of a clip, as the host splits them: each window is matched by its own."""
    family, model = graph.family, graph.inverted
    plain = invert(model, graph.source, long_clip(family), sigmas_of(graph, 2), refinements=0)
    options = {"split_conds_to_windows": True, "context_overlap": 0, "causal_window_fix": False}
    long, x = windowed(model, family, **options), long_clip(family, 3)
    prompts = family.conditioning(1), family.conditioning(4)
    trajectory = replace(plain, model=long)

    def moved(model, trajectory, positive, x):
        seen = []
        matching = RelevanceMatching(str_score_of(trajectory), 0.1)
        steps = [lambda _, step: x, matching, lambda y, step: (seen.append(y - x), x)[1]]
        sampler, empty = TrajectorySampler(trajectory, before_step=steps), torch.zeros(trajectory.shape)
        guider = support.guider_of(model, positive)
        guider.sample(empty, empty, sampler, trajectory.sigmas, disable_pbar=True, seed=0)
        return seen[0]

    found, dim = moved(long, trajectory, prompts[0] + prompts[1], x), 3 if family.patched else 1
    for own, prompt in (([0, 1, 2, 3], prompts[0]), ([4, 5, 6, 7], prompts[1])):
        cut = replace(plain, latents=plain.latents.index_select(dim, torch.tensor(own)))
        expected = moved(model, cut, prompt, frames_of(x, own, family))
        assert support.relative(frames_of(found, own, family), expected) <= 1e-3


@families_named("Wan")
def test_tables_of_regions_are_made_once_a_grid(graph, monkeypatch):
    """Whatever the number of windows and steps; and they are gone with the run."""
    made, keep = [], regional_prompts.partition
    monkeypatch.setattr(regional_prompts, "partition", lambda masks: made.append(len(masks)) or keep(masks))
    model = windowed(graph.model, graph.family, schedule="standard_uniform")
    trajectory = invert(model, graph.source, long_clip(graph.family), sigmas_of(graph), refinements=0)
    positive, empty = (
        with_layout(graph.family.conditioning(1), long_layout(graph.family)),
        torch.zeros(trajectory.shape),
    )
    made.clear()
    guider = support.guider_of(model, positive, graph.negative, 2.0)
    guider.sample(empty, empty, TrajectorySampler(trajectory), trajectory.sigmas, disable_pbar=True, seed=0)
    grids = {(4, 4)}
    assert len(made) <= 1 + len(grids)  # once to look for regions that cover nothing


# --- mechanisms switched off --------------------------------------------


def off_by_number(monkeypatch):
    """Rows are told apart by the host's number of a prompt, as before."""

    def of_chunk(self, run, chunk):
        layout = self.layouts[0] if run.prompts[chunk] == 0 else None
        return (None if layout is None else regional_prompts.Placed(layout, layout.length, 0)), None

    monkeypatch.setattr(regional_prompts.RegionalPrompts, "of_chunk", of_chunk)


def off_caches(monkeypatch):
    """Step caches stay in our own passes."""
    monkeypatch.setattr(step_caches, "_is_cache", lambda name: False)


def off_marks(monkeypatch):
    """Source passes are not marked."""
    plain = model_pass.for_pass
    monkeypatch.setattr("spacetime_edit.host.distillation.for_pass", lambda options, source: plain(options, False))
    monkeypatch.setattr(model_pass, "for_pass", lambda options, source: plain(options, False))


def off_prompts(monkeypatch):
    """Every call of cross-attention is taken for the prompt's."""
    monkeypatch.setattr("spacetime_edit.host.attention_tap._Entered.is_prompts", lambda self, key: True)


def source_passes_are_plain(graph):
    """DDS with the patch and the prompts of the source for both: with regions in the source's passes as well the two
    cancel, without they do not."""
    same = replace(graph, source=graph.positive)
    assert support.relative(run_dds(same), clip_of(graph)) > 1e-4


def own_prompts_only(graph):
    """With NAG: what the first layer gives for its prompt is as without regions, what it gives for the own one not."""
    only_cross = RegionModulation(self_strength=0.0, cross_strength=2.0, end=1.0)

    def first_outputs(patch):
        seen = []
        model = patch(asking_twice(0.5, seen)(graph.inverted))
        predicted(graph, guider=support.guider_of(model, graph.positive))
        return seen[:2]

    plain, modulated = first_outputs(lambda model: model), first_outputs(lambda model: patch_regions(model, only_cross))
    torch.testing.assert_close(modulated[1], plain[1], rtol=0, atol=0)
    assert support.relative(modulated[0], plain[0]) > 1e-4


@families_named("UNet3D")
def test_source_passes_are_plain(graph):
    source_passes_are_plain(graph)


def a_dual_guider(graph):
    test_guiders_modulate_the_regional_prompt_and_no_other(graph, "DualCFGGuider")


def an_inversion_with_a_cache(graph):
    test_our_own_passes_leave_step_caches_out(graph, "EasyCache", "inversion")


SWITCHED_OFF = {
    "rows by uuid": (off_by_number, a_dual_guider),
    "caches left out": (off_caches, an_inversion_with_a_cache),
    "source passes marked": (off_marks, source_passes_are_plain),
    "whose key it is": (off_prompts, own_prompts_only),
}


@pytest.mark.parametrize("mechanism", SWITCHED_OFF)
@families_named("UNet3D")
def test_a_check_fails_without_its_mechanism(graph, mechanism, monkeypatch):
    switch, check = SWITCHED_OFF[mechanism]
    switch(monkeypatch)
    with pytest.raises((AssertionError, ValueError, KeyError, TypeError, RuntimeError)):
        check(graph)
