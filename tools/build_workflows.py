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
from typing import NamedTuple

import template_settings as use
from graphs import Graph, Node, Output
from other_packs import is_there, other_packs
from pack import host_path
from server import LiveServer
from template_notes import ABOUT, TRY
from template_parts import (
    Source,
    encode,
    folder,
    inversion,
    invert,
    load,
    load_folder,
    load_wan,
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
    source, clip, chain, seen = two_regions(graph, use.REGIONS_PHRASES)
    positive, patched = edit_regions(graph, source, clip, chain, use.REGIONS_PROMPT, name, mask=seen["mask"])
    graph.group("Where its words act")
    look = {"trajectory": source.trajectory["trajectory"], "images": clip["images"], "model": patched["model"]}
    look |= {"positive": positive["conditioning"], "layout": positive["layout"], "words": use.REGIONS_PHRASES[0]}
    graph.add("STE_PreviewTokenAttention", **look)


def identities(graph: Graph, name: str) -> None:
    """Two objects take each other's place: the prompt is the clip's own, only the masks are exchanged."""
    source, clip, chain, seen = two_regions(graph, use.IDENTITY_PHRASES)
    edit_regions(graph, source, clip, chain, clip["source_prompt"], name, mask=seen["mask"])


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


def two_regions(graph: Graph, phrases: tuple[str, str]) -> tuple[Source, Node, Node, Node]:
    """An inverted clip of two objects, the clip, a region for each object, and the node that shows them."""
    model, clip = load(graph, use.REGIONS_CLIP)
    source = invert(graph, model, clip["images"], clip["source_prompt"], use.TINY_STEPS)
    graph.group("Regions")
    first, second = phrases
    left = graph.add("STE_RegionPrompt", "The left object", mask=clip["mask_1"], phrase=first)
    of_right = {"mask": clip["mask_2"], "phrase": second, "regions": left["regions"]}
    chain = graph.add("STE_RegionPrompt", "The right object", **of_right)
    graph.column()
    return source, clip, chain, graph.add("STE_PreviewRegions", images=clip["images"], regions=chain["regions"])


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
    patch = {"model": model["MODEL"], "layout": positive["layout"], **use.TINY_LAYOUT}
    patched = graph.add("STE_STLayoutAttentionPatch", **patch)
    where = {} if mask is None else {"mask": mask}
    if matching:
        options = use.TINY_MATCHING | {"dilation": dilation}
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


def zeroscope(graph: Graph) -> None:
    """STR-Match on Zeroscope and a clip of the user's."""
    match_real(graph, *load_folder(graph, use.ZEROSCOPE, use.ZEROSCOPE_FRAMES), "zeroscope")


def lavie(graph: Graph) -> None:
    """STR-Match on LaVie and a clip of the user's."""
    graph.group("Load")
    network = graph.add("STE_LoadLaVie", model_name=use.LAVIE)
    network.models = [{"name": use.LAVIE, "url": use.LAVIE_URL, "directory": "diffusion_models"}]
    checkpoint = graph.add("CheckpointLoaderSimple", "CLIP and VAE: any SD 1.x", ckpt_name=use.SD15)
    checkpoint.models = [{"name": use.SD15, "url": use.SD15_URL, "directory": "checkpoints"}]
    file = graph.add("LoadVideo", title="Your clip: choose a file", file="")
    graph.column()
    parts = graph.add("GetVideoComponents", video=file["VIDEO"])
    size = {"max_frames": use.LAVIE_FRAMES, "max_side": use.LAVIE_SIDE}
    clip = graph.add("STE_FitClipToModel", images=parts["images"], model=network["MODEL"], **size)
    model = {"MODEL": network["MODEL"], "CLIP": checkpoint["CLIP"], "VAE": checkpoint["VAE"]}
    match_real(graph, model, parts, clip, "lavie")


def cogvideox(graph: Graph) -> None:
    """STR-Match on CogVideoX and a clip of the user's."""
    graph.group("Load")
    network = graph.add("STE_LoadCogVideoX", model_name=use.COGVIDEOX)
    network.models = [
        {"name": name, "url": f"{use.COGVIDEOX_URL}/{name.split('/')[-1]}", "directory": "diffusion_models"}
        for name in (use.COGVIDEOX, use.COGVIDEOX_REST)
    ]
    text = graph.add("CLIPLoader", clip_name=use.T5, type="cogvideox")
    text.models = [{"name": use.T5, "url": use.T5_URL, "directory": "text_encoders"}]
    vae = graph.add("VAELoader", vae_name=use.COGVIDEOX_VAE)
    vae.models = [{"name": use.COGVIDEOX_VAE, "url": use.COGVIDEOX_VAE_URL, "directory": "vae"}]
    file = graph.add("LoadVideo", title="Your clip: choose a file", file="")
    graph.column()
    parts = graph.add("GetVideoComponents", video=file["VIDEO"])
    size = {"max_frames": use.COGVIDEOX_FRAMES, "max_side": use.COGVIDEOX_SIDE}
    clip = graph.add("STE_FitClipToModel", images=parts["images"], model=network["MODEL"], **size)
    model = {"MODEL": network["MODEL"], "CLIP": text["CLIP"], "VAE": vae["VAE"]}
    match_real(graph, model, parts, clip, "cogvideox", use.COGVIDEOX_CFG)


def wan(graph: Graph) -> None:
    """STR-Match on Wan 2.1 and a clip of the user's."""
    match_real(graph, *load_wan(graph), "wan", use.WAN_CFG)


def animatediff(graph: Graph, name: str, *, regions: bool) -> None:
    """STR-Match, or ST-Layout, on SD 1.5 with a motion model of AnimateDiff-Evolved."""
    graph.group("Load")
    checkpoint = graph.add("CheckpointLoaderSimple", "SD 1.5, or a finetune of it", ckpt_name=use.SD15)
    checkpoint.models = [{"name": use.SD15, "url": use.SD15_URL, "directory": "checkpoints"}]
    motion = graph.add("ADE_LoadAnimateDiffModel", model_name=use.MOTION)
    motion.models = [{"name": use.MOTION, "url": use.MOTION_URL, "directory": "animatediff_models"}]
    file = graph.add("LoadVideo", title="Your clip: choose a file", file="")
    graph.column()
    applied = graph.add("ADE_ApplyAnimateDiffModelSimple", motion_model=motion["MOTION_MODEL"])
    evolved = graph.add("ADE_UseEvolvedSampling", model=checkpoint["MODEL"], m_models=applied["M_MODELS"])
    parts = graph.add("GetVideoComponents", video=file["VIDEO"])
    size = {"max_frames": use.SD15_FRAMES, "max_side": use.SD15_SIDE}
    clip = graph.add("STE_FitClipToModel", images=parts["images"], model=evolved["MODEL"], **size)
    model = {"MODEL": evolved["MODEL"], "CLIP": checkpoint["CLIP"], "VAE": checkpoint["VAE"]}
    edit = edit_by_boxes if regions else match_real
    edit(graph, model, parts, clip, name)


def edit_by_boxes(graph: Graph, model: dict, parts: Node, clip: Node, name: str, cfg: float = 7.5) -> None:
    """ST-Layout on real weights: two objects, each by boxes and a phrase."""
    graph.group("Invert")
    positive, latent = encode(graph, model, clip["images"], use.SD15_SOURCE)
    trajectory = inversion(graph, model, positive, latent["LATENT"], 50)
    graph.group("Regions")
    chain = None
    for boxes, phrase in zip((use.LEFT_BOXES, use.RIGHT_BOXES), use.SD15_PHRASES.split("\n"), strict=True):
        mask = graph.add("STE_MaskFromBoxes", phrase, images=clip["images"], boxes=boxes)["mask"]
        before = {} if chain is None else {"regions": chain["regions"]}
        chain = graph.add("STE_RegionPrompt", phrase, mask=mask, phrase=phrase, **before)
    graph.column()
    seen = graph.add("STE_PreviewRegions", images=clip["images"], regions=chain["regions"])
    graph.group("Edit")
    text = {"clip": model["CLIP"], "prompt": use.SD15_PROMPT, "regions": chain["regions"]}
    positive = graph.add("STE_EncodeRegionalPrompt", "Prompt: the edit", "green", **text)
    negative = graph.add("CLIPTextEncode", "Negative prompt", "red", text="", clip=model["CLIP"])
    graph.column()
    patched = graph.add("STE_STLayoutAttentionPatch", model=model["MODEL"], layout=positive["layout"])
    where = {"trajectory": trajectory["trajectory"], "mask": seen["mask"]}
    sampler = graph.add("STE_SampleFromTrajectory", **where)
    source = Source({"MODEL": patched["model"]}, latent["LATENT"], trajectory)
    conds = {"CONDITIONING": positive["conditioning"]}, negative
    edited = result(graph, model, sample(graph, source, conds, sampler["sampler"], cfg))
    graph.column()
    pair = graph.add("ImageStitch", title="Clip | edit", image1=clip["images"], image2=edited)
    film = graph.add("CreateVideo", images=pair["IMAGE"], fps=parts["fps"])
    graph.add("SaveVideo", title="Film: clip | edit", video=film["VIDEO"], filename_prefix=f"spacetime_edit/{name}")


def match_real(graph: Graph, model: Node | dict, parts: Node, clip: Node, name: str, cfg: float = 7.5) -> None:
    """STR-Match on real weights: cost, inversion, which is saved, edit, and both side by side."""
    graph.group("Encode")
    positive, latent = encode(graph, model, clip["images"], use.STR_SOURCE)
    graph.group("What it will cost")
    plan = {"model": model["MODEL"], "positive": positive["CONDITIONING"], "latent": latent["LATENT"], "steps": 50}
    graph.add("STE_PredictCost", **plan)
    graph.group("Invert")
    trajectory = inversion(graph, model, positive, latent["LATENT"], 50)
    graph.add("STE_SaveTrajectory", trajectory=trajectory["trajectory"], filename_prefix=f"trajectories/{name}")
    source = Source(model, latent["LATENT"], trajectory)

    conds = prompts(graph, model, use.STR_PROMPT)
    sampler = str_sampler(graph, trajectory, strength=0.01)
    edited = result(graph, model, sample(graph, source, conds, sampler["sampler"], cfg))
    film = graph.add("CreateVideo", images=edited, fps=parts["fps"])
    graph.add("SaveVideo", title="Film: the edit", video=film["VIDEO"], filename_prefix=f"spacetime_edit/{name}")
    graph.column()
    pair = graph.add("ImageStitch", title="Clip | edit", image1=clip["images"], image2=edited)
    film = graph.add("CreateVideo", images=pair["IMAGE"], fps=parts["fps"])
    prefix = f"spacetime_edit/{name}_compared"
    graph.add("SaveVideo", title="Film: clip | edit", video=film["VIDEO"], filename_prefix=prefix)


def dds_zeroscope(graph: Graph) -> None:
    """DreamMotion on real weights and a clip of the user's."""
    model, parts, clip = load_folder(graph, use.ZEROSCOPE, use.DDS_FRAMES)
    graph.group("Encode")
    source, latent = encode(graph, model, clip["images"], use.DDS_SOURCE)
    positive, negative = prompts(graph, model, use.DDS_PROMPT, group="Optimise")
    conds = {"source_positive": source["CONDITIONING"], "positive": positive["CONDITIONING"]}
    conds["negative"] = negative["CONDITIONING"]
    moved = graph.add("STE_VideoDDSOptimize", model=model["MODEL"], latent=latent["LATENT"], **conds)
    graph.group("Result")
    edited = graph.add("VAEDecode", samples=moved["latent"], vae=model["VAE"])["IMAGE"]
    graph.column()
    pair = graph.add("ImageStitch", title="Clip | edit", image1=clip["images"], image2=edited)
    film = graph.add("CreateVideo", images=pair["IMAGE"], fps=parts["fps"])
    graph.add("SaveVideo", title="Film: clip | edit", video=film["VIDEO"], filename_prefix="spacetime_edit/dreammotion")


def dds_show1(graph: Graph) -> None:
    """DreamMotion on the pixels of Show-1's key frames, then drawn large by Zeroscope."""
    model, parts, clip = load_folder(graph, use.SHOW1, use.DDS_FRAMES)
    graph.group("Encode")
    source, latent = encode(graph, model, clip["images"], use.DDS_SOURCE)
    graph.group("Optimise key frames")
    positive = graph.add("CLIPTextEncode", "Prompt: the edit", "green", text=use.DDS_PROMPT, clip=model["CLIP"])
    negative = graph.add("CLIPTextEncode", "Negative prompt", "red", text=use.SHOW1_NEGATIVE, clip=model["CLIP"])
    graph.column()
    of_prompts = {"source_positive": source, "positive": positive, "negative": negative}
    conds = {key: node["CONDITIONING"] for key, node in of_prompts.items()}
    moved = graph.add("STE_VideoDDSOptimize", model=model["MODEL"], latent=latent["LATENT"], **conds, **use.SHOW1_DDS)
    edited = graph.add("VAEDecode", samples=moved["latent"], vae=model["VAE"])["IMAGE"]
    graph.group("Draw them large")
    larger = folder(graph, use.ZEROSCOPE)
    scaled = graph.add("ImageScale", image=edited, upscale_method="lanczos", crop="center", **use.REFINED_SIZE)
    graph.column()
    latent = graph.add("VAEEncode", pixels=scaled["IMAGE"], vae=larger["VAE"])
    positive = graph.add("CLIPTextEncode", "Prompt: the edit", "green", text=use.DDS_PROMPT, clip=larger["CLIP"])
    negative = graph.add("CLIPTextEncode", "Negative prompt", "red", text=use.SHOW1_NEGATIVE, clip=larger["CLIP"])
    graph.column()
    drawn = graph.add(
        "KSampler",
        model=larger["MODEL"],
        positive=positive["CONDITIONING"],
        negative=negative["CONDITIONING"],
        latent_image=latent["LATENT"],
        denoise=use.REFINED_DENOISE,
    )
    graph.group("Result")
    images = graph.add("VAEDecode", samples=drawn["LATENT"], vae=larger["VAE"])["IMAGE"]
    graph.column()
    film = graph.add("CreateVideo", images=images, fps=parts["fps"])
    graph.add("SaveVideo", title="Film: the edit", video=film["VIDEO"], filename_prefix="spacetime_edit/show1")


class Told(NamedTuple):
    """What a clip shows, what it shall show, what SAM3 tracks in it and the phrases of that."""

    source: str
    prompt: str
    tracked: str
    phrases: str


OBJECTS = Told(use.SD15_SOURCE, use.SD15_PROMPT, use.SD15_TRACKED, use.SD15_PHRASES)
PARTS = Told(use.PARTS_SOURCE, use.PARTS_PROMPT, use.PARTS_TRACKED, use.PARTS_PHRASES)


def sd15(graph: Graph, name: str, *, tracked: bool, told: Told = OBJECTS) -> None:
    """ST-Layout on SD 1.5 with a depth ControlNet. tracked: masks by SAM3, else by the model's own attention."""
    graph.group("Load")
    checkpoint = graph.add("CheckpointLoaderSimple", "SD 1.5, or a finetune of it", ckpt_name=use.SD15)
    checkpoint.models = [{"name": use.SD15, "url": use.SD15_URL, "directory": "checkpoints"}]
    net = graph.add("ControlNetLoader", control_net_name=use.DEPTH_NET)
    net.models = [{"name": use.DEPTH_NET, "url": use.DEPTH_NET_URL, "directory": "controlnet"}]
    file = graph.add("LoadVideo", title="Your clip: choose a file", file="")
    graph.column()
    parts = graph.add("GetVideoComponents", video=file["VIDEO"])
    inflated = graph.add("STE_InflateAttention", model=checkpoint["MODEL"])
    size = {"max_frames": use.SD15_FRAMES, "max_side": use.SD15_SIDE}
    clip = graph.add("STE_FitClipToModel", images=parts["images"], model=inflated["model"], **size)
    graph.group("Depth")
    depth_model = graph.add("LoadDA3Model", model_name=use.DEPTH_MODEL)
    depth_model.models = [{"name": use.DEPTH_MODEL, "url": use.DEPTH_MODEL_URL, "directory": "geometry_estimation"}]
    geometry = graph.add("DA3Inference", da3_model=depth_model["DA3_MODEL"], image=clip["images"], mode="mono")
    graph.column()
    depth = graph.add("DA3Render", da3_geometry=geometry["da3_geometry"], output="depth")["IMAGE"]

    graph.group("Invert")
    model = {"MODEL": inflated["model"], "CLIP": checkpoint["CLIP"], "VAE": checkpoint["VAE"]}
    positive, latent = encode(graph, model, clip["images"], told.source)
    negative = graph.add("CLIPTextEncode", "Negative prompt", "red", text="", clip=checkpoint["CLIP"])
    graph.column()
    control = {"control_net": net["CONTROL_NET"], "image": depth}
    pair = {"positive": positive["CONDITIONING"], "negative": negative["CONDITIONING"]}
    held = graph.add("ControlNetApplyAdvanced", **pair, **control)
    trajectory = inversion(graph, model, {"CONDITIONING": held["positive"]}, latent["LATENT"], 50)

    graph.group("Regions")
    if tracked:
        sam = graph.add("CheckpointLoaderSimple", "SAM3", ckpt_name=use.SAM3)
        sam.models = [{"name": use.SAM3, "url": use.SAM3_URL, "directory": "checkpoints"}]
        words = graph.add("CLIPTextEncode", "What to track", text=told.tracked, clip=sam["CLIP"])
        graph.column()
        seen = {"images": clip["images"], "model": sam["MODEL"], "conditioning": words["CONDITIONING"]}
        tracks = graph.add("SAM3_VideoTrack", **seen)["track_data"]
        made = graph.add("STE_RegionsFromMasks", phrases=told.phrases, track_data=tracks)
        mask = graph.add("STE_PreviewRegions", images=clip["images"], regions=made["regions"])["mask"]
    else:
        look = {"trajectory": trajectory["trajectory"], "images": clip["images"], "kinds": 4}
        made = graph.add("STE_RegionsFromAttention", phrases=use.SD15_FOUND, **look)
        mask = made["mask"]

    graph.group("Edit")
    text = {"clip": checkpoint["CLIP"], "prompt": told.prompt, "regions": made["regions"]}
    positive = graph.add("STE_EncodeRegionalPrompt", "Prompt: the edit", "green", **text)
    negative = graph.add("CLIPTextEncode", "Negative prompt", "red", text=use.SD15_NEGATIVE, clip=checkpoint["CLIP"])
    graph.column()
    pair = {"positive": positive["conditioning"], "negative": negative["CONDITIONING"]}
    held = graph.add("ControlNetApplyAdvanced", **pair, **control)
    patched = graph.add("STE_STLayoutAttentionPatch", model=inflated["model"], layout=positive["layout"])
    sampler = graph.add("STE_SampleFromTrajectory", trajectory=trajectory["trajectory"], mask=mask)
    source = Source({"MODEL": patched["model"]}, latent["LATENT"], trajectory)
    conds = {"CONDITIONING": held["positive"]}, {"CONDITIONING": held["negative"]}
    edited = result(graph, model, sample(graph, source, conds, sampler["sampler"], 7.5))
    graph.column()
    pair = graph.add("ImageStitch", title="Clip | edit", image1=clip["images"], image2=edited)
    film = graph.add("CreateVideo", images=pair["IMAGE"], fps=parts["fps"])
    graph.add("SaveVideo", title="Film: clip | edit", video=film["VIDEO"], filename_prefix=f"spacetime_edit/{name}")


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

TEMPLATES: dict[str, tuple[str, Callable]] = {  # name: key of the notes and of the saved files, builder
    "Swap an object - prompt swap (tiny)": ("prompt_swap", partial(tiny, matching=False)),
    "Swap an object - STR-Match (tiny)": ("str_match", with_curve),
    "Swap an object - STR-Match (Zeroscope)": ("zeroscope", lambda graph, name: zeroscope(graph)),
    "Keep the background exactly - STR-Match with mask (tiny)": ("str_match_mask", partial(tiny, mask=FIRST)),
    "Mask from relevance - STR-Match (tiny)": ("relevance_mask", partial(tiny, mask=relevant)),
    "Several objects, one after another - STR-Match (tiny)": ("several", several),
    "Two objects become two others - ST-Layout (tiny)": ("regions", regions),
    "Two objects trade places - ST-Layout (tiny)": ("identities", identities),
    "All objects of a kind - ST-Layout (tiny)": ("one_class", one_class),
    "Only the background - ST-Layout with STR-Match (tiny)": ("background", background),
    "Regions without masks - ST-Layout from attention (tiny)": ("from_attention", from_attention),
    "Object and background at once - ST-Layout with STR-Match (tiny)": ("layout_video", layout_video),
    "Recolour the clip - DreamMotion (tiny)": ("dds", dds),
    "Recolour inside a box - DreamMotion (tiny)": ("dds_mask", partial(dds, masked=True)),
    "Recolour, then polish - DreamMotion with STR-Match (tiny)": ("dds_polish", partial(dds, polished=True)),
    "Swap an object - STR-Match (LaVie)": ("lavie", lambda graph, name: lavie(graph)),
    "Swap an object - STR-Match (CogVideoX)": ("cogvideox", lambda graph, name: cogvideox(graph)),
    "Swap an object - STR-Match (Wan)": ("wan", lambda graph, name: wan(graph)),
    "Several objects - ST-Layout (Wan)": (
        "wan_regions",
        lambda graph, name: edit_by_boxes(graph, *load_wan(graph), name, use.WAN_CFG),
    ),
    "Swap an object - STR-Match (AnimateDiff)": ("animatediff", partial(animatediff, regions=False)),
    "Several objects - ST-Layout (AnimateDiff)": ("animatediff_regions", partial(animatediff, regions=True)),
    "Restyle a clip - DreamMotion (Zeroscope)": ("dds_zeroscope", lambda graph, name: dds_zeroscope(graph)),
    "Restyle key frames in pixels - DreamMotion (Show-1)": ("dds_show1", lambda graph, name: dds_show1(graph)),
    "Several objects - ST-Layout with ControlNet (SD 1.5)": ("sd15", partial(sd15, tracked=False)),
    "Several objects - ST-Layout with SAM3 and ControlNet (SD 1.5)": ("sd15_sam3", partial(sd15, tracked=True)),
    "Parts of an object - ST-Layout with SAM3 (SD 1.5)": ("sd15_parts", partial(sd15, tracked=True, told=PARTS)),
    "Measure an edit - STR-Match (tiny)": ("measured", measured),
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
