"""Preview Relevance on embedded clips, where the truth is known: does the heat map follow the clicked object?

    python benchmarks/relevance_preview.py [--percent 0.7] [--threshold 0.22] [--layers d0,u4-u5] [--json PATH]

Every object of the first eight clips, of which no two look alike, is clicked at its true centre in the first, a middle
and the last frame. Figures: the share of frames in which the centroid of the hottest 5 % of pixels lies within 4 px of
the true centre, and the IoU of the mask with the true mask. Control rows bound the scale: a click on the background,
random maps, and the object as in the clicked frame, standing still. Two rows show the STR score of the same layers
in the place of the preview's cross-frame relevance: from the clicked frame to all others, and from frame to frame. One
CPU thread.
"""
# ruff: noqa: E402 (the pack is loaded before it is imported)

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
from pack import ROOT, load_pack

load_pack()

import comfy.samplers
from spacetime_edit.core.cross_frame_relevance import region_weight, relevant_region
from spacetime_edit.core.relevance import AttentionFeatures, neighbours, str_score
from spacetime_edit.host import relevance_preview as preview
from spacetime_edit.host.features import FeatureRecorder
from spacetime_edit.host.inversion import invert
from spacetime_edit.host.loaders import unet3d
from spacetime_edit.host.model_pass import call_on_trajectory
from spacetime_edit.tools.shape_world.clips import Clip, read_clips

PREVIEW, BACKGROUND, RANDOM, PLACE = (
    "preview",
    "control: background click",
    "control: random maps",
    "control: stands still",
)
STR_DIRECT, STR_CHAINED = "STR score, all frames", "STR score, chained"
METHODS = (PREVIEW, BACKGROUND, RANDOM, PLACE, STR_DIRECT, STR_CHAINED)
HOT_SHARE, NEAR_PX, TARGET = 0.05, 4.0, 0.8
FINEST = ("d0", "u4", "u5")
DIFFERENT = 8
"""So many clips are of objects of which no two look alike."""


@dataclass(frozen=True)
class Click:
    """One object of a clip, clicked in one frame. centres: (F, 2), x and y in px; mask: (F, H, W) in [0, 1]."""

    clip: Clip
    index: int
    place: str
    frame: int

    @property
    def centres(self) -> Tensor:
        return torch.tensor(self.clip.scene.objects[self.index].centres)

    @property
    def mask(self) -> Tensor:
        return self.clip.masks[self.index]

    @property
    def point(self) -> tuple[int, int]:
        x, y = self.centres[self.frame].tolist()
        return int(x), int(y)

    @property
    def far_point(self) -> tuple[int, int]:
        """A pixel of the background in the clicked frame: the farthest from the object's centre."""
        free = self.clip.masks[:, self.frame].amax(0) < 0.01
        y, x = torch.nonzero(free, as_tuple=True)
        away = torch.hypot(x - self.centres[self.frame, 0], y - self.centres[self.frame, 1]).argmax()
        return int(x[away]), int(y[away])


def clicks(clip: Clip) -> Iterator[Click]:
    """Each object in the first, a middle and the last frame."""
    frames = clip.frames.shape[0]
    for index in range(len(clip.scene.objects)):
        for place, frame in {"first": 0, "middle": frames // 2, "last": frames - 1}.items():
            yield Click(clip, index, place, frame)


class Inverted:
    """One clip inverted with the embedded model, and the relevance maps (F, H, W) of clicks on it."""

    def __init__(self, clip: Clip, models: tuple, settings: argparse.Namespace):
        model, text, vae = models
        self.settings, self.images = settings, clip.frames.movedim(1, -1)
        sigmas = comfy.samplers.calculate_sigmas(
            model.get_model_object("model_sampling"), "ddim_uniform", settings.steps
        )
        prompt = text.encode_from_tokens_scheduled(text.tokenize(clip.caption))
        self.trajectory = invert(model, prompt, vae.encode(self.images), sigmas)
        recorder = FeatureRecorder(frozenset(FINEST))
        call_on_trajectory(recorder, self.trajectory, settings.percent, frozenset({"spatial"}))
        self.features = list(recorder.features.values())

    def relevance(self, method: str, click: Click, generator: torch.Generator) -> Tensor:
        """The map of one of `METHODS`."""
        frames, height, width = self.images.shape[:3]
        if method == RANDOM:
            return enlarged(torch.rand(frames, height // 4, width // 4, generator=generator), height)
        if method == PLACE:
            return click.mask[click.frame].expand(frames, -1, -1)
        x, y = click.far_point if method == BACKGROUND else click.point
        region = preview.query_region(self.images, self.trajectory, x=x, y=y, frame=click.frame)
        if method in (STR_DIRECT, STR_CHAINED):
            follow = str_direct if method == STR_DIRECT else str_chained
            return torch.stack([enlarged(follow(f, region, click.frame), height) for f in self.features]).mean(0)
        options = {"percent": self.settings.percent, "layers": self.settings.layers}
        return preview.relevance_of(region, click.frame, self.trajectory, **options)


def enlarged(maps: Tensor, size: int) -> Tensor:
    """(F, h, w) -> (F, size, size)."""
    return interpolate(maps[:, None], (size, size), mode="bilinear")[:, 0]


# --- the STR score as a rival ------------------------------------------


def str_direct(features: AttentionFeatures, region: Tensor, frame: int) -> Tensor:
    """g(I_i(p), I_j(q)) of the region in frame i to every frame j; in frame i itself its spatial attention."""
    pairs, own, weight = str_pairs(features, region, radius=0)
    frames = features.query.shape[0]
    return as_maps([weight @ (pairs[frame, j] if j != frame else own[frame]) for j in range(frames)])


def str_chained(features: AttentionFeatures, region: Tensor, frame: int) -> Tensor:
    """The region's spatial attention, carried on by g from each frame to the next and, backwards, to the one before."""
    pairs, own, weight = str_pairs(features, region, radius=1)
    frames = features.query.shape[0]
    rows = {frame: weight @ own[frame]}
    for way, end in ((1, frames), (-1, -1)):
        for j in range(frame + way, end, way):
            row = rows[j - way] @ pairs[j - way, j]
            rows[j] = row / row.sum()
    return as_maps([rows[j] for j in range(frames)])


def str_pairs(features: AttentionFeatures, region: Tensor, radius: int):
    """{(i, j): g (N, N)}, spatial maps (F, N, N), both the mean over heads; the region's weights (N,)."""
    frames, _, tokens, _ = features.query.shape
    spatial = torch.softmax(features.query @ features.key.mT * features.logit_scale, -1)
    score = str_score(spatial, features.temporal, radius=radius, paths="both", per_pair=True).mean(1)
    names = [(i, j) for i in range(frames) for j in neighbours(i, frames, radius)]
    side = round(tokens**0.5)
    return dict(zip(names, score, strict=True)), spatial.mean(1), region_weight(region, side, side)


def as_maps(rows: list[Tensor]) -> Tensor:
    """Rows (N,) -> (F, h, w), each frame with sum 1."""
    rows = torch.stack(rows)
    side = round(rows.shape[-1] ** 0.5)
    return (rows / rows.sum(-1, keepdim=True)).unflatten(-1, (side, side))


# --- measuring --------------------------------------------------------


def centroid_errors(relevance: Tensor, centres: Tensor) -> Tensor:
    """(F,): px from the centroid of the hottest pixels of each frame to the true centre."""
    frames, height, width = relevance.shape
    hottest = relevance.flatten(1).topk(round(HOT_SHARE * height * width)).indices
    found = torch.stack([hottest % width, hottest // width], -1).double().mean(1) + 0.5
    return torch.linalg.vector_norm(found - centres, dim=-1)


def mean_iou(mask: Tensor, truth: Tensor) -> float:
    """Intersection over union of two masks (F, H, W), mean over frames."""
    a, b = mask > 0.5, truth > 0.5
    return float(((a & b).sum((1, 2)) / (a | b).sum((1, 2))).mean())


def run_clip(inverted: Inverted, clip: Clip, generator: torch.Generator) -> list[dict]:
    """One record a click and method."""
    records = []
    for click in clicks(clip):
        for method in METHODS:
            start = time.perf_counter()
            relevance = inverted.relevance(method, click, generator)
            seconds = time.perf_counter() - start
            errors = centroid_errors(relevance, click.centres)
            mask = relevant_region(relevance, inverted.settings.threshold)
            about = {"clip": clip.name, "object": click.index, "objects": len(clip.masks), "click": click.place}
            figures = {"near": float((errors <= NEAR_PX).double().mean()), "error_px": float(errors.mean())}
            figures |= {"iou": mean_iou(mask, click.mask), "seconds": seconds}
            records.append({**about, "method": method, **figures})
    return records


def mean(records: list[dict], metric: str, **wanted) -> float:
    """Mean of a metric over the records whose fields have these values."""
    return float(np.mean([r[metric] for r in records if all(r[name] == value for name, value in wanted.items())]))


def summarise(records: list[dict]) -> list[dict]:
    """One row a method and clicked frame ("all": all three)."""
    rows = []
    for method in METHODS:
        for click in ("first", "middle", "last", "all"):
            wanted = {"method": method} | ({} if click == "all" else {"click": click})
            figures = {metric: mean(records, metric, **wanted) for metric in ("near", "error_px", "iou", "seconds")}
            figures |= {f"near_{n}": mean(records, "near", **wanted, objects=n) for n in (1, 2)}
            rows.append({"method": method, "click": click, **figures})
    return rows


def verdicts(rows: list[dict]) -> list[str]:
    """The target for each clicked frame, met or missed with its figure."""
    lines = []
    for row in rows:
        if row["method"] == PREVIEW:
            met = "met   " if row["near"] >= TARGET else "MISSED"
            text = f"centroid of the hottest 5 % within {NEAR_PX:.0f} px in {row['near']:.3f} of frames"
            lines.append(f"  {met} click in the {row['click']:6} frame: {text}, at least {TARGET}")
    return lines


# --- command line -----------------------------------------------------


def format_rows(rows: list[dict]) -> str:
    """The summary as a table for a terminal."""
    names = ("near", "near_1", "near_2", "error_px", "iou", "seconds")
    titles = ("<= 4 px", "1 obj", "2 obj", "px", "IoU", "s")
    lines = [f"{'':34}" + "".join(f"{title:>9}" for title in titles)]
    for row in rows:
        cells = "".join(f"{row[name]:9.3f}" for name in names)
        lines.append(f"{row['method']:26}{row['click']:8}{cells}")
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--percent", type=float, default=0.7, help="of denoising, where the attention is looked at")
    parser.add_argument("--threshold", type=float, default=0.22, help="of the mask, as a share of the maximum")
    parser.add_argument("--layers", default="", help="blocks of the preview; empty: those at the finest resolution")
    parser.add_argument("--steps", type=int, default=20, help="of the inversion")
    parser.add_argument("--seed", type=int, default=0, help="of the random maps")
    parser.add_argument("--json", type=Path, help="also write rows and every click's figures here")
    return parser.parse_args()


def main() -> int:
    settings = parse_arguments()
    torch.set_num_threads(1)  # so that two runs fit two cores, and timings compare
    clips, records = read_clips(ROOT / "assets" / "tiny_clips")[:DIFFERENT], []
    generator = torch.Generator().manual_seed(settings.seed)
    with torch.inference_mode():
        models = unet3d.load_folder(unet3d.EMBEDDED)
        for i, clip in enumerate(clips):
            records += run_clip(Inverted(clip, models, settings), clip, generator)
            print(f"\r{i + 1} of {len(clips)} clips", end="", file=sys.stderr, flush=True)
    rows = summarise(records)
    print(f"\n{settings}", format_rows(rows), "", *verdicts(rows), sep="\n")
    if settings.json:
        options = {name: value for name, value in vars(settings).items() if name != "json"}
        report = {"settings": options, "rows": rows, "clicks": records}
        settings.json.write_text(json.dumps(report, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
