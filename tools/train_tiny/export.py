"""Write the trained parts as one diffusers folder in fp16, and check that it reads back.

    python tools/train_tiny/export.py RUN FOLDER [--force]

RUN holds what `train_vae` and `train_unet` made; FOLDER is a new one, or an older model that this replaces, and which
is kept if the run's held-out loss, in FOLDER/training.json, is not lower (--force: replace it all the same).
"""
# ruff: noqa: E402 (the pack is loaded before it is imported)

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))
from pack import load_pack

load_pack(host=False)

from diffusers import DDIMScheduler, TextToVideoSDPipeline, UNet3DConditionModel
from safetensors.torch import load_file, save_file
from spacetime_edit.tools.shape_world import variety, world
from spacetime_edit.tools.train_tiny import checkpoints
from spacetime_edit.tools.train_tiny.parts import make_text_encoder, make_unet, read_vae, tidy
from spacetime_edit.tools.train_tiny.words import END_OF_WORD, SHAPE_WORLD, Vocabulary
from transformers import CLIPTextModel, CLIPTokenizer

CAPTIONS_CHECKED = 400
PREFIX = "text_model."


@dataclass(frozen=True)
class Kind:
    """What the models of one world have in common.

    caption: one of a random scene; max_bytes: of a folder.
    """

    vocabulary: Vocabulary
    caption: Callable[[np.random.Generator], str]
    max_bytes: int


TINY = Kind(SHAPE_WORLD, lambda generator: world.caption(variety.sample(generator)), 10 * 2**20)


def trained_parts(saved: Mapping, vocabulary: Vocabulary = SHAPE_WORLD) -> tuple[UNet3DConditionModel, CLIPTextModel]:
    """The U-Net and the text encoder of a checkpoint."""
    configuration = saved["configuration"]
    attends = configuration.get("blocks", ["DownBlock3D"])[-1].startswith("CrossAttn")
    unet = make_unet(configuration["channels"], configuration["head"], attends)
    text = make_text_encoder(vocabulary)
    for name, part in (("unet", unet), ("text", text)):
        weights = saved["weights"].items()
        own = {k.removeprefix(f"{name}."): v for k, v in weights if k.startswith(f"{name}.")}
        part.load_state_dict({k.removeprefix(PREFIX): v for k, v in own.items()})  # of older transformers
    silence_pieces(text, vocabulary)
    return unet.eval(), text.eval()


@torch.no_grad()
def silence_pieces(text: CLIPTextModel, vocabulary: Vocabulary) -> None:
    """Zero the embeddings of letters and pieces of words, which no caption held."""
    words = {vocabulary.numbers[word + END_OF_WORD] for word in vocabulary.words} | {0, 1}
    table = text.get_input_embeddings().weight
    table[[number for number in vocabulary.numbers.values() if number not in words]] = 0


def add_prefix(path: Path) -> None:
    """Give the text encoder's keys the classic prefix that every reader knows."""
    state = load_file(path)
    if not all(key.startswith(PREFIX) for key in state):
        save_file({PREFIX + key: value for key, value in state.items()}, path, metadata={"format": "pt"})


def write(saved: Mapping, vae, folder: Path, kind: Kind = TINY) -> dict:
    """The folder of a checkpoint and its VAE; what `training.json` says."""
    unet, text = trained_parts(saved, kind.vocabulary)
    kind.vocabulary.write_tokenizer(folder / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    pipeline = TextToVideoSDPipeline(
        vae=vae.half(),
        text_encoder=text.half(),
        tokenizer=tokenizer,
        unet=unet.half(),
        scheduler=DDIMScheduler(**saved["configuration"]["schedule"]),
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    # the classic files beside the one that this version of the library prefers
    kind.vocabulary.write_tokenizer(folder / "tokenizer")
    add_prefix(folder / "text_encoder" / "model.safetensors")
    tidy(folder)
    about = {"held_out_loss": -saved["score"], "step": saved["step"], "minutes": round(saved["seconds"] / 60, 1)}
    (folder / "training.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    return about


def check(saved: Mapping, folder: Path, kind: Kind = TINY) -> None:
    """Raises ValueError where the folder does not read back as it was written."""
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if size > kind.max_bytes:
        raise ValueError(f"{folder} has {size} bytes, more than {kind.max_bytes}")
    pipeline = TextToVideoSDPipeline.from_pretrained(folder, torch_dtype=torch.float32, low_cpu_mem_usage=False)
    generator = np.random.default_rng(0)
    for caption in ("", *(kind.caption(generator) for _ in range(CAPTIONS_CHECKED))):
        options = {"padding": "max_length", "max_length": pipeline.tokenizer.model_max_length, "truncation": True}
        if pipeline.tokenizer(caption, **options).input_ids != kind.vocabulary.token_ids(caption):
            raise ValueError(f"the tokenizer reads {caption!r} in another way than the training did")
    unet, text = trained_parts(saved, kind.vocabulary)
    for name, part, read in (("unet", unet, pipeline.unet), ("text encoder", text, pipeline.text_encoder)):
        there = read.state_dict()
        for key, value in part.state_dict().items():
            if not torch.equal(value.half().float(), there[key]):
                raise ValueError(f"{name}: {key} is not what was written")
    print(f"{folder}: {size / 2**20:.2f} MiB")


def export(run: Path, folder: Path, force: bool = False) -> None:
    """Put the model of RUN/best.pt in the folder's place, as `replace_folder` does."""
    replace_folder(checkpoints.load(run / "best.pt"), read_vae(run), run, folder, force=force)


def replace_folder(saved: Mapping, vae, run: Path, folder: Path, kind: Kind = TINY, force: bool = False) -> None:
    """Write and check the model of a checkpoint of `run`, then put it in the folder's place.

    Raises CheckpointError where the folder's model has no higher held-out loss, unless force.
    """
    loss, there = -saved["score"], np.inf
    if (report := folder / "training.json").is_file():
        there = json.loads(report.read_text(encoding="utf-8"))["held_out_loss"]
    if loss >= there and not force:
        raise checkpoints.CheckpointError(f"{folder} has a held-out loss of {there:.5f}, {run} {loss:.5f}: it is kept")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        made = Path(scratch) / "model"
        print(write(saved, vae, made, kind))
        check(saved, made, kind)
        if folder.exists():
            shutil.rmtree(folder)
        made.rename(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--force", action="store_true", help="replace a model of a lower loss, or of none")
    arguments = parser.parse_args()
    try:
        export(arguments.run, arguments.folder, arguments.force)
    except checkpoints.CheckpointError as reason:
        print(reason)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
