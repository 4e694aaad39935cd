"""ST-Layout modulation of a model's attention by regions, as a listener of the attention tap (arXiv 2502.17258).

The regions come with the conditionings of the run, see `regional_prompts`. Cross-attention of a prompt is modulated by
its own layout and by no other. Self-attention of a prompt without one follows the layout of the run's regional prompt.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key
from torch import Tensor
from torch.nn.functional import pad

from ..core.region_attention import Factors, Overlap, modulated_attention, modulation_strength, region_factors
from .attention_call import AttentionCall, ModelRun
from .attention_tap import AttentionTap, running_taps
from .families import AttentionKind, family_of
from .layers import Layer, attention_layers
from .node_text import LOG, NodeText
from .region_prompt import LAYOUT
from .regional_prompts import (
    Placed,
    RegionalPrompts,
    Table,
    prompts_of,
    remember_prompts,
    replaced_blocks,
    rows_of,
    tell_conditionings,
)

FINEST = 1024
"""Tokens a frame up to which the latent's own resolution is modulated where no levels are chosen."""

KEY = "spacetime_edit_regions"
"""Of the wrappers that bring the regional prompts of a run to its attention."""


@dataclass(frozen=True)
class _Arguments:
    """Of `modulated_attention`: memberships of queries and keys and what they share, the size terms of the rows, of
    which their strength is made, and which keys are apart."""

    of_query: Tensor
    of_key: Tensor
    size: Tensor
    blocks: Sequence[int] | None = None
    alone: Tensor | None = None
    factors: Factors | None = None

    def among(self, call: AttentionCall) -> "_Arguments":
        """The same for the call's own tokens, where others stand beside the clip's: those of a reference picture.

        They see, and are seen, as without regions.
        """
        before, clip, after = call.parts(call.key)
        if not before and not after:
            return self
        alone = torch.ones(before + clip + after, dtype=torch.bool, device=call.key.device)
        alone[before : before + clip] = False
        of_query, of_key = (pad(t, (0, 0, before, after)) for t in (self.of_query, self.of_key))
        return _Arguments(of_query, of_key, pad(self.size, (before, after)), self.blocks, alone)

    def of_queries(self, queries: slice) -> "_Arguments":
        """The same for some of the queries, where another pack asks for a few at a time."""
        part = slice(queries.start, min(queries.stop, self.of_query.shape[1]))
        return _Arguments(self.of_query[:, part], self.of_key, self.size[:, part], self.blocks, self.alone)

    def factored(self, overlap: Overlap) -> "_Arguments":
        return replace(self, factors=region_factors(self.of_query, self.of_key, overlap))


@dataclass(frozen=True)
class _Prompt:
    """What one prompt of the batch brings: its layout, with words of its own or lent, and the table of its regions."""

    placed: Placed | None
    table: Table

    @property
    def key(self) -> tuple:
        """Equal for prompts of a run that bring the same: the run keeps layouts and tables."""
        return self.placed and (id(self.placed.layout), self.placed.length, self.placed.offset), id(self.table)


@dataclass(frozen=True, eq=False)
class RegionModulation:
    """Modulates attention calls by the regions of the prompts.

    self_strength, cross_strength, temporal_strength: factors of the method's own strength, 0 = none; where one
    attention reads prompt and clip together, the mean of the first two. start, end: percent of denoising in [0, 1].
    levels: how much coarser than the latent a layer's grid is, where it is modulated; None: all but the latent's own
    resolution, and that too where it has at most 1024 tokens. say: shows a message on the node of the patch.
    """

    self_strength: float = 1.0
    cross_strength: float = 1.0
    temporal_strength: float = 0.0
    start: float = 0.0
    end: float = 0.3
    levels: frozenset[int] | None = None
    say: NodeText = LOG

    @property
    def neutral(self) -> bool:
        """Whether it never changes anything."""
        return not any(map(self._factor, ("spatial", "cross", "temporal")))

    def _factor(self, kind: AttentionKind) -> float:
        return {
            "spatial": self.self_strength,
            "spacetime": self.self_strength,
            "cross": self.cross_strength,
            "joint": (self.self_strength + self.cross_strength) / 2,
            "temporal": self.temporal_strength,
        }[kind]

    def acts_in(self, run: ModelRun) -> bool:
        """Whether it may change a model run. The source clip is seen as it is."""
        prompts = prompts_of(run)
        here = self.start <= run.percent <= self.end and not run.of_source
        return here and prompts is not None and bool(prompts.layouts)

    def missed(self, layers: Mapping[str, Layer], run: ModelRun, hidden: Sequence[Layer]) -> None:
        """Says in which of the model's layers another pack keeps regions from acting."""
        wanted = [layer for layer in layers.values() if self._factor(layer.kind)]
        hidden = [layer for layer in hidden if self._factor(layer.kind)]
        prompts = prompts_of(run)
        if prompts is None or replaced_blocks(run.options) != prompts.replaced:
            return  # a further pass of a guidance that disturbs some layers on purpose, as PAG and SAG do
        if hidden:
            kinds = " and ".join(sorted({layer.kind for layer in hidden}))
            prompts.say_once(
                f"Regions {'do nothing' if len(hidden) == len(wanted) else 'act in part'}: another node replaces the "
                f"{kinds} attention of {len(hidden)} of {len(wanted)} layers (as IPAdapter does, and packs that swap "
                f"ComfyUI's attention function). Remove it to let regions act there."
            )

    def __call__(self, call: AttentionCall) -> Tensor | None:
        arguments = self._arguments(call) if self._acts_on(call) else None
        if arguments is None:
            return None
        self._check_alone(call)
        strength = modulation_strength(1 - call.percent, arguments.size, to_words=call.kind == "cross")
        return modulated_attention(
            call.query,
            call.key,
            call.value,
            arguments.of_query,
            arguments.of_key,
            (self._factor(call.kind) * strength).clamp(max=0.999),
            overlap=prompts_of(call.run).layouts[0].rules.overlap,
            factors=arguments.factors,
            mask=call.mask,
            scale=call.scale,
            blocks=arguments.blocks,
            alone=arguments.alone,
            attention=call.attend,
            kernels=call.stock,
        )

    def _check_alone(self, call: AttentionCall) -> None:
        """ValueError where another patch modulates the same call: which of the two would hold is not defined."""
        others = (listener for tap, _ in running_taps() for listener in tap.listeners if listener is not self)
        if any(isinstance(other, RegionModulation) and other._acts_on(call) for other in others):
            raise ValueError(
                f"model: two ST-Layout Attention Patches act on {call.layer.path} at once; remove one, or give them "
                f"different start and end, levels, or kinds of attention (a strength of 0)"
            )

    def _acts_on(self, call: AttentionCall) -> bool:
        return self._factor(call.kind) != 0 and self._at_level(call)

    def _at_level(self, call: AttentionCall) -> bool:
        if self.levels is not None:
            return call.level in self.levels
        return call.level > 1 or call.grid[1] * call.grid[2] <= FINEST

    def _arguments(self, call: AttentionCall) -> _Arguments | None:
        """None where no prompt of the call has regions. Made once for all layers and steps that have the same."""
        prompts = [self._prompt(call, chunk) for chunk in range(len(call.run.prompts))]
        if not any(prompts):
            return None
        of_prompts, run, asked = prompts_of(call.run), call.run, (call.query, call.key)
        key = (
            *(call.kind, call.grid, call.first, call.inflation, call.query.device, *(t.shape[:3] for t in asked)),
            *(run.prompts, run.frames, run.patch, run.clip_at, run.before, run.text),
            tuple(prompt and prompt.key for prompt in prompts),
        )

        @torch.inference_mode(False)  # a gradient pass takes what sampling has left
        def make() -> _Arguments:
            return self._made(call, prompts).factored(of_prompts.layouts[0].rules.overlap)

        return of_prompts.once(key, make)

    def _made(self, call: AttentionCall, prompts: Sequence[_Prompt | None]) -> _Arguments:
        parts = {"cross": self._of_cross, "joint": self._of_joint, "temporal": self._of_time}
        made, asked = parts.get(call.kind, self._of_self)(call, prompts), call.query.shape[2]
        return made if asked == made.of_query.shape[1] else made.of_queries(slice(call.first, call.first + asked))

    def _prompt(self, call: AttentionCall, chunk: int) -> _Prompt | None:
        """A prompt of the batch, where the call's kind of attention follows regions."""
        run, prompts = call.run, prompts_of(call.run)
        placed, area = prompts.of_chunk(run, chunk)
        layout = placed.layout if placed is not None else prompts.shared
        of_words = call.kind in ("cross", "joint")
        if layout is None or (of_words and placed is None):
            return None
        if not of_words and placed is not None and not layout.rules.own_self_attention and call.kind != "temporal":
            return None
        return _Prompt(placed, prompts.table(layout, area, call))

    # --- one kind of attention each -------------------------------------

    def _of_self(self, call: AttentionCall, prompts: Sequence[_Prompt | None]) -> _Arguments:
        """Rows are frames, or of an inflated model several: (B, N, K) for queries, (B, M, K) for keys."""
        tokens, size = _stacked(call, prompts, "of_clip")
        chunks, of_queries, of_keys = *rows_of(call), rows_of(call, keys=True)[1]
        size = _at(size, chunks, of_queries) * _active(call, prompts)[chunks][:, None]
        found = _Arguments(_at(tokens, chunks, of_queries), _at(tokens, chunks, of_keys), size)
        return found.among(call) if call.kind == "spacetime" else found

    def _of_cross(self, call: AttentionCall, prompts: Sequence[_Prompt | None]) -> _Arguments:
        """Queries are a frame's tokens, or the clip's, keys the text's."""
        tokens, size = _stacked(call, prompts, "of_frame")
        chunks, frames = rows_of(call)
        text = _text(call, prompts, call.key.shape[2])
        size = _at(size, chunks, frames) * _active(call, prompts)[chunks][:, None]
        of_query = _at(tokens, chunks, frames)[..., : text.shape[2]]
        if call.run.patch is not None:  # tokens of a reference picture see the prompt as without regions
            before, _, after = call.parts(call.query)
            around = before, max(after, 0)  # a part of the queries is shorter than the clip
            of_query, size = pad(of_query, (0, 0, *around)), pad(size, around)
        return _Arguments(of_query, text[chunks], size)

    def _of_joint(self, call: AttentionCall, prompts: Sequence[_Prompt | None]) -> _Arguments:
        """Queries and keys are the text's tokens and the clip's; text queries stay.

        Extrema are those of the text and of the clip, each by itself.
        """
        tokens, size = _stacked(call, prompts, "of_clip")
        clip, size = tokens.flatten(1, 2), size.flatten(1)
        text = _text(call, prompts, call.key.shape[2] - clip.shape[1])
        text = pad(text, (0, clip.shape[2] - text.shape[2]))
        size = size * _active(call, prompts)[:, None]
        parts = [(text, size.new_zeros(text.shape[:2])), (clip, size)]
        if call.run.clip_at == "first":
            parts.reverse()
        of_all, size = (torch.cat(of_parts, 1) for of_parts in zip(*parts, strict=True))
        return _Arguments(of_all, of_all, size, [of_part.shape[1] for of_part, _ in parts])

    def _of_time(self, call: AttentionCall, prompts: Sequence[_Prompt | None]) -> _Arguments:
        """Rows are places, tokens frames: a place may change its region as objects move."""
        tokens, size = _stacked(call, prompts, "of_clip")
        size = size * _active(call, prompts)[:, None, None]
        tokens, size = (t.transpose(1, 2).flatten(0, 1) for t in (tokens, size))  # (P N, f, K), (P N, f)
        return _Arguments(tokens, tokens, size)


def _stacked(call: AttentionCall, prompts: Sequence[_Prompt | None], size: str) -> tuple[Tensor, Tensor]:
    """(P, f, N, K) memberships and (P, f, N) size terms of the frames of the run, 0 for prompts without regions."""
    tables = [prompt and prompt.table for prompt in prompts]
    first, frames = next(filter(None, tables)), list(call.run.frames)
    most = max(table.tokens.shape[2] for table in tables if table is not None)
    tokens = first.tokens.new_zeros(len(prompts), len(frames), first.tokens.shape[1], most)
    sizes = first.tokens.new_zeros(tokens.shape[:3])
    for p, table in enumerate(tables):
        if table is not None:
            tokens[p, ..., : table.tokens.shape[2]] = table.tokens[frames]
            sizes[p] = getattr(table, size)[frames]
    return tokens.to(call.query.device), sizes.to(call.query.device)


def _text(call: AttentionCall, prompts: Sequence[_Prompt | None], keys: int) -> Tensor:
    """(P, keys, K): which text tokens are words of which region, 0 for prompts without regions."""
    own = [prompt and prompt.placed.words(keys, call.run.text) for prompt in prompts]
    most = max(table.shape[1] for table in own if table is not None)
    text = torch.zeros(len(prompts), keys, most, device=call.query.device)
    for p, table in enumerate(own):
        if table is not None:
            text[p, :, : table.shape[1]] = table
    return text


def _active(call: AttentionCall, prompts: Sequence[_Prompt | None]) -> Tensor:
    """(P,) 1 for prompts with regions."""
    return torch.tensor([float(prompt is not None) for prompt in prompts], device=call.query.device)


def _at(table: Tensor, chunks: Tensor, frames: Tensor) -> Tensor:
    """Of (P, f, N, ...) the frames (B, n) of each row's prompt (B,), one behind another: (B, n N, ...)."""
    return table[chunks[:, None], frames].flatten(1, 2)


def parse_levels(levels: str) -> frozenset[int] | None:
    """ "1,2,4" as numbers; "" is None. Raises ValueError for anything else."""
    parts = [part.strip() for part in levels.split(",") if part.strip()]
    if not all(part.isdecimal() and int(part).bit_count() == 1 for part in parts):
        raise ValueError(f"levels: {levels!r} is no list of 1, 2, 4, 8 and so on; write for example 2,4,8")
    return frozenset(map(int, parts)) or None


def patch_regions(model, modulation: RegionModulation):
    """A clone of a ModelPatcher whose attention is modulated; of a neutral one the clone is unchanged.

    Raises ValueError for a model whose one attention reads prompt and frame together.
    """
    patched = model.clone()
    if modulation.neutral:
        return patched
    kinds = {layer.kind for layer in attention_layers(model).values()}
    if "joint" in kinds and family_of(model).patched is None:
        raise ValueError(
            f"model: in {family_of(model).name} one attention reads prompt and frame together, in which regions do not "
            f"act; use a model such as Zeroscope or SD 1.5"
        )
    no_words = not kinds & {"cross", "joint"} and modulation.cross_strength > 0

    def check(prompts: RegionalPrompts) -> None:
        if no_words and any(places for layout in prompts.layouts for places in layout.positions):
            raise ValueError(
                f"model: {family_of(model).name} has no cross-attention, so no phrase can be kept in its region; set "
                f"cross_strength of ST-Layout Attention Patch to 0 to let regions act in self-attention alone"
            )

    missed = partial(modulation.missed, attention_layers(patched))
    tap = AttentionTap(patched, [modulation], acts_in=modulation.acts_in, unheard=missed)
    options = tap.install(patched.model_options)
    wrappers = {
        WrappersMP.SAMPLER_SAMPLE: remember_prompts(modulation.say, check),
        WrappersMP.CALC_COND_BATCH: tell_conditionings(modulation.say),
    }
    for place, wrapper in wrappers.items():
        if not has_regions(patched):  # one pair does for several patches on a model
            add_wrapper_with_key(place, KEY, wrapper, options, is_model_options=True)
    patched.model_options = options
    return patched


def has_regions(model) -> bool:
    """Whether a ModelPatcher is patched to follow regions."""
    wrappers = model.model_options.get("transformer_options", {}).get("wrappers", {})
    return KEY in wrappers.get(WrappersMP.SAMPLER_SAMPLE, {})


def tell_layouts_without_patch(model, conds: Mapping[str, Sequence[dict]]) -> None:
    """Says on the nodes that encoded them that the regional prompts of a guider reach a ModelPatcher without patch."""
    if has_regions(model):
        return
    layouts = [layout for own in conds.values() for cond in own if (layout := cond.get(LAYOUT)) and layout.regions]
    for node in {layout.node for layout in layouts}:
        NodeText(node)(
            "The regions of this prompt do nothing: the model of the guider has no ST-Layout Attention Patch."
        )
