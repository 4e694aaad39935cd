"""What the trainer of the embedded model rests on; the training itself for seconds, on a far smaller model."""

import shutil
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.models.transformers.transformer_temporal import TransformerTemporalModel
from spacetime_edit.tools.shape_world import variety, world
from spacetime_edit.tools.train_tiny import (
    checkpoints,
    export,
    muon,
    parts,
    train_unet,
    train_unet_gpu,
    train_vae,
    words,
)
from transformers import CLIPTokenizer

ASSETS = Path(world.__file__).parents[2] / "assets" / "tiny_t2v"


# --- words --------------------------------------------------------------


def test_the_library_reads_captions_as_the_training_does(tmp_path):
    words.write_tokenizer(tmp_path)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    generator = np.random.default_rng(0)
    for caption in ["", "Two RED circles", *(world.caption(variety.sample(generator)) for _ in range(200))]:
        ids = tokenizer(caption, padding="max_length", max_length=words.POSITIONS, truncation=True).input_ids
        assert ids == words.token_ids(caption), caption


def test_an_unknown_word_is_no_known_token(tmp_path):
    words.write_tokenizer(tmp_path)
    ids = CLIPTokenizer.from_pretrained(tmp_path)("elephant").input_ids[1:-1]
    assert not set(ids) & {words.VOCABULARY[word + words.END_OF_WORD] for word in words.WORDS}
    with pytest.raises(KeyError):
        words.token_ids("elephant")


# --- optimiser and checkpoints ------------------------------------------


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 24, 9), (2, 9, 24)])
def test_orthogonalised_matrices(shape):
    generator = torch.Generator().manual_seed(0)
    given = torch.randn(shape, generator=generator)
    result = muon.orthogonalised(given)
    values = torch.linalg.svdvals(result)
    assert values.min() > 0.5 and values.max() < 1.3
    u, _, v = torch.linalg.svd(given.double(), full_matrices=False)
    cosine = torch.nn.functional.cosine_similarity(result.flatten(1).double(), (u @ v).flatten(1))
    assert cosine.min() > 0.95


def test_parameters_without_a_gradient_stay():
    layers = torch.nn.ModuleDict({"a": torch.nn.Linear(16, 16), "b": torch.nn.Linear(16, 16)})
    optimiser = muon.Muon(layers.named_parameters())
    (layers["a"](torch.ones(2, 16)).sum() + layers["b"](torch.ones(2, 16)).sum()).backward()
    optimiser.step(0.1, 0.1)
    before = layers["b"].weight.clone()
    for parameter in layers["b"].parameters():
        parameter.grad = None
    optimiser.step(0.1, 0.1)
    assert torch.equal(layers["b"].weight, before)


def test_muon_fits_a_convolution_and_continue_from_latent_from_its_state():
    def run(steps, restart_at=None):
        torch.manual_seed(0)
        layer, x = torch.nn.Conv2d(8, 8, 3, padding=1), torch.randn(4, 8, 6, 6)
        wanted = torch.randn(4, 8, 6, 6)
        optimiser, losses = muon.Muon(layer.named_parameters()), []
        for i in range(steps):
            if i == restart_at:
                state, optimiser = optimiser.state_dict(), muon.Muon(layer.named_parameters())
                optimiser.load_state_dict(state)
            loss = (layer(x) - wanted).square().mean()
            losses.append(float(loss.detach()))
            layer.zero_grad()
            loss.backward()
            optimiser.step(0.02, 0.01)
        return losses

    losses = run(30)
    assert losses[-1] < 0.9 * losses[0]
    assert run(30, restart_at=10) == losses


def test_a_checkpoint_of_another_configuration_or_a_better_one_stays(tmp_path):
    path = tmp_path / "best.pt"
    checkpoints.save(path, {"channels": [8]}, {"weights": torch.ones(2)}, score=1.0)
    with pytest.raises(checkpoints.CheckpointError, match=r"channels: \[8\] there, \[9\] here"):
        checkpoints.load(path, {"channels": [9]})
    with pytest.raises(checkpoints.CheckpointError, match="another configuration"):
        checkpoints.save(path, {"channels": [9]}, {"weights": torch.zeros(2)}, score=2.0)
    with pytest.raises(checkpoints.CheckpointError, match="it is kept"):
        checkpoints.save(path, {"channels": [8]}, {"weights": torch.zeros(2)}, score=0.9)
    assert checkpoints.load(path)["weights"].sum() == 2
    checkpoints.save(path, {"channels": [8]}, {"weights": torch.zeros(2)}, score=1.1)
    assert checkpoints.load(path, {"channels": [8]})["weights"].sum() == 0


# --- the model ----------------------------------------------------------


def test_the_fast_unet_is_the_same_function():
    torch.manual_seed(0)
    unet = parts.make_unet((8, 8, 8)).eval()
    for parameter in unet.parameters():  # the temporal layers of a fresh one do nothing
        torch.nn.init.normal_(parameter, std=0.1)
    x, t, text = torch.randn(2, 4, 3, 8, 8), torch.tensor([10, 900]), torch.randn(2, 5, 64)
    with torch.no_grad():
        expected = unet(x, t, text).sample
        torch.testing.assert_close(parts.faster(unet)(x, t, text).sample, expected, rtol=1e-4, atol=1e-5)


def test_for_one_frame_the_temporal_layers_are_skipped():
    unet = parts.faster(parts.make_unet((8, 8, 8)))
    out = unet(torch.randn(1, 4, 1, 8, 8), torch.tensor([5]), torch.randn(1, 5, 64)).sample
    out.sum().backward()
    temporal = [p for name, p in unet.named_parameters() if "temp_" in name or "transformer_in" in name]
    assert temporal and all(p.grad is None for p in temporal)


def test_whitening_makes_unit_latents_and_changes_no_picture():
    torch.manual_seed(0)
    vae = parts.make_vae((8, 8, 8)).eval()
    frames, _ = train_vae.frames_of(np.random.default_rng(0), 48)
    with torch.no_grad():
        before = vae.decode(vae.encode(frames * 2 - 1).latent_dist.mode()).sample
        train_vae.whiten(vae, frames)
        latents = parts.encode(vae, frames)
        after = vae.decode(latents / parts.SCALING).sample
    values = latents.movedim(1, 0).flatten(1)
    torch.testing.assert_close(torch.cov(values), torch.eye(4), atol=2e-3, rtol=0)
    torch.testing.assert_close(values.mean(1), torch.zeros(4), atol=2e-3, rtol=0)
    torch.testing.assert_close(after, before, atol=2e-3, rtol=1e-3)


def test_text_of_known_words_is_that_of_the_model_it_begins_from():
    torch.manual_seed(0)
    encoder = parts.read_text_encoder(ASSETS).eval()
    saved = parts.CLIPTextModel.from_pretrained(ASSETS, subfolder="text_encoder", torch_dtype=torch.float32).eval()
    tokenizer = CLIPTokenizer.from_pretrained(ASSETS, subfolder="tokenizer")
    caption = "a red circle on the left and a green square on the right, gray background"
    ids = tokenizer(caption, padding="max_length", max_length=words.POSITIONS, return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(parts.encode_text(encoder, parts.ids_of([caption])), saved(ids).last_hidden_state)


@pytest.mark.parametrize("noisy", [0.0, 0.75])
def test_density_and_loss_weight_make_the_weight(noisy):
    weighting = train_unet.Weighting.of(noisy)
    snr = weighting.alphas / (1 - weighting.alphas)
    wanted = snr.clamp(max=5) * (1 + 1 / snr) ** noisy  # of the clean latent's squared error
    wanted = wanted * (1 - weighting.alphas)  # of v's, which is that divided by the noise variance
    density = weighting.times.diff(prepend=torch.zeros(1))
    product = density * weighting.loss
    torch.testing.assert_close(product / product.sum(), wanted / wanted.sum(), rtol=2e-2, atol=1e-6)
    torch.manual_seed(0)
    t = weighting.draw(20_000)
    counts = t.bincount(minlength=1000).float().view(10, 100).sum(1) / 20_000
    torch.testing.assert_close(counts, density.view(10, 100).sum(1), atol=2e-3, rtol=0)


def test_the_error_is_that_of_the_velocity_and_the_host_reads_it_so():
    """A network that knows the velocity has no error, and diffusers' scheduler gets the clean latent from it."""
    torch.manual_seed(0)
    clean, noise, t = torch.randn(2, 4, 3, 16, 16), torch.randn(2, 4, 3, 16, 16), torch.tensor([30, 900])
    scheduler = DDIMScheduler(**parts.SCHEDULE)
    velocity = scheduler.get_velocity(clean, noise, t)
    model = {"unet": lambda *_, **__: (velocity,), "text": None}
    batch = train_unet.Batch(torch.zeros(2, 24, dtype=torch.long), clean, torch.zeros(2, 1, 3, 16, 16))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_unet, "encode_text", lambda *_: None)
        errors = train_unet.squared_errors(model, batch, t, noise, parts.alphas_cumprod())
    assert float(errors.max()) < 1e-10
    scheduler.set_timesteps(1000)
    noisy = scheduler.add_noise(clean, noise, t)
    for i, time in enumerate(t):
        torch.testing.assert_close(
            scheduler.step(velocity[i], time, noisy[i]).pred_original_sample, clean[i], rtol=0, atol=1e-4
        )


def test_the_noisiest_latent_tells_nothing_of_its_objects():
    """A shape covers some 36 cells of 4 channels in 8 frames: what a matched filter sees of it stays near the noise."""
    signal = parts.alphas_cumprod()[-1].sqrt() * (36 * 4 * 8) ** 0.5
    assert signal < 1.0


def test_coarse_attention_begins_as_the_model_without_it():
    torch.manual_seed(0)
    plain = parts.make_unet((8, 8, 16), coarse_attention=False).eval()
    for module in plain.modules():
        if isinstance(module, TransformerTemporalModel):
            torch.nn.init.normal_(module.proj_out.weight)
    wider = parts.with_coarse_attention(plain).eval()
    assert len(list(wider.parameters())) > len(list(plain.parameters()))
    arguments = torch.randn(2, 4, 3, 16, 16), torch.tensor([500, 20]), torch.randn(2, 24, parts.WIDTH)
    with torch.no_grad():
        assert torch.equal(wider(*arguments).sample, plain(*arguments).sample)
    wider(*arguments).sample.square().mean().backward()
    assert wider.get_parameter("down_blocks.2.attentions.0.proj_out.weight").grad.any()
    again = parts.with_coarse_attention(wider)
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), wider.parameters(), strict=True))


def test_other_layers_are_refused():
    unet = parts.make_unet((8, 8, 16))
    unet.conv_extra = torch.nn.Conv2d(1, 1, 1)
    with pytest.raises(ValueError, match="conv_extra"):
        parts.with_coarse_attention(unet)


@torch.no_grad()
def test_products_in_bfloat16():
    torch.manual_seed(0)
    unet = parts.faster(parts.make_unet((8, 8, 16)).eval())
    arguments = torch.randn(2, 4, 3, 16, 16), torch.tensor([500, 20]), torch.randn(2, 24, parts.WIDTH)
    expected = unet(*arguments).sample
    with torch.autocast("cpu", torch.bfloat16):
        rounded = unet(*arguments).sample
    assert 0 < (rounded - expected).norm() < 0.05 * expected.norm()


# --- a run --------------------------------------------------------------


def settings(run, **changes):
    defaults = {
        "run": run, "init": "", "channels": [8, 8, 8], "minutes": 0.02, "processes": 1, "threads": 1, "clips": 1,
        "images": 2, "image_every": 3, "long_every": 4, "rate": 0.01, "adam_rate": 1e-3, "decay_from": 0.5,
        "noisy": 0.75, "object_weight": 2.0, "save_minutes": 5.0, "seed": 0,
        "bf16": False,
    }  # fmt: skip
    return Namespace(**defaults | changes)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    parts.make_vae((8, 8, 8)).save_pretrained(folder / "vae")
    train_unet.train(0, settings(folder), "")
    return folder


def test_a_run_writes_continue_from_latent_and_refuses_another_configuration(run_folder):
    first = checkpoints.load(run_folder / "unet.pt")
    train_unet.train(0, settings(run_folder, minutes=0.05), "")
    second = checkpoints.load(run_folder / "unet.pt")
    assert second["step"] > first["step"] > 0 and second["seconds"] > first["seconds"]
    with pytest.raises(checkpoints.CheckpointError, match=r"noisy: 0\.75 there, 0\.0 here"):
        train_unet.train(0, settings(run_folder, noisy=0.0), "")


def test_a_run_of_the_card_s_trainer(run_folder, tmp_path, capsys):
    """On a CPU and without a graph: the same steps. Its best weights become a folder."""
    start = tmp_path / "start"
    export.export(run_folder, start)
    shutil.copytree(run_folder / "vae", tmp_path / "run" / "vae")
    arguments = Namespace(
        run=tmp_path / "run", init=str(start), device="cpu", eager=False, loaders=0, minutes=0.0, clips=2, images=2,
        rate=0.01, adam_rate=1e-3, decay_from=0.5, noisy=0.75, object_weight=2.0, save_minutes=5.0, print_every=1,
        slowest=1e9, seed=0,
    )  # fmt: skip
    trainer = train_unet_gpu.Trainer(arguments, torch.device("cpu"))
    before = [p.detach().clone() for p in trainer.parameters]
    generator = np.random.default_rng(0)
    for frames, clips in ((8, 2), (1, 2), (16, 1)):
        trainer(train_unet_gpu.draw(generator, clips, frames), 1.0)
    moved = [float((p - q).abs().max()) for p, q in zip(trainer.parameters, before, strict=True)]
    assert sum(m > 0 for m in moved) > 0.9 * len(moved) and np.isfinite(moved).all()
    trainer.save(3)
    export.export(tmp_path / "run", tmp_path / "model")
    assert (tmp_path / "model" / "unet" / "config.json").is_file()


def test_drawn_batches_are_the_trainer_s():
    ids, images, masks = train_unet_gpu.draw(np.random.default_rng(0), 3, 8)
    assert ids.shape == (3, 24) and images.shape == (3, 8, 3, 64, 64)
    assert masks.shape == (3, 1, 8, 16, 16) and masks.dtype == images.dtype == torch.uint8


def test_a_run_becomes_a_folder_that_a_worse_one_does_not_replace(run_folder, tmp_path):
    target = tmp_path / "model"
    export.export(run_folder, target)
    assert (target / "tokenizer" / "vocab.json").is_file() and (target / "training.json").is_file()
    assert not any("_name_or_path" in path.read_text() for path in target.rglob("config.json"))
    before = (target / "training.json").read_text()
    with pytest.raises(checkpoints.CheckpointError, match="it is kept"):
        export.export(run_folder, target)
    assert (target / "training.json").read_text() == before
    export.export(run_folder, target, force=True)
