"""Spacetime Edit: training-free, prompt-driven video editing inside ComfyUI."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """The list of nodes, read by ComfyUI when it loads the pack."""
    from comfy_api.latest import ComfyExtension

    from .nodes.capture_score import CaptureSTRScore
    from .nodes.check_model import CheckModel
    from .nodes.compare_edits import CompareEdits
    from .nodes.cosine_curve import STRCosineCurve
    from .nodes.encode_regional_prompt import EncodeRegionalPrompt
    from .nodes.example_clip import LoadExampleClip
    from .nodes.fit_clip import FitClipToModel
    from .nodes.inflate_attention import InflateAttention
    from .nodes.invert_video import InvertVideo
    from .nodes.load_cogvideox import LoadCogVideoX
    from .nodes.load_lavie import LoadLaVie
    from .nodes.load_model import LoadVideoDiffusersModel
    from .nodes.load_trajectory import LoadTrajectory
    from .nodes.mask_from_boxes import MaskFromBoxes
    from .nodes.optical_flow import OpticalFlow
    from .nodes.predict_cost import PredictCost
    from .nodes.preview_regions import PreviewRegions
    from .nodes.preview_relevance import PreviewRelevance
    from .nodes.preview_token_attention import PreviewTokenAttention
    from .nodes.region_prompt import RegionPrompt
    from .nodes.regions_from_attention import RegionsFromAttention
    from .nodes.regions_from_masks import RegionsFromMasks
    from .nodes.sample_trajectory import SampleFromTrajectory
    from .nodes.save_trajectory import SaveTrajectory
    from .nodes.st_layout_patch import STLayoutAttentionPatch
    from .nodes.str_optimizer import STRLatentOptimizer
    from .nodes.sweep_lambda import SweepLambda
    from .nodes.track_points import TrackPoints
    from .nodes.video_dds import VideoDDSOptimize
    from .nodes.video_metrics import VideoEditMetrics

    class SpacetimeEdit(ComfyExtension):
        async def get_node_list(self):
            return [
                LoadVideoDiffusersModel,
                LoadLaVie,
                LoadCogVideoX,
                LoadExampleClip,
                FitClipToModel,
                InvertVideo,
                SaveTrajectory,
                LoadTrajectory,
                CheckModel,
                PredictCost,
                SampleFromTrajectory,
                CaptureSTRScore,
                PreviewRelevance,
                STRLatentOptimizer,
                SweepLambda,
                STRCosineCurve,
                RegionPrompt,
                RegionsFromMasks,
                RegionsFromAttention,
                PreviewRegions,
                EncodeRegionalPrompt,
                InflateAttention,
                STLayoutAttentionPatch,
                PreviewTokenAttention,
                MaskFromBoxes,
                VideoDDSOptimize,
                VideoEditMetrics,
                CompareEdits,
                OpticalFlow,
                TrackPoints,
            ]

    return SpacetimeEdit()
