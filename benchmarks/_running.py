"""Runs the methods on the clips: on all cores, and again from where a stopped run has got to."""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from types import MappingProxyType

import torch

from ..tools.pack import ROOT
from ..tools.shape_world import world
from ._cases import CEILING, COPY, NOISE, SWAP
from ._editing import SDEDIT, Editor, in_the_graphs_metrics
from ._timing import cpu_seconds

WITHOUT_MATCHING = frozenset({COPY, NOISE, CEILING, SWAP, SDEDIT})
"""Methods that none of the settings of STR-Match touches: their records are kept for other settings."""
SETTINGS_OF_ALL = ("steps", "cfg", "dilation")

_job: tuple[Runner, Sequence, Mapping[str, Callable], Callable[..., dict]] | None = None  # of forked processes


@cache
def _code() -> str:
    """A digest of all that figures depend on: records of other code are not taken."""
    digest = hashlib.sha256()
    for folder, ending in (("core", "py"), ("host", "py"), ("benchmarks", "py"), ("tools/shape_world", "py")):
        for path in sorted((ROOT / folder).rglob(f"*.{ending}")):
            digest.update(path.read_bytes())
    for path in sorted((ROOT / "assets").rglob("*.safetensors")):
        digest.update(f"{path.name} {path.stat().st_size}".encode())
    return digest.hexdigest()[:16]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What every benchmark of quality takes: seeds, store, processes and methods."""
    parser.add_argument("--seed", type=int, nargs="+", default=[211, 223, 227])
    parser.add_argument("--store", type=Path, help="a file that keeps what is done, and from which a run goes on")
    parser.add_argument("--processes", type=int, help="as many as there are cores, if not given")
    parser.add_argument("--methods", nargs="+", default=(), metavar="NAME", help="rows to make, instead of all")


def runner(arguments: argparse.Namespace, editor: Editor, about: Mapping = MappingProxyType({})) -> Runner:
    """A runner by the options of `add_arguments`."""
    return Runner(editor, store=arguments.store, processes=arguments.processes, about=about, only=arguments.methods)


@dataclass
class Runner:
    """seed: of the clips that are run next; store: a file of records, one JSON a line; processes: None: one a core.

    about: what else decides the figures of its methods; only: names of methods, of which no others run.
    """

    editor: Editor
    seed: int = 0
    store: Path | None = None
    processes: int | None = None
    about: Mapping = field(default_factory=dict)
    only: Sequence[str] = ()
    _kept: dict[str, dict] = field(default_factory=dict)

    def __post_init__(self):
        if self.store is not None and self.store.exists():
            for line in self.store.read_text(encoding="utf-8").splitlines():
                entry = json.loads(line)
                self._kept[entry["key"]] = entry["record"]

    def __call__(self, cases: Sequence, methods: Mapping[str, Callable], measure: Callable[..., dict]) -> list[dict]:
        """One record a case and method; the methods of a case share one inversion, whose time is not theirs."""
        global _job
        methods = {name: method for name, method in methods.items() if name in self.only or not self.only}
        _job = self, cases, methods, measure
        records = []
        for number, found in enumerate(self._by_case(len(cases))):
            records += found
            print(f"\r{number + 1} of {len(cases)} clips", end="", file=sys.stderr, flush=True)
        return records

    def over(self, seeds: Sequence[int], make: Callable[[int], Sequence], methods, measure) -> list[dict]:
        """The records of make(seed) for each seed."""
        records = []
        for self.seed in seeds:
            records += self(make(self.seed), methods, measure)
        return records

    def _by_case(self, count: int) -> Iterator[list[dict]]:
        wanted = min(self.processes or os.cpu_count() or 1, count)
        if wanted < 2 or "fork" not in multiprocessing.get_all_start_methods():
            yield from map(_of_case, range(count))
            return
        torch.set_num_threads(1)
        with multiprocessing.get_context("fork").Pool(wanted) as pool:
            yield from pool.imap(_of_case, range(count))

    def key(self, number: int, case, method: str) -> str:
        settings = asdict(self.editor.settings)
        if method in WITHOUT_MATCHING:
            settings = {name: settings[name] for name in SETTINGS_OF_ALL}
        clip = [self.seed, number, case.group, case.kind, world.caption(case.target)]
        what = [_code(), settings, dict(self.about), *clip, method]
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:24]

    def kept(self, key: str) -> dict | None:
        return self._kept.get(key)

    def keep(self, key: str, record: dict) -> None:
        """A line at once, so that a run that stops leaves what it had."""
        if self.store is not None:
            with self.store.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "record": record}) + "\n")


def _of_case(number: int) -> list[dict]:
    runner, cases, methods, measure = _job
    with torch.inference_mode():
        return list(_records(runner, number, cases[number], methods, measure))


def _records(runner: Runner, number: int, case, methods: Mapping[str, Callable], measure) -> Iterator[dict]:
    editor, about = runner.editor, {"clip": f"{runner.seed}: {number}", "group": case.group, "kind": case.kind}
    missing = [name for name in methods if runner.kept(runner.key(number, case, name)) is None]
    if missing:
        latent = editor.encode(world.render(case.source)[0])
        reconstruction = editor.decode(latent)
        trajectory, inversion = cpu_seconds(lambda: editor.invert(latent, case.source))
    for name, method in methods.items():
        key = runner.key(number, case, name)
        if name in missing:
            edited, seconds = cpu_seconds(lambda: method(editor, case, trajectory))  # noqa: B023 (called here)
            times = {"seconds": seconds.user, "inversion_seconds": inversion.user}
            measured = measure(case, edited, reconstruction) | in_the_graphs_metrics(case, edited)
            record = {**about, "edit": world.caption(case.target), "method": name, **measured, **times}
            runner.keep(key, record)
        yield record if name in missing else runner.kept(key)
