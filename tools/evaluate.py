"""Run a template over a dataset of clips on a real ComfyUI server, and measure every edit.

    python dev.py evaluate DATASET [--template NAME] [--set node.input=value ...] [--limit N] [--out FOLDER]
                           [--clip-vision FILE --clip FILE] [--raft FILE]

DATASET: a folder in the layout of FiVE-Bench, TGVE (LOVEU 2023), DAVIS, the embedded clips (assets/tiny_clips, the
default) or plain `videos/ + prompts.csv + masks/`; see tools/edit_datasets.py. Nothing is downloaded.

The template's own clip and prompts are replaced by the dataset's; its masks too, where it has some, else they are only
measured with. In FOLDER: results.csv and results.json, one row a clip, the films, and report.html. The same command
again goes on where it stopped; rows that failed are tried again. --clip-vision and --clip (a CLIP with text projection)
add the metrics by CLIP, --raft the host's flow; all are names of files as in the loaders of ComfyUI.

Exit status: 0 all rows are there, 1 some failed, 2 a wrong dataset, template or setting.
"""

# ruff: noqa: E402 (the pack is loaded before it is imported)

from __future__ import annotations

import argparse
import csv
import hashlib
import html
import json
import os
import shutil
import sys
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

sys.path.append(str(Path(__file__).resolve().parent))
from pack import ROOT, host_path, load_pack

load_pack(host=False)

from spacetime_edit.tools.api_graphs import Graph, GraphError, quietly, read_graph, run_shown, set_inputs
from spacetime_edit.tools.edit_datasets import PICTURE, Case, DatasetError, read_dataset
from spacetime_edit.tools.server import ExecutionFailed, LiveServer, PromptRejected

TEMPLATE = "Swap an object - STR-Match (tiny)"
EXAMPLE = "STE_LoadExampleClip"
IMAGES, MASK_1, MASK_2, SOURCE_PROMPT, EDIT_PROMPT, FPS = range(6)  # its outputs
PLAYED = 8  # frames a second of clips that come as pictures
PROMPTS = {"CLIPTextEncode": "text", "STE_EncodeRegionalPrompt": "prompt"}


# --- the graph ----------------------------------------------------------


def prepared(graph: Graph, case: Case, clip: str, mask: str | None, models: argparse.Namespace) -> Graph:
    """The template's graph with a case in it: its clip, prompts and mask, and the metrics behind it.

    clip, mask: names of films in the server's input folder. GraphError for a template that edits no clip, or none of
    the user's.
    """
    graph = json.loads(json.dumps(graph))
    stitch = next((n for n in graph.values() if n["class_type"] == "ImageStitch"), None)
    if stitch is None:
        raise GraphError("the template has no Image Stitch of clip and edit, so it is not known what to measure")
    graph["case video"] = {"class_type": "LoadVideo", "inputs": {"file": clip}}
    graph["case parts"] = {"class_type": "GetVideoComponents", "inputs": {"video": ["case video", 0]}}
    where = _mask(graph, case, mask)
    _replace_clip(graph, case, where)
    _write_prompts(graph, case)
    fit = next((key for key, n in graph.items() if n["class_type"] == "STE_FitClipToModel"), None)
    if fit and where:
        graph[fit]["inputs"]["mask"] = where
        where = [fit, 1]
    inputs = {"source": stitch["inputs"]["image1"], "edit": stitch["inputs"]["image2"], "prompt": case.edit}
    inputs |= {"mask": where} if where else {}
    loaders = {
        "clip_vision": ("CLIPVisionLoader", {"clip_name": models.clip_vision}),
        "clip": ("CLIPLoader", {"clip_name": models.clip, "type": "stable_diffusion"}),
        "optical_flow": ("OpticalFlowLoader", {"model_name": models.raft}),
    }
    for name, (kind, values) in loaders.items():
        if all(values.values()):
            graph[f"metric {name}"] = {"class_type": kind, "inputs": values}
            inputs[name] = [f"metric {name}", 0]
    graph["metrics"] = {"class_type": "STE_VideoEditMetrics", "inputs": inputs}
    graph["values"] = {"class_type": "PreviewAny", "inputs": {"source": ["metrics", 2]}}
    return graph


def _mask(graph: Graph, case: Case, file: str | None) -> list | None:
    """The link to the case's mask, 1 = edited; None where it has none."""
    if file is None:
        return None
    graph["case mask video"] = {"class_type": "LoadVideo", "inputs": {"file": file}}
    graph["case mask parts"] = {"class_type": "GetVideoComponents", "inputs": {"video": ["case mask video", 0]}}
    graph["case mask"] = {
        "class_type": "ImageToMask",
        "inputs": {"image": ["case mask parts", 0], "channel": "red"},
    }
    return ["case mask", 0]


def _replace_clip(graph: Graph, case: Case, mask: list | None) -> None:
    """Links to the template's own clip lead to the case's."""
    examples = [key for key, n in graph.items() if n["class_type"] == EXAMPLE]
    own = [key for key, n in graph.items() if n["class_type"] == "GetVideoComponents" and not key.startswith("case")]
    if not examples and not own:
        raise GraphError("the template loads no clip (Load Example Clip, or Load Video with Get Video Components)")
    values = {IMAGES: ["case parts", 0], FPS: float(PLAYED), SOURCE_PROMPT: case.source, EDIT_PROMPT: case.edit}
    for node in graph.values():
        for name, link in list(node["inputs"].items()):
            if not isinstance(link, list) or link[0] not in (*examples, *own):
                continue
            if link[0] in own:
                node["inputs"][name] = ["case parts", link[1]]
            elif link[1] in (MASK_1, MASK_2):
                if mask is None:
                    raise GraphError(f"the template wants a mask, and {case.id} has none")
                node["inputs"][name] = mask
            else:
                node["inputs"][name] = values[link[1]]
    for key in (*examples, *own):
        del graph[key]
    used = {link[0] for n in graph.values() for link in n["inputs"].values() if isinstance(link, list)}
    for key in [k for k, n in graph.items() if n["class_type"] == "LoadVideo" and k not in used]:
        del graph[key]


def _write_prompts(graph: Graph, case: Case) -> None:
    """The prompts of clip and edit, found by what they are connected to."""
    of_clip, of_edit = set(), set()
    for node in graph.values():
        kind, inputs = node["class_type"], node["inputs"]
        if kind == "STE_InvertVideo":
            of_clip.add(_prompt_node(graph, inputs["positive"]))
        elif kind == "STE_VideoDDSOptimize":
            of_clip.add(_prompt_node(graph, inputs["source_positive"]))
            of_edit.add(_prompt_node(graph, inputs["positive"]))
        elif kind in ("CFGGuider", "KSampler", "SamplerCustom"):
            of_edit.add(_prompt_node(graph, inputs["positive"]))
    for nodes, text in ((of_clip - of_edit, case.source), (of_edit, case.edit)):
        for key in filter(None, nodes):
            graph[key]["inputs"][PROMPTS[graph[key]["class_type"]]] = text
    if not any(of_clip) or not any(of_edit):
        raise GraphError("the template has no prompt of the clip and of the edit that could be replaced")


def _prompt_node(graph: Graph, link: list) -> str | None:
    """The node with the text of a conditioning, through those that pass it on."""
    node = graph[link[0]]
    if node["class_type"] in PROMPTS:
        return link[0]
    behind = node["inputs"].get("positive")
    return None if behind is None else _prompt_node(graph, behind)


# --- clips as films -----------------------------------------------------


def film_of(files: list[Path], folder: Path, name: str, as_mask: bool = False) -> str:
    """The name of a film in `folder` with these frames, without loss; a film is copied. as_mask: white, where not 0."""
    if len(files) == 1 and files[0].suffix.lower() not in PICTURE:
        shutil.copy2(files[0], folder / (name + files[0].suffix))
        return name + files[0].suffix
    if not files:
        raise FileNotFoundError("no frames in it")
    with av.open(str(folder / f"{name}.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=Fraction(PLAYED))
        stream.pix_fmt, size = "bgr0", None
        for file in files:
            with Image.open(file) as picture:
                pixels = _white(picture) if as_mask else np.array(picture.convert("RGB"))
            if size is None:
                stream.height, stream.width = size = pixels.shape[:2]
            if pixels.shape[:2] != size:
                raise OSError(f"{file.name}: its size is not that of the first frame, {size[1]} x {size[0]}")
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return f"{name}.mkv"


def _white(picture: Image.Image) -> np.ndarray:
    """A mask as a picture: in one of colours by number (DAVIS) every number but 0 is white."""
    if picture.mode == "P":
        return np.where(np.array(picture) > 0, 255, 0).astype(np.uint8)[..., None].repeat(3, 2)
    return np.array(picture.convert("L"))[..., None].repeat(3, 2)


# --- results ------------------------------------------------------------


class Results:
    """Rows by id in results.json, and as CSV; of one template, dataset and settings."""

    def __init__(self, folder: Path, about: dict):
        self.folder, self.about = folder, about
        self.rows: dict[str, dict] = {}
        if (file := folder / "results.json").is_file():
            found = json.loads(file.read_text(encoding="utf-8"))
            if found["about"] != about:
                different = [key for key in about if found["about"].get(key) != about[key]]
                raise DatasetError(
                    f"{file}: it holds rows of another run ({', '.join(different)} differ); choose another --out"
                )
            self.rows = {row["id"]: row for row in found["rows"]}

    def put(self, row: dict) -> None:
        self.rows[row["id"]] = row
        self.write()

    def write(self) -> None:
        rows = list(self.rows.values())
        _replace(self.folder / "results.json", json.dumps({"about": self.about, "rows": rows}, indent=1))
        names = list(dict.fromkeys(name for row in rows for name in row["metrics"]))
        lines = [["id", "source", "edit", "seconds", "problem", *names]]
        for row in rows:
            values = [row["metrics"].get(name) for name in names]
            lines.append([row["id"], row["source"], row["edit"], row["seconds"], row["problem"], *values])
        partial = self.folder / "results.csv.partial"
        with partial.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows(lines)
        os.replace(partial, self.folder / "results.csv")

    @property
    def means(self) -> dict[str, tuple[float, int]]:
        """Of each metric that some row has: its mean and in how many rows it is."""
        values: dict[str, list[float]] = {}
        for row in self.rows.values():
            for name, value in row["metrics"].items():
                if value is not None:
                    values.setdefault(name, []).append(value)
        return {name: (sum(own) / len(own), len(own)) for name, own in values.items()}


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text + "\n", encoding="utf-8")
    os.replace(partial, path)


def report(results: Results) -> str:
    """A page with means, and each edit with its film."""
    say = html.escape
    means = "".join(f"<tr><td>{say(k)}<td>{v:.4g}<td>{n}" for k, (v, n) in results.means.items())
    about = "".join(f"<tr><td>{say(k)}<td>{say(str(v))}" for k, v in results.about.items())
    parts = []
    for row in results.rows.values():
        film = row.get("film")
        if row["problem"]:
            seen = f"<p class=problem>{say(row['problem'])}"
        elif film and film.endswith((".webp", ".gif", ".png")):
            seen = f'<img src="{say(film)}" alt="clip and edit">'
        else:
            seen = f'<video src="{say(film or "")}" controls loop muted></video>'
        values = "".join(f"<tr><td>{say(k)}<td>{v:.4g}" for k, v in row["metrics"].items() if v is not None)
        prompts = f"<p>{say(row['source'])}<br>&rarr; {say(row['edit'])}"
        parts.append(f"<section><h2>{say(row['id'])}</h2>{prompts}<div>{seen}<table>{values}</table></div></section>")
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>Evaluation</title><style>
body {{ font: 15px/1.4 system-ui, sans-serif; margin: 2em auto; max-width: 70em; padding: 0 1em }}
table {{ border-collapse: collapse }} td {{ padding: 0 1em 0 0 }} img, video {{ max-width: 40em; width: 100% }}
section div {{ display: flex; flex-wrap: wrap; gap: 1em; align-items: start }} .problem {{ color: #b00 }}
</style><h1>Evaluation</h1><table>{about}</table><h2>Means</h2>
<table><tr><th>metric<th>mean<th>clips{means}</table>{"".join(parts)}</html>"""


# --- running ------------------------------------------------------------


def evaluate_case(server: LiveServer, graph: Graph, case: Case, models: argparse.Namespace, films: Path) -> dict:
    """The row of a case."""
    row = {"id": case.id, "source": case.source, "edit": case.edit, "metrics": {}, "problem": "", "film": None}
    started = time.monotonic()
    try:
        if case.missing:
            raise FileNotFoundError(f"missing: {case.missing}")
        name = hashlib.sha256(case.id.encode()).hexdigest()[:16]
        clip = film_of(case.files(), server.folder / "input", name)
        mask = None
        if case.mask is not None:
            mask = film_of(case.files(of_mask=True), server.folder / "input", f"{name}_mask", as_mask=True)
        entry = run_shown(server, prepared(graph, case, clip, mask, models), quietly)
        row["metrics"] = json.loads(entry["outputs"]["values"]["text"][0])
        made = [file for file in server.output_files(entry) if server.output in file.parents]
        moving = [file for file in made if file.suffix in (".webp", ".mp4", ".webm", ".gif")]
        if moving or made:
            film = (moving or made)[-1]
            films.mkdir(parents=True, exist_ok=True)
            shutil.copy2(film, films / f"{name}{film.suffix}")
            row["film"] = f"{films.name}/{name}{film.suffix}"
    except (ExecutionFailed, PromptRejected, OSError, av.FFmpegError) as problem:
        row["problem"] = str(problem).strip().splitlines()[0]
    return row | {"seconds": round(time.monotonic() - started, 1)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", nargs="?", type=Path, default=ROOT / "assets" / "tiny_clips")
    parser.add_argument("--template", default=TEMPLATE, help="its name, or a file in API format")
    parser.add_argument("--set", nargs="+", default=[], metavar="node.input=value", help="inputs to change")
    parser.add_argument("--limit", type=int, default=0, help="only so many rows; 0: all")
    parser.add_argument("--out", type=Path, default=ROOT / "output" / "evaluation")
    for name in ("clip", "clip-vision", "raft"):
        parser.add_argument(f"--{name}", default="", help="a model file, as in ComfyUI's loader")
    arguments = parser.parse_args()
    try:
        layout, cases = read_dataset(arguments.dataset)
        cases = cases[: arguments.limit or None]
        graph = read_graph(arguments.template)
        set_inputs(graph, arguments.set)
        for case in cases:
            prepared(graph, case, "", "" if case.mask else None, arguments)  # what is wrong is said before any run
        about = {"dataset": arguments.dataset.name, "layout": layout, "template": Path(arguments.template).stem}
        about |= {"settings": " ".join(arguments.set)}
        about |= {name: getattr(arguments, name) for name in ("clip", "clip_vision", "raft")}
        arguments.out.mkdir(parents=True, exist_ok=True)
        results = Results(arguments.out, about)
    except (DatasetError, GraphError) as problem:
        print(f"evaluate: {problem}", file=sys.stderr)
        return 2
    left = [case for case in cases if results.rows.get(case.id, {"problem": "not run"})["problem"]]
    print(f"{layout}: {len(cases)} edits, {len(cases) - len(left)} of them done before")
    if left:
        with LiveServer(host_path()) as server:
            for case in left:
                print(f"{case.id}: {case.source} -> {case.edit}")
                row = evaluate_case(server, graph, case, arguments, arguments.out / "films")
                results.put(row)
                print(row["problem"] or f"done in {row['seconds']:.0f} s")
    _replace(arguments.out / "report.html", report(results))
    for name, (mean, count) in results.means.items():
        print(f"{name:32} {mean:10.4g}  ({count})")
    print(arguments.out / "report.html")
    failed = [row for row in results.rows.values() if row["problem"]]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
