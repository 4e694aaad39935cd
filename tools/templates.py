"""The pack's templates: `workflows/<name>.json` (UI format) and `workflows/api/<name>.json` (API format)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

WORKFLOWS = Path(__file__).resolve().parents[1] / "workflows"
TINY = "(tiny)"  # in the name of a template that runs on the embedded tiny model


def templates() -> list[Path]:
    return sorted(WORKFLOWS.glob("*.json"))


def is_tiny(template: Path) -> bool:
    return template.stem.endswith(TINY)


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def api_path(template: Path) -> Path:
    return WORKFLOWS / "api" / template.name


def nodes_of(graph: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Nodes of a graph in UI format and of its subgraphs."""
    yield from graph["nodes"]
    for subgraph in graph.get("definitions", {}).get("subgraphs", []):
        yield from nodes_of(subgraph)


def model_files(graph: dict[str, Any]) -> set[str]:
    """File names in the nodes' `properties.models`: what a user has to have."""
    return {model["name"] for node in nodes_of(graph) for model in node.get("properties", {}).get("models", [])}


def for_every_host(graph: dict[str, Any]) -> dict[str, Any]:
    """A graph in API format with the codec of *Save Video* under both names: `codec`, and from ComfyUI 0.33 on
    `format.codec`. A host leaves out inputs that it does not know."""
    made = {}
    for key, node in graph.items():
        inputs = node["inputs"]
        if node["class_type"] == "SaveVideo":
            codec = inputs.get("codec", inputs.get("format.codec", "auto"))
            inputs = dict(sorted((inputs | {"codec": codec, "format.codec": codec}).items(), key=_links_last))
        made[key] = node | {"inputs": inputs}
    return made


def _links_last(item: tuple[str, Any]) -> bool:
    """Where an input of a node stands, as the frontend writes them: values first, then links."""
    return isinstance(item[1], list)
