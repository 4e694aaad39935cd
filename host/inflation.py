"""Spatial attention over several frames, and group norms over the clip, in models made for single pictures.

The inflation itself is a mark in the model's options, which every attention tap heeds: so region patches and recorders
see the same attention wherever they sit in the chain.
"""

import contextlib
import re
from collections.abc import Sequence

from ..core.inflation import Inflation
from .attention_call import INFLATION, ModelRun
from .attention_tap import AttentionTap
from .families import family_of
from .layers import attention_layers


def inflation_of(model) -> Inflation | None:
    """The inflation of a ModelPatcher; None: each frame attends to itself."""
    inflation = _mark(model)
    return None if inflation is None or inflation.neutral else inflation


def inflate_attention(model, inflation: Inflation):
    """A clone of a ModelPatcher with `inflation` instead of what it had.

    Raises ValueError for a model that has no spatial attention.
    """
    if not any(layer.kind == "spatial" for layer in attention_layers(model).values()):
        raise ValueError(
            f"model: {family_of(model).name} has no spatial self-attention apart from the prompt's, which could span "
            f"frames"
        )
    inflated, before = model.clone(), _mark(model)
    if before is None and inflation.neutral:
        return inflated
    if before is None:
        inflated.model_options = InflatedTap(inflated, []).install(inflated.model_options)
    inflated.model_options["transformer_options"][INFLATION] = inflation
    return inflated


def _mark(model) -> Inflation | None:
    return model.model_options.get("transformer_options", {}).get(INFLATION)


class InflatedTap(AttentionTap):
    """The tap that does what a run's mark asks for where no other tap has, and shares norms over the clip."""

    def __init__(self, model, listeners):
        super().__init__(model, listeners, acts_in=lambda run: run.inflation is not None)
        norms = family_of(model).norms
        self._norms = [path for path, _ in model.model.diffusion_model.named_modules() if re.fullmatch(norms, path)]

    @contextlib.contextmanager
    def _following(self, run, block=""):
        inflation = run.inflation
        shared = inflation is not None and inflation.shared_norms and len(run.frames) > 1
        norms = _shared_norms(run, self._norms, block) if shared else contextlib.nullcontext()
        with super()._following(run, block), norms:
            yield


@contextlib.contextmanager
def _shared_norms(run: ModelRun, norms: Sequence[str], block: str):
    """The group norms at these paths, of a block only those inside it, take (B F, C, H, W) as (B, C, F H, W)."""
    prompts, frames, handles = len(run.prompts), len(run.frames), []

    def joined(module, args):
        x = args[0].unflatten(0, (prompts, frames)).transpose(1, 2)
        return x.flatten(2, 3), *args[1:]

    def parted(module, args, output):
        return output.unflatten(2, (frames, -1)).transpose(1, 2).flatten(0, 1)

    try:
        for path in norms:
            if not block or path.startswith(f"{block}."):
                module = run.network.get_submodule(path)
                handles.append(module.register_forward_pre_hook(joined))
                handles.append(module.register_forward_hook(parted))
        yield
    finally:
        for handle in handles:
            handle.remove()
