"""Encode Regional Prompt: a prompt whose phrases know their regions."""

from comfy_api.latest import io

from .types import REGIONS_TYPE, show_on_node

PATCH = "STE_STLayoutAttentionPatch"


class EncodeRegionalPrompt(io.ComfyNode):
    """CONDITIONING of a prompt that carries the layout of its regions (ST-Layout attention, arXiv 2502.17258)."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="STE_EncodeRegionalPrompt",
            display_name="Encode Regional Prompt",
            category="Spacetime Edit/ST-Layout",
            description="Encodes a prompt like CLIP Text Encode, and finds in it the phrase of each region. The "
            "regions travel with the conditioning, and ST-Layout Attention Patch keeps each phrase in its region.",
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
                    tooltip="From Region Prompt, Regions from Masks or Regions from Attention. Leave unconnected for a "
                    "plain prompt.",
                ),
                io.Combo.Input(
                    "mode",
                    options=["released", "paper"],
                    default="released",
                    advanced=True,
                    tooltip="released: as the method's public code modulates. paper: as it is published, which differs "
                    "in which prompts are modulated, in the weight of large regions, and in what lies in no region.",
                ),
                io.Boolean.Input(
                    "splice",
                    default=False,
                    advanced=True,
                    tooltip="Encode each phrase by itself and put it in its place, so that it knows nothing of the "
                    "other phrases, as the public code does. Helps where the prompt names things in other places than "
                    "the masks, harms where two are alike. Weights such as (a cat:1.2) are lost in it.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    display_name="conditioning",
                    tooltip="The prompt with its regions, for any guider or sampler whose model has the ST-Layout "
                    "Attention Patch.",
                ),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt],
        )

    @classmethod
    def execute(cls, clip, prompt, mode, splice=False, regions=()) -> io.NodeOutput:
        from ..host.region_prompt import encode_regional_prompt

        node, graph = (cls.hidden.unique_id, cls.hidden.prompt) if cls.hidden is not None else (None, None)
        if regions and graph and not any(each.get("class_type") == PATCH for each in graph.values()):
            show_on_node(cls, "There is no ST-Layout Attention Patch in this graph, so the regions do nothing.")
        return io.NodeOutput(encode_regional_prompt(clip, prompt, regions, mode, splice, node))
