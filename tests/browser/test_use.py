"""What a user does: search, drop a block, run, watch, stop, save, reload, read help. In the real frontend."""

import io
import json
from time import monotonic

import pytest
from PIL import Image
from spacetime_edit.tools.browser import Browser
from spacetime_edit.tools.server import ExecutionFailed
from spacetime_edit.tools.templates import WORKFLOWS, read

pytestmark = pytest.mark.browser

ROOT = WORKFLOWS.parent
STR_MATCH = WORKFLOWS / "Swap an object - STR-Match (tiny).json"
SWAP = WORKFLOWS / "Swap an object - prompt swap (tiny).json"
SEARCH = "app.extensionManager.command.execute('Workspace.SearchBox.Toggle')"
LONG = 400  # steps of an inversion that is to be stopped
EVENTS = """(() => {
    window.seen = {progress: 0, previews: 0, errors: []};
    app.extensionManager.setting.set('Comfy.Execution.PreviewMethod', 'latent2rgb');
    app.api.addEventListener('progress', () => window.seen.progress++);
    app.api.addEventListener('b_preview', () => window.seen.previews++);
    app.api.addEventListener('execution_error', event => window.seen.errors.push(event.detail.exception_message));
})()"""


@pytest.fixture(scope="module")
def browser(live_server):
    with Browser() as browser:
        browser.open_comfy(live_server.url)
        browser.evaluate(EVENTS)
        yield browser


def press(browser, key, code):
    for kind in ("keyDown", "keyUp"):
        browser.command("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)


def search(browser, words):
    """The search box with these words in it."""
    browser.evaluate(SEARCH)
    browser.wait_for("document.activeElement?.tagName === 'INPUT'")
    browser.command("Input.insertText", text=words)


def close_search(browser):
    press(browser, "Escape", 27)
    browser.wait_for("document.activeElement?.tagName !== 'INPUT'")


def set_widget(browser, node_type, name, value):
    browser.evaluate(
        f"app.graph.nodes.find(node => node.type === '{node_type}').widgets.find(w => w.name === '{name}').value = "
        f"{json.dumps(value)}"
    )


def queued(browser, server):
    """Queue the shown graph; its prompt id."""
    before = set(known(server))
    assert browser.evaluate("app.queuePrompt(0, 1)") is not False
    deadline = monotonic() + 60
    while not (new := set(known(server)) - before):
        assert monotonic() < deadline, server.log_tail()
    return new.pop()


def known(server):
    """Ids of the prompts that run, wait or are done."""
    queue = server.get("/queue")
    running = [entry[1] for entry in queue["queue_running"] + queue["queue_pending"]]
    return [*running, *server.get("/history")]


def frames_of(server, entry):
    """The bytes of the pictures that a graph saved."""
    return [file.read_bytes() for file in server.output_files(entry) if file.suffix == ".png"]


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("videograin", "ST-Layout Attention Patch"),
        ("dreammotion", "Video DDS Optimize"),
        ("ddim inversion", "Invert Video"),
        ("STR Latent Optimizer", "STR Latent Optimizer"),
        ("clip score", "Video Edit Metrics"),
        ("Edit Regions", "Edit Regions (ST-Layout)"),
    ],
)
def test_search_finds_nodes_by_plain_words_and_by_paper(browser, words, name):
    search(browser, words)
    try:
        found = '[...document.querySelectorAll(\'[data-testid="result-item"], [role="option"]\')]'
        browser.wait_for(f"{found}.some(item => item.textContent.includes({json.dumps(name)}))", timeout=20)
    finally:
        close_search(browser)


def test_a_block_is_dropped_and_does_what_its_nodes_do(browser, live_server):
    """By the search box, wired to the embedded model; its edit is that of the template, to the bit."""
    browser.evaluate("app.graph.clear()")
    search(browser, "Edit Video (STR")
    browser.wait_for("document.body.textContent.includes('Edit Video (STR-Match)')")
    press(browser, "Enter", 13)
    browser.wait_for("app.graph.nodes.length === 1")
    browser.evaluate("""(() => {
        const add = type => { const node = LiteGraph.createNode(type); app.graph.add(node); return node; };
        const set = (node, values) => Object.entries(values).forEach(([name, value]) => {
            node.widgets.find(widget => widget.name === name).value = value;
        });
        const block = app.graph.nodes[0];
        const [model, clip, save] = ['STE_LoadVideoDiffusersModel', 'STE_LoadExampleClip', 'SaveImage'].map(add);
        set(clip, {clip: 'clip_00 - a red circle on a gray background', edit: 2});
        set(block, {source_prompt: 'a red circle on a gray background', lambda: 1.0, steps: 4, cfg: 4,
                    edit_prompt: 'a red square on a gray background'});
        ['model', 'clip', 'vae'].forEach((name, slot) => model.connect(slot, block, block.findInputSlot(name)));
        clip.connect(clip.findOutputSlot('images'), block, block.findInputSlot('images'));
        block.connect(block.findOutputSlot('edit'), save, save.findInputSlot('images'));
    })()""")
    block = frames_of(live_server, live_server.wait(queued(browser, live_server)))
    graph = read(WORKFLOWS / "api" / STR_MATCH.name)
    inputs_of = {node["class_type"]: node["inputs"] for node in graph.values()}
    inputs_of["STE_STRLatentOptimizer"]["dilation"] = 16.0  # the block has the node's own
    inputs_of["STE_InvertVideo"]["steps"] = 4
    saved = next(key for key, node in graph.items() if node["class_type"] == "SaveImage")
    entry = live_server.queue({key: node for key, node in graph.items() if key == saved or needed(graph, saved, key)})
    assert len(block) == 8 and [pixels(data) for data in block] == [pixels(d) for d in frames_of(live_server, entry)]


def needed(graph, target, key):
    """Whether a node is upstream of another."""
    links = [link[0] for link in graph[target]["inputs"].values() if isinstance(link, list)]
    return key in links or any(needed(graph, link, key) for link in links)


def pixels(data):
    return Image.open(io.BytesIO(data)).tobytes()


def test_a_run_shows_progress_and_previews_and_stops_when_told(browser, live_server):
    browser.load_graph(read(STR_MATCH))
    set_widget(browser, "STE_InvertVideo", "steps", LONG)
    browser.evaluate("(() => { window.seen.progress = window.seen.previews = 0; })()")
    prompt = queued(browser, live_server)
    browser.wait_for("window.seen.progress > 3 && window.seen.previews > 0", timeout=120)
    start = monotonic()
    browser.evaluate("app.extensionManager.command.execute('Comfy.Interrupt')")
    with pytest.raises(ExecutionFailed, match="execution_interrupted in node 5"):
        live_server.wait(prompt, timeout=60)
    assert monotonic() - start < 10
    assert browser.evaluate("window.seen.errors") == []
    set_widget(browser, "STE_InvertVideo", "steps", 4)
    entry = live_server.wait(queued(browser, live_server))
    assert entry["status"]["status_str"] == "success" and len(frames_of(live_server, entry)) >= 8


def test_a_saved_workflow_opens_again_and_gives_the_same_result(browser, live_server, tmp_path):
    browser.load_graph(read(SWAP))
    set_widget(browser, "STE_InvertVideo", "steps", 3)
    first = frames_of(live_server, live_server.wait(queued(browser, live_server)))
    file = tmp_path / "saved.json"
    file.write_text(json.dumps(browser.evaluate("app.graph.serialize()")))
    api = browser.api_form()
    browser.open_comfy(live_server.url)
    browser.evaluate(EVENTS)
    browser.load_graph(json.loads(file.read_text()))
    assert browser.api_form() == api
    live_server.post("/free", {"unload_models": True, "free_memory": True})  # nothing is kept but what is saved
    again = frames_of(live_server, live_server.wait(queued(browser, live_server)))
    assert len(first) == 8 and [pixels(data) for data in again] == [pixels(data) for data in first]


def test_the_help_of_a_node_opens(browser):
    browser.load_graph(read(STR_MATCH))
    x, y = browser.evaluate("""(() => {
        const node = app.graph.nodes.find(node => node.type === 'STE_STRLatentOptimizer');
        const page = app.canvas.canvas.getBoundingClientRect();
        app.canvas.ds.scale = 1;
        app.canvas.ds.offset = [300 - node.pos[0], 200 - node.pos[1]];
        app.canvas.setDirty(true, true);
        return [page.left + 360, page.top + 188];  // on its title
    })()""")
    browser.evaluate("new Promise(requestAnimationFrame).then(() => null)")
    browser.command("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    for kind in ("mousePressed", "mouseReleased"):
        browser.command("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
    button = "document.querySelector('[data-testid=\"info-button\"]')"
    browser.wait_for(button, timeout=20)
    browser.evaluate(f"{button}.click()")
    page = (ROOT / "web" / "docs" / "STE_STRLatentOptimizer.md").read_text(encoding="utf-8")
    words = "shapes may change, motion and background stay"
    assert words in page
    browser.wait_for(f"document.body.textContent.includes({json.dumps(words)})", timeout=20)
    browser.screenshot(ROOT / "output" / "screenshots" / "help.png")
