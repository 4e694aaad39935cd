"""Checkpoints that a run can go on from, and that no worse run replaces."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch


class CheckpointError(ValueError):
    """A checkpoint is of another configuration, or better than what would replace it."""


def save(path: Path, configuration: Mapping, state: Mapping, score: float | None = None) -> None:
    """Write a checkpoint. score: higher is better; a file of a better score stays.

    Raises CheckpointError where the file is of another configuration or of a better score.
    """
    path = Path(path)
    if path.exists():
        there = load(path, configuration)
        if score is not None and there["score"] is not None and there["score"] > score:
            raise CheckpointError(f"{path} scores {there['score']:.4f}, this one {score:.4f}: it is kept")
    temporary = path.with_suffix(".tmp")
    torch.save({"configuration": dict(configuration), "score": score, **state}, temporary)
    temporary.replace(path)


def load(path: Path, configuration: Mapping | None = None) -> dict:
    """What `save` wrote. Raises CheckpointError naming the entries in which its configuration differs."""
    saved = torch.load(path, map_location="cpu", weights_only=True)
    there = saved["configuration"]
    if configuration is not None and there != dict(configuration):
        names = sorted(name for name in {*there, *configuration} if there.get(name) != configuration.get(name))
        differences = ", ".join(
            f"{name}: {there.get(name)!r} there, {configuration.get(name)!r} here" for name in names
        )
        raise CheckpointError(f"{path} is of another configuration ({differences}); name another folder")
    return saved
