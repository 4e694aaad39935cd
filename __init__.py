"""Spacetime Edit: training-free, prompt-driven video editing inside ComfyUI."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """The list of nodes, read by ComfyUI when it loads the pack."""
    from comfy_api.latest import ComfyExtension

    from .nodes.capture_score import CaptureSTRScore
    from .nodes.example_clip import LoadExampleClip
    from .nodes.invert_video import InvertVideo
    from .nodes.load_model import LoadVideoDiffusersModel
    from .nodes.sample_trajectory import SampleFromTrajectory
    from .nodes.str_optimizer import STRLatentOptimizer

    class SpacetimeEdit(ComfyExtension):
        async def get_node_list(self):
            return [
                LoadVideoDiffusersModel,
                LoadExampleClip,
                InvertVideo,
                SampleFromTrajectory,
                CaptureSTRScore,
                STRLatentOptimizer,
            ]

    return SpacetimeEdit()
