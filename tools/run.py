"""Run a graph in API format on a real ComfyUI server with this pack, and say where its files are.

    python dev.py run WORKFLOW [--set node.input=value ...] [--out FOLDER]
    python dev.py run WORKFLOW --list      # its nodes, and what can be set

A clip, picture or mask on this machine may be set as the file of its loader: it is copied to the server's input folder.
WORKFLOW: a file that the editor's File > Export (API) wrote, or the name of a template. node: an id, a class such as
STE_InvertVideo, a title or the name in the editor; input: its id or its name in the editor. Exit status: 0 done, 1 a
node failed, 2 the graph or a setting is wrong.
"""

# ruff: noqa: E402 (the pack is loaded before it is imported)

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent))
from pack import ROOT, host_path, load_pack

load_pack(host=False)

from spacetime_edit.tools.api_graphs import (
    GraphError,
    Shown,
    bring_files,
    listed,
    read_graph,
    run_shown,
    set_inputs,
    wanted_models,
)
from spacetime_edit.tools.server import ExecutionFailed, LiveServer, PromptRejected


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workflow", help="a file, or the name of a template")
    parser.add_argument("--set", nargs="+", default=[], metavar="node.input=value", help="inputs to change")
    parser.add_argument("--out", type=Path, default=ROOT / "output" / "run", help="where its files go")
    parser.add_argument("--list", action="store_true", help="say what can be set, and end")
    arguments = parser.parse_args()
    try:
        graph = read_graph(arguments.workflow)
        set_inputs(graph, arguments.set)
        if arguments.list:
            print(listed(graph))
            return 0
        with LiveServer(host_path()) as server:
            bring_files(graph, server)
            entry = run_shown(server, graph, Shown())
            files = [file for file in server.output_files(entry) if file.parent.name != "temp"]
            for file in files:
                target = arguments.out / file.relative_to(server.output)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(file, target)
                print(target)
    except (GraphError, PromptRejected) as problem:
        print(f"run: {problem}", file=sys.stderr)
        if isinstance(problem, PromptRejected) and (wanted := wanted_models(arguments.workflow)):
            print(
                "\nThis template wants, in the ComfyUI that COMFYUI_PATH names:", *wanted, sep="\n  ", file=sys.stderr
            )
        return 2
    except ExecutionFailed as problem:
        print(f"run: {problem}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
