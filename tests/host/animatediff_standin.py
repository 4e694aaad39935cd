"""What AnimateDiff-Evolved does to a Stable Diffusion U-Net, in small: its calling convention, nothing of its code.

Modules with attention over time are put into the network's block lists while a model is injected, right behind each
spatial transformer; they hold their kernel in `actual_attention`; a patch of the forward calls them; a wrapper of the
whole sampling puts a state into the options that a wrapper of each batch of calls then needs.
"""

import torch
from comfy.ldm.modules.attention import SpatialTransformer, attention_pytorch
from comfy.patcher_extension import PatcherInjection, WrappersMP

KEY, STATE = "ADE", "ADGS"


class VersatileAttention(torch.nn.Module):
    def __init__(self, channels, heads):
        super().__init__()
        self.actual_attention = attention_pytorch
        self.heads = heads
        self.to_q, self.to_k, self.to_v, self.to_out = (torch.nn.Linear(channels, channels) for _ in range(4))

    def forward(self, x, frames):
        tokens = x.shape[1]
        x = x.unflatten(0, (-1, frames)).transpose(1, 2).flatten(0, 1)  # (b d) f c
        out = self.to_out(self.actual_attention(self.to_q(x), self.to_k(x), self.to_v(x), self.heads, None))
        return out.unflatten(0, (-1, tokens)).transpose(1, 2).flatten(0, 1)


class Block(torch.nn.Module):
    def __init__(self, channels, heads):
        super().__init__()
        self.attention_blocks = torch.nn.ModuleList([VersatileAttention(channels, heads) for _ in range(2)])
        self.norms = torch.nn.ModuleList([torch.nn.LayerNorm(channels) for _ in range(2)])

    def forward(self, x, frames):
        for attention, norm in zip(self.attention_blocks, self.norms, strict=True):
            x = x + attention(norm(x), frames)
        return x


class Transformer(torch.nn.Module):
    def __init__(self, channels, heads):
        super().__init__()
        self.transformer_blocks = torch.nn.ModuleList([Block(channels, heads)])


class MotionModule(torch.nn.Module):
    def __init__(self, channels, heads):
        super().__init__()
        self.temporal_transformer = Transformer(channels, heads)
        self.frames = 0

    def forward(self, x, *args, **kwargs):
        height = x.shape[-2]
        tokens = x.flatten(2).transpose(1, 2)
        for block in self.temporal_transformer.transformer_blocks:
            tokens = block(tokens, self.frames)
        return tokens.transpose(1, 2).unflatten(2, (height, -1))


def with_motion(model, heads, channels):
    """A clone of an SD 1.5 ModelPatcher with motion modules of random weights."""
    patched, network = model.clone(), model.model.diffusion_model
    blocks = [*network.input_blocks, network.middle_block, *network.output_blocks]
    generator, modules = torch.Generator().manual_seed(5), {}
    for number, block in enumerate(blocks):
        for part in block:
            if isinstance(part, SpatialTransformer):
                module = modules[number] = MotionModule(part.in_channels, heads).requires_grad_(False)
                for name, weight in module.named_parameters():
                    if "norms" not in name:
                        weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))

    def inject(_):
        for number, module in modules.items():
            at = next(i for i, part in enumerate(blocks[number]) if isinstance(part, SpatialTransformer))
            blocks[number].insert(at + 1, module)

    def eject(_):
        for block in blocks:
            for i in [i for i, part in enumerate(block) if isinstance(part, MotionModule)]:
                block.pop(i)

    def outer_sample(executor, noise, *args, **kwargs):
        guider = executor.class_obj
        before = guider.model_options
        guider.model_options = {**before, "transformer_options": {**before["transformer_options"], STATE: object()}}
        for module in modules.values():
            module.frames = noise.shape[0]
        try:
            return executor(noise, *args, **kwargs)
        finally:
            guider.model_options = before

    def calc_cond_batch(executor, network, conds, x, timestep, model_options):
        assert model_options["transformer_options"][STATE] is not None
        return executor(network, conds, x, timestep, model_options)

    patched.set_injections(KEY, [PatcherInjection(inject=inject, eject=eject)])
    patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, outer_sample)
    patched.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, calc_cond_batch)
    call = lambda layer, x, *args, **kwargs: layer(x)  # noqa: E731
    patched.set_model_forward_timestep_embed_patch((MotionModule, call))
    return patched
