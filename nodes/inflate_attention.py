"""Inflate Attention to Video: frames that attend to one another in a model made for single pictures."""

from comfy_api.latest import io

from .types import valid


class InflateAttention(io.ComfyNode):
    """Spatio-temporal self-attention of an image model (VideoGrain, arXiv 2502.17258; Tune-A-Video, 2212.11565)."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="STE_InflateAttention",
            display_name="Inflate Attention to Video",
            category="Spacetime Edit/ST-Layout",
            description="Makes an image model such as SD 1.5 treat a batch of frames as one clip: self-attention spans "
            "the frames, so that they agree with one another. No training and no further weights; finetunes, LoRAs and "
            "ControlNets work as before.",
            search_aliases=[
                "videograin",
                "tune-a-video",
                "cross-frame attention",
                "extended attention",
                "sd 1.5 video",
                "temporal consistency",
            ],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="An SD 1.5 model, with its LoRAs. The same result goes into Invert Video and into the "
                    "guider of the edit.",
                ),
                io.Combo.Input(
                    "frames",
                    options=["all frames", "first + previous", "per frame"],
                    default="all frames",
                    tooltip="What each frame attends to. all frames: steadiest, and slowest: time grows with the "
                    "square of the number of frames. first + previous: cheap, drifts on long clips. per frame: "
                    "the model as it is.",
                ),
                io.String.Input(
                    "levels",
                    default="",
                    advanced=True,
                    tooltip="At which resolutions, as how much coarser than the latent: 1,2,4,8. Empty: all. Without 1 "
                    "it is much faster, and details agree less.",
                ),
                io.Boolean.Input(
                    "shared_norms",
                    default=False,
                    advanced=True,
                    tooltip="Take the statistics of the group norms in ResNet blocks over the whole clip, as the "
                    "public code of VideoGrain does: frames get one brightness and contrast.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="For Invert Video and for the guider of the edit.")],
        )

    @classmethod
    def validate_inputs(cls, levels=None):
        from ..host.region_patch import parse_levels

        return valid(parse_levels, levels or "")

    @classmethod
    def execute(cls, model, frames, levels="", shared_norms=False) -> io.NodeOutput:
        from ..core.inflation import Inflation
        from ..host.inflation import inflate_attention
        from ..host.region_patch import parse_levels

        return io.NodeOutput(inflate_attention(model, Inflation(frames, parse_levels(levels), shared_norms)))
