"""Compare Edits: several edits of one clip, in numbers and side by side."""

import json

from comfy_api.latest import io, ui

from .charts import bar_chart, slider, table_chart
from .types import metric_inputs

MAX_EDITS = 16


class CompareEdits(io.ComfyNode):
    """The metrics of several edits in one table, one chart and one film."""

    @classmethod
    def define_schema(cls):
        edits = io.Autogrow.TemplatePrefix(
            io.Image.Input("edit", tooltip="An edit of the clip, of its size and number of frames."),
            prefix="edit",
            min=1,
            max=MAX_EDITS,
        )
        return io.Schema(
            node_id="STE_CompareEdits",
            display_name="Compare Edits",
            category="Spacetime Edit/metrics",
            description="Measures any number of edits of one clip and puts them side by side: as a table, as bars, and "
            "as a film in which a line sweeps from the clip to the edit.",
            search_aliases=["compare", "side by side", "metrics", "slider", "a/b", "ablation", "benchmark"],
            inputs=[
                io.Image.Input("source", tooltip="The clip as it was encoded, one image a frame."),
                io.Autogrow.Input(
                    "edits",
                    template=edits,
                    tooltip="The edits to compare. Connect one, and a free input appears below it.",
                ),
                io.String.Input(
                    "names",
                    default="",
                    multiline=True,
                    tooltip="A name for each edit, one a line, in their order. Empty: edit0, edit1 and so on, as the "
                    "inputs.",
                ),
                io.String.Input(
                    "prompt",
                    default="",
                    multiline=True,
                    tooltip="The prompt of the edits, for the text alignment.",
                ),
                *metric_inputs(),
            ],
            outputs=[
                io.Image.Output(display_name="table", tooltip="The table as a picture; the best of each row is bold."),
                io.Image.Output(display_name="chart", tooltip="A row of bars for each metric."),
                io.Image.Output(
                    display_name="slider",
                    tooltip="The edits beside one another, as a film: left of the moving line is the clip.",
                ),
                io.String.Output(display_name="json", tooltip="Values by edit and metric as JSON."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        source,
        edits,
        names="",
        prompt="",
        mask=None,
        clip=None,
        clip_vision=None,
        optical_flow=None,
        flow=None,
    ) -> io.NodeOutput:
        import comfy.utils

        from ..host.video_metrics import MORE, compare, number

        connected = {name: edit[..., :3] for name, edit in edits.items() if edit is not None}
        titles = _titles(names, list(connected))
        bar = comfy.utils.ProgressBar(max(1, len(source) - 1))
        tables = compare(
            source[..., :3],
            connected,
            prompt=prompt,
            mask=mask,
            clip=clip,
            clip_vision=clip_vision,
            flow_model=optical_flow,
            flow=flow,
            progress=lambda done, total: bar.update_absolute(done, total),
        )
        cells, best = [], {}
        for number_of_row, rows in enumerate(zip(*tables, strict=True)):
            values = [row.value for row in rows]
            note = rows[0].better if None not in values else rows[values.index(None)].note
            cells.append((rows[0].name, *map(number, values), note))
            if None not in values and len(set(values)) > 1:
                better = max if rows[0].better == MORE else min
                best[number_of_row] = 1 + values.index(better(values))
        table = table_chart(cells, ("metric", *titles, ""), bold=best)
        measured = [rows for rows in zip(*tables, strict=True) if all(row.value is not None for row in rows)]
        panels = {f"{rows[0].name}, {rows[0].better}": [row.value for row in rows] for rows in measured}
        film = slider(source[..., :3], list(connected.values()))
        values = {title: {row.name: row.value for row in rows} for title, rows in zip(titles, tables, strict=True)}
        return io.NodeOutput(
            table, bar_chart(panels, titles), film, json.dumps(values, indent=1), ui=ui.PreviewImage(table, cls=cls)
        )


def _titles(names: str, inputs: list[str]) -> list[str]:
    """A name for each edit, that of its input where none is given. ValueError for more names than edits, and for one
    that is there twice."""
    given = [name.strip() for name in names.splitlines() if name.strip()]
    if len(given) > len(inputs):
        raise ValueError(
            f"names: there are {len(given)}, one a line, for {len(inputs)} edits; remove some, or connect more"
        )
    titles = [*given, *inputs[len(given) :]]
    if len(set(titles)) < len(titles):
        raise ValueError("names: one is there twice; give each edit a name of its own")
    return titles
