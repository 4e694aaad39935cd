"""`dev.py run` and `dev.py evaluate` from the command line, on a real server."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.workflows

ROOT = Path(__file__).resolve().parents[2]
CLIPS = ROOT / "assets" / "tiny_clips"
SWAP = "Swap an object - prompt swap (tiny)"
QUICK = "STE_InvertVideo.steps=2", "STE_InvertVideo.refinements=0"


def called(tool, *arguments):
    command = [sys.executable, ROOT / "tools" / f"{tool}.py", *arguments]
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=300)


def test_a_dataset_is_evaluated_and_gone_on_with(tmp_path):
    """A clip, one that is missing, whose row says so, and, when it is there, that one alone."""
    data, out = tmp_path / "data", tmp_path / "out"
    (data / "masks").mkdir(parents=True)
    shutil.copytree(CLIPS / "clip_00", data / "videos" / "first", ignore=shutil.ignore_patterns("mask*"))
    shutil.copy(CLIPS / "clip_00" / "mask_obj0_00.png", data / "masks" / "first.png")
    prompts = [("clip", "source", "edit"), *((n, "a red circle", "a red square") for n in ("first", "second"))]
    with (data / "prompts.csv").open("w", newline="") as file:
        csv.writer(file).writerows(prompts)
    arguments = data, "--template", SWAP, "--out", out, "--set", *QUICK

    ran = called("evaluate", *arguments)
    assert ran.returncode == 1 and "2 edits, 0 of them done before" in ran.stdout, ran.stdout + ran.stderr
    rows = {row["id"]: row for row in json.loads((out / "results.json").read_text())["rows"]}
    assert rows["second"]["problem"] == "missing: clip" and rows["first"]["problem"] == ""
    assert rows["first"]["metrics"]["background PSNR, dB"] > 10 and (out / rows["first"]["film"]).stat().st_size > 0
    assert "missing: clip" in (out / "report.html").read_text()

    shutil.copytree(data / "videos" / "first", data / "videos" / "second")
    ran = called("evaluate", *arguments)
    assert ran.returncode == 0 and "2 edits, 1 of them done before" in ran.stdout, ran.stdout + ran.stderr
    again = {row["id"]: row for row in json.loads((out / "results.json").read_text())["rows"]}
    assert again["first"] == rows["first"] and again["second"]["problem"] == ""
    assert len((out / "results.csv").read_text().splitlines()) == 3

    ran = called("evaluate", *arguments, "STE_SampleFromTrajectory.dilation=2")
    assert ran.returncode == 2 and "rows of another run (settings differ)" in ran.stderr


def test_missing_models_are_named_with_their_places():
    ran = called("run", "Swap an object - STR-Match (LTX-Video)")
    assert ran.returncode == 2 and "models/checkpoints/ltx-video-2b-v0.9.5.safetensors  from https://" in ran.stderr


def test_a_template_is_run_from_the_command_line(tmp_path):
    ran = called("run", SWAP, "--out", tmp_path, "--set", *QUICK)
    assert ran.returncode == 0 and "STE_InvertVideo" in ran.stdout, ran.stdout + ran.stderr
    files = [line for line in ran.stdout.splitlines() if line.startswith(str(tmp_path))]
    assert len(files) == 9 and all(Path(file).stat().st_size > 0 for file in files)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("STE_InvertVideo.stepz=2", "STE_InvertVideo has steps"),
        ("STE_InvertVideo.steps=0", "STE_InvertVideo"),
        ("STE_InvertVideo.scheduler=fast", "scheduler"),
    ],
)
def test_what_is_wrong_is_named_before_the_run(setting, message):
    ran = called("run", SWAP, "--set", setting)
    assert ran.returncode == 2 and message in ran.stderr, ran.stdout + ran.stderr
