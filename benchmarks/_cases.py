"""Clips of the shape world with their edits, and the figures of merit of an edited clip. No model, no host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from ..core.metrics import psnr_db
from ..tools.shape_world import instruments, variety, world

COPY, NOISE, CEILING, SWAP = "unedited copy", "random noise", "true edit through VAE", "prompt swap"
"""Rows of every table."""

OBJECT_EDITS = ("colour", "shape")
DELETE, ADD = "delete", "add"
KEPT = ("kept_region_psnr_db", "kept_region_psnr_vs_vae_db")
FASTEST_SHARE = 0.25
SMALLEST, LARGEST = 0.6, 1.6
FIRST_REGION_DILATION_PX = 2


@dataclass(frozen=True)
class Case:
    """One clip and its edit. group: the heading of its figures; index: the edited object (background: no meaning).

    crossing: objects change sides, so the instruments know them by colour instead of by their half.
    """

    group: str
    kind: str
    index: int
    seed: int
    source: world.Scene
    target: world.Scene
    crossing: bool = False

    @property
    def edited_masks(self) -> Tensor:
        """(1, F, 64, 64) in [0, 1]: what is seen of the edited object, or all that is no object."""
        masks = world.render(self.target if self.kind == ADD else self.source)[1]
        return 1 - masks.amax(0, keepdim=True) if self.kind == "background" else visible(masks, self.index)

    @property
    def wanted_masks(self) -> Tensor:
        """(K, F, 64, 64) in [0, 1]: where the objects of the true edit are; its shapes have other centres of mass."""
        return world.render(self.target)[1]

    @property
    def colours(self) -> instruments.Colours | None:
        """For each object its colours before and after the edit; None: found by its place."""
        if not self.crossing:
            return None
        return [{o.colour, p.colour} for o, p in zip(self.source.objects, self.target.objects, strict=True)]


@dataclass(frozen=True)
class Chain:
    """A clip of two objects whose left one is edited first and whose right one second."""

    group: str
    kind: str
    seed: int
    source: world.Scene
    middle: world.Scene
    target: world.Scene

    def masks(self, *indices: int) -> Tensor:
        """(F, 64, 64) in [0, 1]: these objects of the source clip."""
        return world.render(self.source)[1][list(indices)].amax(0)


def visible(masks: Tensor, index: int) -> Tensor:
    """(1, F, 64, 64): what is seen of one object."""
    return world.visible_masks(masks)[index, None]


# --- sampling ---------------------------------------------------------


def make_cases(
    group: str,
    seed: int,
    n: int,
    objects: int = 1,
    kinds: Sequence[str] = OBJECT_EDITS,
    *,
    frames: int = world.FRAMES,
) -> list[Case]:
    """n cases of 1 or 2 objects, the kinds of edit and the edited objects in turn; frames only change the speed."""

    def sample(generator: np.random.Generator) -> world.Scene:
        return world.sample_scene(generator, objects, frames=frames)

    return _sampled(group, np.random.default_rng([seed, objects]), n, objects, kinds, sample)


def growing_cases(group: str, seed: int, n: int) -> list[Case]:
    """n cases of one object that grows or shrinks to 0.6 to 1.6 times its size, and changes its shape.

    The model knows objects of one size only; what changes is the outline to follow.
    """
    generator = np.random.default_rng([seed, 6])

    return _sampled(group, generator, n, 1, ("shape",), _growing)


def _growing(generator: np.random.Generator) -> world.Scene:
    scene = world.sample_scene(generator, 1)
    growth = float(np.exp(generator.uniform(np.log(SMALLEST), np.log(LARGEST))))
    return replace(scene, objects=(replace(scene.objects[0], growth=growth),))


def _curved(generator: np.random.Generator) -> world.Scene:
    return variety.sample(generator, "one", motion="curved")


def _bouncing(generator: np.random.Generator) -> world.Scene:
    """From one side to the other in two arcs of 16 to 24 px."""
    scene = world.sample_scene(generator, 1)
    thing, frames = scene.objects[0], len(scene.objects[0].centres)
    side, margin, height = generator.choice((-1, 1)), thing.radius + 1, generator.uniform(16, 24)
    across = world.SIZE / 2 + side * np.linspace(-1, 1, frames) * min(12.0, world.SIZE / 2 - margin)
    up = height * np.abs(np.sin(2 * np.pi * np.linspace(0, 1, frames)))
    ground = generator.uniform(margin + height, world.SIZE - margin)
    centres = tuple((float(x), float(ground - y)) for x, y in zip(across, up, strict=True))
    return replace(scene, objects=(replace(thing, centres=centres),))


MOTIONS = {"on a curve": _curved, "bouncing": _bouncing, "changing size": _growing}


def moving_cases(motion: str, seed: int, n: int) -> list[Case]:
    """n cases of one object in one of `MOTIONS`, with colour and shape edits in turn."""
    return _sampled(motion, np.random.default_rng([seed, 8]), n, 1, OBJECT_EDITS, MOTIONS[motion])


def fast_cases(group: str, seed: int, n: int) -> list[Case]:
    """The n fastest of 4 n cases of one object."""
    cases = make_cases(group, seed, round(n / FASTEST_SHARE))
    return sorted(cases, key=lambda case: case.source.travel_px, reverse=True)[:n]


def crossing_cases(group: str, seed: int, n: int) -> list[Case]:
    """n cases of two objects that change sides."""
    cases = _sampled(group, np.random.default_rng([seed, 3]), n, 2, OBJECT_EDITS, world.sample_crossing)
    return [replace(case, crossing=True) for case in cases]


def deletion_cases(group: str, seed: int, n: int, kind: str = DELETE) -> list[Case]:
    """n cases of two objects of which one goes, the left and the right one in turn; "add": of the way back."""
    generator, made = np.random.default_rng([seed, 5]), []
    for i in range(n):
        both = world.sample_scene(generator, 2)
        alone = replace(both, objects=(both.objects[1 - i % 2],))
        source, target = (alone, both) if kind == ADD else (both, alone)
        made.append(Case(group, kind, i % 2, int(generator.integers(1 << 31)), source, target))
    return made


def chains(group: str, seed: int, n: int) -> list[Chain]:
    """n clips of two objects, a colour or a shape edit of the left one, then one of the right one."""
    generator, made = np.random.default_rng([seed, 4]), []
    for i in range(n):
        first, second = OBJECT_EDITS[i % 2], OBJECT_EDITS[i // 2 % 2]
        source = world.sample_scene(generator, 2)
        middle = world.sample_edit(source, first, generator, 0)
        target = world.sample_edit(middle, second, generator, 1)
        made.append(Chain(group, f"{first}, {second}", int(generator.integers(1 << 31)), source, middle, target))
    return made


def _sampled(
    group: str,
    generator: np.random.Generator,
    n: int,
    objects: int,
    kinds: Sequence[str],
    sample: Callable[[np.random.Generator], world.Scene],
) -> list[Case]:
    cases = []
    for i in range(n):
        kind, index = kinds[i % len(kinds)], i // len(kinds) % objects
        source = sample(generator)
        target = world.sample_edit(source, kind, generator, index)
        cases.append(Case(group, kind, index, int(generator.integers(1 << 31)), source, target))
    return cases


# --- measuring --------------------------------------------------------


def measure(case: Case, frames: Tensor, reconstruction: Tensor) -> dict[str, float]:
    """Figures of merit of an edited clip; `reconstruction` is the source clip through the VAE.

    A background edit keeps no region, so its PSNR figures are left out; objects that cross touch, so they are not
    counted.
    """
    source, _ = world.render(case.source)
    target, colours = case.target.description, case.colours
    figures = {
        "trajectory_error_px": instruments.trajectory_error_px(frames, case.wanted_masks, colours),
        "colour_accuracy": instruments.colour_accuracy(frames, target, colours),
        "shape_accuracy": instruments.shape_accuracy(frames, target, colours),
        "background_accuracy": instruments.background_accuracy(frames, target),
    }
    if not case.crossing:
        figures["count_accuracy"] = instruments.count_accuracy(frames, len(target.objects))
    if case.kind != "background":
        for name, reference in zip(KEPT, (source, reconstruction), strict=True):
            figures[name] = instruments.kept_region_psnr_db(frames, reference, case.edited_masks)
    return figures


def measure_chain(chain: Chain, edited: tuple[Tensor | None, Tensor], reconstruction: Tensor) -> dict[str, float]:
    """Figures of two edits: `edited` is the clip after the first (None: both at once) and after the second.

    An object is right if its colour and its shape are. first_psnr_db: the second edit's clip against the first's,
    around the left object.
    """
    after_first, frames = edited
    source, masks = world.render(chain.source)
    left, right = instruments.identify(frames, 2)
    figures = {
        "first_right": float(left == chain.target.description.objects[0]),
        "second_right": float(right == chain.target.description.objects[1]),
        "trajectory_error_px": instruments.trajectory_error_px(frames, world.render(chain.target)[1]),
        KEPT[0]: instruments.kept_region_psnr_db(frames, source, masks),
        KEPT[1]: instruments.kept_region_psnr_db(frames, reconstruction, masks),
    }
    if after_first is not None:
        region = 1 - instruments.kept_region(masks[:1], FIRST_REGION_DILATION_PX)
        left = instruments.identify(after_first, 2)[0]
        figures["first_right_before"] = float(left == chain.middle.description.objects[0])
        figures["first_psnr_db"] = psnr_db(frames, after_first, region[:, None])
    return figures
