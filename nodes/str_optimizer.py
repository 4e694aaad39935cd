"""STR Latent Optimizer: the sampler of STR-Match."""

from comfy_api.latest import io

from .types import SCORE_TYPE, continue_from_latent_input, fraction, mask_inputs, show_share, text_of, valid_window


class STRLatentOptimizer(io.ComfyNode):
    """Latent optimisation by the cosine of STR scores (STR-Match, arXiv 2506.22868, eq. 5)."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="STE_STRLatentOptimizer",
            display_name="STR Latent Optimizer",
            category="Spacetime Edit/STR-Match",
            description="A sampler for SamplerCustomAdvanced that edits the inverted clip with a new prompt. Before "
            "every step it moves the latent so that its spatio-temporal relevance matches the source: shapes may "
            "change, while motion and background stay.",
            search_aliases=["str-match", "str", "video editing", "latent optimization", "motion preservation"],
            inputs=[
                SCORE_TYPE.Input(
                    "score",
                    tooltip="What to match, from Capture STR Score. The weights of the guider's model, with its LoRA, "
                    "serve for the clip and for the edit.",
                ),
                fraction(
                    "strength",
                    1.0,
                    display_name="lambda",
                    max=2.0,
                    step=0.05,
                    tooltip="How much of the way to the source's motion and layout each move goes: 1 is as far as a "
                    "full match asks for, less follows the new prompt more, up to 2 holds the source more. 0 is a "
                    "plain prompt swap.",
                ),
                io.Combo.Input(
                    "task",
                    options=["change", "delete", "add"],
                    default="change",
                    tooltip="change: swap an object or its looks. delete, add: the number of objects changes inside "
                    "the mask, which begins from new noise (by the seed), and nothing in there is matched. Both need a "
                    "mask: where the object is, or where it shall appear.",
                ),
                fraction(
                    "start_percent",
                    0.0,
                    tooltip="Where in the denoising the matching starts (0 = at the first step).",
                ),
                fraction(
                    "end_percent",
                    0.75,
                    tooltip="Where in the denoising the matching ends (1 = at the last step, as in the paper). The "
                    "last steps draw fine detail, which need not match.",
                ),
                *mask_inputs(),
                io.Int.Input(
                    "iterations",
                    default=3,
                    min=1,
                    max=10,
                    tooltip="Moves before each denoising step. Three hold the motion more surely than one, which is "
                    "faster; each costs about three model calls.",
                ),
                io.Combo.Input(
                    "memory",
                    options=["auto", "low"],
                    default="auto",
                    advanced=True,
                    tooltip="low: compute activations again instead of keeping them: a third of the memory or less, "
                    "and somewhat slower. auto: only when memory is short.",
                ),
                continue_from_latent_input(),
            ],
            outputs=[io.Sampler.Output(display_name="sampler", tooltip="Connect it to SamplerCustomAdvanced.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, start_percent=None, end_percent=None):
        return valid_window(start_percent, end_percent)

    @classmethod
    def execute(
        cls,
        score,
        strength,
        dilation,
        blend,
        mask=None,
        continue_from_latent=False,
        *,
        start_percent,
        end_percent,
        **settings,
    ):
        from ..host.relevance_matching import NEW_CONTENT, RelevanceMatching, redraw_noise
        from ..host.sampling import TrajectorySampler

        matching = RelevanceMatching(score, strength, start=start_percent, end=end_percent, **settings)
        before_step = [redraw_noise, matching] if matching.task in NEW_CONTENT else [matching]
        if continue_from_latent:  # the first model has drawn the new noise
            before_step = [matching]
        where = {"mask": mask, "dilation": dilation, "blend_source": blend}
        options = {"before_step": before_step, "continue_from_latent": continue_from_latent, "say": text_of(cls)}
        sampler = TrajectorySampler(score.trajectory, **options, **where)
        show_share(cls, sampler)
        return io.NodeOutput(sampler)
