"""Optical Flow: where each pixel of a clip goes."""

from comfy_api.latest import io, ui

from .types import FLOW_TYPE, raft_input


class OpticalFlow(io.ComfyNode):
    """Flow from each frame to the next, and what hides."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="STE_OpticalFlow",
            display_name="Optical Flow",
            category="Spacetime Edit/metrics",
            description="Where each pixel of a clip goes from frame to frame: by RAFT if you connect it, else by a "
            "simpler method that needs no weights. For metrics of several edits of one clip, and to look at.",
            search_aliases=["flow", "motion", "raft", "lucas-kanade", "farneback", "motion vectors"],
            inputs=[io.Image.Input("images", tooltip="The clip, one image a frame."), raft_input()],
            outputs=[
                FLOW_TYPE.Output(display_name="flow", tooltip="For Video Edit Metrics and Compare Edits."),
                io.Image.Output(
                    display_name="picture",
                    tooltip="A picture for each step: direction as hue, speed as saturation, still is white.",
                ),
                io.Mask.Output(
                    display_name="occlusion",
                    tooltip="1 where a pixel has no match in the next frame.",
                ),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, images, optical_flow=None) -> io.NodeOutput:
        import comfy.utils
        import torch

        from ..core.flow import flow_picture
        from ..host.optical_flow import flow_of

        bar = comfy.utils.ProgressBar(max(1, len(images) - 1))
        flow = flow_of(images[..., :3], optical_flow, progress=lambda done, total: bar.update_absolute(done, total))
        largest = float(flow.forward.norm(dim=1).max())
        picture = torch.stack([flow_picture(step, largest) for step in flow.forward])
        return io.NodeOutput(flow, picture, flow.occlusion, ui=ui.PreviewImage(picture, cls=cls))
