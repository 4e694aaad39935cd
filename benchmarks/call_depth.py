"""How many functions of the pack, and changes of file, lie between a sampler and the loss whose gradient it takes.

    python benchmarks/call_depth.py [--json PATH]

STR-Match and DreamMotion on the embedded model, one step; at the first loss the call stack is read, from the sampler's
`sample` (counted) to the loss (not counted). Wrappers that the pack has put around the host's functions count too.
"""
# ruff: noqa: E402 (the pack is loaded before it is imported)

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
from pack import ROOT, load_pack

load_pack()

import comfy.samplers
from spacetime_edit.benchmarks._editing import Editor, Settings
from spacetime_edit.benchmarks._figures import verdict
from spacetime_edit.host import distillation, relevance_matching
from spacetime_edit.host.distillation import SPATIAL, Distillation, optimise
from spacetime_edit.host.features import key_blocks
from spacetime_edit.host.inversion import invert
from spacetime_edit.host.relevance_matching import RelevanceMatching, str_score_of
from spacetime_edit.host.sampling import TrajectorySampler

PROMPTS = ("a red circle on a gray background", "a blue circle on a gray background", "")
FUNCTIONS, FILES = 9, 5


def stack_at(module, name: str, run: Callable[[], object]) -> list[traceback.FrameSummary]:
    """Functions of the pack on the stack at the first call of `module.name`, from `sample` on."""
    seen: list[traceback.FrameSummary] = []
    loss = getattr(module, name)

    def note(*args, **kwargs):
        if not seen:
            own = [f for f in traceback.extract_stack()[:-1] if Path(f.filename).is_relative_to(ROOT)]
            own = [f for f in own if Path(f.filename).relative_to(ROOT).parts[0] in ("core", "host")]
            seen.extend(own[max(i for i, f in enumerate(own) if f.name == "sample") :])
        return loss(*args, **kwargs)

    with mock.patch.object(module, name, note):
        run()
    return [f for f in seen if f.name != "note" and "mock" not in f.filename]


def of_str(editor: Editor, latent: torch.Tensor) -> list[traceback.FrameSummary]:
    sigmas = comfy.samplers.calculate_sigmas(editor.model.get_model_object("model_sampling"), "simple", 2)
    trajectory = invert(editor.model, editor.prompt(PROMPTS[0]), latent, sigmas, refinements=0)
    guider = comfy.samplers.CFGGuider(editor.model)
    guider.inner_set_conds({"positive": editor.prompt(PROMPTS[1])})
    sampler = TrajectorySampler(trajectory, before_step=[RelevanceMatching(str_score_of(trajectory))])
    empty = torch.zeros(trajectory.shape)
    return stack_at(
        relevance_matching, "matching_loss", lambda: guider.sample(empty, empty, sampler, sigmas, disable_pbar=True)
    )


def of_dds(editor: Editor, latent: torch.Tensor) -> list[traceback.FrameSummary]:
    settings = Distillation(steps=2, weights={SPATIAL: 0.3}, blocks=key_blocks(editor.model))
    run = lambda: optimise(editor.model, *map(editor.prompt, PROMPTS), latent, settings, seed=0)  # noqa: E731
    return stack_at(distillation, "spatial_self_similarity_loss", run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    editor, latent = Editor(Settings()), torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    results = {}
    with torch.inference_mode():
        for method, stack in {"STR-Match": of_str(editor, latent), "DreamMotion": of_dds(editor, latent)}.items():
            files = [Path(f.filename).relative_to(ROOT).as_posix() for f in stack]
            changes = sum(a != b for a, b in zip(files, files[1:], strict=False))
            results[method] = {"functions": len(stack), "changes of file": changes}
            for file, frame in zip(files, stack, strict=True):
                print(f"  {file}: {frame.name}")
            for count, most, what in ((len(stack), FUNCTIONS, "functions"), (changes, FILES, "changes of file")):
                print(verdict(count <= most, f"{method}: {count} {what}, at most {most}"))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
