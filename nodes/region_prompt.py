"""Region Prompt: a mask and the words that belong in it."""

from comfy_api.latest import io

from .types import REGIONS_TYPE, regions_input


class RegionPrompt(io.ComfyNode):
    """One region of ST-Layout attention (VideoGrain, arXiv 2502.17258)."""

    @classmethod
    def define_schema(cls):
        from ..core.regions import OCCURRENCES

        return io.Schema(
            node_id="STE_RegionPrompt",
            display_name="Region Prompt",
            category="Spacetime Edit/ST-Layout",
            description="One region: a mask for each frame, and the words of the prompt that belong in it. Chain "
            "several to edit several things at once, whole objects, single ones among many, or parts of one.",
            search_aliases=["videograin", "st-layout", "regional prompt", "area prompt", "mask prompt", "multi-region"],
            inputs=[
                io.Mask.Input(
                    "mask",
                    tooltip="Where the region is: 1 = inside. One mask for the whole clip or one a frame, at any size; "
                    "all regions need the same size.",
                ),
                io.String.Input(
                    "phrase",
                    default="",
                    tooltip="The words of the prompt that belong in this region, just as they stand there, for example "
                    "'a red circle'. Empty: the region holds together, but no words are tied to it.",
                ),
                io.Combo.Input(
                    "occurrence",
                    options=list(OCCURRENCES),
                    default="once",
                    advanced=True,
                    tooltip="Which place of the phrase in the prompt is meant. once: it stands there once; every: all "
                    "places; first, second and so on: that one.",
                ),
                regions_input(),
            ],
            outputs=[REGIONS_TYPE.Output(display_name="regions", tooltip="All regions so far.")],
        )

    @classmethod
    def execute(cls, mask, phrase, occurrence="once", regions=()) -> io.NodeOutput:
        from ..core.regions import OCCURRENCES, Region

        return io.NodeOutput((*regions, Region(phrase, mask, OCCURRENCES[occurrence])))
