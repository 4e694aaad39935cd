"""Datasets in the layouts of the field, made small: what is read of them, and what is said of what they lack."""

import csv
import json
from pathlib import Path

import pytest
from PIL import Image
from spacetime_edit.tools.edit_datasets import DatasetError, read_dataset

CLIPS = Path(__file__).resolve().parents[2] / "assets" / "tiny_clips"


def frames(folder, count=3, suffix=".jpg"):
    folder.mkdir(parents=True)
    for i in range(1, count + 1):
        Image.new("RGB", (8, 6), (10 * i, 0, 0)).save(folder / f"{i:05d}{suffix}")


def table(file, *rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8", newline="") as lines:
        csv.writer(lines).writerows(rows)


def test_the_embedded_clips_are_a_dataset():
    layout, cases = read_dataset(CLIPS)
    of = {case.id: case for case in cases}
    assert layout == "embedded" and len(cases) == 96 and not any(case.missing for case in cases)
    circle = of["clip_00_1"]
    assert circle.edit == "a blue circle on a gray background" and len(circle.files()) == 8
    assert [file.name for file in circle.files(of_mask=True)][0] == "mask_obj0_00.png"
    assert of["clip_00_3"].mask is None, "a new background has no mask"
    second = next(case for case in cases if case.mask_frames.startswith("mask_obj1"))
    assert len(second.files(of_mask=True)) == 8
    assert of["clip_08_1"].mask_frames.startswith("mask_obj0"), "one of two equal objects, though both are named"
    stripe, square = of["clip_28_1"], of["clip_28_2"]
    assert [file.name for file in stripe.files(of_mask=True)][0] == "mask_obj0_stripe_00.png"
    assert [file.name for file in square.files(of_mask=True)] == [f"mask_obj0_{i:02d}.png" for i in range(8)]


def test_five_bench(tmp_path):
    entries = [
        {"video_name": name, "source_prompt": "a bus", "target_prompt": "a tram"} for name in ("1_bus", "2_gone")
    ]
    (tmp_path / "edit_prompt").mkdir()
    (tmp_path / "edit_prompt" / "edit1_FiVE.json").write_text(json.dumps(entries))
    frames(tmp_path / "images" / "1_bus", 12)
    frames(tmp_path / "bmasks" / "1_bus", 12)
    layout, (here, gone) = read_dataset(tmp_path)
    assert (layout, here.id, here.source, here.edit) == ("FiVE-Bench", "edit1_1_bus", "a bus", "a tram")
    assert [file.stem for file in here.files()] == [f"{i:05d}" for i in range(1, 13)] and here.mask.name == "1_bus"
    assert gone.missing == "clip"


def test_tgve(tmp_path):
    heads = ["Video name", "Our GT caption", "Style Change Caption", "Object Change Caption"]
    heads += ["Background Change Caption", "Multiple Changes Caption"]
    rows = [["DAVIS", "", "", "", "", ""], ["gold-fish", "fish swim", "fish, oil", "sharks swim", "", "sharks, oil"]]
    table(tmp_path / "LOVEU.csv", heads, *rows)
    frames(tmp_path / "DAVIS_480p" / "480p_frames" / "gold-fish")
    layout, cases = read_dataset(tmp_path)
    assert layout == "TGVE" and [case.id.split("_")[1] for case in cases] == [
        "style",
        "object",
        "background",
        "multiple",
    ]
    assert cases[1].edit == "sharks swim" and not cases[1].missing and cases[2].missing == "edit prompt"


def test_davis_and_plain(tmp_path):
    for folder, clips, masks in (("d", "JPEGImages/480p", "Annotations/480p"), ("p", "videos", "masks")):
        frames(tmp_path / folder / clips / "bear")
        frames(tmp_path / folder / masks / "bear", suffix=".png")
        table(
            tmp_path / folder / "prompts.csv",
            ("clip", "source", "edit"),
            ("bear", "a bear", "a dog"),
            ("bear", "a", "b"),
        )
    for folder, layout in (("d", "DAVIS"), ("p", "plain")):
        found, cases = read_dataset(tmp_path / folder)
        assert found == layout and [case.id for case in cases] == ["bear", "bear_2"]
        assert len(cases[0].files()) == len(cases[0].files(of_mask=True)) == 3
    (tmp_path / "p" / "videos" / "walk.mp4").touch()
    Image.new("L", (8, 6)).save(tmp_path / "p" / "masks" / "walk.png")
    table(tmp_path / "p" / "prompts.csv", ("id", "clip", "source", "edit"), ("w", "walk", "a man", "a robot"))
    (case,) = read_dataset(tmp_path / "p")[1]
    assert case.id == "w" and case.files()[0].name == "walk.mp4" and case.files(of_mask=True)[0].name == "walk.png"


def test_what_is_no_dataset_says_what_was_expected(tmp_path):
    with pytest.raises(DatasetError, match="no such folder"):
        read_dataset(tmp_path / "none")
    with pytest.raises(DatasetError, match=r"no layout that is known(.|\n)*prompts.csv has the columns clip, source"):
        read_dataset(tmp_path)
    (tmp_path / "videos").mkdir()
    table(tmp_path / "prompts.csv", ("clip", "edit"), ("a", "b"))
    with pytest.raises(DatasetError, match=r"prompts.csv: no column source; it has clip, edit"):
        read_dataset(tmp_path)
    table(tmp_path / "prompts.csv", ("clip", "source", "edit"))
    with pytest.raises(DatasetError, match="the plain layout, but no clip"):
        read_dataset(tmp_path)
