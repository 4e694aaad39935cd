"""Video Edit Metrics on real objects: what it measures, what it asks for, what it refuses."""

import json
from dataclasses import replace

import comfy.model_management
import comfy.model_patcher
import pytest
import torch
from spacetime_edit.core.metrics import warp_error
from spacetime_edit.host.optical_flow import flow_of
from spacetime_edit.host.video_metrics import compare, measure
from spacetime_edit.nodes import compare_edits, optical_flow, track_points, video_metrics
from spacetime_edit.nodes.charts import slider
from spacetime_edit.nodes.compare_edits import CompareEdits
from spacetime_edit.nodes.optical_flow import OpticalFlow
from spacetime_edit.nodes.track_points import TrackPoints
from spacetime_edit.nodes.video_metrics import VideoEditMetrics

FRAMES, SIDE = 4, 48


@pytest.fixture
def unsaved(monkeypatch):
    """Nodes without the preview files that a running graph wants."""
    for module in (compare_edits, optical_flow, track_points, video_metrics):
        monkeypatch.setattr(module.ui, "PreviewImage", lambda picture, cls: None)


class Vision:
    """A CLIP Vision whose embedding of a picture is its mean colour."""

    def encode_image(self, images):
        return {"image_embeds": images.mean((1, 2))}


class Clip:
    """A CLIP in the same space; projects: whether its projection is more than the identity."""

    def __init__(self, projects=True, channels=3):
        self.cond_stage_model = torch.nn.Module()
        weight = torch.full((3, 3), 0.5) if projects else torch.eye(3)
        layer = torch.nn.Linear(3, 3, bias=False)
        layer.weight = torch.nn.Parameter(weight, requires_grad=False)
        self.cond_stage_model.text_projection = layer
        self._channels = channels

    def tokenize(self, text):
        return text

    def encode_from_tokens(self, tokens, return_pooled):
        return None, torch.ones(1, self._channels)


def clips():
    source = torch.rand(FRAMES, SIDE, SIDE, 3, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(1, SIDE, SIDE)
    mask[:, 10:30, 10:30] = 1
    edit = source.clone()
    edit[:, 10:30, 10:30] = 0.5
    return source, edit, mask


def values(rows):
    return {row.name: row.value for row in rows}


def test_without_models_it_measures_what_it_can_and_says_what_to_connect():
    source, edit, mask = clips()
    rows = {row.name: row for row in measure(source, edit, mask=mask)}
    assert rows["background PSNR, dB"].value == 100 and rows["background SSIM"].value > 0.97
    assert rows["warp error x 100"].value > 0 and rows["motion error, px"].value > 0
    assert rows["text alignment (CLIP-T)"].value is None
    assert "connect CLIP Vision" in rows["frame consistency (CLIP-F)"].note
    same = values(measure(source, source))
    assert same["motion error, px"] == 0 and same["background SSIM"] is None


def test_with_models_of_one_space_everything_is_measured():
    source, edit, mask = clips()
    found = values(measure(source, edit, prompt="grey", mask=mask, clip=Clip(), clip_vision=Vision()))
    assert all(value is not None for value in found.values())
    assert 0.9 < found["text alignment (CLIP-T)"] <= 1
    assert found["Q-edit"] == pytest.approx(100 * found["text alignment (CLIP-T)"] / found["warp error x 100"])


@pytest.mark.parametrize(
    ("clip", "reason"), [(Clip(projects=False), "no text projection"), (Clip(channels=5), "CLIP has 5 channels")]
)
def test_a_clip_that_does_not_fit_is_named(clip, reason):
    source, edit, _ = clips()
    row = measure(source, edit, prompt="grey", clip=clip, clip_vision=Vision())[0]
    assert row.value is None and reason in row.note


def test_what_does_not_fit_is_refused():
    source, edit, _ = clips()
    with pytest.raises(ValueError, match=r"edit: its shape .* is \(3, 48, 48, 3\), the source's \(4, 48, 48, 3\)"):
        measure(source, edit[:3])
    with pytest.raises(ValueError, match="source: it has 1 frame"):
        measure(source[:1], edit[:1])
    edit[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="edit: it holds NaN"):
        measure(source, edit)


def test_the_node_puts_out_picture_text_and_json(unsaved):
    source, edit, mask = clips()
    picture, text, data = VideoEditMetrics.execute(source, edit, mask=mask).args
    assert picture.ndim == 4 and picture.min() >= 0 and picture.max() <= 1
    assert "background PSNR, dB" in text and json.loads(data)["background PSNR, dB"] == 100


def raft_model(network):
    """As the host's Load Optical Flow Model gives it."""
    devices = comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device()
    return comfy.model_patcher.ModelPatcher(network.eval(), *devices)


def test_raft_of_the_host_is_asked_for_its_flow():
    from torchvision.models.optical_flow import raft_large

    frames = torch.rand(2, 72, 96, 3)  # smaller than the network takes
    rows = {r.name: r for r in measure(frames, frames, flow_model=raft_model(raft_large()))}
    assert "RAFT" in rows["warp error x 100"].note and rows["motion error, px"].value == 0


@pytest.mark.parametrize(("height", "width"), [(64, 100), (200, 132), (256, 128)])
def test_flow_is_in_pixels_of_the_clip_whatever_sides_the_network_takes(height, width):
    """A network that says how far its picture is shifted, in its own pixels."""

    class Shift(torch.nn.Module):
        def forward(self, first, second):
            assert min(first.shape[-2:]) >= 128 and not any(side % 8 for side in first.shape[-2:])
            assert first.min() == -1 and first.max() > 0.9
            bright = [(frame[0].mean(0) + 1) / 2 for frame in (first, second)]
            where = torch.meshgrid(*map(torch.arange, first.shape[-2:]), indexing="ij")
            down, right = ((bright[1] - bright[0]).mul(at).sum() / bright[0].sum() for at in where)
            return [torch.stack([right, down]).view(1, 2, 1, 1).expand(1, 2, *first.shape[-2:])]

    frames = torch.zeros(2, height, width, 3)
    frames[0, 10:30, 20:50] = 1
    frames[1, 20:40, 40:70] = 1
    flow = flow_of(frames, raft_model(Shift())).forward[0]
    assert flow.shape == (2, height, width)
    torch.testing.assert_close(flow[:, 5, 5], torch.tensor([20.0, 10.0]), rtol=0.02, atol=0.2)


def test_several_edits_are_measured_as_each_alone():
    source, edit, mask = clips()
    edits = {"edit0": edit, "edit1": source.flip(2), "edit2": source}
    together = compare(source, edits, prompt="grey", mask=mask, clip=Clip(), clip_vision=Vision())
    alone = [measure(source, e, prompt="grey", mask=mask, clip=Clip(), clip_vision=Vision()) for e in edits.values()]
    assert together == alone
    with pytest.raises(ValueError, match="edit1: its shape"):
        compare(source, {"edit0": edit, "edit1": edit[:2]})


def test_a_cut_and_a_hidden_pair_cost_themselves_alone():
    """Pairs of frames of which nothing is seen twice are left out, and said."""
    source, edit, _ = clips()
    flow = flow_of(source)
    rest = replace(flow, forward=flow.forward[1:], occlusion=flow.occlusion[1:])
    expected = 100 * warp_error(edit[1:], rest.forward, occlusion=rest.occlusion)
    for forward, hidden in ((1e4, 0.0), (0.0, 1.0)):  # out of the picture; behind another
        gone = replace(
            flow,
            forward=torch.cat([flow.forward[:1] + forward, rest.forward]),
            occlusion=torch.cat([torch.full_like(flow.occlusion[:1], hidden), rest.occlusion]),
        )
        rows = {row.name: row for row in measure(source, edit, flow=gone)}
        assert rows["warp error x 100"].value == pytest.approx(expected, rel=1e-6)
        assert "without 1 pairs of frames" in rows["warp error x 100"].note
    nothing = replace(flow, occlusion=torch.ones_like(flow.occlusion))
    rows = {row.name: row for row in measure(source, edit, flow=nothing)}
    assert rows["warp error x 100"].value is None and rows["Q-edit"].value is None
    assert rows["background PSNR, dB"].note == "connect a mask (1 = edited)"


def test_the_warp_error_of_a_table_is_that_of_the_clip():
    """Where pairs of frames differ in what they hide: each pixel counts the same."""
    source, edit, _ = clips()
    flow = flow_of(source)
    hidden = torch.zeros_like(flow.occlusion)
    hidden[0, : SIDE // 2] = 1
    value = values(measure(source, edit, flow=replace(flow, occlusion=hidden)))["warp error x 100"]
    assert value == pytest.approx(100 * warp_error(edit, flow.forward, occlusion=hidden), rel=1e-6)


def test_a_flow_that_is_known_is_not_computed_again(monkeypatch):
    """And what it says is hidden is left out of the warp error."""
    source, edit, _ = clips()
    flow = flow_of(source)
    assert flow.forward.shape == (FRAMES - 1, 2, SIDE, SIDE) and flow.occlusion.shape == (FRAMES - 1, SIDE, SIDE)
    plain, known = values(measure(source, edit)), values(measure(source, edit, flow=flow))
    assert known["motion error, px"] == plain["motion error, px"]
    assert known["warp error x 100"] != plain["warp error x 100"]
    with pytest.raises(ValueError, match="flow: it is of 4 frames of 48 x 48 pixels, the source has 3"):
        measure(source[:3], edit[:3], flow=flow)


def test_compare_edits_marks_the_best_and_names_the_edits(unsaved, monkeypatch):
    source, edit, mask = clips()
    tables = []
    monkeypatch.setattr(compare_edits, "table_chart", lambda cells, heads, bold: tables.append((cells, heads, bold)))
    edits = {"edit0": edit, "edit1": None, "edit2": source.flip(2)}
    _, chart, film, data = CompareEdits.execute(source, edits, names="masked\n", mask=mask).args
    cells, heads, bold = tables[0]
    assert heads == ("metric", "masked", "edit2", "")
    rows = [cell[0] for cell in cells]
    assert bold[rows.index("background PSNR, dB")] == 1 and bold[rows.index("motion error, px")] == 1
    assert rows.index("Q-edit") not in bold and "connect CLIP Vision" in cells[0][-1]
    found = json.loads(data)
    assert found["masked"]["background PSNR, dB"] == 100 and found["edit2"]["background PSNR, dB"] < 30
    assert chart.shape[-1] == 3 and film.shape == (FRAMES, SIDE, 2 * SIDE, 3)
    twice = "one is there twice"
    for names, message in (("a\nb\nc", "there are 3, one a line, for 2 edits"), ("a\na", twice), ("edit2", twice)):
        with pytest.raises(ValueError, match=f"names: {message}"):
            CompareEdits.execute(source, edits, names=names)


def test_the_slider_shows_the_clip_left_of_its_line():
    source, edit = torch.zeros(3, 8, 16, 3), torch.full((3, 8, 16, 3), 0.5)
    film = slider(source, [edit, edit])
    assert film.shape == (3, 8, 32, 3) and not edit.eq(1).any()
    assert [int((frame[0, :16, 0] == 0).sum()) for frame in film] == [3, 7, 11]
    assert (film[:, :, 12:16] == 0.5).all() and torch.equal(film[..., :16, :], film[..., 16:, :])


def test_flow_and_tracks_as_nodes(unsaved):
    """A textured picture that moves right by two pixels a frame."""
    wide = torch.rand(1, 3, 8, 16, generator=torch.Generator().manual_seed(0))
    wide = torch.nn.functional.interpolate(wide, (SIDE, 2 * SIDE), mode="bicubic")[0].movedim(0, -1).clamp(0, 1)
    images = torch.stack([wide[:, 20 - 2 * i : 20 - 2 * i + SIDE] for i in range(FRAMES)])
    flow, picture, hidden = OpticalFlow.execute(images).args
    assert abs(float(flow.forward[:, 0, 16:-16, 16:-16].mean()) - 2) < 0.3
    assert picture.shape == (FRAMES - 1, SIDE, SIDE, 3) and hidden.shape == (FRAMES - 1, SIDE, SIDE)
    mask = torch.zeros(1, 2 * SIDE, 2 * SIDE)
    mask[:, 40:56, 30:60] = 1
    tracks, drawn = TrackPoints.execute(images, 8, mask=mask).args
    path, seen = tracks["track_path"], tracks["track_visibility"]
    assert path.shape[0] == FRAMES and path.shape[2] == 2 and seen.shape == path.shape[:2]
    assert (path[-1] - path[0] - torch.tensor([6.0, 0.0])).norm(dim=-1).max() < 1
    assert drawn.shape == images.shape and not torch.equal(drawn, images)
    with pytest.raises(ValueError, match="images: there is 1 frame"):
        TrackPoints.execute(images[:1], 8)
    with pytest.raises(ValueError, match="images: there is 1 frame"):
        OpticalFlow.execute(images[:1])
