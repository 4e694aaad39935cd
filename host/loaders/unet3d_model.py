"""diffusers' UNet3DConditionModel with the calling convention of a ComfyUI diffusion model.

Imports diffusers, so it is itself imported only when a model is loaded.
"""

from __future__ import annotations

import comfy.ldm.modules.attention
import torch
from comfy.patcher_extension import WrapperExecutor, WrappersMP, get_all_wrappers
from diffusers import UNet3DConditionModel

FRAMES = "ste_frames"
CALL = "ste_unet3d"


def attention_kind(path: str) -> str:
    """One of "spatial", "cross", "temporal1", "temporal2", from the module path of an attention.

    Both attentions of a temporal block are self-attention over the frames.
    """
    first = path.endswith("attn1")
    if ".temp_attentions." in path or path.startswith("transformer_in."):
        return "temporal1" if first else "temporal2"
    return "spatial" if first else "cross"


class HostAttention:
    """A diffusers attention processor that calls the host's `optimized_attention`, so overrides see it.

    `transformer_options` has to be a named parameter: diffusers passes on no other keyword arguments.
    During a call `transformer_options["ste_unet3d"]` holds `frames`, `clips` (chunks included), `hw` (latent
    height, width), `context` ([chunks*F,L,C]), and `path` and `kind` of the module.
    """

    def __init__(self, path: str):
        self.path, self.kind = path, attention_kind(path)

    def __call__(
        self,
        attn: torch.nn.Module,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
        transformer_options: dict | None = None,
    ) -> torch.Tensor:
        """[rows,N,C] to the same. Rows: frames of all clips or, in temporal attention, their pixels."""
        options = {} if transformer_options is None else transformer_options
        options[CALL] = {**options.get(CALL, {}), "path": self.path, "kind": self.kind}
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if self.kind == "cross":
            source = _of_frames(source, options[CALL])
        query, key, value = attn.to_q(hidden_states), attn.to_k(source), attn.to_v(source)
        precision = torch.float32 if attn.upcast_attention else None
        attention = comfy.ldm.modules.attention
        out = attention.optimized_attention(
            query, key, value, attn.heads, attn_precision=precision, transformer_options=options
        )
        return attn.to_out[1](attn.to_out[0](out))


def _of_frames(prompts: torch.Tensor, call: dict) -> torch.Tensor:
    """The prompts [clips F,L,C] that attention reads: diffusers repeats that of a clip's first frame, so where frames
    have prompts of their own, those; a prompt that another pack has brought along as it is."""
    context, frames = call.get("context"), call.get("frames", 1)
    if context is None or context.shape != prompts.shape or not torch.equal(prompts[::frames], context[::frames]):
        return prompts
    return context


class FramesInBatch:
    """What makes a network callable as the host calls one, with the frames of clips in the batch.

    `of_clips(x, times, context, frames, options)`: the network's own forward pass, for x (clips F, C, h, w), times
    (clips,), context (clips F, L, C) to (clips F, C, h, w).
    """

    storage_dtype = torch.float32

    @property
    def dtype(self) -> torch.dtype:
        """The host asks for the storage dtype; diffusers, inside forward, for the dtype it computes in."""
        return self.__dict__.get("_compute_dtype") or self.storage_dtype

    def forward(self, x, timestep, context=None, control=None, transformer_options=None, **kwargs) -> torch.Tensor:
        """Predict noise (or v), [chunks*F,C,h,w], for x of the same shape.

        timestep: [chunks*F], 0..999, the same in all rows. context: [chunks*F,L,C], one prompt a frame.
        chunks is `len(transformer_options["cond_or_uncond"])`; a chunk is one clip of F = rows / chunks
        frames, unless `transformer_options["ste_frames"]` gives the frames of a clip.
        Raises ValueError if the rows do not divide into clips, or if a ControlNet is connected.
        """
        options = {} if transformer_options is None else transformer_options
        wrappers = get_all_wrappers(WrappersMP.DIFFUSION_MODEL, options)
        executor = WrapperExecutor.new_class_executor(self._predict, self, wrappers)
        return executor.execute(x, timestep, context, control, options, **kwargs)

    def _predict(self, x, timestep, context=None, control=None, transformer_options=None, **kwargs) -> torch.Tensor:
        if control is not None:
            raise ValueError("UNet3D video models take no ControlNet: remove Apply ControlNet from this prompt")
        options = {} if transformer_options is None else transformer_options
        frames = clip_length(x.shape[0], options)
        clips = x.shape[0] // frames
        options[CALL] = {"frames": frames, "clips": clips, "hw": tuple(x.shape[-2:])}
        if not torch.equal(context, context[::frames].repeat_interleave(frames, 0)):
            options[CALL]["context"] = context
        times = timestep.expand(x.shape[0])[::frames]
        self.__dict__["_compute_dtype"] = x.dtype
        try:
            return self.of_clips(x, times, context, frames, options)
        finally:
            self.__dict__["_compute_dtype"] = None


class SpacetimeUNet3D(FramesInBatch, UNet3DConditionModel):
    """The UNet of ModelScope text-to-video and Zeroscope, called with the frames in the batch.

    State-dict keys and module paths are diffusers' own.
    """

    def of_clips(self, x, times, context, frames, options) -> torch.Tensor:
        """See `FramesInBatch`."""
        video = x.unflatten(0, (-1, frames)).movedim(1, 2)
        extra = {"transformer_options": options}
        prompts = context[::frames]
        out = UNet3DConditionModel.forward(
            self, video, times, prompts, cross_attention_kwargs=extra, return_dict=False
        )[0]
        return out.movedim(2, 1).flatten(0, 1)


def clip_length(rows: int, transformer_options: dict) -> int:
    """Frames of a clip, for a call of `rows` batch rows. Raises ValueError if the rows do not divide into
    clips.
    """
    chunks = len(transformer_options.get("cond_or_uncond", (0,)))
    frames = transformer_options.get(FRAMES) or max(rows // chunks, 1)
    if rows % frames:
        raise ValueError(f"{rows} latent frames in {chunks} prompts do not divide into clips of {frames} frames")
    return frames


def build(config: dict) -> SpacetimeUNet3D:
    """The model of a diffusers `unet/config.json` on the meta device, with the host's attention."""
    with torch.device("meta"):
        net = SpacetimeUNet3D.from_config(config)
    suffix = len(".processor")
    net.set_attn_processor({name: HostAttention(name[:-suffix]) for name in net.attn_processors})
    return net
