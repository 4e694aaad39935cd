"""Predict Cost: what it reads from a graph, its memory against whole edits, and what it says of cards."""

from dataclasses import replace
from types import SimpleNamespace

import comfy.sampler_helpers
import comfy.samplers
import pytest
import torch
from spacetime_edit.core.live_memory import PeakMemory
from spacetime_edit.host import cost as cost_module
from spacetime_edit.host.cost import Cost, fits_on, predict_costs, weight_bytes
from spacetime_edit.host.distillation import SPATIAL, TEMPORAL, Distillation, optimise
from spacetime_edit.host.features import key_blocks
from spacetime_edit.host.inversion import invert
from spacetime_edit.host.memory import GradientMemory
from spacetime_edit.host.planned_edits import Plan, digest, edits_in
from spacetime_edit.host.relevance_matching import RelevanceMatching, str_score_of
from spacetime_edit.host.sampling import TrajectorySampler
from spacetime_edit.tests.host import support
from spacetime_edit.tests.host.tiny_families import BY_NAME, FAST
from spacetime_edit.tools.templates import api_path, read, templates

BY_STEM = {template.stem: template for template in templates()}


# --- the graph ----------------------------------------------------------


def with_prediction(graph):
    """A template's graph with a Predict Cost on the latent of its first edit, unless it has one."""
    own = next((key for key, node in graph.items() if node["class_type"] == "STE_PredictCost"), None)
    if own is not None:
        return graph, own
    first = next(n for n in graph.values() if n["class_type"] in ("STE_InvertVideo", "STE_VideoDDSOptimize"))
    return graph | {"cost": {"class_type": "STE_PredictCost", "inputs": {"latent": first["inputs"]["latent"]}}}, "cost"


def plans_of(stem):
    return edits_in(*with_prediction(read(api_path(BY_STEM[stem]))))


def test_edits_of_templates_are_read_as_they_are():
    (wan,) = plans_of("Swap an object - STR-Match (Wan)")
    assert wan == Plan(steps=50, prompts=2, iterations=wan.iterations, end=wan.end, inversion=wan.inversion)
    assert wan.matching and wan.inversion
    (hunyuan,) = plans_of("Swap an object - STR-Match (HunyuanVideo)")
    assert hunyuan.prompts == 1  # cfg 1
    swap, match = plans_of("Compare edits - prompt swap and STR-Match (tiny)")
    assert (swap.method, match.method) == ("prompt swap", "STR-Match") and swap.steps == match.steps == 20
    (dream,) = plans_of("Restyle a clip - DreamMotion (Zeroscope)")
    assert dream.method == "DreamMotion" and dict(dream.terms)["s_ssm"] > 0
    swept = plans_of("Compare lambdas - STR-Match (tiny)")
    assert [plan.strength for plan in swept] == [0, 0.25, 0.5, 1] and not swept[0].matching
    high, low = sorted(plans_of("Swap an object - STR-Match (Wan 2.2)"), key=lambda plan: plan.part)
    assert high.part == (0.0, low.part[0]) and low.part[1] == 1 and 0.4 < low.part[0] < 0.6
    assert high.inversion != low.inversion


def test_an_edit_that_runs_twice_counts_twice():
    """Two samplers of one setting, as for two prompts."""
    graph, own = with_prediction(read(api_path(BY_STEM["Swap an object - STR-Match (tiny)"])))
    again = {f"x{key}": node for key, node in graph.items() if node["class_type"] == "SamplerCustomAdvanced"}
    first, second = edits_in(graph | again, own)
    assert first == second


def test_terms_that_come_by_a_link_are_the_nodes_own():
    graph, own = with_prediction(read(api_path(BY_STEM["Restyle a clip - DreamMotion (Zeroscope)"])))
    dds = next(node for node in graph.values() if node["class_type"] == "STE_VideoDDSOptimize")
    dds["inputs"]["s_ssm"] = ["7", 0]
    assert dict(edits_in(graph, own)[0].terms)["s_ssm"] == 0.3


def test_a_part_of_the_denoising_costs_its_steps(tiny):
    latent, plan = torch.randn(4, 4, 16, 16), Plan("prompt swap", steps=10, scheduler="simple")
    plans = [replace(plan, part=part) for part in ((0.0, 1.0), (0.0, 0.5), (0.5, 1.0))]
    whole, high, low = predict_costs(tiny.model, support.encode(tiny), latent, plans)
    assert high.steps + low.steps == whole.steps == 10 and high.steps == 5


def test_an_edit_of_another_latent_is_not_its():
    graph, own = with_prediction(read(api_path(BY_STEM["Swap an object - STR-Match (tiny)"])))
    assert edits_in(graph, own)
    graph[own]["inputs"]["latent"] = ["another", 0]
    assert edits_in(graph, own) == [] and edits_in({}, "9") == []


def test_what_comes_by_a_link_is_not_known_yet():
    graph, own = with_prediction(read(api_path(BY_STEM["Swap an object - STR-Match (tiny)"])))
    inversion = next(node for node in graph.values() if node["class_type"] == "STE_InvertVideo")
    inversion["inputs"]["steps"] = ["7", 0]
    assert edits_in(graph, own)[0].steps == Plan().steps


def test_the_fingerprint_follows_the_edits_and_nothing_else():
    graph, _ = with_prediction(read(api_path(BY_STEM["Swap an object - STR-Match (tiny)"])))
    before = digest([graph])

    def changed(kind, **inputs):
        other = {k: n | {"inputs": n["inputs"] | (inputs if n["class_type"] == kind else {})} for k, n in graph.items()}
        return digest([other])

    assert changed("CLIPTextEncode", text="another") == before
    assert changed("STE_InvertVideo", steps=7) != before and changed("CFGGuider", cfg=1.0) != before
    assert changed("STE_STRLatentOptimizer", iterations=1) != before


# --- memory -------------------------------------------------------------


def whole_edit(model, family, plan):
    """The edit itself, of as many steps as the plan has."""
    clip, positive = 0.5 * family.clip(), family.conditioning()
    target, negative = family.conditioning(1), family.conditioning(2)
    if plan.method == "DreamMotion":
        weights = {SPATIAL: 0.3, TEMPORAL: 0.1}
        settings = Distillation(steps=plan.steps, weights=weights, blocks=key_blocks(model))
        optimise(model, positive, target, negative, clip, settings, seed=0)
        return
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), plan.scheduler, plan.steps)
    trajectory = invert(model, positive, clip, sigmas)
    matching = RelevanceMatching(str_score_of(trajectory), memory="low" if plan.low_memory else "auto")
    sampler = TrajectorySampler(trajectory, before_step=[matching] if plan.matching else [])
    empty = torch.zeros_like(clip)
    guider = support.guider_of(model, target, negative, 2.0)
    guider.sample(empty, empty, sampler, trajectory.sigmas, disable_pbar=True, seed=0)


PLANS = {
    "prompt swap": Plan("prompt swap"),
    "STR-Match": Plan(end=1.0),
    "STR-Match, memory low": Plan(end=1.0, low_memory=True),
    "DreamMotion": Plan("DreamMotion", terms=(("s_ssm", 0.3), ("t_ssm", 0.1))),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.every_family if name == "UNet3D" else ()) for name in FAST]
)
@pytest.mark.parametrize("kind", PLANS)
def test_memory_is_that_of_the_whole_edit(name, kind):
    """Within a quarter, of what lives at the peak beyond what was there before."""
    family = BY_NAME[name]
    larger = replace(family, shape=(*family.shape[:-2], 2 * family.shape[-2], 2 * family.shape[-1]))
    model, plan = family.model(), replace(PLANS[kind], steps=4, scheduler="simple")
    whole_edit(model, larger, replace(plan, steps=3))  # what the host keeps after its first run is kept once
    with PeakMemory() as measured:
        whole_edit(model, larger, plan)
    (cost,) = predict_costs(model, larger.conditioning(), 0.5 * larger.clip(), [plan])
    predicted = max(cost.sampling, cost.gradient) + cost.trajectory  # on the CPU both are main memory
    assert 0.75 <= predicted / measured.peak <= 1.25
    assert cost.memory >= cost.held >= cost.weights > 0


def test_weights_count_in_their_own_form():
    """Of quantised and packed ones the bytes that are there, not those of the numbers that they stand for."""
    quantised = torch.nn.Parameter(torch.zeros(4, 4), requires_grad=False)
    quantised._qdata = torch.zeros(4, 4, dtype=torch.int8)
    state = {"a": torch.zeros(10, 7, dtype=torch.uint8), "b": quantised, "c": torch.zeros(3, dtype=torch.float16)}
    assert weight_bytes(SimpleNamespace(model=SimpleNamespace(state_dict=lambda: state))) == 70 + 16 + 6


def test_controlnets_count(tiny, monkeypatch):
    """The weights of what the prompt brings along are held too."""
    beside = SimpleNamespace(model=torch.nn.Linear(100, 50, bias=False))
    monkeypatch.setattr(comfy.sampler_helpers, "get_additional_models", lambda conds, dtype: ([beside], 0))
    held = cost_module._held(tiny.model, support.encode(tiny))
    assert held["weights"] == weight_bytes(tiny.model) + 4 * 5000


# --- cards --------------------------------------------------------------


def of(weights, plain, low, frames=20):
    """A cost in GB."""
    weights, plain, low = (round(n * 1e9) for n in (weights, plain, low))
    none = dict.fromkeys(("inversion_seconds", "edit_seconds", "steps", "matched_steps", "sampling", "trajectory"), 0)
    memory = GradientMemory(plain, low)
    held = dict(held=weights, weights=weights, gradient=plain, foreseen=memory, checkpointing=False, free=0)
    return Cost(plan=Plan(), frames=frames, **none, **held)


@pytest.mark.parametrize(
    ("weights", "plain", "low", "said"),
    [
        (2, 5, 2, "fits"),
        (3, 6, 2, "fits with memory low"),
        (9, 6, 2, "fits with weights that ComfyUI streams"),
        (9, 12, 2, "fits with memory low and weights that ComfyUI streams"),
        (9, 50, 10, "fits with memory low and at most 13 of the 20 latent frames"),
        (9, 900, 200, "does not fit"),
    ],
)
def test_the_cheapest_settings_that_fit(weights, plain, low, said):
    """On a card of 8 GB, of which 1e9 bytes are not to be had."""
    assert fits_on(8, of(weights, plain, low)).startswith(said)
