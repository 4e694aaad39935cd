"""The archive for the registry in a ComfyUI that knows nothing of this repository."""

import zipfile

import pytest
from spacetime_edit.tools.build_archive import build
from spacetime_edit.tools.pack import host_path
from spacetime_edit.tools.server import LiveServer
from spacetime_edit.tools.templates import WORKFLOWS, read, templates

pytestmark = pytest.mark.workflows

SIZE = 25e6  # bytes that a user downloads, at most


def test_the_archive_loads_in_a_bare_comfyui_and_edits(tmp_path):
    archive = build(tmp_path / "pack.zip")
    assert archive.stat().st_size < SIZE
    folder = tmp_path / "base" / "custom_nodes" / "spacetime-edit"
    with zipfile.ZipFile(archive) as file:
        file.extractall(folder)
    assert not any((folder / name).exists() for name in ("tests", "tools", "benchmarks", "dev.py"))
    with LiveServer(host_path(), tmp_path / "server", ["--base-directory", tmp_path / "base"]) as server:
        ours = [node for node in server.get("/object_info").values() if node["name"].startswith("STE_")]
        assert len(ours) > 20 and "Cannot import" not in server.log_tail(1000), server.log_tail(1000)
        listed = server.get("/api/workflow_templates")["spacetime-edit"]
        assert sorted(listed) == [template.stem for template in templates()]
        blocks = [own["name"] for own in server.get("/global_subgraphs").values() if "spacetime" in str(own["info"])]
        assert sorted(blocks) == ["Edit Regions (ST-Layout)", "Edit Video (DreamMotion)", "Edit Video (STR-Match)"]
        graph = read(WORKFLOWS / "api" / "Swap an object - prompt swap (tiny).json")
        for node in graph.values():
            if node["class_type"] == "STE_InvertVideo":
                node["inputs"] |= {"steps": 2, "refinements": 0}
        assert len(server.output_files(server.queue(graph))) == 9
