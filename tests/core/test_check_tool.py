"""What `dev.py check` makes of a graph, without a server."""

from types import SimpleNamespace

import pytest
from spacetime_edit.tools.api_graphs import GraphError, bring_files, read_graph
from spacetime_edit.tools.check import check_of


@pytest.mark.parametrize(
    "template",
    [
        "Check your model (tiny)",
        "Swap an object - STR-Match (Wan)",
        "Swap an object - STR-Match (LTX-2)",
        "Restyle a clip - DreamMotion (Zeroscope)",
    ],
)
def test_only_what_the_check_needs_is_left(template):
    graph = check_of(read_graph(template))
    kinds = [node["class_type"] for node in graph.values()]
    assert kinds.count("STE_CheckModel") == 1 and set(graph["check"]["inputs"]) >= {"model", "positive", "latent"}
    assert not {"STE_InvertVideo", "STE_VideoDDSOptimize", "SamplerCustomAdvanced", "SaveVideo"} & set(kinds)
    links = [value for node in graph.values() for value in node["inputs"].values() if isinstance(value, list)]
    assert all(link[0] in graph for link in links)


def test_a_graph_without_a_clip_is_refused():
    with pytest.raises(GraphError, match="has none of STE_CheckModel, STE_InvertVideo"):
        check_of({"1": {"class_type": "PreviewAny", "inputs": {}}})


def test_a_vae_alone_is_kept():
    """The node then takes its example clip."""
    graph = {
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": {}},
        "2": {"class_type": "STE_CheckModel", "inputs": {"model": ["1", 0], "positive": ["1", 1], "vae": ["1", 2]}},
    }
    assert check_of(graph)["check"]["inputs"]["vae"] == ["1", 2]


def test_files_of_this_machine_are_brought_to_the_server(tmp_path):
    clip, server = tmp_path / "a clip.mp4", SimpleNamespace(folder=tmp_path / "server")
    (server.folder / "input").mkdir(parents=True)
    clip.write_bytes(b"film")
    graph = {
        "1": {"class_type": "LoadVideo", "inputs": {"file": str(clip)}},
        "2": {"class_type": "LoadVideo", "inputs": {"file": "of the server.mp4"}},
    }
    bring_files(graph, server)
    assert graph["1"]["inputs"]["file"] == "a clip.mp4" and graph["2"]["inputs"]["file"] == "of the server.mp4"
    assert (server.folder / "input" / "a clip.mp4").read_bytes() == b"film"
