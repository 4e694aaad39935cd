"""Preview Regions: the regions over the clip, and all of them as one mask."""

from comfy_api.latest import io, ui

from .types import REGIONS_TYPE, fraction, show_on_node


class PreviewRegions(io.ComfyNode):
    """Regions as ST-Layout attention will see them, in colour over the clip."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="STE_PreviewRegions",
            display_name="Preview Regions",
            category="Spacetime Edit/ST-Layout",
            description="Shows each region in a colour of its own over the clip, as the patch will see them: parts "
            "before their whole, later regions before earlier ones. Also puts out all regions as one mask, to keep "
            "the background.",
            search_aliases=["videograin", "st-layout", "show regions", "mask overlay", "union of masks"],
            is_output_node=True,
            inputs=[
                io.Image.Input("images", tooltip="The source clip."),
                REGIONS_TYPE.Input(
                    "regions", tooltip="From Region Prompt, Regions from Masks or Regions from Attention."
                ),
                fraction(
                    "opacity",
                    0.6,
                    step=0.05,
                    tooltip="How strongly the colours cover the clip.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="overlay", tooltip="The clip under the colours of its regions."),
                io.Mask.Output(
                    display_name="mask",
                    tooltip="1 in any region, one mask a frame: for the mask input of Sample from Trajectory, so that "
                    "what lies in no region stays as it is.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, images, regions, opacity) -> io.NodeOutput:
        from .region_overlay import overlay

        shown, union, legend = overlay(images, regions, opacity)
        show_on_node(cls, legend)
        return io.NodeOutput(shown, union, ui=ui.PreviewImage(shown, cls=cls))
