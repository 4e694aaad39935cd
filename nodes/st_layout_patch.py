"""ST-Layout Attention Patch: keep each phrase in its region."""

from comfy_api.latest import io

from .types import fraction, text_of, valid, valid_window


class STLayoutAttentionPatch(io.ComfyNode):
    """Spatio-temporal layout-guided attention (VideoGrain, arXiv 2502.17258, eq. 4 to 8)."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="STE_STLayoutAttentionPatch",
            display_name="ST-Layout Attention Patch",
            category="Spacetime Edit/ST-Layout",
            description="Patches the attention of a model so that each phrase of a regional prompt stays in its region "
            "and each region holds together over the frames. Several regions in one pass, without training and without "
            "further weights. The regions come with the conditioning of Encode Regional Prompt.",
            search_aliases=["videograin", "st-modulator", "st-layout", "regional attention", "multi-grained editing"],
            inputs=[
                io.Model.Input("model", tooltip="The video model. The patch is on a copy; the model stays as it is."),
                io.Float.Input(
                    "cross_strength",
                    default=3.0,
                    min=0.0,
                    max=5.0,
                    step=0.05,
                    tooltip="How strongly words are drawn into their region and out of the others. 1 is the method's "
                    "own, 0 leaves cross-attention alone. In models that read prompt and clip in one attention "
                    "(CogVideoX, HunyuanVideo, Mochi) the mean of this and self_strength counts.",
                ),
                io.Float.Input(
                    "self_strength",
                    default=1.0,
                    min=0.0,
                    max=3.0,
                    step=0.05,
                    tooltip="How strongly the pixels of a region attend to each other and not to other regions. 1 is "
                    "the method's own, 0 leaves self-attention alone.",
                ),
                fraction(
                    "start_percent",
                    0.0,
                    tooltip="Where in the denoising the patch begins to act (0 = at the first step).",
                ),
                fraction(
                    "end_percent",
                    0.6,
                    tooltip="Where in the denoising it ends; the method's own is 0.3. Its strength falls with the "
                    "noise in any case.",
                ),
                io.String.Input(
                    "levels",
                    default="",
                    advanced=True,
                    tooltip="At which resolutions, as how much coarser than the latent: 1,2,4,8. Empty: all but the "
                    "latent's own, and that too if it has at most 1024 cells.",
                ),
                io.Float.Input(
                    "temporal_strength",
                    default=0.0,
                    min=0.0,
                    max=3.0,
                    step=0.05,
                    advanced=True,
                    tooltip="The same for the temporal attention of models that have one, where an object that moves "
                    "passes from one region to another. Not part of the method.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    display_name="model",
                    tooltip="For the guider or sampler of the edit, with the conditioning of Encode Regional Prompt.",
                )
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, start_percent=None, end_percent=None, levels=None):
        from ..host.region_patch import parse_levels

        window = valid_window(start_percent, end_percent)
        return window if window is not True else valid(parse_levels, levels or "")

    @classmethod
    def execute(cls, model, start_percent, end_percent, levels="", **strengths) -> io.NodeOutput:
        from ..host.region_patch import RegionModulation, parse_levels, patch_regions

        window = {"start": start_percent, "end": end_percent}
        modulation = RegionModulation(**window, levels=parse_levels(levels), say=text_of(cls), **strengths)
        return io.NodeOutput(patch_regions(model, modulation))
