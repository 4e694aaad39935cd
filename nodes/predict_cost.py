"""Predict Cost: minutes and memory of the edits of a graph, before they run."""

from collections import Counter
from collections.abc import Mapping

from comfy_api.latest import io, ui

from .types import show_on_node


class PredictCost(io.ComfyNode):
    """Reads the edits of a clip from the graph, runs a few steps of each at its own size, and extrapolates."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="STE_PredictCost",
            display_name="Predict Cost",
            category="Spacetime Edit/trajectory",
            description="Says how many minutes and how much memory the edits of this clip will take, before you start "
            "them, and on which cards they fit. It reads steps, cfg, layers and the like from the nodes of the graph, "
            "and runs three steps of each stage at the size of your clip.",
            search_aliases=["vram", "memory estimate", "time estimate", "how long", "benchmark"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The model of the edit, with all nodes that it has on it."),
                io.Conditioning.Input(
                    "positive", tooltip="The prompt, with the ControlNet that the edit has, if it has one."
                ),
                io.Latent.Input(
                    "latent",
                    tooltip="The clip: the same latent that Invert Video or Video DDS Optimize gets, by which the "
                    "edits in the graph are found.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="report", tooltip="Time and memory by edit and stage, as text."),
                io.Float.Output(display_name="minutes", tooltip="Inversion and edits together, in minutes."),
                io.Float.Output(display_name="gigabytes", tooltip="Peak memory on the device with the weights, in GB."),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt],
        )

    @classmethod
    def fingerprint_inputs(cls, **_):
        from ..host.planned_edits import digest_of_running

        return digest_of_running()

    @classmethod
    def execute(cls, model, positive, latent) -> io.NodeOutput:
        from ..host.cost import predict_costs
        from ..host.planned_edits import Plan, edits_in

        graph, node = (None, None) if cls.hidden is None else (cls.hidden.prompt, cls.hidden.unique_id)
        plans = Counter(edits_in(graph or {}, str(node)))
        costs = predict_costs(model, positive, latent["samples"], list(plans) or [Plan()])
        text = report(costs, plans)
        show_on_node(cls, text)
        inversions = {cost.plan.inversion: cost.inversion_seconds for cost in costs}
        seconds = sum(inversions.values()) + sum(plans.get(c.plan, 1) * c.edit_seconds for c in costs)
        memory = max(cost.memory for cost in costs)
        return io.NodeOutput(text, seconds / 60, memory / 1e9, ui=ui.PreviewText(text))


UNKNOWN = (
    "No edit of this latent was found in the graph, so this is for STR-Match with its defaults. Connect the latent "
    "that Invert Video or Video DDS Optimize gets."
)


def report(costs, plans: Mapping) -> str:
    """A list of `host.cost.Cost` in plain words; plans: how often each edit runs."""
    head = [] if plans else [UNKNOWN]
    return "\n\n".join([*head, *(_of_edit(cost, plans.get(cost.plan, 1)) for cost in costs)])


def _of_edit(cost, times: int) -> str:
    from ..host.cost import CARDS, fits_on

    plan, often = cost.plan, f" (of {times} such edits each)" if times > 1 else ""
    matched = f", {cost.matched_steps} of them with a gradient" if cost.matched_steps else ""
    inversion = f"inversion {duration(cost.inversion_seconds)}, edit " if cost.inversion_seconds else ""
    layers = f", layers {plan.layers}" if plan.layers.strip() else ""
    lines = [
        f"{plan.method}{often}: {duration(cost.seconds)} in all: {inversion}{duration(cost.edit_seconds)} "
        f"({cost.steps} steps{matched}{layers}).",
        f"{size(cost.memory)} of memory at the peak, {size(cost.free)} are free: {size(cost.held)} are held before it, "
        f"{size(cost.weights)} of them weights; a step takes {size(max(cost.sampling, cost.gradient))} more.",
    ]
    if cost.foreseen:
        chosen = "Memory is short, so it will keep no activations." if cost.checkpointing else "There is room for it."
        chosen = "memory low is chosen." if plan.low_memory else chosen
        small, large = size(cost.working(True)), size(cost.working(False))
        lines.append(f"A step with a gradient takes {large}, or {small} with memory low (slower). {chosen}")
    if cost.trajectory:
        lines.append(f"The trajectory takes {size(cost.trajectory)} of main memory.")
    lines.append(f"With {size(cost.weights)} of weights, as they are loaded here:")
    return "\n".join([*lines, *(f"{card} GB card: {fits_on(card, cost)}." for card in CARDS)])


def duration(seconds: float) -> str:
    """ "48 s", "3.5 min" or "2.1 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def size(count: int) -> str:
    """ "310 MB" or "5.4 GB"."""
    return f"{count / 1e6:.0f} MB" if count < 1e9 else f"{count / 1e9:.1f} GB"
