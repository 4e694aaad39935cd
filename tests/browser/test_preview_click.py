"""Preview Relevance in the real frontend: a click on what one sees sets x, y and frame, also in Nodes 2.0."""

import base64
import io
import json
from pathlib import Path
from time import monotonic, sleep

import numpy as np
import pytest
from PIL import Image
from spacetime_edit.tools.browser import Browser

pytestmark = pytest.mark.browser

CLIPS = Path(__file__).resolve().parents[2] / "assets" / "tiny_clips"
CLIP = json.loads((CLIPS / "captions.json").read_text(encoding="utf-8"))[0]
CENTRES = CLIP["objects"][0]["centres"]
LAST = len(CENTRES) - 1
NODE = "6"
GRAPH = {
    "1": {
        "class_type": "STE_LoadVideoDiffusersModel",
        "inputs": {"model_name": "embedded tiny model", "weight_dtype": "default"},
    },
    "2": {"class_type": "STE_LoadExampleClip", "inputs": {"clip": f"{CLIP['clip']} - {CLIP['caption']}", "edit": 1}},
    "3": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": ["2", 3]}},
    "4": {"class_type": "VAEEncode", "inputs": {"pixels": ["2", 0], "vae": ["1", 2]}},
    "5": {
        "class_type": "STE_InvertVideo",
        "inputs": {
            **{"model": ["1", 0], "positive": ["3", 0], "latent": ["4", 0], "steps": 4, "scheduler": "ddim_uniform"},
            **{"refinements": 0, "check_reconstruction": False},
        },
    },
    NODE: {
        "class_type": "STE_PreviewRelevance",
        "inputs": {
            **{"trajectory": ["5", 0], "images": ["2", 0], "x": round(CENTRES[0][0]), "y": round(CENTRES[0][1])},
            **{"frame": 0, "threshold": 0.22, "opacity": 1.0, "percent": 0.7, "layers": ""},
        },
    },
}
PREVIEW = f"app.graph.getNodeById({NODE})"
POINT = f"['x', 'y', 'frame'].map(name => {PREVIEW}.widgets.find(widget => widget.name === name).value)"
IN_VIEW = f"""(node => {{
    node.setSize([420, 680]);
    app.canvas.ds.scale = 1.1;
    app.canvas.ds.offset = [300 - node.pos[0], 50 - node.pos[1]];
    app.canvas.setDirty(true, true);
}})({PREVIEW})"""
CANVAS_RECTS = f"""(node => (node.imageRects ?? []).map(([x, y, w, h]) => {{
    const {{scale, offset}} = app.canvas.ds, page = app.canvas.canvas.getBoundingClientRect();
    const left = page.left + (node.pos[0] + x + offset[0]) * scale;
    return [left, page.top + (node.pos[1] + y + offset[1]) * scale, w * scale, h * scale];
}}))({PREVIEW})"""
CANVAS_PANEL = f"""(node => {{
    const {{scale, offset}} = app.canvas.ds, page = app.canvas.canvas.getBoundingClientRect();
    const top = node.widgets.find(widget => widget.name === '$$canvas-image-preview').y;
    return [page.left + (node.pos[0] + offset[0]) * scale, page.top + (node.pos[1] + top + offset[1]) * scale,
            (node.size[0] - 45) * scale, (node.size[1] - top - 15) * scale];
}})({PREVIEW})"""
PAGE_RECTS = f"""[...document.querySelectorAll('[data-node-id="{NODE}"] .image-preview img')].map(image => {{
    const {{left, top, width, height}} = image.getBoundingClientRect();
    return [left, top, width, height];
}})"""


@pytest.fixture(scope="module")
def browser(live_server):
    with Browser() as browser:
        browser.open_comfy(live_server.url)
        yield browser


@pytest.fixture(params=[False, True], ids=["canvas", "Nodes 2.0"])
def page(browser, request):
    """The preview in view after a run, on the canvas or in Nodes 2.0; the value says which."""
    browser.evaluate(f"app.extensionManager.setting.set('Comfy.VueNodes.Enabled', {json.dumps(request.param)})")
    browser.evaluate(f"app.loadApiJson({json.dumps(GRAPH)}, 'preview click')")
    browser.evaluate("app.queuePrompt(0, 1).then(() => null)")
    rects = PAGE_RECTS if request.param else CANVAS_RECTS
    browser.evaluate(IN_VIEW)  # previews load when they are seen
    browser.wait_for(f"({rects}).length === {len(CENTRES)}", timeout=60)
    browser.evaluate(IN_VIEW)
    yield request.param
    browser.evaluate("app.extensionManager.setting.set('Comfy.VueNodes.Enabled', false)")


def hot_centre(picture, box=None):
    """(x, y) of the middle of what has the heat map's colours in a picture, or in a box: left, top, width, height."""
    left, top, width, height = (0, 0, *picture.size) if box is None else map(round, box)
    shown = np.asarray(picture.convert("RGB"))[top : top + height, left : left + width]
    y, x = np.nonzero(np.ptp(shown, -1) > 70)  # buttons and captions are grey
    assert len(x) > 100, "no object in the picture"
    return float(left + x.mean() + 0.5), float(top + y.mean() + 0.5)


def seen(browser, box):
    """Where the object is on the screen, in pixels of the page."""
    sleep(1)  # the pictures are drawn
    shot = base64.b64decode(browser.command("Page.captureScreenshot", format="png")["data"])
    return hot_centre(Image.open(io.BytesIO(shot)), box)


def click(browser, point):
    x, y = point
    browser.command("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    sleep(0.2)
    for event in ("mousePressed", "mouseReleased"):
        browser.command("Input.dispatchMouseEvent", type=event, x=x, y=y, button="left", clickCount=1)
        sleep(0.2)


def miss(browser, server):
    """Once the last frame is set: the distance in pixels of x and y from the object in the saved heat map."""
    deadline = monotonic() + 10
    while (point := browser.evaluate(POINT))[2] != LAST:
        assert monotonic() < deadline, f"the widgets hold {point}, expected frame {LAST}"
        sleep(0.1)
    name = browser.evaluate(f"app.nodeOutputs[{NODE}].images[{LAST}].filename")
    centre = hot_centre(Image.open(server.folder / "temp" / name))
    return np.hypot(*np.subtract(np.add(point[:2], 0.5), centre))


def test_a_click_sets_the_point_in_the_grid_and_in_an_enlarged_picture(browser, live_server, page):
    rects = browser.evaluate(PAGE_RECTS if page else CANVAS_RECTS)
    click(browser, seen(browser, rects[LAST]))  # it also enlarges the picture, as on every preview
    assert miss(browser, live_server) < 1.5
    browser.evaluate(f"{PREVIEW}.widgets.find(widget => widget.name === 'frame').value = 0")
    (panel,) = browser.evaluate(PAGE_RECTS) if page else [browser.evaluate(CANVAS_PANEL)]
    click(browser, seen(browser, panel))
    assert miss(browser, live_server) < 1.5


def test_a_click_beside_the_picture_sets_nothing(browser, page):
    before = browser.evaluate(POINT)
    left, top, width, height = browser.evaluate(PAGE_RECTS if page else CANVAS_RECTS)[0]
    click(browser, (left + width / 2, top + 1) if page else (left - 40, top + height / 2))
    assert browser.evaluate(POINT) == before
