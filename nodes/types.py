"""Socket types of the pack and the inputs that several nodes share."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from comfy_api.latest import io

if TYPE_CHECKING:
    from ..host.node_text import NodeText

TRAJECTORY_TYPE = io.Custom("STE_TRAJECTORY")
SCORE_TYPE = io.Custom("STE_SCORE")
REGIONS_TYPE = io.Custom("STE_REGIONS")
FLOW_TYPE = io.Custom("STE_FLOW")
RAFT_TYPE = io.Custom("OPTICAL_FLOW")
"""The host's flow model."""


def fraction(name: str, default: float, **options) -> io.Float.Input:
    """A number from 0 to 1."""
    return io.Float.Input(name, default=default, **{"min": 0.0, "max": 1.0, "step": 0.01} | options)


def inverted_clip_inputs() -> list:
    """The clip as trajectory and as images: the same two inputs on every node that looks into the model."""
    return [
        TRAJECTORY_TYPE.Input("trajectory", tooltip="The inverted source clip, from Invert Video."),
        io.Image.Input("images", tooltip="The source clip, as it was encoded for Invert Video."),
    ]


def raft_input() -> RAFT_TYPE.Input:
    """The host's flow model: the same input on every node that wants flow."""
    return RAFT_TYPE.Input(
        "optical_flow",
        optional=True,
        tooltip="RAFT, from Load Optical Flow Model. Without it a simpler flow without weights is used.",
    )


def metric_inputs() -> list:
    """What metrics are made with beside the clips: the same inputs on every node that measures."""
    return [
        io.Mask.Input(
            "mask",
            optional=True,
            tooltip="Where the edit was meant to be (1 = edited), one for the clip or one a frame. What lies outside "
            "is the background.",
        ),
        io.Clip.Input(
            "clip",
            optional=True,
            tooltip="A CLIP with text projection, of the same model as CLIP Vision, for the text alignment.",
        ),
        io.ClipVision.Input("clip_vision", optional=True, tooltip="For text alignment and frame consistency."),
        raft_input(),
        FLOW_TYPE.Input(
            "flow",
            optional=True,
            tooltip="The flow of source, from Optical Flow: it is not computed again, and what hides behind something "
            "is left out of the warp error.",
        ),
    ]


def mask_inputs() -> list:
    """Mask, dilation and blend: the same three inputs on every node that edits from a trajectory."""
    return [
        io.Mask.Input(
            "mask",
            optional=True,
            tooltip="Where to edit: 1 = edit, 0 = keep the source. One mask for the whole clip or one a frame, of any "
            "size. Leave it open to edit the whole picture.",
        ),
        io.Float.Input(
            "dilation",
            default=16.0,
            min=0.0,
            max=512.0,
            step=1.0,
            tooltip="Grow the mask by this many pixels of the source clip before use. Grow more when the new object is "
            "larger than the old one. Without a mask it has no effect.",
        ),
        io.Combo.Input(
            "blend",
            options=["trajectory", "re-noised source"],
            default="trajectory",
            advanced=True,
            tooltip="What the kept area follows while sampling: the inverted source at the same noise level, or the "
            "clean source with fixed fresh noise. Without a mask it has no effect.",
        ),
    ]


def continue_from_latent_input() -> io.Boolean.Input:
    """Whether a sampler goes on with an unfinished edit: the same input on every sampler of a trajectory."""
    return io.Boolean.Input(
        "continue_from_latent",
        default=False,
        optional=True,
        advanced=True,
        tooltip="For the low-noise model of a pair such as Wan 2.2's: go on from the latent that is connected to "
        "SamplerCustomAdvanced, which the other model's edit left unfinished. Off: start from the inverted clip.",
    )


def regions_input() -> REGIONS_TYPE.Input:
    """Regions to add to: the same input on every node that makes some."""
    return REGIONS_TYPE.Input(
        "regions",
        optional=True,
        tooltip="Regions to add this to. Chain as many as you like; where two overlap, a part lies before its whole, "
        "else the later lies before the earlier.",
    )


def weight_dtype_input() -> io.Combo.Input:
    """How weights are kept: the same input on every node that loads a diffusion model."""
    from ..host.loaders.unet3d import WEIGHT_DTYPES

    return io.Combo.Input(
        "weight_dtype",
        options=list(WEIGHT_DTYPES),
        default="default",
        advanced=True,
        tooltip="How the weights of the diffusion model are kept in memory. The default lets ComfyUI choose for your "
        "device. fp8 takes about a quarter of the memory of fp32 and is less exact.",
    )


def text_of(node) -> NodeText:
    """What shows messages under the widgets of the running node, which must have the hidden input unique_id."""
    from ..host.node_text import NodeText

    return NodeText(None if node.hidden is None else node.hidden.unique_id)


def show_on_node(node, text: str) -> None:
    """Writes `text` under the widgets of the running node, where there is a server and a graph to show it."""
    text_of(node).show(text)


def show_share(node, sampler) -> None:
    """Writes on the node of a sampler what share of the clip its mask edits."""
    from ..host.sampling import share_of

    if sampler.grid is not None:
        show_on_node(node, share_of(sampler.grid))


def valid(check: Callable, *args, **kwargs) -> bool | str:
    """What `validate_inputs` returns: True, or the message of the ValueError that `check` raises."""
    try:
        check(*args, **kwargs)
    except ValueError as error:
        return str(error)
    return True


def valid_window(start: float | None, end: float | None) -> bool | str:
    """`valid` for start_percent and end_percent; None: it comes by a link, and is checked when it does."""
    from ..host.relevance_matching import check_window

    return valid(check_window, 0.0 if start is None else start, 1.0 if end is None else end)
