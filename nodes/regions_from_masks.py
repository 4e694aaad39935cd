"""Regions from Masks: several regions at once, from a mask batch, a coloured layout or SAM3 tracks."""

from comfy_api.latest import io

from .types import REGIONS_TYPE, regions_input


class RegionsFromMasks(io.ComfyNode):
    """A region a line of phrases."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="STE_RegionsFromMasks",
            display_name="Regions from Masks",
            category="Spacetime Edit/ST-Layout",
            description="Makes several regions at once, one a line of phrases: from masks one after another, from a "
            "video in which each region has its colour, or from the objects that SAM3 tracked.",
            search_aliases=["videograin", "st-layout", "segmentation map", "color mask", "sam3", "layout video"],
            inputs=[
                io.String.Input(
                    "phrases",
                    multiline=True,
                    default="",
                    tooltip="One line a region: the words of the prompt that belong in it. An empty line is a region "
                    "without words. The order is that of the masks or tracks; of colours, the largest area first.",
                ),
                io.Mask.Input(
                    "masks",
                    optional=True,
                    tooltip="The masks of all frames of the first region, then those of the second, and so on. Their "
                    "number must be a multiple of the number of lines.",
                ),
                io.Image.Input(
                    "colours",
                    optional=True,
                    tooltip="A layout video: each region in a flat colour of its own. Black is no region.",
                ),
                io.Custom("SAM3_TRACK_DATA").Input(
                    "track_data", optional=True, tooltip="From Run SAM3 Video Track: one region a tracked object."
                ),
                regions_input(),
            ],
            outputs=[REGIONS_TYPE.Output(display_name="regions", tooltip="All regions so far.")],
        )

    @classmethod
    def execute(cls, phrases, masks=None, colours=None, track_data=None, regions=()) -> io.NodeOutput:
        from ..core.region_sources import regions_of_colours, regions_of_masks
        from ..host.sam3 import masks_of_tracks

        given = {"masks": masks, "colours": colours, "track_data": track_data}
        connected = [name for name, value in given.items() if value is not None]
        if len(connected) != 1:
            raise ValueError(
                f"masks, colours, track_data: {', '.join(connected) or 'none of them'} connected; connect exactly one"
            )
        lines = phrases.rstrip("\n").split("\n")
        if colours is not None:
            return io.NodeOutput((*regions, *regions_of_colours(colours, lines)))
        if track_data is not None:
            masks = masks_of_tracks(track_data, len(lines))
        return io.NodeOutput((*regions, *regions_of_masks(masks, lines)))
