"""DreamMotion and its ablations on the embedded model, where the truth is known.

    python benchmarks/quality_dds.py [--seed 211 223 227] [--n 16] [--steps 32] [--step-size 1.6] [--cfg 7.5]
                                     [--only GROUP ...] [--json PATH]

One object gets another colour or another shape. Every method optimises the clip's own latent, with the same noises.

    losses      score distillation (SDS), delta denoising score (DDS), with S-SSM, with T-SSM, with both (DreamMotion),
                with the true mask; with STR relevance too; with frame differences instead
    motions     what T-SSM adds where objects move on a curve, bounce or change their size
    layers      which keys are compared, under which prompt, and fixed weights
    masks       the mask exact, smaller, larger, shifted, half missing

Rows: the unedited copy, the true edit through the VAE, prompt swap by sampling. Columns: those of `quality_str`; frame
consistency, the mean cosine of neighbouring frames; saturation drift, the change of the mean saturation inside the
object against the true edit. Below them the targets, met or missed.
"""
# ruff: noqa: E402 (the pack is loaded before it is imported)

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
from pack import load_pack

load_pack()

from spacetime_edit.benchmarks import _figures as figures
from spacetime_edit.benchmarks._cases import CEILING, COPY, KEPT, MOTIONS, SWAP, Case, make_cases, moving_cases
from spacetime_edit.benchmarks._cases import measure as measure_edit
from spacetime_edit.benchmarks._editing import Editor, Settings, copy, swap, through_vae
from spacetime_edit.benchmarks._running import add_arguments, runner
from spacetime_edit.core.masks import dilate
from spacetime_edit.core.trajectory import Trajectory
from spacetime_edit.host.distillation import MOTION, RELEVANCE, SPATIAL, TEMPORAL, Distillation, optimise
from spacetime_edit.host.features import key_blocks
from spacetime_edit.tools.shape_world import world

SDS, DDS, WITH_S, WITH_T = "SDS", "DDS", "DDS + S-SSM", "DDS + T-SSM"
FULL, MASKED = "DreamMotion (both)", "DreamMotion + true mask"
MASKED_SCORE = "DreamMotion + true mask for the score only"
HELD = {SPATIAL: 0.3, TEMPORAL: 0.1}
COLUMNS = figures.COLUMNS | {"consistency": "consist", "saturation": "satur"}
PAIRS = [(DDS, SDS), (WITH_S, DDS), (WITH_T, DDS), (FULL, DDS), (FULL, WITH_S), (MASKED, FULL), (FULL, SWAP)]
figures.STATISTICS["consistency"] = "difference_of_means"


def measure(case: Case, frames: Tensor, reconstruction: Tensor) -> dict[str, float]:
    truth, _ = world.render(case.target)
    inside = case.edited_masks[0][:, None]
    colour = [(x * inside).sum((0, 2, 3)) / inside.sum() for x in (frames, truth)]
    saturation = [float(c.max() - c.min()) for c in colour]
    flat = frames.flatten(1) - 0.5
    return measure_edit(case, frames, reconstruction) | {
        "consistency": float(cosine_similarity(flat[1:], flat[:-1]).mean()),
        "saturation": saturation[0] - saturation[1],
    }


Change = Callable[[Tensor], Tensor]


def optimised(
    settings: dict, weights: dict | None = None, mask: Change | None = None, layers: str = "", **options
) -> Callable[[Editor, Case, Trajectory], Tensor]:
    """A run of the loop; mask: what is made of the true one, None: no mask."""

    def edit(editor: Editor, case: Case, trajectory: Trajectory) -> Tensor:
        prompts = [editor.prompt(text) for text in (world.caption(case.source), world.caption(case.target), "")]
        chosen = Distillation(weights=weights or {}, blocks=key_blocks(editor.model, layers), **settings, **options)
        latent = editor.encode(world.render(case.source)[0])
        where = {} if mask is None else {"mask": mask(case.edited_masks[0]), "dilation": editor.settings.dilation}
        return editor.decode(optimise(editor.model, *prompts, latent, chosen, seed=case.seed, **where)[0])

    return edit


def exact(mask: Tensor) -> Tensor:
    return mask


def grown(mask: Tensor, px: int) -> Tensor:
    """By `px`, or smaller by as many where that is below 0."""
    return dilate(mask, px) if px >= 0 else 1 - dilate(1 - mask, -px)


def half_missing(mask: Tensor) -> Tensor:
    """Nothing in the second half of the frames."""
    mask = mask.clone()
    mask[len(mask) // 2 :] = 0
    return mask


def methods(settings: dict) -> dict[str, dict[str, Callable]]:
    make = partial(optimised, settings)
    losses = {
        COPY: copy,
        CEILING: through_vae,
        SWAP: swap(),
        SDS: make(delta=False),
        DDS: make(),
        WITH_S: make({SPATIAL: HELD[SPATIAL]}),
        WITH_T: make({TEMPORAL: HELD[TEMPORAL]}),
        FULL: make(HELD),
        MASKED: make(HELD, exact),
        MASKED_SCORE: make(HELD, exact, mask_all=False),
        "DreamMotion + STR": make(HELD | {RELEVANCE: 0.3}),
        "DDS + frame difference": make({MOTION: 0.3}),
    }
    layers = {
        FULL: make(HELD),
        "keys of u0-u1": make(HELD, layers="u0-u1"),
        "keys of d0-d1,m0": make(HELD, layers="d0-d1,m0"),
        "keys under the negative prompt": make(HELD, branch="negative"),
        "S-SSM 1, T-SSM 0.3": make({SPATIAL: 1.0, TEMPORAL: 0.3}),
    }
    masks = {
        MASKED: make(HELD, exact),
        **{f"grown by {px} px": make(HELD, partial(grown, px=px)) for px in (-3, -2, -1, 1, 2, 3)},
        **{f"shifted by {px} px": make(HELD, lambda m, px=px: m.roll(px, -1)) for px in (1, 2, 3)},
        "half missing": make(HELD, half_missing),
    }
    motions = {name: losses[name] for name in (COPY, CEILING, DDS, WITH_S, WITH_T, FULL)}
    return {"losses": losses, "motions": motions, "layers": layers, "masks": masks}


def cases_of(group: str, seed: int, n: int) -> list[Case]:
    """n clips of a seed, of each motion where the group is of motions."""
    if group == "motions":
        return [case for motion in MOTIONS for case in moving_cases(motion, seed, n)]
    return make_cases(group, seed, n)


def of_losses(rows: list[dict]) -> list[str]:
    """The targets: the paper's order of ablations, and what the mask does for the background."""
    of = {row["method"]: row for row in rows if row["kind"] == figures.ALL}
    full, alone, masked = of[FULL], of[DDS], of[MASKED]
    accuracy = min(full[name] - alone[name] for name in ("colour_accuracy", "shape_accuracy"))
    kept, ceiling = full[KEPT[0]], of[CEILING][KEPT[0]]
    closed = (masked[KEPT[0]] - kept) / (ceiling - kept)
    path, steady = ([row[name] for row in (full, alone)] for name in ("trajectory_error_px", "consistency"))
    return [
        figures.verdict(path[0] < path[1], f"trajectory error {path[0]:.2f} px, DDS alone {path[1]:.2f}: lower"),
        figures.verdict(steady[0] > steady[1], f"frame consistency {steady[0]:.4f}, DDS alone {steady[1]:.4f}: higher"),
        figures.verdict(accuracy >= -0.05, f"worse of colour and shape {accuracy:+.3f} against DDS, at least -0.05"),
        figures.verdict(closed >= 0.7, f"the mask closes {closed:.2f} of the gap to the VAE's ceiling, at least 0.70"),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("losses", "motions", "layers", "masks"), nargs="+", default=["losses"])
    add_arguments(parser)
    parser.add_argument("--n", type=int, default=16, help="clips of each seed and kind of motion")
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--step-size", type=float, default=1.6)
    parser.add_argument("--cfg", type=float, default=7.5, help="of the optimised rows")
    parser.add_argument("--json", type=Path, help="also write rows, intervals and every clip's figures here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    settings = {"steps": arguments.steps, "step_size": arguments.step_size, "cfg": arguments.cfg}
    report = {"seeds": arguments.seed, "n": arguments.n, "settings": settings}
    with torch.inference_mode():
        run = runner(arguments, Editor(Settings()), settings)
        for group in arguments.only:
            make = partial(cases_of, group, n=arguments.n)
            records = run.over(arguments.seed, make, methods(settings)[group], measure)
            rows = figures.summarise(records, COLUMNS | figures.METRICS)
            comparisons = figures.compare(records, PAIRS, seed=0)
            tables = [figures.format_rows(rows, columns) for columns in (COLUMNS, figures.METRICS)]
            print(*tables, figures.format_comparisons(comparisons), sep="\n")
            if group == "losses" and not run.only:
                print(*of_losses(rows), sep="\n")
            report[group] = {"rows": rows, "comparisons": comparisons, "clips": records}
            if arguments.json:
                arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
