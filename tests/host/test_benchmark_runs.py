"""Benchmarks of quality go on where they stopped, on several processes."""

from dataclasses import dataclass

import pytest
from spacetime_edit.benchmarks import _cases as cases
from spacetime_edit.benchmarks import _running as running
from spacetime_edit.tools.shape_world import world


@dataclass(frozen=True)
class FakeSettings:
    steps: int = 2
    cfg: float = 1.0
    dilation: float = 0.0
    strength: float = 1.0


@dataclass
class FakeEditor:
    """Its methods return the true edit."""

    settings: FakeSettings = FakeSettings()

    def encode(self, frames):
        return frames

    def decode(self, latent):
        return latent

    def invert(self, latent, scene):
        return None


def counted(path, name):
    """A method that notes each call in a file, which forked processes share."""

    def method(editor, case, trajectory):
        with path.open("a") as file:
            file.write(f"{name}\n")
        return world.render(case.target)[0]

    return method


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_goes_on_where_another_stopped(tmp_path, processes):
    calls, store = tmp_path / "calls", tmp_path / "store"
    made = cases.make_cases("one", 5, 3)
    methods = {name: counted(calls, name) for name in (cases.SWAP, "ours")}

    def run(given, editor=FakeEditor(), seed=5, **about):  # noqa: B008 (immutable)
        calls.write_text("")
        runner = running.Runner(editor, seed, store, processes, about)
        found = runner(given, methods, cases.measure)
        return [r["method"] for r in found], sorted(calls.read_text().split("\n")[:-1])

    assert run(made[:1]) == ([cases.SWAP, "ours"], ["ours", cases.SWAP])
    assert run(made) == ([cases.SWAP, "ours"] * 3, ["ours"] * 2 + [cases.SWAP] * 2)
    assert run(made) == ([cases.SWAP, "ours"] * 3, [])
    stronger = FakeEditor(FakeSettings(strength=2.0))  # which the swap does not know
    assert run(made, stronger)[1] == ["ours"] * 3
    assert run(made, seed=6)[1] == ["ours"] * 3 + [cases.SWAP] * 3
    assert run(made, about={"other": 1})[1] == ["ours"] * 3 + [cases.SWAP] * 3
