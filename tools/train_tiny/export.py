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
from spacetime_edit.tools.train_tiny.parts import SCHEDULE, make_text_encoder, make_unet, read_vae
from spacetime_edit.tools.train_tiny.words import END_OF_WORD, VOCABULARY, WORDS, token_ids, write_tokenizer
from transformers import CLIPTextModel, CLIPTokenizer

MAX_BYTES = 10 * 2**20
CAPTIONS_CHECKED = 400
PREFIX = "text_model."


def trained_parts(run: Path) -> tuple[UNet3DConditionModel, CLIPTextModel, dict]:
    """The U-Net and the text encoder of RUN/best.pt, and that checkpoint."""
    saved = checkpoints.load(run / "best.pt")
    configuration = saved["configuration"]
    attends = configuration.get("blocks", ["DownBlock3D"])[-1].startswith("CrossAttn")
    unet, text = make_unet(configuration["channels"], configuration["head"], attends), make_text_encoder()
    for name, part in (("unet", unet), ("text", text)):
        weights = saved["weights"].items()
        own = {k.removeprefix(f"{name}."): v for k, v in weights if k.startswith(f"{name}.")}
        part.load_state_dict({k.removeprefix(PREFIX): v for k, v in own.items()})  # of older transformers
    return unet.eval(), text.eval(), saved


@torch.no_grad()
def silence_pieces(text: CLIPTextModel) -> None:
    """Zero the embeddings of letters and pieces of words, which no caption held."""
    words = {VOCABULARY[word + END_OF_WORD] for word in WORDS} | {0, 1}
    table = text.get_input_embeddings().weight
    table[[number for number in VOCABULARY.values() if number not in words]] = 0


def add_prefix(path: Path) -> None:
    """Give the text encoder's keys the classic prefix that every reader knows."""
    state = load_file(path)
    if not all(key.startswith(PREFIX) for key in state):
        save_file({PREFIX + key: value for key, value in state.items()}, path, metadata={"format": "pt"})


def write(run: Path, folder: Path) -> dict:
    """The folder; what `training.json` says."""
    unet, text, saved = trained_parts(run)
    silence_pieces(text)
    write_tokenizer(folder / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    pipeline = TextToVideoSDPipeline(
        vae=read_vae(run).half(),
        text_encoder=text.half(),
        tokenizer=tokenizer,
        unet=unet.half(),
        scheduler=DDIMScheduler(**SCHEDULE),
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    write_tokenizer(folder / "tokenizer")  # the classic files beside the one that this version of the library prefers
    add_prefix(folder / "text_encoder" / "model.safetensors")
    for path in folder.rglob("*.safetensors"):
        path.chmod(0o644)
    for path in folder.rglob("config.json"):  # without the folder that a part was read from
        entries = json.loads(path.read_text(encoding="utf-8"))
        if entries.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
    about = {"held_out_loss": -saved["score"], "step": saved["step"], "minutes": round(saved["seconds"] / 60, 1)}
    (folder / "training.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    return about


def check(run: Path, folder: Path) -> None:
    """Raises ValueError where the folder does not read back as it was written."""
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if size > MAX_BYTES:
        raise ValueError(f"{folder} has {size} bytes, more than {MAX_BYTES}")
    pipeline = TextToVideoSDPipeline.from_pretrained(folder, torch_dtype=torch.float32, low_cpu_mem_usage=False)
    generator = np.random.default_rng(0)
    for caption in ("", *(world.caption(variety.sample(generator)) for _ in range(CAPTIONS_CHECKED))):
        options = {"padding": "max_length", "max_length": pipeline.tokenizer.model_max_length, "truncation": True}
        if pipeline.tokenizer(caption, **options).input_ids != token_ids(caption):
            raise ValueError(f"the tokenizer reads {caption!r} in another way than the training did")
    unet, text, _ = trained_parts(run)
    silence_pieces(text)
    for name, part, read in (("unet", unet, pipeline.unet), ("text encoder", text, pipeline.text_encoder)):
        there = read.state_dict()
        for key, value in part.state_dict().items():
            if not torch.equal(value.half().float(), there[key]):
                raise ValueError(f"{name}: {key} is not what was written")
    print(f"{folder}: {size / 2**20:.2f} MiB")


def export(run: Path, folder: Path, force: bool = False) -> None:
    """Write and check the run's model, then put it in the folder's place.

    Raises CheckpointError where the folder's model has no higher held-out loss, unless force.
    """
    loss, there = -checkpoints.load(run / "best.pt")["score"], np.inf
    if (report := folder / "training.json").is_file():
        there = json.loads(report.read_text(encoding="utf-8"))["held_out_loss"]
    if loss >= there and not force:
        raise checkpoints.CheckpointError(f"{folder} has a held-out loss of {there:.5f}, {run} {loss:.5f}: it is kept")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        made = Path(scratch) / "model"
        print(write(run, made))
        check(run, made)
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
