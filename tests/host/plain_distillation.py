"""Video DDS written down once more: the guider's own predictions, and losses of what one call of the model records."""

from __future__ import annotations

import torch
from spacetime_edit.core.relevance import matching_loss
from spacetime_edit.core.self_similarity import spatial_self_similarity_loss, temporal_self_similarity_loss
from spacetime_edit.host.attention_tap import AttentionTap
from spacetime_edit.host.distillation import MOTION, RELEVANCE, SPATIAL, TEMPORAL
from spacetime_edit.host.families import IN_SPACE, family_of, noise_space
from spacetime_edit.host.features import FeatureRecorder
from spacetime_edit.host.gradients import gradient_at, normal_tensor, prediction_with_graph
from spacetime_edit.host.model_pass import call_model
from spacetime_edit.tests.host import support

UNIT = 0.035 / 0.4  # of the step size


class Recorded:
    """The keys of some blocks' attention over space, and the features of the STR score."""

    def __init__(self, blocks):
        self.blocks, self.keys, self._recorder = blocks, {}, FeatureRecorder(None)

    @property
    def features(self):
        return self._recorder.features

    def __call__(self, call):
        self._recorder(call)
        if call.kind in IN_SPACE and call.layer.block in self.blocks:
            per_frame = call.per_frame
            self.keys[call.layer.path] = per_frame.of_clip(per_frame.key).transpose(1, 2).flatten(2)

    def losses(self, source, names):
        """By name, against another record."""
        forms = {SPATIAL: spatial_self_similarity_loss, TEMPORAL: temporal_self_similarity_loss}
        found = {}
        for name in names:
            pairs, form = source.keys, forms.get(name)
            ours = self.keys
            if name == RELEVANCE:
                pairs, ours, form = source.features, self.features, matching_loss
            found[name] = torch.stack([form(pairs[path], ours[path]) for path in pairs]).mean()
        return found

    def normal(self):
        """As tensors that autograd may save."""
        self.keys = {path: normal_tensor(t) for path, t in self.keys.items()}
        return self


class Regularisers:
    """Losses between a source and other latents, both noised to one sigma; in the precision of the model.

    prompts: of the source, of the others.
    """

    def __init__(self, model, prompts, source, sigma, names, blocks):
        self._model, self._prompts, self._sigma, self._blocks = model, prompts, float(sigma), blocks
        self._of_model = [name for name in names if name != MOTION]
        self._names, self._source = names, source

    def losses(self, target):
        """Numbers by name."""
        of_model = self._in_a_run(target, self._plain_losses)
        return of_model | {name: float(self._motion(target)) for name in self._names if name == MOTION}

    def gradients(self, target):
        """By name, with respect to the noised target."""
        found = self._in_a_run(target, self._gradients) if self._of_model else {}
        if MOTION in self._names:
            with torch.inference_mode(False), torch.enable_grad():
                x = target.clone().requires_grad_()
                found[MOTION] = torch.autograd.grad(self._motion(x), x)[0]
        return found

    def _motion(self, target):
        signal, _ = noise_space(self._model).signal_and_noise(torch.tensor(self._sigma))
        frames = 0 if target.ndim == 4 else 2
        return ((target - self._source.clone()) / signal).diff(dim=frames).square().mean()

    def _in_a_run(self, target, function):
        guider = support.guider_of(self._model, self._prompts[1], self._prompts[0])

        def at(guider, x, sigma, extra_args):
            base, options = guider.inner_model, extra_args["model_options"]
            x, held = x.to(base.get_dtype_inference()), Recorded(self._blocks)
            tap = AttentionTap(self._model, [held], differentiable=True)
            call_model(base, guider.conds["negative"], self._source.to(x), sigma, options, tap=tap, source=True)
            return function(base, x, sigma, guider.conds["positive"][0], options, held.normal())

        return support.at_one_sigma(guider, target, at, self._sigma)

    def _plain_losses(self, base, x, sigma, cond, options, held):
        seen = Recorded(self._blocks)
        call_model(base, [cond], x, sigma, options, tap=AttentionTap(self._model, [seen]))
        return {name: float(loss) for name, loss in seen.losses(held, self._of_model).items()}

    def _gradients(self, base, x, sigma, cond, options, held):
        seen = Recorded(self._blocks)
        tap = AttentionTap(self._model, [seen], differentiable=True)
        mutates = family_of(self._model).mutates
        call = prediction_with_graph(base, x, sigma, cond, model_options=options, tap=tap, mutates=mutates)
        with call as (at, _):
            losses = seen.losses(held, self._of_model)
            return {name: gradient_at(at, loss, last=False) for name, loss in losses.items()}


def drawn(model, settings, shape, seed):
    """For each step the noise level and the noise."""
    generator, sampling = torch.Generator().manual_seed(seed), model.get_model_object("model_sampling")
    low, high = settings.t_range
    for _ in range(settings.steps):
        t = low + (high - low) * float(torch.rand((), generator=generator, dtype=torch.float64))
        yield torch.as_tensor(sampling.percent_to_sigma(1 - t)).float(), torch.randn(shape, generator=generator)


def whole(latent, function):
    """A clip that is seen at once."""
    return function(latent, lambda t: t)


def windows(dim, *indices, anchored=False):
    """How overlapping windows of four frames are blended, by the host's pyramid of weights.

    anchored: a window sees the frame before it, too.
    """

    def blended(latent, function):
        weights, total, counts = torch.tensor([1.0, 2.0, 2.0, 1.0]), {}, torch.zeros(latent.shape[dim])
        shape = [-1 if i == dim else 1 for i in range(latent.ndim)]
        for own in indices:
            before = [own[0] - 1] if anchored and own[0] > 0 else []
            frames, shown = torch.tensor(own), torch.tensor([*before, *own])
            counts[frames] += weights
            part = function(latent.index_select(dim, shown), lambda t, f=shown: t.index_select(dim, f))
            for name, value in part.items():
                seen = total.setdefault(name, torch.zeros_like(latent))
                seen.index_add_(dim, frames, value.narrow(dim, len(before), len(own)) * weights.view(shape))
        return {name: value / counts.view(shape) for name, value in total.items()}

    return blended


def optimised(model, source_prompt, prompt, negative, clip, settings, seed, over=whole):
    """The clip after some steps without a mask. over: `whole`, or `windows`."""
    source = model.model.process_latent_in(clip)
    target, largest, average = source.clone(), {}, {}
    for sigma, noise in drawn(model, settings, clip.shape, seed):
        a, s = noise_space(model).signal_and_noise(sigma)
        of_source = a * source + s * noise

        def seen(x, cut, sigma=sigma, of_source=of_source):
            guided = {"target": (prompt, x), "source": (source_prompt, cut(of_source))}
            found = {
                name: support.prediction(model, own, latent, negative, settings.cfg, sigma)
                for name, (own, latent) in guided.items()
            }
            pair = (source_prompt, prompt) if settings.branch == "text" else (negative, negative)
            by_name = Regularisers(model, pair, cut(of_source), sigma, list(settings.weights), settings.blocks)
            return found | (by_name.gradients(x) if settings.weights else {})

        found = over(a * target + s * noise, seen)
        step = (a / s) * ((target - found.pop("target")) - (source - found.pop("source")))
        square = float(step.square().mean())
        for name, gradient in found.items():
            own, scale = float((a * gradient).square().mean()), 1.0
            if settings.balanced:
                if own == 0:
                    continue
                average[name] = 0.8 * average.get(name, square) + 0.2 * square
                largest[name] = max(own, largest.get(name, 0.0))
                scale = (average[name] / largest[name]) ** 0.5
            step = step + scale * settings.weights[name] * a * gradient
        target = target - settings.step_size * UNIT * step
    return model.model.process_latent_out(target)
