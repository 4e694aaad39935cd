"""Predict Cost: minutes and memory of an edit, before it runs."""

from comfy_api.latest import io, ui

from .types import fraction, show_on_node, valid, valid_window


class PredictCost(io.ComfyNode):
    """Times a few steps of an edit at its own size and counts up the rest."""

    @classmethod
    def define_schema(cls):
        from comfy.samplers import SCHEDULER_NAMES

        return io.Schema(
            node_id="STE_PredictCost",
            display_name="Predict Cost",
            category="Spacetime Edit/trajectory",
            description="Says how many minutes and how much memory an edit of this clip will take, before you start "
            "it. It runs three steps of each stage, at the size of your clip, and counts up the rest.",
            search_aliases=["vram", "memory estimate", "time estimate", "how long", "benchmark"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The model that will do the edit."),
                io.Conditioning.Input("positive", tooltip="Any prompt; its length counts a little."),
                io.Latent.Input("latent", tooltip="The clip, encoded with the VAE of this model."),
                io.Combo.Input(
                    "method",
                    options=["STR-Match", "prompt swap"],
                    default="STR-Match",
                    tooltip="What will edit: STR Latent Optimizer, or Sample from Trajectory.",
                ),
                io.Int.Input(
                    "steps",
                    default=50,
                    min=4,
                    max=500,
                    tooltip="Number of steps, as in Invert Video.",
                ),
                io.Boolean.Input(
                    "cfg",
                    default=True,
                    tooltip="Whether the guider's cfg is above 1, so that each step runs the model with two prompts.",
                ),
                io.Combo.Input(
                    "scheduler",
                    options=list(SCHEDULER_NAMES),
                    default="ddim_uniform",
                    advanced=True,
                    tooltip="As in Invert Video.",
                ),
                io.Int.Input(
                    "refinements",
                    default=1,
                    min=0,
                    max=10,
                    advanced=True,
                    tooltip="As in Invert Video.",
                ),
                io.String.Input("layers", default="", advanced=True, tooltip="As in Capture STR Score."),
                io.Int.Input(
                    "iterations",
                    default=3,
                    min=1,
                    max=10,
                    advanced=True,
                    tooltip="As in STR Latent Optimizer.",
                ),
                fraction(
                    "start_percent",
                    0.0,
                    advanced=True,
                    tooltip="As in STR Latent Optimizer.",
                ),
                fraction(
                    "end_percent",
                    0.75,
                    advanced=True,
                    tooltip="As in STR Latent Optimizer.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="report", tooltip="Time and memory by stage, as text."),
                io.Float.Output(display_name="minutes", tooltip="Inversion and edit together, in minutes."),
                io.Float.Output(display_name="gigabytes", tooltip="Peak memory on the device with the weights, in GB."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, layers=None, start_percent=None, end_percent=None):
        from ..host.families import parse_blocks

        window = valid_window(start_percent, end_percent)
        return valid(parse_blocks, layers or "") if window is True else window

    @classmethod
    def execute(cls, model, positive, latent, method, steps, cfg, scheduler, **settings) -> io.NodeOutput:
        from ..host.cost import Plan, predict_cost

        start, end = settings.pop("start_percent"), settings.pop("end_percent")
        plan = Plan(steps, prompts=1 + cfg, matching=method == "STR-Match", start=start, end=end, **settings)
        cost = predict_cost(model, positive, latent["samples"], plan, scheduler)
        text = report(cost)
        show_on_node(cls, text)
        return io.NodeOutput(text, cost.seconds / 60, cost.memory / 1e9, ui=ui.PreviewText(text))


def report(cost) -> str:
    """A `host.cost.Cost` in plain words."""
    matched = f", {cost.matched_steps} of them with matching" if cost.matched_steps else ""
    lines = [
        f"{duration(cost.seconds)} in all: inversion {duration(cost.inversion_seconds)}, edit "
        f"{duration(cost.edit_seconds)} ({cost.steps} steps{matched}).",
        f"{size(cost.memory)} of memory at the peak, {size(cost.free)} are free: weights {size(cost.weights)}, "
        f"sampling {size(cost.sampling)}.",
    ]
    if cost.gradient:
        small, large = size(cost.gradient.total(True)), size(cost.gradient.total(False))
        chosen = "Memory is short, so it will keep no activations." if cost.checkpointing else "There is room for it."
        lines.append(f"The gradient of a step takes {large}, or {small} with memory low (slower). {chosen}")
    lines.append(f"The trajectory takes {size(cost.trajectory)} of main memory.")
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """ "48 s", "3.5 min" or "2.1 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def size(count: int) -> str:
    """ "310 MB" or "5.4 GB"."""
    return f"{count / 1e6:.0f} MB" if count < 1e9 else f"{count / 1e9:.1f} GB"
