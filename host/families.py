"""What is peculiar to each model family, as a table. Adding a family is adding a row here.

A row names the attention modules of the host's diffusion model by path. The first group of each pattern is the
side of the network, the following groups number the layer within it. Layers get the names that U-Net packs use:
d0, d1, ... down, m0 middle, u0, u1, ... up, counted over the layers that hold spatial attention; b0, b1, ... in
transformers; t0, t1, ... for temporal attention where there is no spatial one.
"""

import difflib
from dataclasses import dataclass
from typing import Literal

from torch.nn import Module

from ..core.frames import FramePattern
from ..core.parametrization import NoiseSpace

AttentionKind = Literal["spatial", "cross", "temporal", "joint", "spacetime"]
"""Of a U-Net, whose batch rows are frames, joint: queries of one frame's tokens, keys of the prompt's tokens followed
by the frame's own. Of a transformer, whose rows are clips, joint: queries and keys of the prompt's tokens and the
clip's; spacetime: of the clip's alone."""

IN_SPACE: tuple[AttentionKind, ...] = ("spatial", "joint", "spacetime")
"""Kinds in which the tokens of a frame see one another."""

Ends = Literal["first", "last"]

TextKeys = Literal["as encoded", "cropped", "last"]
"""How a prompt's tokens are among the keys of a call: all of them, which the host may repeat; without their padding; or
behind tokens of pictures and of written letters."""


NEVER = r"(?!)"
"""A pattern that nothing matches."""


@dataclass(frozen=True)
class Family:
    """One row: `attention` maps a kind of attention to the pattern of its modules' paths.

    base_model and diffusion_model are class names: of the host's models and of the network in them. mutates: blocks, or
    common patches of them such as FreeU, change activations in place. blocks: pattern of the modules that checkpointing
    runs again. norms: of the group norms of ResNet blocks and of the output, which see each frame by itself.
    picture_optional: the network reads a picture beside the latent, but also works with none.
    """

    name: str
    base_model: tuple[str, ...]
    diffusion_model: str
    attention: tuple[tuple[AttentionKind, str], ...]
    blocks: str
    norms: str = NEVER
    mutates: bool = False
    downsamplers: str = NEVER
    frames: FramePattern = FramePattern()
    patched: Ends | None = None
    score_blocks: str = ""
    picture_keys: str = ""
    picture_optional: bool = False
    references: tuple[str, str] | None = None
    text: TextKeys = "as encoded"
    unseen: float = 1.0
    injected: tuple[str, str] | None = None

    def fits(self, base_model) -> bool:
        """Whether it describes one of the host's models, by its classes."""
        network = getattr(base_model.diffusion_model, "_orig_mod", base_model.diffusion_model)  # of torch.compile
        return type(base_model).__name__ in self.base_model and type(network).__name__ == self.diffusion_model


LEVEL = r"(down|mid|up)_blocks?\.(?:(\d+)\.)?"
TRANSFORMER = LEVEL + r"attentions\.(\d+)\.transformer_blocks\.(\d+)\."
OVER_TIME = LEVEL + r"temp_attentions\.(\d+)\.transformer_blocks\.(\d+)\."
"""How paths begin in diffusers' U-Nets."""
OF_SD = r"(input|middle|output)_blocks?\.(?:(\d+)\.)?"
"""How they begin in Stability AI's."""
SD_BLOCKS = {
    "blocks": r"(?:input|output)_blocks\.\d+\.\d+|middle_block\.\d+",
    "norms": r"(?:(?:input|output)_blocks\.\d+\.\d+|middle_block\.\d+)\.(?:in|out)_layers\.0|out\.0",
    "mutates": True,
    "downsamplers": r"input_blocks\.\d+\.0\.op",
}

FOUR_IN_ONE = {"frames": FramePattern((1,), (4,)), "patched": "first", "score_blocks": "b0-b1"}
"""Video transformers whose latent frames, but for the first, hold four of the clip."""

FAMILIES = (
    Family(
        name="UNet3D (Zeroscope, ModelScope)",
        base_model=("UNet3DVideoModel",),
        diffusion_model="SpacetimeUNet3D",
        attention=(
            ("spatial", TRANSFORMER + r"attn1"),
            ("cross", TRANSFORMER + r"attn2"),
            ("temporal", OVER_TIME + r"attn[12]"),
            ("temporal", r"(transformer_in)\.transformer_blocks\.(\d+)\.attn[12]"),
        ),
        blocks=r"(?:down_blocks\.\d+|mid_block|up_blocks\.\d+)\.(?:resnets|(?:temp_)?(?:convs|attentions))\.\d+|transformer_in",
        norms=r"(?:down_blocks\.\d+|mid_block|up_blocks\.\d+)\.resnets\.\d+\.norm[12]|conv_norm_out",
        downsamplers=r"down_blocks\.\d+\.downsamplers\.\d+",
    ),
    Family(
        name="Show-1 (key frames, in pixels)",
        base_model=("UNet3DVideoModel",),
        diffusion_model="PixelUNet3D",
        attention=(
            ("joint", LEVEL + r"attentions\.(\d+)()"),
            ("temporal", OVER_TIME + r"attn[12]"),
            ("temporal", r"(transformer_in)\.transformer_blocks\.(\d+)\.attn[12]"),
        ),
        blocks=r"(?:(?:down|up)_blocks\.\d+|mid_block)\.(?:resnets|(?:temp_)?(?:convs|attentions)|(?:down|up)samplers)\.\d+|transformer_in",
        norms=r"(?:(?:down|up)_blocks\.\d+|mid_block)\.(?:resnets|(?:down|up)samplers)\.\d+\.norm[12]|conv_norm_out",
        downsamplers=r"down_blocks\.\d+\.downsamplers\.\d+",
    ),
    Family(
        name="LaVie",
        base_model=("UNet3DVideoModel",),
        diffusion_model="LaVieUNet",
        attention=(
            ("spatial", TRANSFORMER + r"attn1"),
            ("cross", TRANSFORMER + r"attn2"),
            ("temporal", TRANSFORMER + r"attn_temp"),
        ),
        blocks=r"(?:down_blocks\.\d+|mid_block|up_blocks\.\d+)\.(?:resnets|attentions)\.\d+",
        downsamplers=r"down_blocks\.\d+\.downsamplers\.\d+",
    ),
    Family(
        name="AnimateDiff on SD 1.5",
        base_model=("BaseModel",),
        diffusion_model="UNetModel",
        attention=(
            ("spatial", OF_SD + r"\d+\.transformer_blocks\.\d+\.attn1"),
            ("cross", OF_SD + r"\d+\.transformer_blocks\.\d+\.attn2"),
            ("temporal", OF_SD + r"\d+\.temporal_transformer\.transformer_blocks\.\d+\.attention_blocks\.\d+"),
        ),
        injected=("ADE", OF_SD + r"\d+\.temporal_transformer"),
        **SD_BLOCKS,
    ),
    Family(
        name="SD 1.5",
        base_model=("BaseModel",),
        diffusion_model="UNetModel",
        attention=(
            ("spatial", OF_SD + r"\d+\.transformer_blocks\.\d+\.attn1"),
            ("cross", OF_SD + r"\d+\.transformer_blocks\.\d+\.attn2"),
        ),
        **SD_BLOCKS,
    ),
    Family(
        name="Stable Video Diffusion",
        base_model=("SVD_img2vid",),
        diffusion_model="UNetModel",
        attention=(
            ("spatial", OF_SD + r"\d+\.transformer_blocks\.\d+\.attn1"),
            ("temporal", OF_SD + r"\d+\.time_stack\.\d+\.attn1"),
        ),
        **SD_BLOCKS,
    ),
    Family(
        name="CogVideoX",
        base_model=("CogVideoX",),
        diffusion_model="CogVideoXTransformer3DModel",
        attention=(("joint", r"(blocks)\.(\d+)"),),
        blocks=r"blocks\.\d+",
        unseen=1.65,
        **FOUR_IN_ONE | {"patched": "last"},
    ),
    Family(
        name="Wan",
        base_model=("WAN21", "WAN22"),
        diffusion_model="WanModel",
        attention=(
            ("spacetime", r"(blocks)\.(\d+)\.self_attn"),
            ("cross", r"(blocks)\.(\d+)\.cross_attn"),
        ),
        blocks=r"blocks\.\d+",
        picture_keys="norm_k_img",
        references=("reference_latent", "ref_conv"),
        unseen=1.1,
        **FOUR_IN_ONE,
    ),
    Family(
        name="Wan VACE",
        base_model=("WAN21_Vace",),
        diffusion_model="VaceWanModel",
        attention=(
            ("spacetime", r"((?:vace_)?blocks)\.(\d+)\.self_attn"),
            ("cross", r"((?:vace_)?blocks)\.(\d+)\.cross_attn"),
        ),
        blocks=r"(?:vace_)?blocks\.\d+",
        unseen=1.1,
        **FOUR_IN_ONE,
    ),
    Family(
        name="HunyuanVideo",
        base_model=("HunyuanVideo", "HunyuanVideoI2V", "HunyuanVideoSkyreelsI2V"),
        diffusion_model="HunyuanVideo",
        attention=(("joint", r"((?:double|single)_blocks)\.(\d+)"),),
        blocks=r"(?:double|single)_blocks\.\d+",
        mutates=True,
        unseen=1.25,
        **FOUR_IN_ONE | {"patched": "last"},
    ),
    Family(
        name="HunyuanVideo 1.5",
        base_model=("HunyuanVideo15",),
        diffusion_model="HunyuanVideo",
        attention=(("joint", r"((?:double|single)_blocks)\.(\d+)"),),
        blocks=r"(?:double|single)_blocks\.\d+",
        mutates=True,
        picture_optional=True,
        text="last",
        unseen=1.25,
        **FOUR_IN_ONE | {"patched": "last"},
    ),
    Family(
        name="LTX-Video",
        base_model=("LTXV",),
        diffusion_model="LTXVModel",
        attention=(
            ("spacetime", r"(transformer_blocks)\.(\d+)\.attn1"),
            ("cross", r"(transformer_blocks)\.(\d+)\.attn2"),
        ),
        blocks=r"transformer_blocks\.\d+",
        mutates=True,
        unseen=1.75,
        **FOUR_IN_ONE | {"frames": FramePattern((1,), (8,))},
    ),
    Family(
        name="LTX-2",
        base_model=("LTXAV",),
        diffusion_model="LTXAVModel",
        attention=(
            ("spacetime", r"(transformer_blocks)\.(\d+)\.attn1"),
            ("cross", r"(transformer_blocks)\.(\d+)\.attn2"),
        ),
        blocks=r"transformer_blocks\.\d+",
        mutates=True,
        unseen=2.0,
        **FOUR_IN_ONE | {"frames": FramePattern((1,), (8,))},
    ),
    Family(
        name="Mochi",
        base_model=("GenmoMochi",),
        diffusion_model="AsymmDiTJoint",
        attention=(("joint", r"(blocks)\.(\d+)\.attn"),),
        blocks=r"blocks\.\d+",
        text="cropped",
        unseen=2.6,
        **FOUR_IN_ONE | {"frames": FramePattern((1,), (6,))},
    ),
    Family(
        name="Cosmos 1",
        base_model=("CosmosVideo",),
        diffusion_model="GeneralDIT",
        attention=(
            ("spacetime", r"(blocks)\.block(\d+)\.blocks\.0\.block\.attn"),
            ("cross", r"(blocks)\.block(\d+)\.blocks\.1\.block\.attn"),
        ),
        blocks=r"blocks\.block\d+",
        **FOUR_IN_ONE | {"frames": FramePattern((1,), (8,))},
    ),
    Family(
        name="Cosmos Predict2",
        base_model=("CosmosPredict2",),
        diffusion_model="MiniTrainDIT",
        attention=(
            ("spacetime", r"(blocks)\.(\d+)\.self_attn"),
            ("cross", r"(blocks)\.(\d+)\.cross_attn"),
        ),
        blocks=r"blocks\.\d+",
        unseen=1.2,
        **FOUR_IN_ONE,
    ),
    Family(
        name="Kandinsky 5",
        base_model=("Kandinsky5",),
        diffusion_model="Kandinsky5",
        attention=(
            ("spacetime", r"(visual_transformer_blocks)\.(\d+)\.self_attention"),
            ("cross", r"(visual_transformer_blocks)\.(\d+)\.cross_attention"),
        ),
        blocks=r"visual_transformer_blocks\.\d+",
        unseen=1.25,
        **FOUR_IN_ONE,
    ),
)

NOT_APPLICABLE = {
    "WAN22_Animate": "it draws a character from a reference picture, whose latent frame stands in front of the clip's, "
    "by a film of poses and faces; its face attention is hidden from other nodes",
    "HunyuanVideo15_SR_Distilled": "it sharpens a finished clip in few steps",
}
"""Why the methods are not for a class of the host."""


def family_of(model) -> Family:
    """The row of a ModelPatcher's diffusion model; ValueError for a model that no row describes."""
    names = type(model.model).__name__, type(model.model.diffusion_model).__name__
    for family in FAMILIES:
        if family.fits(model.model) and (family.injected is None or family.injected[0] in model.injections):
            return family
    if why := NOT_APPLICABLE.get(names[0]):
        raise ValueError(f"model: {names[0]} is not a model to edit with: {why}")
    known = ", ".join(f.name for f in FAMILIES)
    raise ValueError(
        f"model: {names[0]} with {names[1]} is not a supported model family{_nearest(*names)}; expected one of: {known}"
    )


def _nearest(base_model: str, network: str) -> str:
    """Which family an unknown model is like, by the names of its classes; "" of none."""
    by_class = {name: family.name for family in FAMILIES for name in (*family.base_model, family.diffusion_model)}
    found = [near for own in (base_model, network) for near in difflib.get_close_matches(own, by_class, 1, 0.6)]
    return f" (the nearest is {by_class[found[0]]})" if found else ""


def patch_size(network: Module) -> tuple[int, int, int]:
    """(frames, rows, columns) of a video transformer's patches, by the network's own word."""
    size = getattr(network, "patch_size", None) or getattr(network, "patch_spatial", 1)
    if isinstance(size, (tuple, list)):
        return tuple(size)
    return getattr(network, "patch_size_t", None) or getattr(network, "patch_temporal", 1), size, size


def space_kinds(model) -> tuple[AttentionKind, ...]:
    """Kinds of attention of a ModelPatcher in which the tokens of a frame see one another, prompt apart in U-Nets."""
    return IN_SPACE if family_of(model).patched is not None else ("spatial",)


def text_kinds(model) -> tuple[AttentionKind, ...]:
    """Kinds of attention of a ModelPatcher in which the clip sees the prompt's tokens, and they have places."""
    return ("cross", "joint") if family_of(model).patched is not None else ("cross",)


def noise_space(model) -> NoiseSpace:
    """The noise space of a ModelPatcher's sampling (patched by ModelSampling nodes or not)."""
    from comfy import model_sampling

    sampling = model.get_model_object("model_sampling")
    if isinstance(sampling, model_sampling.CONST):
        return NoiseSpace.RF
    if isinstance(sampling, model_sampling.V_PREDICTION_DDPM):
        return NoiseSpace.VP
    return NoiseSpace.VE
