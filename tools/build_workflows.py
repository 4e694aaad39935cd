"""Write the templates in workflows/*.json (UI format) from the short descriptions in this file.

    python tools/build_workflows.py && python tools/export_api.py && python tools/build_thumbnails.py

Node definitions come from a live server, so that sockets and widgets are those of the host.
"""

from __future__ import annotations

import json
from functools import partial
from typing import Any

from graphs import Graph, Node, Output
from pack import host_path
from server import LiveServer
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
