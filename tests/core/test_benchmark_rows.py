"""What the benchmarks do with their figures, on figures whose rows are known; no model."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from spacetime_edit.benchmarks import _cases as cases
from spacetime_edit.benchmarks import _figures as figures
from spacetime_edit.benchmarks import _parts as parts
from spacetime_edit.benchmarks import _timing as timing
from spacetime_edit.benchmarks import _verdicts as verdicts
from spacetime_edit.tools.shape_world import instruments, world

N = 8


def records(method, group="one object", kinds=("colour", "shape"), **metrics):
    """N records of a method; a metric is a number, or one number a clip."""
    return [
        {"clip": i, "group": group, "kind": kinds[i % len(kinds)], "method": method}
        | {name: float(np.broadcast_to(value, N)[i]) for name, value in metrics.items()}
        for i in range(N)
    ]


def edited_perfectly(case):
    frames, _ = world.render(case.target)
    return cases.measure(case, frames, world.render(case.source)[0])


def test_columns_may_be_the_median_and_the_worst():
    given = records("a", trajectory_error_px=[1, 1, 1, 1, 2, 2, 2, 30])
    row = figures.summarise(given, ["median of trajectory_error_px", "worst of trajectory_error_px"])[0]
    assert (row["median of trajectory_error_px"], row["worst of trajectory_error_px"]) == (1.5, 30)


def test_rows_are_means_of_their_group_and_kind():
    error = np.arange(N)
    given = records("a", trajectory_error_px=error, seconds=[1] * 7 + [100])
    given += records("a", "two objects", ("colour",), trajectory_error_px=5)
    rows = figures.summarise(given)
    assert [(r["group"], r["kind"], r["n"]) for r in rows] == [
        ("one object", "all", 8),
        ("one object", "colour", 4),
        ("one object", "shape", 4),
        ("two objects", "all", 8),
    ]
    assert [r["trajectory_error_px"] for r in rows] == [3.5, 3, 4, 5]
    assert rows[0]["seconds"] == 1
    assert rows[0]["colour_accuracy"] is None
    assert "1.00" in figures.format_rows(rows) and " -" in figures.format_rows(rows)


def test_comparisons_pair_the_clips():
    error = np.array([1.0, 9, 2, 8, 3, 7, 4, 6])
    given = records("ours", trajectory_error_px=error / 2, kept_region_psnr_db=30)
    given += records("theirs", trajectory_error_px=error, kept_region_psnr_db=28)
    rows = figures.compare(given[::-1], [("ours", "theirs")], seed=0)
    ratio = figures.find(rows, kind="all", metric="trajectory_error_px")
    assert (ratio["estimate"], ratio["low"], ratio["high"]) == pytest.approx((0.5, 0.5, 0.5))
    assert figures.find(rows, kind="shape", metric="kept_region_psnr_db")["estimate"] == pytest.approx(2)
    assert (ratio["wins"], ratio["losses"]) == (N, 0)
    assert "0.500" in figures.format_comparisons(rows) and "8 better, 0 worse" in figures.format_comparisons(rows)


def test_a_clip_without_the_metric_is_left_out_of_both_sides():
    given = records("a", colour_accuracy=1) + records("b", colour_accuracy=0)
    del given[0]["colour_accuracy"], given[N + 3]["colour_accuracy"]
    row = figures.find(figures.compare(given, [("a", "b")], 0), kind="all", metric="colour_accuracy")
    assert (row["n"], row["estimate"]) == (N - 2, 1)


def test_the_one_row_is_found_or_missed_loudly():
    rows = figures.summarise(records("a", seconds=1))
    assert figures.find(rows, kind="all", method="a")["n"] == N
    for wanted in ({"method": "b"}, {"method": "a"}):
        with pytest.raises(LookupError):
            figures.find(rows, **wanted)


@pytest.mark.parametrize(
    ("values", "word"),
    [([1, 2, 2, 3], "rises"), ([3, 2, 2], "falls"), ([1, 1], "level"), ([1, 2, 1], "mixed"), ([1, 1.05, 2], "rises")],
)
def test_trend_of_a_series(values, word):
    assert figures.trend(values) == word


def test_a_trend_ignores_small_steps():
    assert figures.trend([1, 2, 1.95, 3], tolerance=0.1) == "rises"


def test_cases_take_kinds_and_objects_in_turn_and_follow_the_seed():
    made = cases.make_cases("two", 3, 8, 2)
    assert [(c.kind, c.index) for c in made[:4]] == [("colour", 0), ("shape", 0), ("colour", 1), ("shape", 1)]
    assert made == cases.make_cases("two", 3, 8, 2) != cases.make_cases("two", 4, 8, 2)


def test_more_frames_show_the_same_motion():
    few, many = (cases.make_cases("one", 0, 4, frames=frames) for frames in (16, 31))
    for a, b in zip(few, many, strict=True):
        assert a.target.description == b.target.description
        assert np.allclose(a.source.objects[0].centres, b.source.objects[0].centres[::2])


@pytest.mark.parametrize("n", [1, 2, 6])
def test_fast_cases_are_the_fastest_quarter(n):
    fast = [c.source.travel_px for c in cases.fast_cases("fast", 0, n)]
    everyone = sorted((c.source.travel_px for c in cases.make_cases("all", 0, 4 * n)), reverse=True)
    assert fast == everyone[:n]


@pytest.mark.parametrize(
    "made",
    [
        cases.make_cases("one", 5, 6),
        cases.make_cases("background", 5, 3, kinds=("background",)),
        cases.crossing_cases("crossing", 5, 8),
    ],
    ids=["one", "background", "crossing"],
)
def test_the_true_edit_scores_perfectly(made):
    for case in made:
        figure = edited_perfectly(case)
        assert {value for name, value in figure.items() if name.endswith("accuracy")} == {1.0}, case
        assert figure["trajectory_error_px"] < 3.5
        assert (cases.KEPT[0] in figure) == (case.kind != "background")
        assert figure.get(cases.KEPT[0], 100) > 60


def test_the_mask_of_a_hidden_object_is_what_is_seen_of_it():
    case = replace(cases.crossing_cases("crossing", 5, 1)[0], index=0)
    rear, front = world.render(case.source)[1]
    seen = case.edited_masks[0]
    assert (rear * front).sum() > 100
    assert torch.equal(seen, rear * (1 - front))


def test_a_chain_edits_the_left_object_and_then_the_right_one():
    for chain in cases.chains("two", 0, 4):
        (a, b), (c, d), (e, f) = (s.description.objects for s in (chain.source, chain.middle, chain.target))
        assert (a != c, b == d, c == e, d != f) == (True,) * 4
        middle, target = (world.render(s)[0] for s in (chain.middle, chain.target))
        source = world.render(chain.source)[0]
        kept = cases.measure_chain(chain, (middle, target), source)
        assert (kept["first_right_before"], kept["first_right"], kept["second_right"]) == (1, 1, 1)
        assert kept["first_psnr_db"] > 40
        undone = cases.measure_chain(chain, (middle, source), source)
        assert (undone["first_right"], undone["second_right"]) == (0, 0)
        assert undone["first_psnr_db"] < 25
        assert "first_psnr_db" not in cases.measure_chain(chain, (None, target), source)


def test_runs_take_turns_after_one_that_does_not_count():
    calls = []
    seconds = timing.interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, runs=3)
    assert "".join(calls) == "ab" * 4
    assert [len(s) for s in seconds.values()] == [3, 3]


def test_medians_are_of_user_and_system_time_apart():
    runs = [timing.CpuSeconds(1, 9), timing.CpuSeconds(2, 7), timing.CpuSeconds(9, 8)]
    assert timing.medians({"a": runs}) == {"a": (2, 8)}


def test_a_clip_that_nobody_edited_is_found_at_its_place_but_wrong():
    for case in cases.crossing_cases("crossing", 2, 4):
        frames, masks = world.render(case.source)
        figure = cases.measure(case, frames, frames)
        assert figure[f"{case.kind}_accuracy"] == 0.5
        assert figure["trajectory_error_px"] < 2.2 < 5 < instruments.trajectory_error_px(frames, masks)


@pytest.mark.parametrize("make", [cases.make_cases, cases.growing_cases, cases.crossing_cases, cases.fast_cases])
def test_the_true_edit_errs_by_nothing_to_see(make):
    """Also where its shape has another centre of mass than the source's."""
    for case in make("any", 2, 6):
        truth = world.render(case.target)[0]
        figure = cases.measure(case, truth, truth)
        assert figure["trajectory_error_px"] < 0.5
        assert figure["colour_accuracy"] == figure["shape_accuracy"] == 1


# verdicts

METRICS = {
    "colour_accuracy": 1,
    "shape_accuracy": 1,
    "kept_region_psnr_db": 30,
    "kept_region_psnr_vs_vae_db": 30,
    "seconds": 1,
}


def main_records(match_error=1.0, low=1.0, high=0.98):
    """Records of the main suite in which every target is met; low and high: shape accuracy at the outer lambdas."""
    error = np.linspace(4, 6, N)
    rows = {
        verdicts.SWAP: {"trajectory_error_px": error, "kept_region_psnr_db": 25},
        verdicts.CONCAT: {"trajectory_error_px": error - 1},
        verdicts.MATCH_LOW: {"trajectory_error_px": 3, "shape_accuracy": low, "kept_region_psnr_db": 29},
        verdicts.MATCH: {"trajectory_error_px": match_error, "shape_accuracy": (low + high) / 2},
        verdicts.MATCH_HIGH: {"trajectory_error_px": 0.5, "shape_accuracy": high, "kept_region_psnr_db": 31},
        verdicts.MATCH_MASK: {"trajectory_error_px": 1, "kept_region_psnr_vs_vae_db": 40},
    }
    return [r for method, own in rows.items() for r in records(method, verdicts.ONE, **METRICS | own)]


def main_lines(given):
    pairs = [(verdicts.MATCH, verdicts.SWAP), (verdicts.MATCH, verdicts.CONCAT)]
    return verdicts.of_main(figures.summarise(given), figures.compare(given, pairs, seed=0))


def test_each_target_is_judged_once():
    lines = main_lines(main_records())
    assert len(lines) == len(set(lines)) == 9
    assert all(line.startswith("  met   ") for line in lines), lines


def test_a_missed_target_says_so():
    missed = [line for line in main_lines(main_records(match_error=4.9)) if line.startswith("  MISSED")]
    for words in ("better than prompt swap on 4 of 8", "of prompt swap's, at most 0.25", "of concat's"):
        assert any(words in line for line in missed), (words, missed)


def test_what_lambda_does_instead_is_said():
    line = next(line for line in main_lines(main_records(high=1.0)) if "with lambda" in line)
    assert line.startswith("  MISSED") and "fidelity level (1.000, 1.000, 1.000), kept dB rises" in line


@pytest.mark.parametrize("kind", [cases.DELETE, cases.ADD])
def test_deletion_and_addition_are_measured_by_the_target(kind):
    made = cases.deletion_cases("group", 0, 4, kind)
    assert [len(c.target.objects) for c in made] == [{"delete": 1, "add": 2}[kind]] * 4
    for case in made:
        both = case.source if kind == cases.DELETE else case.target
        torch.testing.assert_close(case.edited_masks[0], world.visible_masks(world.render(both)[1])[case.index])
        perfect = edited_perfectly(case)
        assert perfect["trajectory_error_px"] < 0.5 and perfect["count_accuracy"] == 1
        assert perfect["colour_accuracy"] == perfect["shape_accuracy"] == 1
        assert perfect["kept_region_psnr_db"] > 40
        untouched = cases.measure(case, *[world.render(case.source)[0]] * 2)
        assert untouched["count_accuracy"] == 0
    assert {c.index for c in made} == {0, 1}


def test_a_part_that_fails_or_takes_too_long_keeps_its_rows(capsys):
    def failing():
        yield parts.at_least("first", 3, "dB", 2)
        raise RuntimeError("no kernel")

    def slow():
        yield parts.at_most("first", 3, "dB", 2)
        while True:
            pass

    failed, late = parts.run_part("a", failing, 60), parts.run_part("b", slow, 0.05)
    assert [row["met"] for report in (failed, late) for row in report["rows"]] == [True, False]
    assert "no kernel" in failed["error"] and "TimeoutError" in late["error"]
    printed = capsys.readouterr().out
    assert "met    first: 3 dB, at least 2" in printed and "MISSED first: 3 dB, at most 2" in printed


def test_a_part_without_an_error_has_none():
    assert parts.run_part("a", lambda: iter([parts.Row("figure", 1.5, "s")]), 60)["error"] == ""
