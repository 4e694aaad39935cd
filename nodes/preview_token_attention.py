"""Preview Token Attention: where the model puts a word, before and after ST-Layout."""

from comfy_api.latest import io, ui

from .types import fraction, inverted_clip_inputs, show_on_node, valid


class PreviewTokenAttention(io.ComfyNode):
    """Cross-attention of words as a heat map over the clip (VideoGrain, arXiv 2502.17258, figure 7)."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="STE_PreviewTokenAttention",
            display_name="Preview Token Attention",
            category="Spacetime Edit/ST-Layout",
            description="Shows where words of the edit's prompt act in the clip, as heat maps side by side: without "
            "the patch, and with it. If a word glows outside its region, raise cross_strength.",
            search_aliases=["videograin", "st-layout", "attention map", "heatmap", "cross-attention", "daam"],
            is_output_node=True,
            inputs=[
                *inverted_clip_inputs(),
                io.Conditioning.Input("positive", tooltip="The prompt of the edit, from Encode Regional Prompt."),
                io.String.Input(
                    "words", default="", tooltip="Words of the prompt, just as they stand there, such as 'red circle'."
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="The model with the ST-Layout Attention Patch, for the second heat map. Leave "
                    "unconnected to see the first only.",
                ),
                fraction(
                    "percent",
                    0.1,
                    tooltip="Where in the denoising to look: 0 = in pure noise, 1 = at the clean clip. The patch acts "
                    "only inside its own window.",
                ),
                fraction(
                    "opacity",
                    0.8,
                    step=0.05,
                    advanced=True,
                    tooltip="How strongly the heat map covers the grey clip. 1 shows the colours only.",
                ),
                io.String.Input(
                    "layers",
                    default="",
                    advanced=True,
                    tooltip="Blocks whose attention to use, such as d0,u2-u3 (d = down, m = middle, u = up, counted "
                    "over the blocks with attention). Empty: those at the two finest resolutions; of a "
                    "transformer (b0, b1, ...) all.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="heat map",
                    tooltip="The clip in grey under the attention of each pixel to the words, without the patch on "
                    "the left and with it on the right, in one scale: black = none, over purple and red to yellow.",
                ),
                io.Mask.Output(
                    display_name="attention",
                    tooltip="The last of the heat maps as a mask from 0 to 1, 1 = the most anywhere in the clip.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, layers=None):
        from ..host.layers import parse_blocks

        return valid(parse_blocks, layers or "")

    @classmethod
    def execute(cls, trajectory, images, positive, words, percent, opacity=0.8, layers="", model=None) -> io.NodeOutput:
        import torch

        from ..host.latents import time_of
        from ..host.regional_prompts import placed_on
        from ..host.relevance_preview import check_images, heat_map
        from ..host.token_attention import share_inside, token_attention

        check_images(images, trajectory)
        models = {"without the patch": None} | ({} if model is None else {"with it": model})
        options = dict(percent=percent, layers=layers, frames=len(images))
        maps = [
            token_attention(trajectory, positive, words, tuple(images.shape[1:3]), model=m, **options)
            for m in models.values()
        ]
        shown = heat_map(torch.cat(maps, 2), torch.cat([images[..., :3]] * len(maps), 2), opacity)
        layout = placed_on(positive, percent)[1].layout
        time = time_of(trajectory.clean, trajectory.model)
        shares = [share_inside(attention, layout, words, time) for attention in maps]
        if shares[0] is not None:
            parts = (f"{name}: {100 * share:.0f} %" for name, share in zip(models, shares, strict=True))
            show_on_node(cls, f"Attention to '{words}' that lies in its region, {', '.join(parts)}")
        attention = maps[-1] / maps[-1].max().clamp_min(torch.finfo(torch.float32).tiny)
        return io.NodeOutput(shown, attention, ui=ui.PreviewImage(shown, cls=cls))
