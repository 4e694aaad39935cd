"""Write the templates in workflows/*.json (UI format) from the short descriptions in this file.

    python tools/build_workflows.py && python tools/export_api.py && python tools/build_thumbnails.py

Node definitions come from a live server, so that sockets and widgets are those of the host. A graph is described in
the order in which it is drawn: groups from left to right, columns in a group, nodes in a column.
"""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from pack import host_path
from server import PACK_NAME, LiveServer
from templates import WORKFLOWS

TINY_MODEL = "embedded tiny model"
TINY_CLIP = "clip_00 - a red circle on a gray background"
TINY_EDIT = 2  # red circle -> red square
TINY_STEPS = 20
TINY_CFG = 4.0
TINY_LAMBDA = 0.08
TINY_END = 0.8
TINY_DILATION = 4.0

ZEROSCOPE = "zeroscope_v2_576w"
ZEROSCOPE_URL = "https://huggingface.co/cerspense/zeroscope_v2_576w"
ZEROSCOPE_SIZE = (576, 320)
ZEROSCOPE_FRAMES = 16


# --- the templates ----------------------------------------------------


def tiny(graph: Graph, method: str) -> None:
    """Red circle to red square by one of METHODS, on the embedded model and clip."""
    graph.group("Load")
    model = graph.add("STE_LoadVideoDiffusersModel", model_name=TINY_MODEL)
    clip = graph.add("STE_LoadExampleClip", clip=TINY_CLIP, edit=TINY_EDIT)
    latent, trajectory = invert(graph, model, clip["images"], clip["source_prompt"], TINY_STEPS)

    positive, negative = prompts(graph, model, clip["edit_prompt"])
    mask = {"mask": clip["mask_1"]} if method == "mask" else {}
    if method == "swap":
        sampler = graph.add("STE_SampleFromTrajectory", trajectory=trajectory["trajectory"], dilation=TINY_DILATION)
    else:
        score = graph.add("STE_CaptureSTRScore", trajectory=trajectory["trajectory"])
        options = {"strength": TINY_LAMBDA, "end_percent": TINY_END, "dilation": TINY_DILATION, **mask}
        sampler = graph.add("STE_STRLatentOptimizer", score=score["STR score"], **options)
    edit = sample(graph, model, positive, negative, sampler, trajectory, latent, TINY_CFG)

    prefix = f"spacetime_edit/{METHODS[method]}"
    graph.add("SaveImage", title="Save the edited frames", images=edit["IMAGE"], filename_prefix=prefix)
    graph.column()
    pair = graph.add("ImageStitch", title="Clip | edit", image1=clip["images"], image2=edit["IMAGE"])
    large = graph.add("ImageScaleBy", image=pair["IMAGE"], upscale_method="nearest-exact", scale_by=4.0)
    film = {"images": large["IMAGE"], "fps": clip["fps"], "filename_prefix": f"{prefix}_film"}
    graph.add("SaveAnimatedWEBP", title="Film: clip | edit", **film)


def zeroscope(graph: Graph) -> None:
    """STR-Match on real weights and a clip of the user's."""
    width, height = ZEROSCOPE_SIZE
    graph.group("Load")
    model = graph.add("STE_LoadVideoDiffusersModel", model_name=ZEROSCOPE)
    model.models = [{"name": ZEROSCOPE, "url": ZEROSCOPE_URL, "directory": "diffusers"}]
    file = graph.add("LoadVideo", title="Your clip: choose a file", file="")
    graph.column()
    parts = graph.add("GetVideoComponents", video=file["VIDEO"])
    title = f"The first {ZEROSCOPE_FRAMES} frames"
    frames = graph.add("ImageFromBatch", title=title, image=parts["images"], length=ZEROSCOPE_FRAMES)
    size = {"upscale_method": "lanczos", "width": width, "height": height, "crop": "center"}
    clip = graph.add("ImageScale", title=f"{width} x {height} pixels", image=frames["IMAGE"], **size)
    latent, trajectory = invert(graph, model, clip["IMAGE"], "a red car drives along a road", 50)

    positive, negative = prompts(graph, model, "a blue bus drives along a road")
    score = graph.add("STE_CaptureSTRScore", trajectory=trajectory["trajectory"])
    sampler = graph.add("STE_STRLatentOptimizer", score=score["STR score"], strength=0.01)
    edit = sample(graph, model, positive, negative, sampler, trajectory, latent, 7.5)

    film = graph.add("CreateVideo", images=edit["IMAGE"], fps=parts["fps"])
    graph.add("SaveVideo", title="Film: the edit", video=film["VIDEO"], filename_prefix="spacetime_edit/zeroscope")
    graph.column()
    pair = graph.add("ImageStitch", title="Clip | edit", image1=clip["IMAGE"], image2=edit["IMAGE"])
    film = graph.add("CreateVideo", images=pair["IMAGE"], fps=parts["fps"])
    prefix = "spacetime_edit/zeroscope_compared"
    graph.add("SaveVideo", title="Film: clip | edit", video=film["VIDEO"], filename_prefix=prefix)


def invert(graph: Graph, model: Node, images: Output, prompt: Any, steps: int) -> tuple[Node, Node]:
    """The group that turns a clip to noise: its latent and its trajectory."""
    graph.group("Invert")
    source = graph.add("CLIPTextEncode", "Prompt: the clip as it is", "green", text=prompt, clip=model["CLIP"])
    latent = graph.add("VAEEncode", pixels=images, vae=model["VAE"])
    graph.column()
    start = {"model": model["MODEL"], "positive": source["CONDITIONING"], "latent": latent["LATENT"]}
    return latent, graph.add("STE_InvertVideo", steps=steps, **start)


def prompts(graph: Graph, model: Node, edit: Any) -> tuple[Node, Node]:
    """Begin the group that edits: positive and negative prompt, and a column for the sampler."""
    graph.group("Edit")
    positive = graph.add("CLIPTextEncode", "Prompt: the edit", "green", text=edit, clip=model["CLIP"])
    negative = graph.add("CLIPTextEncode", "Negative prompt", "red", text="", clip=model["CLIP"])
    graph.column()
    return positive, negative


def sample(
    graph: Graph,
    model: Node,
    positive: Node,
    negative: Node,
    sampler: Node,
    trajectory: Node,
    latent: Node,
    cfg: float,
) -> Node:
    """End the group that edits, begin the one for results: the edited frames."""
    graph.column()
    conds = {"positive": positive["CONDITIONING"], "negative": negative["CONDITIONING"]}
    guider = graph.add("CFGGuider", model=model["MODEL"], cfg=cfg, **conds)
    noise = graph.add("DisableNoise")
    edit = graph.add(
        "SamplerCustomAdvanced",
        noise=noise["NOISE"],
        guider=guider["GUIDER"],
        sampler=sampler["sampler"],
        sigmas=trajectory["sigmas"],
        latent_image=latent["LATENT"],
    )
    graph.group("Result")
    return graph.add("VAEDecode", samples=edit["output"], vae=model["VAE"])


METHODS = {"swap": "prompt_swap", "str": "str_match", "mask": "str_match_mask"}  # and the files they save

ABOUT = {
    "swap": """## Prompt swap
Press **Run**: the red circle becomes a square. No download, no GPU.

1. **Invert Video** runs the model backwards from the clip to noise.
2. **Sample from Trajectory** runs it forwards again, with a new prompt.

Nothing ties the edit to the clip but the noise that it starts from: motion and background may drift. That is what the \
*STR-Match* templates cure.""",
    "str": """## STR-Match
Press **Run**: the red circle becomes a square. No download, no GPU.

1. **Invert Video** runs the model backwards from the clip to noise.
2. **Capture STR Score** chooses what to keep: which pixel is related to which, from frame to frame.
3. **STR Latent Optimizer** runs forwards with a new prompt and pulls every step towards those relations.

This tiny model wants a large **lambda** (0.08). Start real models at 0.01.""",
    "mask": """## STR-Match with a mask
Press **Run**: the red circle becomes a square, and all that lies outside the mask stays as it was. No download, no \
GPU.

White in the mask = edit. **dilation** grows it by a few pixels, so that a larger object has room.""",
    "zeroscope": f"""## STR-Match on Zeroscope
**Download** all of [{ZEROSCOPE}]({ZEROSCOPE_URL}) in diffusers layout (folders `unet`, `vae`, `text_encoder`, \
`tokenizer`) to

`ComfyUI/models/diffusers/{ZEROSCOPE}`

and press **R** to refresh. Then choose your clip, write what it shows and what it should show, and run.

**Your clip**: at least {ZEROSCOPE_FRAMES} frames. The template takes the first {ZEROSCOPE_FRAMES} and crops them to \
{ZEROSCOPE_SIZE[0]} x {ZEROSCOPE_SIZE[1]}, the size that this model was made for; more work too (it was made with \
24). A clip of 24 or 30 frames a second moves little in so few: save it at 8 frames a second first.""",
}

TRY = {
    "swap": """### Try
- **edit** 1 and 3 in *Load Example Clip*: other prompts for the same clip.
- another **clip**: 04 to 07 have two objects.
- connect **mask_1** to *Sample from Trajectory*, with **dilation** 4: the background stays.""",
    "str": f"""### Try
- **lambda** {TINY_LAMBDA:g} -> 0: a plain prompt swap. Larger: motion and background stay more, the prompt counts \
less.
- **edit** 1 and 3 in *Load Example Clip*: other prompts for the same clip.
- another **clip**: 04 to 07 have two objects.
- **end_percent** 0.5: match only in the first half, which is faster. 1: the background picks up more of a tint.""",
    "mask": """### Try
- **dilation** 0 and 16: too tight cuts the new shape, too wide lets the background change.
- **edit** 1 in *Load Example Clip*: a new colour. (Edit 3 changes the background, which this mask keeps.)
- **mask_2** with a clip of two objects (04 to 07).
- **lambda** 0: the mask alone.""",
    "zeroscope": """### Try
- **lambda** 0.005 to 0.05. Smaller: more of the prompt. Larger: more of the clip's motion and background.
- **steps** 20 in *Invert Video* for a first look, 50 for the result.
- a **mask** (white = edit) on *STR Latent Optimizer*: the rest of the picture stays.
- Both prompts alike but for the object work best.""",
}


TEMPLATES = {
    "Swap an object - prompt swap (tiny)": ("swap", partial(tiny, method="swap")),
    "Swap an object - STR-Match (tiny)": ("str", partial(tiny, method="str")),
    "Swap an object - STR-Match with mask (tiny)": ("mask", partial(tiny, method="mask")),
    "Swap an object - STR-Match (Zeroscope)": ("zeroscope", zeroscope),
}


# --- graphs -----------------------------------------------------------

WIDTH = 300  # of a node, in pixels
WIDTHS = {"STE_LoadExampleClip": 360, "SaveAnimatedWEBP": 480, "SaveVideo": 480}
PREVIEWS = {"SaveImage": 300, "SaveAnimatedWEBP": 280, "SaveVideo": 300, "LoadVideo": 200}  # height below the widgets
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
NOTE = "MarkdownNote"  # the frontend's own, without a definition on the server
NOTE_SIZE = (480, 280)
NOTE_DEFINITION = {
    "input": {"required": {"text": ["STRING", {"multiline": True}]}},
    "output": [],
    "output_name": [],
}
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COMFY_DYNAMICCOMBO_V3"}


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
    models: list[dict] = field(default_factory=list)
    position: tuple[int, int] = (0, 0)

    def __getitem__(self, name: str) -> Output:
        slot = self.definition["output_name"].index(name)
        return Output(self, slot, self.definition["output"][slot])

    @property
    def inputs(self) -> dict[str, tuple[Any, dict]]:
        """Type (or choices) and options by name, in the order of the definition."""
        kinds = self.definition["input"]
        specs = {**kinds.get("required", {}), **kinds.get("optional", {})}
        return {name: (spec[0], spec[1] if len(spec) > 1 else {}) for name, spec in specs.items()}

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
            if options.get("control_after_generate"):
                values.append("fixed")
        return values


def first_choice(options: dict) -> str:
    """The first of a combo's choices, "" without any."""
    choice = (options.get("options") or [""])[0]
    return choice["key"] if isinstance(choice, dict) else choice


class Graph:
    """A template. `group` and `column` say where the nodes that follow are drawn."""

    def __init__(self, name: str, definitions: dict[str, dict]):
        self.name = name
        self._definitions = definitions
        self._groups: list[tuple[str, list[list[Node]]]] = []
        self._notes: list[Node] = []

    def group(self, title: str) -> None:
        self._groups.append((title, [[]]))

    def column(self) -> None:
        self._groups[-1][1].append([])

    def add(self, type: str, title: str | None = None, color: str | None = None, **values: Any) -> Node:
        """A node with these links (an Output) and widget values; KeyError for an input that it lacks."""
        node = Node(len(self.nodes) + 1, type, self._definitions[type], values, title, color)
        if unknown := set(values) - set(node.inputs):
            raise KeyError(f"{type} has no input {', '.join(sorted(unknown))}")
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
        if name in optional:
            socket["shape"] = HOLLOW
        if name in node.widgets:
            socket["widget"] = {"name": name}
        inputs.append(socket)
    outputs = []
    for slot, (name, kind) in enumerate(zip(definition["output_name"], definition["output"], strict=True)):
        from_here = [link[0] for link in links if link[1:3] == [node.id, slot]]
        outputs.append({"name": name, "type": kind, "links": from_here or None})
    properties = {}
    if node.type != NOTE:
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
        "mode": 0,
        "inputs": inputs,
        "outputs": outputs,
        "properties": properties,
        "widgets_values": node.widgets_values(),
        **COLORS.get(node.color, {}),
    }


def main() -> None:
    with LiveServer(host_path()) as server:
        definitions = server.get("/object_info")
    for name, (method, build) in TEMPLATES.items():
        graph = Graph(name, definitions)
        build(graph)
        graph.note("About", ABOUT[method])
        graph.note("What to try", TRY[method])
        path = WORKFLOWS / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(graph.to_json(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        print(path.relative_to(WORKFLOWS.parent))


if __name__ == "__main__":
    main()
