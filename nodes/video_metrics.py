"""Video Edit Metrics: what an edit kept, changed and how steady it is, as numbers."""

import json

from comfy_api.latest import io, ui

from .charts import table_chart

FLOW_TYPE = io.Custom("OPTICAL_FLOW")


class VideoEditMetrics(io.ComfyNode):
    """The metrics of the papers, with the models that are connected."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="STE_VideoEditMetrics",
            display_name="Video Edit Metrics",
            category="Spacetime Edit/metrics",
            description="Measures an edit against its clip: how steady it is, how well it moves as the clip does, what "
            "of the background is left, and, with CLIP, how well it fits its prompt. What cannot be measured says what "
            "to connect.",
            search_aliases=["metrics", "clip score", "warp error", "psnr", "ssim", "evaluate", "benchmark", "quality"],
            inputs=[
                io.Image.Input("source", tooltip="The clip as it was encoded, one image a frame."),
                io.Image.Input("edit", tooltip="The edited clip, of the same size and number of frames."),
                io.String.Input(
                    "prompt",
                    default="",
                    multiline=True,
                    tooltip="The prompt of the edit, for the text alignment.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Where the edit was meant to be (1 = edited), one for the clip or one a frame. What lies "
                    "outside is the background.",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="A CLIP with text projection, of the same model as CLIP Vision, for the text alignment.",
                ),
                io.ClipVision.Input("clip_vision", optional=True, tooltip="For text alignment and frame consistency."),
                FLOW_TYPE.Input(
                    "optical_flow",
                    optional=True,
                    tooltip="RAFT, from Load Optical Flow Model. Without it a simpler flow without weights is used.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="table", tooltip="The table as a picture."),
                io.String.Output(display_name="text", tooltip="The table as text."),
                io.String.Output(display_name="json", tooltip="Values by name as JSON, null where there is none."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls, source, edit, prompt="", mask=None, clip=None, clip_vision=None, optical_flow=None
    ) -> io.NodeOutput:
        import comfy.utils

        from ..host.video_metrics import measure

        bar = comfy.utils.ProgressBar(max(1, len(source) - 1))
        rows = measure(
            source[..., :3],
            edit[..., :3],
            prompt=prompt,
            mask=mask,
            clip=clip,
            clip_vision=clip_vision,
            flow_model=optical_flow,
            progress=lambda done, total: bar.update_absolute(done, total),
        )
        cells = [(row.name, "-" if row.value is None else f"{row.value:.4g}", row.better, row.note) for row in rows]
        widths = [max(len(cell[i]) for cell in cells) for i in range(3)]
        lines = ["  ".join([*(c.ljust(w) for c, w in zip(cell, widths, strict=False)), cell[3]]) for cell in cells]
        text = "\n".join(line.rstrip() for line in lines)
        values = json.dumps({row.name: row.value for row in rows}, indent=1)
        picture = table_chart(cells, ("metric", "value", "", "how, or what to connect"))
        return io.NodeOutput(picture, text, values, ui=ui.PreviewImage(picture, cls=cls))
