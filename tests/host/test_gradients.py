"""Gradients through the real ModelPatcher in a real sampler step: what they go through, and what they leave behind."""

import comfy.model_management as management
import pytest
import torch
from spacetime_edit.core.live_memory import PeakMemory
from spacetime_edit.core.relevance import matching_loss
from spacetime_edit.host.attention_tap import AttentionTap
from spacetime_edit.host.features import FeatureRecorder
from spacetime_edit.host.gradients import differentiable, latent_gradient, normal_tensor
from spacetime_edit.host.loaders.unet3d import EMBEDDED, load_folder
from spacetime_edit.host.model_pass import call_model
from spacetime_edit.tests.host import support

FRAMES, SIDE, SIGMA = 3, 8, 2.0


@pytest.fixture(scope="module")
def sd15():
    with torch.inference_mode():
        return support.sd15_model(), support.sd15_conditioning()


@pytest.fixture(params=["tiny", "sd15"])
def subject(request, tiny):
    """(model, positive) of both families."""
    return (tiny.model, support.encode(tiny)) if request.param == "tiny" else request.getfixturevalue("sd15")


def clip(seed=0):
    return 2 * torch.randn(FRAMES, 4, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def weights_of(output):
    return torch.randn(output.shape, generator=torch.Generator().manual_seed(9))


def output_loss(denoised):
    """A smooth function of the prediction with a different weight for every element."""
    return (torch.tanh(denoised) * weights_of(denoised)).double().mean()


def in_a_step(model, positive, latent, function):
    """function(gradient_of, predict_plainly, x) inside a sampler step, in the model's precision; both take a latent."""

    def run(guider, x, sigma, extra_args):
        x = x.to(guider.inner_model.get_dtype_inference())
        base, cond, given = guider.inner_model, guider.conds["positive"][0], extra_args["model_options"]

        def gradient_of(latent, loss=output_loss, listeners=(), **options):
            tap = AttentionTap(model, listeners, differentiable=True)
            return latent_gradient(base, latent, sigma, cond, loss, model_options=given, tap=tap, **options)

        def predict_plainly(latent, listeners=()):
            return call_model(base, [cond], latent, sigma, given, tap=AttentionTap(model, listeners))

        return function(gradient_of, predict_plainly, x)

    return support.at_one_sigma(support.guider_of(model, positive), latent, run, SIGMA)


def error_of(gradient, value_of, x, steps=(0.3, 0.1, 0.03, 0.01)):
    """Smallest relative error of |gradient| against central differences along it, over several step sizes."""
    along = (gradient / gradient.norm()).to(x)
    slopes = [float(value_of(x + e * along) - value_of(x - e * along)) / (2 * e) for e in steps]
    return min(abs(slope / float(gradient.norm()) - 1) for slope in slopes)


class Matching:
    """The STR matching loss between a source clip's features and those that `recorder` holds."""

    def __init__(self, predict_plainly, source):
        recorder = FeatureRecorder(None)
        predict_plainly(source, [recorder])
        self.source = {path: f.map(normal_tensor) for path, f in recorder.features.items()}

    def __call__(self, recorder):
        losses = [matching_loss(given, recorder.features[path]) for path, given in self.source.items()]
        return torch.stack(losses).mean()


# the numbers


def test_the_loss_is_that_of_a_plain_prediction(subject):
    """Of kernels that have a backward, and of every frame; its gradient is tested in `test_families`."""

    def run(gradient_of, predict_plainly, x):
        loss, gradient = gradient_of(x)
        assert loss == pytest.approx(float(output_loss(predict_plainly(x))), rel=1e-4)
        assert gradient.shape == x.shape and all(frame.norm() > 0 for frame in gradient)

    in_a_step(*subject, clip(), run)


def test_gradient_of_the_matching_loss(tiny, tiny64):
    """Of the trained model, whose forward ends early. Against differences in float64: the loss bends so much that in
    float32 no step is right for it."""

    def value_of(matching, predict_plainly, latent):
        recorder = FeatureRecorder(None)
        predict_plainly(latent, [recorder])
        return matching(recorder)

    def run(gradient_of, predict_plainly, x):
        matching = Matching(predict_plainly, clip(1))
        recorder = FeatureRecorder(None, last=list(matching.source)[-1])
        loss, gradient = gradient_of(x, lambda denoised: matching(recorder), [recorder])
        assert loss == pytest.approx(float(value_of(matching, predict_plainly, x)), rel=1e-5)
        assert -1 <= loss < -0.1
        return gradient

    gradient = in_a_step(tiny.model, support.encode(tiny), clip(), run)

    def error(_, predict_plainly, x):
        matching = Matching(predict_plainly, clip(1).double())
        return error_of(gradient, lambda latent: value_of(matching, predict_plainly, latent), x, steps=(1e-3,))

    assert in_a_step(tiny64.model, support.encode(tiny), clip(), error) <= 1e-3


def test_loss_scale_is_divided_out(tiny):
    def run(gradient_of, predict_plainly, x):
        return gradient_of(x)[1], gradient_of(x, loss_scale=2.0**14)[1]

    plain, scaled = in_a_step(tiny.model, support.encode(tiny), clip(), run)
    assert support.relative(scaled, plain) < 1e-5


def test_keeping_copies_for_mutating_blocks_gives_the_same_gradient(tiny):
    def run(gradient_of, predict_plainly, x):
        return gradient_of(x)[1], gradient_of(x, mutates=True)[1]

    plain, copied = in_a_step(tiny.model, support.encode(tiny), clip(), run)
    assert support.relative(copied, plain) < 1e-6


def test_weight_buffers_that_the_host_reuses_do_not_reach_the_gradient(tiny, monkeypatch):
    """Streamed weights: each cast gives a view of a shared buffer without a version counter, overwritten afterwards."""
    streamed, positive = load_folder(EMBEDDED, weight_dtype="bf16")[0], support.encode(tiny)
    expected = in_a_step(streamed, positive, clip(), lambda gradient_of, _, x: gradient_of(x))[1]
    buffers = support.stream_weights(monkeypatch)
    result = in_a_step(streamed, positive, clip(), lambda gradient_of, _, x: gradient_of(x))[1]
    assert len(buffers) > 10
    assert torch.equal(result, expected)


def test_a_layer_that_another_pack_has_replaced_keeps_its_own_gradient(tiny):
    """As the host's bypass LoRA does: an instance forward around the layer's own."""
    model, positive = load_folder(EMBEDDED)[0], support.encode(tiny)
    layer = model.model.diffusion_model.get_submodule("up_blocks.2.resnets.0.conv2")
    own = layer.forward
    layer.forward = lambda x: own(x) + 3 * torch.tanh(x.flip(-1))

    def compare(gradient_of, predict_plainly, x):
        gradient = gradient_of(x)[1]
        return error_of(gradient, lambda latent: output_loss(predict_plainly(latent)), x)

    replacement = layer.forward
    assert in_a_step(model, positive, clip(), compare) <= 1e-3
    assert layer.forward is replacement


# what is left behind


@pytest.mark.parametrize("mutates", [False, True])
def test_nothing_is_left_behind(subject, mutates):
    """Weights, their kind, hooks, forwards, kernels, flags and random numbers are as before, in and after the step."""
    model, positive = subject

    def run(gradient_of, predict_plainly, x):
        expected, before = predict_plainly(x), support.Untouched(model)
        gradient_of(x, mutates=mutates)
        assert before.changed() == []
        assert torch.equal(predict_plainly(x), expected)

    before = support.Untouched(model)
    in_a_step(model, positive, clip(), run)
    assert before.changed() == []


class Odd(BaseException):
    """An error that is no `Exception`, as the host's interrupt is."""


@pytest.mark.parametrize("error", [ValueError, Odd])
@pytest.mark.parametrize("where", ["in the model", "in the loss", "in the backward pass"])
def test_nothing_is_left_behind_by_an_exception(subject, where, error):
    model, positive = subject

    def fail_in_model(call):
        if call.layer.block == "m0":
            raise error

    def fail_in_loss(denoised):
        raise error

    def fail_in_backward(denoised):
        def fail(grad):
            raise error

        denoised.register_hook(fail)
        return output_loss(denoised)

    options = {
        "in the model": dict(listeners=[fail_in_model]),
        "in the loss": dict(loss=fail_in_loss),
        "in the backward pass": dict(loss=fail_in_backward),
    }[where]

    def run(gradient_of, predict_plainly, x):
        expected, before = predict_plainly(x), support.Untouched(model)
        with pytest.raises(error):
            gradient_of(x, **options)
        assert before.changed() == []
        assert torch.equal(predict_plainly(x), expected)

    in_a_step(model, positive, clip(), run)


def test_an_interrupt_stops_the_backward_pass(tiny):
    """The user presses the button after the forward pass: no need to wait for the gradient of the whole network."""

    def interrupted(denoised):
        management.interrupt_current_processing()
        return output_loss(denoised)

    def run(gradient_of, predict_plainly, x):
        before = support.Untouched(tiny.model)
        try:
            with pytest.raises(management.InterruptProcessingException):
                gradient_of(x, interrupted)
        finally:
            management.interrupt_current_processing(False)
        assert before.changed() == []

    in_a_step(tiny.model, support.encode(tiny), clip(), run)


def test_what_a_layer_puts_out_is_not_copied_and_can_be_saved():
    class Base:
        diffusion_model = torch.nn.Linear(64, 64)

    x = torch.ones(256, 64)  # under inference mode, as the host's
    with differentiable(Base):
        x = x.clone().requires_grad_()
        with PeakMemory() as memory:
            y = Base.diffusion_model(x)
        assert memory.peak == y.numel() * y.element_size()
        assert not y.is_inference()
        (gradient,) = torch.autograd.grad((y * y.square()).sum(), x)
    plain = torch.nn.functional.linear(torch.ones(256, 64), Base.diffusion_model.weight, Base.diffusion_model.bias)
    torch.testing.assert_close(gradient, 3 * plain.square() @ Base.diffusion_model.weight)


def test_the_kitchen_functions_are_plain_inside():
    """And back outside, also where somebody left by an exception."""
    import comfy_kitchen
    from comfy_kitchen.backends.eager import rope

    class Base:
        diffusion_model = torch.nn.Linear(2, 2)

    fused = comfy_kitchen.apply_rope1
    with pytest.raises(ZeroDivisionError), differentiable(Base):
        assert comfy_kitchen.apply_rope1 is rope.apply_rope1
        assert management.in_training and torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        1 / 0  # noqa: B018
    assert comfy_kitchen.apply_rope1 is fused and not management.in_training


def test_normal_tensors_can_be_saved_for_backward():
    born_here = torch.ones(3)
    assert born_here.is_inference() and not normal_tensor(born_here).is_inference()
