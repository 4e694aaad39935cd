"""Sweep Lambda: one edit for each of several strengths."""

from comfy_api.latest import io

from .types import valid


class SweepLambda(io.ComfyNode):
    """Copies of an STR sampler with other lambdas, as a list that the host works through."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="STE_SweepLambda",
            display_name="Sweep Lambda",
            category="Spacetime Edit/STR-Match",
            description="Makes one sampler for each lambda of a list, so that one run shows what the setting does. The "
            "nodes that follow run once for each.",
            search_aliases=["str-match", "xy plot", "compare settings", "grid", "ablation"],
            inputs=[
                io.Sampler.Input("sampler", tooltip="The sampler of STR Latent Optimizer; its lambda is replaced."),
                io.String.Input(
                    "lambdas",
                    default="0, 0.5, 1, 1.5",
                    tooltip="Values from 0 to 2, with commas between. 0 is the plain prompt swap.",
                ),
            ],
            outputs=[
                io.Sampler.Output(
                    display_name="samplers",
                    is_output_list=True,
                    tooltip="One sampler a value. Connect it to SamplerCustomAdvanced, which runs once for each.",
                ),
                io.String.Output(
                    display_name="labels",
                    is_output_list=True,
                    tooltip='One text a value, such as "lambda 0.5", for file names and titles.',
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, lambdas=None):
        return valid(parse_lambdas, "0" if lambdas is None else lambdas)

    @classmethod
    def execute(cls, sampler, lambdas) -> io.NodeOutput:
        from ..host.relevance_matching import RelevanceMatching

        values = parse_lambdas(lambdas)
        steps = getattr(sampler, "before_step", ())
        if not any(isinstance(step, RelevanceMatching) for step in steps):
            raise ValueError("sampler: it has no lambda; connect the sampler of STR Latent Optimizer")

        def with_lambda(value: float):
            return sampler.replaced(
                [step.with_strength(value) if isinstance(step, RelevanceMatching) else step for step in steps]
            )

        return io.NodeOutput([with_lambda(value) for value in values], [f"lambda {value:g}" for value in values])


def parse_lambdas(text: str) -> list[float]:
    """The numbers of "0, 0.5"; ValueError for anything that is not a list of numbers from 0 to 2."""
    from ..host.relevance_matching import LARGEST_LAMBDA

    try:
        values = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        values = []
    if not values or not all(0 <= value <= LARGEST_LAMBDA for value in values):
        raise ValueError(
            f"lambdas: {text!r}; expected numbers from 0 to {LARGEST_LAMBDA:g} with commas between, such as 0.5, 1"
        )
    return values
