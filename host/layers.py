"""The attention modules of a network, by path, and the names of the blocks that they sit in."""

import re
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from torch.nn import Module

from .families import IN_SPACE, AttentionKind, Family, family_of

SIDES = {
    "down": "d",
    "input": "d",
    "mid": "m",
    "middle": "m",
    "up": "u",
    "output": "u",
    "transformer_in": "i",
    "blocks": "b",
    "double_blocks": "b",
    "transformer_blocks": "b",
    "visual_transformer_blocks": "b",
    "single_blocks": "s",
    "vace_blocks": "v",
}
"""The letter of a block's name, by how its path begins."""


@dataclass(frozen=True)
class Layer:
    """One attention module: its path in the diffusion model, its kind, and the block (d0, m0, u3) it sits in."""

    path: str
    kind: AttentionKind
    block: str


_layers: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # by network: every step asks, and a walk takes time


def attention_layers(model) -> Mapping[str, Layer]:
    """All attention modules of a ModelPatcher by path, in the order of the network's modules."""
    family, network = family_of(model), model.model.diffusion_model
    return _with_guests(family, model) if family.injected is not None else layers_in(family, network)


def layers_in(family: Family, network: Module) -> Mapping[str, Layer]:
    """All attention modules of a network by path, in the order of its modules."""
    if network not in _layers:
        _layers[network] = MappingProxyType(_find_layers(family, network))
    return _layers[network]


def _with_guests(family: Family, model) -> Mapping[str, Layer]:
    """The same of a network that hosts another pack's modules while it runs: they come in for a look."""
    network = model.model.diffusion_model
    if any(re.fullmatch(family.injected[1], path) for path, _ in network.named_modules()):
        return MappingProxyType(_find_layers(family, network))
    model.inject_model()
    try:
        return MappingProxyType(_find_layers(family, network))
    finally:
        model.eject_model()


def _find_layers(family: Family, network: Module) -> dict[str, Layer]:
    found = []
    for path, _ in network.named_modules():
        for kind, pattern in family.attention:
            if match := re.fullmatch(pattern, path):
                side, *numbers = match.groups()
                found.append((path, kind, SIDES[side], tuple(int(n or 0) for n in numbers)))
    in_space = {(side, numbers) for _, kind, side, numbers in found if kind in IN_SPACE}
    names: dict[tuple, str] = {}
    counts: dict[str, int] = {}
    for place in sorted({(side, numbers) for _, _, side, numbers in found}):
        letter = place[0] if place in in_space or place[0] == SIDES["transformer_in"] else "t"
        names[place] = f"{letter}{counts.setdefault(letter, 0)}"
        counts[letter] += 1
    return {path: Layer(path, kind, names[side, numbers]) for path, kind, side, numbers in found}


def parse_blocks(selection: str) -> dict[str, set[str]]:
    """The blocks that each item of a list such as "d1-d2,m0,u0-u1" names; ValueError for what is no such list."""
    named = {}
    for item in filter(None, (part.strip() for part in selection.split(","))):
        match = re.fullmatch(r"([a-z])(\d{1,3})(?:-\1?(\d{1,3}))?", item)
        names = {f"{match[1]}{n}" for n in range(int(match[2]), int(match[3] or match[2]) + 1)} if match else set()
        if not names:
            raise ValueError(f"layers: {item!r} is not a block or a range of blocks; write for example d1-d2,m0,u0-u1")
        named[item] = names
    return named


def select_blocks(selection: str, blocks: Iterable[str]) -> frozenset[str]:
    """Block names of a list such as "d1-d2,m0,u0-u1"; ValueError naming what is unknown and what there is."""
    known = set(blocks)
    named = parse_blocks(selection)
    for item, names in named.items():
        if missing := names - known:
            asked, there = ", ".join(sorted(missing)), ", ".join(sorted(known))
            raise ValueError(
                f"layers: {item!r} asks for {asked}; this model has {there} (empty: the node's own choice)"
            )
    return frozenset().union(*named.values())
