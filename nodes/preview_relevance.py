"""Preview Relevance: what in the clip belongs to a clicked point, as the model's attention sees it."""

from comfy_api.latest import io, ui

from .types import fraction, inverted_clip_inputs, valid


class PreviewRelevance(io.ComfyNode):
    """Cross-frame relevance of a point or region of the source clip, as heat map and as mask."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="STE_PreviewRelevance",
            display_name="Preview Relevance",
            category="Spacetime Edit/STR-Match",
            description="Finds in every frame what belongs to a point of the source clip, by the model's own "
            "attention: click an object, and get a heat map and a mask that follow it, without painting. Run once, "
            "click on the preview, and run again.",
            search_aliases=[
                "attention map",
                "heatmap",
                "click mask",
                "object mask",
                "tracking",
                "segment",
                "str-match",
            ],
            is_output_node=True,
            inputs=[
                *inverted_clip_inputs(),
                io.Int.Input(
                    "x",
                    default=0,
                    min=0,
                    max=16384,
                    tooltip="Pixels from the left edge of the source clip to the point. A click on the preview sets "
                    "it.",
                ),
                io.Int.Input(
                    "y",
                    default=0,
                    min=0,
                    max=16384,
                    tooltip="Pixels from the top edge of the source clip to the point. A click on the preview sets it.",
                ),
                io.Int.Input(
                    "frame",
                    default=0,
                    min=0,
                    max=4096,
                    tooltip="The frame that the point lies in. 0 = the first. A click on the preview sets it.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="A region to ask about instead of the point: 1 = the region. One mask, or one a frame of "
                    "which the chosen frame's is used.",
                ),
                io.Float.Input(
                    "threshold",
                    default=0.22,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    tooltip="How relevant a pixel must be to lie in the mask, as a share of the clip's maximum. "
                    "Smaller makes the mask larger.",
                ),
                fraction(
                    "opacity",
                    0.7,
                    step=0.05,
                    advanced=True,
                    tooltip="How strongly the heat map covers the grey clip. 1 shows the colours only.",
                ),
                fraction(
                    "percent",
                    0.7,
                    advanced=True,
                    tooltip="Where in the denoising to look at the attention: 0 = in pure noise, 1 = at the clean "
                    "clip.",
                ),
                io.String.Input(
                    "layers",
                    default="",
                    advanced=True,
                    tooltip="Blocks whose attention to use, such as d0,u2-u3 (d = down, m = middle, u = up, counted "
                    "over the blocks with attention). Empty: those at the finest resolution, which place an object "
                    "best; of a transformer (b0, b1, ...) all.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="heat map",
                    tooltip="The clip in grey under its relevance: black = none, over purple and red to yellow = most.",
                ),
                io.Mask.Output(
                    display_name="mask",
                    tooltip="1 where the relevance reaches the threshold, one mask a frame at the size of the clip, "
                    "for the mask input of the STR Latent Optimizer or Sample from Trajectory.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, layers=None):
        from ..host.layers import parse_blocks

        return valid(parse_blocks, layers or "")

    @classmethod
    def execute(cls, trajectory, images, x, y, frame, threshold, opacity, percent, layers, mask=None) -> io.NodeOutput:
        from ..core.cross_frame_relevance import relevant_region
        from ..host.relevance_preview import heat_map, query_region, relevance_of

        region = query_region(images, trajectory, x=x, y=y, frame=frame, mask=mask)
        relevance = relevance_of(region, frame, trajectory, percent=percent, layers=layers, frames=len(images))
        shown = heat_map(relevance, images, opacity)
        return io.NodeOutput(shown, relevant_region(relevance, threshold), ui=ui.PreviewImage(shown, cls=cls))
