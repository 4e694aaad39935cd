"""Encode Regional Prompt: a prompt whose phrases know their regions."""

from comfy_api.latest import io

from .types import LAYOUT_TYPE, REGIONS_TYPE


class EncodeRegionalPrompt(io.ComfyNode):
    """CONDITIONING of a prompt and the layout of its regions (ST-Layout attention, arXiv 2502.17258)."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="STE_EncodeRegionalPrompt",
            display_name="Encode Regional Prompt",
            category="Spacetime Edit/ST-Layout",
            description="Encodes a prompt like CLIP Text Encode, and finds in it the phrase of each region, so that "
            "ST-Layout Attention Patch can keep each phrase in its region.",
            search_aliases=["videograin", "st-layout", "regional prompt", "clip text encode", "layout"],
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder of the model."),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip="The whole prompt. It must hold the phrase of every region, word for word.",
                ),
                REGIONS_TYPE.Input(
                    "regions",
                    optional=True,
                    tooltip="From Region Prompt, Regions from Masks or Regions from Attention. Open: a plain prompt, "
                    "and the patch does nothing.",
                ),
                io.Combo.Input(
                    "mode",
                    options=["paper", "released"],
                    default="paper",
                    advanced=True,
                    tooltip="paper: as the method is published. released: as its public code does it, which differs "
                    "in which prompts are modulated, in the weight of large regions, in what lies in no region, and "
                    "in encoding each phrase by itself.",
                ),
                io.Boolean.Input(
                    "splice",
                    default=False,
                    advanced=True,
                    tooltip="Encode each phrase by itself and put it in its place, so that it knows nothing of the "
                    "other phrases. 'released' always does.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    display_name="conditioning", tooltip="For the positive input of the guider or sampler."
                ),
                LAYOUT_TYPE.Output(display_name="layout", tooltip="For ST-Layout Attention Patch."),
            ],
        )

    @classmethod
    def execute(cls, clip, prompt, mode, splice=False, regions=()) -> io.NodeOutput:
        from ..host.region_prompt import encode_regional_prompt

        return io.NodeOutput(*encode_regional_prompt(clip, prompt, regions, mode, splice or mode == "released"))
