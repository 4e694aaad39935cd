"""Long clips in the host's context windows: what one window sees, and how what windows say is blended.

Sampling in windows is the host's own. Here a gradient is taken window by window, each in the memory of its frames, and
blended where windows overlap by the weights that the host blends predictions with.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from comfy.context_windows import IndexListContextHandler, IndexListContextWindow, get_context_weights
from comfy.model_patcher import create_model_options_clone
from torch import Tensor

HANDLER = "context_handler"


@dataclass(frozen=True)
class View:
    """What a step function sees of a run: the whole clip, or of long ones the frames of a window.

    handler, window: the host's; None: the whole clip. whole: the latent of the clip; base_model: the host's.
    """

    handler: IndexListContextHandler | None = None
    window: IndexListContextWindow | None = None
    whole: Tensor | None = None
    base_model: object = None

    def of(self, latent: Tensor) -> Tensor:
        """The frames of a latent that it sees."""
        return latent if self.window is None else self.window.get_tensor(latent, latent.device)

    def of_mask(self, mask: Tensor) -> Tensor:
        """Of a mask (F, h, w)."""
        return mask if self.window is None else mask[self.window.index_list]

    def options(self, model_options: dict) -> dict:
        """Options for a model run on these frames alone."""
        if self.window is None:
            return model_options
        options = create_model_options_clone(model_options)
        options.pop(HANDLER, None)
        options["transformer_options"]["context_window"] = self.window
        return options

    def cond(self, cond: dict) -> dict:
        """A processed conditioning of the whole clip, what it holds for each frame cut to these frames.

        ValueError for a ControlNet, whose hint the host cuts only while it samples.
        """
        if self.window is None:
            return cond
        if "control" in cond:
            raise ValueError("positive: in context windows no gradient can follow a ControlNet; remove one of them")
        handler = copy.copy(self.handler)
        handler._model = self.base_model  # which the host sets as it samples
        return handler.get_resized_cond([cond], self.whole, self.window, self.whole.device)[0]

    @cached_property
    def weights(self) -> Tensor:
        """(frames,) by which it counts where windows overlap."""
        frames, handler = self.window.index_list, self.handler
        return torch.as_tensor(
            get_context_weights(len(frames), self.window.total_frames, frames, handler), dtype=torch.float32
        )


def views_of(latent: Tensor, sigma: Tensor, base_model, model_options: dict) -> list[View]:
    """The windows of a run on this latent, or one view of the whole clip where it has none."""
    handler = model_options.get(HANDLER)
    if handler is None or latent.shape[handler.dim] <= handler.context_length:
        return [View()]
    handler.set_step(sigma.reshape(1), model_options)
    windows = handler.get_context_windows(base_model, latent, model_options)
    return [View(handler, window, latent, base_model) for window in windows]


def blended(
    latent: Tensor, views: list[View], compute: Callable[[View], Mapping[str, Tensor | float]]
) -> dict[str, Tensor | float]:
    """What `compute` gives for each view, by name, put together: numbers are averaged, latents of a view's frames
    become one like `latent`."""
    if views[0].window is None:
        return dict(compute(views[0]))
    found, dim = {}, views[0].handler.dim
    shape = [-1 if i == dim else 1 for i in range(latent.ndim)]
    counts = torch.zeros(latent.shape[dim], device=latent.device)
    for view in views:
        weights = view.weights.to(latent)
        counts[view.window.index_list] += weights
        for name, value in compute(view).items():
            if isinstance(value, Tensor) and value.ndim:
                view.window.add_window(found.setdefault(name, torch.zeros_like(latent)), value * weights.view(shape))
            else:
                found[name] = found.get(name, 0.0) + value / len(views)
    return {
        name: value / counts.view(shape) if isinstance(value, Tensor) and value.ndim else value
        for name, value in found.items()
    }


def check_handler(model_options: dict) -> None:
    """ValueError for a context handler whose windows are not known here."""
    handler = model_options.get(HANDLER)
    if handler is not None and not isinstance(handler, IndexListContextHandler):
        raise ValueError(
            f"model: its context windows are of a kind ({type(handler).__name__}) in which no gradient is taken; use "
            f"ComfyUI's own, or Sample from Trajectory"
        )


def check_windows(model_options: dict, of_source: dict) -> None:
    """ValueError for a context handler of another kind, or in one of two models only."""
    for options in (model_options, of_source):
        check_handler(options)
    if (HANDLER in model_options) != (HANDLER in of_source):
        raise ValueError(
            "model: only one of the inverted model and the edit's has context windows; put the node before both"
        )
