"""Every template on a live server: tiny ones run to their end, the others lack only model files."""

import pytest
from spacetime_edit.tools.other_packs import OTHER_PACK, is_there
from spacetime_edit.tools.server import PromptRejected
from spacetime_edit.tools.templates import WORKFLOWS, api_path, is_tiny, model_files, read, templates

pytestmark = pytest.mark.workflows

TINY = [template for template in templates() if is_tiny(template)]
REAL = [template for template in templates() if not is_tiny(template) and is_there(template.stem)]
OF_OTHERS = [template for template in templates() if OTHER_PACK in template.stem]
MISSING_FILE = "value_not_in_list"


def test_there_are_templates():
    assert TINY, "no `workflows/*(tiny).json`"
    assert REAL, "no template with real weights in workflows/"


def test_every_api_form_has_a_template():
    assert {path.name for path in (WORKFLOWS / "api").iterdir()} == {t.name for t in templates()}


@pytest.mark.parametrize("template", TINY, ids=lambda template: template.stem)
def test_tiny_template_runs_to_its_end(live_server, template):
    entry = live_server.queue(read(api_path(template)))
    assert entry["status"]["status_str"] == "success"
    files = live_server.output_files(entry)
    assert files, "the template shows and saves nothing"
    assert all(file.stat().st_size > 0 for file in files)


@pytest.mark.parametrize("template", REAL, ids=lambda template: template.stem)
def test_real_template_lacks_only_its_model_files(live_server, template):
    declared = model_files(read(template))
    assert declared, "no node of this template names its files in properties.models"
    try:
        live_server.interrupt(live_server.submit(read(api_path(template))))  # this machine has the files
    except PromptRejected as rejected:
        assert rejected.node_errors, rejected
        errors = [error for node in rejected.node_errors.values() for error in node["errors"]]
        assert {error["type"] for error in errors} == {MISSING_FILE}, rejected
        missing = {error["extra_info"]["received_value"] for error in errors}
        assert missing <= declared, f"not in properties.models: {missing - declared}"


@pytest.mark.parametrize("template", OF_OTHERS, ids=lambda template: template.stem)
def test_template_with_another_pack_needs_that_pack_alone(live_server, template):
    """Where it is not installed, its nodes are all that the server lacks."""
    known = set(live_server.get("/object_info"))
    lacking = {node["class_type"] for node in read(api_path(template)).values()} - known
    assert all(name.startswith("ADE_") for name in lacking)
    assert bool(lacking) != is_there(template.stem)
