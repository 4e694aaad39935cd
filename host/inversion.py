"""DDIM inversion: the edit loop upwards, from a clip to noise, and how well it comes back."""

import comfy.model_management
import comfy.samplers
import torch
from torch import Tensor

from ..core.parametrization import NoiseSpace, ddim_inversion_step
from ..core.trajectory import Trajectory
from .conditioning import check_picture
from .families import noise_space
from .fingerprint import CLIP_TOLERANCE
from .latents import check_clip_latent
from .model_pass import as_source, begin_hooks
from .node_text import LOG, NodeText
from .sampling import TrajectorySampler
from .step_caches import without_caches

RF_SIGMA_MAX = 0.999
"""At sigma 1 a rectified-flow latent holds no trace of the clip and cannot be inverted."""


class InversionSampler(comfy.samplers.Sampler):
    """DDIM inversion of `latent_image` over rising sigmas; keeps every latent in `latents`, clean one first.

    begin: go on from this latent at the first sigma instead. The latents are kept on the host's intermediate device.
    """

    def __init__(self, space: NoiseSpace, refinements: int, begin: Tensor | None = None):
        self.space, self.refinements, self.begin = space, refinements, begin
        self.store = comfy.model_management.intermediate_device()
        self.latents: list[Tensor] = []

    def sample(
        self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False
    ):
        everything = [cond for conds in model_wrap.conds.values() for cond in conds]

        def denoise(x, sigma):
            comfy.model_management.throw_exception_if_processing_interrupted()
            begin_hooks(model_wrap.inner_model, everything, sigma)
            return model_wrap(x, sigma * x.new_ones(x.shape[0]), **extra_args)

        x, last = latent_image if self.begin is None else self.begin.to(latent_image), len(sigmas) - 1
        self.latents = [x.to(self.store)]
        for k in range(last):
            x, denoised = ddim_inversion_step(x, denoise, sigmas[k], sigmas[k + 1], self.space, self.refinements)
            self.latents.append(x.to(self.store))
            if callback is not None:
                callback(k, denoised, x, last)
        return x


def invert(
    model,
    positive,
    latent: Tensor,
    sigmas: Tensor,
    *,
    refinements: int = 1,
    callback=None,
    to_percent: float = 0.0,
    before: Trajectory | None = None,
    say: NodeText = LOG,
) -> Trajectory:
    """DDIM inversion of one clip at CFG 1 with the source conditioning.

    latent: [F, C, h, w] or [1, C, F, h, w] as in the graph; sigmas: (S + 1,) falling to 0. Costs S (1 + refinements)
    model calls and keeps S + 1 latents. to_percent: progress of denoising in [0, 1] up to whose noise to go, of a
    schedule that another model has the rest of; before: the part that such a model has inverted, from whose noisiest
    latent this one goes on. Step caches of the model are left out, since each step needs the model's own answer. say:
    shows a message on the node. ValueError for a latent that is no clip of this model, or not that of `before`.
    """
    check_clip_latent(latent, model)
    if not positive:
        raise ValueError("positive: it holds no prompt; connect a CLIP Text Encode that describes the source clip")
    check_picture(model, (settings for _, settings in positive), "positive")
    space = noise_space(model)
    if space is NoiseSpace.RF:
        sigmas = sigmas.clamp(max=RF_SIGMA_MAX)
    whole = len(sigmas) - 1
    sigmas = _part_of(sigmas, model, space, latent, to_percent, before)
    exact, caches = without_caches(model)
    if caches:
        say(f"Step caches are left out of the inversion ({', '.join(sorted(caches))}); the edit may use them.")
    guider = comfy.samplers.CFGGuider(as_source(exact))
    guider.inner_set_conds({"positive": positive})
    guider.set_cfg(1.0)
    begin = None if before is None else before.latents[0]
    sampler = InversionSampler(space, refinements, begin)
    guider.sample(torch.zeros_like(latent), latent, sampler, sigmas.flip(0), callback=callback, seed=0)
    latents = torch.stack(sampler.latents[::-1])
    part = {} if len(sigmas) == whole + 1 else {"whole": whole}
    part |= {} if before is None else {"z0": before.clean}
    return Trajectory(latents, sigmas.cpu(), space, model, positive, **part)


def _part_of(
    sigmas: Tensor, model, space: NoiseSpace, latent: Tensor, to_percent: float, before: Trajectory | None
) -> Tensor:
    """Those of the schedule that this inversion has."""
    if not 0 <= to_percent < 1:
        raise ValueError(f"to_percent: it is {to_percent}; expected 0 for the whole schedule, or less than 1")
    highest = float(model.get_model_object("model_sampling").percent_to_sigma(to_percent))
    part = sigmas[sigmas <= highest] if to_percent else sigmas
    if before is not None:
        given = model.model.process_latent_in(latent.float()) if latent.count_nonzero() else latent.float()
        clean = before.clean.float().cpu()
        if given.shape != clean.shape or (given.cpu() - clean).abs().max() > CLIP_TOLERANCE:
            raise ValueError("latent: it is not the clip of the connected trajectory; connect the same latent to both")
        if before.space is not space:
            raise ValueError(
                f"trajectory: it was made in the noise space {before.space.name}, this model samples in {space.name}; "
                f"two models that share a schedule share that"
            )
        reached = before.sigmas[0].to(sigmas)
        near = torch.isclose(part, reached, rtol=1e-4)
        if not near.any() or near[0]:
            raise ValueError(
                f"trajectory: its noisiest sigma is {float(reached):.4g}, which is no step of this schedule below its "
                f"first; use the same steps, scheduler and shift for both, and to_percent above 0 in the first"
            )
        part = part[: int(near.nonzero()[0]) + 1]
    if len(part) < 2:
        raise ValueError(
            f"to_percent: at {to_percent} none of the {len(sigmas) - 1} steps is left; choose a smaller one"
        )
    return part


def reconstruct(trajectory: Trajectory, callback=None) -> Tensor:
    """The clean latent that sampling back at CFG 1 with the source conditioning gives, in the model's scale."""
    guider = comfy.samplers.CFGGuider(as_source(without_caches(trajectory.model)[0]))
    guider.inner_set_conds({"positive": trajectory.conditioning})
    empty = torch.zeros(trajectory.shape)
    sampler = TrajectorySampler(trajectory)
    samples = guider.sample(empty, empty, sampler, trajectory.sigmas, callback=callback, seed=0)
    return trajectory.model.model.process_latent_in(samples).to(trajectory.latents)


def reconstruction_db(trajectory: Trajectory, returned: Tensor) -> float:
    """Power of the clean latent over that of the error, in dB."""
    clean = trajectory.latents[-1].double()
    error = (clean - returned.double()).square().mean().clamp_min(1e-20)
    return float(10 * torch.log10(clean.square().mean() / error))
