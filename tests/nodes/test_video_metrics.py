"""Video Edit Metrics on real objects: what it measures, what it asks for, what it refuses."""

import json

import pytest
import torch
from spacetime_edit.host.video_metrics import measure
from spacetime_edit.nodes.video_metrics import VideoEditMetrics

FRAMES, SIDE = 4, 48


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


def test_the_node_puts_out_picture_text_and_json():
    source, edit, mask = clips()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("spacetime_edit.nodes.video_metrics.ui.PreviewImage", lambda picture, cls: None)
        picture, text, data = VideoEditMetrics.execute(source, edit, mask=mask).args
    assert picture.ndim == 4 and picture.min() >= 0 and picture.max() <= 1
    assert "background PSNR, dB" in text and json.loads(data)["background PSNR, dB"] == 100


def test_raft_of_the_host_is_asked_for_its_flow(monkeypatch):
    from types import SimpleNamespace

    import comfy.model_management
    from torchvision.models.optical_flow import raft_large

    monkeypatch.setattr(comfy.model_management, "load_model_gpu", lambda model: None)
    frames = torch.rand(2, 128, 128, 3)
    rows = {r.name: r for r in measure(frames, frames, flow_model=SimpleNamespace(model=raft_large().eval()))}
    assert "RAFT" in rows["warp error x 100"].note and rows["motion error, px"].value == 0
