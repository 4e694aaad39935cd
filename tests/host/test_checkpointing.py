"""Block checkpointing: the same gradient, a fraction of the activations, nothing left behind."""

import pytest
import torch
from spacetime_edit.core.live_memory import PeakMemory
from spacetime_edit.core.regions import Region
from spacetime_edit.core.relevance import matching_loss
from spacetime_edit.host.attention_tap import AttentionTap
from spacetime_edit.host.checkpointing import checkpointed
from spacetime_edit.host.families import family_of
from spacetime_edit.host.features import FeatureRecorder
from spacetime_edit.host.gradients import latent_gradient, normal_tensor
from spacetime_edit.host.layers import attention_layers
from spacetime_edit.host.memory import small_tile
from spacetime_edit.host.model_pass import call_model
from spacetime_edit.host.region_patch import RegionModulation, patch_regions
from spacetime_edit.host.region_prompt import encode_regional_prompt
from spacetime_edit.tests.host import support

FRAMES, SIDE = 3, 8


def clip(seed, frames=FRAMES, side=SIDE):
    return 2 * torch.randn(frames, 4, side, side, generator=torch.Generator().manual_seed(seed))


def gradient(model, positive, latent, source=None, *, checkpoint, output=False, blocks=None):
    """(loss, gradient, peak bytes) of the matching loss against `source`, and of the output if asked for.

    In the precision of the model.
    """

    def run(guider, x, sigma, extra_args):
        base, cond, options = guider.inner_model, guider.conds["positive"][0], extra_args["model_options"]
        x, given = x.to(base.get_dtype_inference()), FeatureRecorder(blocks)
        if source is not None:
            tap = AttentionTap(model, [given], differentiable=True)
            call_model(base, [cond], source.to(x), sigma, options, tap=tap)
        held = {path: f.map(normal_tensor) for path, f in given.features.items()}
        recorder = FeatureRecorder(blocks, None if output or not held else list(held)[-1])
        tap = AttentionTap(model, [recorder], differentiable=True)

        def loss(denoised):
            rows = {path: small_tile(f) if checkpoint else None for path, f in held.items()}
            value = sum(matching_loss(f, recorder.features[path], rows=rows[path]) for path, f in held.items())
            return value + torch.tanh(denoised).double().mean() if output else value

        def compute():
            mutates = family_of(model).mutates
            return latent_gradient(base, x, sigma, cond, loss, model_options=options, tap=tap, mutates=mutates)

        with PeakMemory() as peak:
            if not checkpoint:
                return *compute(), peak
            with checkpointed(base.diffusion_model, family_of(model), tap, recorder):
                return *compute(), peak

    return support.at_one_sigma(support.guider_of(model, positive), latent, run)


def compare(*args, **options):
    plain = gradient(*args, checkpoint=False, **options)
    lean = gradient(*args, checkpoint=True, **options)
    assert lean[0] == pytest.approx(float(plain[0]), rel=1e-6)
    return support.relative(lean[1], plain[1]), plain[2].peak / lean[2].peak


@pytest.mark.parametrize("output", [False, True], ids=["ends after the last layer", "with the output"])
def test_the_gradient_is_the_one_without(tiny, output):
    error, _ = compare(tiny.model, support.encode(tiny), clip(0), clip(1), output=output)
    assert error <= 1e-5


def test_the_gradient_is_the_one_without_where_blocks_mutate():
    with torch.inference_mode():
        model = support.sd15_model()
        error, _ = compare(model, support.sd15_conditioning(), clip(0), output=True)
    assert error <= 1e-5


@pytest.mark.parametrize("output", [False, True], ids=["ends after the last layer", "with the output"])
def test_the_gradient_is_the_one_without_where_regions_modulate(tiny64, output):
    """The patch's own tap has to follow the blocks when they run again.

    In float64: so strong a patch makes each gradient, with activations or without, differ from the exact one by more
    than 1e-5 in float32.
    """
    with torch.inference_mode():
        masks = torch.zeros(2, FRAMES, 64, 64)
        masks[0, :, :, :32], masks[1, :, :, 32:] = 1, 1
        prompt = "a red circle on the left and a green square on the right, gray background"
        regions = [Region(phrase, m) for phrase, m in zip(("red circle", "green square"), masks, strict=True)]
        positive = encode_regional_prompt(tiny64.clip, prompt, regions)
        settings = {"cross_strength": 3.0, "self_strength": 3.0, "temporal_strength": 1.0, "end": 1.0}
        patched = patch_regions(tiny64.model, RegionModulation(**settings))
        error, _ = compare(patched, positive, clip(0), clip(1), output=output)
        plain = gradient(tiny64.model, positive, clip(0), clip(1), checkpoint=False, output=output)[1]
        modulated = gradient(patched, positive, clip(0), clip(1), checkpoint=False, output=output)[1]
    assert support.relative(modulated, plain) > 0.05  # or it would not matter
    assert error <= 1e-10


def test_nothing_is_left_behind(tiny):
    untouched = support.Untouched(tiny.model)
    gradient(tiny.model, support.encode(tiny), clip(0), clip(1), checkpoint=True)
    assert untouched.changed() == []


def test_activations_at_eight_attention_blocks_shrink_to_a_third(tmp_path, tiny):
    """Eight blocks with attention; matched are those below the finest grid."""
    kinds = {
        "down_block_types": ["CrossAttnDownBlock3D"] * 3,
        "up_block_types": ["CrossAttnUpBlock3D"] * 2 + ["UpBlock3D"],
    }
    with torch.inference_mode():
        model, positive = support.unet3d_model(tmp_path, **kinds), support.encode(tiny)
        layers = attention_layers(model).values()
        assert len({layer.block for layer in layers if layer.kind == "spatial"}) == 8
        error, ratio = compare(model, positive, clip(0, 8, 16), clip(1, 8, 16))
    assert error <= 1e-5
    assert ratio >= 3, ratio
