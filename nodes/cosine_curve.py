"""STR Cosine Curve: how the match went, step by step."""

from comfy_api.latest import io

from .charts import Line, line_chart


class STRCosineCurve(io.ComfyNode):
    """The cosine between the STR scores of source and edit over the denoising."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="STE_STRCosineCurve",
            display_name="STR Cosine Curve",
            category="Spacetime Edit/STR-Match",
            description="Draws how well the edit matched the source clip at each step: the cosine of their STR scores, "
            "before the step moves the latent. 1 is a perfect match. A curve that falls and stays low says that "
            "lambda is too small to hold the motion.",
            search_aliases=["str-match", "loss curve", "plot", "diagnose", "cosine similarity"],
            inputs=[
                io.Sampler.Input("sampler", tooltip="The sampler from STR Latent Optimizer or Sweep Lambda."),
                io.Latent.Input(
                    "latent",
                    tooltip="The edit: the first output of the SamplerCustomAdvanced that uses this sampler.",
                ),
            ],
            outputs=[io.Image.Output(display_name="chart", tooltip="The curve, 768 x 432 pixels.")],
        )

    @classmethod
    def execute(cls, sampler, latent) -> io.NodeOutput:
        find = getattr(sampler, "records_of", lambda _: None)
        records = find(latent["samples"])
        if not records:
            raise ValueError(
                "latent: no run of this sampler with STR matching made it; connect the output of the "
                "SamplerCustomAdvanced that uses the sampler of STR Latent Optimizer, with lambda above 0"
            )
        percents = [100 * record.percent for record in records]
        lines = [Line("before the step", percents, [record.cosines[0] for record in records])]
        if len(records[0].cosines) > 1:
            lines.append(Line("before its last iteration", percents, [record.cosines[-1] for record in records]))
        chart = line_chart(
            lines, title="Match of edit and source", x_label="denoising, %", y_label="cosine of the STR scores"
        )
        return io.NodeOutput(chart)
