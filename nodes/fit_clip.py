"""Fit Clip to Model: the size and number of frames that the model takes."""

from comfy_api.latest import io

from .types import show_on_node


class FitClipToModel(io.ComfyNode):
    """Frames picked, pictures scaled and cut or padded, with the mask kept in place."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="STE_FitClipToModel",
            display_name="Fit Clip to Model",
            category="Spacetime Edit/load",
            description="Brings a clip and its mask to a size and a number of frames that the model takes, and says in "
            "words what it changed. A clip that already fits passes unchanged.",
            search_aliases=["resize video", "crop video", "pad video", "frame count", "select every nth", "fit size"],
            inputs=[
                io.Image.Input("images", tooltip="The clip, one image a frame."),
                io.Model.Input("model", tooltip="The model that will edit the clip. Only its sizes are read."),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Where to edit: 1 = edit, 0 = keep. One mask for the whole clip or one for each frame that "
                    "comes in, of any size. It is picked, scaled and cut exactly as the clip is.",
                ),
                io.Int.Input(
                    "max_frames",
                    default=24,
                    min=2,
                    max=4096,
                    tooltip="Take at most this many frames, from the start of the clip. More frames need more memory "
                    "and time.",
                ),
                io.Int.Input(
                    "max_side",
                    default=576,
                    min=16,
                    max=8192,
                    step=8,
                    tooltip="Longest side of the result in pixels, at most. A smaller clip is not enlarged to it, only "
                    "rounded to the model's steps.",
                ),
                io.Combo.Input(
                    "mode",
                    options=["crop", "pad"],
                    default="crop",
                    tooltip="What happens where the shape of the picture does not fit. crop: cut the edges. pad: keep "
                    "everything and repeat the edge pixels as a border, which the mask leaves out of the edit.",
                ),
                io.Int.Input(
                    "every_nth",
                    default=1,
                    min=1,
                    max=100,
                    advanced=True,
                    tooltip="Take every n-th frame, for clips with a high frame rate. 1 takes all, 2 every other one. "
                    "Save the result with the frame rate divided by it.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="images", tooltip="The clip, for the VAE encode."),
                io.Mask.Output(
                    display_name="mask",
                    tooltip="The mask of the fitted clip. Without a mask at the input it is 1 everywhere but in the "
                    "border that pad adds.",
                ),
                io.Int.Output(display_name="frames", tooltip="The number of frames of the fitted clip."),
                io.String.Output(display_name="note", tooltip="What was changed, in words. Also shown on the node."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, images, model, max_frames, max_side, mode, every_nth=1, mask=None) -> io.NodeOutput:
        from ..host.clip_fitting import fit_clip

        fitted = fit_clip(images, model, mask, max_frames=max_frames, max_side=max_side, mode=mode, every_nth=every_nth)
        show_on_node(cls, fitted.note)
        return io.NodeOutput(*fitted)
