"""Track Points: points of a clip followed from frame to frame."""

from comfy_api.latest import io, ui

from .charts import tracks_over
from .types import raft_input


class TrackPoints(io.ComfyNode):
    """Points of the first frame along the flow."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="STE_TrackPoints",
            display_name="Track Points",
            category="Spacetime Edit/metrics",
            description="Follows a grid of points of the first frame through a clip, by its flow from frame to frame. "
            "Shows how an edit moves beside its clip; the tracks also fit ComfyUI's Wan Move nodes.",
            search_aliases=["tracking", "point tracking", "tracks", "motion", "cotracker"],
            inputs=[
                io.Image.Input("images", tooltip="The clip, one image a frame."),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Points only where this is white in frame 0. Open: everywhere.",
                ),
                io.Int.Input("spacing", default=16, min=2, max=1024, tooltip="Pixels between the points of the grid."),
                raft_input(),
            ],
            outputs=[
                io.Tracks.Output(display_name="tracks", tooltip="The points' places and whether they are still seen."),
                io.Image.Output(display_name="images", tooltip="The clip with the points and the way that they came."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, images, spacing, mask=None, optical_flow=None) -> io.NodeOutput:
        import comfy.utils
        from torch.nn.functional import interpolate

        from ..core.flow import grid_points, track_points
        from ..host.optical_flow import check_clip, estimator_of

        check_clip(images)
        images = images[..., :3]
        height, width = images.shape[1:3]
        where = None
        if mask is not None:
            first = mask.reshape(-1, 1, *mask.shape[-2:])[:1]
            where = interpolate(first, (height, width), mode="bilinear")[0, 0]
        bar = comfy.utils.ProgressBar(len(images) - 1)
        tracks, seen = track_points(
            images,
            grid_points(height, width, spacing, where),
            estimator_of(optical_flow),
            progress=lambda done, total: bar.update_absolute(done, total),
        )
        drawn = tracks_over(images, tracks, seen)
        found = {"track_path": tracks.movedim(1, 0), "track_visibility": seen.T}
        return io.NodeOutput(found, drawn, ui=ui.PreviewImage(drawn, cls=cls))
