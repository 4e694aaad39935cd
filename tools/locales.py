"""Write locales/en/nodeDefs.json from the live schemas, and say what locales/zh lacks.

    python tools/locales.py

The frontend's keys: an input that an option brings (`mode.strength`) is `mode_strength` there.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pack import ROOT, host_path
from server import PACK_NAME, LiveServer

LOCALES = ROOT / "locales"
FILE = "nodeDefs.json"


def english(node: dict[str, Any]) -> dict[str, Any]:
    """The entry of one node of `/object_info`."""
    inputs = {key: words for kind in ("required", "optional") for key, words in inputs_of(node["input"].get(kind, {}))}
    outputs = zip(node["output_name"], node["output_tooltips"], strict=True)
    return {
        "display_name": node["display_name"],
        "description": node["description"],
        "inputs": inputs,
        "outputs": {str(index): {"name": name, "tooltip": tooltip} for index, (name, tooltip) in enumerate(outputs)},
    }


def inputs_of(specs: dict[str, list], prefix: str = "") -> Iterator[tuple[str, dict[str, str]]]:
    """(key, words) of inputs, with those that an option of a dynamic combo brings."""
    for name, (_, *rest) in specs.items():
        options = rest[0] if rest else {}
        yield prefix + name, {"name": options.get("display_name") or name, "tooltip": options.get("tooltip")}
        for option in options.get("options") or []:
            if isinstance(option, dict):
                for inner in option["inputs"].values():
                    yield from inputs_of(inner, f"{prefix}{name}_")


def missing(english: Any, other: Any, path: str = "") -> Iterator[str]:
    """Places of texts that `other` lacks, or has without an English one."""
    if not isinstance(english, dict) or not isinstance(other, dict):
        return
    yield from (f"{path}{key}: none" for key in english if not other.get(key))
    yield from (f"{path}{key}: not in English" for key in other if key not in english)
    for key in english.keys() & other.keys():
        yield from missing(english[key], other[key], f"{path}{key}.")


def changed(before: Any, after: Any, path: str = "") -> Iterator[str]:
    """Places of texts that are no longer what they were, whose translation may be out of date."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in before.keys() & after.keys():
            yield from changed(before[key], after[key], f"{path}{key}.")
    elif before != after:
        yield f"{path[:-1]}: changed in English"


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def write(path: Path, entries: dict[str, Any]) -> None:
    path.write_text(json.dumps(entries, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> int:
    with LiveServer(host_path()) as server:
        nodes = server.get("/object_info")
    ours = {name: node for name, node in sorted(nodes.items()) if node["python_module"] == f"custom_nodes.{PACK_NAME}"}
    texts = {name: english(node) for name, node in ours.items()}
    file = LOCALES / "en" / FILE
    news = sorted(changed(read(file), texts))
    write(file, texts)
    lacks = sorted(missing(texts, read(LOCALES / "zh" / FILE)))
    print(*news, *lacks or ["zh is complete"], sep="\n")
    return bool(lacks)


if __name__ == "__main__":
    sys.exit(main())
