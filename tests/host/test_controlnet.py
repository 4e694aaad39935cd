"""A ControlNet beside inflated attention and regions: frames as batch, its own attention left alone."""

import comfy.cldm.cldm
import comfy.controlnet
import comfy.model_management as management
import nodes
import pytest
import torch
from spacetime_edit.core.inflation import Inflation
from spacetime_edit.core.regions import Region
from spacetime_edit.host.gradients import latent_gradient
from spacetime_edit.host.inflation import inflate_attention
from spacetime_edit.host.inversion import invert
from spacetime_edit.host.region_patch import RegionModulation, patch_regions
from spacetime_edit.host.region_prompt import Layout, with_layout
from spacetime_edit.host.sampling import TrajectorySampler
from spacetime_edit.tests.host import support

FRAMES, SIDE = 3, 8


@pytest.fixture(scope="module")
def sd15():
    with torch.inference_mode():
        return support.sd15_model()


@pytest.fixture(scope="module")
def net():
    """A ControlNet in SD 1.5's layout with random weights, its zero convolutions too."""
    with torch.inference_mode():
        config = {k: v for k, v in support.SD15.items() if k not in ("out_channels", "transformer_depth_output")}
        model = comfy.cldm.cldm.ControlNet(**config, hint_channels=3)
        generator = torch.Generator().manual_seed(4)
        for name, weight in model.named_parameters():
            is_scale = weight.ndim == 1 and name.endswith("weight")
            weight.copy_(torch.ones_like(weight) if is_scale else 0.1 * torch.randn(weight.shape, generator=generator))
        return comfy.controlnet.ControlNet(model, load_device=management.get_torch_device())


def hints(frames=FRAMES, seed=5):
    return torch.rand(frames, 8 * SIDE, 8 * SIDE, 3, generator=torch.Generator().manual_seed(seed))


def latent(frames=FRAMES):
    return 3 * torch.randn(frames, 4, SIDE, SIDE, generator=torch.Generator().manual_seed(3))


def conditioned(net, images, strength=1.0):
    """(positive with regions, negative) with the net, as its node makes them."""
    pair = with_layout(support.sd15_conditioning(), layout()), support.sd15_conditioning(1)
    return nodes.ControlNetApplyAdvanced().apply_controlnet(*pair, net, images, strength, 0.0, 1.0)


def layout():
    left, right = torch.zeros(2, FRAMES, SIDE, SIDE)
    left[:, :, :4], right[:, :, 4:] = 1, 1
    return Layout("a prompt", (Region("a", left), Region("b", right)), ((1, 2), (4,)), 7)


def edited(model, **strengths):
    settings = {"cross_strength": 2.0, "self_strength": 2.0, "end": 1.0}
    return patch_regions(inflate_attention(model, Inflation()), RegionModulation(**settings | strengths))


def predicted(model, pair, x=None, cfg=3.0):
    return support.prediction(model, pair[0], latent() if x is None else x, pair[1], cfg, 8.0)


class Seen:
    """What a ControlNet puts out while this is open."""

    def __init__(self, net):
        self._net, self.outputs = net, []

    def __enter__(self):
        keep = lambda module, args, kwargs, out: self.outputs.append(out)  # noqa: E731
        self._handle = self._net.control_model.register_forward_hook(keep, with_kwargs=True)
        return self

    def __exit__(self, *_):
        self._handle.remove()


def tensors(outputs):
    return [t for out in outputs for kind in sorted(out) for t in out[kind] if t is not None]


def test_the_net_sees_each_frame_as_it_would_without_the_patches(sd15, net):
    pair = conditioned(net, hints())
    with Seen(net) as plain:
        predicted(sd15, pair)
    with Seen(net) as patched:
        predicted(edited(sd15), pair)
    ours, theirs = tensors(patched.outputs), tensors(plain.outputs)
    assert len(ours) == len(theirs) > 0
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_control_and_regions_both_act(sd15, net):
    pair, without = conditioned(net, hints()), conditioned(net, hints(), strength=0.0)
    both, control, regions = predicted(edited(sd15), pair), predicted(sd15, pair), predicted(edited(sd15), without)
    assert min(support.relative(both, control), support.relative(both, regions)) > 1e-3


def test_each_frame_has_its_own_hint(sd15, net):
    """Frames that see only themselves: with hint 1 changed, frame 1 changes and the others do not."""
    images = hints()
    changed = images.clone()
    changed[1] = 1 - changed[1]
    a, b = (predicted(sd15, conditioned(net, i)) for i in (images, changed))
    moved = (a - b).flatten(1).abs().amax(1)
    assert moved[1] > 1e-4 and moved[0] == moved[2] == 0
    over_frames = predicted(edited(sd15), conditioned(net, images)) - predicted(edited(sd15), conditioned(net, changed))
    assert over_frames.flatten(1).abs().amax(1).min() > 0  # inflated, every frame hears of it


def test_strength_zero_changes_no_bit(sd15, net):
    pair = conditioned(net, hints())
    neutral = patch_regions(sd15, RegionModulation(0.0, 0.0, end=1.0))
    assert torch.equal(predicted(neutral, pair), predicted(sd15, pair))


def test_a_gradient_goes_through_the_net_and_keeps_none_of_its_weights(sd15, net, monkeypatch):
    """Against finite differences; it is the same where the host streams weights, through buffers that it reuses."""
    pair = conditioned(net, hints())

    def at(guider, x, sigma, extra_args):
        options = {"model_options": extra_args["model_options"], "mutates": True}

        def loss(x):
            given = guider.inner_model, x, sigma, guider.conds["positive"][0]
            return latent_gradient(*given, lambda d: torch.tanh(d).double().square().mean(), **options)

        _, gradient = loss(x)
        with monkeypatch.context() as patch:
            buffers = support.stream_weights(patch)
            for layer in (m for m in net.control_model.modules() if hasattr(m, "comfy_cast_weights")):
                patch.setattr(layer, "comfy_cast_weights", True)
            assert torch.equal(loss(x)[1], gradient) and len(buffers) > 10
        direction = gradient / gradient.norm()
        slopes = [float(loss(x + h * direction)[0] - loss(x - h * direction)[0]) / (2 * h) for h in (0.05, 0.1)]
        return (4 * slopes[0] - slopes[1]) / 3 / float(gradient.norm())

    assert abs(support.at_one_sigma(support.guider_of(sd15, pair[0]), latent(), at, 8.0) - 1) <= 1e-3


def test_a_clip_is_inverted_and_edited_under_control(sd15, net):
    pair, model = conditioned(net, hints()), edited(sd15)
    inflated = inflate_attention(sd15, Inflation())
    trajectory = invert(inflated, pair[0], latent() / 3, torch.tensor([8.0, 3.0, 1.0, 0.0]), refinements=1)
    guider = support.guider_of(model, *pair, 2.0)
    before = support.Untouched(sd15)
    empty, mask = torch.zeros(trajectory.shape), torch.zeros(FRAMES, SIDE, SIDE)
    mask[:, :, :4] = 1
    sampler = TrajectorySampler(trajectory, mask=mask)
    out = guider.sample(empty, empty, sampler, trajectory.sigmas, disable_pbar=True, seed=0)
    clean = sd15.model.process_latent_out(trajectory.latents[-1])
    assert out.isfinite().all() and before.changed() == []
    torch.testing.assert_close(out[..., 4:], clean[..., 4:], atol=1e-5, rtol=1e-5)
    assert support.relative(out[..., :4], clean[..., :4]) > 0.01
