"""Video DDS Optimize: DreamMotion, an edit without sampling."""

from comfy_api.latest import io, ui

from .charts import Line, line_chart
from .types import text_of, valid


class VideoDDSOptimize(io.ComfyNode):
    """Video delta denoising score with space-time self-similarity (DreamMotion, arXiv 2403.12002)."""

    @classmethod
    def define_schema(cls):
        def number(name: str, default: float, tooltip: str, maximum: float = 10.0, **options):
            options = {"min": 0.0, "max": maximum, "step": 0.01} | options
            return io.Float.Input(name, default=default, tooltip=tooltip, **options)

        return io.Schema(
            node_id="STE_VideoDDSOptimize",
            display_name="Video DDS Optimize",
            category="Spacetime Edit/DreamMotion",
            description="Edits a clip by optimising its own latent, without sampling from noise: the difference of "
            "what the model says of clip and edit moves the latent toward the new prompt, while the self-similarity of "
            "attention keys holds structure and motion.",
            search_aliases=["dreammotion", "delta denoising score", "dds", "sds", "score distillation", "v-dds"],
            inputs=[
                io.Model.Input("model", tooltip="The video model, with its LoRAs."),
                io.Latent.Input(
                    "latent", tooltip="The clip, encoded with the VAE of this model. The edit begins here."
                ),
                io.Conditioning.Input("source_positive", tooltip="The prompt that describes the clip as it is."),
                io.Conditioning.Input("positive", tooltip="The prompt of the edit."),
                io.Conditioning.Input("negative", tooltip="The negative prompt, for clip and edit. Usually empty."),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Where to edit: 1 = edit. One mask for the whole clip or one a frame, of any size, such as "
                    "from Mask from Boxes. Open: everywhere, for a change of style.",
                ),
                number(
                    "dilation",
                    0.0,
                    "Grow the mask by this many pixels of the clip before use.",
                    512.0,
                    step=1.0,
                ),
                io.Int.Input(
                    "steps",
                    default=200,
                    min=1,
                    max=10000,
                    tooltip="Optimisation steps. Each takes four passes of the model and a backward pass; every fourth "
                    "takes one for each of s_ssm, t_ssm and the others that are on.",
                ),
                number(
                    "step_size",
                    0.4,
                    "How far a step moves the latent. 0.4 is the method's own. Larger edits more and wears the "
                    "picture.",
                ),
                number("cfg", 7.5, "How strongly the prompts pull.", 100.0, step=0.1),
                number(
                    "s_ssm",
                    0.3,
                    "Spatial self-similarity: how much the layout inside each frame is held, as a share of the pull of "
                    "the prompt. 0 = not.",
                ),
                number(
                    "t_ssm",
                    0.1,
                    "Temporal self-similarity: how much the course over the frames is held. 0 = not.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="Of the noises and times that the steps draw.",
                ),
                number(
                    "relevance",
                    0.0,
                    "How much the STR score (STR-Match) is held too. Not part of DreamMotion.",
                    advanced=True,
                ),
                number(
                    "frame_difference",
                    0.0,
                    "How much the differences of neighbouring frames are held: a plain regulariser to compare with.",
                    advanced=True,
                ),
                io.String.Input(
                    "layers",
                    default="",
                    advanced=True,
                    tooltip="Blocks whose keys are compared, such as u0-u2 (d = down, m = middle, u = up, counted over "
                    "the blocks with attention). Empty: all on the way up; of a transformer the later half.",
                ),
                io.Combo.Input(
                    "branch",
                    options=["text", "negative"],
                    default="text",
                    advanced=True,
                    tooltip="Whose keys are compared: those under the two prompts, or those under the negative prompt, "
                    "which know nothing of the new words.",
                ),
                io.Combo.Input(
                    "weights",
                    options=["balanced", "fixed"],
                    default="balanced",
                    advanced=True,
                    tooltip="balanced: s_ssm, t_ssm and the others are shares of the pull of the prompt, whatever the "
                    "model. fixed: they multiply the raw gradients.",
                ),
                io.Combo.Input(
                    "score",
                    options=["delta", "plain"],
                    default="delta",
                    advanced=True,
                    tooltip="delta: against the clip's own prediction (DDS). plain: score distillation (SDS), which "
                    "blurs, to compare with.",
                ),
                number("t_min", 0.05, "Least noise that a step looks at.", 0.99, min=0.01, advanced=True),
                number("t_max", 0.95, "Most noise that a step looks at.", 0.99, min=0.02, advanced=True),
                io.Combo.Input(
                    "memory",
                    options=["auto", "low"],
                    default="auto",
                    advanced=True,
                    tooltip="low: compute activations again instead of keeping them, which is slower. auto: only when "
                    "memory is short.",
                ),
                io.Combo.Input(
                    "mask_filters",
                    options=["everything", "prompt"],
                    default="everything",
                    advanced=True,
                    tooltip="everything: outside the mask nothing moves. prompt: outside the mask the prompt changes "
                    "nothing, but s_ssm and t_ssm still act there, as in the paper.",
                ),
            ],
            outputs=[
                io.Latent.Output(display_name="latent", tooltip="The edited clip, for VAE Decode."),
                io.Image.Output(display_name="curves", tooltip="The losses over the steps, 768 x 432 pixels."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, layers=None, t_min=None, t_max=None):
        from ..host.distillation import check_times
        from ..host.layers import parse_blocks

        times = valid(check_times, (0.01 if t_min is None else t_min, 0.99 if t_max is None else t_max))
        return times if times is not True else valid(parse_blocks, layers or "")

    @classmethod
    def execute(
        cls,
        model,
        latent,
        source_positive,
        positive,
        negative,
        dilation,
        s_ssm,
        t_ssm,
        seed,
        relevance=0.0,
        frame_difference=0.0,
        layers="",
        weights="balanced",
        score="delta",
        t_min=0.05,
        t_max=0.95,
        memory="auto",
        mask_filters="everything",
        mask=None,
        **settings,
    ) -> io.NodeOutput:
        from latent_preview import prepare_callback

        from ..host.distillation import MOTION, RELEVANCE, SPATIAL, TEMPORAL, Distillation, optimise
        from ..host.features import key_blocks
        from ..host.latents import clip_mask

        carried = clip_mask(latent.get("noise_mask"))
        if mask is not None and carried is not None:
            raise ValueError(
                "mask: the latent already carries a noise mask; connect the mask here or set it on the latent, not both"
            )
        chosen = Distillation(
            weights={SPATIAL: s_ssm, TEMPORAL: t_ssm, RELEVANCE: relevance, MOTION: frame_difference},
            balanced=weights == "balanced",
            t_range=(t_min, t_max),
            blocks=key_blocks(model, layers),
            delta=score == "delta",
            low_memory=memory == "low",
            mask_all=mask_filters == "everything",
            **settings,
        )
        prompts = source_positive, positive, negative
        callback = prepare_callback(model, chosen.steps)
        samples, curve = optimise(
            model,
            *prompts,
            latent["samples"],
            chosen,
            seed=seed,
            mask=carried if mask is None else mask,
            dilation=dilation,
            callback=callback,
            say=text_of(cls),
        )
        chart = loss_chart(curve)
        return io.NodeOutput({**latent, "samples": samples}, chart, ui=ui.PreviewImage(chart, cls=cls))


def loss_chart(curve):
    """Losses by step, each as a share of its largest and as a mean over a tenth of the steps, whose noise differs."""
    if not curve:
        title = "Video DDS: the mask is empty, the clip is unchanged"
        return line_chart([], title=title, x_label="step", y_label="mean loss")
    width = max(1, len(curve) // 10)
    lines = []
    for name in curve[0][1]:
        values = [losses[name] for _, losses in curve]
        means = [sum(part) / len(part) for k in range(len(values)) if (part := values[max(0, k - width + 1) : k + 1])]
        top = max(map(abs, means)) or 1.0
        lines.append(Line(f"{name} (1 = {top:.2g})", range(1, len(means) + 1), [mean / top for mean in means]))
    return line_chart(lines, title="Video DDS", x_label="step", y_label="mean loss, share of the largest")
