"""Node: Load Example Clip."""

from comfy_api.latest import io

from .types import show_on_node


class LoadExampleClip(io.ComfyNode):
    """One of the pack's small clips with its masks and prompts."""

    @classmethod
    def define_schema(cls):
        from ..host.loaders import example_clips

        names = example_clips.clip_names()
        return io.Schema(
            node_id="STE_LoadExampleClip",
            display_name="Load Example Clip",
            category="Spacetime Edit/load",
            description=(
                "One of 32 small clips for trying out the pack: 8 frames of 64 x 64 pixels with one to three "
                "moving shapes, a mask for each shape, the prompt that describes the clip and a prompt that "
                "describes an edit of it. Made for the embedded tiny model, which understands these prompts."
            ),
            search_aliases=["demo clip", "sample video", "test clip", "shapes"],
            inputs=[
                io.Combo.Input(
                    "clip",
                    options=names,
                    default=names[0],
                    tooltip="Which clip. The text is the prompt that describes it. 00 to 07 have one shape or two; "
                    "08 to 13 equal shapes, 16 and 17 three, 20 to 23 two that pass one another, 24 to 27 a fast one, "
                    "28 and 29 one with a stripe.",
                ),
                io.Int.Input(
                    "edit",
                    default=1,
                    min=1,
                    max=3,
                    tooltip="Which of the clip's three edit prompts to put out.",
                ),
            ],
            outputs=[
                io.Image.Output("images", tooltip="The frames, 8 images of 64 x 64 pixels."),
                io.Mask.Output(
                    "mask_1",
                    tooltip="Mask of the first (left or top) shape in each frame. 1 = the shape, as far as it is seen.",
                ),
                io.Mask.Output(
                    "mask_2",
                    tooltip="Mask of the second (right or bottom) shape in each frame. Empty if there is only one.",
                ),
                io.String.Output("source_prompt", tooltip="The prompt that describes the clip."),
                io.String.Output("edit_prompt", tooltip="The prompt that describes the edited clip."),
                io.Float.Output("fps", tooltip="Frames a second, for saving the video."),
                io.Mask.Output("mask_3", tooltip="Mask of the third shape in each frame. Empty if there is none."),
                io.Mask.Output(
                    "stripe_mask",
                    tooltip="Mask of the stripe across a shape in each frame. Empty if there is none.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, clip, edit=1) -> io.NodeOutput:
        from ..host.loaders import example_clips

        loaded = example_clips.load_clip(clip, edit)
        show_on_node(cls, f"{loaded.source_prompt} -> {loaded.edit_prompt}")
        return io.NodeOutput(*loaded)
