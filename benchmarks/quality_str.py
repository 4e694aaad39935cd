"""STR-Match against other ways to edit, on the embedded model, where the truth is known.

    python benchmarks/quality_str.py [--suite main] [--seed 211 223 227] [--n N] [--store FILE] [--json PATH]

Clips of the shape world with colour and shape edits in turn, n of each seed; the methods of a clip share one inversion.
Suites:

    main        one object (n = 16): prompt swap, SDEdit, the score of the paper's ablation (concat), STR-Match at three
                strengths and with a mask
    two         two objects, and background edits of one (n = 8 each), by the same methods
    size        one object that grows or shrinks and changes its shape (n = 16)
    options     one object (n = 4): every option of the score and of the step
    stability   one object (n = 4): the same edit after noise of -110 dB on the clip's latent
    precision   one object (n = 16): inversion and edit in float16 against float32
    frames      the same motion in 16 and in 32 frames (n = 7): figures, time, memory
    crossing    what is hard (n = 8 each): the fastest quarter of clips, and two objects that change sides. The model
                was trained on 8 frames of objects of at most 24 px travel that stay in their half of the image, so
                all methods do badly on the latter
    delete      one of two objects goes, one of two comes (n = 8 each), with its true mask
    sequential  two objects (n = 8), the left one edited first and the right one second: is the first edit kept?
    all         these ten

Seeds below 100 are for tuning, others for figures. Rows that bound the scale: the unedited copy, sampling the target
prompt from random noise, and the true edit through the VAE. Only rows that say so see a true mask. Time is user CPU
seconds on one thread, the median over the clips, whose methods take turns; memory is bytes of live tensors, by a
tracker, in a run that is not timed. A store keeps the figures of each clip, and a run goes on where another stopped.
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
    growing_cases,
    make_cases,
    measure,
    measure_chain,
)
from spacetime_edit.benchmarks._editing import (
    BOUNDS,
    SDEDIT,
    Editor,
    Settings,
    again,
    agreement,
    at_once,
    described,
    in_half,
    in_one,
    match,
    one_after_another,
    sdedit,
    swap,
)
from spacetime_edit.benchmarks._running import Runner, add_arguments, runner
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
    MATCH_HALF,
    MATCH_HIGH,
    MATCH_LOW,
    MATCH_MASK,
    ONE,
    SEQUENCE_MATCH,
    SEQUENCE_SWAP,
    SIZE,
    SWAP_HALF,
    TWO,
)
from spacetime_edit.core.relevance import Paths
from spacetime_edit.tools.shape_world import world

Records = list[dict]


@dataclass(frozen=True)
class Suite:
    """n: of the largest group; pairs: method against method; columns: metric to heading; verdicts: lines of text."""

    n: int
    run: Callable[[Runner, int, int], Records]
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
HARD = BOUNDS | {name: MAIN[name] for name in (SWAP, CONCAT, MATCH, MATCH_MASK)}

OPTIONS = {
    "1 iteration": match(iterations=1),
    "2 iterations": match(iterations=2),
    "first half of the steps": match(end=0.5),
    "all steps": match(end=1.0),
    "paths spatial-temporal": match(paths="spatial-temporal"),
    "paths temporal-spatial": match(paths="temporal-spatial"),
    "paths both": match(paths="both"),
    "paths concat": match(paths="concat"),
    "one-way": match(bidirectional=False),
    "radius 1": match(radius=1),
    "radius 2": match(radius=2),
    "per pair": match(per_pair=True),
}
"""One change each of the settings, both ways, all frames, summed."""

CHAIN_METHODS = {name: in_one(method) for name, method in BOUNDS.items()} | {
    SEQUENCE_MATCH: one_after_another(masked=True, matched=True),
    "swaps + masks, one after another": one_after_another(masked=True, matched=False),
    "STR, one after another": one_after_another(masked=False, matched=True),
    SEQUENCE_SWAP: one_after_another(masked=False, matched=False),
    AT_ONCE: at_once(masked=True, matched=True),
    "swap, at once": at_once(masked=False, matched=False),
}


def run_main(run: Runner, seed: int, n: int) -> Records:
    return run(make_cases(ONE, seed, n), MAIN, measure)


def run_two(run: Runner, seed: int, n: int) -> Records:
    return run(make_cases(TWO, seed, n, 2) + make_cases(BACKGROUND, seed, n, kinds=("background",)), MAIN, measure)


def run_size(run: Runner, seed: int, n: int) -> Records:
    return run(growing_cases(SIZE, seed, n), HARD, measure)


def run_options(run: Runner, seed: int, n: int) -> Records:
    return run(make_cases(ONE, seed, n), BOUNDS | {SWAP: swap(), MATCH: match()} | OPTIONS, measure)


def run_stability(run: Runner, seed: int, n: int) -> Records:
    methods = {MATCH: match()} | {f"lambda x {factor:g}": match(factor=factor) for factor in (0.25, 0.5)}
    methods |= {f"{k} iteration{'s' * (k > 1)}": match(iterations=k) for k in (1, 2)}
    return run(make_cases(ONE, seed, n), {name: again(method) for name, method in methods.items()}, agreement)


def run_precision(run: Runner, seed: int, n: int) -> Records:
    methods = {SWAP: swap(), SWAP_HALF: in_half(swap()), MATCH: match(), MATCH_HALF: in_half(match())}
    return run(make_cases(ONE, seed, n), methods, measure)


def run_frames(run: Runner, seed: int, n: int) -> Records:
    """Clip by clip in 16 and in 32 frames; peak memory of the first clip only: it does not depend on the content."""
    methods = BOUNDS | {SWAP: swap(), MATCH: match()}
    by_count = [make_cases(f"{frames} frames", seed, n, frames=frames) for frames in FRAME_COUNTS]
    records = run([case for cases in zip(*by_count, strict=True) for case in cases], methods, measure)
    for cases in by_count:
        peaks = {name: _peak_mb(run.editor, cases[0], methods[name]) for name in (SWAP, MATCH)}
        for record in figures.select(records, group=cases[0].group):
            if record["method"] in peaks:
                record["peak_mb"] = peaks[record["method"]]
    return records


def _peak_mb(editor: Editor, case: Case, method) -> float:
    trajectory = editor.invert(editor.encode(world.render(case.source)[0]), case.source)
    return peak_bytes(lambda: method(editor, case, trajectory)) / 1e6


def run_crossing(run: Runner, seed: int, n: int) -> Records:
    return run(fast_cases(FAST, seed, n) + crossing_cases(CROSSING, seed, n), HARD, measure)


def run_delete(run: Runner, seed: int, n: int) -> Records:
    records = []
    for group, task in ((DELETION, DELETE), (ADDITION, ADD)):
        methods = BOUNDS | {
            "swap": swap(),
            "swap + mask": swap(masked=True),
            "swap + mask + new noise": swap(masked=True, redraw=True),
            "STR, change + mask": match(masked=True),
            f"STR, {task} + mask": match(masked=True, task=task),
        }
        records += run(deletion_cases(group, seed, n, task), methods, measure)
    return records


def run_sequential(run: Runner, seed: int, n: int) -> Records:
    return run(chains(TWO, seed, n), CHAIN_METHODS, measure_chain)


PAIRS = [(m, SWAP) for m in (SDEDIT, CONCAT, MATCH_LOW, MATCH, MATCH_HIGH, MATCH_MASK)] + [(MATCH, CONCAT)]
HARD_PAIRS = [(MATCH, SWAP), (CONCAT, SWAP), (MATCH_MASK, SWAP), (MATCH, CONCAT)]


def none(rows: list[dict], comparisons: list[dict]) -> list[str]:
    """No targets."""
    return []


SUITES = {
    "main": Suite(16, run_main, PAIRS, verdicts.of_main, figures.COLUMNS),
    "two": Suite(8, run_two, PAIRS, none, figures.COLUMNS),
    "size": Suite(16, run_size, HARD_PAIRS, verdicts.of_size, figures.COLUMNS),
    "options": Suite(4, run_options, [(name, MATCH) for name in OPTIONS], verdicts.of_options, figures.COLUMNS),
    "stability": Suite(4, run_stability, [], verdicts.of_stability, {"agreement_db": "dB", "seconds": "s/clip"}),
    "precision": Suite(
        16,
        run_precision,
        [(MATCH, SWAP), (MATCH_HALF, SWAP_HALF), (SWAP_HALF, SWAP), (MATCH_HALF, MATCH)],
        verdicts.of_precision,
        figures.COLUMNS,
    ),
    "frames": Suite(7, run_frames, [(MATCH, SWAP)], verdicts.of_frames, figures.COLUMNS | {"peak_mb": "peak MB"}),
    "crossing": Suite(8, run_crossing, HARD_PAIRS, verdicts.of_crossing, figures.COLUMNS),
    "delete": Suite(8, run_delete, [], none, figures.COLUMNS),
    "sequential": Suite(
        8,
        run_sequential,
        [(SEQUENCE_MATCH, AT_ONCE), (SEQUENCE_MATCH, SEQUENCE_SWAP)],
        verdicts.of_sequential,
        figures.CHAIN_COLUMNS,
    ),
}


# --- command line -----------------------------------------------------


def run_suite(name: str, run: Runner, seeds: Sequence[int], n: int | None) -> dict:
    """Runs and prints one suite; its part of the JSON report."""
    suite = SUITES[name]
    n, records = n or suite.n, []
    for seed in seeds:
        run.seed = seed
        records += suite.run(run, seed, n)
    metrics = {} if name == "stability" else figures.METRICS
    rows = figures.summarise(records, suite.columns | metrics)
    comparisons = figures.compare(records, suite.pairs, seed=0)
    lines = [] if run.only else suite.verdicts(rows, comparisons)
    inversion = figures.typical(records, "inversion_seconds")
    print(f"\n\n=== {name}, n {n} of each seed: inversion {inversion:.1f} s a clip, not in s/clip")
    tables = [figures.format_rows(rows, columns) for columns in (suite.columns, metrics) if columns]
    print(*tables, figures.format_comparisons(comparisons), "", *lines, sep="\n")
    report = {"n": n, "inversion_seconds": inversion, "rows": rows, "comparisons": comparisons}
    return report | {"verdicts": lines, "clips": records}


def parse_arguments() -> argparse.Namespace:
    default = Settings()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=(*SUITES, "all"), default="main")
    add_arguments(parser)
    parser.add_argument("--n", type=int, help="clips of each group and seed, instead of a suite's own number")
    parser.add_argument("--json", type=Path, help="also write rows, intervals and every clip's figures here")
    parser.add_argument("--steps", type=int, default=default.steps)
    parser.add_argument("--cfg", type=float, default=default.cfg)
    parser.add_argument("--strength", type=float, default=default.strength, help="lambda of STR-Match")
    parser.add_argument("--end", type=float, default=default.end, help="percent of denoising where STR-Match ends")
    parser.add_argument("--iterations", type=int, default=default.iterations, help="moves of STR-Match a step")
    parser.add_argument("--paths", choices=get_args(Paths), default=default.paths, help="of the score")
    parser.add_argument("--layers", default=default.layers, help="blocks of STR-Match, empty: all but the finest")
    parser.add_argument("--dilation", type=float, default=default.dilation, help="of the true mask, in px")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    torch.set_num_threads(1)  # so that two runs fit two cores, and timings compare
    settings = Settings(**{field.name: getattr(arguments, field.name) for field in fields(Settings)})
    print(f"seeds {arguments.seed}, {described(settings)}")
    report = {"seeds": arguments.seed, "settings": asdict(settings), "suites": {}}
    with torch.inference_mode():
        run = runner(arguments, Editor(settings))
        for name in SUITES if arguments.suite == "all" else [arguments.suite]:
            report["suites"][name] = run_suite(name, run, arguments.seed, arguments.n)
            if arguments.json:  # after each suite: a long run that stops leaves what it had
                arguments.json.write_text(json.dumps(report, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
