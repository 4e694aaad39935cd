"""The archive that the registry gets: what git tracks, without what .comfyignore names.

python tools/build_archive.py [FILE]     # default output/spacetime-edit.zip
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[1]


def files() -> list[PurePosixPath]:
    """Of the repository, those that belong to the pack. A line of .comfyignore is a file or a folder."""
    lines = (ROOT / ".comfyignore").read_text(encoding="utf-8").splitlines()
    ignored = [PurePosixPath(line.strip()) for line in lines if line.strip()]
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True).stdout
    tracked = [PurePosixPath(name) for name in listed.split("\0") if name]
    return [path for path in tracked if not any(path.is_relative_to(own) for own in ignored)]


def build(target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in files():
            archive.write(ROOT / path, path)
    return target


if __name__ == "__main__":
    made = build(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "output" / "spacetime-edit.zip")
    print(f"{made}, {made.stat().st_size / 1e6:.1f} MB, {len(files())} files")
