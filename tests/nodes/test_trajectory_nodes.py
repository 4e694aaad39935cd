"""Save and Load Trajectory in a graph: what they hand over, show, refuse and notice."""

import os

import folder_paths
import nodes
import pytest
import torch
from safetensors import safe_open
from spacetime_edit.host.loaders.unet3d import EMBEDDED
from spacetime_edit.host.trajectory_files import SUFFIX
from spacetime_edit.nodes.load_trajectory import LoadTrajectory
from spacetime_edit.nodes.save_trajectory import SaveTrajectory
from spacetime_edit.tests.host import support
from spacetime_edit.tests.nodes import test_edit_nodes

NAME = f"trajectories/clip_00001_{SUFFIX} [output]"
executor = test_edit_nodes.executor


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """The host's input and output folders, of this test alone."""
    for name in ("input", "output"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(folder_paths, f"{name}_directory", str(tmp_path / name))
    return tmp_path


@pytest.fixture
def graph(tiny):
    return test_edit_nodes.Graph(tiny.model, support.encode(tiny))


@pytest.fixture
def inverted(graph):
    return graph.invert().result


def test_a_graph_edits_from_a_loaded_trajectory_as_from_the_inversion(graph, inverted):
    trajectory, sigmas = inverted
    output = SaveTrajectory.execute(trajectory, "trajectories/clip")
    assert output.result == (trajectory,)
    calls = graph.counter.calls
    loaded, loaded_sigmas = LoadTrajectory.execute(NAME, graph.model, graph.positive, latent=graph.latent).result
    assert graph.counter.calls == calls, "loading ran the model"
    assert torch.equal(loaded_sigmas, sigmas)
    assert torch.equal(graph.run(graph.sample(loaded), loaded_sigmas), graph.run(graph.sample(trajectory), sigmas))


def test_use_anyway_is_off_by_default(graph, inverted, tiny):
    SaveTrajectory.execute(inverted[0], "trajectories/clip")
    other = support.encode(tiny, support.EDIT_PROMPT)
    with test_edit_nodes.refused(graph, r"^file: .*\n- prompt"):
        LoadTrajectory.execute(NAME, graph.model, other)
    assert LoadTrajectory.execute(NAME, graph.model, other, use_anyway=True).result[0].conditioning is other


def test_new_files_are_in_the_list(inverted):
    def options():
        return LoadTrajectory.define_schema().inputs[0].options

    assert options() == []
    SaveTrajectory.execute(inverted[0], "trajectories/clip")
    assert options() == [NAME]


def test_a_file_that_changes_is_loaded_again(inverted, folders):
    SaveTrajectory.execute(inverted[0], "trajectories/clip")
    path = folders / "output" / NAME.removesuffix(" [output]")
    before = LoadTrajectory.fingerprint_inputs(NAME, model=None, positive=None, use_anyway=False)
    assert LoadTrajectory.fingerprint_inputs(NAME) == before
    os.utime(path, ns=(1, 1))
    assert LoadTrajectory.fingerprint_inputs(NAME) != before


@pytest.mark.parametrize(
    ("node", "given", "words"),
    [
        (LoadTrajectory, {"file": f"../x{SUFFIX}"}, "file: "),
        (LoadTrajectory, {"file": f"absent{SUFFIX}"}, "is not there"),
        (SaveTrajectory, {"filename_prefix": "../x"}, "filename_prefix: "),
    ],
)
def test_wrong_names_stop_the_prompt_before_anything_runs(node, given, words):
    assert words in node.validate_inputs(**given)
    assert node.validate_inputs(**dict.fromkeys(given)) is True, "a linked name is checked when it is there"


def prompt_of(*parts):
    clip = test_edit_nodes.LoadExampleClip.define_schema().inputs[0].options[0]
    steps = {"steps": 2, "scheduler": "simple", "refinements": 0, "check_reconstruction": False}
    graph = {
        "1": ("STE_LoadVideoDiffusersModel", {"model_name": EMBEDDED, "weight_dtype": "default"}),
        "2": ("STE_LoadExampleClip", {"clip": clip, "edit": 1}),
        "3": ("CLIPTextEncode", {"clip": ["1", 1], "text": ["2", 3]}),
        "4": ("VAEEncode", {"pixels": ["2", 0], "vae": ["1", 2]}),
        "5": ("STE_InvertVideo", {"model": ["1", 0], "positive": ["3", 0], "latent": ["4", 0], **steps}),
        "6": ("STE_SaveTrajectory", {"trajectory": ["5", 0], "filename_prefix": "trajectories/clip"}),
        "7": (
            "STE_LoadTrajectory",
            {"file": NAME, "model": ["1", 0], "positive": ["3", 0], "latent": ["4", 0], "use_anyway": False},
        ),
        "8": ("STE_SaveTrajectory", {"trajectory": ["7", 0], "filename_prefix": "again"}),
    }
    return {key: {"class_type": graph[key][0], "inputs": graph[key][1]} for key in parts}


def test_two_sessions_of_the_host(executor, monkeypatch, folders):
    """One saves; the next loads its model anew, checks prompt and clip, and saves the same file."""
    for node in (SaveTrajectory, LoadTrajectory):
        monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, node.define_schema().node_id, node)
    success, messages, outputs = executor(prompt_of(*"123456"))
    assert success, [data for event, data in messages if event == "execution_error"]
    (text,) = [text for event, text in messages if event == "text on node 6"]
    assert text.startswith(f"Saved output/trajectories/clip_00001_{SUFFIX}, 0.1 MB") and text in str(outputs["6"])
    success, messages, _ = executor(prompt_of(*"123478"))
    assert success, [data for event, data in messages if event == "execution_error"]
    files = [safe_open(path, "pt") for path in (folders / "output").rglob(f"*{SUFFIX}")]
    assert len(files) == 2 and files[0].metadata() == files[1].metadata()
    assert all(torch.equal(files[0].get_tensor(part), files[1].get_tensor(part)) for part in ("latents", "sigmas"))


def test_the_host_says_what_is_wrong_with_a_file_name(executor, monkeypatch):
    for node in (SaveTrajectory, LoadTrajectory):
        monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, node.define_schema().node_id, node)
    success, errors, _ = executor(prompt_of(*"123478"))
    assert not success
    assert any("is not there" in error["details"] for error in errors["7"]["errors"]), errors
