"""The embedded model in this process, and the methods that edit a clip with it.

A method takes (editor, case, trajectory) and returns the edited frames (F, 3, 64, 64) in [0, 1]. It sees the case's
prompts and the inverted clip; only those that are `masked` see a true mask.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import comfy.samplers
import torch
from torch import Tensor

from ..core.metrics import psnr_db
from ..core.trajectory import Trajectory
from ..host import video_metrics
from ..host.inversion import invert
from ..host.loaders import unet3d
from ..host.relevance_matching import NEW_CONTENT, RelevanceMatching, redraw_noise, str_score_of
from ..host.sampling import TrajectorySampler
from ..tools.shape_world import world
from ._cases import CEILING, COPY, NOISE, Case, Chain
from ._half import float16_layers

SDEDIT = "SDEdit"
SDEDIT_START = 0.6
"""Share of the schedule that SDEdit denoises; within the usual range, not tuned on this model."""


@dataclass(frozen=True)
class Settings:
    """strength: lambda of STR-Match; end: percent of denoising where it ends; iterations: moves a step; paths: of the
    score; dilation: px."""

    steps: int = 20
    cfg: float = 4.0
    strength: float = 1.0
    iterations: int = 3
    end: float = 0.75
    layers: str = ""
    paths: str = "spatial-temporal"
    dilation: float = 4.0


class Editor:
    """A model of the embedded one's kind, by default that itself, with the host's own objects.

    weight_dtype: as in *Load Video Diffusers Model*.
    """

    def __init__(self, settings: Settings, folder: str = unet3d.EMBEDDED, weight_dtype: str = "default"):
        self.settings = settings
        self.model, self.clip, self.vae = unet3d.load_folder(folder, weight_dtype=weight_dtype)
        sampling = self.model.get_model_object("model_sampling")
        self.sigmas = comfy.samplers.calculate_sigmas(sampling, "ddim_uniform", settings.steps)

    def prompt(self, text: str) -> list:
        """CONDITIONING of a prompt."""
        return self.clip.encode_from_tokens_scheduled(self.clip.tokenize(text))

    def encode(self, frames: Tensor) -> Tensor:
        """(F, 3, 64, 64) in [0, 1] -> latent (F, 4, 16, 16)."""
        return self.vae.encode(frames.movedim(1, -1))

    def decode(self, latent: Tensor) -> Tensor:
        """Latent -> frames, in the shapes of `encode`."""
        return self.vae.decode(latent).movedim(-1, 1).clamp(0, 1).cpu()

    def invert(self, latent: Tensor, scene: world.Scene) -> Trajectory:
        """The trajectory of a latent that shows `scene`."""
        return invert(self.model, self.prompt(world.caption(scene)), latent, self.sigmas)

    def sample(self, scene: world.Scene, sampler, seed: int, latent: Tensor, sigmas: Tensor | None = None) -> Tensor:
        """The latent that the host samples for the caption of `scene`, from noise on top of `latent` as it starts."""
        guider = comfy.samplers.CFGGuider(self.model)
        guider.set_conds(self.prompt(world.caption(scene)), self.prompt(""))
        guider.set_cfg(self.settings.cfg)
        noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(seed))
        sigmas = self.sigmas if sigmas is None else sigmas
        return guider.sample(noise, latent, sampler, sigmas, disable_pbar=True, seed=seed)

    def edit(
        self,
        trajectory: Trajectory,
        scene: world.Scene,
        seed: int,
        matching: RelevanceMatching | None = None,
        mask: Tensor | None = None,
        redraw: bool = False,
    ) -> Tensor:
        """The latent of a prompt swap to `scene`, with matching and a mask (F, H, W) if given.

        redraw: begin inside the mask from noise that holds nothing of the source.
        """
        steps = ([redraw_noise] if redraw else []) + ([] if matching is None else [matching])
        sampler = TrajectorySampler(trajectory, mask=mask, dilation=self.settings.dilation, before_step=steps)
        return self.sample(scene, sampler, seed, torch.zeros(trajectory.shape))

    def matching(
        self,
        trajectory: Trajectory,
        *,
        factor: float = 1.0,
        iterations: int = 0,
        end: float | None = None,
        task: str = "change",
        **form,
    ) -> RelevanceMatching:
        """STR matching at `factor` times the settings' lambda; form: radius and the other options of the score.

        iterations 0, end None: the settings'.
        """
        settings = self.settings
        score = str_score_of(trajectory, settings.layers, **{"paths": settings.paths} | form)
        window = {"end": settings.end if end is None else end, "iterations": iterations or settings.iterations}
        return RelevanceMatching(score, factor * settings.strength, task=task, **window)


# --- methods ----------------------------------------------------------

Method = Callable[[Editor, Case, Trajectory], Tensor]


def copy(editor: Editor, case: Case, trajectory: Trajectory) -> Tensor:
    """The source clip."""
    return world.render(case.source)[0]


def through_vae(editor: Editor, case: Case, trajectory: Trajectory) -> Tensor:
    """The true edit, as well as the VAE can show it."""
    return editor.decode(editor.encode(world.render(case.target)[0]))


def from_noise(editor: Editor, case: Case, trajectory: Trajectory) -> Tensor:
    """The target prompt from random noise."""
    ddim = comfy.samplers.sampler_object("ddim")
    return editor.decode(editor.sample(case.target, ddim, case.seed, torch.zeros(trajectory.shape)))


def sdedit(start: float = SDEDIT_START) -> Method:
    """SDEdit (Meng et al. 2022): one noise on the clean latent, then the last `start` of the schedule."""

    def edit(editor: Editor, case: Case, trajectory: Trajectory) -> Tensor:
        clean = editor.encode(world.render(case.source)[0])
        sigmas = editor.sigmas[-1 - round(start * editor.settings.steps) :]
        return editor.decode(
            editor.sample(case.target, comfy.samplers.sampler_object("ddim"), case.seed, clean, sigmas)
        )

    return edit


def swap(masked: bool = False, redraw: bool = False) -> Method:
    """Prompt swap from the inverted latent; redraw: as `Editor.edit`."""

    def edit(editor: Editor, case: Case, trajectory: Trajectory) -> Tensor:
        mask = case.edited_masks[0] if masked else None
        return editor.decode(editor.edit(trajectory, case.target, case.seed, mask=mask, redraw=redraw))

    return edit


def match(*, masked: bool = False, **options) -> Method:
    """STR-Match; options: those of `Editor.matching`."""

    def edit(editor: Editor, case: Case, trajectory: Trajectory) -> Tensor:
        mask = case.edited_masks[0] if masked else None
        matching = editor.matching(trajectory, **options)
        redraw = matching.task in NEW_CONTENT
        return editor.decode(editor.edit(trajectory, case.target, case.seed, matching, mask, redraw))

    return edit


BOUNDS: dict[str, Method] = {COPY: copy, NOISE: from_noise, CEILING: through_vae}
"""Rows between which every method lies."""


# --- two edits of one clip --------------------------------------------

ChainMethod = Callable[[Editor, Chain, Trajectory], tuple[Tensor | None, Tensor]]
"""Returns the frames after the first edit (None: there was but one) and after the second."""


def one_after_another(*, masked: bool, matched: bool) -> ChainMethod:
    """The left object, then, with the result inverted under its new prompt, the right one."""

    def edit(editor: Editor, chain: Chain, trajectory: Trajectory) -> tuple[Tensor, Tensor]:
        latents = []
        for index, scene in enumerate((chain.middle, chain.target)):
            if latents:
                trajectory = editor.invert(latents[-1], chain.middle)
            matching = editor.matching(trajectory) if matched else None
            mask = chain.masks(index) if masked else None
            latents.append(editor.edit(trajectory, scene, chain.seed, matching, mask))
        return editor.decode(latents[0]), editor.decode(latents[1])

    return edit


def at_once(*, masked: bool, matched: bool) -> ChainMethod:
    """Both objects with one prompt; the mask covers both."""

    def edit(editor: Editor, chain: Chain, trajectory: Trajectory) -> tuple[None, Tensor]:
        matching = editor.matching(trajectory) if matched else None
        mask = chain.masks(0, 1) if masked else None
        return None, editor.decode(editor.edit(trajectory, chain.target, chain.seed, matching, mask))

    return edit


def in_one(method: Method) -> ChainMethod:
    """A method of one edit, as one of two."""
    return lambda editor, chain, trajectory: (None, method(editor, chain, trajectory))


# --- the same edit twice ----------------------------------------------

NOISE_DB = -110
"""Of the noise that must not matter, against the clip's latent."""


def again(method: Method) -> Callable[[Editor, Case, Trajectory], tuple[Tensor, Tensor]]:
    """The edit, and the edit of the same clip with a little noise in its latent, inverted anew."""

    def edit(editor: Editor, case: Case, trajectory: Trajectory) -> tuple[Tensor, Tensor]:
        latent = editor.encode(world.render(case.source)[0])
        noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(case.seed))
        other = editor.invert(latent + 10 ** (NOISE_DB / 20) * latent.std() * noise, case.source)
        return method(editor, case, trajectory), method(editor, case, other)

    return edit


def agreement(case: Case, edits: tuple[Tensor, Tensor], reconstruction: Tensor) -> dict[str, float]:
    """How alike two edits are, in dB of PSNR."""
    return {"agreement_db": psnr_db(*edits, torch.ones(1))}


# --- the same edit in float16 -----------------------------------------


def in_half(method: Method) -> Method:
    """The inversion and the edit in float16, as far as a CPU can show it."""

    def edit(editor: Editor, case: Case, trajectory: Trajectory) -> Tensor:
        with float16_layers(editor.model.model.diffusion_model):
            own = editor.invert(editor.encode(world.render(case.source)[0]), case.source)
            return method(editor, case, own)

    return edit


# --- measuring --------------------------------------------------------


def in_the_graphs_metrics(case: Case | Chain, edited: Tensor | tuple[Tensor | None, Tensor]) -> dict[str, float]:
    """What *Video Edit Metrics* says of an edit without models, by its names; a background edit has no background."""
    edit = edited[-1] if isinstance(edited, tuple) else edited
    mask = case.masks(0, 1) if isinstance(case, Chain) else case.edited_masks.amax(0)
    source, edit = (clip.movedim(1, -1) for clip in (world.render(case.source)[0], edit))
    rows = video_metrics.measure(source, edit, mask=None if case.kind == "background" else mask)
    return {row.name: row.value for row in rows if row.value is not None}


def described(settings: Settings) -> str:
    """The settings for a terminal."""
    return ", ".join(f"{name} {value}" for name, value in asdict(settings).items() if value != "")
