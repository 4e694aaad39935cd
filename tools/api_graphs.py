"""Graphs in API format: reading, setting inputs by name, running with progress shown."""

from __future__ import annotations

import asyncio
import difflib
import json
import shutil
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp

from .server import ExecutionFailed, LiveServer, PromptRejected
from .templates import WORKFLOWS, nodes_of, read

Graph = dict[str, dict[str, Any]]
"""Nodes by id: class_type and inputs; a link is [id, number of the output]."""


class GraphError(Exception):
    """What is wrong with a graph or a setting, and the cure, in one sentence."""


WORDS = WORKFLOWS.parent / "locales" / "en" / "nodeDefs.json"
"""What the editor shows of our nodes, by class: display_name, and the name of each input."""


def read_graph(file: str) -> Graph:
    """A graph by path, or a template by its name, with the titles of its nodes. GraphError for what is no graph."""
    path = Path(file)
    name = path.name.removesuffix(".json")
    own = WORKFLOWS / "api" / f"{name}.json"
    if not path.is_file() and own.is_file():
        path = own
    try:
        graph = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = difflib.get_close_matches(name, [template.stem for template in WORKFLOWS.glob("*.json")], 3, 0.4)
        text = f"{file}: no such file, and no template of that name in workflows/api"
        raise GraphError(f"{text}; do you mean {' or '.join(map(repr, near))}?" if near else text) from None
    except ValueError as error:
        raise GraphError(f"{file}: it is no JSON ({error})") from None
    if isinstance(graph, dict) and "nodes" in graph:
        if own.is_file() and path.resolve().parent == WORKFLOWS:
            return read_graph(str(own))
        raise GraphError(f"{file}: it is a workflow of the editor; export it with File > Export (API) first")
    if not isinstance(graph, dict) or not all(isinstance(n, dict) and "class_type" in n for n in graph.values()):
        raise GraphError(f"{file}: it is no graph in API format; export one with File > Export (API)")
    if path.resolve() == own.resolve():
        for node in read(WORKFLOWS / f"{name}.json")["nodes"]:
            if node.get("title") and str(node["id"]) in graph:
                graph[str(node["id"])]["_meta"] = {"title": node["title"]}
    return graph


def wanted_models(file: str) -> list[str]:
    """Of a template by its name: the files that it wants, and where they belong; [] of any other graph."""
    template = WORKFLOWS / f"{Path(file).name.removesuffix('.json')}.json"
    if not template.is_file():
        return []
    models = [model for node in nodes_of(read(template)) for model in node.get("properties", {}).get("models", [])]
    return list(dict.fromkeys(f"models/{own['directory']}/{own['name']}  from {own['url']}" for own in models))


def shown_names(node: dict[str, Any]) -> tuple[str, dict[str, str]]:
    """What the editor calls a node and its inputs; the ids where it has no other name."""
    known = json.loads(WORDS.read_text(encoding="utf-8")).get(node["class_type"], {})
    inputs = {key: words.get("name", key) for key, words in known.get("inputs", {}).items()}
    title = node.get("_meta", {}).get("title") or known.get("display_name") or node["class_type"]
    return title, {key: inputs.get(key, key) for key in node["inputs"]}


def listed(graph: Graph) -> str:
    """Each node: id, class and title, and the inputs that can be set."""
    lines = []
    for key, node in graph.items():
        title, names = shown_names(node)
        lines.append(f"{key}  {node['class_type']}" + (f"  ({title})" if title != node["class_type"] else ""))
        lines += [f"    {_both(k, names[k])} = {value}" for k, value in node["inputs"].items() if not _link(value)]
    return "\n".join(lines)


def _link(value: Any) -> bool:
    return isinstance(value, list)


def _both(key: str, name: str) -> str:
    return key if key == name else f"{key} ({name})"


def nodes_named(graph: Graph, name: str) -> list[str]:
    """Ids of the nodes with this id, class, title or display name. GraphError where there is none."""
    found = [key for key, node in graph.items() if name in (key, node["class_type"], shown_names(node)[0])]
    if not found:
        classes = sorted({node["class_type"] for node in graph.values()})
        raise GraphError(f"--set {name}: no such node; there are {', '.join(classes)}")
    return found


def set_inputs(graph: Graph, settings: list[str]) -> None:
    """Change inputs by "node.input=value", also by the names that the editor shows.

    A value that is JSON (a number, true) is taken as that, else as text.
    """
    for setting in settings:
        place, equals, text = setting.partition("=")
        name, dot, key = place.rpartition(".")
        if not equals or not dot:
            raise GraphError(f"--set {setting}: expected node.input=value, such as STE_InvertVideo.steps=20")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        for node in nodes_named(graph, name):
            _, names = shown_names(graph[node])
            chosen = key if key in names else next((k for k, shown in names.items() if shown == key), None)
            if chosen is None:
                there = ", ".join(_both(k, shown) for k, shown in names.items())
                raise GraphError(f"--set {setting}: {graph[node]['class_type']} has {there}")
            graph[node]["inputs"][chosen] = value


LOADERS = {"LoadVideo": "file", "LoadImage": "image", "LoadImageMask": "image", "LoadAudio": "audio"}
"""The host's nodes that read a file of the input folder, and the input that names it."""


def bring_files(graph: Graph, server: LiveServer) -> None:
    """Copies files of this machine that loaders of a graph name into the server's input folder."""
    for node in graph.values():
        name = LOADERS.get(node["class_type"])
        value = node["inputs"].get(name)
        if isinstance(value, str) and value and (path := Path(value).expanduser()).is_file():
            shutil.copy2(path, server.folder / "input" / path.name)
            node["inputs"][name] = path.name


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


class Shown:
    """Shows the nodes with the seconds since the start; on a terminal also their steps, in the place of the last."""

    def __init__(self):
        self._start = time.monotonic()

    def __call__(self, text: str) -> None:
        if text.startswith(" "):
            quietly(text)
        else:
            line = f"{time.monotonic() - self._start:6.1f} s  {text}"
            print(("\n" if sys.stdout.isatty() else "") + line, flush=True)


def quietly(text: str) -> None:
    """Shows steps alone, and those on a terminal only."""
    if sys.stdout.isatty() and text.startswith(" "):
        print(f"\r{text}   ", end="", flush=True)
