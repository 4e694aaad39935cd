"""Packs of others that some templates use, where an environment variable names their folder."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

ADE_PATH, ADE_NAME = os.environ.get("ADE_PATH", ""), "ComfyUI-AnimateDiff-Evolved"
OTHER_PACK = "(AnimateDiff)"
"""In the name of a template that needs it."""


@contextlib.contextmanager
def other_packs() -> Iterator[dict]:
    """Keyword arguments for a LiveServer that then has them; none where there are none."""
    if not ADE_PATH:
        yield {}
        return
    with tempfile.TemporaryDirectory() as folder:
        packs = Path(folder) / "custom_nodes"
        packs.mkdir()
        (packs / ADE_NAME).symlink_to(Path(ADE_PATH).resolve(), target_is_directory=True)
        paths = Path(folder) / "paths.yaml"
        paths.write_text(json.dumps({"packs": {"base_path": folder, "custom_nodes": "custom_nodes"}}))  # JSON is YAML
        yield {"arguments": ["--extra-model-paths-config", str(paths)], "others": [ADE_NAME]}


def is_there(name: str) -> bool:
    """Whether the packs that the template of this name needs are at hand."""
    return OTHER_PACK not in name or bool(ADE_PATH)
