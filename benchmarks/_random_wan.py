"""Wan with random weights, made where it runs, and a random clip of its size."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import sqrt
from time import perf_counter

import comfy.model_management as management
import comfy.model_patcher
import comfy.samplers
import comfy.supported_models
import torch
from torch import Tensor

from ..core.parametrization import add_noise
from ..core.regions import Region
from ..core.trajectory import Trajectory
from ..host.families import noise_space
from ..host.region_prompt import Layout, with_layout
from ..host.relevance_matching import MatchedStep, RelevanceMatching
from ..host.sampling import Step, TrajectorySampler
from ._device import on_card, seconds_of, wait

KIND = {"image_model": "wan2.1", "model_type": "t2v", "in_dim": 16, "out_dim": 16}
WORDS = 512
LEVELS = (0.9, 0.85)  # sigmas of the steps, the first of which does not count


def random_wan(sizes: dict[str, int]) -> comfy.model_patcher.ModelPatcher:
    """The host's model with random weights in bfloat16, made where it runs."""
    device, settings = management.get_torch_device(), comfy.supported_models.WAN21_T2V(KIND | sizes)
    settings.set_inference_dtype(torch.bfloat16, None)
    model = settings.get_model({}, "", device=device)
    model.diffusion_model.to(device)
    g = torch.Generator(device).manual_seed(0)
    for name, weight in model.diffusion_model.named_parameters():
        if weight.ndim > 1:
            weight.data.normal_(0, 1 / sqrt(weight[0].numel()), generator=g)
        else:
            weight.data.fill_(float(name.endswith("weight")))
    return comfy.model_patcher.CoreModelPatcher(model, device, management.unet_offload_device())


@dataclass
class Watched:
    """STR matching that notes its own seconds and the peak of allocated memory; `report`: what it said of itself."""

    matching: RelevanceMatching
    seconds: float = 0.0
    peak: int = 0
    report: MatchedStep | None = None

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        if on_card():
            torch.cuda.reset_peak_memory_stats()
        x, self.seconds = seconds_of(lambda: self.matching(x, step))
        self.peak = torch.cuda.max_memory_allocated() if on_card() else 0
        self.report = step.run.records[-1]
        return x


@dataclass
class WanClip:
    """A random clip of Wan's size, and runs of a few steps from its noised copies."""

    model: comfy.model_patcher.ModelPatcher
    shape: tuple[int, ...]
    text: int

    def prompt(self, seed: int) -> list:
        return [[torch.randn(1, WORDS, self.text, generator=torch.Generator().manual_seed(seed)), {}]]

    @cached_property
    def trajectory(self) -> Trajectory:
        g, space = torch.Generator().manual_seed(0), noise_space(self.model)
        clean, noise = (torch.randn(self.shape, generator=g) for _ in range(2))
        sigmas = torch.tensor([*LEVELS, 0.0])
        return Trajectory(
            torch.stack([add_noise(clean, noise, s, space) for s in sigmas]), sigmas, space, self.model, self.prompt(0)
        )

    def step_seconds(self, model=None, before: list | None = None, cfg: float = 5.0) -> float:
        """Of a step after the first; model: a patched one, which gets a regional prompt."""
        guider = comfy.samplers.CFGGuider(model or self.model)
        positive = self.prompt(1) if model is None else with_layout(self.prompt(1), self.layout())
        guider.inner_set_conds({"positive": positive, "negative": self.prompt(2)})
        guider.set_cfg(cfg)
        ends: list[float] = []

        def note(*_) -> None:
            wait()
            ends.append(perf_counter())

        sampler, empty = TrajectorySampler(self.trajectory, before_step=before or []), torch.zeros(self.shape)
        result = guider.sample(empty, empty, sampler, self.trajectory.sigmas, callback=note, disable_pbar=True, seed=0)
        if not result.isfinite().all():
            raise ValueError("the latent is not finite")
        return (ends[-1] - ends[0]) / (len(ends) - 1)

    def layout(self) -> Layout:
        """Two boxes that cover most of the picture, with words of their own."""
        frames, height, width = self.shape[2:]
        left, right = torch.zeros(2, frames, height, width)
        left[..., : width // 2 - 2], right[..., width // 2 + 2 :] = 1, 1
        return Layout("a prompt", (Region("a", left), Region("b", right)), ((1, 2), (4,)), WORDS)
