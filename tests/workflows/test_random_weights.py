"""Templates of models that tests have not, to their end, with tiny ones of the same layout and random weights."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from spacetime_edit.tools.pack import host_path
from spacetime_edit.tools.server import LiveServer
from spacetime_edit.tools.templates import WORKFLOWS, read

pytestmark = pytest.mark.workflows

EMBEDDED = "embedded tiny model"
FRAMES = 17  # of a clip; the embedded ones have 8
CLIP = {
    "class_type": "STE_LoadExampleClip",
    "inputs": {"clip": "clip_00 - a red circle on a gray background", "edit": 1},
}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    models = tmp_path_factory.mktemp("models")
    script = Path(__file__).with_name("random_models.py")
    subprocess.run([sys.executable, script, models], check=True, timeout=300)
    paths = tmp_path_factory.mktemp("config") / "extra_model_paths.yaml"
    kinds = {"diffusers": "diffusers", "diffusion_models": "diffusion_models"}
    paths.write_text(json.dumps({"random": {"base_path": str(models), **kinds}}))  # JSON is YAML
    folder = tmp_path_factory.mktemp("server")
    with LiveServer(host_path(), folder, ["--extra-model-paths-config", paths]) as server:
        yield server


def changed(name: str, **inputs: dict) -> dict:
    """A template in API form, with inputs by class of node changed and the clip in place of a film of the user's."""
    graph = read(WORKFLOWS / "api" / f"{name}.json")
    for node in graph.values():
        node["inputs"].update(inputs.get(node["class_type"], {}))
    parts = next(key for key, node in graph.items() if node["class_type"] == "GetVideoComponents")
    film = graph[parts]["inputs"]["video"][0]
    graph[film] = CLIP
    for node in graph.values():
        node["inputs"] = {key: value for key, value in node["inputs"].items() if value != [parts, 1]}  # it has no sound
        for key, value in node["inputs"].items():
            if value == [parts, 0]:
                node["inputs"][key] = [film, 0]
            elif value == [parts, 2]:
                node["inputs"][key] = 8.0
    del graph[parts]
    return graph


def embedded_instead_of(graph: dict, kind: str, name: str) -> None:
    """The loaders of this class whose model has this name load the embedded model."""
    for node in graph.values():
        if node["class_type"] == kind and name in node["inputs"].values():
            node["class_type"], node["inputs"] = (
                "STE_LoadVideoDiffusersModel",
                {"model_name": EMBEDDED, "weight_dtype": "default"},
            )


def test_dreammotion_on_key_frames_in_pixels(server):
    graph = changed(
        "Restyle key frames in pixels - DreamMotion (Show-1)",
        STE_VideoDDSOptimize={"steps": 2},
        ImageScale={"width": 128, "height": 128},
        KSampler={"steps": 2},
    )
    embedded_instead_of(graph, "STE_LoadVideoDiffusersModel", "zeroscope_v2_576w")
    entry = server.queue(graph)
    assert all(file.stat().st_size > 0 for file in server.output_files(entry))


def test_str_match_on_lavie(server):
    graph = changed("Swap an object - STR-Match (LaVie)", STE_InvertVideo={"steps": 4})
    embedded_instead_of(graph, "CheckpointLoaderSimple", "v1-5-pruned-emaonly-fp16.safetensors")
    entry = server.queue(graph)
    files = server.output_files(entry)
    assert len(files) >= 2 and all(file.stat().st_size > 0 for file in files)


def without_autoencoder(graph: dict) -> dict:
    """A template of a transformer without its autoencoder and text encoder, which have no tiny form.

    From an empty latent to an edited one, by the embedded model's prompts.
    """
    (text,) = (key for key, node in graph.items() if node["class_type"] == "CLIPLoader")
    graph[text] = {
        "class_type": "STE_LoadVideoDiffusersModel",
        "inputs": {"model_name": EMBEDDED, "weight_dtype": "default"},
    }
    for node in graph.values():
        node["inputs"] = {key: [text, 1] if value == [text, 0] else value for key, value in node["inputs"].items()}
        if node["class_type"] == "VAEEncode":
            node["class_type"] = "EmptyHunyuanLatentVideo"
            node["inputs"] = {"width": 64, "height": 64, "length": FRAMES, "batch_size": 1}
        elif node["class_type"] == "VAEDecode":
            node["class_type"] = "SaveLatent"
            node["inputs"] = {"samples": node["inputs"]["samples"], "filename_prefix": "latents/edit"}
    drawn = ("CreateVideo", "SaveVideo", "ImageStitch", "VAELoader")
    return {key: node for key, node in graph.items() if node["class_type"] not in drawn}


@pytest.mark.parametrize(
    "name",
    [
        "Swap an object - STR-Match (CogVideoX)",
        "Swap an object - STR-Match (Wan)",
        "Swap an object - STR-Match (Wan 2.2)",
        "Swap an object in a long clip - STR-Match (Wan)",
        "Several objects - ST-Layout (Wan)",
    ],
)
def test_templates_of_transformers(server, name):
    graph = changed(
        name,
        STE_InvertVideo={"steps": 4},
        WanContextWindowsManual={"context_length": 9, "context_overlap": 4},
        STE_EncodeRegionalPrompt={"prompt": "a blue square and a red circle on a gray background"},
    )
    phrases = iter(["a blue square", "a red circle"])
    for node in graph.values():
        if node["class_type"] == "STE_RegionPrompt":
            node["inputs"]["phrase"] = next(phrases)
        if node["class_type"] == "STE_MaskFromBoxes":
            node["inputs"]["boxes"] = "0: 8, 8, 20, 40"
    files = server.output_files(server.queue(without_autoencoder(graph)))
    assert any(file.suffix == ".latent" and file.stat().st_size > 0 for file in files)
