"""Capture STR Score: choose what of the source clip's attention the edit must keep."""

from comfy_api.latest import io

from .types import SCORE_TYPE, TRAJECTORY_TYPE, valid


class CaptureSTRScore(io.ComfyNode):
    """The spatio-temporal relevance score of STR-Match (arXiv 2506.22868)."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="STE_CaptureSTRScore",
            display_name="Capture STR Score",
            category="Spacetime Edit/STR-Match",
            description="Chooses the attention layers whose spatio-temporal relevance (STR) ties the edit to the "
            "source clip: which pixel is related to which, from frame to frame.",
            search_aliases=["str-match", "spatio-temporal relevance", "attention score", "motion preservation"],
            inputs=[
                TRAJECTORY_TYPE.Input("trajectory", tooltip="The inverted source clip, from Invert Video."),
                io.String.Input(
                    "layers",
                    default="",
                    tooltip="Blocks to match, such as d1-d2,m0,u0-u1 (d = down, m = middle, u = up, counted over the "
                    "blocks with attention; b = block of a transformer). Empty: all but those at the finest "
                    "resolution, of a transformer the first two, which is the method's own choice.",
                ),
                io.Int.Input(
                    "radius",
                    default=0,
                    min=0,
                    max=64,
                    advanced=True,
                    tooltip="How many frames before and after a frame it is compared with. 0: all of them; in video "
                    "transformers, where each costs more, the adjacent ones.",
                ),
                io.Combo.Input(
                    "paths",
                    options=["spatial-temporal", "temporal-spatial", "both", "concat"],
                    default="spatial-temporal",
                    advanced=True,
                    tooltip="How pixels of two frames are related: through space, then time; the other way round; or "
                    "both. concat is the plain baseline of the paper: the two attention maps side by side.",
                ),
                io.Combo.Input(
                    "direction",
                    options=["both ways", "one way"],
                    default="both ways",
                    advanced=True,
                    tooltip="both ways: from a frame to its neighbour and back, which is the method's own choice. "
                    "one way: to the neighbour only. concat ignores it.",
                ),
                io.Boolean.Input(
                    "per_pair",
                    default=False,
                    advanced=True,
                    tooltip="Compare each pair of frames by itself, not the sum over a frame's neighbours. Holds less "
                    "against jitter. concat ignores it.",
                ),
            ],
            outputs=[
                SCORE_TYPE.Output(display_name="STR score", tooltip="What to match, for the STR Latent Optimizer.")
            ],
        )

    @classmethod
    def validate_inputs(cls, layers=None):
        from ..host.layers import parse_blocks

        return valid(parse_blocks, layers or "")

    @classmethod
    def execute(
        cls, trajectory, layers, radius, paths="spatial-temporal", direction="both ways", per_pair=False
    ) -> io.NodeOutput:
        from ..host.relevance_matching import str_score_of

        form = dict(paths=paths, bidirectional=direction == "both ways", per_pair=per_pair)
        return io.NodeOutput(str_score_of(trajectory, layers, radius, **form))
