"""Datasets of clips to edit, in the layouts of the field: what to read, with which prompts.

    embedded    captions.json, clip_NN/frame_NN.png (assets/tiny_clips)
    FiVE-Bench  edit_prompt/edit1_FiVE.json ..., videos/NAME.mp4 or images/NAME/, bmasks/NAME/ (arXiv 2503.13684)
    TGVE        a CSV file with "Video name", "Our GT caption", "Style Change Caption" ..., and one folder a source with
                480p_frames/NAME/ or 480p_videos/NAME.mp4 (LOVEU-TGVE 2023); its .xlsx saved as CSV
    DAVIS       JPEGImages/[480p/]NAME/, Annotations/[480p/]NAME/, and prompts.csv
    plain       videos/NAME.mp4 or videos/NAME/, masks/NAME.mp4, masks/NAME.png or masks/NAME/, and prompts.csv

prompts.csv has the columns clip, source and edit, and may have id. Nothing is downloaded.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

VIDEO = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".gif")
PICTURE = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
TGVE_EDITS = ("Style", "Object", "Background", "Multiple")


class DatasetError(Exception):
    """What a folder lacks, and what was expected."""


@dataclass(frozen=True)
class Case:
    """One edit. clip: a film or a folder of frames; frames: the names in it that count, a pattern; mask: a film, a
    picture or a folder, mask_frames as frames; missing: what of it is not there, "" where nothing is."""

    id: str
    source: str
    edit: str
    clip: Path | None
    mask: Path | None = None
    frames: str = "*"
    mask_frames: str = "*"
    missing: str = ""

    def files(self, of_mask: bool = False) -> list[Path]:
        """The frames of the clip, or of the mask, in order; of a film or a single picture that alone."""
        path, pattern = (self.mask, self.mask_frames) if of_mask else (self.clip, self.frames)
        if path.is_file():
            return [path]
        return sorted((p for p in path.glob(pattern) if p.suffix.lower() in PICTURE), key=natural)


def natural(path: Path) -> list:
    """Sorts 2 before 10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]


def read_dataset(folder: Path) -> tuple[str, list[Case]]:
    """Name of the layout and the cases. DatasetError where it has none, or prompts lack a column."""
    if not folder.is_dir():
        raise DatasetError(f"{folder}: no such folder")
    for name, (is_one, read) in LAYOUTS.items():
        if is_one(folder):
            cases = list(read(folder))
            if not cases:
                raise DatasetError(f"{folder}: the {name} layout, but no clip with prompts in it")
            return name, cases
    raise DatasetError(
        f"{folder}: no layout that is known; expected one of these:\n{__doc__.partition(':')[2].strip()}"
    )


def case_of(id: str, source: str, edit: str, clip: Path | None, mask: Path | None, **options) -> Case:
    """A case, with what of it is missing."""
    lacks = [name for name, text in (("source prompt", source), ("edit prompt", edit)) if not (text or "").strip()]
    lacks += [] if clip is not None else ["clip"]
    return Case(id, source or "", edit or "", clip, mask, missing=", ".join(lacks), **options)


def _found(folder: Path, name: str) -> Path | None:
    """A film or a folder of frames by its name without a suffix."""
    if (folder / name).exists():
        return folder / name
    return next((folder / (name + s) for s in (*VIDEO, *PICTURE) if (folder / (name + s)).is_file()), None)


def _embedded(folder: Path) -> Iterator[Case]:
    """The mask is that of what the edit changes; a new background has none."""
    for clip in json.loads((folder / "captions.json").read_text(encoding="utf-8")):
        own = folder / clip["clip"] if (folder / clip["clip"]).is_dir() else None
        for number, edit in enumerate(clip["edits"], 1):
            mask = _changed(clip, edit)
            yield case_of(
                f"{clip['clip']}_{number}",
                clip["caption"],
                edit["caption"],
                own,
                own if mask else None,
                frames="frame_*.png",
                mask_frames=mask.replace("%02d", "??"),
            )


def _changed(clip: dict, edit: dict) -> str:
    """The mask files of what an edit changes, "" for the background.

    Where the edit does not say what, that is the first object which its caption no longer names.
    """
    objects = clip["objects"]
    if "kind" in edit:
        key = "stripe_mask" if edit["kind"] == "stripe" else "mask"
        return "" if edit["object"] is None else objects[edit["object"]][key]
    if clip["background"] not in edit["caption"]:
        return ""
    return next((o["mask"] for o in objects if f"{o['color']} {o['shape']}" not in edit["caption"]), "")


def _five(folder: Path) -> Iterator[Case]:
    for file in sorted((folder / "edit_prompt").glob("*.json"), key=natural):
        for entry in json.loads(file.read_text(encoding="utf-8")):
            name = entry["video_name"]
            clip = _found(folder / "videos", name) or _found(folder / "images", name)
            id = f"{file.stem.split('_')[0]}_{name}"
            yield case_of(id, entry["source_prompt"], entry["target_prompt"], clip, _found(folder / "bmasks", name))


def _tgve(folder: Path) -> Iterator[Case]:
    for row in _rows(_tgve_csv(folder), ("Video name", "Our GT caption")):
        name = row["Video name"].strip()
        if not name or not row["Our GT caption"].strip():
            continue  # a heading between the sources
        places = [*folder.glob("*/480p_frames"), *folder.glob("*/480p_videos")]
        clip = next((found for place in places if (found := _found(place, name))), None)
        for kind in TGVE_EDITS:
            edit = next((text for key, text in row.items() if key and key.startswith(f"{kind} Change")), "")
            yield case_of(f"{name}_{kind.lower()}", row["Our GT caption"], edit, clip, None)


def _tgve_csv(folder: Path) -> Path | None:
    for file in sorted(folder.glob("*.csv")):
        with file.open(encoding="utf-8-sig", newline="") as lines:
            if "Video name" in next(csv.reader(lines), []):
                return file
    return None


def _davis(folder: Path) -> Iterator[Case]:
    def of(name: str) -> Path:
        return folder / name / "480p" if (folder / name / "480p").is_dir() else folder / name

    yield from _by_prompts(folder, of("JPEGImages"), of("Annotations"))


def _plain(folder: Path) -> Iterator[Case]:
    yield from _by_prompts(folder, folder / "videos", folder / "masks")


def _by_prompts(folder: Path, clips: Path, masks: Path) -> Iterator[Case]:
    seen: dict[str, int] = {}
    for row in _rows(folder / "prompts.csv", ("clip", "source", "edit")):
        name = row["clip"].strip()
        seen[name] = seen.get(name, 0) + 1
        id = (row.get("id") or "").strip() or (name if seen[name] == 1 else f"{name}_{seen[name]}")
        yield case_of(id, row["source"], row["edit"], _found(clips, name), _found(masks, name))


def _rows(file: Path, columns: tuple[str, ...]) -> Iterator[dict[str, str]]:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines)
        if lacking := [column for column in columns if column not in (reader.fieldnames or [])]:
            raise DatasetError(f"{file}: no column {', '.join(lacking)}; it has {', '.join(reader.fieldnames or [])}")
        for row in reader:
            yield {key: value or "" for key, value in row.items()}


Layout = tuple[Callable[[Path], bool], Callable[[Path], Iterator[Case]]]
LAYOUTS: dict[str, Layout] = {
    "embedded": (lambda folder: (folder / "captions.json").is_file(), _embedded),
    "FiVE-Bench": (lambda folder: any((folder / "edit_prompt").glob("*.json")), _five),
    "TGVE": (lambda folder: _tgve_csv(folder) is not None, _tgve),
    "DAVIS": (lambda folder: (folder / "JPEGImages").is_dir() and (folder / "prompts.csv").is_file(), _davis),
    "plain": (lambda folder: (folder / "videos").is_dir() and (folder / "prompts.csv").is_file(), _plain),
}
