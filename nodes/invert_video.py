"""Invert Video: find the noise from which the model would generate the given clip."""

from comfy_api.latest import io, ui

from .types import TRAJECTORY_TYPE, show_on_node, text_of


class InvertVideo(io.ComfyNode):
    """DDIM inversion (Song et al. 2021) with fixed-point refinement (Pan et al. 2023)."""

    @classmethod
    def define_schema(cls):
        from comfy.samplers import SCHEDULER_NAMES

        return io.Schema(
            node_id="STE_InvertVideo",
            display_name="Invert Video",
            category="Spacetime Edit/trajectory",
            description="Runs the model backwards from a clip to noise (DDIM inversion) and keeps the latent of every "
            "step. The result is the starting point of an edit that keeps motion and background.",
            search_aliases=["ddim inversion", "invert", "unsampler", "str-match", "noise inversion"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The model that will also do the edit, with the same LoRA.",
                ),
                io.Conditioning.Input("positive", tooltip="The prompt that describes the source clip as it is."),
                io.Latent.Input("latent", tooltip="The source clip, encoded with the VAE of this model."),
                io.Int.Input(
                    "steps",
                    default=50,
                    min=2,
                    max=500,
                    tooltip="Number of noise levels. The edit uses the same steps. 50 is the method's own setting, 20 "
                    "is faster and often close. ddim_uniform takes the next number that divides its schedule, such as "
                    "31 for 30.",
                ),
                io.Combo.Input(
                    "scheduler",
                    options=list(SCHEDULER_NAMES),
                    default="ddim_uniform",
                    advanced=True,
                    tooltip="How the noise levels are spaced. ddim_uniform fits Stable Diffusion and its video models.",
                ),
                io.Int.Input(
                    "refinements",
                    default=1,
                    min=0,
                    max=10,
                    advanced=True,
                    tooltip="Extra model calls a step that make the inversion more exact. 0 is the classic inversion.",
                ),
                io.Boolean.Input(
                    "check_reconstruction",
                    default=False,
                    advanced=True,
                    tooltip="Also sample back with the source prompt and report how well the clip returns, in dB of "
                    "the latent. Costs as much as one plain sampling.",
                ),
                io.Float.Input(
                    "to_percent",
                    default=0.0,
                    optional=True,
                    min=0.0,
                    max=0.99,
                    step=0.01,
                    advanced=True,
                    tooltip="How far up to go: 0 = to pure noise. Above 0 for the low-noise model of a pair such as "
                    "Wan 2.2's: the part of the denoising that the other model has. A second Invert Video goes on.",
                ),
                TRAJECTORY_TYPE.Input(
                    "trajectory",
                    optional=True,
                    advanced=True,
                    tooltip="What the low-noise model of a pair has inverted: this model goes on from there to noise. "
                    "The same latent, steps and scheduler for both.",
                ),
            ],
            outputs=[
                TRAJECTORY_TYPE.Output(
                    display_name="trajectory",
                    tooltip="The latents of the source clip from noise to clean, with the model and prompt used.",
                ),
                io.Sigmas.Output(
                    display_name="sigmas",
                    tooltip="The noise levels of the trajectory, for SamplerCustomAdvanced. SplitSigmas makes a weaker "
                    "edit from a part of them.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model,
        positive,
        latent,
        steps,
        scheduler,
        refinements,
        check_reconstruction,
        to_percent=0.0,
        trajectory=None,
    ) -> io.NodeOutput:
        import comfy.samplers
        from latent_preview import prepare_callback

        from ..host.families import family_of
        from ..host.inversion import invert, reconstruct, reconstruction_db

        family_of(model)
        sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), scheduler, steps)
        if check_reconstruction and (to_percent or trajectory is not None):
            raise ValueError("check_reconstruction: a part of a schedule does not lead back to the clip; turn it off")
        callback = prepare_callback(model, len(sigmas) - 1)
        part = {"to_percent": to_percent, "before": trajectory, "say": text_of(cls)}
        trajectory = invert(
            model, positive, latent["samples"], sigmas, refinements=refinements, callback=callback, **part
        )
        if not check_reconstruction:
            return io.NodeOutput(trajectory, trajectory.sigmas)
        returned = reconstruct(trajectory, prepare_callback(model, trajectory.steps))
        note = f"The latent of the clip returns at {reconstruction_db(trajectory, returned):.1f} dB."
        show_on_node(cls, note)
        return io.NodeOutput(trajectory, trajectory.sigmas, ui=ui.PreviewText(note))
