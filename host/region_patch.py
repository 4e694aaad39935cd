"""ST-Layout modulation of a model's attention by regions, as a listener of the attention tap (arXiv 2502.17258).

Modes: "paper": self-attention of all prompts and cross-attention of the positive one; a region's size is its share of
the clip (self) or of the frame (cross); a pixel is of one region, what is in none is a region of its own. "released",
as the public code: self-attention of the negative prompt only; sizes nearly 1 in self-attention; masks overlap, and
what is in no mask shares a region with nothing.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..core.region_attention import modulated_attention, modulation_strength
from ..core.regions import membership, partition, same_frames, size_term, token_regions
from .attention_tap import AttentionCall, AttentionTap
from .families import attention_layers, family_of
from .region_prompt import Layout
from .sampling import SOURCE_RUN

log = logging.getLogger("spacetime_edit")

POSITIVE, NEGATIVE = 0, 1
"""Numbers of the prompts in the host's cond_or_uncond."""

FINEST = 1024
"""Tokens a frame up to which the latent's own resolution is modulated where no levels are chosen."""


@dataclass(frozen=True)
class _Arguments:
    """Of `modulated_attention`: memberships of queries and keys, strength of the rows, and which keys are apart."""

    of_query: Tensor
    of_key: Tensor
    strength: Tensor
    blocks: Sequence[int] | None = None
    alone: Tensor | None = None

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
        return _Arguments(of_query, of_key, pad(self.strength, (before, after)), self.blocks, alone)


@dataclass(frozen=True, eq=False)
class RegionModulation:
    """Modulates attention calls by the regions of a layout.

    self_strength, cross_strength, temporal_strength: factors of the method's own strength, 0 = none; where one
    attention reads prompt and clip together, the mean of the first two. start, end: percent of denoising in [0, 1].
    levels: how much coarser than the latent a layer's grid is, where it is modulated; None: all but the latent's own
    resolution, and that too where it has at most 1024 tokens.
    """

    layout: Layout
    self_strength: float = 1.0
    cross_strength: float = 1.0
    temporal_strength: float = 0.0
    start: float = 0.0
    end: float = 0.3
    levels: frozenset[int] | None = None
    _tables: dict = field(default_factory=dict, repr=False)

    @property
    def neutral(self) -> bool:
        """Whether it never changes anything."""
        return not self.layout.regions or not (self.self_strength or self.cross_strength or self.temporal_strength)

    def __call__(self, call: AttentionCall) -> Tensor | None:
        factor, parts = {
            "spatial": (self.self_strength, self._of_self),
            "spacetime": (self.self_strength, self._of_self),
            "cross": (self.cross_strength, self._of_cross),
            "joint": ((self.self_strength + self.cross_strength) / 2, self._of_joint),
            "temporal": (self.temporal_strength, self._of_time),
        }[call.kind]
        if factor == 0 or not self.start <= call.percent <= self.end or not self._at_level(call):
            return None
        if call.options.get(SOURCE_RUN):
            return None  # the source clip is seen as it is
        wide = call.over_frames()
        arguments = parts(wide)
        if arguments is None:
            return None
        output = modulated_attention(
            wide.query,
            wide.key,
            wide.value,
            arguments.of_query,
            arguments.of_key,
            (factor * arguments.strength).clamp(max=0.999),
            overlap="product" if self.layout.mode == "paper" else "any",
            mask=wide.mask,
            scale=wide.scale,
            blocks=arguments.blocks,
            alone=arguments.alone,
            attention=wide.attend,
        )
        return call.by_frame(output)

    def _at_level(self, call: AttentionCall) -> bool:
        if self.levels is not None:
            return call.level in self.levels
        return call.level > 1 or call.grid[1] * call.grid[2] <= FINEST

    # --- one kind of attention each -------------------------------------

    def _of_self(self, call: AttentionCall) -> "_Arguments | None":
        """Rows are frames, or of an inflated model several: (B, N, K) for queries, (B, M, K) for keys."""
        tokens = self._tokens(call)
        size = size_term(tokens, "clip", covered_twice=self.layout.mode == "released")
        rows = self._rows(call, {NEGATIVE} if self.layout.mode == "released" else None)
        if rows is None:
            return None
        of_queries = self._places([row.frames for row in call.rows], call)
        of_keys = self._places([row.key_frames for row in call.rows], call)
        strength = modulation_strength(1 - call.percent, size[of_queries].flatten(1), "self") * rows[:, None]
        found = _Arguments(tokens[of_queries].flatten(1, 2), tokens[of_keys].flatten(1, 2), strength)
        return found.among(call) if call.kind == "spacetime" else found

    def _of_cross(self, call: AttentionCall) -> "_Arguments | None":
        """Queries are a frame's tokens, or the clip's, keys the text's, of the positive prompt."""
        rows = self._rows(call, {POSITIVE})
        if rows is None:
            return None
        tokens, text = self._tokens(call), self._text(call, call.key.shape[2])
        frames = self._places([row.frames for row in call.rows], call)
        size = size_term(tokens, "frame")
        strength = modulation_strength(1 - call.percent, size[frames].flatten(1), "cross") * rows[:, None]
        of_query = tokens[frames].flatten(1, 2)[..., : text.shape[1]]
        if call.run.patch is not None:  # tokens of a reference picture see the prompt as without regions
            before, _, after = call.parts(call.query)
            of_query, strength = pad(of_query, (0, 0, before, after)), pad(strength, (before, after))
        return _Arguments(of_query, text, strength)

    def _of_joint(self, call: AttentionCall) -> "_Arguments | None":
        """Queries and keys are the text's tokens and the clip's, of the positive prompt; text queries stay.

        Extrema are those of the text and of the clip, each by itself (decision D6).
        """
        rows = self._rows(call, {POSITIVE})
        if rows is None:
            return None
        tokens = self._tokens(call)
        clip, text = tokens.flatten(0, 1), self._text(call, call.key.shape[2] - tokens[..., 0].numel())
        text = pad(text, (0, clip.shape[1] - text.shape[1]))
        strength = modulation_strength(1 - call.percent, size_term(tokens, "clip").flatten(), "joint")
        parts = [(text, strength.new_zeros(len(text))), (clip, strength)]
        if call.run.clip_at == "first":
            parts.reverse()
        of_all, strength = (torch.cat(of_parts) for of_parts in zip(*parts, strict=True))
        blocks = [len(of_part) for of_part, _ in parts]
        return _Arguments(of_all, of_all, strength * rows[:, None], blocks)

    def _of_time(self, call: AttentionCall) -> "_Arguments":
        """Rows are places, tokens frames: a place may change its region as objects move."""
        tokens = self._tokens(call).transpose(0, 1)  # (N, f, K)
        size = size_term(self._tokens(call), "clip").T
        prompts = len(call.rows) // len(tokens)
        strength = modulation_strength(1 - call.percent, size, "temporal").repeat(prompts, 1)
        tokens = tokens.repeat(prompts, 1, 1)
        return _Arguments(tokens, tokens, strength)

    # --- tables ---------------------------------------------------------

    def _tokens(self, call: AttentionCall) -> Tensor:
        """(frames of the run, N, K) on the call's grid: memberships, the last of them the rest in mode "paper"."""
        key = call.grid[1:], call.run.frames
        if key not in self._tables:
            masks, grid = same_frames(self.layout.regions), (call.run.clip_frames, *call.grid[1:])
            if self.layout.mode == "paper":
                table = membership(partition(masks), grid)
            else:
                table = membership(masks, grid, "nearest")
            self._tables[key] = table[list(call.run.frames)]
        return self._tables[key].to(call.query.device)

    def _text(self, call: AttentionCall, keys: int) -> Tensor:
        """(keys, K): which of so many of the call's keys are words of a region; the host may repeat a prompt."""
        length = self.layout.length
        last = max((place for places in self.layout.positions for place in places), default=0)
        if call.run.crops_text and last < keys < length:
            return token_regions(self.layout.positions, length)[:keys].to(call.query.device)
        if keys % length:
            raise ValueError(
                f"layout: it was made for {length} text tokens (the prompt {self.layout.prompt!r}), the model gets "
                f"{keys}; connect the CONDITIONING of the same Encode Regional Prompt as positive"
            )
        table = token_regions(self.layout.positions, length).repeat(keys // length, 1)
        return table.to(call.query.device)

    def _places(self, frames: Sequence[Sequence[int]], call: AttentionCall) -> Tensor:
        """For each batch row its frames (B, f), counted within the run."""
        place = {frame: i for i, frame in enumerate(call.run.frames)}
        return torch.tensor([[place[frame] for frame in of_row] for of_row in frames], device=call.query.device)

    def _rows(self, call: AttentionCall, prompts: set[int] | None) -> Tensor | None:
        """(B,) 1 for rows of these prompts; None where there is none of them."""
        chosen = [prompts is None or row.prompt in prompts for row in call.rows]
        return torch.tensor(chosen, dtype=torch.float32, device=call.query.device) if any(chosen) else None


def parse_levels(levels: str) -> frozenset[int] | None:
    """ "1,2,4" as numbers; "" is None. Raises ValueError for anything else."""
    parts = [part.strip() for part in levels.split(",") if part.strip()]
    if not all(part.isdecimal() and int(part).bit_count() == 1 for part in parts):
        raise ValueError(f"levels: {levels!r} is no list of 1, 2, 4, 8 and so on; write for example 2,4,8")
    return frozenset(map(int, parts)) or None


def patch_regions(model, modulation: RegionModulation):
    """A clone of a ModelPatcher whose attention is modulated; of a neutral one the clone is unchanged.

    Raises ValueError where phrases have no cross-attention to act in.
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
    if not kinds & {"cross", "joint"} and modulation.cross_strength and any(modulation.layout.positions):
        raise ValueError(
            f"model: {family_of(model).name} has no cross-attention, so no phrase can be kept in its region; set "
            f"cross_strength to 0 to let regions act in self-attention alone"
        )
    for number in _without_area(modulation.layout):
        log.warning(
            "ST-Layout: region %d (%r) covers nothing that is not covered by another; its words are drawn nowhere",
            number,
            modulation.layout.regions[number - 1].phrase,
        )
    for name in ("attn1", "attn2"):
        if hidden := patched.model_options["transformer_options"].get("patches_replace", {}).get(name):
            log.warning(
                "ST-Layout: another pack replaces %s in %s; regions do not act there unless it calls the host's "
                "attention",
                {"attn1": "self-attention", "attn2": "cross-attention"}[name],
                ", ".join(map(str, hidden)),
            )
    patched.model_options = AttentionTap(patched, [modulation]).install(patched.model_options)
    return patched


def _without_area(layout: Layout) -> list[int]:
    """Numbers, from 1, of regions that own no pixel of any frame."""
    masks = same_frames(layout.regions)
    owned = partition(masks)[:-1] if layout.mode == "paper" else masks
    return [k for k, mask in enumerate(owned, start=1) if mask.max() == 0]
