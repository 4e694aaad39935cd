"""Graphs in the frontend's own format: nodes in groups and columns, laid out from left to right.

A graph is described in the order in which it is drawn: groups from left to right, columns in a group, nodes in a
column. Node definitions are those of a live server (`/object_info`).
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from server import PACK_NAME

WIDTH = 300  # of a node, in pixels
WIDTHS = {
    **{"STE_LoadExampleClip": 360, "STE_PredictCost": 520, "STE_FitClipToModel": 360, "STE_LoadTrajectory": 360},
    **{"SaveAnimatedWEBP": 480, "SaveVideo": 480, "PreviewImage": 480, "STE_PreviewRelevance": 360},
    **{"STE_PreviewRegions": 360, "STE_EncodeRegionalPrompt": 360, "STE_RegionsFromAttention": 360},
    **{"STE_PreviewTokenAttention": 480, "STE_VideoDDSOptimize": 360, "STE_VideoEditMetrics": 560},
    **{"STE_CompareEdits": 480, "STE_OpticalFlow": 300, "STE_TrackPoints": 300, "STE_CheckModel": 560},
    **{"PreviewAny": 480},
}
PREVIEWS = {  # height below the widgets
    **{"SaveImage": 300, "PreviewImage": 280, "SaveAnimatedWEBP": 280, "SaveVideo": 300, "LoadVideo": 200},
    **{"STE_PreviewRelevance": 300, "STE_PredictCost": 180, "STE_FitClipToModel": 80, "STE_SaveTrajectory": 60},
    **{"STE_PreviewRegions": 340, "STE_RegionsFromAttention": 340, "STE_PreviewTokenAttention": 300},
    **{"STE_VideoDDSOptimize": 280, "STE_VideoEditMetrics": 200},
    **{"STE_CompareEdits": 240, "STE_OpticalFlow": 280, "STE_TrackPoints": 280, "STE_CheckModel": 480},
    **{"PreviewAny": 400},
}
GAP = 40  # between nodes, and between groups
TITLE = 30  # of a node, above its position; also of a group
PADDING = 20  # of a group
VIEW = {"scale": 0.65, "offset": [140, 140]}  # in which it opens: all fitted in would be too small to read
GROUP_COLOR = "#3f789e"
COLORS = {
    "green": {"color": "#232", "bgcolor": "#353"},
    "red": {"color": "#322", "bgcolor": "#533"},
    "note": {"color": "#432", "bgcolor": "#653"},
}
HOLLOW = 7  # shape of an optional socket
ALWAYS, NEVER = 0, 2  # modes of a node: it runs, it is muted
NOTE = "MarkdownNote"  # the frontend's own, without a definition on the server
NOTE_SIZE = (480, 280)
NOTE_DEFINITION = {
    "input": {"required": {"text": ["STRING", {"multiline": True}]}},
    "output": [],
    "output_name": [],
}
GROWING = "COMFY_AUTOGROW_V3"
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COLOR", "COMFY_DYNAMICCOMBO_V3"}


class Output(NamedTuple):
    """One output socket of a node."""

    node: Node
    slot: int
    type: str


@dataclass
class Node:
    """A node of a graph; node["MODEL"] is its output of that name."""

    id: int
    type: str
    definition: dict[str, Any]
    values: dict[str, Any]
    title: str | None = None
    color: str | None = None
    mode: int = ALWAYS
    models: list[dict] = field(default_factory=list)
    position: tuple[int, int] = (0, 0)

    def __getitem__(self, name: str) -> Output:
        slot = self.definition["output_name"].index(name)
        return Output(self, slot, self.definition["output"][slot])

    @property
    def inputs(self) -> dict[str, tuple[Any, dict]]:
        """Type (or choices) and options by name, in the order of the definition.

        Of an input that grows, those that have a value and a free one, as the frontend draws it.
        """
        kinds = self.definition["input"]
        specs = {**kinds.get("required", {}), **kinds.get("optional", {})}
        found = {}
        for name, spec in specs.items():
            options = spec[1] if len(spec) > 1 else {}
            if spec[0] == GROWING:
                found |= self._grown(name, options["template"])
            else:
                found[name] = spec[0], options
        return found

    def _grown(self, name: str, template: dict) -> dict[str, tuple[Any, dict]]:
        (inner,) = (spec for kind in template["input"].values() for spec in kind.values())
        names = [f"{name}.{template['prefix']}{k}" for k in range(template["max"])]
        last = max((k for k, own in enumerate(names) if own in self.values), default=-1)
        return {own: (inner[0], inner[1] if len(inner) > 1 else {}) for own in names[: last + 2]}

    @property
    def widgets(self) -> dict[str, dict]:
        """Options of the inputs that are widgets."""
        return {
            name: {**options, "options": kind} if isinstance(kind, list) else options
            for name, (kind, options) in self.inputs.items()
            if isinstance(kind, list) or kind in WIDGETS
        }

    @property
    def sockets(self) -> list[str]:
        """Inputs in the order in which the frontend numbers them."""
        return [name for name in self.inputs if name not in self.widgets] + list(self.widgets)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height without the title, large enough for the frontend's widgets."""
        if self.type == NOTE:
            return NOTE_SIZE
        sockets = max(len(self.inputs) - len(self.widgets), len(self.definition["output"]))
        rows = sum(4 if options.get("multiline") else 1 for options in self.widgets.values())
        rows += any(options.get("advanced") for options in self.widgets.values())  # the button that shows them
        return WIDTHS.get(self.type, WIDTH), 14 + 24 * sockets + 28 * rows + PREVIEWS.get(self.type, 0)

    def widgets_values(self) -> list:
        """Values in the order of the definition; a widget with a link has its default."""
        values = []
        for name, options in self.widgets.items():
            value = self.values.get(name)
            if value is None or isinstance(value, Output):
                value = options.get("default", first_choice(options))
            values.append(value)
            values += [inner.get("default", first_choice(inner)) for inner in inputs_of_choice(options, value)]
            if options.get("control_after_generate"):
                values.append("fixed")
        return values


def first_choice(options: dict) -> str:
    """The first of a combo's choices, "" without any."""
    choice = (options.get("options") or [""])[0]
    return choice["key"] if isinstance(choice, dict) else choice


def inputs_of_choice(options: dict, value: Any) -> list[dict]:
    """Options of the inputs that a choice of a dynamic combo brings."""
    chosen = [c for c in options.get("options") or [] if isinstance(c, dict) and c["key"] == value]
    inner = [spec for choice in chosen for kind in choice["inputs"].values() for spec in kind.values()]
    return [{**(spec[1] if len(spec) > 1 else {}), "kind": spec[0]} for spec in inner]


class Graph:
    """A template. `group` and `column` say where the nodes that follow are drawn."""

    def __init__(self, name: str, definitions: dict[str, dict]):
        self.name = name
        self.definitions = definitions
        self._groups: list[tuple[str, list[list[Node]]]] = []
        self._notes: list[Node] = []
        self._subgraphs: list[dict] = []
        self._mode = ALWAYS

    def group(self, title: str, *, muted: bool = False) -> None:
        """Begin a group; the nodes of a muted one stand in the graph and do not run."""
        self._groups.append((title, [[]]))
        self._mode = NEVER if muted else ALWAYS

    def column(self) -> None:
        self._groups[-1][1].append([])

    def add(self, type: str, /, title: str | None = None, color: str | None = None, **values: Any) -> Node:
        """A node with these links (an Output) and widget values; KeyError for an input that it lacks."""
        node = Node(len(self.nodes) + 1, type, self.definitions[type], values, title, color, self._mode)
        if unknown := set(values) - set(node.inputs):
            raise KeyError(f"{type} has no input {', '.join(sorted(unknown))}")
        self._groups[-1][1][-1].append(node)
        return node

    def embed(self, block: dict[str, Any], **values: Any) -> Node:
        """A node of a subgraph, from its file in `subgraphs/`, with its definition."""
        (outer,) = block["nodes"]
        inputs = {socket["name"]: [socket["type"], {}] for socket in outer["inputs"]}
        of_widgets = [socket["name"] for socket in outer["inputs"] if "widget" in socket]
        for name, value in zip(of_widgets, outer["widgets_values"], strict=True):
            inputs[name][1]["default"] = value
        outputs = [(socket["name"], socket["type"]) for socket in outer["outputs"]]
        definition = {
            "input": {"required": inputs},
            "output": [kind for _, kind in outputs],
            "output_name": [name for name, _ in outputs],
            "properties": outer["properties"],
        }
        self._subgraphs += block["definitions"]["subgraphs"]
        node = Node(len(self.nodes) + 1, outer["type"], definition, values, outer["title"], None, self._mode)
        self._groups[-1][1][-1].append(node)
        return node

    def note(self, title: str, text: str) -> None:
        """A note; notes stand in a row, below the first groups."""
        self._notes.append(Node(len(self.nodes) + 1, NOTE, NOTE_DEFINITION, {"text": text}, title, "note"))

    @property
    def nodes(self) -> list[Node]:
        return [node for _, columns in self._groups for column in columns for node in column] + self._notes

    def to_json(self) -> dict[str, Any]:
        """The graph in UI format, version 0.4."""
        boxes, left = [], 0
        for title, columns in self._groups:
            box, left = place(columns, left)
            boxes.append({"id": len(boxes) + 1, "title": title, "bounding": box, "color": GROUP_COLOR, "flags": {}})
        place_row(self._notes, boxes)
        links = links_of(self.nodes)
        return {
            "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"{PACK_NAME}/{self.name}")),
            "revision": 0,
            "last_node_id": len(self.nodes),
            "last_link_id": len(links),
            "nodes": [node_json(node, order, links) for order, node in enumerate(self.nodes)],
            "links": links,
            "groups": boxes,
            "config": {},
            "extra": {"ds": VIEW},
            **({"definitions": {"subgraphs": self._subgraphs}} if self._subgraphs else {}),
            "version": 0.4,
        }


def place(columns: list[list[Node]], left: int) -> tuple[list[int], int]:
    """Place the nodes of a group from x = left on; its box (x, y, width, height), and where the next one starts."""
    x, bottom = left + PADDING, 0
    for column in columns:
        y = 2 * TITLE + PADDING
        for node in column:
            node.position = (x, y)
            bottom = max(bottom, y + node.size[1])
            y += node.size[1] + TITLE + GAP
        x += max(node.size[0] for node in column) + GAP
    width = x - GAP + PADDING - left
    return [left, 0, width, bottom + PADDING], left + width + GAP


def place_row(notes: list[Node], boxes: list[dict]) -> None:
    """Place notes from left to right, below the boxes that they reach."""
    step = NOTE_SIZE[0] + GAP
    bounds = [box["bounding"] for box in boxes]
    bottom = max(y + height for x, y, _, height in bounds if x < len(notes) * step)
    for index, note in enumerate(notes):
        note.position = (index * step, bottom + GAP + TITLE)


def links_of(nodes: list[Node]) -> list[list]:
    """[id, source node, its output, target node, its input, type] of every link."""
    ends = [(node, slot, name) for node in nodes for slot, name in enumerate(node.sockets) if name in node.values]
    ends = [(node, slot, node.values[name]) for node, slot, name in ends if isinstance(node.values[name], Output)]
    return [
        [index, source.node.id, source.slot, node.id, slot, source.type]
        for index, (node, slot, source) in enumerate(ends, 1)
    ]


def node_json(node: Node, order: int, links: list[list]) -> dict[str, Any]:
    """A node in UI format."""
    definition = node.definition
    optional = definition["input"].get("optional", {})
    link_into = {slot: index for index, _, _, target, slot, _ in links if target == node.id}
    inputs = []
    for slot, name in enumerate(node.sockets):
        kind = node.inputs[name][0]
        socket = {"name": name, "type": "COMBO" if isinstance(kind, list) else kind, "link": link_into.get(slot)}
        if name in optional or "." in name:
            socket["shape"] = HOLLOW
        if name in node.widgets:
            socket["widget"] = {"name": name}
        inputs.append(socket)
    outputs = []
    for slot, (name, kind) in enumerate(zip(definition["output_name"], definition["output"], strict=True)):
        from_here = [link[0] for link in links if link[1:3] == [node.id, slot]]
        outputs.append({"name": name, "type": kind, "links": from_here or None})
    properties = definition.get("properties", {})
    if not properties and node.type != NOTE:
        ours = definition["python_module"] == f"custom_nodes.{PACK_NAME}"
        properties = {"Node name for S&R": node.type, "cnr_id": PACK_NAME if ours else "comfy-core"}
    if node.models:
        properties["models"] = node.models
    return {
        "id": node.id,
        "type": node.type,
        **({"title": node.title} if node.title else {}),
        "pos": list(node.position),
        "size": list(node.size),
        "flags": {},
        "order": order,
        "mode": node.mode,
        "inputs": inputs,
        "outputs": outputs,
        "properties": properties,
        "widgets_values": node.widgets_values(),
        **COLORS.get(node.color, {}),
    }
