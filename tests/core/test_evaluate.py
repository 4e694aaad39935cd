"""What `dev.py evaluate` makes of a template, without a server: the graph of a case, films, rows, the page."""

import argparse
import json
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from spacetime_edit.tools import evaluate
from spacetime_edit.tools.api_graphs import GraphError, listed, read_graph, set_inputs, wanted_models
from spacetime_edit.tools.edit_datasets import Case, DatasetError, read_dataset

CLIPS = Path(__file__).resolve().parents[2] / "assets" / "tiny_clips"
CASE = Case("bear", "a bear walks", "a dog walks", Path("bear"))
NO_MODELS = argparse.Namespace(clip="", clip_vision="", raft="")
MODELS = argparse.Namespace(clip="c.safetensors", clip_vision="v.safetensors", raft="r.pth")


def linked(graph, kind, name):
    """The node that an input of the only node of a class is linked to."""
    (node,) = (node for node in graph.values() if node["class_type"] == kind)
    return graph[node["inputs"][name][0]]


@pytest.mark.parametrize(
    "template",
    [
        "Swap an object - prompt swap (tiny)",
        "Swap an object - STR-Match (tiny)",
        "Recolour the clip - DreamMotion (tiny)",
        "Swap an object - STR-Match (Wan)",
        "Swap an object - STR-Match (Wan 2.2)",
        "Restyle a clip - DreamMotion (Zeroscope)",
    ],
)
def test_a_case_takes_the_place_of_the_templates_clip_and_prompts(template):
    before = read_graph(template)
    graph = evaluate.prepared(before, CASE, "bear.mkv", None, NO_MODELS)
    texts = [n["inputs"].get("text") for n in graph.values() if n["class_type"] == "CLIPTextEncode"]
    assert sorted(texts) == sorted(["", CASE.source, CASE.edit])
    loaders = [n["inputs"]["file"] for n in graph.values() if n["class_type"] == "LoadVideo"]
    assert loaders == ["bear.mkv"] and not any(n["class_type"] == evaluate.EXAMPLE for n in graph.values())
    links = [link for n in graph.values() for link in n["inputs"].values() if isinstance(link, list)]
    assert all(link[0] in graph for link in links)
    metrics = graph["metrics"]["inputs"]
    assert graph[metrics["edit"][0]]["class_type"] == "VAEDecode" and metrics["prompt"] == CASE.edit
    assert before == read_graph(template), "the template itself stays"


def test_a_mask_goes_where_the_template_has_one_and_to_the_metrics():
    name = "Keep the background exactly - STR-Match with mask (tiny)"
    graph = evaluate.prepared(read_graph(name), CASE, "bear.mkv", "mask.mkv", MODELS)
    assert linked(graph, "STE_STRLatentOptimizer", "mask")["class_type"] == "ImageToMask"
    assert linked(graph, "STE_VideoEditMetrics", "mask")["class_type"] == "ImageToMask"
    assert linked(graph, "STE_VideoEditMetrics", "clip_vision")["inputs"] == {"clip_name": "v.safetensors"}
    assert linked(graph, "STE_VideoEditMetrics", "optical_flow")["class_type"] == "OpticalFlowLoader"
    with pytest.raises(GraphError, match="the template wants a mask, and bear has none"):
        evaluate.prepared(read_graph(name), CASE, "bear.mkv", None, NO_MODELS)
    graph = evaluate.prepared(read_graph("Swap an object - STR-Match (Wan)"), CASE, "b.mkv", "m.mkv", NO_MODELS)
    assert linked(graph, "STE_FitClipToModel", "mask")["class_type"] == "ImageToMask"
    assert linked(graph, "STE_VideoEditMetrics", "mask")["class_type"] == "STE_FitClipToModel"


def test_a_graph_without_clip_or_edit_is_refused():
    with pytest.raises(GraphError, match="no Image Stitch of clip and edit"):
        evaluate.prepared({"1": {"class_type": "KSampler", "inputs": {}}}, CASE, "", None, NO_MODELS)


def test_inputs_are_set_by_id_class_and_title():
    graph = {
        "1": {"class_type": "KSampler", "inputs": {"steps": 20, "name": "a"}, "_meta": {"title": "Draw it"}},
        "2": {"class_type": "VAEDecode", "inputs": {"samples": ["1", 0]}},
    }
    set_inputs(graph, ["KSampler.steps=5", "Draw it.name=b=c"])
    assert graph["1"]["inputs"] == {"steps": 5, "name": "b=c"}
    own = read_graph("Swap an object - STR-Match (tiny)")
    set_inputs(own, ["STR Latent Optimizer.lambda=0.02", "Negative prompt.text=blurry", "Invert Video.steps=3"])
    changed = {node["class_type"]: node["inputs"] for node in own.values()}
    assert changed["STE_STRLatentOptimizer"]["strength"] == 0.02 and changed["STE_InvertVideo"]["steps"] == 3
    assert [n["inputs"]["text"] for n in own.values() if n["class_type"] == "CLIPTextEncode"].count("blurry") == 1
    assert "STE_STRLatentOptimizer  (STR Latent Optimizer)\n    strength (lambda) = 0.02" in listed(own)
    for setting, message in (
        ("steps=5", "expected node.input=value"),
        ("Sampler.steps=5", "no such node; there are KSampler, VAEDecode"),
        ("1.step=5", "KSampler has steps, name"),
        ("Sampler.1.steps=5", "no such node"),
    ):
        with pytest.raises(GraphError, match=message):
            set_inputs(graph, [setting])


def test_graphs_that_are_none_are_named(tmp_path):
    assert read_graph("Swap an object - STR-Match (tiny)")["1"]["class_type"] == "STE_LoadVideoDiffusersModel"
    (tmp_path / "ui.json").write_text('{"nodes": []}')
    (tmp_path / "text.json").write_text("{")
    (tmp_path / "list.json").write_text("[]")
    for name, message in (
        ("none", "no such file, and no template"),
        ("Swap an object", "do you mean 'Swap an object - "),
        ("ui.json", "export it with File > Export"),
        ("text.json", "it is no JSON"),
        ("list.json", "it is no graph in API format"),
    ):
        with pytest.raises(GraphError, match=message):
            read_graph(str(tmp_path / name))


def test_frames_become_a_film_without_loss(tmp_path):
    case = read_dataset(CLIPS)[1][0]
    name = evaluate.film_of(case.files(), tmp_path, "clip")
    with av.open(str(tmp_path / name)) as film:
        seen = [frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)]
    wanted = [np.array(Image.open(file).convert("RGB")) for file in case.files()]
    assert len(seen) == 8 and all(np.array_equal(a, b) for a, b in zip(seen, wanted, strict=True))
    mask = Image.new("P", (6, 4))
    mask.putpixel((2, 1), 3)
    mask.save(tmp_path / "00000.png")
    name = evaluate.film_of([tmp_path / "00000.png"], tmp_path, "mask", as_mask=True)
    with av.open(str(tmp_path / name)) as film:
        (frame,) = (frame.to_ndarray(format="rgb24") for frame in film.decode(video=0))
    assert frame[1, 2].tolist() == [255] * 3 and frame.sum() == 3 * 255
    Image.new("RGB", (8, 4)).save(tmp_path / "00001.png")
    with pytest.raises(OSError, match=r"00001.png: its size is not that of the first frame, 6 x 4"):
        evaluate.film_of([tmp_path / "00000.png", tmp_path / "00001.png"], tmp_path, "both")


def test_rows_are_kept_and_those_of_another_run_are_not_mixed_in(tmp_path):
    results = evaluate.Results(tmp_path, {"template": "a", "settings": ""})
    row = {"id": "x", "source": "a <b>", "edit": "c", "metrics": {"psnr": 20.0, "clip": None}, "problem": ""}
    results.put(row | {"seconds": 1.0, "film": "films/x.webp"})
    results.put(row | {"id": "y", "metrics": {}, "problem": "missing: clip", "seconds": 0.0, "film": None})
    again = evaluate.Results(tmp_path, {"template": "a", "settings": ""})
    assert again.rows == results.rows and again.means == {"psnr": (20.0, 1)}
    assert (tmp_path / "results.csv").read_text().splitlines()[1] == "x,a <b>,c,1.0,,20.0,"
    page = evaluate.report(again)
    assert "a &lt;b&gt;" in page and "missing: clip" in page and 'src="films/x.webp"' in page
    with pytest.raises(DatasetError, match=r"rows of another run \(settings differ\)"):
        evaluate.Results(tmp_path, {"template": "a", "settings": "1.steps=2"})
    assert json.loads((tmp_path / "results.json").read_text())["about"]["template"] == "a"


def test_what_a_template_wants_is_named_with_its_place():
    wanted = wanted_models("Swap an object - STR-Match (LTX-Video)")
    assert (
        wanted[0].startswith("models/checkpoints/ltx-video-2b-v0.9.5.safetensors  from https://") and len(wanted) == 2
    )
    assert wanted_models("Swap an object - STR-Match (tiny)") == [] == wanted_models("some file.json")
