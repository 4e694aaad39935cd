"""The pack as the host loads it: every node is described, helped, translated and shown in a template."""

import asyncio
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LANGUAGES = ("en", "zh")


@pytest.fixture(scope="module")
def schemas():
    """Schema of each node of the pack by id, loaded by the host from its custom_nodes folder."""
    import folder_paths
    import nodes

    folder = Path(folder_paths.base_path) / "custom_nodes" / "spacetime-edit"
    assert folder.resolve() == ROOT, "the pack is not linked into this host: run `python dev.py setup`"
    before = set(nodes.NODE_CLASS_MAPPINGS)
    assert asyncio.run(nodes.load_custom_node(str(folder))), "the host could not load the pack: see the log"
    new = {name: nodes.NODE_CLASS_MAPPINGS[name] for name in sorted(set(nodes.NODE_CLASS_MAPPINGS) - before)}
    assert new
    return {name: node.GET_SCHEMA() for name, node in new.items()}


def inputs_of(schema):
    """(path, input) of every input, with those that an option of a dynamic combo brings (`mode.strength`)."""

    def walk(inputs, prefix):
        for input in inputs:
            path = prefix + input.id
            yield path, input
            for option in getattr(input, "options", None) or []:
                yield from walk(getattr(option, "inputs", []), f"{path}.")

    return list(walk(schema.inputs, ""))


def shown(input):
    return input.display_name or input.id


def missing_by_node(schemas, check):
    """{node id: what it lacks} for all nodes that lack something."""
    return {name: lacks for name, schema in schemas.items() if (lacks := list(check(name, schema)))}


def test_every_node_describes_itself(schemas):
    def check(name, schema):
        if not name.startswith("STE_"):
            yield "id that starts with STE_"
        if not schema.category.startswith("Spacetime Edit"):
            yield "category Spacetime Edit/..."
        for field in ("display_name", "description", "search_aliases"):
            if not getattr(schema, field):
                yield field

    assert missing_by_node(schemas, check) == {}


def test_every_input_and_output_has_a_tooltip(schemas):
    def check(name, schema):
        yield from (f"input {path}" for path, input in inputs_of(schema) if not input.tooltip)
        for index, output in enumerate(schema.outputs):
            if not (output.tooltip and output.display_name):
                yield f"output {index}: {'name' if output.tooltip else 'tooltip'}"

    assert missing_by_node(schemas, check) == {}


def test_every_node_has_a_help_page_that_mentions_every_input_and_output(schemas):
    def check(name, schema):
        page = ROOT / "web" / "docs" / f"{name}.md"
        if not page.is_file():
            yield page.name
            return
        text = page.read_text(encoding="utf-8")
        yield from (shown(input) for _, input in inputs_of(schema) if shown(input) not in text)
        yield from (output.display_name for output in schema.outputs if output.display_name not in text)

    assert missing_by_node(schemas, check) == {}


def test_every_help_page_has_a_picture(schemas):
    def check(name, schema):
        picture, page = f"images/{name}.webp", ROOT / "web" / "docs" / f"{name}.md"
        if picture not in page.read_text(encoding="utf-8") or not (page.parent / picture).is_file():
            yield f"{picture}: run `python tools/build_help_pictures.py --only {name}`"

    assert missing_by_node(schemas, check) == {}


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_node_is_translated(schemas, language):
    file = ROOT / "locales" / language / "nodeDefs.json"
    definitions = json.loads(file.read_text(encoding="utf-8"))

    def check(name, schema):
        entry = definitions.get(name, {})
        yield from (field for field in ("display_name", "description") if not entry.get(field))
        for path, _ in inputs_of(schema):
            words = entry.get("inputs", {}).get(path.replace(".", "_"), {})  # the frontend's key
            yield from (f"inputs.{path}.{field}" for field in ("name", "tooltip") if not words.get(field))
        for index in range(len(schema.outputs)):
            words = entry.get("outputs", {}).get(str(index), {})
            yield from (f"outputs.{index}.{field}" for field in ("name", "tooltip") if not words.get(field))

    assert missing_by_node(schemas, check) == {}
    assert set(definitions) == set(schemas), "translations of nodes that do not exist"


def test_the_english_texts_are_those_of_the_nodes(schemas):
    definitions = json.loads((ROOT / "locales" / "en" / "nodeDefs.json").read_text(encoding="utf-8"))
    for name, schema in schemas.items():
        entry = definitions[name]
        assert (entry["display_name"], entry["description"]) == (schema.display_name, schema.description)
        for path, input in inputs_of(schema):
            words = entry["inputs"][path.replace(".", "_")]
            assert (words["name"], words["tooltip"]) == (shown(input), input.tooltip)
        for index, output in enumerate(schema.outputs):
            words = entry["outputs"][str(index)]
            assert (words["name"], words["tooltip"]) == (output.display_name, output.tooltip)


def test_every_node_is_in_a_template(schemas):
    from spacetime_edit.tools.templates import nodes_of, read, templates

    used = {node["type"] for template in templates() for node in nodes_of(read(template))}
    assert set(schemas) - used == set()


def test_the_templates_folder_holds_templates_and_their_thumbnails_only():
    """ComfyUI lists every JSON file there as a template."""
    from spacetime_edit.tools.templates import WORKFLOWS

    files = {path.name for path in WORKFLOWS.iterdir() if path.is_file()}
    names = {Path(name).stem for name in files}
    assert names, "workflows/ is empty"
    assert files == {name + suffix for name in names for suffix in (".json", ".jpg")}


def test_version_is_in_the_changelog_and_torch_is_not_a_dependency():
    """A torch in the requirements would replace the user's own build."""
    from comfy_config import config_parser

    project = config_parser.extract_node_configuration(str(ROOT)).project
    assert f"## [{project.version}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    requirements = (ROOT / "requirements.txt").read_text(encoding="utf-8").split()
    assert requirements == project.dependencies
    assert not [requirement for requirement in requirements if requirement.startswith("torch")]


SNAPSHOT = json.loads((ROOT / "tests" / "nodes" / "schemas.json").read_text(encoding="utf-8"))


def test_saved_workflows_still_open(schemas):
    """Against the snapshot: no input, choice or output that a saved workflow may hold is gone or elsewhere."""
    import nodes
    from spacetime_edit.tools.schemas import breaking, described

    now = {}
    for name in schemas:
        info = nodes.NODE_CLASS_MAPPINGS[name].GET_NODE_INFO_V1()
        now[name] = json.loads(json.dumps(described(info)))
    for own in now.values():  # names of files are the machine's
        for spec in own["inputs"]:
            spec["choices"] = [choice for choice in spec["choices"] if "/" not in str(choice)]
    assert list(breaking(SNAPSHOT, now)) == []
    assert now == SNAPSHOT, "something is new: run `python tools/schemas.py`"


def test_what_would_break_saved_workflows_is_seen():
    from copy import deepcopy

    from spacetime_edit.tools.schemas import breaking

    name = "STE_STRLatentOptimizer"
    assert list(breaking(SNAPSHOT, SNAPSHOT)) == []

    def changed(change):
        after = deepcopy(SNAPSHOT)
        change(after)
        return list(breaking(SNAPSHOT, after))

    def inputs(after):
        return after[name]["inputs"]

    new = {"name": "new", "type": "FLOAT", "optional": True, "choices": []}
    assert changed(lambda after: inputs(after).append(new)) == []
    assert "widgets are" in changed(lambda after: inputs(after).insert(0, new))[0]
    assert "not optional" in changed(lambda after: inputs(after).append(new | {"optional": False}))[0]
    assert changed(lambda after: after.pop(name)) == [f"{name}: gone"]
    assert "input score is gone" in changed(lambda after: inputs(after).pop(0))[0]
    task = next(i for i, own in enumerate(SNAPSHOT[name]["inputs"]) if own["name"] == "task")
    assert "has no choice delete" in changed(lambda after: inputs(after)[task]["choices"].remove("delete"))[0]
    assert "output 0" in changed(lambda after: after[name]["outputs"].clear())[0]


WITHOUT = """
import asyncio, importlib.abc, sys

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in ("diffusers", "kornia", "matplotlib"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
sys.path.append(sys.argv[1])
from pack import load_pack
extension = asyncio.run(load_pack().comfy_entrypoint())
print([node.GET_SCHEMA().node_id for node in asyncio.run(extension.get_node_list())])
"""


def test_without_its_own_packages_every_node_is_still_listed(schemas):
    """What needs one of them fails when it runs, by the package's name; nothing else does, nor does ComfyUI's start."""
    import subprocess
    import sys

    command = [sys.executable, "-c", WITHOUT, ROOT / "tools"]
    ran = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert sorted(json.loads(ran.stdout.splitlines()[-1].replace("'", '"'))) == sorted(schemas)
