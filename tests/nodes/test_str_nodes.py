"""The nodes around STR-Match: sweep, cosine curve, predicted cost, and the options of score and optimizer."""

from types import SimpleNamespace

import pytest
import torch
from spacetime_edit.nodes.capture_score import CaptureSTRScore
from spacetime_edit.nodes.charts import Line, line_chart
from spacetime_edit.nodes.cosine_curve import STRCosineCurve
from spacetime_edit.nodes.predict_cost import UNKNOWN, PredictCost, duration, size
from spacetime_edit.nodes.sweep_lambda import SweepLambda, parse_lambdas
from spacetime_edit.tests.host import support
from spacetime_edit.tests.nodes.test_edit_nodes import SIDE, Graph, refused


@pytest.fixture
def graph(tiny):
    return Graph(tiny.model, support.encode(tiny))


@pytest.fixture(scope="module")
def inverted(tiny):
    """(trajectory, sigmas) of the graph's clip."""
    with torch.inference_mode():
        return Graph(tiny.model, support.encode(tiny)).invert().result


def test_the_options_of_the_score_are_handed_on(inverted):
    score = CaptureSTRScore.execute(inverted[0], "", 2, "both", "one way", True).result[0]
    assert score.form == dict(radius=2, paths="both", bidirectional=False, per_pair=True)
    assert CaptureSTRScore.execute(inverted[0], "", 1).result[0].form["bidirectional"] is True


def test_delete_without_a_mask_says_what_to_connect(graph, inverted):
    score = CaptureSTRScore.execute(inverted[0], "", 1).result[0]
    with refused(graph, "^mask: the task is 'delete', but no mask is connected"):
        graph.run(graph.optimise(score, task="delete"), inverted[1])


# Sweep Lambda


def test_a_sweep_gives_the_edits_of_its_lambdas(graph, inverted):
    trajectory, sigmas = inverted
    score = CaptureSTRScore.execute(trajectory, "", 1).result[0]
    mask = torch.zeros(1, SIDE, SIDE)
    mask[:, :, :4] = 1
    samplers, labels = SweepLambda.execute(graph.optimise(score, mask=mask), "0, 0.5").result
    assert labels == ["lambda 0", "lambda 0.5"]
    for sampler, strength in zip(samplers, (0.0, 0.5), strict=True):
        single = graph.run(graph.optimise(score, strength=strength, mask=mask), sigmas)
        assert torch.equal(graph.run(sampler, sigmas), single)


@pytest.mark.parametrize("text", ["", "a, b", "0.01, -1", "2.1", "nan", "0.01; 0.02"])
def test_lambdas_that_are_none(text):
    with pytest.raises(ValueError, match="^lambdas: .*expected numbers from 0 to 2 with commas between"):
        parse_lambdas(text)
    assert "expected numbers" in SweepLambda.validate_inputs(text)


def test_a_sampler_without_lambda(graph, inverted):
    with refused(graph, "^sampler: it has no lambda; connect the sampler of STR Latent Optimizer"):
        SweepLambda.execute(graph.sample(inverted[0]), "0.01")


# STR Cosine Curve


def test_the_curve_is_of_the_run_that_made_the_latent(graph, inverted):
    trajectory, sigmas = inverted
    sampler = graph.optimise(CaptureSTRScore.execute(trajectory, "", 1).result[0], iterations=2)
    samples = graph.run(sampler, sigmas)
    chart = STRCosineCurve.execute(sampler, {"samples": samples}).result[0]
    assert chart.shape == (1, 432, 768, 3) and 0 <= chart.min() < chart.max() <= 1
    with refused(graph, "^latent: no run of this sampler with STR matching made it; connect"):
        STRCosineCurve.execute(sampler, {"samples": samples + 1})


def test_a_sampler_that_matches_nothing_has_no_curve(graph, inverted):
    trajectory, sigmas = inverted
    score = CaptureSTRScore.execute(trajectory, "", 1).result[0]
    for sampler in (graph.optimise(score, strength=0.0), graph.sample(trajectory)):
        samples = graph.run(sampler, sigmas)
        with refused(graph, "^latent: no run of this sampler"):
            STRCosineCurve.execute(sampler, {"samples": samples})


def test_a_chart_draws_its_curve():
    """A rising line fills the lower left and the upper right."""
    rising, falling = (
        line_chart([Line("a", [0, 1], y)], title="t", x_label="x", y_label="y")[0] for y in ([0, 1], [1, 0])
    )
    assert rising.shape == falling.shape
    assert (rising - falling).abs().mean() > 1e-3
    ink = lambda picture, rows, columns: float((1 - picture[rows, columns]).mean())  # noqa: E731
    upper, left = slice(60, 200), slice(120, 400)
    assert ink(falling, upper, left) > ink(rising, upper, left)


# Predict Cost


@pytest.fixture
def planned(monkeypatch):
    """Lets Predict Cost find itself in a graph with these nodes, by id."""

    def put(graph, **inputs):
        own = {"class_type": "STE_PredictCost", "inputs": {"latent": ["1", 0]} | inputs}
        hidden = SimpleNamespace(unique_id="9", prompt=graph | {"9": own})
        monkeypatch.setattr(PredictCost, "hidden", hidden, raising=False)

    return put


INVERTED = {
    "class_type": "STE_InvertVideo",
    "inputs": {"latent": ["1", 0], "steps": 6, "refinements": 0, "scheduler": "simple"},
}


def test_predicted_cost_in_plain_words(graph, planned):
    """What the graph says is not asked again."""
    planned(
        {
            "2": INVERTED,
            "3": {"class_type": "STE_CaptureSTRScore", "inputs": {"trajectory": ["2", 0], "layers": "m0"}},
            "4": {"class_type": "STE_STRLatentOptimizer", "inputs": {"score": ["3", 0], "end_percent": 1.0}},
            "5": {"class_type": "STE_SampleFromTrajectory", "inputs": {"trajectory": ["2", 0]}},
        }
    )
    report, minutes, gigabytes = PredictCost.execute(graph.model, graph.positive, graph.latent).result
    assert "6 steps, 6 of them with a gradient, layers m0" in report and "prompt swap: " in report
    assert "memory low" in report and "8 GB card: fits" in report
    assert 0 < minutes < 5 and 0 < gigabytes < 10
    planned({})
    assert PredictCost.execute(graph.model, graph.positive, graph.latent).result[0].startswith(UNKNOWN)


def test_predicted_cost_of_something_that_is_no_clip(graph):
    with refused(graph, "^latent: it has 1 frame"):
        PredictCost.execute(graph.model, graph.positive, {"samples": torch.randn(1, 4, SIDE, SIDE)})


@pytest.mark.parametrize(("seconds", "text"), [(3.4, "3 s"), (89, "89 s"), (150, "2.5 min"), (7200, "2.0 h")])
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(("count", "text"), [(31_000_000, "31 MB"), (5_400_000_000, "5.4 GB")])
def test_sizes(count, text):
    assert size(count) == text
