"""Check Model: what works with the model that is loaded, on this machine."""

import json
import textwrap

from comfy_api.latest import io, ui


class CheckModel(io.ComfyNode):
    """Tries inversion, attention, gradients, regions and memory on a clip, and says what is wrong and what to do."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="STE_CheckModel",
            display_name="Check Model",
            category="Spacetime Edit/load",
            description="Tries out whether the methods work with your model, on your machine: inversion and back, "
            "attention, the gradient of STR-Match block by block, regions, and memory. It suggests layers and lambda. "
            "The report holds no prompt, no picture and no file name, so you can paste it into an issue.",
            search_aliases=["diagnose", "test model", "debug", "compatibility", "report", "supported", "health"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The model, with all nodes that your edit has on it."),
                io.Conditioning.Input("positive", tooltip="A prompt that describes the clip."),
                io.Latent.Input(
                    "latent",
                    optional=True,
                    tooltip="A clip of yours, encoded with the VAE of this model. Leave unconnected to try a small "
                    "example clip, for which vae must be connected.",
                ),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="The VAE of this model, to encode the example clip. Has no effect where latent is "
                    "connected.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="picture", tooltip="What was tried and how it went, as a table."),
                io.String.Output(display_name="report", tooltip="The same as text, with what to do."),
                io.String.Output(
                    display_name="JSON", tooltip="All that was found, to paste into an issue: no prompts, no names."
                ),
                io.String.Output(
                    display_name="layers", tooltip="Suggestion for Capture STR Score; empty: its own choice."
                ),
                io.Float.Output(display_name="lambda", tooltip="Suggestion for STR Latent Optimizer."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, positive, latent=None, vae=None) -> io.NodeOutput:
        from comfy.utils import ProgressBar

        from ..host.clip_fitting import example_for
        from ..host.model_check import check_model
        from .charts import table_chart
        from .types import show_on_node

        if latent is None and vae is None:
            raise ValueError("latent: neither a clip nor a vae is connected; connect one of them")
        samples = vae.encode(example_for(model)) if latent is None else latent["samples"]
        bar = ProgressBar(6)
        check = check_model(model, positive, samples, lambda done, total: bar.update_absolute(done, total))
        text = report(check)
        show_on_node(cls, text)
        picture = table_chart(_rows(check), ["what", "verdict", "what was found"])
        strength = 1.0 if check.strength is None else check.strength
        shown = ui.PreviewImage(picture, cls=cls)
        return io.NodeOutput(picture, text, json.dumps(check.as_dict(), indent=1), check.layers, strength, ui=shown)


WIDTH = 100


def _rows(check) -> list[list[str]]:
    """The findings as rows of a table, long texts over several."""
    rows = []
    for finding in check.findings:
        for number, line in enumerate(textwrap.wrap(finding.text, WIDTH)):
            rows.append([finding.name, finding.verdict, line] if number == 0 else ["", "", line])
    return rows


def report(check) -> str:
    """A `host.model_check.ModelCheck` in plain words."""
    facts, broken = check.facts, check.broken
    odd = [finding for finding in check.findings if finding.verdict == "look"]
    done = "all that was tried works" + (f", {len(odd)} of it with a remark" if odd else "")
    head = f"{facts['family']}: {f'{len(broken)} of what was tried is broken' if broken else done}."
    lines = [head, *(f"{finding.name}: {finding.verdict}. {finding.text}" for finding in check.findings)]
    if check.blocks:
        lines.append("block   cosine before   after one move   gain of all blocks   gradient")
        for b in check.blocks:
            right = "right" if b.right else "WRONG"
            lines.append(f"{b.block:<7} {b.before:<15.4f} {b.after:<16.4f} {b.gain:<+20.4f} {right}")
    if check.strength is not None:
        layers = check.layers or "left empty"
        lines.append(f"Suggested for STR-Match: layers {layers}, lambda {check.strength:g}.")
    lines += [f"{name}: {_said(value)}" for name, value in facts.items()]
    return "\n".join([*lines, f"Tried in {check.seconds:.0f} s."])


def _said(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_said(own)}" for name, own in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
