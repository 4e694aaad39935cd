"""Trajectories as files: latents and sigmas in safetensors, with the fingerprint of what made them.

Model and prompt come from the graph that loads the file; the fingerprint tells whether they are those of the inversion.
Files lie below the host's input and output folders only, and nothing is allocated before its size is known.
"""

import json
import logging
import math
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path, PurePosixPath

import comfy.model_management
import folder_paths
import safetensors
from safetensors.torch import save_file
from torch import Tensor

from ..core.parametrization import NoiseSpace
from ..core.trajectory import Trajectory
from .fingerprint import Difference, Fingerprint, differences, sha256

log = logging.getLogger("spacetime_edit")

SUFFIX = ".trajectory.safetensors"
FORMAT, VERSION = "spacetime_edit.trajectory", "1"
MAX_BYTES = 8 * 2**30
"""Largest trajectory: 20 times that of 50 steps on 81 frames of 832 x 480 pixels (0.4 GiB)."""

FLOAT_BYTES = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8}


def save_trajectory(trajectory: Trajectory, filename_prefix: str) -> Path:
    """Writes a new numbered file below the host's output folder: all of it, or nothing.

    ValueError for a prefix that leaves the folder, and for a trajectory that could not be loaded again.
    """
    check_prefix(filename_prefix)
    if trajectory.is_part:
        raise ValueError(
            "trajectory: it is a part of an inversion by two models, which a file cannot hold yet; leave Save "
            "Trajectory out"
        )
    tensors = {name: getattr(trajectory, name).cpu().contiguous() for name in ("latents", "sigmas")}
    if (size := sum(tensor.nbytes for tensor in tensors.values())) > MAX_BYTES:
        raise ValueError(f"trajectory: it has {size >> 20} MiB, a file may have {MAX_BYTES >> 20}; invert fewer frames")
    if problem := _sigmas_problem(tensors["sigmas"]) or _latents_problem(tensors["latents"]):
        raise ValueError(f"trajectory: {problem}; check the clip and the model, and invert again")
    fingerprint = Fingerprint.of(trajectory.model, trajectory.conditioning, trajectory.latents[-1])
    metadata = {"format": FORMAT, "version": VERSION, "fingerprint": json.dumps(asdict(fingerprint))}
    output = folder_paths.get_output_directory()
    folder, name, number, *_ = folder_paths.get_save_image_path(filename_prefix, output)
    path = Path(folder, f"{name}_{number:05}_{SUFFIX}")
    partial = path.with_name(f".{path.name}.partial")
    try:
        save_file(tensors, partial, metadata)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def load_trajectory(
    name: str, model, positive: list, latent: Tensor | None = None, *, use_anyway: bool = False
) -> Trajectory:
    """The trajectory of a file, with `model` (ModelPatcher) and `positive` as what made it.

    name: as in `list_files`; latent: the clip, in the graph's scale. ValueError naming every field in which the file
    and what is connected differ; use_anyway: other weights, another prompt and another clip only warn.
    """
    if not positive:
        raise ValueError("positive: it holds no prompt; connect the CLIP Text Encode that Invert Video used")
    path = file_path(name)
    with _opened(path) as file:
        saved = _fingerprint(file, path.name)
        sigmas, clean = _sigmas_and_clean(file, path.name, saved)
        _refuse(path.name, differences(saved, clean, model, positive, latent), use_anyway)
        latents = file.get_tensor("latents").clone()  # not the file's own pages: it may be overwritten
    if problem := _latents_problem(latents):
        raise ValueError(f"file: {problem} in {path.name!r}; save the trajectory again")
    store = comfy.model_management.intermediate_device()
    return Trajectory(latents.to(store), sigmas, NoiseSpace[saved.space], model, positive)


def list_files() -> list[str]:
    """Names of the trajectory files below the host's input folder and, marked [output], below its output folder."""
    folders = (folder_paths.get_input_directory(), ""), (folder_paths.get_output_directory(), " [output]")
    return [name + mark for folder, mark in folders for name in sorted(_files_below(folder))]


def _files_below(folder: str) -> Iterator[str]:
    for root, _, names in os.walk(folder):
        for path in (Path(root, name) for name in names if name.endswith(SUFFIX)):
            if folder_paths.is_within_directory(folder, str(path)):
                yield path.relative_to(folder).as_posix()


def file_path(name: str) -> Path:
    """The file that a widget's `name` stands for; ValueError for what is not a file below input or output."""
    relative, folder = folder_paths.annotated_filepath(name)
    folder = folder or folder_paths.get_input_directory()
    allowed = folder_paths.get_input_directory(), folder_paths.get_output_directory()
    if folder not in allowed or not relative.endswith(SUFFIX) or not _inside(folder, relative):
        raise ValueError(
            f"file: {name!r} is not the name of a trajectory; expected a {SUFFIX} file below ComfyUI's input folder "
            f"or, followed by ' [output]', below its output folder, without '..'"
        )
    path = Path(folder, relative)
    if not path.is_file():
        raise ValueError(f"file: {name!r} is not there; choose a file of Save Trajectory, or press R to list them anew")
    return path


def file_stamp(name: str) -> tuple[int, int]:
    """Modification time and size of a file: equal stamps, equal files."""
    stat = file_path(name).stat()
    return stat.st_mtime_ns, stat.st_size


def describe_file(path: Path) -> str:
    """Where a saved file is, as a person looks for it, and its size."""
    shown = Path("output", os.path.relpath(path, folder_paths.get_output_directory())).as_posix()
    return f"{shown}, {path.stat().st_size / 1e6:.1f} MB"


def check_prefix(filename_prefix: str) -> None:
    """ValueError unless the prefix names a file below the host's output folder."""
    if not PurePosixPath(filename_prefix).name or not _inside(folder_paths.get_output_directory(), filename_prefix):
        raise ValueError(
            f"filename_prefix: {filename_prefix!r} is not a name below ComfyUI's output folder; expected one such as "
            f"trajectories/clip, without '..'"
        )


def _inside(folder: str, relative: str) -> bool:
    path = PurePosixPath(relative.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts:
        return False
    return folder_paths.is_within_directory(folder, os.path.join(folder, relative))


def _opened(path: Path):
    try:
        return safetensors.safe_open(path, "pt")
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"file: {path.name!r} is damaged or not a safetensors file ({error}); save the trajectory again"
        ) from error


def _fingerprint(file, name: str) -> Fingerprint:
    """What the open file says it holds, after its header has been checked."""
    metadata = file.metadata() or {}
    if metadata.get("format") != FORMAT:
        raise ValueError(f"file: {name!r} holds something else than a trajectory; choose a file of Save Trajectory")
    if metadata.get("version") != VERSION:
        raise ValueError(
            f"file: {name!r} has version {metadata.get('version')!r} of the format, this pack reads {VERSION!r}; "
            f"update the pack or save the trajectory again"
        )
    _check_layout(file, name)
    try:
        return Fingerprint.parse(metadata.get("fingerprint", ""))
    except ValueError as error:
        raise ValueError(
            f"file: the fingerprint in {name!r} is damaged ({error}); save the trajectory again"
        ) from error


def _check_layout(file, name: str) -> None:
    """Shapes, types and sizes of the tensors, by the header alone."""
    parts = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
    shapes = {key: tuple(part.get_shape()) for key, part in parts.items()}
    dtypes = {key: part.get_dtype() for key, part in parts.items()}
    latents, sigmas = shapes.get("latents", ()), shapes.get("sigmas", ())
    fits = set(parts) == {"latents", "sigmas"} and set(dtypes.values()) <= set(FLOAT_BYTES)
    if not fits or len(latents) not in (5, 6) or 0 in latents or sigmas != latents[:1] or sigmas[0] < 2:
        found = ", ".join(f"{key} {dtypes[key]} {list(shape)}" for key, shape in list(shapes.items())[:4])
        raise ValueError(
            f"file: {name!r} holds {found or 'nothing'}; expected floating point latents of 5 or 6 dimensions, one for "
            f"each of at least 2 sigmas; save the trajectory again"
        )
    size = sum(math.prod(shape) * FLOAT_BYTES[dtypes[key]] for key, shape in shapes.items())
    if size > MAX_BYTES:
        raise ValueError(f"file: {name!r} has {size >> 20} MiB of latents, at most {MAX_BYTES >> 20} are read")


def _sigmas_and_clean(file, name: str, saved: Fingerprint) -> tuple[Tensor, Tensor]:
    """Sigmas and z_0 of the open file, checked against each other and the fingerprint."""
    sigmas = file.get_tensor("sigmas").clone()
    if problem := _sigmas_problem(sigmas):
        raise ValueError(f"file: {problem} in {name!r}; save the trajectory again")
    clean = file.get_slice("latents")[len(sigmas) - 1].clone()
    if (tuple(clean.shape), sha256([clean])) != (saved.shape, saved.clip):
        raise ValueError(f"file: the latents in {name!r} are not those of its fingerprint; save the trajectory again")
    return sigmas, clean


def _sigmas_problem(sigmas: Tensor) -> str:
    """Why these cannot be the noise levels of a trajectory; empty if they can."""
    falling = bool(sigmas.isfinite().all()) and bool((sigmas.diff() <= 0).all())
    return "" if falling and sigmas[0] > sigmas[-1] == 0 else "the sigmas do not fall to 0"


def _latents_problem(latents: Tensor) -> str:
    """Why these cannot be the latents of a trajectory; empty if they can."""
    return "" if all(latent.isfinite().all() for latent in latents) else "the latents hold NaN or infinity"


def _refuse(name: str, found: list[Difference], use_anyway: bool) -> None:
    """ValueError with all differences, if one is final or use_anyway is off; else a warning with them."""
    if not found:
        return
    listed = "\n".join(f"- {difference}" for difference in found)
    final = ", ".join(difference.field for difference in found if difference.final)
    if use_anyway and not final:
        log.warning("file: %r is used although it differs from what is connected:\n%s", name, listed)
        return
    cure = f"use_anyway does not help with: {final}" if final else "or turn on use_anyway"
    raise ValueError(
        f"file: {name!r} does not belong to what is connected:\n{listed}\nConnect the model, the prompt and the clip "
        f"that Invert Video had ({cure})"
    )
