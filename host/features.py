"""What losses on attention need, collected while a model runs: features of the STR score, and keys."""

from collections.abc import Iterable

import torch
from torch import Tensor

from ..core.attention_scores import HIDDEN
from ..core.relevance import AttentionFeatures
from .attention_call import AttentionCall
from .attention_tap import EnoughSeen, Listener
from .families import IN_SPACE
from .layers import attention_layers, select_blocks


class FeatureRecorder:
    """A listener that keeps what STR needs: spatial query and key, and the temporal map that follows on that grid.

    Of attention that spans the frames itself, query and key of the clip's tokens and the keys of all others.
    blocks: block names to keep; None keeps every grid but the finest, as the paper does. last: path of the spatial
    layer after whose partner the run may end. One prompt a run. `tensors` holds what was kept by "path part"; block
    checkpointing exchanges them for ones that carry gradients. `grids`: (F, h, w) of the layers in `features`.
    """

    def __init__(self, blocks: frozenset[str] | None, last: str | None = None):
        self._blocks, self._last = blocks, last
        self._waiting: AttentionCall | None = None
        self._partners: dict[str, str] = {}
        self._scales: dict[str, float] = {}
        self.grids: dict[str, tuple[int, int, int]] = {}
        self._unpaired: list[str] = []
        self.tensors: dict[str, Tensor] = {}

    @property
    def unpaired(self) -> list[str]:
        """Wanted spatial layers that no temporal attention on their grid followed."""
        return self._unpaired + ([self._waiting.layer.path] if self._waiting else [])

    @property
    def features(self) -> dict[str, AttentionFeatures]:
        """By path of the spatial layer, in the order of the run."""
        return {path: self._features(path, partner) for path, partner in self._partners.items()}

    def __call__(self, call: AttentionCall) -> None:
        wanted = not call.at_latent_resolution if self._blocks is None else call.layer.block in self._blocks
        if call.over_time:
            if wanted:
                self._keep(call, call.layer.path)
        elif call.kind == "spatial":
            self._unpaired = self.unpaired
            self._waiting = call if wanted else None
            if wanted:
                self.tensors |= _tensors_of(call)
        elif call.kind == "temporal" and self._waiting is not None and call.grid == self._waiting.grid:
            self._pair(self._waiting, call)

    def replay(self, names: Iterable[str]) -> Listener:
        """A listener for a second run of some layers: it keeps again the tensors of these names, in `tensors`."""
        wanted = frozenset(names)

        def listen(call: AttentionCall) -> None:
            again = {name: tensor for name, tensor in _tensors_of(call).items() if name in wanted}
            self.tensors.update(again)
            if again and call.layer.path == self._partners.get(self._last):
                raise EnoughSeen

        return listen

    def _pair(self, spatial: AttentionCall, temporal: AttentionCall) -> None:
        self._waiting = None
        self.tensors |= _tensors_of(temporal)
        self._keep(spatial, temporal.layer.path)

    def _keep(self, call: AttentionCall, partner: str) -> None:
        path = call.layer.path
        self._scales[path], self.grids[path], self._partners[path] = call.scale, call.grid, partner
        if partner == path:  # else they are kept, and a block that is recomputed has given them a graph
            self.tensors |= _tensors_of(call)
        if path == self._last:
            raise EnoughSeen

    def _features(self, path: str, partner: str) -> AttentionFeatures:
        query, key = (self.tensors[f"{path} {part}"] for part in ("query", "key"))
        if partner == path:
            extra = self.tensors.get(f"{path} extra")
            return AttentionFeatures(query, key, None, self._scales[path], None if extra is None else extra[0])
        maps, heads = self.tensors[f"{partner} map"], query.shape[1]
        if maps.shape[1] != heads:
            maps = maps.mean(1, keepdim=True).expand(-1, heads, -1, -1)
        return AttentionFeatures(query, key, maps, self._scales[path])


def key_blocks(model, layers: str = "") -> frozenset[str]:
    """The blocks whose keys are compared: those named, or all on the way up, of a transformer the later half.

    ValueError for what the model has not.
    """
    blocks = {layer.block for layer in attention_layers(model).values() if layer.kind in IN_SPACE}
    if layers.strip():
        return select_blocks(layers, blocks)
    main = [name for name in blocks if not name.startswith("v")]  # not those of VACE's control video
    later = sorted(main, key=lambda name: (name[0], int(name[1:])))[len(main) // 2 :]
    return frozenset(block for block in blocks if block.startswith("u")) or frozenset(later)


class KeyRecorder:
    """A listener that keeps the keys of spatial self-attention. One prompt a run.

    blocks: names of those to look at. `tensors` holds keys (F, N, C), heads side by side, by "path keys", for block
    checkpointing to exchange.
    """

    def __init__(self, blocks: frozenset[str]):
        self._blocks = blocks
        self.tensors: dict[str, Tensor] = {}

    @property
    def keys(self) -> dict[str, Tensor]:
        """Those of `tensors` that are keys: beside other recorders there are others."""
        return {name: t for name, t in self.tensors.items() if name.endswith(" keys")}

    def __call__(self, call: AttentionCall) -> None:
        self.tensors.update(self._taken(call))

    def replay(self, names: Iterable[str]) -> Listener:
        """A listener for a second run of some layers: it keeps again the tensors of these names."""
        wanted = frozenset(names)

        def listen(call: AttentionCall) -> None:
            self.tensors.update({name: t for name, t in self._taken(call).items() if name in wanted})

        return listen

    def _taken(self, call: AttentionCall) -> dict[str, Tensor]:
        if call.kind not in IN_SPACE or call.layer.block not in self._blocks:
            return {}
        keys = call.per_frame.of_clip(call.per_frame.key)
        return {f"{call.layer.path} keys": keys.transpose(1, 2).flatten(2)}


class Recorders:
    """Several recorders as one, with one store of tensors."""

    def __init__(self, *recorders):
        self._recorders = recorders
        self.tensors = {}

    @property
    def tensors(self) -> dict[str, Tensor]:
        return self._tensors

    @tensors.setter
    def tensors(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors
        for recorder in self._recorders:
            recorder.tensors = tensors

    def __call__(self, call: AttentionCall) -> None:
        for recorder in self._recorders:
            recorder(call)

    def replay(self, names: Iterable[str]) -> Listener:
        names = tuple(names)

        def listen(call: AttentionCall) -> None:
            for recorder in self._recorders:
                recorder.replay(names)(call)

        return listen


def _tensors_of(call: AttentionCall) -> dict[str, Tensor]:
    """What a call contributes: query and key (F, H, N, D), or its map (N, H, F, F), or other keys (1, H, E, D)."""
    call = call.per_frame
    path = call.layer.path
    if call.kind == "temporal":
        work = torch.promote_types(call.query.dtype, torch.float32)
        logits = call.query.to(work) @ call.key.to(work).mT * call.scale
        if call.mask is not None:
            logits = logits + call.mask.to(work)
        return {f"{path} map": torch.softmax(logits, -1)}
    if call.kind != "spatial" and not call.over_time:
        return {}
    found = {f"{path} query": call.of_clip(call.query), f"{path} key": call.of_clip(call.key)}
    if call.kind == "spatial":
        return found
    return found | {f"{path} extra": _seen(call, call.extra(call.key))}


def _seen(call: AttentionCall, extra: Tensor) -> Tensor:
    """Of the keys that are not the clip's those that no mask hides; of one prompt."""
    if call.mask is None:
        return extra
    hidden = call.extra(call.mask[:1, :, :1].mT)[0, 0, :, 0] <= HIDDEN
    return extra[:, :, ~hidden]
