"""What works with a model as it is loaded here: inversion, attention, gradients, regions and memory, each tried out.

Nothing of a prompt, of a clip, or of a file is in the answer, so that it can be shown to others.
"""

import logging
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Literal, NamedTuple

import comfy.model_management as management
import comfy.samplers
import torch
from torch import Tensor

from ..core.regions import Region
from ..core.trajectory import Trajectory
from .attention_tap import AttentionTap
from .block_matching import BlockMatch, BlockTrial, in_first_window
from .families import IN_SPACE, family_of
from .features import FeatureRecorder
from .inversion import invert, reconstruct, reconstruction_db
from .latents import check_clip_latent, frame_count
from .layers import attention_layers
from .model_facts import facts_of
from .model_pass import Window, as_source, call_model, check_handler, nearest_step
from .region_patch import RegionModulation, has_regions, patch_regions
from .region_prompt import LAYOUT, Layout, with_layout
from .relevance_matching import lacks_for_relevance, str_score_of
from .step_caches import without_caches

log = logging.getLogger("spacetime_edit")

Verdict = Literal["works", "look", "broken", "does not apply"]
"""look: it runs, but a person should look at the result."""

STEPS, REFINEMENTS = 12, 3
"""Of the trial inversion: few steps, each exact."""
MIDDLE, EARLY = 0.5, 0.1
"""Progress of denoising where matching and where regions are tried."""
MOST_BLOCKS = 8
"""How many blocks are tried one by one, evenly spread over the network."""
GOOD_DB, POOR_DB = 20.0, 10.0
LEAST_CHANGE = 1e-6
"""Relative change of a prediction below which nothing has happened."""
NEAR = 0.75, 1.33
"""Predicted memory over measured."""
TOO_SMALL = 50e6
"""Bytes of a gradient below which tiles of fixed size decide, and nothing is to be judged."""


WHAT_STOPS_AN_EDIT = (ValueError, RuntimeError, TypeError, AttributeError, LookupError, AssertionError)
"""What this pack, the host and other packs raise; an interrupt is none of these."""


class Finding(NamedTuple):
    """One thing that was tried: its name, how it went, and a sentence."""

    name: str
    verdict: Verdict
    text: str


@dataclass
class ModelCheck:
    """What was found. facts: of model and machine, by name; blocks: see `BlockMatch`; layers, strength: suggestions for
    STR-Match, empty and None where there are none."""

    facts: dict[str, object]
    findings: list[Finding] = field(default_factory=list)
    blocks: list[BlockMatch] = field(default_factory=list)
    layers: str = ""
    strength: float | None = None
    seconds: float = 0.0

    @property
    def broken(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.verdict == "broken"]

    def as_dict(self) -> dict:
        """For JSON."""
        rows = [asdict(block) for block in self.blocks]
        found = {f.name: {"verdict": f.verdict, "text": f.text} for f in self.findings}
        suggested = {"layers": self.layers, "lambda": self.strength}
        return {"facts": self.facts, "findings": found, "blocks": rows, "suggested": suggested, "seconds": self.seconds}


def check_model(
    model, positive: list, latent: Tensor, progress: Callable[[int, int], None] = lambda done, total: None
) -> ModelCheck:
    """Tries a ModelPatcher on a clip's latent, as in the graph, and a prompt.

    ValueError for a model of no known family, a latent that is no clip of it, and no prompt; what fails after that is a
    finding.
    """
    check_clip_latent(latent, model)
    if not positive:
        raise ValueError("positive: it holds no prompt; connect a CLIP Text Encode that describes the clip")
    begin, check = time.perf_counter(), ModelCheck(facts_of(model, latent))
    trial = _Trial(model, positive, latent)
    parts = {
        "numbers": trial.numbers,
        "inversion": trial.inversion,
        "attention": trial.attention,
        "matching": trial.matching,
        "regions": trial.regions,
        "memory": trial.memory,
    }
    for done, (name, part) in enumerate(parts.items()):
        progress(done, len(parts))
        management.throw_exception_if_processing_interrupted()
        try:
            verdict, text = part(check)
        except WHAT_STOPS_AN_EDIT as error:
            log.warning("Check Model, %s: %s", name, error, exc_info=True)
            verdict, text = "broken", public_text(error, positive)
        check.findings.append(Finding(name, verdict, text))
        if verdict == "broken" and name in ("numbers", "inversion"):  # all that follows needs them
            break
    progress(len(parts), len(parts))
    check.seconds = time.perf_counter() - begin
    return check


class _Within(comfy.samplers.Sampler):
    """Calls a function once inside a run of the host, and keeps what it gives; samples nothing."""

    def __init__(self, function: Callable):
        self._function = function

    def sample(
        self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False
    ):
        self.result = self._function(model_wrap, sigmas[0], extra_args["model_options"])
        return noise


class _Trial:
    """The parts of one check; each gives a verdict and a sentence."""

    def __init__(self, model, positive: list, latent: Tensor):
        self._model, self._positive, self._latent = without_caches(model)[0], positive, latent
        self._trajectory: Trajectory | None = None
        self._memory: tuple[int, int] | None = None  # bytes of a gradient, predicted and measured

    def _inside(self, function: Callable, percent: float, model=None, positive: list | None = None):
        """What function(guider, sigma, options) gives inside a run of the host at this progress of denoising."""
        model = as_source(self._model) if model is None else model
        sigma = float(model.get_model_object("model_sampling").percent_to_sigma(percent))
        if self._trajectory is not None:
            sigma = float(self._trajectory.sigmas[nearest_step(self._trajectory, percent)])
        guider, empty = comfy.samplers.CFGGuider(model), torch.zeros_like(self._latent)
        guider.inner_set_conds({"positive": self._positive if positive is None else positive})
        sampler = _Within(function)
        guider.sample(empty, empty, sampler, torch.tensor([sigma, 0.0]), disable_pbar=True, seed=0)
        return sampler.result

    def _at(self, percent: float) -> Tensor:
        """The inverted latent there."""
        return self._trajectory.latents[nearest_step(self._trajectory, percent)]

    # --- parts ----------------------------------------------------------

    def numbers(self, check: ModelCheck) -> tuple[Verdict, str]:
        clean = self._model.model.process_latent_in(self._latent.float())
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))

        def predict(guider, sigma, options):
            x = guider.inner_model.model_sampling.noise_scaling(sigma, noise.to(sigma), clean.to(sigma))
            return guider(x, sigma * x.new_ones(x.shape[0]), model_options=options, seed=0)

        if not self._inside(predict, MIDDLE, self._model).isfinite().all():
            return "broken", (
                "The model answers with NaN or infinity on this clip; load it in another precision (weight_dtype, "
                "--fp32-unet), and check that its file is whole."
            )
        return "works", "A prediction is finite."

    def inversion(self, check: ModelCheck) -> tuple[Verdict, str]:
        model = self._model
        sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "ddim_uniform", STEPS)
        self._trajectory = invert(model, self._positive, self._latent, sigmas, refinements=REFINEMENTS)
        decibels = reconstruction_db(self._trajectory, reconstruct(self._trajectory))
        check.facts["inversion dB"] = round(decibels, 1)
        text = f"Inverted in {STEPS} steps and sampled back, the clip returns with {decibels:.1f} dB."
        if decibels >= GOOD_DB:
            return "works", text
        if decibels >= POOR_DB:
            return "look", f"{text} Use more steps or refinements, and a prompt that describes the clip."
        return "broken", (
            f"{text} An edit would not keep the clip: check that the text encoder and the ModelSampling nodes are this "
            f"model's own, and that no node adds chance to its predictions."
        )

    def attention(self, check: ModelCheck) -> tuple[Verdict, str]:
        recorder, silent = FeatureRecorder(self._blocks()), []
        check_handler(self._model, frame_count(self._latent))
        tap = self._hear(recorder, unheard=lambda run, layers: silent.extend(layers))
        layers = attention_layers(self._model)
        check.facts["layers heard"], check.facts["layers paired"] = len(tap.heard), len(recorder.features)
        text = f"{len(tap.heard)} of {len(layers)} attention layers are heard"
        if silent:
            kinds = " and ".join(sorted({layer.kind for layer in silent}))
            return "broken", (
                f"{text}; another node replaces the {kinds} attention of {len(silent)} (such as {silent[0].path}). "
                f"Remove that node (IPAdapter, an attention function swapped in all of ComfyUI)."
            )
        return "works", f"{text}, and {len(recorder.features)} of them have what an STR score is built from."

    def matching(self, check: ModelCheck) -> tuple[Verdict, str]:
        if lacking := lacks_for_relevance(self._model):
            return "does not apply", f"STR-Match needs what the model has not: {lacking}."
        blocks = self._score_blocks()
        if not blocks:
            return "broken", "No block has an STR score: another node replaces the attention of all; remove it."
        trial = BlockTrial(self._model, self._at(MIDDLE), blocks)
        self._inside(trial, MIDDLE)
        self._memory = trial.memory
        check.blocks, check.strength = trial.blocks, trial.strength
        if not any(own.right for own in check.blocks):
            return "broken", (
                "In no block does the matching loss fall along its gradient: the gradient is wrong for this model or "
                "its precision; try it in bf16 or fp32, and without nodes of other packs."
            )
        best = sorted((own for own in check.blocks if own.share > 0 and own.gain > 0), key=lambda own: -own.gain)
        check.layers = ",".join(own.block for own in best[: max(1, len(check.blocks) // 2)])
        ways = ", ".join(f"{own.block} {own.share:.0%}" for own in check.blocks)
        text = f"One move with lambda 1 goes this much of the way to a match of its own block: {ways}."
        if wrong := ", ".join(own.block for own in check.blocks if not own.right):
            return "look", f"{text} In {wrong} the gradient points the wrong way: leave them out."
        far = ", ".join(own.block for own in check.blocks if own.share <= 0)
        return "works", f"{text} In {far} it goes too far: leave them out, or lower lambda." if far else text

    def _score_blocks(self) -> list[str]:
        """Blocks that have an STR score, in the order of the network, and not too many; of a U-Net all but the finest,
        as STR-Match does."""
        of_unet = family_of(self._model).patched is None
        recorder = FeatureRecorder(str_score_of(self._trajectory).blocks if of_unet else self._blocks())
        self._hear(recorder)
        layers = attention_layers(self._model)
        found = list(dict.fromkeys(layers[path].block for path in recorder.features))
        if len(found) <= MOST_BLOCKS:
            return found
        return [found[round(i * (len(found) - 1) / (MOST_BLOCKS - 1))] for i in range(MOST_BLOCKS)]

    def _blocks(self) -> frozenset[str]:
        return frozenset(layer.block for layer in attention_layers(self._model).values() if layer.kind in IN_SPACE)

    def _hear(self, recorder: FeatureRecorder, **options) -> AttentionTap:
        """A pass on the source, of which a recorder hears."""
        tap = AttentionTap(self._model, [recorder], **options)

        def look(guider, sigma, options):
            whole = self._at(MIDDLE).to(sigma)

            def at(window: Window) -> None:
                x, given = window.of(whole), window.options(options)
                cond = window.leading_cond("positive", sigma, x)
                call_model(guider.inner_model, [cond], x, sigma, given, tap=tap, needs=frozenset(IN_SPACE))

            in_first_window(guider, sigma, options, whole, at)

        self._inside(look, MIDDLE)
        return tap

    def regions(self, check: ModelCheck) -> tuple[Verdict, str]:
        kinds = {layer.kind for layer in attention_layers(self._model).values()}
        if "joint" in kinds and family_of(self._model).patched is None:
            return "does not apply", "One attention reads prompt and frame together, in which regions do not act."
        height, width = self._latent.shape[-2:]
        box = torch.zeros(1, height, width)
        box[:, height // 4 : height - height // 4, width // 4 : width - width // 4] = 1
        of_words = bool(kinds & {"cross", "joint"})
        modulation = RegionModulation(self_strength=1.0, cross_strength=1.0 if of_words else 0.0, end=1.0)

        def predict(guider, sigma, options):
            x = self._at(EARLY).to(sigma)
            return guider(x, sigma * x.new_ones(x.shape[0]), model_options=options, seed=0)

        own_patch = has_regions(self._model)
        patched = self._model if own_patch else patch_regions(self._model, modulation)
        plain = self._inside(predict, EARLY, self._model, _bare(self._positive))
        changed = self._inside(predict, EARLY, patched, _with_box(self._positive, box, of_words))
        change = (changed - plain).float().square()
        inside = box[0].to(change).bool().expand(change.shape)
        own, other = (float(change[where].mean().sqrt()) for where in (inside, ~inside))
        size = float(plain.float().square().mean().sqrt())
        check.facts["regions move inside"], check.facts["outside"] = own / size, other / size
        text = f"A region moves the prediction by {own / size:.2%} inside it and by {other / size:.2%} outside."
        if own <= LEAST_CHANGE * size and own_patch:
            return "look", f"{text} The patch on this model does nothing early in denoising: see its start and end."
        if own <= LEAST_CHANGE * size:
            return "broken", f"{text} Another node replaces the attention in which regions act; remove it."
        return ("works", text) if own > other else ("look", f"{text} Raise cross_strength, or use a mask as well.")

    def memory(self, check: ModelCheck) -> tuple[Verdict, str]:
        if self._memory is None:
            return "does not apply", "No gradient was measured: there was none, or its first try ran out of memory."
        predicted, measured = self._memory
        check.facts["gradient GB"] = {"predicted": predicted / 1e9, "measured": measured / 1e9}
        text = f"A gradient took {measured / 1e9:.3g} GB; {predicted / 1e9:.3g} GB were predicted."
        if max(predicted, measured) < TOO_SMALL or NEAR[0] <= predicted / measured <= NEAR[1]:
            return "works", text
        return "look", f"{text} Predict Cost and memory auto are that far off on this model: please report it."


def _bare(conditioning: list) -> list:
    """A CONDITIONING without regions."""
    return [[embedding, {k: v for k, v in about.items() if k != LAYOUT}] for embedding, about in conditioning]


def _with_box(conditioning: list, box: Tensor, of_words: bool) -> list:
    """One region for all words of each entry, but its padding."""
    made, regions = [], (Region("", box),)
    for embedding, about in conditioning:
        mask = about.get("attention_mask")
        places = range(embedding.shape[1]) if mask is None else mask[0].nonzero().flatten().tolist()
        layout = Layout("the prompt", regions, (tuple(places) if of_words else (),), embedding.shape[1])
        made += with_layout([[embedding, about]], layout)
    return made


def public_text(error: Exception, conditioning: list) -> str:
    """What an error says, as far as this pack has written it, without prompts, phrases and paths."""
    frames, last = error.__traceback__, None
    while frames is not None:
        last, frames = frames.tb_frame.f_globals.get("__name__", ""), frames.tb_next
    if not str(last).startswith(__name__.split(".")[0]):
        return f"{type(error).__name__} in the model or in another pack; the console says more."
    layouts = [about[LAYOUT] for _, about in conditioning if about.get(LAYOUT)]
    text = str(error)
    for private in [each for own in layouts for each in (own.prompt, *(region.phrase for region in own.regions))]:
        text = text.replace(repr(private), "(text)").replace(private, "(text)") if private.strip() else text
    return re.sub(r"(?:[A-Za-z]:)?(?:[\\/][^\s'\"/\\]+){2,}", "(path)", text)
