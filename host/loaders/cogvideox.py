"""CogVideoX's transformer as its authors release it (diffusers' names) as a MODEL of the host's own class.

The host loads CogVideoX under names of its own; released files have diffusers'. Text encoder (T5 XXL) and autoencoder
come from the host's loaders. Latents are [1,16,F,h,w].
"""

from __future__ import annotations

import logging
import re
from pathlib import Path

import comfy.sd
import comfy.utils
import folder_paths

from .diffusers_folder import ModelFolderError, read_shapes
from .unet3d import WEIGHT_DTYPES

log = logging.getLogger("spacetime_edit")

WHERE_TO_GET = (
    "Download the safetensors of the folder transformer of zai-org/CogVideoX-5b or CogVideoX1.5-5B on the Hugging Face "
    "hub into a folder of models/diffusion_models."
)
NAMES = {
    "transformer_blocks.": "blocks.",
    ".attn1.to_out.0.": ".attn_out.",
    ".attn1.to_": ".",
    ".attn1.": ".",
    ".ff.net.0.proj.": ".ff_proj.",
    ".ff.net.2.": ".ff_out.",
    "time_embedding.": "time_embedding_",
    "ofs_embedding.": "ofs_embedding_",
}
"""Parts of diffusers' names and what the host calls them, in the order of replacement."""
PIECE = re.compile(r"(.*)-\d{5}-of-(\d{5})(\.safetensors)")
MARK = "blocks.0.norm1.linear.weight"
HEADS_OF_2B = 30


def list_files() -> list[str]:
    """Names in the host's `models/diffusion_models`; of a file in pieces only the first."""
    names = folder_paths.get_filename_list("diffusion_models")
    return [name for name in names if not PIECE.fullmatch(name) or "-00001-of-" in name]


def files_of(name: str) -> list[Path]:
    """The file that a widget's `name` stands for, or all its pieces; ModelFolderError where one is missing."""
    path = folder_paths.get_full_path("diffusion_models", name)
    if path is None:
        raise ModelFolderError(f"model name {name!r} is not in models/diffusion_models. {WHERE_TO_GET}")
    path = Path(path)
    if not (match := PIECE.fullmatch(path.name)):
        return [path]
    stem, count, suffix = match.groups()
    pieces = [path.with_name(f"{stem}-{n:05d}-of-{count}{suffix}") for n in range(1, int(count) + 1)]
    if missing := [piece.name for piece in pieces if not piece.is_file()]:
        raise ModelFolderError(f"{path}: its pieces {', '.join(missing)} are missing. {WHERE_TO_GET}")
    return pieces


def fingerprint(name: str) -> list[tuple[int, int]]:
    """Changes when a file behind a widget's `name` does."""
    return [(file.stat().st_size, file.stat().st_mtime_ns) for file in files_of(name)]


def load_cogvideox(paths: list[Path], *, weight_dtype: str = "default"):
    """The transformer in these files as a ModelPatcher.

    weight_dtype: a key of `WEIGHT_DTYPES`. Raises ModelFolderError naming the file and what it holds instead.
    """
    found = {own_name(key): shape for path in paths for key, shape in read_shapes(path).items()}
    if MARK not in found:
        example = f"such as {sorted(found)[0]!r}" if found else ""
        raise ModelFolderError(
            f"{paths[0]}: it is no CogVideoX transformer: it holds {len(found)} tensors {example}. {WHERE_TO_GET}"
        )
    if found[MARK][0] // 6 // 64 == HEADS_OF_2B:
        raise ModelFolderError(
            f"{paths[0]}: it is CogVideoX-2B, whose positions ComfyUI would take for those of the 5B, so that it draws "
            f"noise. {WHERE_TO_GET}"
        )
    state = {own_name(key): tensor for path in paths for key, tensor in comfy.utils.load_torch_file(str(path)).items()}
    dtype = WEIGHT_DTYPES[weight_dtype]
    patcher = comfy.sd.load_diffusion_model_state_dict(state, {} if dtype is None else {"dtype": dtype})
    if patcher is None:
        raise ModelFolderError(f"{paths[0]}: ComfyUI does not know a CogVideoX of these sizes. {WHERE_TO_GET}")
    log.info("loaded %s: diffusion model in %s", paths[0].name, patcher.model.get_dtype())
    return patcher


def own_name(key: str) -> str:
    """The host's name of a weight; one that has it already keeps it."""
    for theirs, ours in NAMES.items():
        key = key.replace(theirs, ours)
    return key
