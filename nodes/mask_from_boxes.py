"""Mask from Boxes: a mask for each frame from boxes, given for all frames or for some."""

from comfy_api.latest import io

from .types import valid


class MaskFromBoxes(io.ComfyNode):
    """The mask of DreamMotion (arXiv 2403.12002): boxes around what shall change."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="STE_MaskFromBoxes",
            display_name="Mask from Boxes",
            category="Spacetime Edit/DreamMotion",
            description="A mask for each frame from boxes around what shall change: written for a few frames, between "
            "which they move, or from a detector.",
            search_aliases=["dreammotion", "bounding box", "bbox", "rectangle mask", "keyframe mask"],
            inputs=[
                io.Image.Input("images", tooltip="The clip. The mask gets its size and its number of frames."),
                io.String.Input(
                    "boxes",
                    multiline=True,
                    default="",
                    tooltip="One line a frame: number of the frame from 0, then x, y, width and height in pixels, such "
                    "as '0: 10, 20, 30, 40'. Between the frames given, the box moves evenly. An empty line begins "
                    "another box.",
                ),
                io.BoundingBox.Input(
                    "bounding_boxes",
                    optional=True,
                    force_input=True,
                    tooltip="Boxes of a detector, in place of the text: those of each frame, or of one frame for all.",
                ),
            ],
            outputs=[io.Mask.Output(display_name="mask", tooltip="1 inside any box, one mask a frame.")],
        )

    @classmethod
    def validate_inputs(cls, boxes=None):
        from ..core.boxes import parse_boxes

        return valid(parse_boxes, boxes or "")

    @classmethod
    def execute(cls, images, boxes, bounding_boxes=None) -> io.NodeOutput:
        from ..core.boxes import box_at, mask_of_boxes, parse_boxes

        frames, height, width = images.shape[:3]
        if bounding_boxes is not None:
            return io.NodeOutput(mask_of_boxes(_of_detector(bounding_boxes, frames), height, width))
        keyed = parse_boxes(boxes)
        if not keyed:
            raise ValueError("boxes: there are none; write lines such as 0: 10, 20, 30, 40, or connect bounding_boxes")
        late = max(frame for keys in keyed for frame in keys)
        if late >= frames:
            raise ValueError(f"boxes: one is of frame {late}; the clip has {frames} frames, expected 0 to {frames - 1}")
        return io.NodeOutput(mask_of_boxes([[box_at(k, f) for k in keyed] for f in range(frames)], height, width))


def _of_detector(found, frames: int) -> list[list[tuple[float, float, float, float]]]:
    """Boxes by frame, from the host's: one box, those of one frame, or a list of them for each frame."""
    found = [[found]] if isinstance(found, dict) else found
    found = [found] if found and isinstance(found[0], dict) else found
    if len(found) not in (1, frames):
        raise ValueError(f"bounding_boxes: they are of {len(found)} frames, the clip has {frames}")
    named = [[(b["x"], b["y"], b["width"], b["height"]) for b in of_frame] for of_frame in found]
    return named if len(named) == frames else named * frames
