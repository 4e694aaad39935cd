"""Clips, prompts and settings of the templates, measured or tried on the embedded model."""

from __future__ import annotations

from typing import NamedTuple

TINY_MODEL = "embedded tiny model"
TINY_SIDE = 64  # pixels of an example clip
TINY_FRAMES = 8
TINY_STEPS = 20
TINY_CFG = 4.0
TINY_LAMBDA = 1.0
TINY_END = 0.75
TINY_DILATION = 4.0
ALL_CHANGES = {"strength": 0.5, "iterations": 2}  # where object and background become others, more makes blotches
TINY_MATCHING = {"strength": TINY_LAMBDA, "end_percent": TINY_END, "dilation": TINY_DILATION}

ONE_OBJECT = "clip_00 - a red circle on a gray background"
NEW_SHAPE, NEW_COLOR = 2, 1  # of its prompts: a red square, a blue circle
IN_THE_OBJECT = {"x": 17, "y": 22, "frame": 0}
COMPARED_LAMBDAS = "0, 0.25, 0.5, 1"

ZEROSCOPE = "zeroscope_v2_576w"
ZEROSCOPE_URL = "https://huggingface.co/cerspense/zeroscope_v2_576w"
ZEROSCOPE_SIDE = 576
ZEROSCOPE_FRAMES = 16

LAVIE = "lavie_base.pt"
LAVIE_URL = f"https://huggingface.co/Vchitect/LaVie/resolve/main/{LAVIE}"
LAVIE_SIDE = 512
LAVIE_FRAMES = 16

COGVIDEOX = "CogVideoX-5b/diffusion_pytorch_model-00001-of-00002.safetensors"
COGVIDEOX_REST = "CogVideoX-5b/diffusion_pytorch_model-00002-of-00002.safetensors"
COGVIDEOX_URL = "https://huggingface.co/zai-org/CogVideoX-5b/resolve/main/transformer"
LEFT_BOXES, RIGHT_BOXES = "0: 30, 60, 210, 230", "0: 270, 60, 210, 230"  # to be written for the clip
MOTION = "v3_sd15_mm.ckpt"
MOTION_URL = f"https://huggingface.co/guoyww/animatediff/resolve/main/{MOTION}"
STR_SOURCE = "a red car drives along a road"
STR_PROMPT = "a blue bus drives along a road"

SEED = 1  # of the noise that a deletion or addition begins from

DELETE_CLIP = "clip_05 - a blue circle on the left and a red circle on the right, white background"
DELETE_PROMPT = "a blue circle on a white background"

ADD_CLIP = DELETE_CLIP
ADD_SOURCE = "a blue circle on a white background"  # once its right object is painted over
ADD_GRAY = 0.96  # of its background
ADD_PROMPT = "a blue circle on the left and a green square on the right, white background"

SEVERAL_CLIP = "clip_04 - a red circle on the left and a green square on the right, gray background"
SEVERAL_PROMPTS = (  # after the first edit, after the second
    "a yellow square on the left and a green square on the right, gray background",
    "a yellow square on the left and a blue triangle on the right, gray background",
)

REGIONS_CLIP = SEVERAL_CLIP
REGIONS_PROMPT = "a blue circle on the left and a yellow square on the right, gray background"
REGIONS_PHRASES = ("a yellow square", "a blue circle")  # of the left and of the right object: not as the prompt says

LAYOUT_COLOURS = (0xC04040, 0x4060C0)  # of the background and of the object
LAYOUT_PROMPT = "a blue square on a white background"
LAYOUT_PHRASES = "white background\na blue square"  # the largest area first

IDENTITY_PHRASES = ("a green square", "a red circle")  # of the left and of the right object: as the other one is
CLASS_PROMPT = "a yellow triangle on the left and a yellow triangle on the right, gray background"
CLASS_PHRASE = "a yellow triangle"
BACKGROUND_PROMPT = "a red circle on a white background"
BACKGROUND_PHRASE = "white background"
PART_CLIP = "clip_28 - a yellow square with a black stripe on a checked pink background"
PART_PROMPT = "a yellow square with a white stripe on a checked pink background"
PART_PHRASES = ("a yellow square", "a white stripe")  # of the object and of its stripe
PART_DILATION = 2.0
EQUAL_CLIP = "clip_12 - two cyan circles on a black background"
EQUAL_PROMPT = "a cyan circle and a red circle on a black background"
EQUAL_PHRASES = ("a red circle", "a cyan circle")  # of the first and of the second object
FOUND_PHRASES = "\na yellow square\na blue circle"  # by number: the background, then what is larger

SD15 = "v1-5-pruned-emaonly-fp16.safetensors"
SD15_URL = f"https://huggingface.co/Comfy-Org/stable-diffusion-v1-5-archive/resolve/main/{SD15}"
DEPTH_NET = "control_v11f1p_sd15_depth_fp16.safetensors"
DEPTH_NET_URL = f"https://huggingface.co/comfyanonymous/ControlNet-v1-1_fp16_safetensors/resolve/main/{DEPTH_NET}"
DEPTH_MODEL = "depth_anything_3_mono_large.safetensors"
DEPTH_MODEL_URL = f"https://huggingface.co/Comfy-Org/Depth-Anything-3/resolve/main/geometry_estimation/{DEPTH_MODEL}"
SAM3 = "sam3.1_multiplex_fp16.safetensors"
SAM3_URL = f"https://huggingface.co/Comfy-Org/sam3.1/resolve/main/checkpoints/{SAM3}"
SD15_SIDE = 512
SD15_FRAMES = 16
SD15_SOURCE = "a man and a dog walk on grass"
SD15_PROMPT = "an astronaut and a polar bear walk on grass"
SD15_NEGATIVE = "ugly, blurry, low res, unrealistic"
SD15_TRACKED = "man:1, dog:1"
SD15_PHRASES = "an astronaut\na polar bear"
PARTS_SOURCE = "a man walks on grass"
PARTS_PROMPT = "a man in a red leather jacket and blue jeans walks on grass"
PARTS_TRACKED = "shirt:1, trousers:1"
PARTS_PHRASES = "a red leather jacket\nblue jeans"
SD15_FOUND = "\nan astronaut\na polar bear"  # by number: the background, then what is larger

TINY_DDS = {"steps": 32, "step_size": 1.6, "cfg": 7.5}
POLISHED_STEPS = 24
POLISH_FROM = 10  # of TINY_STEPS
DDS_BOXES = "0: 0, 5, 34, 34\n7: 23, 21, 34, 34"
DDS_FRAMES = 8
SHOW1 = "show-1-base"
SHOW1_URL = "https://huggingface.co/showlab/show-1-base"
SHOW1_SIDE = 64
SHOW1_NEGATIVE = "low resolution, blur"
SHOW1_DDS = {"cfg": 9.0}
REFINED_SIZE = {"width": 576, "height": 320}
REFINED_DENOISE = 0.5
DDS_SOURCE = "a red car drives along a road"
DDS_PROMPT = "a red car drives along a road, oil painting"


class File(NamedTuple):
    """A file that a loader wants. address: of the folder that it lies in on the net."""

    name: str
    address: str
    directory: str

    @property
    def model(self) -> dict:
        """As the frontend wants it, to offer the download."""
        return {"name": self.name, "url": f"{self.address}/{self.name.split('/')[-1]}", "directory": self.directory}


class Transformer(NamedTuple):
    """A video transformer of the host's own loaders: its files, and what it was made for.

    network: in `checkpoints` with its VAE, else alone; beside: more of its files; frames: step * n + 1; title: as in
    the names of templates.
    """

    title: str
    network: File
    text: tuple[File, ...]
    text_type: str
    vae: File | None
    frames: int
    step: int
    side: int
    cfg: float
    beside: tuple[File, ...] = ()


_HUB = "https://huggingface.co/"
_FLUX_TEXT = _HUB + "comfyanonymous/flux_text_encoders/resolve/main"
_WAN = _HUB + "Comfy-Org/Wan_2.1_ComfyUI_repackaged/resolve/main/split_files"
_WAN22 = _HUB + "Comfy-Org/Wan_2.2_ComfyUI_Repackaged/resolve/main/split_files"
_HUNYUAN = _HUB + "Comfy-Org/HunyuanVideo_repackaged/resolve/main/split_files"
_HUNYUAN15 = _HUB + "Comfy-Org/HunyuanVideo_1.5_repackaged/resolve/main/split_files"
_MOCHI = _HUB + "Comfy-Org/mochi_preview_repackaged/resolve/main/split_files"
_T5 = File("t5xxl_fp16.safetensors", _FLUX_TEXT, "text_encoders")
_CLIP_L = File("clip_l.safetensors", _FLUX_TEXT, "text_encoders")
_UMT5 = File("umt5_xxl_fp8_e4m3fn_scaled.safetensors", _WAN + "/text_encoders", "text_encoders")
_QWEN_VL = File("qwen_2.5_vl_7b_fp8_scaled.safetensors", _HUNYUAN15 + "/text_encoders", "text_encoders")
_WAN_VAE = File("wan_2.1_vae.safetensors", _WAN + "/vae", "vae")
_HUNYUAN_VAE = File("hunyuan_video_vae_bf16.safetensors", _HUNYUAN + "/vae", "vae")

COG = Transformer(
    title="CogVideoX",
    network=File(COGVIDEOX, COGVIDEOX_URL, "diffusion_models"),
    beside=(File(COGVIDEOX_REST, COGVIDEOX_URL, "diffusion_models"),),
    text=(_T5,),
    text_type="cogvideox",
    vae=File("cogvideox_vae.safetensors", _HUB + "Comfy-Org/void-model/resolve/main/vae", "vae"),
    frames=17,
    step=4,
    side=512,
    cfg=6.0,
)
WAN = Transformer(
    title="Wan",
    network=File("wan2.1_t2v_1.3B_fp16.safetensors", _WAN + "/diffusion_models", "diffusion_models"),
    text=(_UMT5,),
    text_type="wan",
    vae=_WAN_VAE,
    frames=33,
    step=4,
    side=832,
    cfg=6.0,
)
WAN_HIGH, WAN_LOW = (
    WAN._replace(
        title="Wan 2.2",
        network=File(
            f"wan2.2_t2v_{noise}_noise_14B_fp8_scaled.safetensors", _WAN22 + "/diffusion_models", "diffusion_models"
        ),
        cfg=3.5,
    )
    for noise in ("high", "low")
)
WAN_PERCENT = 0.53
"""Of denoising, where the high-noise model hands over to the other (sigma 0.875 at the host's shift of 8)."""
HUNYUAN = Transformer(
    title="HunyuanVideo",
    network=File("hunyuan_video_t2v_720p_bf16.safetensors", _HUNYUAN + "/diffusion_models", "diffusion_models"),
    text=(_CLIP_L, File("llava_llama3_fp8_scaled.safetensors", _HUNYUAN + "/text_encoders", "text_encoders")),
    text_type="hunyuan_video",
    vae=_HUNYUAN_VAE,
    frames=33,
    step=4,
    side=848,
    cfg=1.0,
)
LTX = Transformer(
    title="LTX-Video",
    network=File("ltx-video-2b-v0.9.5.safetensors", _HUB + "Lightricks/LTX-Video/resolve/main", "checkpoints"),
    text=(_T5,),
    text_type="ltxv",
    vae=None,
    frames=97,
    step=8,
    side=768,
    cfg=3.0,
)
LTX2 = Transformer(
    title="LTX-2",
    network=File("ltx-2.3-22b-dev-fp8.safetensors", _HUB + "Lightricks/LTX-2.3-fp8/resolve/main", "checkpoints"),
    text=(
        File(
            "gemma_3_12B_it_fp4_mixed.safetensors",
            _HUB + "Comfy-Org/ltx-2/resolve/main/split_files/text_encoders",
            "text_encoders",
        ),
    ),
    text_type="ltxav",
    vae=None,
    frames=49,
    step=8,
    side=768,
    cfg=4.0,
)
HUNYUAN15 = Transformer(
    title="HunyuanVideo 1.5",
    network=File("hunyuanvideo1.5_720p_t2v_fp16.safetensors", _HUNYUAN15 + "/diffusion_models", "diffusion_models"),
    text=(
        _QWEN_VL,
        File("byt5_small_glyphxl_fp16.safetensors", _HUNYUAN15 + "/text_encoders", "text_encoders"),
    ),
    text_type="hunyuan_video_15",
    vae=File("hunyuanvideo15_vae_fp16.safetensors", _HUNYUAN15 + "/vae", "vae"),
    frames=33,
    step=4,
    side=848,
    cfg=6.0,
)
MOCHI = Transformer(
    title="Mochi",
    network=File("mochi_preview_bf16.safetensors", _MOCHI + "/diffusion_models", "diffusion_models"),
    text=(_T5,),
    text_type="mochi",
    vae=File("mochi_vae.safetensors", _MOCHI + "/vae", "vae"),
    frames=37,
    step=6,
    side=848,
    cfg=4.5,
)
COSMOS = Transformer(
    title="Cosmos Predict2",
    network=File(
        "cosmos_predict2_2B_video2world_480p_16fps.safetensors",
        _HUB + "Comfy-Org/Cosmos_Predict2_repackaged/resolve/main",
        "diffusion_models",
    ),
    text=(
        File(
            "oldt5_xxl_fp8_e4m3fn_scaled.safetensors",
            _HUB + "comfyanonymous/cosmos_1.0_text_encoder_and_VAE_ComfyUI/resolve/main/text_encoders",
            "text_encoders",
        ),
    ),
    text_type="cosmos",
    vae=_WAN_VAE,
    frames=33,
    step=4,
    side=832,
    cfg=4.0,
)
KANDINSKY = Transformer(
    title="Kandinsky 5",
    network=File(
        "kandinsky5lite_t2v_sft_5s.safetensors",
        _HUB + "kandinskylab/Kandinsky-5.0-T2V-Lite-sft-5s/resolve/main/model",
        "diffusion_models",
    ),
    text=(
        _QWEN_VL,
        _CLIP_L,
    ),
    text_type="kandinsky5",
    vae=_HUNYUAN_VAE,
    frames=61,
    step=4,
    side=768,
    cfg=5.0,
)
LONG_FRAMES = 161
LONG_WINDOW = {  # in frames of the clip
    "context_length": 81,
    "context_overlap": 30,
    "context_schedule": "standard_static",
    "freenoise": False,
}
