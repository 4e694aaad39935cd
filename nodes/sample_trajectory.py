"""Sample from Trajectory: a sampler that starts where the inversion ended."""

from comfy_api.latest import io

from .types import TRAJECTORY_TYPE, continue_from_latent_input, mask_inputs, show_share, text_of


class SampleFromTrajectory(io.ComfyNode):
    """DDIM from an inverted latent, with latent blend outside a mask."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="STE_SampleFromTrajectory",
            display_name="Sample from Trajectory",
            category="Spacetime Edit/trajectory",
            description="A sampler for SamplerCustomAdvanced that starts from the inverted clip, whatever noise is "
            "connected. With a new prompt it is a prompt swap; with a mask the rest of the picture stays.",
            search_aliases=["prompt swap", "ddim", "latent blend", "prompt to prompt", "inversion sampler"],
            inputs=[
                TRAJECTORY_TYPE.Input("trajectory", tooltip="The inverted clip, from Invert Video."),
                *mask_inputs(),
                continue_from_latent_input(),
            ],
            outputs=[io.Sampler.Output(display_name="sampler", tooltip="Connect it to SamplerCustomAdvanced.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, trajectory, dilation, blend, mask=None, continue_from_latent=False) -> io.NodeOutput:
        from ..host.sampling import TrajectorySampler

        where = {"mask": mask, "dilation": dilation, "blend_source": blend}
        sampler = TrajectorySampler(trajectory, continue_from_latent=continue_from_latent, say=text_of(cls), **where)
        show_share(cls, sampler)
        return io.NodeOutput(sampler)
