"""Every template in the real frontend: it loads, equals the API form that we ship, runs, logs no error."""

from pathlib import Path
from time import monotonic, sleep

import pytest
from spacetime_edit.tools.browser import Browser
from spacetime_edit.tools.other_packs import is_there
from spacetime_edit.tools.templates import api_path, for_every_host, is_tiny, nodes_of, read, templates

pytestmark = pytest.mark.browser

PACK = "spacetime-edit"
SCREENSHOTS = Path(__file__).resolve().parents[2] / "output" / "screenshots"
TEMPLATES = templates()


@pytest.fixture(scope="module")
def browser(live_server):
    with Browser() as browser:
        browser.open_comfy(live_server.url)
        yield browser


@pytest.fixture(autouse=True)
def clean_console(browser):
    """No error in the browser's console may name this pack."""
    browser.console.clear()
    yield
    browser.evaluate("null")  # takes in what was still on its way
    errors = [message for message in browser.console if message.level in ("error", "exception")]
    assert [error for error in errors if PACK in error.text + error.url or "STE_" in error.text] == []


def run_shown_graph(browser, server, timeout=600):
    """Queue the graph in the browser, as a click on Run does; its history entry."""
    before = set(server.get("/history"))
    assert browser.evaluate("app.queuePrompt(0, 1)") is not False
    deadline = monotonic() + timeout
    while not (new := set(server.get("/history")) - before):
        assert monotonic() < deadline, server.log_tail()
        sleep(0.2)
    return server.wait(new.pop())


def test_there_are_templates():
    assert [template for template in TEMPLATES if is_tiny(template)], "no `workflows/*(tiny).json`"


@pytest.mark.parametrize("template", [t for t in TEMPLATES if is_there(t.stem)], ids=lambda template: template.stem)
def test_template_in_the_frontend(browser, live_server, template):
    graph = read(template)
    browser.load_graph(graph)
    known = set(browser.evaluate("Object.keys(LiteGraph.registered_node_types)"))
    known |= {subgraph["id"] for subgraph in graph.get("definitions", {}).get("subgraphs", [])}
    assert {node["type"] for node in nodes_of(graph)} - known == set()
    assert for_every_host(browser.api_form()) == read(api_path(template)), "run `python tools/export_api.py`"
    if is_tiny(template):
        assert run_shown_graph(browser, live_server)["status"]["status_str"] == "success"
        browser.wait_for("[...document.images].every(image => image.complete)")  # previews load
    browser.screenshot(SCREENSHOTS / f"{template.stem}.png")


def test_every_node_of_the_pack_is_registered_with_a_help_page(browser, live_server):
    ours = {name: node for name, node in live_server.get("/object_info").items() if name.startswith("STE_")}
    assert ours, live_server.log_tail()
    for name, node in ours.items():
        assert node["python_module"] == f"custom_nodes.{PACK}"
        assert browser.evaluate(f"!!LiteGraph.registered_node_types['{name}']")
        status = browser.evaluate(f"fetch('/extensions/{PACK}/docs/{name}.md').then(answer => answer.status)")
        assert status == 200, f"no help page for {name}"


def test_templates_and_translations_are_listed(browser, live_server):
    listed = live_server.get("/api/workflow_templates").get(PACK, [])
    assert sorted(listed) == [template.stem for template in TEMPLATES]
    for template in TEMPLATES:
        for suffix in (".json", ".jpg"):
            url = f"/api/workflow_templates/{PACK}/{template.stem}{suffix}"
            status = browser.evaluate(f"fetch(encodeURI({url!r})).then(answer => answer.status)")
            assert status == 200, url
    translations = live_server.get("/i18n")
    for language in ("en", "zh"):
        assert any(name.startswith("STE_") for name in translations[language]["nodeDefs"])
