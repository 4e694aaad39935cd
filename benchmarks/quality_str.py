"""STR-Match against other ways to edit, on the embedded model, where the truth is known.

    python benchmarks/quality_str.py [--suite main] [--seed 0] [--n N] [--json PATH]

Clips of the shape world with colour and shape edits in turn; the methods of a clip share one inversion. Suites:

    main        one object (n = 24), two objects and background edits (n / 2 each): prompt swap, SDEdit, the score of
                the paper's ablation (concat), STR-Match at three strengths, and with a mask
    options     one object (n = 12): every option of the score and of the step
    rules       one object (n = 24): normalised steps and adam's, for STR-Match and for concat, at three strengths
    frames      the same motion in 16 and in 32 frames (n = 7): figures, time, memory
    crossing    what is hard (n = 12 each): the fastest quarter of clips, and two objects that change sides. The model
                was trained on 8 frames of objects of at most 24 px travel that stay in their half of the image, so
                all methods do badly on the latter
    delete      one of two objects goes, one of two comes (n = 12 each), with its true mask
    sequential  two objects (n = 12), the left one edited first and the right one second: is the first edit kept?
    all         these seven

Rows that bound the scale: the unedited copy, sampling the target prompt from random noise, and the true edit through
the VAE. Only rows that say so see a true mask. Time is user CPU seconds on one thread, the median over the clips,
whose methods take turns; memory is bytes of live tensors, by a tracker, in a run that is not timed.
"""
# ruff: noqa: E402 (the pack is loaded before it is imported)

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import get_args

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
from pack import load_pack

load_pack()

from spacetime_edit.benchmarks import _figures as figures
from spacetime_edit.benchmarks import _verdicts as verdicts
from spacetime_edit.benchmarks._cases import (
    ADD,
    DELETE,
    SWAP,
    Case,
    chains,
    crossing_cases,
    deletion_cases,
    fast_cases,
    make_cases,
    measure,
    measure_chain,
)
from spacetime_edit.benchmarks._editing import (
    BOUNDS,
    Editor,
    Settings,
    at_once,
    described,
    in_one,
    match,
    one_after_another,
    run,
    sdedit,
    swap,
)
from spacetime_edit.benchmarks._timing import peak_bytes
from spacetime_edit.benchmarks._verdicts import (
    ADDITION,
    AT_ONCE,
    BACKGROUND,
    CONCAT,
    CROSSING,
    DELETION,
    FAST,
    FRAME_COUNTS,
    MATCH,
    MATCH_HIGH,
    MATCH_LOW,
    MATCH_MASK,
    ONE,
    SDEDIT,
    SEQUENCE_MATCH,
    SEQUENCE_SWAP,
    TWO,
)
from spacetime_edit.core.step_rules import StepRule
from spacetime_edit.tools.shape_world import world

PLAIN_STRENGTH = 1.0
"""Of the plain rule, which does nothing at the settings' lambda: the largest that a node takes."""

Records = list[dict]


@dataclass(frozen=True)
class Suite:
    """n: of the largest group; pairs: method against method; columns: metric to heading; verdicts: lines of text."""

    n: int
    run: Callable[[Editor, int, int], Records]
    pairs: Sequence[tuple[str, str]]
    verdicts: Callable[[list[dict], list[dict]], list[str]]
    columns: Mapping[str, str]


# --- suites -----------------------------------------------------------

MAIN = BOUNDS | {
    SWAP: swap(),
    SDEDIT: sdedit(),
    CONCAT: match(paths="concat"),
    MATCH_LOW: match(factor=0.5),
    MATCH: match(),
    MATCH_HIGH: match(factor=1.5),
    MATCH_MASK: match(masked=True),
}
HARD = BOUNDS | {name: MAIN[name] for name in (SWAP, SDEDIT, MATCH, MATCH_MASK)}

OPTIONS = {
    "paths temporal-spatial": match(paths="temporal-spatial"),
    "paths both": match(paths="both"),
    "paths concat": match(paths="concat"),
    "one-way": match(bidirectional=False),
    "radius 2": match(radius=2),
    "radius all": match(radius=0),
    "per pair": match(per_pair=True),
    "adam, 1 iteration": match(rule="adam"),
    "adam, 3 iterations, lambda / 3": match(rule="adam", iterations=3, factor=1 / 3),
    "adam, 10 iterations, lambda / 10": match(rule="adam", iterations=10, factor=1 / 10),
}
"""One change each of spatial-temporal, both ways, radius 1, summed, normalised, 1 iteration."""

RULES = {
    "concat, normalised": match(paths="concat", rule="normalised"),
    "concat, adam": match(paths="concat", rule="adam"),
    "STR, normalised": match(rule="normalised"),
    "STR, adam, lambda x 0.5": match(rule="adam", factor=0.5),
    "STR, adam": match(rule="adam"),
    "STR, adam, lambda x 1.5": match(rule="adam", factor=1.5),
}

CHAIN_METHODS = {name: in_one(method) for name, method in BOUNDS.items()} | {
    SEQUENCE_MATCH: one_after_another(masked=True, matched=True),
    "swaps + masks, one after another": one_after_another(masked=True, matched=False),
    "STR, one after another": one_after_another(masked=False, matched=True),
    SEQUENCE_SWAP: one_after_another(masked=False, matched=False),
    AT_ONCE: at_once(masked=True, matched=True),
    "swap, at once": at_once(masked=False, matched=False),
}


def run_main(editor: Editor, seed: int, n: int) -> Records:
    half = max(1, n // 2)
    cases = make_cases(ONE, seed, n) + make_cases(TWO, seed, half, 2)
    return run(editor, cases + make_cases(BACKGROUND, seed, half, kinds=("background",)), MAIN, measure)


def run_options(editor: Editor, seed: int, n: int) -> Records:
    plain = {f"plain, lambda {PLAIN_STRENGTH:g}": match(rule="plain", factor=PLAIN_STRENGTH / editor.settings.strength)}
    methods = BOUNDS | {SWAP: swap(), MATCH: match()} | OPTIONS | plain
    return run(editor, make_cases(ONE, seed, n), methods, measure)


def run_rules(editor: Editor, seed: int, n: int) -> Records:
    return run(editor, make_cases(ONE, seed, n), BOUNDS | {SWAP: swap()} | RULES, measure)


def run_frames(editor: Editor, seed: int, n: int) -> Records:
    """Clip by clip in 16 and in 32 frames; peak memory of the first clip only: it does not depend on the content."""
    methods = BOUNDS | {SWAP: swap(), MATCH: match()}
    by_count = [make_cases(f"{frames} frames", seed, n, frames=frames) for frames in FRAME_COUNTS]
    records = run(editor, [case for cases in zip(*by_count, strict=True) for case in cases], methods, measure)
    for cases in by_count:
        peaks = {name: _peak_mb(editor, cases[0], methods[name]) for name in (SWAP, MATCH)}
        for record in figures.select(records, group=cases[0].group):
            if record["method"] in peaks:
                record["peak_mb"] = peaks[record["method"]]
    return records


def _peak_mb(editor: Editor, case: Case, method) -> float:
    trajectory = editor.invert(editor.encode(world.render(case.source)[0]), case.source)
    return peak_bytes(lambda: method(editor, case, trajectory)) / 1e6


def run_crossing(editor: Editor, seed: int, n: int) -> Records:
    return run(editor, fast_cases(FAST, seed, n) + crossing_cases(CROSSING, seed, n), HARD, measure)


def run_delete(editor: Editor, seed: int, n: int) -> Records:
    records = []
    for group, task in ((DELETION, DELETE), (ADDITION, ADD)):
        methods = BOUNDS | {
            "swap": swap(),
            "swap + mask": swap(masked=True),
            "swap + mask + new noise": swap(masked=True, redraw=True),
            "STR, change + mask": match(masked=True),
            f"STR, {task} + mask": match(masked=True, task=task),
        }
        records += run(editor, deletion_cases(group, seed, n, task), methods, measure)
    return records


def run_sequential(editor: Editor, seed: int, n: int) -> Records:
    return run(editor, chains(TWO, seed, n), CHAIN_METHODS, measure_chain)


SUITES = {
    "main": Suite(
        24,
        run_main,
        [(m, SWAP) for m in (SDEDIT, CONCAT, MATCH_LOW, MATCH, MATCH_HIGH, MATCH_MASK)] + [(MATCH, CONCAT)],
        verdicts.of_main,
        figures.COLUMNS,
    ),
    "options": Suite(
        12,
        run_options,
        [(name, MATCH) for name in (*OPTIONS, f"plain, lambda {PLAIN_STRENGTH:g}")],
        verdicts.of_options,
        figures.COLUMNS,
    ),
    "rules": Suite(
        24,
        run_rules,
        [(name, SWAP) for name in RULES]
        + [("STR, adam", "STR, normalised"), ("STR, normalised", "concat, normalised"), ("STR, adam", "concat, adam")],
        lambda rows, comparisons: [],
        figures.COLUMNS,
    ),
    "frames": Suite(7, run_frames, [(MATCH, SWAP)], verdicts.of_frames, figures.COLUMNS | {"peak_mb": "peak MB"}),
    "crossing": Suite(12, run_crossing, [(MATCH, SWAP), (MATCH_MASK, SWAP)], verdicts.of_crossing, figures.COLUMNS),
    "delete": Suite(12, run_delete, [], lambda rows, comparisons: [], figures.COLUMNS),
    "sequential": Suite(
        12,
        run_sequential,
        [(SEQUENCE_MATCH, AT_ONCE), (SEQUENCE_MATCH, SEQUENCE_SWAP)],
        verdicts.of_sequential,
        figures.CHAIN_COLUMNS,
    ),
}


# --- command line -----------------------------------------------------


def run_suite(name: str, editor: Editor, seed: int, n: int | None) -> dict:
    """Runs and prints one suite; its part of the JSON report."""
    suite = SUITES[name]
    n = n or suite.n
    records = suite.run(editor, seed, n)
    rows = figures.summarise(records, suite.columns | figures.METRICS)
    comparisons = figures.compare(records, suite.pairs, seed)
    lines = suite.verdicts(rows, comparisons)
    inversion = figures.typical(records, "inversion_seconds")
    print(f"\n\n=== {name}, n {n}: inversion {inversion:.1f} s a clip; s/clip holds only that before a second edit")
    tables = [figures.format_rows(rows, columns) for columns in (suite.columns, figures.METRICS)]
    print(*tables, figures.format_comparisons(comparisons), "", *lines, sep="\n")
    report = {"n": n, "inversion_seconds": inversion, "rows": rows, "comparisons": comparisons}
    return report | {"verdicts": lines, "clips": records}


def parse_arguments() -> argparse.Namespace:
    default = Settings()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=(*SUITES, "all"), default="main")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--n", type=int, help="clips of a suite's largest group, instead of its own number")
    parser.add_argument("--json", type=Path, help="also write rows, intervals and every clip's figures here")
    parser.add_argument("--steps", type=int, default=default.steps)
    parser.add_argument("--cfg", type=float, default=default.cfg)
    parser.add_argument("--strength", type=float, default=default.strength, help="lambda of STR-Match")
    parser.add_argument("--end", type=float, default=default.end, help="percent of denoising where STR-Match ends")
    parser.add_argument("--rule", choices=get_args(StepRule), default=default.rule, help="step rule of STR-Match")
    parser.add_argument("--layers", default=default.layers, help="blocks of STR-Match, empty: all but the finest")
    parser.add_argument("--dilation", type=float, default=default.dilation, help="of the true mask, in px")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    torch.set_num_threads(1)  # so that two runs fit two cores, and timings compare
    settings = Settings(**{field.name: getattr(arguments, field.name) for field in fields(Settings)})
    print(f"seed {arguments.seed}, {described(settings)}")
    report = {"seed": arguments.seed, "settings": asdict(settings), "suites": {}}
    with torch.inference_mode():
        editor = Editor(settings)
        for name in SUITES if arguments.suite == "all" else [arguments.suite]:
            report["suites"][name] = run_suite(name, editor, arguments.seed, arguments.n)
            if arguments.json:  # after each suite: a long run that stops leaves what it had
                arguments.json.write_text(json.dumps(report, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
