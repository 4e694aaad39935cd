"""Write subgraphs/: each method as one block, with few widgets, that the editor's node library offers.

python tools/build_subgraphs.py
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from graphs import Graph, Node, Output, links_of, node_json, place
from pack import ROOT, host_path
from server import PACK_NAME, LiveServer
from template_parts import Source, inversion, sample, str_sampler

SUBGRAPHS = ROOT / "subgraphs"
INPUT, OUTPUT = -10, -20  # ids of the nodes at the edges, as the frontend numbers them
SLOT = 20  # height of a socket at the edge
OUTER = 9999  # id of the block in its own file
NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, f"{PACK_NAME}/subgraphs")


@dataclass
class Block:
    """A subgraph that is being drawn. `take` makes an input of it, a socket or, with a value, a widget."""

    name: str
    graph: Graph
    inputs: list[tuple[str, str, Any]] = field(default_factory=list)
    outputs: list[tuple[str, Output]] = field(default_factory=list)

    def __post_init__(self):
        self.edge = Node(INPUT, "edge", {"input": {}, "output": [], "output_name": []}, {})

    def take(self, name: str, kind: str, value: Any = None) -> Output:
        self.inputs.append((name, kind, value))
        return Output(self.edge, len(self.inputs) - 1, kind)

    def give(self, name: str, output: Output) -> None:
        self.outputs.append((name, output))

    def to_json(self, category: str, description: str) -> dict[str, Any]:
        """A file of one node, of this subgraph's type, with its definition."""
        columns = [column for _, group in self.graph._groups for column in group]
        (left, top, width, height), _ = place(columns, 0)
        nodes = self.graph.nodes
        links = links_of(nodes)
        flat = [dict(zip(LINK, link, strict=True)) for link in links]
        to_edge = [
            [len(links) + k, output.node.id, output.slot, OUTPUT, k - 1, output.type]
            for k, (_, output) in enumerate(self.outputs, 1)
        ]
        flat += [dict(zip(LINK, link, strict=True)) for link in to_edge]
        id = str(uuid.uuid5(NAMESPACE, self.name))
        own = {
            "id": id,
            "version": 1,
            "state": {"lastGroupId": 0, "lastNodeId": len(nodes), "lastLinkId": len(flat), "lastRerouteId": 0},
            "revision": 0,
            "config": {},
            "name": self.name,
            "category": category,
            "description": description,
            "inputNode": {"id": INPUT, "bounding": [left - 220, top, 160, 40 + SLOT * len(self.inputs)]},
            "outputNode": {"id": OUTPUT, "bounding": [left + width + 60, top, 120, 40 + SLOT * len(self.outputs)]},
            "inputs": [
                self._socket(name, kind, k, [link[0] for link in links if link[1:3] == [INPUT, k]], left - 80)
                for k, (name, kind, _) in enumerate(self.inputs)
            ],
            "outputs": [
                self._socket(name, output.type, k, [to_edge[k][0]], left + width + 80)
                for k, (name, output) in enumerate(self.outputs)
            ],
            "widgets": [],
            "nodes": [node_json(node, order, links + to_edge) for order, node in enumerate(nodes)],
            "groups": [],
            "links": flat,
            "extra": {},
        }
        return {
            "revision": 0,
            "last_node_id": OUTER,
            "last_link_id": 0,
            "nodes": [self._outer(id)],
            "links": [],
            "version": 0.4,
            "extra": {},
            "definitions": {"subgraphs": [own]},
        }

    def _socket(self, name: str, kind: str, number: int, links: list[int], x: int) -> dict[str, Any]:
        id = str(uuid.uuid5(NAMESPACE, f"{self.name}/{name}"))
        return {"id": id, "name": name, "type": kind, "linkIds": links, "label": name, "pos": [x, 40 + SLOT * number]}

    def _outer(self, type: str) -> dict[str, Any]:
        widgets = [(name, value) for name, _, value in self.inputs if value is not None]
        shown = [
            {"name": name, "type": kind, "link": None, **({} if value is None else {"widget": {"name": name}})}
            for name, kind, value in self.inputs
        ]
        return {
            "id": OUTER,
            "type": type,
            "pos": [0, 0],
            "size": [360, 120 + 40 * len(widgets)],
            "flags": {},
            "order": 0,
            "mode": 0,
            "inputs": shown,
            "outputs": [{"name": name, "type": output.type, "links": []} for name, output in self.outputs],
            "properties": {"proxyWidgets": [["-1", name] for name, _ in widgets], "cnr_id": PACK_NAME},
            "widgets_values": [value for _, value in widgets],
            "title": self.name,
        }


LINK = "id", "origin_id", "origin_slot", "target_id", "target_slot", "type"


def opened(block: Block) -> tuple[Graph, dict[str, Output], Output]:
    """The sockets that every block has: a model with its parts, and a clip."""
    graph = block.graph
    graph.group(block.name)
    model = {kind: block.take(kind.lower(), kind) for kind in ("MODEL", "CLIP", "VAE")}
    return graph, model, block.take("images", "IMAGE")


def prompts_of(block: Block, model: dict[str, Output]) -> tuple[Node, Node]:
    """Source prompt and negative prompt, the first as a widget of the block."""
    graph = block.graph
    text = block.take("source_prompt", "STRING", "")
    source = graph.add("CLIPTextEncode", "Prompt: the clip as it is", "green", text=text, clip=model["CLIP"])
    return source, graph.add("CLIPTextEncode", "Negative prompt", "red", text="", clip=model["CLIP"])


def fitted(block: Block, model: dict[str, Output], images: Output, mask: Output) -> tuple[Node, Node, Node]:
    """The edit's prompt, as a widget of the block; the clip in the model's size, and its latent."""
    graph, text = block.graph, block.take("edit_prompt", "STRING", "")
    positive = graph.add("CLIPTextEncode", "Prompt: the edit", "green", text=text, clip=model["CLIP"])
    graph.column()
    clip = graph.add("STE_FitClipToModel", images=images, model=model["MODEL"], mask=mask)
    return positive, clip, graph.add("VAEEncode", pixels=clip["images"], vae=model["VAE"])


def str_match(block: Block) -> None:
    """Invert, match, decode."""
    graph, model, images = opened(block)
    mask = block.take("mask", "MASK")
    source, negative = prompts_of(block, model)
    positive, clip, latent = fitted(block, model, images, mask)
    steps = block.take("steps", "INT", 50)
    trajectory = inversion(graph, model, source, latent["LATENT"], steps)
    graph.column()
    options = {"strength": block.take("lambda", "FLOAT", 1.0), "dilation": block.take("dilation", "FLOAT", 16.0)}
    sampler = str_sampler(graph, trajectory, mask=clip["mask"], **options)
    inverted = Source(model, latent["LATENT"], trajectory)
    edit = sample(graph, inverted, (positive, negative), sampler["sampler"], block.take("cfg", "FLOAT", 7.5))
    finished(block, model, clip, edit["output"])


def st_layout(block: Block) -> None:
    """Invert, keep each phrase in its region, decode."""
    graph, model, images = opened(block)
    regions = block.take("regions", "STE_REGIONS")
    source, negative = prompts_of(block, model)
    text = block.take("edit_prompt", "STRING", "")
    layout = {"clip": model["CLIP"], "prompt": text, "regions": regions}
    positive = graph.add("STE_EncodeRegionalPrompt", "Prompt: the edit", "green", **layout)
    graph.column()
    clip = graph.add("STE_FitClipToModel", images=images, model=model["MODEL"])
    seen = graph.add("STE_PreviewRegions", images=clip["images"], regions=regions)
    latent = graph.add("VAEEncode", pixels=clip["images"], vae=model["VAE"])
    graph.column()
    trajectory = inversion(graph, model, source, latent["LATENT"], block.take("steps", "INT", 50))
    strengths = {name: block.take(name, "FLOAT", 1.0) for name in ("cross_strength", "self_strength")}
    patched = graph.add("STE_STLayoutAttentionPatch", model=model["MODEL"], **strengths)
    where = {"trajectory": trajectory["trajectory"], "mask": seen["mask"]}
    sampler = graph.add("STE_SampleFromTrajectory", **where)
    inverted = Source({"MODEL": patched["model"]}, latent["LATENT"], trajectory)
    conds = {"CONDITIONING": positive["conditioning"]}, negative
    edit = sample(graph, inverted, conds, sampler["sampler"], block.take("cfg", "FLOAT", 7.5))
    finished(block, model, clip, edit["output"])


def dreammotion(block: Block) -> None:
    """Optimise the latent, decode."""
    graph, model, images = opened(block)
    mask = block.take("mask", "MASK")
    source, negative = prompts_of(block, model)
    positive, clip, latent = fitted(block, model, images, mask)
    graph.column()
    conds = {"source_positive": source, "positive": positive, "negative": negative}
    widgets = {"steps": ("INT", 200), "step_size": ("FLOAT", 0.4), "cfg": ("FLOAT", 7.5), "s_ssm": ("FLOAT", 0.3)}
    moved = graph.add(
        "STE_VideoDDSOptimize",
        model=model["MODEL"],
        latent=latent["LATENT"],
        mask=clip["mask"],
        **{name: node["CONDITIONING"] for name, node in conds.items()},
        **{name: block.take(name, kind, value) for name, (kind, value) in widgets.items()},
    )
    finished(block, model, clip, moved["latent"])


def finished(block: Block, model: dict[str, Output], clip: Node, latent: Output) -> None:
    """Decode; the block puts out the edit, and the clip as it was encoded, to compare."""
    block.graph.column()
    edited = block.graph.add("VAEDecode", samples=latent, vae=model["VAE"])
    block.give("edit", edited["IMAGE"])
    block.give("source", clip["images"])


AT_MOST = (
    " It takes the first 24 frames of the clip, at most 576 pixels on the longer side; open the block to change that."
)

BLOCKS: dict[str, tuple[Callable[[Block], None], str]] = {
    "Edit Video (STR-Match)": (
        str_match,
        "Swaps what is in a clip and keeps its motion: inverts the clip and edits it with a new prompt, while the "
        "relations between pixels and frames are matched. With a mask the rest of the picture stays." + AT_MOST,
    ),
    "Edit Regions (ST-Layout)": (
        st_layout,
        "Edits several things at once, each phrase in its own region: connect regions from Region Prompt, Regions from "
        "Masks or Regions from Attention." + AT_MOST,
    ),
    "Edit Video (DreamMotion)": (
        dreammotion,
        "Changes colours, materials and styles: optimises the clip's own latent while its layout and motion are held."
        + AT_MOST,
    ),
}


def block_json(name: str, definitions: dict[str, dict]) -> dict[str, Any]:
    """The file of a block; definitions: `/object_info` of a live server."""
    build, description = BLOCKS[name]
    block = Block(name, Graph(name, definitions))
    build(block)
    return block.to_json("Spacetime Edit", description)


def main() -> None:
    with LiveServer(host_path()) as server:
        definitions = server.get("/object_info")
    SUBGRAPHS.mkdir(exist_ok=True)
    for name in BLOCKS:
        text = json.dumps(block_json(name, definitions), indent=2, ensure_ascii=False)
        path = SUBGRAPHS / f"{name}.json"
        path.write_text(text + "\n", encoding="utf-8")
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
