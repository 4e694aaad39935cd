"""Check Model as the graph runs it."""

import json

import pytest
from spacetime_edit.nodes import check_model
from spacetime_edit.nodes.check_model import CheckModel


@pytest.fixture
def unsaved(monkeypatch):
    """The node without the preview file that a running graph wants."""
    monkeypatch.setattr(check_model.ui, "PreviewImage", lambda picture, cls: None)


@pytest.fixture
def positive(tiny):
    import nodes

    return nodes.CLIPTextEncode().encode(tiny.clip, "a secret prompt")[0]


def test_the_report_says_what_was_found_and_no_prompt(tiny, positive, unsaved):
    """With the example clip, of which only the vae is connected."""
    picture, text, found, layers, strength = CheckModel.execute(tiny.model, positive, vae=tiny.vae).args
    assert picture.ndim == 4 and picture.min() >= 0 and picture.max() <= 1
    assert "all that was tried works" in text and f"layers {layers}, lambda {strength:g}" in text
    about = json.loads(found)
    assert about["suggested"] == {"layers": layers, "lambda": strength} and set(layers) <= set("dmu0123456789,")
    assert {block["block"] for block in about["blocks"]} >= set(layers.split(","))
    for told in (text, found):
        assert "secret" not in told and "/" not in told.replace("--fp32", "")


def test_without_a_clip_it_says_what_to_connect(tiny, positive):
    with pytest.raises(ValueError, match="^latent: neither a clip nor a vae is connected"):
        CheckModel.execute(tiny.model, positive)
