"""From the records of single clips to rows, intervals and tables. No model, no host."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

import numpy as np

from ..tools.shape_world.statistics import paired_bootstrap

COLUMNS = {
    "trajectory_error_px": "traj px",
    "median of trajectory_error_px": "median",
    "worst of trajectory_error_px": "worst",
    "colour_accuracy": "colour",
    "shape_accuracy": "shape",
    "background_accuracy": "backgr",
    "count_accuracy": "count",
    "kept_region_psnr_db": "kept dB",
    "kept_region_psnr_vs_vae_db": "vs VAE",
    "seconds": "s/clip",
}
"""Metrics of one edit, with their column headings."""

METRICS = {
    "warp error x 100": "warp",
    "motion error, px": "mot err",
    "motion fidelity": "mot fid",
    "background PSNR, dB": "bg dB",
    "background SSIM": "bg SSIM",
    "flicker x 100": "flicker",
}
"""Those of *Video Edit Metrics* that need no model, with their column headings."""

CHAIN_COLUMNS = {
    "first_right_before": "1st, one",
    "first_right": "1st, two",
    "first_psnr_db": "1st dB",
    "second_right": "2nd",
    "trajectory_error_px": "traj px",
    "kept_region_psnr_db": "kept dB",
    "kept_region_psnr_vs_vae_db": "vs VAE",
    "seconds": "s/clip",
}
"""Metrics of two edits of one clip: the left object after the first edit and after the second, and so on."""

MEDIANS = frozenset({"seconds", "inversion_seconds", "agreement_db"})
OF = {"median": np.median, "worst": np.max}
"""What else a column may say of a metric: "median of ...", "worst of ..."."""
SMALLER_IS_BETTER = {"trajectory_error_px"}
STATISTICS = {
    "trajectory_error_px": "ratio_of_means",
    "kept_region_psnr_db": "difference_of_means",
    "kept_region_psnr_vs_vae_db": "difference_of_means",
    "colour_accuracy": "difference_of_means",
    "shape_accuracy": "difference_of_means",
    "first_right": "difference_of_means",
    "second_right": "difference_of_means",
    "first_psnr_db": "difference_of_means",
}
"""How a metric of two methods is compared; metrics without an entry are not."""

ALL = "all"


def select(records: Iterable[dict], **wanted) -> list[dict]:
    """Records whose fields have these values; kind "all" allows any."""
    wanted = {name: value for name, value in wanted.items() if not (name == "kind" and value == ALL)}
    return [r for r in records if all(r[name] == value for name, value in wanted.items())]


def groups(records: Iterable[dict]) -> Iterator[tuple[str, str]]:
    """(group, kind of edit) in the order of the records; "all" first, and alone where there is one kind."""
    kinds: dict[str, dict[str, None]] = {}
    for r in records:
        kinds.setdefault(r["group"], {})[r["kind"]] = None
    for group, found in kinds.items():
        yield from ((group, kind) for kind in (ALL, *(found if len(found) > 1 else ())))


def typical(records: list[dict], metric: str) -> float | None:
    """Mean over the records that have the metric, of some the median; None where none has it."""
    of, _, name = metric.partition(" of ") if metric.partition(" ")[0] in OF else ("", "", metric)
    values = [r[name] for r in records if name in r]
    if not values:
        return None
    if of:
        return float(OF[of](values))
    return float(np.median(values) if metric in MEDIANS else np.mean(values))


def summarise(records: list[dict], metrics: Iterable[str] = COLUMNS) -> list[dict]:
    """One row a group, kind of edit and method."""
    metrics, methods, rows = list(metrics), dict.fromkeys(r["method"] for r in records), []
    for group, kind in groups(records):
        for method in methods:
            if chosen := select(records, group=group, kind=kind, method=method):
                about = {"group": group, "kind": kind, "method": method, "n": len(chosen)}
                rows.append(about | {metric: typical(chosen, metric) for metric in metrics})
    return rows


def compare(records: list[dict], pairs: Sequence[tuple[str, str]], seed: int) -> list[dict]:
    """Method against method on the same clips, with 95 % paired bootstrap intervals.

    The records of a clip share `clip`. Clips that lack a metric in one of the two methods are left out.
    """
    rows = []
    for group, kind in groups(records):
        for method, against in pairs:
            ours, theirs = (
                {r["clip"]: r for r in select(records, group=group, kind=kind, method=m)} for m in (method, against)
            )
            for metric, statistic in STATISTICS.items():
                shared = [c for c in ours if c in theirs and metric in ours[c] and metric in theirs[c]]
                if shared:
                    a, b = ([side[c][metric] for c in shared] for side in (ours, theirs))
                    about = {"group": group, "kind": kind, "method": method, "against": against, "metric": metric}
                    interval = paired_bootstrap(a, b, statistic, seed=seed)._asdict()
                    sign = -1 if metric in SMALLER_IS_BETTER else 1
                    ahead = [sign * (x - y) for x, y in zip(a, b, strict=True)]
                    won = {"wins": sum(d > 0 for d in ahead), "losses": sum(d < 0 for d in ahead)}
                    rows.append({**about, "statistic": statistic, "n": len(shared), **interval, **won})
    return rows


def find(rows: Iterable[dict], **wanted) -> dict:
    """The one row with these values; LookupError where there is none or more than one."""
    found = [r for r in rows if all(r[name] == value for name, value in wanted.items())]
    if len(found) != 1:
        raise LookupError(f"{len(found)} rows with {wanted}")
    return found[0]


def trend(values: Sequence[float], tolerance: float = 0.0) -> str:
    """ "rises", "falls", "level" or "mixed": what a series does, steps of up to `tolerance` being none."""
    steps = [b - a for a, b in pairwise(values)]
    up, down = any(step > tolerance for step in steps), any(step < -tolerance for step in steps)
    return {(False, False): "level", (True, False): "rises", (False, True): "falls"}.get((up, down), "mixed")


# --- for a terminal ---------------------------------------------------


def verdict(met: bool, text: str) -> str:
    """One target, met or missed, with its figure."""
    return f"  {'met   ' if met else 'MISSED'} {text}"


def format_rows(rows: list[dict], columns: dict[str, str] = COLUMNS) -> str:
    """The summary as a table."""
    lines, heading = [], None
    for row in rows:
        if heading != (heading := (row["group"], row["kind"])):
            title = f"{row['group']}, {row['kind']} edits (n = {row['n']})"
            lines += ["", f"{title:44}" + "".join(f"{name:>9}" for name in columns.values())]
        cells = ("        -" if row[m] is None else f"{row[m]:9.2f}" for m in columns)
        lines.append(f"  {row['method']:42}" + "".join(cells))
    return "\n".join(lines)


def format_comparisons(rows: list[dict]) -> str:
    """The intervals over all kinds of edit as a table; those of each kind are in the JSON report only."""
    lines, heading = ["", "method against method, 95 % paired bootstrap interval"], None
    for r in (r for r in rows if r["kind"] == ALL):
        if heading != (heading := (r["group"], r["method"], r["against"])):
            lines.append(f"  {r['group']} (n {r['n']}): {r['method']} against {r['against']}")
        interval = f"{r['estimate']:8.3f}  [{r['low']:.3f}, {r['high']:.3f}]"
        won = f"{r['wins']} better, {r['losses']} worse"
        lines.append(f"    {r['metric']:27} {r['statistic'].replace('_', ' '):20} {interval:30} {won}")
    return "\n".join(lines)
