"""The targets of STR-Match, each met or missed with its figure; the rows of its tables by name. No model, no host."""

from __future__ import annotations

from collections.abc import Sequence

from . import _figures as figures
from ._cases import KEPT, SWAP
from ._figures import find, verdict

CONCAT, MATCH, MATCH_MASK = "concat instead of STR", "STR-Match", "STR-Match + true mask"
MATCH_LOW, MATCH_HIGH = "STR-Match, lambda x 0.5", "STR-Match, lambda x 1.5"
MATCH_HALF, SWAP_HALF = "STR-Match, float16", "prompt swap, float16"
ONE, TWO, BACKGROUND = "one object", "two objects", "background of one object"
SIZE = "one object of changing size"
FAST, CROSSING = "fastest quarter, one object", "two objects that change sides"
FRAME_COUNTS = (16, 32)
DELETION, ADDITION = "one of two objects goes", "a second object comes"
SEQUENCE_MATCH, SEQUENCE_SWAP = "STR + masks, one after another", "swaps, one after another"
AT_ONCE = "STR + masks, at once"


def of_main(rows: list[dict], comparisons: list[dict]) -> list[str]:
    """The targets of STR-Match on clips of one object, each met or missed with its figure."""
    if not select_pairs(comparisons, ONE):
        return []
    texts = against_swap(comparisons, ONE) + _against_concat(comparisons, ONE) + _with_mask(rows)
    texts += _lambda_trade_off(rows) + _cost(rows)
    n = find(rows, group=ONE, kind=figures.ALL, method=MATCH)["n"]
    return [verdict(met, f"(n {n}) {text}") for met, text in texts]


def select_pairs(comparisons: list[dict], group: str) -> list[dict]:
    """Those of STR-Match against the swap."""
    return figures.select(comparisons, group=group, method=MATCH, against=SWAP)


def _compared(comparisons: list[dict], group: str, against: str, metric: str, method: str = MATCH) -> dict:
    return find(comparisons, group=group, kind=figures.ALL, method=method, against=against, metric=metric)


def against_swap(comparisons: list[dict], group: str) -> list[tuple[bool, str]]:
    """The targets against the prompt swap."""
    ratio, kept, colour, shape = (
        _compared(comparisons, group, SWAP, metric)
        for metric in ("trajectory_error_px", KEPT[0], "colour_accuracy", "shape_accuracy")
    )
    worst, share = min(colour["estimate"], shape["estimate"]), ratio["wins"] / ratio["n"]
    return [
        (share >= 0.95, f"better than {SWAP} on {ratio['wins']} of {ratio['n']} clips, at least 0.95"),
        (ratio["estimate"] <= 0.25, f"trajectory error {ratio['estimate']:.2f} of {SWAP}'s, at most 0.25"),
        (ratio["high"] <= 0.4, f"upper end of its interval {ratio['high']:.2f}, at most 0.4"),
        (kept["estimate"] >= 4, f"kept region {kept['estimate']:+.1f} dB, at least +4"),
        (worst >= -0.02, f"colour {colour['estimate']:+.3f}, shape {shape['estimate']:+.3f}, at least -0.02"),
    ]


def _against_concat(comparisons: list[dict], group: str) -> list[tuple[bool, str]]:
    ratio, shape = (_compared(comparisons, group, CONCAT, m) for m in ("trajectory_error_px", "shape_accuracy"))
    interval = f"[{ratio['low']:.2f}, {ratio['high']:.2f}]"
    return [
        (
            ratio["estimate"] <= 1 and ratio["high"] <= 1.3,
            f"trajectory error {ratio['estimate']:.2f} {interval} of concat's, at most 1.0, upper end 1.3; better on "
            f"{ratio['wins']}, worse on {ratio['losses']} of {ratio['n']}; shape {shape['estimate']:+.3f}",
        )
    ]


def of_size(rows: list[dict], comparisons: list[dict]) -> list[str]:
    """Objects that grow or shrink and change their shape: against the swap, and shape and flicker against concat."""
    lines = [verdict(met, text) for met, text in against_swap(comparisons, SIZE) + _against_concat(comparisons, SIZE)]
    ours, theirs = (find(rows, group=SIZE, kind=figures.ALL, method=method) for method in (MATCH, CONCAT))
    flicker, shape = "flicker x 100", "shape_accuracy"
    better = ours[shape] > theirs[shape] or ours[flicker] < theirs[flicker]
    shown = f"shape {ours[shape]:.3f} and {theirs[shape]:.3f}, flicker {ours[flicker]:.2f} and {theirs[flicker]:.2f}"
    return [*lines, verdict(better, f"better than concat in shape or flicker: {shown}")]


def of_stability(rows: list[dict], comparisons: list[dict]) -> list[str]:
    """Whether noise of -110 dB leaves the edit as it is."""
    row = find(rows, kind=figures.ALL, method=MATCH)
    text = f"(n {row['n']}) agreement {row['agreement_db']:.1f} dB in the median, at least 20"
    return [verdict(row["agreement_db"] >= 20, text)]


def of_precision(rows: list[dict], comparisons: list[dict]) -> list[str]:
    """Whether float16 edits as well as float32; that its pixels differ is no fault."""
    path = "trajectory_error_px"
    ratio = _compared(comparisons, ONE, MATCH, path, MATCH_HALF)
    wins = [_compared(comparisons, ONE, *pair)["wins"] for pair in ((SWAP, path), (SWAP_HALF, path, MATCH_HALF))]
    interval = f"{ratio['estimate']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]"
    about = f"(n {ratio['n']})"
    return [
        verdict(ratio["low"] <= 1 <= ratio["high"], f"{about} trajectory error {interval} of float32's, 1 within"),
        verdict(abs(wins[0] - wins[1]) <= 2, f"{about} better than the swap on {wins[0]} and {wins[1]} clips, 2 apart"),
    ]


def _cost(rows: list[dict]) -> list[tuple[bool, str]]:
    ours, plain = (find(rows, group=ONE, kind=figures.ALL, method=method)["seconds"] for method in (MATCH, SWAP))
    return [(ours / plain <= 4, f"time {ours / plain:.2f} of {SWAP}'s, at most 4")]


def _with_mask(rows: list[dict]) -> list[tuple[bool, str]]:
    kept = find(rows, group=ONE, kind=figures.ALL, method=MATCH_MASK)[KEPT[1]]
    return [(kept >= 35, f"with mask, kept region against the VAE {kept:.1f} dB, at least 35")]


def _lambda_trade_off(rows: list[dict]) -> list[tuple[bool, str]]:
    """The paper's: a larger lambda preserves more and follows the prompt less. Else, what shows instead."""
    series = [find(rows, group=ONE, kind=figures.ALL, method=method) for method in (MATCH_LOW, MATCH, MATCH_HIGH)]
    fidelity = [(row["colour_accuracy"] + row["shape_accuracy"]) / 2 for row in series]
    kept, error = ([row[metric] for row in series] for metric in (KEPT[0], "trajectory_error_px"))
    found = tuple(map(figures.trend, (fidelity, kept, error)))
    shown = (
        f"fidelity {found[0]} ({_numbers(fidelity, 3)}), kept dB {found[1]} ({_numbers(kept, 1)}), "
        f"trajectory error {found[2]} ({_numbers(error, 2)})"
    )
    return [(found == ("falls", "rises", "falls"), f"with lambda, {shown}; the paper's: falls, rises, falls")]


def _numbers(values: Sequence[float], digits: int) -> str:
    return ", ".join(f"{value:.{digits}f}" for value in values)


def of_frames(rows: list[dict], comparisons: list[dict]) -> list[str]:
    """32 frames against 16; no target."""
    lines = []
    for method in (SWAP, MATCH):
        few, many = (find(rows, group=f"{n} frames", kind=figures.ALL, method=method) for n in FRAME_COUNTS)
        ratios = {metric: many[metric] / few[metric] for metric in ("seconds", "peak_mb", "trajectory_error_px")}
        lines.append(
            f"  {method}, 32 frames against 16: time {ratios['seconds']:.2f}, peak memory {ratios['peak_mb']:.2f}, "
            f"trajectory error {ratios['trajectory_error_px']:.2f}"
        )
    return lines


def of_options(rows: list[dict], comparisons: list[dict]) -> list[str]:
    """Options whose trajectory error differs from the default's beyond the interval; no target."""
    lines = []
    for r in comparisons:
        if r["against"] == MATCH and r["metric"] == "trajectory_error_px" and r["kind"] == figures.ALL:
            word = "better than" if r["high"] < 1 else "worse than" if r["low"] > 1 else "not told from"
            interval = f"{r['estimate']:.2f} [{r['low']:.2f}, {r['high']:.2f}]"
            lines.append(f"  {r['method']:34} {word} the default: trajectory error {interval}")
    return lines


def of_crossing(rows: list[dict], comparisons: list[dict]) -> list[str]:
    """The trajectory target on the clips that are hard; not binding, the model never saw the like."""
    lines = []
    for group in (FAST, CROSSING):
        wanted = {"kind": figures.ALL, "method": MATCH, "metric": "trajectory_error_px"}
        ratio = find(comparisons, group=group, against=SWAP, **wanted)
        interval = f"[{ratio['low']:.2f}, {ratio['high']:.2f}]"
        text = (
            f"{group} (n {ratio['n']}): trajectory error {ratio['estimate']:.2f} {interval} of {SWAP}'s, at most 0.70"
        )
        lines.append(verdict(ratio["estimate"] <= 0.7, text))
    return lines


def of_sequential(rows: list[dict], comparisons: list[dict]) -> list[str]:
    """Whether the second edit leaves the first object as the first edit made it."""
    row = find(rows, kind=figures.ALL, method=SEQUENCE_MATCH)
    kept = (
        f"left object right {row['first_right_before']:.2f} after its edit, {row['first_right']:.2f} after the other's"
    )
    held = row["first_right"] >= row["first_right_before"]
    lines = [verdict(held, f"{SEQUENCE_MATCH} (n {row['n']}): {kept}, {row['first_psnr_db']:.1f} dB around it")]
    for against in (AT_ONCE, SEQUENCE_SWAP):
        wanted = {"kind": figures.ALL, "method": SEQUENCE_MATCH, "against": against}
        r = find(comparisons, metric="first_right", **wanted)
        lines.append(
            f"  left object right, against {against}: {r['estimate']:+.2f} [{r['low']:+.2f}, {r['high']:+.2f}]"
        )
    return lines
