"""Fixtures with the embedded model. Sessions share them: clone the model before you patch it."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch


class Tiny(NamedTuple):
    """The embedded model as a graph holds it: ModelPatcher, CLIP, VAE."""

    model: Any
    clip: Any
    vae: Any


@pytest.fixture(scope="session")
def threads() -> None:
    """One thread: where a core is busy, two wait for each other (0.2 s a call becomes 8 s)."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny() -> Tiny:
    """MODEL, CLIP, VAE of the embedded folder. 8 frames of 64 x 64 pixels, latents [8,4,16,16]."""
    from spacetime_edit.host.loaders.unet3d import EMBEDDED, load_folder

    with torch.inference_mode():
        return Tiny(*load_folder(EMBEDDED))


@pytest.fixture(scope="session")
def tiny64(tiny) -> Tiny:
    """The same with a second diffusion model, which computes in float64."""
    from spacetime_edit.host.loaders.unet3d import EMBEDDED, load_folder

    with torch.inference_mode():
        model = load_folder(EMBEDDED)[0]
        model.model.diffusion_model.double()
    model.model.manual_cast_dtype = torch.float64
    return tiny._replace(model=model)
