"""STR-Match against a plain prompt swap on the embedded model, where the truth is known.

    python benchmarks/quality_str.py [--seed 0] [--n 12] [--json PATH]

Shape-world clips of one and of two objects, n of each; colour, shape and background edits in turn. The methods
of a clip share one inversion. Rows that bound the scale: the unedited copy, sampling the target prompt from
random noise, and the true edit through the VAE. Only the rows that say so see a true mask. One CPU thread.
"""
# ruff: noqa: E402 (the pack is loaded before it is imported)

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
from pack import load_pack

load_pack()

import comfy.samplers
from spacetime_edit.host.loaders import unet3d
from spacetime_edit.host.relevance_matching import RelevanceMatching, str_score_of
from spacetime_edit.host.sampling import TrajectorySampler, invert
from spacetime_edit.tools.shape_world import instruments, world
from spacetime_edit.tools.shape_world.statistics import paired_bootstrap

COPY, NOISE, CEILING = "unedited copy", "random noise", "true edit through VAE"
SWAP, MATCH, MATCH_MASK = "prompt swap", "STR-Match", "STR-Match + true mask"
METHODS = (COPY, NOISE, CEILING, SWAP, MATCH, MATCH_MASK)

ACCURACIES = ("colour_accuracy", "shape_accuracy", "background_accuracy", "count_accuracy")
KEPT = ("kept_region_psnr_db", "kept_region_psnr_vs_vae_db")
METRICS = ("trajectory_error_px", *ACCURACIES, *KEPT, "seconds")
COMPARED = {
    "trajectory_error_px": "ratio_of_means",
    "kept_region_psnr_db": "difference_of_means",
    "kept_region_psnr_vs_vae_db": "difference_of_means",
    "colour_accuracy": "difference_of_means",
    "shape_accuracy": "difference_of_means",
}


@dataclass(frozen=True)
class Settings:
    """strength: lambda of STR-Match for 50 steps; end: percent of denoising where it ends; dilation: px."""

    steps: int = 20
    cfg: float = 4.0
    strength: float = 0.08
    end: float = 0.8
    layers: str = ""
    dilation: float = 4.0


@dataclass(frozen=True)
class Case:
    """One clip and its edit. index: the edited object; for a background edit it has no meaning."""

    objects: int
    kind: str
    index: int
    seed: int
    source: world.Scene
    target: world.Scene

    @property
    def edited_masks(self) -> Tensor:
        """(1, F, 64, 64) in [0, 1]: the edited object of the source clip, or all that is no object."""
        masks = world.render(self.source)[1]
        return 1 - masks.amax(0, keepdim=True) if self.kind == "background" else masks[self.index, None]


def make_cases(seed: int, n: int, objects: int, kinds: Sequence[str] = world.EDIT_KINDS) -> list[Case]:
    """n cases of 1 or 2 objects, the kinds of edit and the edited objects in turn."""
    generator = np.random.default_rng([seed, objects])
    cases = []
    for i in range(n):
        kind, index = kinds[i % len(kinds)], i // len(kinds) % objects
        source = world.sample_scene(generator, objects)
        target = world.sample_edit(source, kind, generator, index)
        cases.append(Case(objects, kind, index, int(generator.integers(1 << 31)), source, target))
    return cases


# --- editing ----------------------------------------------------------


class Editor:
    """The embedded model in this process, with the host's own objects."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.model, self.clip, self.vae = unet3d.load_folder(unet3d.EMBEDDED)
        sampling = self.model.get_model_object("model_sampling")
        self.sigmas = comfy.samplers.calculate_sigmas(sampling, "ddim_uniform", settings.steps)

    def prompt(self, text: str) -> list:
        """CONDITIONING of a prompt."""
        return self.clip.encode_from_tokens_scheduled(self.clip.tokenize(text))

    def encode(self, frames: Tensor) -> Tensor:
        """(F, 3, 64, 64) in [0, 1] -> latent (F, 4, 16, 16)."""
        return self.vae.encode(frames.movedim(1, -1))

    def decode(self, latent: Tensor) -> Tensor:
        """Latent -> frames, in the shapes of `encode`."""
        return self.vae.decode(latent).movedim(-1, 1).clamp(0, 1).cpu()

    def invert(self, case: Case):
        """The trajectory of the case's source clip."""
        latent = self.encode(world.render(case.source)[0])
        return invert(self.model, self.prompt(world.caption(case.source)), latent, self.sigmas)

    def edit(self, method: str, case: Case, trajectory) -> Tensor:
        """The case's clip edited by one of `METHODS`: (F, 3, 64, 64) in [0, 1]."""
        if method == COPY:
            return world.render(case.source)[0]
        if method == CEILING:
            return self.decode(self.encode(world.render(case.target)[0]))
        guider = comfy.samplers.CFGGuider(self.model)
        guider.set_conds(self.prompt(world.caption(case.target)), self.prompt(""))
        guider.set_cfg(self.settings.cfg)
        noise = torch.randn(trajectory.shape, generator=torch.Generator().manual_seed(case.seed))
        sampler, sigmas = self.sampler(method, case, trajectory), trajectory.sigmas
        samples = guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, disable_pbar=True, seed=case.seed)
        return self.decode(samples)

    def sampler(self, method: str, case: Case, trajectory):
        """The SAMPLER of a method."""
        if method == NOISE:
            return comfy.samplers.sampler_object("ddim")
        if method == SWAP:
            return TrajectorySampler(trajectory)
        score = str_score_of(trajectory, self.settings.layers, 1)
        matching = RelevanceMatching(score, self.settings.strength, end=self.settings.end)
        mask = case.edited_masks[0] if method == MATCH_MASK else None
        return TrajectorySampler(trajectory, mask=mask, dilation=self.settings.dilation, before_step=[matching])


# --- measuring --------------------------------------------------------


def measure(case: Case, frames: Tensor, reconstruction: Tensor) -> dict[str, float]:
    """Figures of merit of an edited clip; `reconstruction` is the source clip through the VAE.

    A background edit keeps no region, so its PSNR figures are left out.
    """
    source, masks = world.render(case.source)
    target = case.target.description
    figures = {
        "trajectory_error_px": instruments.trajectory_error_px(frames, masks),
        "colour_accuracy": instruments.colour_accuracy(frames, target),
        "shape_accuracy": instruments.shape_accuracy(frames, target),
        "background_accuracy": instruments.background_accuracy(frames, target),
        "count_accuracy": instruments.count_accuracy(frames, case.objects),
    }
    if case.kind != "background":
        references = (source, reconstruction)
        for name, reference in zip(KEPT, references, strict=True):
            figures[name] = instruments.kept_region_psnr_db(frames, reference, case.edited_masks)
    return figures


def run_case(editor: Editor, case: Case) -> list[dict]:
    """One record a method."""
    start = time.perf_counter()
    trajectory = editor.invert(case)
    inversion = time.perf_counter() - start
    reconstruction = editor.decode(editor.encode(world.render(case.source)[0]))
    records = []
    for method in METHODS:
        start = time.perf_counter()
        frames = editor.edit(method, case, trajectory)
        seconds = time.perf_counter() - start
        about = {
            "objects": case.objects,
            "kind": case.kind,
            "method": method,
            "edit": world.caption(case.target),
        }
        figures = measure(case, frames, reconstruction)
        records.append({**about, **figures, "seconds": seconds, "inversion_seconds": inversion})
    return records


# --- summing up -------------------------------------------------------


def select(records: Iterable[dict], **wanted) -> list[dict]:
    """Records whose fields have these values; None allows any."""
    wanted = {name: value for name, value in wanted.items() if value is not None}
    return [r for r in records if all(r[name] == value for name, value in wanted.items())]


def groups() -> list[tuple[int, str | None]]:
    """(number of objects, kind of edit); None is all kinds."""
    return [(objects, kind) for objects in (1, 2) for kind in (None, *world.EDIT_KINDS)]


def mean(records: list[dict], metric: str) -> float | None:
    """Mean over the records that have the metric; of seconds the median."""
    values = [r[metric] for r in records if metric in r]
    if not values:
        return None
    return float(np.median(values) if metric == "seconds" else np.mean(values))


def summarise(records: list[dict]) -> list[dict]:
    """One row a group and method."""
    rows = []
    for objects, kind in groups():
        for method in METHODS:
            chosen = select(records, objects=objects, kind=kind, method=method)
            if chosen:
                about = {"objects": objects, "kind": kind or "all", "method": method, "n": len(chosen)}
                about["n_kept_region"] = sum(KEPT[0] in r for r in chosen)
                rows.append(about | {metric: mean(chosen, metric) for metric in METRICS})
    return rows


def compare(records: list[dict], seed: int) -> list[dict]:
    """Both STR rows against the prompt swap on the same clips, with 95 % paired bootstrap intervals."""
    rows = []
    for objects, kind in groups():
        for method in (MATCH, MATCH_MASK):
            for metric, statistic in COMPARED.items():
                pair = [select(records, objects=objects, kind=kind, method=m) for m in (method, SWAP)]
                a, b = ([r[metric] for r in side if metric in r] for side in pair)
                if a:
                    interval = paired_bootstrap(a, b, statistic, seed=seed)._asdict()
                    about = {"objects": objects, "kind": kind or "all", "method": method, "against": SWAP}
                    rows.append({**about, "metric": metric, "statistic": statistic, "n": len(a), **interval})
    return rows


def verdicts(rows: list[dict], comparisons: list[dict]) -> list[str]:
    """The targets of STR-Match on clips of one object, each met or missed with its figure."""
    lines = []
    for kind in ("all", "colour", "shape"):
        own = {r["method"]: r for r in rows if r["objects"] == 1 and r["kind"] == kind}
        against = {(r["method"], r["metric"]): r for r in comparisons if r["objects"] == 1 and r["kind"] == kind}
        if MATCH not in own:
            continue
        ratio = against[MATCH, "trajectory_error_px"]
        kept, colour, shape = (
            against[MATCH, m]["estimate"] for m in ("kept_region_psnr_db", "colour_accuracy", "shape_accuracy")
        )
        masked = own[MATCH_MASK]["kept_region_psnr_vs_vae_db"]
        targets = {
            f"trajectory error {ratio['estimate']:.2f} of {SWAP}'s, at most 0.70": ratio["estimate"] <= 0.7,
            f"upper end of its interval {ratio['high']:.2f}, below 1": ratio["high"] < 1,
            f"kept region {kept:+.1f} dB, not lower": kept >= 0,
            f"colour {colour:+.3f}, shape {shape:+.3f}, at least -0.05": min(colour, shape) >= -0.05,
            f"with mask, kept region against the VAE {masked:.1f} dB, at least 35": masked >= 35,
        }
        n = ratio["n"]
        lines += [f"  {'met   ' if met else 'MISSED'} {kind:6} (n {n}): {text}" for text, met in targets.items()]
    return lines


# --- command line -----------------------------------------------------

COLUMNS = ("traj px", "colour", "shape", "backgr", "count", "kept dB", "vs VAE", "s/clip")


def format_rows(rows: list[dict]) -> str:
    """The summary as a table for a terminal."""
    lines = []
    for row in rows:
        if row["method"] == METHODS[0]:
            title = f"{row['objects']} object{'s' * (row['objects'] > 1)}, {row['kind']} edits (n = {row['n']})"
            lines += ["", f"{title:36}" + "".join(f"{name:>9}" for name in COLUMNS)]
        cells = ("        -" if row[m] is None else f"{row[m]:9.2f}" for m in METRICS)
        lines.append(f"  {row['method']:34}" + "".join(cells))
    return "\n".join(lines)


def format_comparisons(rows: list[dict]) -> str:
    """The intervals as a table for a terminal."""
    lines = ["", f"against {SWAP}, 95 % paired bootstrap interval"]
    for r in rows:
        what = f"{r['objects']} obj, {r['kind']:10} {r['method']:22} {r['metric']:27} {r['statistic']:20}"
        lines.append(f"  {what} n {r['n']:3}  {r['estimate']:7.3f}  [{r['low']:.3f}, {r['high']:.3f}]")
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    default = Settings()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--n", type=int, default=12, help="clips of one object, and as many of two")
    parser.add_argument("--json", type=Path, help="also write rows, intervals and every clip's figures here")
    parser.add_argument("--steps", type=int, default=default.steps)
    parser.add_argument("--cfg", type=float, default=default.cfg)
    parser.add_argument("--strength", type=float, default=default.strength, help="lambda of STR-Match")
    parser.add_argument("--end", type=float, default=default.end, help="percent of denoising where STR-Match ends")
    parser.add_argument("--layers", default=default.layers, help="blocks of STR-Match, empty: all but the finest")
    parser.add_argument("--objects", type=int, choices=(1, 2), help="only clips of this many objects")
    parser.add_argument("--kinds", nargs="+", choices=world.EDIT_KINDS, default=world.EDIT_KINDS, help="kinds of edit")
    parser.add_argument("--dilation", type=float, default=default.dilation, help="of the true mask, in px")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    torch.set_num_threads(1)  # so that two runs fit two cores, and timings compare
    settings = Settings(**{field.name: getattr(arguments, field.name) for field in fields(Settings)})
    counts = [arguments.objects] if arguments.objects else [1, 2]
    cases = [case for objects in counts for case in make_cases(arguments.seed, arguments.n, objects, arguments.kinds)]
    records = []
    with torch.inference_mode():
        editor = Editor(settings)
        for i, case in enumerate(cases):
            records += run_case(editor, case)
            print(f"\r{i + 1} of {len(cases)} clips", end="", file=sys.stderr, flush=True)
    rows, comparisons = summarise(records), compare(records, arguments.seed)
    inversion = float(np.median([r["inversion_seconds"] for r in records]))
    print(f"\nseed {arguments.seed}, {settings}; inversion {inversion:.1f} s a clip, not counted below")
    print(format_rows(rows), format_comparisons(comparisons), "", *verdicts(rows, comparisons), sep="\n")
    if arguments.json:
        report = {"seed": arguments.seed, "n": arguments.n, "settings": asdict(settings)}
        report |= {"inversion_seconds": inversion, "rows": rows, "comparisons": comparisons, "clips": records}
        arguments.json.write_text(json.dumps(report, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
