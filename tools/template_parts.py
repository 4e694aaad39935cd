"""What templates share: groups of nodes that load, encode, invert, sample and save."""

from __future__ import annotations

from typing import Any, NamedTuple

import template_settings as use
from graphs import Graph, Node, Output


class Source(NamedTuple):
    """An inverted clip: what every edit of it needs. trajectory: the node that has it, with its sigmas."""

    model: Node
    latent: Output
    trajectory: Node


FOLDERS = {  # address and longest side
    use.ZEROSCOPE: (use.ZEROSCOPE_URL, use.ZEROSCOPE_SIDE),
    use.SHOW1: (use.SHOW1_URL, use.SHOW1_SIDE),
}


def load(graph: Graph, clip: str, edit: int = use.NEW_SHAPE) -> tuple[Node, Node]:
    """The group with the embedded model and a clip."""
    graph.group("Load")
    model = graph.add("STE_LoadVideoDiffusersModel", model_name=use.TINY_MODEL)
    return model, graph.add("STE_LoadExampleClip", clip=clip, edit=edit)


def folder(graph: Graph, name: str) -> Node:
    """The loader of a folder that the user has downloaded."""
    url, _ = FOLDERS[name]
    model = graph.add("STE_LoadVideoDiffusersModel", model_name=name)
    model.models = [{"name": name, "url": url, "directory": "diffusers"}]
    return model


def load_folder(graph: Graph, name: str, frames: int) -> tuple[Node, Node, Node]:
    """The group with real weights and a clip of the user's: the model, the parts of the video, the clip that fits."""
    graph.group("Load")
    model = folder(graph, name)
    return model, *own_clip(graph, model["MODEL"], frames, FOLDERS[name][1])


def network(graph: Graph, kind: use.Transformer) -> tuple[Node, Output]:
    """The loader of a transformer of the host's own, and the model that it puts out."""
    if kind.vae is None:
        node = graph.add("CheckpointLoaderSimple", "Model and VAE", ckpt_name=kind.network.name)
    elif kind is use.COG:
        node = graph.add("STE_LoadCogVideoX", model_name=kind.network.name)
    else:
        node = graph.add("UNETLoader", unet_name=kind.network.name, weight_dtype="default")
    node.models = [file.model for file in (kind.network, *kind.beside)]
    return node, node["MODEL"]


def text_and_vae(graph: Graph, kind: use.Transformer, loader: Node) -> dict[str, Output]:
    """Text encoder and VAE of a transformer, by kind of output."""
    names = [file.name for file in kind.text]
    if kind is use.LTX2:
        text = graph.add("LTXAVTextEncoderLoader", text_encoder=names[0], ckpt_name=kind.network.name)
    elif len(names) == 1:
        text = graph.add("CLIPLoader", clip_name=names[0], type=kind.text_type)
    else:
        text = graph.add("DualCLIPLoader", clip_name1=names[0], clip_name2=names[1], type=kind.text_type)
    text.models = [file.model for file in kind.text]
    if kind.vae is None:
        return {"CLIP": text["CLIP"], "VAE": loader["VAE"]}
    vae = graph.add("VAELoader", vae_name=kind.vae.name)
    vae.models = [kind.vae.model]
    return {"CLIP": text["CLIP"], "VAE": vae["VAE"]}


def load_transformer(graph: Graph, kind: use.Transformer) -> tuple[dict, Node, Node]:
    """The group with a transformer and a clip of the user's: as `load_folder`."""
    graph.group("Load")
    loader, model = network(graph, kind)
    others = text_and_vae(graph, kind, loader)
    parts, clip = own_clip(graph, model, kind.frames, kind.side)
    return {"MODEL": model, **others}, parts, clip


def own_clip(graph: Graph, model: Output, frames: int, side: int) -> tuple[Node, Node]:
    """A clip of the user's: the parts of the video, and the clip that fits."""
    file = graph.add("LoadVideo", title="Your clip: choose a file", file="")
    graph.column()
    parts = graph.add("GetVideoComponents", video=file["VIDEO"])
    size = {"max_frames": frames, "max_side": side}
    return parts, graph.add("STE_FitClipToModel", images=parts["images"], model=model, **size)


def encode(graph: Graph, model: Node, images: Output, prompt: Any) -> tuple[Node, Node]:
    """The prompt of a clip and its latent."""
    positive = graph.add("CLIPTextEncode", "Prompt: the clip as it is", "green", text=prompt, clip=model["CLIP"])
    return positive, graph.add("VAEEncode", pixels=images, vae=model["VAE"])


def inversion(graph: Graph, model: Node, positive: Node, latent: Output, steps: int) -> Node:
    start = {"model": model["MODEL"], "positive": positive["CONDITIONING"], "latent": latent}
    return graph.add("STE_InvertVideo", steps=steps, **start)


def invert(graph: Graph, model: Node, images: Output, prompt: Any, steps: int) -> Source:
    """The group that turns a clip to noise."""
    graph.group("Invert")
    positive, latent = encode(graph, model, images, prompt)
    graph.column()
    return Source(model, latent["LATENT"], inversion(graph, model, positive, latent["LATENT"], steps))


def prompts(graph: Graph, model: Node, edit: Any, group: str = "Edit") -> tuple[Node, Node]:
    """Begin the group that edits: positive and negative prompt, and a column for the sampler."""
    graph.group(group)
    positive = graph.add("CLIPTextEncode", "Prompt: the edit", "green", text=edit, clip=model["CLIP"])
    negative = graph.add("CLIPTextEncode", "Negative prompt", "red", text="", clip=model["CLIP"])
    graph.column()
    return positive, negative


def str_sampler(graph: Graph, trajectory: Node, **options: Any) -> Node:
    """The sampler of STR-Match and what it matches."""
    score = graph.add("STE_CaptureSTRScore", trajectory=trajectory["trajectory"])
    return graph.add("STE_STRLatentOptimizer", score=score["STR score"], **options)


def sample(
    graph: Graph, source: Source, conds: tuple[Node, Node], sampler: Output, cfg: float, seed: int | None = None
) -> Node:
    """End the group that edits: the node with the edited latent. seed: for a task that begins from new noise."""
    graph.column()
    positive, negative = (node["CONDITIONING"] for node in conds)
    guider = graph.add("CFGGuider", model=source.model["MODEL"], positive=positive, negative=negative, cfg=cfg)
    noise = graph.add("DisableNoise") if seed is None else graph.add("RandomNoise", noise_seed=seed)
    return graph.add(
        "SamplerCustomAdvanced",
        noise=noise["NOISE"],
        guider=guider["GUIDER"],
        sampler=sampler,
        sigmas=source.trajectory["sigmas"],
        latent_image=source.latent,
    )


def result(graph: Graph, model: Node, edit: Node) -> Output:
    """Begin the group for results: the edited frames."""
    graph.group("Result")
    return graph.add("VAEDecode", samples=edit["output"], vae=model["VAE"])["IMAGE"]


def save(graph: Graph, images: Output, fps: Output, edited: Output, name: str) -> None:
    """The edited frames as files, and clip and edit as one film."""
    prefix = f"spacetime_edit/{name}"
    graph.add("SaveImage", title="Save the edited frames", images=edited, filename_prefix=prefix)
    graph.column()
    pair = graph.add("ImageStitch", title="Clip | edit", image1=images, image2=edited)
    large = graph.add("ImageScaleBy", image=pair["IMAGE"], upscale_method="nearest-exact", scale_by=4.0)
    film = {"images": large["IMAGE"], "fps": fps, "filename_prefix": f"{prefix}_film"}
    graph.add("SaveAnimatedWEBP", title="Film: clip | edit", **film)
