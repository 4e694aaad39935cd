"""Video Edit Metrics: what an edit kept, changed and how steady it is, as numbers."""

from comfy_api.latest import io, ui

from .charts import table_chart
from .types import metric_inputs


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
                *metric_inputs(),
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
        cls, source, edit, prompt="", mask=None, clip=None, clip_vision=None, optical_flow=None, flow=None
    ) -> io.NodeOutput:
        import comfy.utils

        from ..host.video_metrics import as_json, as_text, measure, number

        bar = comfy.utils.ProgressBar(max(1, len(source) - 1))
        rows = measure(
            source[..., :3],
            edit[..., :3],
            prompt=prompt,
            mask=mask,
            clip=clip,
            clip_vision=clip_vision,
            flow_model=optical_flow,
            flow=flow,
            progress=lambda done, total: bar.update_absolute(done, total),
        )
        cells = [(row.name, number(row.value), row.better, row.note) for row in rows]
        picture = table_chart(cells, ("metric", "value", "", "how, or what to connect"))
        return io.NodeOutput(picture, as_text(rows), as_json(rows), ui=ui.PreviewImage(picture, cls=cls))
