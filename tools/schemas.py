"""The nodes' schemas as a snapshot, and what of a change would break saved workflows.

    python tools/schemas.py      # writes tests/nodes/schemas.json from the live schemas, unless that breaks something
    python tools/schemas.py --break   # also then: for a release that says so

A workflow saved by the editor holds widget values by their order, links by the number of an output and by the name of
an input; one in API format holds inputs by name.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from typing import Any

if __name__ == "__main__":
    from pack import ROOT, host_path
    from server import PACK_NAME, LiveServer

    FILE = ROOT / "tests" / "nodes" / "schemas.json"

WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")


def described(node: dict[str, Any]) -> dict[str, Any]:
    """Of a node of `/object_info` what saved workflows depend on."""
    inputs = []
    for kind in ("required", "optional"):
        for name, (type, *rest) in node["input"].get(kind, {}).items():
            options = rest[0] if rest else {}
            own = {"name": name, "type": "COMBO" if isinstance(type, list) else type, "optional": kind == "optional"}
            choices = type if isinstance(type, list) else options.get("options")
            own["choices"] = [c["key"] if isinstance(c, dict) else c for c in choices or []]
            inputs.append(own)
    outputs = [list(pair) for pair in zip(node["output_name"], node["output"], strict=True)]
    return {"inputs": inputs, "outputs": outputs}


def breaking(before: dict[str, Any], after: dict[str, Any]) -> Iterator[str]:
    """What of a change of all nodes, by name, would break saved workflows."""
    for name, old in before.items():
        if (new := after.get(name)) is None:
            yield f"{name}: gone"
        else:
            yield from (f"{name}: {problem}" for problem in _breaking_one(old, new))


def _breaking_one(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    inputs = {own["name"]: own for own in new["inputs"]}
    for own in old["inputs"]:
        now = inputs.get(own["name"])
        if now is None:
            yield f"input {own['name']} is gone"
        elif now["type"] != own["type"]:
            yield f"input {own['name']} is {now['type']}, was {own['type']}"
        elif own["optional"] and not now["optional"]:
            yield f"input {own['name']} is no longer optional"
        elif gone := [choice for choice in own["choices"] if choice not in now["choices"]]:
            yield f"input {own['name']} has no choice {', '.join(map(str, gone))}"
    known = {own["name"] for own in old["inputs"]}
    yield from (
        f"new input {own['name']} is not optional"
        for own in new["inputs"]
        if own["name"] not in known and not own["optional"]
    )
    were, are = ([own["name"] for own in side["inputs"] if own["type"] in WIDGETS] for side in (old, new))
    if are[: len(were)] != were:
        yield f"its widgets are {', '.join(are)}, were {', '.join(were)}: values are saved by their order"
    for number, (was, now) in enumerate(zip(old["outputs"], [*new["outputs"], *[None] * 99], strict=False)):
        if now is None or was[1] != now[1]:
            yield f"output {number} is {now and now[1]}, was {was[1]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--break", dest="anyway", action="store_true")
    arguments = parser.parse_args()
    with LiveServer(host_path()) as server:
        nodes = server.get("/object_info")
    after = {name: described(node) for name, node in sorted(nodes.items()) if node["python_module"].endswith(PACK_NAME)}
    before = json.loads(FILE.read_text(encoding="utf-8")) if FILE.is_file() else {}
    problems = list(breaking(before, after))
    print(*problems, sep="\n")
    if problems and not arguments.anyway:
        return 1
    FILE.write_text(json.dumps(after, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
