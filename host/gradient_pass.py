"""One gradient pass: losses of what a recorder keeps of a model call, with their gradients at the latent.

Whoever needs a gradient takes it here. A run learns from its first pass without gradient what one costs, has the host
make room, keeps activations or computes them again, and tries once more with less where memory runs out all the same.
"""

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import comfy.model_management as management
import torch
from torch import Tensor

from .attention_tap import AttentionTap
from .checkpointing import checkpointed
from .families import IN_SPACE, family_of
from .gradients import gradient_at, prediction_with_graph
from .memory import ActivationMeter, GradientMemory

log = logging.getLogger("spacetime_edit")

HALF_PRECISION_SCALE = 2.0**14
"""Loss scale for float16 models, whose gradients of a mean cosine would underflow."""
SUM = "sum"


class ModelCall(NamedTuple):
    """Which model call: the host's BaseModel and its ModelPatcher, one processed conditioning, sigma (scalar), the
    options of a run on the frames of the latent, the number of the step, from 1, for errors, and the place of the
    prompt, see `call_model`."""

    base_model: object
    patcher: object
    cond: dict
    sigma: Tensor
    options: dict
    step: int
    place: int = 0


class Gradients(NamedTuple):
    """losses, by name. gradients at the latent: of each loss by name, or `total`, of their weighted sum. denoised: the
    prediction of x0; None where the call ended early."""

    losses: dict[str, float]
    gradients: dict[str, Tensor]
    total: Tensor | None = None
    denoised: Tensor | None = None


class GradientPass:
    """Takes the gradients of one run.

    what: who asks, for the log and for errors; knobs: what a user can lower where memory runs out; low_memory: keep no
    activations from the start. memory: what one gradient takes, once it is known.
    """

    def __init__(self, what: str, knobs: str, low_memory: bool = False):
        self.what, self.knobs, self.low_memory = what, knobs, low_memory
        self.memory: GradientMemory | None = None

    def meter(self, base_model, patcher) -> ActivationMeter:
        """What counts the activations of a pass without gradient while it is open."""
        return ActivationMeter(base_model.diffusion_model, family_of(patcher))

    def make_room(self, memory: GradientMemory, models: Sequence) -> None:
        """Has the host free what a gradient takes, the models (ModelPatchers) of the run staying; where that is more
        than there is, no activations are kept."""
        self.memory, patcher = memory, models[0]
        management.load_models_gpu(list(models), memory_required=memory.total(checkpointing=self.low_memory))
        needed = memory.total(checkpointing=False)
        if not self.low_memory and needed > management.get_free_memory(patcher.load_device):
            log.info("%s: keeps no activations, %.1f GB would not fit", self.what, needed / 1e9)
            self.low_memory = True

    def __call__(
        self,
        asked: ModelCall,
        x: Tensor,
        recorder,
        losses: Mapping[str, Callable[[], Tensor]],
        weights: Mapping[str, float] | None = None,
    ) -> Gradients:
        """The gradients of `losses` at the latent x; they read what the recorder has kept, and are formed in turn.

        weights: only of the sum of the losses, each times its weight. RuntimeError where memory runs out for good,
        ValueError for a gradient that is not finite.
        """
        largest = max(weights.values(), default=1.0) if weights else 1.0  # half precision holds the sum as each term
        family, half = family_of(asked.patcher), asked.base_model.get_dtype_inference() == torch.float16
        loss_scale = HALF_PRECISION_SCALE if half else 1.0
        given = {"model_options": asked.options, "needs": frozenset(IN_SPACE), "place": asked.place}
        while True:
            tap = AttentionTap(asked.patcher, [recorder], differentiable=True)
            blocks = checkpointed(asked.base_model.diffusion_model, family, tap, recorder)
            call = prediction_with_graph(
                asked.base_model, x, asked.sigma, asked.cond, tap=tap, mutates=family.mutates, **given
            )
            try:
                with blocks if self.low_memory else contextlib.nullcontext(), call as (at, denoised):
                    if denoised is not None:
                        denoised = denoised.detach()  # and with it goes the graph behind the last recorded layer
                    values, gradients, total, left = {}, {}, 0.0, len(losses)
                    for name, loss in losses.items():
                        value, left = loss(), left - 1
                        values[name] = float(value.detach())
                        if weights is None:
                            gradients[name] = gradient_at(at, value, loss_scale, last=not left)
                        else:
                            total = total + weights.get(name, 0.0) / largest * value
                        del value  # and with it, where it is done, its graph
                    if weights is not None:
                        gradients[SUM] = gradient_at(at, total, loss_scale)
                break
            except (torch.OutOfMemoryError, management.ACCELERATOR_ERROR) as error:
                if not management.is_oom(error):
                    raise
                if self.low_memory:
                    raise RuntimeError(self._out_of_memory()) from error
            self.low_memory = True  # out of the handler, which would keep the failed graph alive
            recorder.tensors = {}
            log.warning("%s: out of memory; once more without kept activations (slower)", self.what)
            management.soft_empty_cache()
        self._check(gradients, asked, recorder)
        summed = None if weights is None else largest * gradients.pop(SUM)
        return Gradients(values, gradients, summed, denoised)

    def _check(self, gradients: Mapping[str, Tensor], asked: ModelCall, recorder) -> None:
        for name, gradient in gradients.items():
            if torch.isfinite(gradient).all():
                continue
            bad = (key.rsplit(" ", 1)[0] for key, tensor in recorder.tensors.items() if not tensor.isfinite().all())
            raise ValueError(
                f"{self.what}: the gradient of {name} is not finite at step {asked.step} (sigma "
                f"{float(asked.sigma):.4g}, layer {next(bad, 'unknown, in the backward pass')}); try the model in bf16 "
                f"or fp32, or fewer layers"
            )

    def _out_of_memory(self) -> str:
        return (
            f"{self.what}: out of memory, also without kept activations; lower one of these: the number of frames, "
            f"their size (Fit Clip to Model), {self.knobs}, or let ComfyUI keep more of the card free (--reserve-vram, "
            f"--lowvram)"
        )
