"""Attention features for the STR score, collected while a model runs."""

import torch

from ..core.relevance import AttentionFeatures
from .attention_tap import AttentionCall, EnoughSeen


class FeatureRecorder:
    """A listener that keeps what STR needs: spatial query and key, and the temporal map that follows on that grid.

    blocks: block names to keep; None keeps every grid but the finest, as the paper does. last: path of the layer after
    which the run may end. One prompt a run.
    """

    def __init__(self, blocks: frozenset[str] | None, last: str | None = None):
        self._blocks, self._last = blocks, last
        self._waiting: AttentionCall | None = None
        self._unpaired: list[str] = []
        self.features: dict[str, AttentionFeatures] = {}

    @property
    def unpaired(self) -> list[str]:
        """Wanted spatial layers that no temporal attention on their grid followed."""
        return self._unpaired + ([self._waiting.layer.path] if self._waiting else [])

    def __call__(self, call: AttentionCall) -> None:
        if call.kind == "spatial":
            self._unpaired = self.unpaired
            wanted = not call.at_latent_resolution if self._blocks is None else call.layer.block in self._blocks
            self._waiting = call if wanted else None
        elif call.kind == "temporal" and self._waiting is not None and call.grid == self._waiting.grid:
            self._pair(self._waiting, call)

    def _pair(self, spatial: AttentionCall, temporal: AttentionCall) -> None:
        work = torch.promote_types(temporal.query.dtype, torch.float32)
        logits = temporal.query.to(work) @ temporal.key.to(work).mT * temporal.scale
        maps = torch.softmax(logits, -1)
        heads = spatial.query.shape[1]
        if maps.shape[1] != heads:
            maps = maps.mean(1, keepdim=True).expand(-1, heads, -1, -1)
        self.features[spatial.layer.path] = AttentionFeatures(spatial.query, spatial.key, maps, spatial.scale)
        self._waiting = None
        if spatial.layer.path == self._last:
            raise EnoughSeen
