"""The trainer of the emoji world's model: its batches, what makes it fast on a card, and a run of seconds on a CPU."""

import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from spacetime_edit.tools.emoji_world import instruments, world
from spacetime_edit.tools.train_emoji import (
    batches,
    export,
    model,
    speed,
    time_attention,
    train_detector,
    train_unet,
    weights,
)
from spacetime_edit.tools.train_tiny import checkpoints, parts
from transformers import CLIPTokenizer

SCRIPTS = Path(train_unet.__file__).parent


def test_the_library_reads_captions_as_the_training_does(tmp_path):
    batches.VOCABULARY.write_tokenizer(tmp_path)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    generator = np.random.default_rng(0)
    for caption in ["", *model.SHOWN, *(export.any_caption(generator) for _ in range(200))]:
        ids = tokenizer(caption, padding="max_length", max_length=24, truncation=True).input_ids
        assert ids == batches.VOCABULARY.token_ids(caption), caption


def test_every_word_of_every_caption_is_a_token_and_captions_fit():
    for background in world.BACKGROUNDS:
        for thing in world.THINGS:
            for places in world.PLACE_WORDS:
                text = world.caption(world.Description(background, (thing, thing), places))
                assert len(text.replace(",", " ,").split()) <= 22
                batches.VOCABULARY.token_ids(text)


def test_shown_captions_are_of_the_world():
    assert all(world.parse_caption(caption) for caption in model.SHOWN)


@pytest.mark.parametrize("frames", [1, 8])
def test_drawn_batches_are_the_trainer_s(frames):
    ids, images, masks = batches.draw(np.random.default_rng(0), 3, frames)
    assert ids.shape == (3, 24) and images.shape == (3, frames, 3, 64, 64)
    assert masks.shape == (3, 1, frames, 16, 16) and masks.dtype == images.dtype == torch.uint8


def test_the_noisiest_latent_tells_nothing_of_its_objects():
    """A thing covers some 64 cells of 4 channels in 8 frames: what a matched filter sees stays below the noise."""
    assert model.alphas_cumprod()[-1].sqrt() * (64 * 4 * 8) ** 0.5 < 1.0


# --- what makes it fast -------------------------------------------------


def attended(function, seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(5, 3, 8, 16, generator=generator).requires_grad_() for _ in range(3)]
    out = function(*inputs)
    (out * torch.randn(out.shape, generator=generator)).sum().backward()
    return [out.detach(), *(x.grad for x in inputs)]


@pytest.mark.parametrize("function", [time_attention.by_sums, time_attention.by_torch])
def test_attention_over_time_is_the_same_by_all_ways(function):
    for found, wanted in zip(attended(function), attended(time_attention.by_products), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.every_family
def test_the_kernel_s_attention_is_the_same():
    """In Triton's interpreter, which has to be chosen before Triton is loaded."""
    pytest.importorskip("triton")
    script = """
import sys, torch
sys.path.append(sys.argv[1])
from pack import load_pack
load_pack(host=False)
from spacetime_edit.tools.train_emoji.time_attention import _tried, by_kernel, by_products
columns = [torch.randn(5, 8, 48) for _ in range(4)]
for a, b in zip(_tried(by_kernel, columns, 3, 1)[0], _tried(by_products, columns, 3, 1)[0], strict=True):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
"""
    command = [sys.executable, "-c", script, str(SCRIPTS.parent)]
    subprocess.run(command, check=True, env={"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "HOME": "/tmp"})


def test_the_fast_unet_is_the_same_function():
    torch.manual_seed(0)
    unet = parts.faster(parts.make_unet((16, 16, 16), 8).eval())
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    arguments = torch.randn(2, 4, 8, 16, 16), torch.tensor([10, 900]), torch.randn(2, 5, 64)
    with torch.no_grad():
        expected = unet(*arguments).sample
        speed.faster_on_card(unet, 2)
        for function in (time_attention.by_sums, time_attention.by_products):
            time_attention.use_attention(unet, function)
            torch.testing.assert_close(unet(*arguments).sample, expected, rtol=1e-4, atol=1e-4)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = unet(*arguments).sample
    assert 0 < (rounded - expected).norm() < 0.06 * expected.norm()


# --- a run --------------------------------------------------------------


def test_the_rate_warms_up_and_falls_to_zero():
    assert train_unet.rate_of(0, 0.0, 0.3) < 0.01
    assert train_unet.rate_of(1000, 0.2, 0.3) == 1.0
    assert train_unet.rate_of(1000, 0.65, 0.3) == pytest.approx(0.5)
    assert train_unet.rate_of(1000, 1.0, 0.3) == train_unet.LOWEST_RATE


def test_images_come_first():
    shares = [train_unet.image_share(done) for done in np.linspace(0, 1, 11)]
    assert shares == sorted(shares, reverse=True) and shares[0] > 0.5 and shares[-1] < 0.1


SMALL = ("--channels", "8", "8", "8", "--head", "8")


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A folder as `tools/train_emoji/weights`, of a small model that knows nothing."""
    folder = tmp_path_factory.mktemp("kept")
    torch.manual_seed(0)
    small, configuration = model.make_model((8, 8, 8), 8)
    saved = {"configuration": configuration, "score": -0.5, "step": 100, "seconds": 60.0}
    weights.write(folder, saved | {"weights": small.state_dict()}, parts.make_vae((8, 8, 8)))
    return folder


def test_kept_weights_read_back(kept):
    saved = weights.read(kept / weights.MODEL)
    assert {name: saved[name] for name in ("score", "step", "seconds")} == {"score": -0.5, "step": 100, "seconds": 60.0}
    small, configuration = model.make_model((8, 8, 8), 8)
    small.load_state_dict(saved["weights"])
    assert weights.differences(saved, configuration) == []
    assert weights.differences(saved, configuration | {"head": 16}) == ["head"]
    assert all(value.dtype == torch.float32 for value in saved["weights"].values())


def test_kept_weights_become_a_folder_that_no_worse_ones_replace(kept, tmp_path):
    export.export(kept, tmp_path / "model")
    saved = weights.read(kept / weights.MODEL)["weights"]
    read = parts.read_unet(tmp_path / "model").state_dict()
    assert all(torch.equal(read[name], saved[f"unet.{name}"]) for name in read)
    schedule = (tmp_path / "model" / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8")
    assert '"beta_end": 0.02' in schedule
    with pytest.raises(checkpoints.CheckpointError, match="it is kept"):
        export.export(kept, tmp_path / "model")


def test_a_run_begins_from_kept_weights(kept, tmp_path, monkeypatch):
    """Of no second: what it keeps are these, and the steps that they had."""
    options = ["--init", str(kept), "--device", "cpu", "--loaders", "0", "--seconds", "0", "--held-out", "8"]
    options += ["--clips", "1", "--images", "2", "--shown", "1", *SMALL]
    monkeypatch.setattr(sys, "argv", ["train_unet", str(tmp_path / "run"), *options])
    monkeypatch.setattr(train_unet, "sample", lambda _, captions, seed: torch.zeros(len(captions), 4, 8, 16, 16))
    assert train_unet.main() == 0
    found, begun = (weights.read(folder / weights.MODEL) for folder in (tmp_path / "run", kept))
    assert found["step"] == begun["step"] and found["seconds"] == begun["seconds"]
    for name, value in begun["weights"].items():
        torch.testing.assert_close(found["weights"][name], value, rtol=0, atol=0)


def test_weights_of_another_model_are_refused(kept):
    trainer = SimpleNamespace(configuration=model.make_model((8, 8, 8), 4)[1])
    with pytest.raises(checkpoints.CheckpointError, match=r"another model \(head\)"):
        train_unet.Trainer.begin_from(trainer, kept / weights.MODEL)


def test_the_kept_model_is_of_this_trainer():
    saved = weights.about(weights.KEPT / weights.MODEL)
    assert weights.differences(saved, model.make_model()[1]) == []
    assert sum(path.stat().st_size for path in weights.KEPT.rglob("*") if path.is_file()) < 20e6


def test_the_instruments_find_what_held_out_clips_show():
    """One of each kind; `train_detector --check` measures 96."""
    vae = parts.read_vae(weights.KEPT).eval().requires_grad_(False)
    for row in train_detector.held_out(vae, instruments.detector(), 5).values():
        assert row["thing"] == row["background"] == row["places"] == 1
        assert row["a frame's things"] > 0.95 and row["px"] < 1.5


def call(folder, *options):
    arguments = ["run", "--out", "out", "--device", "cpu", "--loaders", "0", *SMALL]
    arguments += ["--clips", "1", "--images", "2", "--held-out", "8", "--print-every", "1"]
    arguments += ["--reserve", "1", "--shown", "1", *options]
    command = [sys.executable, str(SCRIPTS / "card.py"), *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


@pytest.mark.every_family
def test_two_calls_of_the_card_s_command(kept, tmp_path):
    """Some 40 s on a CPU: the second goes on from the first, and what they write can be read."""
    shutil.copytree(kept / "vae", tmp_path / "start" / "vae")
    first = call(tmp_path, "--init", "start", "--seconds", "12", "--plan", "40")
    assert first.returncode == 0, first.stdout + first.stderr
    begun = checkpoints.load(tmp_path / "run" / "unet.pt")
    assert begun["step"] > 0
    second = call(tmp_path, "--finish", "--seconds", "12", "--plan", "40")
    assert second.returncode == 0, second.stdout + second.stderr
    assert f"going on from step {begun['step']}" in second.stdout
    assert checkpoints.load(tmp_path / "run" / "unet.pt")["step"] > begun["step"]
    saved = weights.read(tmp_path / "out" / weights.MODEL)
    assert {name.split(".")[0] for name in saved["weights"]} == {"unet", "text"}
    assert (tmp_path / "out" / "samples.png").is_file()
