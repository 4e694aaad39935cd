"""Regions from Attention: what in the clip belongs together, as the model sees it."""

import torch
from comfy_api.latest import io, ui

from .types import REGIONS_TYPE, inverted_clip_inputs, show_on_node, valid


class RegionsFromAttention(io.ComfyNode):
    """Clusters of self-attention over all frames (VideoGrain, arXiv 2502.17258, appendix B)."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="STE_RegionsFromAttention",
            display_name="Regions from Attention",
            category="Spacetime Edit/ST-Layout",
            description="Finds regions of the source clip without any mask: what the video model itself sees as one "
            "thing, followed through all frames. Run it once to see the numbered regions, then write a phrase for each "
            "that is to change.",
            search_aliases=["videograin", "st-layout", "k-means", "segment", "auto mask", "layout from attention"],
            is_output_node=True,
            inputs=[
                *inverted_clip_inputs(),
                io.Int.Input(
                    "kinds",
                    default=3,
                    min=2,
                    max=16,
                    tooltip="How many kinds of things to tell apart, background included. More finds smaller ones and "
                    "may cut large ones.",
                ),
                io.String.Input(
                    "phrases",
                    multiline=True,
                    default="",
                    tooltip="One line a region, in the order of the numbers: the words of the prompt that belong in "
                    "it. An empty line leaves its region out. All empty: every region, without words.",
                ),
                io.Boolean.Input(
                    "split",
                    default=True,
                    tooltip="Things of one kind that do not touch become regions of their own.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=False,
                    tooltip="Another number may group the clip in another way. The same number gives the same regions.",
                ),
                io.String.Input(
                    "layers",
                    default="",
                    advanced=True,
                    tooltip="Blocks whose attention to use, such as d0,u2-u3 (d = down, m = middle, u = up, counted "
                    "over the blocks with attention). Empty: those of the finest resolution with at most 1024 "
                    "cells; of a transformer (b0, b1, ...) all.",
                ),
            ],
            outputs=[
                REGIONS_TYPE.Output(
                    display_name="regions", tooltip="Those with a phrase, or all of them while there is none."
                ),
                io.Mask.Output(
                    display_name="mask",
                    tooltip="1 in any of these regions, one mask a frame, for the mask input of Sample from "
                    "Trajectory. While there is no phrase: in all but the largest.",
                ),
                io.Image.Output(display_name="overlay", tooltip="The clip under its numbered regions."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, layers=None):
        from ..host.layers import parse_blocks

        return valid(parse_blocks, layers or "")

    @classmethod
    def execute(cls, trajectory, images, kinds, phrases, split, seed, layers="") -> io.NodeOutput:
        from comfy.utils import ProgressBar

        from ..core.regions import Region
        from ..host.region_finding import regions_from_attention
        from ..host.relevance_preview import check_images
        from .region_overlay import numbered, overlay

        check_images(images, trajectory)
        bar = ProgressBar(1)
        masks = regions_from_attention(
            trajectory,
            kinds,
            tuple(images.shape[1:3]),
            seed=seed,
            instances=split,
            layers=layers,
            frames=len(images),
            progress=bar.update_absolute,
        )
        lines = [line.strip() for line in phrases.rstrip().split("\n")]
        if len(lines) > len(masks):
            raise ValueError(
                f"phrases: there are {len(lines)} lines for {len(masks)} regions; write one line a region, in the "
                f"order of their numbers"
            )
        found = [Region(line, mask) for line, mask in zip(lines + [""] * (len(masks) - len(lines)), masks, strict=True)]
        shown, _, legend = overlay(images, found, 0.5)
        shown = numbered(shown, found)
        show_on_node(cls, legend)
        named = tuple(region for region in found if region.phrase)
        union = sum((region.mask for region in named or found[1:]), torch.zeros_like(found[0].mask))
        return io.NodeOutput(named or tuple(found), union, shown, ui=ui.PreviewImage(shown, cls=cls))
