"""The templates on real weights and a clip of the user's."""

from __future__ import annotations

from typing import NamedTuple

import template_settings as use
from graphs import Graph, Node, Output
from template_parts import (
    Source,
    encode,
    folder,
    inversion,
    load_folder,
    load_transformer,
    network,
    own_clip,
    prompts,
    result,
    sample,
    str_sampler,
    text_and_vae,
)


def zeroscope(graph: Graph) -> None:
    """STR-Match on Zeroscope and a clip of the user's."""
    match_real(graph, *load_folder(graph, use.ZEROSCOPE, use.ZEROSCOPE_FRAMES), "zeroscope")


def lavie(graph: Graph) -> None:
    """STR-Match on LaVie and a clip of the user's."""
    graph.group("Load")
    loader = graph.add("STE_LoadLaVie", model_name=use.LAVIE)
    loader.models = [{"name": use.LAVIE, "url": use.LAVIE_URL, "directory": "diffusion_models"}]
    checkpoint = graph.add("CheckpointLoaderSimple", "CLIP and VAE: any SD 1.x", ckpt_name=use.SD15)
    checkpoint.models = [{"name": use.SD15, "url": use.SD15_URL, "directory": "checkpoints"}]
    parts, clip = own_clip(graph, loader["MODEL"], use.LAVIE_FRAMES, use.LAVIE_SIDE)
    model = {"MODEL": loader["MODEL"], "CLIP": checkpoint["CLIP"], "VAE": checkpoint["VAE"]}
    match_real(graph, model, parts, clip, "lavie")


def transformer(graph: Graph, name: str, *, kind: use.Transformer) -> None:
    """STR-Match on a video transformer and a clip of the user's."""
    match_real(graph, *load_transformer(graph, kind), name, kind.cfg)


def long_clip(graph: Graph, name: str, *, kind: use.Transformer) -> None:
    """STR-Match on a clip that is longer than the model's, in the host's context windows."""
    graph.group("Load")
    loader, model = network(graph, kind)
    others = text_and_vae(graph, kind, loader)
    file = graph.add("LoadVideo", title="Your clip: choose a file", file="")
    graph.column()
    windowed = graph.add("WanContextWindowsManual", model=model, **use.LONG_WINDOW)["MODEL"]
    parts = graph.add("GetVideoComponents", video=file["VIDEO"])
    size = {"max_frames": use.LONG_FRAMES, "max_side": kind.side}
    clip = graph.add("STE_FitClipToModel", images=parts["images"], model=windowed, **size)
    match_real(graph, {"MODEL": windowed, **others}, parts, clip, name, kind.cfg)


def two_models(graph: Graph, name: str, *, high: use.Transformer, low: use.Transformer) -> None:
    """STR-Match on a pair of models, of which one works at high noise and one at low noise."""
    graph.group("Load")
    loader, at_high = network(graph, high)
    _, at_low = network(graph, low)
    others = text_and_vae(graph, high, loader)
    parts, clip = own_clip(graph, at_low, high.frames, high.side)
    model = {"MODEL": at_low, **others}
    graph.group("Invert: low noise, then high")
    positive, latent = encode(graph, model, clip["images"], use.STR_SOURCE)
    graph.column()
    start = {"positive": positive["CONDITIONING"], "latent": latent["LATENT"], "steps": 50}
    below = graph.add("STE_InvertVideo", "Low noise", model=at_low, to_percent=use.WAN_PERCENT, **start)
    above = graph.add("STE_InvertVideo", "High noise", model=at_high, trajectory=below["trajectory"], **start)
    conds = prompts(graph, model, use.STR_PROMPT, group="Edit: high noise, then low")
    sampler = str_sampler(graph, above, strength=1.0)
    drawn = sample(graph, Source({"MODEL": at_high}, latent["LATENT"], above), conds, sampler["sampler"], high.cfg)
    graph.column()
    sampler = str_sampler(graph, below, strength=1.0, continue_from_latent=True)
    drawn = sample(graph, Source({"MODEL": at_low}, drawn["output"], below), conds, sampler["sampler"], high.cfg)
    edited = result(graph, model, drawn)
    compare(graph, clip, edited, parts, name)


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
    patched = graph.add("STE_STLayoutAttentionPatch", model=model["MODEL"])
    where = {"trajectory": trajectory["trajectory"], "mask": seen["mask"]}
    sampler = graph.add("STE_SampleFromTrajectory", **where)
    source = Source({"MODEL": patched["model"]}, latent["LATENT"], trajectory)
    conds = {"CONDITIONING": positive["conditioning"]}, negative
    edited = result(graph, model, sample(graph, source, conds, sampler["sampler"], cfg))
    compare(graph, clip, edited, parts, name)


def compare(graph: Graph, clip: Node, edited: Output, parts: Node, name: str) -> None:
    """Clip and edit side by side, as a film."""
    graph.column()
    pair = graph.add("ImageStitch", title="Clip | edit", image1=clip["images"], image2=edited)
    film = graph.add("CreateVideo", images=pair["IMAGE"], fps=parts["fps"], audio=parts["audio"])
    graph.add("SaveVideo", title="Film: clip | edit", video=film["VIDEO"], filename_prefix=f"spacetime_edit/{name}")


def boxes_of(graph: Graph, name: str, *, kind: use.Transformer) -> None:
    """ST-Layout on a video transformer and a clip of the user's."""
    edit_by_boxes(graph, *load_transformer(graph, kind), name, kind.cfg)


def match_real(graph: Graph, model: Node | dict, parts: Node, clip: Node, name: str, cfg: float = 7.5) -> None:
    """STR-Match on real weights: cost, inversion, which is saved, edit, and both side by side."""
    graph.group("Encode")
    positive, latent = encode(graph, model, clip["images"], use.STR_SOURCE)
    graph.group("What it will cost")
    plan = {"model": model["MODEL"], "positive": positive["CONDITIONING"], "latent": latent["LATENT"]}
    graph.add("STE_PredictCost", **plan)
    graph.group("Invert")
    trajectory = inversion(graph, model, positive, latent["LATENT"], 50)
    graph.add("STE_SaveTrajectory", trajectory=trajectory["trajectory"], filename_prefix=f"trajectories/{name}")
    source = Source(model, latent["LATENT"], trajectory)

    conds = prompts(graph, model, use.STR_PROMPT)
    sampler = str_sampler(graph, trajectory, strength=1.0)
    edited = result(graph, model, sample(graph, source, conds, sampler["sampler"], cfg))
    film = graph.add("CreateVideo", images=edited, fps=parts["fps"], audio=parts["audio"])
    graph.add("SaveVideo", title="Film: the edit", video=film["VIDEO"], filename_prefix=f"spacetime_edit/{name}")
    compare(graph, clip, edited, parts, f"{name}_compared")


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
    compare(graph, clip, edited, parts, "dreammotion")


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
    film = graph.add("CreateVideo", images=images, fps=parts["fps"], audio=parts["audio"])
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
    patched = graph.add("STE_STLayoutAttentionPatch", model=inflated["model"])
    sampler = graph.add("STE_SampleFromTrajectory", trajectory=trajectory["trajectory"], mask=mask)
    source = Source({"MODEL": patched["model"]}, latent["LATENT"], trajectory)
    conds = {"CONDITIONING": held["positive"]}, {"CONDITIONING": held["negative"]}
    edited = result(graph, model, sample(graph, source, conds, sampler["sampler"], 7.5))
    compare(graph, clip, edited, parts, name)
