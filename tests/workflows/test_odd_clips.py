"""Films as people have them, through the host's Load Video and Fit Clip to Model, to an edit."""

from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image
from spacetime_edit.tools.server import ExecutionFailed

pytestmark = pytest.mark.workflows

GRAPH = {
    "model": {
        "class_type": "STE_LoadVideoDiffusersModel",
        "inputs": {"model_name": "embedded tiny model", "weight_dtype": "default"},
    },
    "film": {"class_type": "LoadVideo", "inputs": {"file": ""}},
    "parts": {"class_type": "GetVideoComponents", "inputs": {"video": ["film", 0]}},
    "fit": {
        "class_type": "STE_FitClipToModel",
        "inputs": {
            **{"images": ["parts", 0], "model": ["model", 0], "max_frames": 6, "max_side": 64, "mode": "crop"},
            "every_nth": 1,
        },
    },
    "save": {"class_type": "SaveImage", "inputs": {"images": ["fit", 0], "filename_prefix": "fitted"}},
}


def film(path, count, size, pix_fmt, gaps):
    """A film of flat frames that become brighter; gaps: ticks of a 30th second between them, in turn."""
    height, width = size
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=30)
        stream.width, stream.height, stream.pix_fmt, stream.time_base = width, height, pix_fmt, Fraction(1, 30)
        tick = 0
        for i in range(count):
            frame = av.VideoFrame.from_ndarray(np.full((height, width, 3), 20 * (i + 1), np.uint8), format="rgb24")
            frame.pts, frame.time_base = tick, Fraction(1, 30)
            tick += gaps[i % len(gaps)]
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.mark.parametrize(
    ("size", "pix_fmt", "gaps"),
    [
        ((49, 83), "yuv444p", [1]),
        ((48, 80), "yuv420p10le", [1]),
        ((48, 80), "bgra", [1]),
        ((48, 80), "yuv420p", [1, 3, 2]),
        ((120, 20), "yuv420p", [1]),
    ],
    ids=["odd size", "10 bit", "alpha", "variable frame rate", "tall"],
)
def test_a_film_of_any_kind_becomes_a_clip_of_the_model(live_server, size, pix_fmt, gaps):
    name = f"film_{size[0]}_{pix_fmt}_{len(gaps)}.mkv"
    film(live_server.folder / "input" / name, 7, size, pix_fmt, gaps)
    graph = {**GRAPH, "film": {"class_type": "LoadVideo", "inputs": {"file": name}}}
    files = live_server.output_files(live_server.queue(graph))
    pictures = [np.array(Image.open(file)) for file in files]
    assert len(pictures) == 6
    height, width, channels = pictures[0].shape
    assert height % 4 == width % 4 == 0 and max(height, width) <= 64 and channels == 3
    means = [picture.mean() for picture in pictures]
    assert means == sorted(means) and abs(means[0] - 20) < 4 and abs(means[5] - 120) < 4


def test_a_film_of_one_frame_is_refused_by_name(live_server):
    film(live_server.folder / "input" / "one.mkv", 1, (48, 80), "yuv420p", [1])
    graph = {**GRAPH, "film": {"class_type": "LoadVideo", "inputs": {"file": "one.mkv"}}}
    with pytest.raises(ExecutionFailed, match=r"STE_FitClipToModel.*images: a clip of 1 frame"):
        live_server.queue(graph)
