"""ST-Layout regions against the prompt alone, on the embedded model, where the truth is known.

    python benchmarks/quality_st_layout.py [--seed 211 223 227] [--n 16] [--only GROUP ...] [--json PATH]

Clips of two objects, both of which get another colour, shape or both. The embedded model understands sides, so the
prompt names them the other way round: read by itself it binds every phrase to the wrong object. Only the masks say
which is meant. All methods start from one inversion and keep what lies in no mask.

    forms       how attention is modulated: not at all; in the paper's form cross only, self only, both, at the settings
                tuned here, and at the method's own strength and window; as the public code does it (released, each
                phrase encoded by itself); and so with phrases in their prompt, at both settings
    masks       the nodes' defaults, with masks that are eroded, dilated or shifted, in pixels, and with the regions
                that the model's own attention finds; which of these belongs to which phrase is told by the true masks
    frames      the defaults, with self-attention within frames, to the first and previous one, and over all frames, in
                inversion and edit; with temporal attention modulated too
    order       one region after the other, with an inversion between, against both at once
    same shape  forms of importance on clips whose objects have one shape, of which neither changes it
    crossing    forms of importance on clips whose objects change sides; each object is looked for about its place in
                the source
    equal       two equal objects that no place tells apart ("two red circles" to "a red circle and a blue circle"),
                of which the masks name one; looked for about their places

Rows: the unedited copy, the true edit through the VAE, the target from random noise by the prompt as it should read.
Columns: colour and shape of the objects, each in its half; both objects right; leakage, the share of regions of the
right colour whose colour is also that of the other region; PSNR of what no mask covers; flicker, the mean second
difference of the frames in 8-bit levels.
"""
# ruff: noqa: E402 (the pack is loaded before it is imported)

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
from pack import load_pack

load_pack()

import comfy.samplers
from spacetime_edit.benchmarks import _figures as figures
from spacetime_edit.benchmarks._editing import Editor, Settings, copy, from_noise, through_vae
from spacetime_edit.benchmarks._running import add_arguments, runner
from spacetime_edit.core.inflation import Inflation
from spacetime_edit.core.masks import dilate
from spacetime_edit.core.regions import Region
from spacetime_edit.core.trajectory import Trajectory
from spacetime_edit.host.inflation import inflate_attention
from spacetime_edit.host.inversion import invert
from spacetime_edit.host.region_finding import regions_from_attention
from spacetime_edit.host.region_patch import RegionModulation, patch_regions
from spacetime_edit.host.region_prompt import encode_regional_prompt
from spacetime_edit.host.sampling import TrajectorySampler
from spacetime_edit.tools.shape_world import instruments, variety, world

KINDS = (("colour",), ("shape",), ("colour", "shape"))
COLUMNS = {
    "colour": "colour",
    "shape": "shape",
    "both_right": "both",
    "leakage": "leak",
    "kept_region_psnr_db": "kept dB",
    "flicker": "flicker",
    "seconds": "s/clip",
}
TUNED = {"cross_strength": 3.0, "self_strength": 1.0, "end": 0.6}
DEFAULTS = {"mode": "released"} | TUNED
"""The nodes' own."""
COPY, CEILING, NOISE = "unedited copy", "true edit through VAE", "random noise, prompt as it should read"
SAME_SHAPE, CROSSING, EQUAL = "same shape", "crossing", "equal"
ABOUT_PX = 6  # about an object's place in the source, where that of a crossing clip is looked for
SWAP, CROSS, SELF, BOTH = "prompt swap", "cross only", "self only", "cross and self"
PAPER, RELEASED = "paper: strength 1, 30 % of the steps", "released: strength 1, 30 % of the steps"
RELEASED_TUNED, UNSPLICED, SHIPPED = "released, tuned", "released, phrases in their prompt", "the nodes' defaults"


@dataclass(frozen=True)
class Case:
    """Two objects that both change, or one of two equal ones. prompt: of the edit, with the sides exchanged."""

    group: str
    kind: str
    seed: int
    source: world.Scene
    target: world.Scene

    @property
    def prompt(self) -> str:
        description = self.target.description
        return world.caption(description._replace(objects=description.objects[::-1]))

    @property
    def phrases(self) -> list[str]:
        return [f"a {pair.colour} {pair.shape}" for pair in self.target.description.objects]

    @property
    def edited_masks(self) -> Tensor:
        """(2, F, 64, 64) in [0, 1]: what is seen of each object."""
        return world.visible_masks(world.render(self.source)[1])


def make_cases(group: str, seed: int, n: int) -> list[Case]:
    """Of the group `SAME_SHAPE`: two objects of one shape that get other colours; of `CROSSING`: two that change
    sides; of `EQUAL`: two equal ones, one of which, in turn, gets another colour or another shape."""
    if group == EQUAL:
        return equal_cases(seed, n)
    draw = world.sample_crossing if group == CROSSING else partial(world.sample_scene, objects=2)
    generator, cases = np.random.default_rng([seed, 6]), []
    while len(cases) < n:
        kinds = ("colour",) if group == SAME_SHAPE else KINDS[len(cases) % len(KINDS)]
        source = target = draw(generator)
        if group == SAME_SHAPE and len({pair.shape for pair in source.description.objects}) > 1:
            continue
        for index in range(2):
            for kind in kinds:
                target = world.sample_edit(target, kind, generator, index)
        if target.description.objects[0] != target.description.objects[1]:
            cases.append(Case(group, " and ".join(kinds), int(generator.integers(1 << 31)), source, target))
    return cases


def equal_cases(seed: int, n: int) -> list[Case]:
    generator, cases = np.random.default_rng([seed, 7]), []
    while len(cases) < n:
        source = variety.sample(generator, "same", motion="straight")
        if len(source.objects) == 2:
            kind = ("colour", "shape")[len(cases) // 2 % 2]
            target = world.sample_edit(source, kind, generator, len(cases) % 2)
            cases.append(Case(EQUAL, kind, int(generator.integers(1 << 31)), source, target))
    return cases


def places(masks: Tensor) -> Tensor:
    """(2, F, 64, 64) bool: about each object's visible part, without the other's."""
    seen = world.visible_masks(masks)
    return (dilated(seen, ABOUT_PX) > 0.5) & (seen.flip(0) < 0.5)


def measure(case: Case, frames: Tensor, reconstruction: Tensor) -> dict[str, float]:
    """Figures of merit of an edited clip; leakage only where a region has its colour."""
    wanted = case.target.description.objects
    source, masks = world.render(case.source)
    anywhere = case.group in (CROSSING, EQUAL)
    seen = instruments.identify_in(frames, places(masks)) if anywhere else instruments.identify(frames, 2)
    colours = [a.colour == b.colour for a, b in zip(seen, wanted, strict=True)]
    others = wanted[0].colour != wanted[1].colour
    leaks = [seen[1 - i].colour == wanted[i].colour for i in range(2) if colours[i] and others]
    return {
        "colour": float(np.mean(colours)),
        "shape": float(np.mean([a.shape == b.shape for a, b in zip(seen, wanted, strict=True)])),
        "both_right": float(all(a[:2] == b[:2] for a, b in zip(seen, wanted, strict=True))),
        "kept_region_psnr_db": instruments.kept_region_psnr_db(frames, source, masks),
        "flicker": float(frames.diff(n=2, dim=0).abs().mean() * 255),
    } | ({"leakage": float(np.mean(leaks))} if leaks else {})


# --- methods ----------------------------------------------------------

MaskChange = Callable[[Tensor], Tensor]


def exact(masks: Tensor) -> Tensor:
    return masks


def dilated(masks: Tensor, px: int) -> Tensor:
    return dilate(masks.flatten(0, 1), px).view_as(masks)


def eroded(masks: Tensor, px: int) -> Tensor:
    return 1 - dilated(1 - masks, px)


def shifted(masks: Tensor, px: int) -> Tensor:
    return masks.roll(px, -1)


def regional(
    change: MaskChange = exact, mode: str = "paper", splice: bool = False, **settings
) -> Callable[[Editor, Case, Trajectory], Tensor]:
    """The edit with regions; settings of `RegionModulation`."""

    def edit(editor: Editor, case: Case, trajectory: Trajectory) -> Tensor:
        masks = world.render(case.source)[1]
        regions = [Region(p, m) for p, m in zip(case.phrases, change(masks), strict=True)]
        form = {"mode": mode, "splice": splice} | settings
        return editor.decode(sample(editor, case, trajectory, case.prompt, regions, masks.amax(0), **form))

    return edit


def sample(
    editor: Editor,
    case: Case,
    trajectory: Trajectory,
    prompt: str,
    regions: Sequence[Region],
    mask: Tensor,
    mode: str = "paper",
    splice: bool = False,
    **settings,
) -> Tensor:
    """The latent of an edit of the trajectory's clip, on the trajectory's model; what lies outside `mask` is kept."""
    positive = encode_regional_prompt(editor.clip, prompt, regions, mode, splice)
    model = patch_regions(trajectory.model, RegionModulation(**settings))
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, editor.prompt(""))
    guider.set_cfg(editor.settings.cfg)
    sampler = TrajectorySampler(trajectory, mask=mask, dilation=editor.settings.dilation)
    empty = torch.zeros(trajectory.shape)
    return guider.sample(empty, empty, sampler, editor.sigmas, disable_pbar=True, seed=case.seed)


def found(clusters: int = 3) -> Callable[[Editor, Case, Trajectory], Tensor]:
    """The edit with regions from attention: for each phrase the one that covers most of its object."""

    def edit(editor: Editor, case: Case, trajectory: Trajectory) -> Tensor:
        true = world.render(case.source)[1]
        masks = regions_from_attention(trajectory, clusters, (world.SIZE, world.SIZE), seed=case.seed)
        own = [max(masks, key=lambda mask: float((mask * truth).sum() / mask.sum().sqrt())) for truth in true]
        regions = [Region(p, m) for p, m in zip(case.phrases, own, strict=True)]
        mask = torch.stack(own).amax(0)
        return editor.decode(sample(editor, case, trajectory, case.prompt, regions, mask, **DEFAULTS))

    return edit


def inflated(keys: str, **settings) -> Callable[[Editor, Case, Trajectory], Tensor]:
    """The edit, and the inversion that it begins from, with self-attention over frames."""

    def edit(editor: Editor, case: Case, trajectory: Trajectory) -> Tensor:
        model = inflate_attention(editor.model, Inflation(keys))
        again = invert(model, trajectory.conditioning, editor.encode(world.render(case.source)[0]), editor.sigmas)
        return regional(**settings)(editor, case, again)

    return edit


def one_after_another(editor: Editor, case: Case, trajectory: Trajectory) -> Tensor:
    """The first object by its region, then, with the result inverted, the second by its own."""
    masks, source = world.render(case.source)[1], case.source.description
    first, second = case.target.description.objects

    def edit(trajectory: Trajectory, index: int, objects: tuple) -> Tensor:
        prompt, region = world.caption(source._replace(objects=objects)), Region(case.phrases[index], masks[index])
        return sample(editor, case, trajectory, prompt, [region], masks[index], **DEFAULTS)

    latent = edit(trajectory, 0, (source.objects[1], first))  # the sides exchanged
    middle = world.caption(source._replace(objects=(first, source.objects[1])))
    again = invert(editor.model, editor.prompt(middle), latent, editor.sigmas)
    return editor.decode(edit(again, 1, (second, first)))


BOUNDS = {COPY: copy, CEILING: through_vae, NOISE: from_noise}
FORMS = {
    SWAP: regional(cross_strength=0.0, self_strength=0.0),
    CROSS: regional(**TUNED | {"self_strength": 0.0}),
    SELF: regional(**TUNED | {"cross_strength": 0.0}),
    BOTH: regional(**TUNED),
    "cross and self, all steps": regional(**TUNED | {"end": 1.0}),
    PAPER: regional(),
    RELEASED: regional(mode="released", splice=True),
    RELEASED_TUNED: regional(mode="released", splice=True, **TUNED),
    UNSPLICED: regional(mode="released"),
    SHIPPED: regional(**DEFAULTS),
}
MASKS = {
    SHIPPED: FORMS[SHIPPED],
    **{f"eroded by {px} px": regional(partial(eroded, px=px), **DEFAULTS) for px in (1, 2, 3)},
    **{f"dilated by {px} px": regional(partial(dilated, px=px), **DEFAULTS) for px in (1, 2, 3)},
    **{f"shifted by {px} px": regional(partial(shifted, px=px), **DEFAULTS) for px in (1, 2, 3)},
    "regions from attention": found(),
}
FRAMES = {
    SHIPPED: FORMS[SHIPPED],
    "attention to first + previous": inflated("first + previous", **DEFAULTS),
    "attention to all frames": inflated("all frames", **DEFAULTS),
    "temporal attention modulated too": regional(**DEFAULTS | {"temporal_strength": 1.0}),
}
ORDER = {SHIPPED: FORMS[SHIPPED], "one after another": one_after_another}
GROUPS = {
    "forms": BOUNDS | FORMS,
    "masks": MASKS,
    "frames": FRAMES,
    "order": ORDER,
    SAME_SHAPE: {name: FORMS[name] for name in (SWAP, CROSS, BOTH, SHIPPED)},
    CROSSING: {CEILING: through_vae} | {name: FORMS[name] for name in (SWAP, CROSS, BOTH, RELEASED_TUNED, SHIPPED)},
    EQUAL: {CEILING: through_vae}
    | {name: FORMS[name] for name in (SWAP, CROSS, SELF, BOTH, PAPER, RELEASED, RELEASED_TUNED, UNSPLICED, SHIPPED)},
}
PAIRS = [(CROSS, SWAP), (BOTH, SWAP), (BOTH, CROSS), (PAPER, BOTH), (RELEASED, BOTH), (RELEASED_TUNED, BOTH)]
PAIRS += [(SHIPPED, other) for other in (SWAP, BOTH, PAPER, RELEASED, RELEASED_TUNED, UNSPLICED)]

figures.STATISTICS.update(dict.fromkeys(("colour", "shape", "both_right", "flicker"), "difference_of_means"))
figures.SMALLER_IS_BETTER |= {"flicker"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=GROUPS, nargs="+", default=list(GROUPS))
    add_arguments(parser)
    parser.add_argument("--n", type=int, default=16, help="clips of each seed")
    parser.add_argument("--json", type=Path, help="also write rows, intervals and every clip's figures here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    settings = Settings()
    report = {"seeds": arguments.seed, "n": arguments.n, "settings": asdict(settings) | {"tuned": TUNED}}
    with torch.inference_mode():
        run = runner(arguments, Editor(settings), TUNED)
        for group in arguments.only:
            make = partial(make_cases, group, n=arguments.n)
            records = run.over(arguments.seed, make, GROUPS[group], measure)
            rows = figures.summarise(records, COLUMNS | figures.METRICS)
            comparisons = figures.compare(records, PAIRS, seed=0)
            tables = [figures.format_rows(rows, columns) for columns in (COLUMNS, figures.METRICS)]
            print(*tables, figures.format_comparisons(comparisons), sep="\n")
            report[group] = {"rows": rows, "comparisons": comparisons, "clips": records}
            if arguments.json:
                arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
