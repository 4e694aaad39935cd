"""Three edits of two clips on a real ComfyUI server, with pictures to look at and figures to check.

    python dev.py demo [--seed 0]

The clips are the first of one object and the first of two, each with its first edit of the first object's shape. Runs
the API graphs of prompt swap, STR-Match and STR-Match with a mask on the embedded tiny model, and writes to
output/demo: a contact sheet, `source | edit | difference` of every edit as WebP and MP4, and figures.json.
"""
# ruff: noqa: E402 (the pack is loaded before it is imported)

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace

from pack import ROOT, host_path, load_pack

load_pack(host=False)

from spacetime_edit.tools.server import LiveServer
from spacetime_edit.tools.shape_world import instruments, media, world
from spacetime_edit.tools.shape_world.clips import Clip, read_clips, read_frames
from torch import Tensor

OUTPUT = ROOT / "output" / "demo"
CLIPS = ROOT / "assets" / "tiny_clips"
GRAPHS = ROOT / "workflows" / "api"
METHODS = {
    "prompt swap": "Swap an object - prompt swap (tiny).json",
    "STR-Match": "Swap an object - STR-Match (tiny).json",
    "STR-Match with mask": "Keep the background exactly - STR-Match with mask (tiny).json",
}
SHOWN = (1, 2)
"""Numbers of objects of which a clip is shown."""
FIGURES = ("trajectory_error_px", "colour_accuracy", "shape_accuracy", "background_psnr_db")


@dataclass(frozen=True)
class Result:
    """One edited clip: frames (F, 3, 64, 64) in [0, 1]."""

    clip: Clip
    edit: int
    method: str
    frames: Tensor

    @property
    def caption(self) -> str:
        return self.clip.edits[self.edit - 1]

    @property
    def name(self) -> str:
        """File name without suffix."""
        return f"{self.clip.name} {self.method}".replace(" ", "_").lower()

    @property
    def panels(self) -> list[Tensor]:
        """Source, edit, difference."""
        return [self.clip.frames, self.frames, media.difference(self.clip.frames, self.frames)]


# --- running ----------------------------------------------------------


def prepared(graph: dict, clip: Clip, edit: int, seed: int) -> dict:
    """A copy of an API graph with this clip, edit (from 1) and seed in place of its own."""
    graph = copy.deepcopy(graph)
    loaders = [node for node in graph.values() if node["class_type"] == "STE_LoadExampleClip"]
    if not loaders:
        raise ValueError("the graph has no Load Example Clip node to put the clip into")
    for node in loaders:
        node["inputs"].update(clip=f"{clip.name} - {clip.caption}", edit=edit)
    for node in graph.values():
        node["inputs"].update({name: seed for name in ("seed", "noise_seed") if name in node["inputs"]})
    return graph


def saved_frames(server: LiveServer, graph: dict, entry: dict) -> Tensor:
    """What the one SaveImage node of a finished graph wrote, (F, 3, H, W) in [0, 1]."""
    savers = [node_id for node_id, node in graph.items() if node["class_type"] == "SaveImage"]
    if len(savers) != 1:
        raise ValueError(f"the graph has {len(savers)} SaveImage nodes; expected one, for the edited frames")
    return read_frames(server.output_files({"outputs": {savers[0]: entry["outputs"][savers[0]]}}))


def shown_edits(clips: Iterable[Clip]) -> list[tuple[Clip, int]]:
    """For each of `SHOWN` the first clip with so many objects, and its first edit, from 1, of its first one's shape."""
    found = {}
    for clip in clips:
        before = clip.scene.description.objects[0]
        for number, caption in enumerate(clip.edits, 1):
            after = world.parse_caption(caption).objects[0]
            if after.shape != before.shape and after.colour == before.colour:
                found.setdefault(len(clip.scene.objects), (clip, number))
    return [found[count] for count in SHOWN]


def run_edits(server: LiveServer, seed: int) -> list[Result]:
    """Every method on every clip, clip by clip, so that the server keeps a clip's inversion."""
    results = []
    for clip, edit in shown_edits(read_clips(CLIPS)):
        for method, file in METHODS.items():
            graph = json.loads((GRAPHS / file).read_text(encoding="utf-8"))
            graph = prepared(graph, clip, edit, seed)
            start = time.perf_counter()
            frames = saved_frames(server, graph, server.queue(graph))
            print(f"{clip.name}  {method:20} {time.perf_counter() - start:5.1f} s", flush=True)
            results.append(Result(clip, edit, method, frames))
    return results


# --- measuring and writing --------------------------------------------


def figures(result: Result) -> dict[str, float]:
    """`FIGURES` of one edit; the path is that of the true edit, the background all that is farther than 6 px from the
    source's first object."""
    clip, target = result.clip, world.parse_caption(result.caption)
    pairs = zip(clip.scene.objects, target.objects, strict=True)
    wanted = replace(clip.scene, objects=tuple(replace(o, colour=to.colour, shape=to.shape) for o, to in pairs))
    values = (
        instruments.trajectory_error_px(result.frames, world.render(wanted)[1]),
        instruments.colour_accuracy(result.frames, target),
        instruments.shape_accuracy(result.frames, target),
        instruments.kept_region_psnr_db(result.frames, clip.frames, clip.masks[:1]),
    )
    return dict(zip(FIGURES, values, strict=True))


def report(results: list[Result], seed: int) -> dict:
    """The content of figures.json."""
    table: dict[str, dict] = {method: {} for method in METHODS}
    for result in results:
        table[result.method][result.clip.name] = figures(result)
    clips = {r.clip.name: {"source": r.clip.caption, "edit": r.caption} for r in results}
    return {"n": len(results), "seed": seed, "clips": clips, "methods": table}


def incomplete(figures_report: dict) -> list[str]:
    """Method, clip and figure of every value that is missing or not finite."""
    return [
        f"{method}, {clip}: {name}"
        for method in METHODS
        for clip in figures_report["clips"]
        for name in FIGURES
        if not math.isfinite(figures_report["methods"].get(method, {}).get(clip, {}).get(name, math.nan))
    ]


def write_media(results: list[Result]) -> None:
    """The films of every edit, and one contact sheet of all."""
    for result in results:
        film = media.side_by_side(*result.panels)
        media.save_webp(OUTPUT / f"{result.name}.webp", film)
        media.save_mp4(OUTPUT / f"{result.name}.mp4", film)
    titles = [f"{r.method}: {r.clip.caption}  ->  {r.caption}" for r in results]
    sheet = media.contact_sheet([r.panels for r in results], ["source", "edit", "difference"], titles)
    sheet.save(OUTPUT / "contact_sheet.png")


def format_table(figures_report: dict) -> str:
    """The figures for a terminal."""
    lines = [f"{'':32}" + "".join(f"{name:>21}" for name in FIGURES)]
    for clip in figures_report["clips"]:
        for method in METHODS:
            row = figures_report["methods"][method][clip]
            lines.append(f"{clip}  {method:22}" + "".join(f"{row[name]:21.2f}" for name in FIGURES))
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    seed = parser.parse_args().seed
    OUTPUT.mkdir(parents=True, exist_ok=True)
    (OUTPUT / "figures.json").unlink(missing_ok=True)  # a failed run leaves no figures of an older one
    with LiveServer(host_path()) as server:
        results = run_edits(server, seed)
    summary = report(results, seed)
    (OUTPUT / "figures.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
    write_media(results)
    if missing := incomplete(summary):
        print("missing or not finite:", *missing, sep="\n  ", file=sys.stderr)
        return 1
    print(format_table(summary))
    print(f"look at {OUTPUT / 'contact_sheet.png'}, and the films beside it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
