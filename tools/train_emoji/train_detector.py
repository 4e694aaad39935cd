"""Train the network that says what a clip of the emoji world shows (`emoji_world.instruments`).

    python tools/train_emoji/train_detector.py --vae FOLDER [--minutes 10] [--check]

Half of its pictures are renders, half are what the VAE in FOLDER/vae makes of renders, all blurred and noisy. Its
accuracy on held-out clips, as they are and through the VAE, is printed, and the weights are written where the
instruments read them unless they are worse on the latter than the weights that are there.
"""
# ruff: noqa: E402 (the pack is loaded before it is imported)

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import cross_entropy, interpolate

sys.path.append(str(Path(__file__).resolve().parents[1]))
from pack import load_pack

load_pack(host=False)

from spacetime_edit.tools.emoji_world import instruments, variety, world
from spacetime_edit.tools.emoji_world.instruments import CELL, Detector
from spacetime_edit.tools.shape_world.world import visible_masks
from spacetime_edit.tools.train_tiny.parts import decode, encode, read_vae

CELLS = world.SIZE // CELL
EMPTY_SHARE = 0.06
SEEN = 0.45
"""Of a thing's area that must be seen; a thing of less, but more than `UNSEEN`, is neither asked for nor forbidden."""
UNSEEN = 0.1
LEAST = (SEEN, UNSEEN)
HELD_OUT_SEED = 30_000
HELD_OUT_CLIPS = 96
HELD_OUT_KINDS = ("one", "sides", "heights", "pair", "same")


def labelled(generator: np.random.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """A frame (3, 64, 64); heat (8, 16, 16) in [0, 1]; weight (16, 16); place (3, 16, 16): x and y in the cell, and 1
    where a centre is; and the number of the background."""
    scene = variety.sample(generator)
    i = int(generator.integers(world.FRAMES))
    objects = tuple(world.Object(o.thing, o.poses[i : i + 1]) for o in scene.objects)
    if generator.random() < EMPTY_SHARE:
        objects = ()
    heat, weight, place = (
        torch.zeros(len(world.THINGS), CELLS, CELLS),
        torch.ones(CELLS, CELLS),
        torch.zeros(3, CELLS, CELLS),
    )
    number = list(world.BACKGROUNDS).index(scene.background)
    if not objects:
        return world.backdrop_image(scene), heat, weight, place, number
    frames, masks = world.render(world.Scene(scene.background, objects, scene.places, scene.horizon, scene.seed))
    areas = visible_masks(masks)[:, 0].sum((1, 2))
    y, x = torch.meshgrid(torch.arange(CELLS) + 0.5, torch.arange(CELLS) + 0.5, indexing="ij")
    for obj, seen in zip(objects, areas, strict=True):
        pose = obj.poses[0]
        share = float(seen) / whole_area(obj.thing, pose)
        u, v = (float(np.clip(c / CELL, 0.01, CELLS - 0.01)) for c in (pose.x, pose.y))
        bump = torch.exp(-((x - u) ** 2 + (y - v) ** 2) / 2)
        if share < SEEN:
            if share > UNSEEN:
                weight = weight * (bump < 0.05)
            continue
        column, row, kind = int(u), int(v), world.THINGS.index(obj.thing)
        heat[kind] = torch.maximum(heat[kind], bump)
        heat[kind, row, column] = 1.0
        place[:, row, column] = torch.tensor([u - column, v - row, 1.0])
        weight[row, column] = 1.0
    return frames[0], heat, weight, place, number


def whole_area(thing: str, pose: world.Pose) -> float:
    """Px that a thing would cover if nothing cut it."""
    moved = pose._replace(x=world.SIZE / 2, y=world.SIZE / 2)
    return float(world.draw_thing(thing, moved)[..., 3].sum()) / 255


def batch_of(generator: np.random.Generator, n: int) -> tuple[Tensor, ...]:
    columns = zip(*(labelled(generator) for _ in range(n)), strict=True)
    *tensors, numbers = columns
    return (*(torch.stack(x) for x in tensors), torch.tensor(numbers))


def roughened(frames: Tensor) -> Tensor:
    """Blurred, of another brightness, and noisy, each frame in its own way."""
    n = len(frames)
    small = interpolate(frames, scale_factor=0.5, mode="bilinear", antialias=True)
    blurred = interpolate(small, scale_factor=2, mode="bilinear")
    frames = torch.lerp(frames, blurred, torch.rand(n, 1, 1, 1))
    frames = frames * (1 + 0.08 * torch.randn(n, 1, 1, 1)) + 0.03 * torch.randn(n, 3, 1, 1)
    return (frames + 0.05 * torch.rand(n, 1, 1, 1) * torch.randn_like(frames)).clamp(0, 1)


def loss_of(network: Detector, batch: tuple[Tensor, ...]) -> Tensor:
    """CenterNet's focal loss (Zhou et al. 2019) of centres, L1 of their places, cross entropy of the background."""
    frames, heat, weight, place, number = batch
    logits, places, behind = network(frames)
    chance = logits.sigmoid().clamp(1e-4, 1 - 1e-4)
    at = heat == 1
    focal = torch.where(at, (1 - chance) ** 2 * chance.log(), (1 - heat) ** 4 * chance**2 * (1 - chance).log())
    centres = -(focal * weight[:, None]).sum() / at.sum()
    there = place[:, 2:]
    distance = ((places - place[:, :2]).abs() * there).sum() / there.sum()
    return centres + 0.5 * distance + cross_entropy(behind, number)


@torch.no_grad()
def through(vae, frames: Tensor, noise: float = 0.1) -> Tensor:
    """What the VAE makes of frames (B, 3, 64, 64), of slightly noisy latents."""
    latents = torch.cat([encode(vae, part) for part in frames.split(32)])
    latents = latents + noise * torch.rand(len(latents), 1, 1, 1) * torch.randn_like(latents)
    return torch.cat([decode(vae, part) for part in latents.split(32)])


def in_view(scene: world.Scene, masks: Tensor) -> list[tuple[list[str], list[str]]]:
    """Of each frame the things that must be found, and those that may be: `SEEN` and `UNSEEN`."""
    areas = visible_masks(masks).sum((2, 3))
    shares = [
        [float(area) / whole_area(o.thing, pose) for area, pose in zip(of_one, o.poses, strict=True)]
        for of_one, o in zip(areas, scene.objects, strict=True)
    ]
    things = [o.thing for o in scene.objects]
    return [
        tuple(sorted(thing for thing, share in zip(things, of_frame, strict=True) if share > least) for least in LEAST)
        for of_frame in zip(*shares, strict=True)
    ]


def held_out(vae, network: Detector, clips: int = HELD_OUT_CLIPS) -> dict[str, dict[str, float]]:
    """Mean attributes of held-out clips of `HELD_OUT_KINDS`, and share of frames without a mistake; also by the VAE."""
    generator = np.random.default_rng(HELD_OUT_SEED)
    rows: dict[str, list[dict[str, float]]] = {"renders": [], "through the VAE": []}
    for i in range(clips):
        scene = variety.sample(generator, HELD_OUT_KINDS[i % len(HELD_OUT_KINDS)])
        frames, masks = world.render(scene)
        right = in_view(scene, masks)
        for name, shown in (("renders", frames), ("through the VAE", through(vae, frames, 0.0))):
            row = instruments.attributes(shown, scene.description, network)
            seen = instruments.look(shown, network).frames
            named = [sorted(f.thing for f in of_frame) for of_frame in seen]
            row["a frame's things"] = float(np.mean([of in either for of, either in zip(named, right, strict=True)]))
            row["px"] = instruments.trajectory_error_px(shown, [o.centres for o in scene.objects], network)
            rows[name].append(row)
    names = ("thing", "background", "places", "all", "count", "a frame's things", "px")
    return {
        label: {name: float(np.mean([row[name] for row in of_all if name in row])) for name in names}
        for label, of_all in rows.items()
    }


def train(network: Detector, vae, arguments: argparse.Namespace) -> None:
    generator = np.random.default_rng(arguments.seed)
    torch.manual_seed(arguments.seed)
    pool = batch_of(generator, arguments.pool)
    pool = (through(vae, pool[0]), *pool[1:])
    print(f"{arguments.pool} frames through the VAE", flush=True)
    optimiser = torch.optim.AdamW(network.parameters(), 3e-3, weight_decay=1e-2)
    began, step = time.monotonic(), 0
    while (done := (time.monotonic() - began) / (60 * arguments.minutes)) < 1:
        optimiser.param_groups[0]["lr"] = 3e-3 * min(1.0, (step + 1) / 50) * max(0.01, 1 - done)
        chosen = torch.from_numpy(generator.integers(arguments.pool, size=arguments.batch // 2))
        fresh = batch_of(generator, arguments.batch // 2)
        batch = [torch.cat([mine, of_pool[chosen]]) for mine, of_pool in zip(fresh, pool, strict=True)]
        loss = loss_of(network, (roughened(batch[0]), *batch[1:]))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        step += 1
        if step % 50 == 0:
            print(f"step {step}, {100 * done:.0f} %, loss {float(loss):.4f}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae", type=Path, required=True, help="folder with vae/")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--pool", type=int, default=2048, help="frames that go through the VAE once")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--check", action="store_true", help="only measure the weights that are there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    vae = read_vae(arguments.vae).eval().requires_grad_(False)
    there = measured(vae, instruments.detector(), "there") if instruments.WEIGHTS.is_file() else 0.0
    if arguments.check:
        return 0
    network = Detector()
    train(network.train(), vae, arguments)
    if there > measured(vae, network.eval(), "new"):
        print(f"{instruments.WEIGHTS.name} is kept")
        return 1
    state = {name: value.half().contiguous() for name, value in network.state_dict().items()}
    save_file(state, instruments.WEIGHTS)
    instruments.WEIGHTS.chmod(0o644)
    return 0


def measured(vae, network: Detector, name: str) -> float:
    """Prints a network's accuracy; returns the share of frames without a mistake, through the VAE."""
    score = held_out(vae, network)
    for label, row in score.items():
        print(f"{name}, {label}:", *(f"{key} {value:.3f}" for key, value in row.items()), flush=True)
    return score["through the VAE"]["a frame's things"]


if __name__ == "__main__":
    sys.exit(main())
