"""Check Model without the editor: on the model, the prompt and the clip of a template or of a graph in API format.

    python dev.py check [WORKFLOW] [--set node.input=value ...] [--json FILE]

WORKFLOW: as of `dev.py run`, by default the template on the embedded model. What its Invert Video or Video DDS Optimize
gets is tried, and nothing else of it runs. The report is printed; the JSON holds no prompts and no names. Exit status:
0 all works, 1 something is broken, 2 the graph or a setting is wrong.
"""

# ruff: noqa: E402 (the pack is loaded before it is imported)

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent))
from pack import host_path, load_pack

load_pack(host=False)

from spacetime_edit.tools.api_graphs import (
    Graph,
    GraphError,
    Shown,
    bring_files,
    read_graph,
    run_shown,
    set_inputs,
    wanted_models,
)
from spacetime_edit.tools.server import ExecutionFailed, LiveServer, PromptRejected

DEFAULT = "Check your model (tiny)"
TAKES = {
    "STE_CheckModel": {"model": "model", "positive": "positive", "latent": "latent", "vae": "vae"},
    "STE_InvertVideo": {"model": "model", "positive": "positive", "latent": "latent"},
    "STE_VideoDDSOptimize": {"model": "model", "positive": "source_positive", "latent": "latent"},
}
"""Nodes that take a model and a clip, the ones to prefer first: which of their inputs is what."""


def check_of(graph: Graph) -> Graph:
    """The part of a graph that makes model, prompt and clip, and a Check Model behind it. GraphError without one."""
    found = [node for kind in TAKES for node in graph.values() if node["class_type"] == kind]
    if not found:
        raise GraphError(f"the graph has none of {', '.join(TAKES)}, so there is no model and no clip to check")
    names = TAKES[found[0]["class_type"]]
    given = {name: found[0]["inputs"][own] for name, own in names.items() if own in found[0]["inputs"]}
    kept, wanted = {}, [value[0] for value in given.values()]
    while wanted:
        key = wanted.pop()
        if key not in kept:
            kept[key] = graph[key]
            wanted += [value[0] for value in graph[key]["inputs"].values() if isinstance(value, list)]
    shown = {number: {"class_type": "PreviewAny", "inputs": {"source": ["check", number]}} for number in (1, 2)}
    return kept | {
        "check": {"class_type": "STE_CheckModel", "inputs": given},
        **{f"shown {number}": node for number, node in shown.items()},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workflow", nargs="?", default=DEFAULT, help="a file, or the name of a template")
    parser.add_argument("--set", nargs="+", default=[], metavar="node.input=value", help="inputs to change")
    parser.add_argument("--json", type=Path, help="write the JSON here")
    arguments = parser.parse_args()
    try:
        graph = read_graph(arguments.workflow)
        set_inputs(graph, arguments.set)
        graph = check_of(graph)
        with LiveServer(host_path()) as server:
            bring_files(graph, server)
            outputs = run_shown(server, graph, Shown())["outputs"]
    except (GraphError, PromptRejected) as problem:
        print(f"check: {problem}", file=sys.stderr)
        if isinstance(problem, PromptRejected) and (wanted := wanted_models(arguments.workflow)):
            print("\nIt wants, in the ComfyUI that COMFYUI_PATH names:", *wanted, sep="\n  ", file=sys.stderr)
        return 2
    except ExecutionFailed as problem:
        print(f"check: {problem}", file=sys.stderr)
        return 2
    text, found = ("".join(outputs[f"shown {number}"]["text"]) for number in (1, 2))
    print(text)
    if arguments.json:
        arguments.json.write_text(found + "\n", encoding="utf-8")
    broken = [name for name, own in json.loads(found)["findings"].items() if own["verdict"] == "broken"]
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
