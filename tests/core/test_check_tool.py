"""What `dev.py check` makes of a graph, without a server."""

import pytest
from spacetime_edit.tools.api_graphs import GraphError, read_graph
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
