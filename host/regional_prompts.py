"""Which rows of a batch have which regions: by the conditioning that each row was made of, not by its number.

A layout travels in the dict of the conditioning that it was encoded with. A row's conditioning is known by its list
and its uuid, which the host hands to every call; by the uuid alone it is not, since the host copies a conditioning with
an area into the other prompts.
"""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from types import MappingProxyType
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..core.frames import FrameMap
from ..core.regions import membership, partition, same_frames, size_term, token_regions
from .attention_call import RETAINED, SOURCE_RUN, AttentionCall, ModelRun
from .families import TextKeys
from .latents import clip_shape
from .node_text import LOG
from .region_prompt import LAYOUT, Layout

PROMPTS = "spacetime_edit_prompts"
"""Key in transformer_options of the `RegionalPrompts` of a run of the sampler."""
CALL = "spacetime_edit_conditionings"
"""Key in transformer_options of what the prompts of one call are: {(list, uuid): conditioning}."""
SOURCE_POSITIVE = "source_positive"
"""The guider's name of the prompt of the source clip, which is not one of the edit's."""

UNPREPARED = "unprocessed_ltxav_embeds"
"""The host's key in a conditioning whose prompt the model itself has still to prepare."""

KEPT = 64
"""Kinds of attention calls whose regions are kept at once."""

Result = TypeVar("Result")
Area = tuple[int, ...] | None
"""(height, width, top, left) in cells of the latent; None: the whole frame."""


@dataclass(frozen=True)
class Placed:
    """A layout as one conditioning carries it: `length` text tokens, the first of the layout's own at `offset`."""

    layout: Layout
    length: int
    offset: int

    def words(self, keys: int, text: TextKeys) -> Tensor:
        """(keys, K): which of a call's keys are words of a region. text: see `families.TextKeys`.

        ValueError for another number of keys.
        """
        places = [[self.offset + place for place in own] for own in self.layout.positions]
        table = token_regions(places, self.length)
        last = max((place for own in places for place in own), default=0)
        if text == "cropped" and last < keys < self.length:
            return table[:keys]
        if text == "last" and keys > self.length:
            return pad(table, (0, 0, keys - self.length, 0))
        if keys % self.length:
            raise ValueError(
                f"positive: the regional prompt {self.layout.prompt!r} has {self.length} text tokens, but attention "
                f"sees {keys}; remove a node that changes the prompt inside the model"
            )
        return table.repeat(keys // self.length, 1)


@dataclass(frozen=True)
class Table:
    """Regions on one grid of tokens, over the whole clip.

    tokens (F, N, K): memberships; of_clip, of_frame (F, N): the size term of a query over the clip and in its frame.
    """

    tokens: Tensor
    of_clip: Tensor
    of_frame: Tensor


@dataclass(eq=False)
class RegionalPrompts:
    """The regional prompts of one run of the sampler; it holds their tables for as long as the run lasts.

    conds: the guider's conditionings by name, as the host has processed them. say: shows a message on the node of the
    patch. size: of the clip's latent, (F, h, w) or (h, w). replaced: blocks, by kind of patch, whose attention nodes
    before the sampler have replaced. base_model: the host's, of the run.
    """

    conds: Mapping[str, Sequence[dict]]
    say: Callable[[str], None] = LOG
    size: tuple[int, ...] | None = None
    replaced: Mapping[str, frozenset] = field(default_factory=dict)
    base_model: object = None
    _placed: dict = field(default_factory=dict, repr=False)
    _tables: dict = field(default_factory=dict, repr=False)
    _once: dict = field(default_factory=dict, repr=False)

    def __post_init__(self):
        self.say_once = cache(self.say)
        found = [
            placed.layout
            for name, conds in self.conds.items()
            if name != SOURCE_POSITIVE
            for cond in conds
            if (placed := self.of(cond, name)) is not None
        ]
        self.layouts = list({id(layout.regions): layout for layout in found}.values())
        if len({layout.mode for layout in found}) > 1:
            raise ValueError(
                "mode: regional prompts of one run are encoded in modes 'paper' and 'released'; choose one in every "
                "Encode Regional Prompt"
            )
        self._tell()

    def _tell(self) -> None:
        if not self.layouts:
            self.say_once(
                "No regional prompt reaches this model, so regions do nothing: connect the conditioning of Encode "
                "Regional Prompt to the guider."
            )
        if len(self.layouts) > 1:
            self.say_once(
                f"{len(self.layouts)} regional prompts: each is kept to its own regions; prompts without regions "
                f"(such as the negative one) keep their self-attention."
            )
        for layout in self.layouts:
            for number in _without_area(layout):
                self.say_once(
                    f"Region {number} ({layout.regions[number - 1].phrase!r}) covers nothing that is not covered by "
                    f"another: its words are drawn nowhere."
                )

    @property
    def shared(self) -> Layout | None:
        """The layout that prompts without one of their own hold together by, in self-attention."""
        return self.layouts[0] if len(self.layouts) == 1 else None

    def of(self, cond: dict, name: str = "positive") -> Placed | None:
        """The layout of one processed conditioning; None where it has none, or is empty.

        ValueError where its embedding is no longer the one that the layout was made for.
        """
        layout, raw = cond.get(LAYOUT), cond.get("cross_attn")
        if layout is None or not layout.regions or raw is None:
            return None
        if cond.get("ref_latent") is not None:
            raise ValueError(
                f"{name}: HunyuanVideo's image-to-video node in guidance_type custom puts a picture among the words of "
                f"the regional prompt; choose guidance_type v1 or v2"
            )
        read = getattr(cond.get("model_conds", {}).get("c_crossattn"), "cond", raw)
        read = read if isinstance(read, Tensor) else raw
        key = id(layout), read.data_ptr(), tuple(read.shape), raw.data_ptr()
        if key not in self._placed:
            of = self._prepared if cond.get(UNPREPARED) else _placed
            placed = of(layout, raw, read, name)
            self._placed[key] = placed, raw, read  # kept, so that no address is used again
        return self._placed[key][0]

    def _prepared(self, layout: Layout, raw: Tensor, read: Tensor, name: str) -> Placed | None:
        """As `_placed`, of a model (LTX-2) that itself prepares prompts and puts tokens of its own behind them."""
        network, dtype = self.base_model.diffusion_model, self.base_model.get_dtype_inference()
        own = network.preprocess_text_embeds(raw.to(read.device, dtype), unprocessed=True)
        if own.shape != read.shape or not torch.allclose(own, read.to(own), rtol=1e-2, atol=1e-2):
            return None  # the host's copy for another prompt
        placed = _placed(layout, raw, raw, name)
        return placed and replace(placed, length=read.shape[1])

    def of_chunk(self, run: ModelRun, chunk: int) -> tuple[Placed | None, Area]:
        """Of a prompt in the batch of a call: its layout, and the area that its latent is a part of."""
        called, uuid = run.options.get(CALL, {}), run.uuids[chunk]
        cond = called.get((run.prompts[chunk], uuid))
        if cond is None:  # of a pack that asks for one list at a time, each as the first
            named = {id(own): own for (_, other), own in called.items() if other == uuid}
            if len(named) > 1:
                raise ValueError(
                    "model: a node of another pack calls it with prompts in an order that is not known, so their "
                    "regions are not either; remove that node, or the ST-Layout Attention Patch"
                )
            cond = next(iter(named.values()), None)
        placed = None if cond is None else self.of(cond)
        if placed is None and self.shared is None:
            return None, None
        area = None if cond is None else _area(cond.get("area"), self.size)
        self._check_size(run, area)
        return placed, area

    def _check_size(self, run: ModelRun, area: Area) -> None:
        """ValueError for a run on a part of the frame that is not the conditioning's."""
        expected = run.size if self.size is None else self.size[-2:] if area is None else area[:2]
        if run.size != tuple(expected):
            raise ValueError(
                f"model: another pack runs it on {run.size[1]} x {run.size[0]} of the latent's {expected[1]} x "
                f"{expected[0]} cells, so the place of the regions is not known; remove the node that cuts frames into "
                f"tiles or resizes them (Tiled Diffusion), or the ST-Layout Attention Patch"
            )

    def once(self, key: Hashable, make: Callable[[], Result]) -> Result:
        """What `make` gives, kept for the next calls of this run; of many kinds of calls, such as those of many context
        windows, it is made again."""
        if key not in self._once:
            if len(self._once) == KEPT:
                self._once.clear()
            self._once[key] = make()
        return self._once[key]

    def table(self, layout: Layout, area: Area, call: AttentionCall) -> Table:
        """Of a layout on the call's grid, made once."""
        key = id(layout.regions), area, call.grid[1:], call.run.time
        if key not in self._tables:
            self._tables[key] = self._made(layout, area, call.run.time, call.grid[1:])
        return self._tables[key]

    def _made(self, layout: Layout, area: Area, time: FrameMap, size: tuple[int, int]) -> Table:
        masks, rules = same_frames(layout.regions), layout.rules
        masks = partition(masks) if rules.partitioned else masks
        if area is not None:
            masks = _cropped(masks, area, self.size[-2:])
        tokens = membership(masks, time, size, rules.pooling)
        of_clip = size_term(tokens, "clip", covered_twice=rules.covered_twice)
        return Table(tokens, of_clip, size_term(tokens, "frame"))


def _placed(layout: Layout, raw: Tensor, read: Tensor, name: str) -> Placed | None:
    """raw: the embedding of the conditioning; read: what the model reads."""
    if not read.any():
        return None  # a prompt that was zeroed out has no words
    if (offset := layout.offset_in(read)) is not None:
        return Placed(layout, read.shape[1], offset)
    if layout.offset_in(raw) is not None:
        return None  # the host's copy for another prompt, which lends it the area but not the words
    raise ValueError(
        f"{name}: the regional prompt {layout.prompt!r} was changed after Encode Regional Prompt, so the places of its "
        f"phrases are not known; connect it directly, or leave out the node between (Conditioning (Average) and the "
        f"like) for this prompt"
    )


def placed_on(conditioning: list, percent: float, name: str = "positive") -> tuple[list, Placed]:
    """The first entry of a CONDITIONING that carries a layout at this progress of denoising in [0, 1], and that.

    ValueError where none does, or two do.
    """
    entries = [
        entry
        for entry in conditioning
        if entry[1].get(LAYOUT) and entry[1].get("start_percent", 0) <= percent <= entry[1].get("end_percent", 1)
    ]
    if len({id(about[LAYOUT].regions) for _, about in entries}) != 1:
        found = "several regional prompts" if entries else "no regional prompt"
        raise ValueError(
            f"{name}: it carries {found} at percent {percent:g}; connect the conditioning of one Encode Regional Prompt"
        )
    embedding, layout = entries[0][0], entries[0][1][LAYOUT]
    if (placed := _placed(layout, embedding, embedding, name)) is None:
        raise ValueError(
            f"{name}: the regional prompt {layout.prompt!r} was zeroed out, so its words have no attention"
        )
    return entries[0], placed


def _area(area: Sequence[int] | None, size: tuple[int, ...] | None) -> Area:
    """Of the host's area, (height, width, top, left) or the same with time in front of each half, the part in space.

    ValueError for one that is a part of the clip in time.
    """
    if area is None or size is None:
        return None
    half = len(area) // 2
    if half == 3 and (area[3] or area[0] < size[0]):
        raise ValueError(
            "positive: an area of a regional prompt is of some of the frames; set temporal of Conditioning (Set Area "
            "with Percentage for Video) to 1, and let the regions' masks say when each is there"
        )
    size = size[-2:]
    tall, wide, top, left = *area[half - 2 : half], *area[2 * half - 2 :]
    return min(size[0] - top, tall), min(size[1] - left, wide), top, left


def _cropped(masks: Tensor, area: tuple[int, ...], size: tuple[int, int]) -> Tensor:
    """The part of masks (K, F, H, W) that lies in an area of a latent of this size."""
    sides = []
    for length, cells, extent, first in zip(masks.shape[2:], size, area[:2], area[2:], strict=True):
        start = round(first * length / cells)
        sides.append(slice(start, max(start + 1, round((first + extent) * length / cells))))
    return masks[:, :, sides[0], sides[1]]


def _without_area(layout: Layout) -> list[int]:
    """Numbers, from 1, of regions that own no pixel of any frame."""
    masks = same_frames(layout.regions)
    owned = partition(masks)[:-1] if layout.rules.partitioned else masks
    return [k for k, mask in enumerate(owned, start=1) if mask.max() == 0]


# --- wrappers of a run --------------------------------------------------


def remember_prompts(say: Callable[[str], None], check: Callable[["RegionalPrompts"], None]):
    """SAMPLER_SAMPLE wrapper: puts the guider's regional prompts into the options of a run, once `check` has passed."""

    def wrapper(executor, guider, sigmas, extra_args, callback, noise, *args, **kwargs):
        inner = extra_args["model_options"].setdefault("transformer_options", {})
        if inner.get(SOURCE_RUN):
            return executor(guider, sigmas, extra_args, callback, noise, *args, **kwargs)
        conds, replaced = getattr(guider, "conds", {}), replaced_blocks(inner)
        size, base_model = _size_of(noise, conds.values()), getattr(guider, "inner_model", None)
        prompts = inner[PROMPTS] = RegionalPrompts(conds, say, size, replaced, base_model)
        check(prompts)
        return executor(guider, sigmas, extra_args, callback, noise, *args, **kwargs)

    return wrapper


def tell_conditionings(say: Callable[[str], None]):
    """CALC_COND_BATCH wrapper: puts the conditionings of a call into its options, by list and uuid."""

    def wrapper(executor, base_model, conds, x, timestep, model_options):
        inner = dict(model_options.get("transformer_options", {}))
        if inner.get(SOURCE_RUN):
            return executor(base_model, conds, x, timestep, model_options)
        named = {(i, cond.get("uuid")): cond for i, own in enumerate(conds) for cond in own or ()}
        inner[CALL] = MappingProxyType(named)  # no dict, which the host would copy for every call
        if retained := getattr(model_options.get("context_handler"), "latent_retain_index_list", None):
            inner[RETAINED] = tuple(retained)
        if PROMPTS not in inner:  # a sampler of another pack that does not go the host's way
            own = {str(i): list(each or ()) for i, each in enumerate(conds)}
            inner[PROMPTS] = RegionalPrompts(own, say, _size_of(x, own.values()), replaced_blocks(inner), base_model)
        return executor(base_model, conds, x, timestep, {**model_options, "transformer_options": inner})

    return wrapper


def _size_of(latent: Tensor, conds: Iterable[Sequence[dict]]) -> tuple[int, ...]:
    """(F, h, w) or (h, w) of the clip in the latent of a run."""
    of_models = (cond.get("model_conds", {}).get("latent_shapes") for own in conds for cond in own or ())
    packed = next((found.cond for found in of_models if found is not None), None)
    return clip_shape(latent.shape, packed)[2:]


def replaced_blocks(options: Mapping) -> dict[str, frozenset]:
    """Of transformer_options: the blocks whose attention is replaced, by kind of patch."""
    return {name: frozenset(blocks) for name, blocks in options.get("patches_replace", {}).items() if blocks}


def prompts_of(run: ModelRun) -> RegionalPrompts | None:
    """The regional prompts of the run of the sampler that a model run is part of."""
    return run.options.get(PROMPTS)


def rows_of(call: AttentionCall, *, keys: bool = False) -> tuple[Tensor, Tensor]:
    """(B,) which prompt of the batch each row is of; (B, n) the frames of its queries or keys, as the run counts."""
    place, device = {frame: i for i, frame in enumerate(call.run.frames)}, call.query.device
    chunks = torch.tensor([row.chunk for row in call.rows], device=device)
    seen = [row.key_frames if keys else row.frames for row in call.rows]
    return chunks, torch.tensor([[place[frame] for frame in frames] for frames in seen], device=device)
