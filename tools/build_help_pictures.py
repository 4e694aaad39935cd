"""Write web/docs/images/<node id>.webp, the picture of each node's help page, and put it into the page.

    python tools/build_help_pictures.py [--only STE_...]

Each node as the editor shows it, in the first template that has it; those of tiny templates after a run, with their
previews.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import re
import time

from browser import Browser
from pack import ROOT, host_path
from PIL import Image
from server import LiveServer
from templates import is_tiny, read, templates

DOCS = ROOT / "web" / "docs"
MARGIN = 24  # pixels around the node
QUALITY = 82
SHOWN = """(() => {
    const node = app.graph.nodes.find(node => node.type === %s);
    const page = app.canvas.canvas.getBoundingClientRect();
    const title = LiteGraph.NODE_TITLE_HEIGHT;
    app.canvas.deselectAll?.();
    node.mode = 0;  // also of a muted group
    app.canvas.ds.scale = 1;
    app.canvas.ds.offset = [260 - node.pos[0], 160 - node.pos[1]];
    app.canvas.setDirty(true, true);
    return [page.left + 260, page.top + 160 - title, node.size[0], node.size[1] + title];
})()"""


WITHOUT_FILMS = """app.graph.nodes.filter(node => node.type === 'SaveAnimatedWEBP')
    .forEach(node => app.graph.remove(node))"""  # they lie over other nodes


def places() -> dict[str, tuple]:
    """(template, whether it can be run) by node id; tiny templates first."""
    found: dict[str, tuple] = {}
    for tiny in (True, False):
        for template in templates():
            if is_tiny(template) != tiny:
                continue
            for node in read(template)["nodes"]:
                if node["type"].startswith("STE_"):
                    found.setdefault(node["type"], (template, tiny))
    return found


def picture(browser: Browser, type: str) -> Image.Image:
    """The node as the editor shows it."""
    x, y, width, height = browser.evaluate(SHOWN % json.dumps(type))
    browser.evaluate(
        "new Promise(requestAnimationFrame).then(() => new Promise(requestAnimationFrame)).then(() => null)"
    )
    time.sleep(0.5)  # previews and texts of the page follow the canvas
    clip = {"x": x - MARGIN, "y": y - MARGIN, "width": width + 2 * MARGIN, "height": height + 2 * MARGIN, "scale": 1}
    data = browser.command("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=False)["data"]
    return Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")


def shown_in_page(type: str, title: str) -> None:
    """Put the picture below the page's first paragraph."""
    page = DOCS / f"{type}.md"
    text = page.read_text(encoding="utf-8")
    if f"images/{type}.webp" in text:
        return
    head, rest = re.split(r"\n(?=## )", text, maxsplit=1)
    page.write_text(f"{head.rstrip()}\n\n![{title}](images/{type}.webp)\n\n{rest}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="one node id")
    only = parser.parse_args().only
    (DOCS / "images").mkdir(exist_ok=True)
    by_template: dict = {}
    for type, (template, tiny) in places().items():
        if only in ("", type):
            by_template.setdefault((template, tiny), []).append(type)
    with LiveServer(host_path()) as server, Browser(1600, 1400) as browser:
        browser.open_comfy(server.url)
        names = {name: node["display_name"] for name, node in server.get("/object_info").items()}
        for (template, tiny), types in by_template.items():
            browser.load_graph(read(template))
            if tiny:
                before = set(server.get("/history"))
                browser.evaluate("app.queuePrompt(0, 1)")
                while not (new := set(server.get("/history")) - before):
                    time.sleep(0.2)
                server.wait(new.pop())
                time.sleep(1)
                browser.evaluate(WITHOUT_FILMS)
            for type in types:
                file = DOCS / "images" / f"{type}.webp"
                picture(browser, type).save(file, quality=QUALITY, method=6)
                shown_in_page(type, names[type])
                print(file.name, file.stat().st_size, flush=True)


if __name__ == "__main__":
    main()
