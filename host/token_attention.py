"""How strongly the pixels of a clip attend to words of a prompt (VideoGrain, arXiv 2502.17258, figure 7)."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from ..core.frames import FrameMap
from ..core.regions import MASKS
from ..core.trajectory import Trajectory
from .attention_call import AttentionCall
from .families import AttentionKind, text_kinds
from .latents import frame_count, time_of
from .layers import attention_layers, select_blocks
from .model_pass import call_on_trajectory
from .region_prompt import Layout, positions_in
from .regional_prompts import placed_on

COARSEST = 2
"""Levels up to which layers are looked at where none are chosen: coarser ones place nothing."""


def token_attention(
    trajectory: Trajectory,
    positive: list,
    words: str,
    size: tuple[int, int],
    *,
    percent: float,
    model=None,
    layers: str = "",
    frames: int | None = None,
) -> Tensor:
    """Share of each pixel's attention that words of a regional prompt get: (F, H, W) in [0, 1].

    Of its attention to the prompt, or where one attention reads prompt and clip together, of all of it.

    positive: CONDITIONING of the edit, which carries the prompt's layout. The model sees the inverted latent nearest to
    `percent` with it; `model`: with its patches, else as it was inverted. Mean over heads and over the layers chosen,
    blocks such as "u2-u3"; empty: the two finest resolutions, or all of a transformer. frames: of the clip; None: the
    latent's. ValueError for words that are not in the prompt, layers that the model has not, models without
    cross-attention, and another model than the one that was inverted.
    """
    if model is not None and not model.is_clone(trajectory.model):
        raise ValueError(
            "model: it is not the one that was inverted; connect the same loader to both, and the patch after"
        )
    shown = time_of(trajectory.clean, trajectory.model).tokens_of_clip(frames or frame_count(trajectory.clean))
    kinds = text_kinds(trajectory.model)
    blocks = {at.block for at in attention_layers(trajectory.model).values() if at.kind in kinds}
    if not blocks:
        raise ValueError("trajectory: its model has no cross-attention, so no word has a place of its own in it")
    chosen = select_blocks(layers, blocks) if layers.strip() else None
    entry, placed = placed_on(positive, percent)
    places = tuple(placed.offset + place for place in positions_in(placed.layout, words))
    recorder = WordRecorder(places, placed.length, size, chosen, kinds)
    call_on_trajectory(recorder, trajectory, percent, frozenset(kinds), model=model, positive=[entry])
    return recorder.attention[shown]


@dataclass
class WordRecorder:
    """A listener that sums up the attention to some text tokens, as the model computes it, patches included.

    places: among the prompt's `length` tokens; size: (H, W) of the result; blocks: names of those to look at; kinds: of
    the attention.
    """

    places: tuple[int, ...]
    length: int
    size: tuple[int, int]
    blocks: frozenset[str] | None
    kinds: tuple[AttentionKind, ...] = ("cross",)
    layers: int = 0
    total: Tensor | float = 0.0

    @property
    def attention(self) -> Tensor:
        """(F, H, W). ValueError if no layer was seen."""
        if not self.layers:
            raise ValueError(
                "layers: none of them has cross-attention at a fine resolution; name blocks, such as d1,u1"
            )
        return self.total / self.layers

    def __call__(self, call: AttentionCall) -> None:
        wanted = call.level <= COARSEST if self.blocks is None else call.layer.block in self.blocks
        if call.kind not in self.kinds or not wanted:
            return
        first, keys = self._text_of(call)
        if call.run.text == "last" and keys > self.length:
            first, keys = first + keys - self.length, self.length
        if keys % self.length and not (call.run.text == "cropped" and max(self.places) < keys < self.length):
            raise ValueError(
                f"positive: the regional prompt has {self.length} text tokens, but attention sees {keys}; remove a "
                f"node that changes the prompt inside the model"
            )
        share = torch.zeros_like(call.value)  # attention to what says 1 at the words and 0 elsewhere is their weight
        share[:, :, [first + place + turn for turn in range(0, keys, self.length) for place in self.places], 0] = 1
        masked = {} if call.mask is None else {"attn_mask": call.mask}
        weight = call.attend(call.query, call.key, share, scale=call.scale, asking="a probe", **masked)[..., 0].mean(1)
        frames, height, width = call.grid
        tokens = height * width if call.run.patch is None else frames * height * width
        if call.run.patch is not None and weight.shape[1] > tokens:
            before, clip, _ = call.parts(call.query)
            weight = weight[:, before : before + clip]
        weight = pad(weight, (call.first, tokens - call.first - weight.shape[1]))  # of some queries at a time
        maps = weight.float().cpu().view(frames, 1, height, width)
        self.total = self.total + interpolate(maps, self.size, mode="bilinear")[:, 0]
        self.layers += call.first == 0

    def _text_of(self, call: AttentionCall) -> tuple[int, int]:
        """Where the prompt begins among the keys, and how many tokens it has."""
        if call.kind == "cross":
            return 0, call.key.shape[2]
        before, clip, after = call.parts(call.key)
        return (before + clip, after) if call.run.clip_at == "first" else (0, before)


def share_inside(attention: Tensor, layout: Layout, words: str, time: FrameMap) -> float | None:
    """Share of the attention (F, H, W) to words that lies in the regions whose phrase holds them; None: no such.

    time: of the clip; F: its frames, or its latent's.
    """
    places = set(positions_in(layout, words))
    masks = [r.mask for r, own in zip(layout.regions, layout.positions, strict=True) if places & set(own)]
    if not masks:
        return None
    sized = [interpolate(m.float().reshape(1, -1, *m.shape[-2:]), attention.shape[1:])[0] for m in masks]
    shown = time.in_clip if len(attention) == time.clip else partial(time.in_latents, how="mean")
    inside = torch.stack([shown(m, subject=MASKS) for m in sized]).amax(0).to(attention)
    return float((attention * inside).sum() / attention.sum().clamp_min(torch.finfo(torch.float32).tiny))
