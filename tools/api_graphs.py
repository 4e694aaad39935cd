"""Graphs in API format: reading, setting inputs by name, running with progress shown."""

from __future__ import annotations

import asyncio
import json
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp

from .server import ExecutionFailed, LiveServer, PromptRejected
from .templates import WORKFLOWS

Graph = dict[str, dict[str, Any]]
"""Nodes by id: class_type and inputs; a link is [id, number of the output]."""


class GraphError(Exception):
    """What is wrong with a graph or a setting, and the cure, in one sentence."""


def read_graph(file: str) -> Graph:
    """A graph by path, or a template by its name. GraphError for what is no graph in API format."""
    path = Path(file)
    own = WORKFLOWS / "api" / f"{path.name.removesuffix('.json')}.json"
    if not path.is_file() and own.is_file():
        path = own
    try:
        graph = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise GraphError(f"{file}: no such file, and no template of that name in workflows/api") from None
    except ValueError as error:
        raise GraphError(f"{file}: it is no JSON ({error})") from None
    if isinstance(graph, dict) and "nodes" in graph:
        if own.is_file() and path.resolve().parent == WORKFLOWS:
            return read_graph(str(own))
        raise GraphError(f"{file}: it is a workflow of the editor; export it with File > Export (API) first")
    if not isinstance(graph, dict) or not all(isinstance(n, dict) and "class_type" in n for n in graph.values()):
        raise GraphError(f"{file}: it is no graph in API format; export one with File > Export (API)")
    return graph


def nodes_named(graph: Graph, name: str) -> list[str]:
    """Ids of the nodes with this id, class or title. GraphError where there is none."""
    found = [
        key
        for key, node in graph.items()
        if name
        in (key, node["class_type"], node["class_type"].removeprefix("STE_"), node.get("_meta", {}).get("title"))
    ]
    if not found:
        classes = sorted({node["class_type"] for node in graph.values()})
        raise GraphError(f"--set {name}: no such node; there are {', '.join(classes)}")
    return found


def set_inputs(graph: Graph, settings: list[str]) -> None:
    """Change inputs by "node.input=value"; a value that is JSON (a number, true) is taken as that, else as text."""
    for setting in settings:
        place, equals, text = setting.partition("=")
        name, dot, key = place.partition(".")
        if not equals or not dot:
            raise GraphError(f"--set {setting}: expected node.input=value, such as STE_InvertVideo.steps=20")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        for node in nodes_named(graph, name):
            inputs = graph[node]["inputs"]
            if key not in inputs:
                raise GraphError(f"--set {setting}: {graph[node]['class_type']} has {', '.join(inputs)}")
            inputs[key] = value


def run_shown(server: LiveServer, graph: Graph, show: Callable[[str], None]) -> dict[str, Any]:
    """Run a graph; its history entry. Each change of node and of progress is shown as a line.

    PromptRejected where the host refuses the graph, ExecutionFailed where a node fails.
    """
    return asyncio.run(_run(server, graph, show))


async def _run(server: LiveServer, graph: Graph, show: Callable[[str], None]) -> dict[str, Any]:
    client = uuid.uuid4().hex
    async with aiohttp.ClientSession() as session, session.ws_connect(f"{server.url}/ws?clientId={client}") as socket:
        body = {"prompt": graph, "client_id": client}
        async with session.post(f"{server.url}/prompt", json=body) as answer:
            found = await answer.json()
        if found.get("error") or found.get("node_errors"):
            raise PromptRejected(found)
        prompt = found["prompt_id"]
        try:
            async for message in socket:
                if message.type != aiohttp.WSMsgType.TEXT:
                    continue
                kind, data = (json.loads(message.data).get(key) for key in ("type", "data"))
                if data.get("prompt_id", prompt) != prompt:
                    continue
                if kind == "executing" and data.get("node"):
                    show(graph[data["node"]]["class_type"] if data["node"] in graph else data["node"])
                elif kind == "progress":
                    show(f"  {data['value']} of {data['max']}")
                elif kind in ("execution_error", "execution_interrupted"):
                    raise ExecutionFailed(kind, data)
                elif kind == "execution_success":
                    break
        except asyncio.CancelledError:  # Ctrl+C
            server.interrupt(prompt)
            raise
    return server.wait(prompt)


def on_one_line(text: str) -> None:
    """Shows the nodes; on a terminal also their steps, each in the place of the last one."""
    if not text.startswith(" "):
        print(("\n" if sys.stdout.isatty() else "") + text, flush=True)
    else:
        quietly(text)


def quietly(text: str) -> None:
    """Shows steps alone, and those on a terminal only."""
    if sys.stdout.isatty() and text.startswith(" "):
        print(f"\r{text}   ", end="", flush=True)
