"""Write the templates in workflows/*.json (UI format) from the short descriptions in this file.

    python tools/build_workflows.py && python tools/export_api.py && python tools/build_thumbnails.py

Templates with nodes of another pack are written only where that pack is: ADE_PATH names AnimateDiff-Evolved's folder.

Node definitions come from a live server, so that sockets and widgets are those of the host. What the notes say is in
`template_notes`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial

import template_settings as use
from build_subgraphs import block_json
from graphs import Graph, Node, Output
from other_packs import is_there, other_packs
from pack import host_path
from real_templates import (
    PARTS,
    animatediff,
    boxes_of,
    dds_show1,
    dds_zeroscope,
    lavie,
    long_clip,
    sd15,
    transformer,
    two_models,
    zeroscope,
)
from server import LiveServer
from template_notes import ABOUT, TRY
from template_parts import (
    Source,
    encode,
    inversion,
    invert,
    load,
    prompts,
    result,
    sample,
    save,
    str_sampler,
)
from templates import WORKFLOWS

MaskMaker = Callable[[Graph, Source, Node], Output]

# --- the templates ----------------------------------------------------


def tiny(
    graph: Graph,
    name: str,
    *,
    clip: str = use.ONE_OBJECT,
    prompt: str | None = None,
    mask: MaskMaker | None = None,
    task: str = "change",
    matching: bool = True,
) -> tuple[Node, Node]:
    """One edit on the embedded model, by default red circle to red square; its sampler and its latent.

    prompt: of the edit, by default the clip's own; matching: by STR-Match, else a prompt swap.
    """
    model, clip = load(graph, clip)
    source = invert(graph, model, clip["images"], clip["source_prompt"], use.TINY_STEPS)
    where = {"mask": mask(graph, source, clip)} if mask else {}
    conds = prompts(graph, model, prompt or clip["edit_prompt"])
    if matching:
        sampler = str_sampler(graph, source.trajectory, task=task, **use.TINY_MATCHING, **where)
    else:
        trajectory = source.trajectory["trajectory"]
        sampler = graph.add("STE_SampleFromTrajectory", trajectory=trajectory, dilation=use.TINY_DILATION, **where)
    seed = None if task == "change" else use.SEED
    edit = sample(graph, source, conds, sampler["sampler"], use.TINY_CFG, seed)
    edited = result(graph, model, edit)
    save(graph, clip["images"], clip["fps"], edited, name)
    return sampler, edit


def with_curve(graph: Graph, name: str) -> None:
    """The same with a chart of how the match went."""
    sampler, edit = tiny(graph, name)
    chart = graph.add("STE_STRCosineCurve", sampler=sampler["sampler"], latent=edit["output"])
    graph.add("PreviewImage", title="Match, step by step", images=chart["chart"])


def measured(graph: Graph, name: str) -> None:
    """The plain edit, and what can be said of it in numbers."""
    model, clip = load(graph, use.ONE_OBJECT)
    source = invert(graph, model, clip["images"], clip["source_prompt"], use.TINY_STEPS)
    conds = prompts(graph, model, clip["edit_prompt"])
    sampler = str_sampler(graph, source.trajectory, **use.TINY_MATCHING)
    edited = result(graph, model, sample(graph, source, conds, sampler["sampler"], use.TINY_CFG))
    save(graph, clip["images"], clip["fps"], edited, name)
    graph.group("Numbers")
    of_edit = {"prompt": clip["edit_prompt"], "mask": clip["mask_1"]}
    graph.add("STE_VideoEditMetrics", source=clip["images"], edit=edited, **of_edit)


def checked(graph: Graph, name: str) -> None:
    """What works with the embedded model."""
    model, clip = load(graph, use.ONE_OBJECT)
    graph.group("Check")
    positive, latent = encode(graph, model, clip["images"], clip["source_prompt"])
    graph.column()
    conds = {"positive": positive["CONDITIONING"], "latent": latent["LATENT"]}
    check = graph.add("STE_CheckModel", model=model["MODEL"], **conds)
    graph.column()
    graph.add("PreviewAny", title="JSON, to paste into an issue", source=check["JSON"])


def compared(graph: Graph, name: str) -> None:
    """A prompt swap and STR-Match from one inversion, in numbers, as bars and side by side; flow and tracks."""
    model, clip = load(graph, use.ONE_OBJECT)
    source = invert(graph, model, clip["images"], clip["source_prompt"], use.TINY_STEPS)
    graph.group("Flow of the clip")
    flow = graph.add("STE_OpticalFlow", images=clip["images"])
    conds = prompts(graph, model, clip["edit_prompt"], group="Two edits")
    swap = graph.add("STE_SampleFromTrajectory", trajectory=source.trajectory["trajectory"])
    swapped = sample(graph, source, conds, swap["sampler"], use.TINY_CFG)
    graph.column()
    matching = str_sampler(graph, source.trajectory, **use.TINY_MATCHING)
    matched = sample(graph, source, conds, matching["sampler"], use.TINY_CFG)
    graph.group("Compare")
    edits = [graph.add("VAEDecode", samples=edit["output"], vae=model["VAE"])["IMAGE"] for edit in (swapped, matched)]
    graph.add("STE_TrackPoints", "Tracks of STR-Match", images=edits[1], mask=clip["mask_1"], spacing=6)
    graph.column()
    grown = {f"edits.edit{k}": edit for k, edit in enumerate(edits)}
    about = {"names": "prompt swap\nSTR-Match", "prompt": clip["edit_prompt"], "mask": clip["mask_1"]}
    found = graph.add("STE_CompareEdits", source=clip["images"], flow=flow["flow"], **about, **grown)
    graph.column()
    graph.add("PreviewImage", title="Bars", images=found["chart"])
    large = graph.add("ImageScaleBy", image=found["slider"], upscale_method="nearest-exact", scale_by=4.0)
    graph.column()
    film = {"images": large["IMAGE"], "fps": clip["fps"], "filename_prefix": f"spacetime_edit/{name}_slider"}
    graph.add("SaveAnimatedWEBP", title="Film: the clip left of the line", **film)


def one_block(graph: Graph, name: str) -> None:
    """The plain edit again, by the block of `subgraphs/`."""
    model, clip = load(graph, use.ONE_OBJECT)
    graph.group("Edit")
    parts = {"model": model["MODEL"], "clip": model["CLIP"], "vae": model["VAE"]}
    said = {"source_prompt": clip["source_prompt"], "edit_prompt": clip["edit_prompt"]}
    settings = {"lambda": use.TINY_LAMBDA, "steps": use.TINY_STEPS, "cfg": use.TINY_CFG}
    block = block_json("Edit Video (STR-Match)", graph.definitions)
    edited = graph.embed(block, images=clip["images"], **parts, **said, **settings)["edit"]
    graph.group("Result")
    save(graph, clip["images"], clip["fps"], edited, name)


def several(graph: Graph, name: str) -> None:
    """Two objects of one clip, the second edit on the latent of the first."""
    model, clip = load(graph, use.SEVERAL_CLIP)
    source = invert(graph, model, clip["images"], clip["source_prompt"], use.TINY_STEPS)
    conds = prompts(graph, model, use.SEVERAL_PROMPTS[0], group="Edit the left object")
    sampler = str_sampler(graph, source.trajectory, **use.TINY_MATCHING, mask=clip["mask_1"])
    first = sample(graph, source, conds, sampler["sampler"], use.TINY_CFG)

    graph.group("Invert the edit")
    trajectory = inversion(graph, model, conds[0], first["output"], use.TINY_STEPS)
    source = Source(model, first["output"], trajectory)
    conds = prompts(graph, model, use.SEVERAL_PROMPTS[1], group="Edit the right object")
    sampler = str_sampler(graph, source.trajectory, **use.TINY_MATCHING, mask=clip["mask_2"])
    second = sample(graph, source, conds, sampler["sampler"], use.TINY_CFG)
    save(graph, clip["images"], clip["fps"], result(graph, model, second), name)


def compare_lambdas(graph: Graph, name: str) -> None:
    """Four lambdas in one run, as labelled films in a square beside the clip."""
    model, clip = load(graph, use.ONE_OBJECT, use.NEW_COLOR)
    source = invert(graph, model, clip["images"], clip["source_prompt"], use.TINY_STEPS)
    conds = prompts(graph, model, clip["edit_prompt"])
    sampler = str_sampler(graph, source.trajectory, **use.TINY_MATCHING)
    sweep = graph.add("STE_SweepLambda", sampler=sampler["sampler"], lambdas=use.COMPARED_LAMBDAS)
    edits = result(graph, model, sample(graph, source, conds, sweep["samplers"], use.TINY_CFG))
    large = graph.add("ImageScaleBy", image=edits, upscale_method="nearest-exact", scale_by=4.0)
    text = {"text": sweep["labels"], "font_size": 12.0, "position": "bottom"}
    labelled = graph.add("TextOverlay", images=large["IMAGE"], **text)
    graph.column()
    square = {"final_width": 8 * use.TINY_SIDE, "final_height": 8 * use.TINY_SIDE, "overlap": 0}
    films = graph.add("ImageMergeTileList", title="Two by two", image_list=labelled["images"], **square)
    images = graph.add("ImageScaleBy", image=clip["images"], upscale_method="nearest-exact", scale_by=8.0)
    pair = graph.add("ImageStitch", title="Clip | edits", image1=images["IMAGE"], image2=films["IMAGE"])
    graph.column()
    film = {"images": pair["IMAGE"], "fps": clip["fps"], "filename_prefix": f"spacetime_edit/{name}_film"}
    graph.add("SaveAnimatedWEBP", title="Film: clip | edits", **film)


def add(graph: Graph, name: str) -> None:
    """A clip of two objects, one painted over, and another that comes in its place."""
    model, clip = load(graph, use.ADD_CLIP)
    graph.group("A clip of one object")
    where = graph.add("GrowMask", mask=clip["mask_2"], expand=4)
    side = {"width": use.TINY_SIDE, "height": use.TINY_SIDE}
    gray = graph.add("SolidMask", title="Its background", value=use.ADD_GRAY, **side)
    paint = graph.add("MaskToImage", mask=gray["MASK"])
    layers = {"destination": clip["images"], "source": paint["IMAGE"], "mask": where["MASK"]}
    images = graph.add("ImageCompositeMasked", title="Paint one over", **layers)["IMAGE"]
    source = invert(graph, model, images, use.ADD_SOURCE, use.TINY_STEPS)
    conds = prompts(graph, model, use.ADD_PROMPT)
    sampler = str_sampler(graph, source.trajectory, **use.TINY_MATCHING, task="add", mask=clip["mask_2"])
    edit = sample(graph, source, conds, sampler["sampler"], use.TINY_CFG, use.SEED)
    save(graph, images, clip["fps"], result(graph, model, edit), name)


def regions(graph: Graph, name: str) -> None:
    """Two objects become two others, each by its mask, whatever order the prompt says."""
    source, clip, chain, seen = two_regions(graph, use.REGIONS_CLIP, LEFT_AND_RIGHT, use.REGIONS_PHRASES)
    positive, patched = edit_regions(graph, source, clip, chain, use.REGIONS_PROMPT, name, mask=seen["mask"])
    graph.group("Where its words act")
    look = {"trajectory": source.trajectory["trajectory"], "images": clip["images"], "model": patched["model"]}
    look |= {"positive": positive["conditioning"], "words": use.REGIONS_PHRASES[0]}
    graph.add("STE_PreviewTokenAttention", **look)


def identities(graph: Graph, name: str) -> None:
    """Two objects take each other's place: the prompt is the clip's own, only the masks are exchanged."""
    source, clip, chain, seen = two_regions(graph, use.REGIONS_CLIP, LEFT_AND_RIGHT, use.IDENTITY_PHRASES)
    edit_regions(graph, source, clip, chain, clip["source_prompt"], name, mask=seen["mask"])


def equal(graph: Graph, name: str) -> None:
    """One of two equal objects becomes another: only the masks can say which."""
    source, clip, chain, seen = two_regions(graph, use.EQUAL_CLIP, EACH_OF_TWO, use.EQUAL_PHRASES)
    edit_regions(graph, source, clip, chain, use.EQUAL_PROMPT, name, mask=seen["mask"])


def part(graph: Graph, name: str) -> None:
    """The stripe of an object gets a new colour: object and stripe are regions, and only the stripe may change."""
    source, clip, chain, _ = two_regions(graph, use.PART_CLIP, WHOLE_AND_PART, use.PART_PHRASES)
    stripe = {"mask": clip["stripe_mask"], "dilation": use.PART_DILATION}
    edit_regions(graph, source, clip, chain, use.PART_PROMPT, name, **stripe)


def one_class(graph: Graph, name: str) -> None:
    """All objects of a clip become one thing, by one mask and one phrase."""
    model, clip = load(graph, use.REGIONS_CLIP)
    source = invert(graph, model, clip["images"], clip["source_prompt"], use.TINY_STEPS)
    graph.group("Region")
    both = {"destination": clip["mask_1"], "source": clip["mask_2"], "x": 0, "y": 0, "operation": "add"}
    mask = graph.add("MaskComposite", "Both objects", **both)
    of_both = {"mask": mask["MASK"], "phrase": use.CLASS_PHRASE, "occurrence": "every"}
    made = graph.add("STE_RegionPrompt", "All of them", **of_both)
    graph.column()
    seen = graph.add("STE_PreviewRegions", images=clip["images"], regions=made["regions"])
    edit_regions(graph, source, clip, made, use.CLASS_PROMPT, name, mask=seen["mask"])


def background(graph: Graph, name: str) -> None:
    """Only the background changes: its region is all that the object is not."""
    model, clip = load(graph, use.ONE_OBJECT)
    source = invert(graph, model, clip["images"], clip["source_prompt"], use.TINY_STEPS)
    graph.group("Region")
    around = graph.add("InvertMask", "Around the object", mask=clip["mask_1"])
    made = graph.add("STE_RegionPrompt", "The background", mask=around["MASK"], phrase=use.BACKGROUND_PHRASE)
    graph.column()
    seen = graph.add("STE_PreviewRegions", images=clip["images"], regions=made["regions"])
    edit_regions(graph, source, clip, made, use.BACKGROUND_PROMPT, name, mask=seen["mask"], dilation=0.0, matching=True)


def from_attention(graph: Graph, name: str) -> None:
    """Two objects become two others, by regions that the model itself finds."""
    model, clip = load(graph, use.REGIONS_CLIP)
    source = invert(graph, model, clip["images"], clip["source_prompt"], use.TINY_STEPS)
    graph.group("Regions")
    look = {"trajectory": source.trajectory["trajectory"], "images": clip["images"]}
    made = graph.add("STE_RegionsFromAttention", phrases=use.FOUND_PHRASES, **look)
    edit_regions(graph, source, clip, made, use.REGIONS_PROMPT, name, mask=made["mask"])


LEFT_AND_RIGHT = {"The left object": "mask_1", "The right object": "mask_2"}
EACH_OF_TWO = {"The first object": "mask_1", "The second object": "mask_2"}
WHOLE_AND_PART = {"The object": "mask_1", "Its stripe": "stripe_mask"}


def two_regions(
    graph: Graph, of_clip: str, masks: dict[str, str], phrases: tuple[str, str]
) -> tuple[Source, Node, Node, Node]:
    """An inverted clip, the clip, a region for each of two masks, and the node that shows them.

    masks: outputs of the clip by the titles of their regions.
    """
    model, clip = load(graph, of_clip)
    source = invert(graph, model, clip["images"], clip["source_prompt"], use.TINY_STEPS)
    graph.group("Regions")
    chain = {}
    for (title, output), phrase in zip(masks.items(), phrases, strict=True):
        node = graph.add("STE_RegionPrompt", title, mask=clip[output], phrase=phrase, **chain)
        chain = {"regions": node["regions"]}
    graph.column()
    return source, clip, node, graph.add("STE_PreviewRegions", images=clip["images"], **chain)


def layout_video(graph: Graph, name: str) -> None:
    """An object and its background, by a video in which each has its colour."""
    model, clip = load(graph, use.ONE_OBJECT)
    source = invert(graph, model, clip["images"], clip["source_prompt"], use.TINY_STEPS)
    graph.group("A layout video")
    size = {"width": use.TINY_SIDE, "height": use.TINY_SIDE, "batch_size": use.TINY_FRAMES}
    background, thing = (graph.add("EmptyImage", **size) for _ in use.LAYOUT_COLOURS)
    for node, colour in zip((background, thing), use.LAYOUT_COLOURS, strict=True):
        node.values["color"] = colour  # `color` of `add` is the node's own
    layers = {"destination": background["IMAGE"], "source": thing["IMAGE"], "mask": clip["mask_1"]}
    layout = graph.add("ImageCompositeMasked", title="Background and object", **layers)
    graph.group("Regions")
    made = graph.add("STE_RegionsFromMasks", phrases=use.LAYOUT_PHRASES, colours=layout["IMAGE"])
    graph.column()
    graph.add("STE_PreviewRegions", images=clip["images"], regions=made["regions"])
    edit_regions(graph, source, clip, made, use.LAYOUT_PROMPT, name, matching=True)


def edit_regions(
    graph: Graph,
    source: Source,
    clip: Node,
    made: Node,
    prompt: str | Output,
    name: str,
    *,
    mask: Output | None = None,
    dilation: float = use.TINY_DILATION,
    matching: bool = False,
) -> tuple[Node, Node]:
    """The edit by regions, and its files; its prompt and its model. mask: what is not kept; matching: by STR-Match."""
    model = source.model
    graph.group("Edit")
    text = {"clip": model["CLIP"], "prompt": prompt, "regions": made["regions"]}
    positive = graph.add("STE_EncodeRegionalPrompt", "Prompt: the edit", "green", **text)
    negative = graph.add("CLIPTextEncode", "Negative prompt", "red", text="", clip=model["CLIP"])
    graph.column()
    patched = graph.add("STE_STLayoutAttentionPatch", model=model["MODEL"])
    where = {} if mask is None else {"mask": mask}
    if matching:
        options = use.TINY_MATCHING | {"dilation": dilation} | (use.ALL_CHANGES if mask is None else {})
        sampler = str_sampler(graph, source.trajectory, **options, **where)
    else:
        where |= {"trajectory": source.trajectory["trajectory"], "dilation": dilation}
        sampler = graph.add("STE_SampleFromTrajectory", **where)
    source = source._replace(model={"MODEL": patched["model"]})
    conds = {"CONDITIONING": positive["conditioning"]}, negative
    edited = result(graph, model, sample(graph, source, conds, sampler["sampler"], use.TINY_CFG))
    save(graph, clip["images"], clip["fps"], edited, name)
    return positive, patched


def dds(graph: Graph, name: str, *, edit: int = use.NEW_COLOR, masked: bool = False, polished: bool = False) -> None:
    """DreamMotion on the embedded model. masked: by boxes; polished: then inverted, and matched by STR-Match."""
    model, clip = load(graph, use.ONE_OBJECT, edit)
    graph.group("Encode")
    source, latent = encode(graph, model, clip["images"], clip["source_prompt"])
    positive = graph.add("CLIPTextEncode", "Prompt: the edit", "green", text=clip["edit_prompt"], clip=model["CLIP"])
    negative = graph.add("CLIPTextEncode", "Negative prompt", "red", text="", clip=model["CLIP"])
    where = {}
    if masked:
        graph.group("Where")
        boxes = graph.add("STE_MaskFromBoxes", images=clip["images"], boxes=use.DDS_BOXES)
        where = {"mask": boxes["mask"]}
    graph.group("Optimise")
    prompts_of = {"source_positive": source, "positive": positive, "negative": negative}
    conds = {key: node["CONDITIONING"] for key, node in prompts_of.items()}
    settings = use.TINY_DDS | ({"steps": use.POLISHED_STEPS} if polished else {})
    moved = graph.add(
        "STE_VideoDDSOptimize", model=model["MODEL"], latent=latent["LATENT"], **conds, **where, **settings
    )
    if polished:
        graph.group("Invert the edit")
        trajectory = inversion(graph, model, positive, moved["latent"], use.TINY_STEPS)
        late = graph.add("SplitSigmas", "The later steps", sigmas=trajectory["sigmas"], step=use.POLISH_FROM)
        graph.group("Polish by STR-Match")
        sampler = str_sampler(graph, trajectory, **use.TINY_MATCHING)
        inverted = Source(model, moved["latent"], {"sigmas": late["low_sigmas"]})
        moved = sample(graph, inverted, (positive, negative), sampler["sampler"], use.TINY_CFG)
    graph.group("Result")
    edited = graph.add("VAEDecode", samples=moved["output" if polished else "latent"], vae=model["VAE"])["IMAGE"]
    save(graph, clip["images"], clip["fps"], edited, name)


def save_and_load(graph: Graph, name: str) -> None:
    """An edit whose inversion is saved, and the same edit from the file, muted until there is one."""
    model, clip = load(graph, use.ONE_OBJECT)
    conds = prompts(graph, model, clip["edit_prompt"], group="Prompts and latent")
    positive, latent = encode(graph, model, clip["images"], clip["source_prompt"])

    graph.group("Today: invert, save, edit")
    trajectory = inversion(graph, model, positive, latent["LATENT"], use.TINY_STEPS)
    prefix = "trajectories/red_circle"
    graph.add("STE_SaveTrajectory", trajectory=trajectory["trajectory"], filename_prefix=prefix)
    graph.column()
    sampler = str_sampler(graph, trajectory, **use.TINY_MATCHING)
    source = Source(model, latent["LATENT"], trajectory)
    edit = sample(graph, source, conds, sampler["sampler"], use.TINY_CFG)
    graph.column()
    edited = graph.add("VAEDecode", samples=edit["output"], vae=model["VAE"])
    save(graph, clip["images"], clip["fps"], edited["IMAGE"], name)

    graph.group("Another day: edit from the file (muted)", muted=True)
    before = {"model": model["MODEL"], "positive": positive["CONDITIONING"], "latent": latent["LATENT"]}
    loaded = graph.add("STE_LoadTrajectory", "Choose your file", **before)
    sampler = str_sampler(graph, loaded, **use.TINY_MATCHING)
    edit = sample(graph, source._replace(trajectory=loaded), conds, sampler["sampler"], use.TINY_CFG)
    edited = graph.add("VAEDecode", samples=edit["output"], vae=model["VAE"])
    graph.column()
    graph.add("PreviewImage", title="The same edit, without inverting", images=edited["IMAGE"])


# --- masks ------------------------------------------------------------


def of_the_clip(graph: Graph, source: Source, clip: Node, output: str) -> Output:
    """One of the masks that come with an example clip."""
    return clip[output]


def relevant(graph: Graph, source: Source, clip: Node) -> Output:
    """What the model's attention ties to a point in the object."""
    graph.group("Mask: click the object")
    trajectory = source.trajectory["trajectory"]
    return graph.add("STE_PreviewRelevance", trajectory=trajectory, images=clip["images"], **use.IN_THE_OBJECT)["mask"]


FIRST, SECOND = (partial(of_the_clip, output=output) for output in ("mask_1", "mask_2"))
DELETE = {"clip": use.DELETE_CLIP, "prompt": use.DELETE_PROMPT, "mask": SECOND, "task": "delete"}

TRANSFORMERS = {
    "cogvideox": use.COG,
    "wan": use.WAN,
    "hunyuan": use.HUNYUAN,
    "hunyuan15": use.HUNYUAN15,
    "ltx": use.LTX,
    "ltx2": use.LTX2,
    "mochi": use.MOCHI,
    "cosmos": use.COSMOS,
    "kandinsky": use.KANDINSKY,
}
"""By key of their notes."""

TEMPLATES: dict[str, tuple[str, Callable]] = {  # name: key of the notes and of the saved files, builder
    "Swap an object - prompt swap (tiny)": ("prompt_swap", partial(tiny, matching=False)),
    "Swap an object - STR-Match (tiny)": ("str_match", with_curve),
    "One block - STR-Match (tiny)": ("one_block", one_block),
    "Swap an object - STR-Match (Zeroscope)": ("zeroscope", lambda graph, name: zeroscope(graph)),
    "Keep the background exactly - STR-Match with mask (tiny)": ("str_match_mask", partial(tiny, mask=FIRST)),
    "Mask from relevance - STR-Match (tiny)": ("relevance_mask", partial(tiny, mask=relevant)),
    "Several objects, one after another - STR-Match (tiny)": ("several", several),
    "Two objects become two others - ST-Layout (tiny)": ("regions", regions),
    "Two objects trade places - ST-Layout (tiny)": ("identities", identities),
    "All objects of a kind - ST-Layout (tiny)": ("one_class", one_class),
    "One of two equal objects - ST-Layout (tiny)": ("equal", equal),
    "Part of an object - ST-Layout (tiny)": ("part", part),
    "Only the background - ST-Layout with STR-Match (tiny)": ("background", background),
    "Regions without masks - ST-Layout from attention (tiny)": ("from_attention", from_attention),
    "Object and background at once - ST-Layout with STR-Match (tiny)": ("layout_video", layout_video),
    "Recolour the clip - DreamMotion (tiny)": ("dds", dds),
    "Recolour inside a box - DreamMotion (tiny)": ("dds_mask", partial(dds, masked=True)),
    "Recolour, then polish - DreamMotion with STR-Match (tiny)": ("dds_polish", partial(dds, polished=True)),
    "Swap an object - STR-Match (LaVie)": ("lavie", lambda graph, name: lavie(graph)),
    **{
        f"Swap an object - STR-Match ({kind.title})": (key, partial(transformer, kind=kind))
        for key, kind in TRANSFORMERS.items()
    },
    "Swap an object - STR-Match (Wan 2.2)": ("wan22", partial(two_models, high=use.WAN_HIGH, low=use.WAN_LOW)),
    "Swap an object in a long clip - STR-Match (Wan)": ("long_clip", partial(long_clip, kind=use.WAN)),
    "Several objects - ST-Layout (Wan)": ("wan_regions", partial(boxes_of, kind=use.WAN)),
    "Several objects - ST-Layout (LTX-Video)": ("ltx_regions", partial(boxes_of, kind=use.LTX)),
    "Several objects - ST-Layout (LTX-2)": ("ltx2_regions", partial(boxes_of, kind=use.LTX2)),
    "Swap an object - STR-Match (AnimateDiff)": ("animatediff", partial(animatediff, regions=False)),
    "Several objects - ST-Layout (AnimateDiff)": ("animatediff_regions", partial(animatediff, regions=True)),
    "Restyle a clip - DreamMotion (Zeroscope)": ("dds_zeroscope", lambda graph, name: dds_zeroscope(graph)),
    "Restyle key frames in pixels - DreamMotion (Show-1)": ("dds_show1", lambda graph, name: dds_show1(graph)),
    "Several objects - ST-Layout with ControlNet (SD 1.5)": ("sd15", partial(sd15, tracked=False)),
    "Several objects - ST-Layout with SAM3 and ControlNet (SD 1.5)": ("sd15_sam3", partial(sd15, tracked=True)),
    "Parts of an object - ST-Layout with SAM3 (SD 1.5)": ("sd15_parts", partial(sd15, tracked=True, told=PARTS)),
    "Measure an edit - STR-Match (tiny)": ("measured", measured),
    "Check your model (tiny)": ("checked", checked),
    "Compare edits - prompt swap and STR-Match (tiny)": ("compared", compared),
    "Delete an object - STR-Match (tiny)": ("delete", partial(tiny, **DELETE)),
    "Add an object - STR-Match (tiny)": ("add", add),
    "Compare lambdas - STR-Match (tiny)": ("compare_lambdas", compare_lambdas),
    "Save and load a trajectory (tiny)": ("save_and_load", save_and_load),
}


def main() -> None:
    with other_packs() as others, LiveServer(host_path(), **others) as server:
        definitions = server.get("/object_info")
    for name, (key, build) in TEMPLATES.items():
        if not is_there(name):
            continue
        graph = Graph(name, definitions)
        build(graph, key)
        graph.note("About", ABOUT[key])
        graph.note("What to try", TRY[key])
        path = WORKFLOWS / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(graph.to_json(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        print(path.relative_to(WORKFLOWS.parent))


if __name__ == "__main__":
    main()
