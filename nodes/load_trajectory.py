"""Load Trajectory: an inversion of another session, checked against what is connected."""

from comfy_api.latest import io

from .types import TRAJECTORY_TYPE, valid


class LoadTrajectory(io.ComfyNode):
    """A file of Save Trajectory with the model and the prompt of this graph."""

    @classmethod
    def define_schema(cls):
        from ..host.trajectory_files import list_files

        return io.Schema(
            node_id="STE_LoadTrajectory",
            display_name="Load Trajectory",
            category="Spacetime Edit/trajectory",
            description="Reads a clip that was inverted before, and checks that the model, the prompt and the clip "
            "that you connect are those of the inversion. It replaces Invert Video and takes no model calls.",
            search_aliases=["load inversion", "import trajectory", "open trajectory", "ddim inversion"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=list_files(),
                    tooltip="A file of Save Trajectory, from ComfyUI's output folder (marked [output]) or its input "
                    "folder. Press R to see new files.",
                ),
                io.Model.Input("model", tooltip="The model that the clip was inverted with, and the same LoRA."),
                io.Conditioning.Input("positive", tooltip="The prompt that the clip was inverted with."),
                io.Latent.Input(
                    "latent",
                    optional=True,
                    tooltip="The source clip, encoded with the VAE of this model, to check the file against it.",
                ),
                io.Boolean.Input(
                    "use_anyway",
                    default=False,
                    advanced=True,
                    tooltip="Only warn about another prompt, another clip of the same size, or a fine-tune with other "
                    "weights. The edit then keeps less of the source. Another kind of model, size or noise schedule "
                    "is always refused.",
                ),
            ],
            outputs=[
                TRAJECTORY_TYPE.Output(
                    display_name="trajectory",
                    tooltip="The latents of the source clip from noise to clean, with the model and prompt connected.",
                ),
                io.Sigmas.Output(
                    display_name="sigmas",
                    tooltip="The noise levels of the trajectory, for SamplerCustomAdvanced. SplitSigmas makes a weaker "
                    "edit from a part of them.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, file=None):
        from ..host.trajectory_files import file_path

        return file is None or valid(file_path, file)

    @classmethod
    def fingerprint_inputs(cls, file, **connected):
        from ..host.trajectory_files import file_stamp

        return None if file is None else file_stamp(file)

    @classmethod
    def execute(cls, file, model, positive, use_anyway=False, latent=None) -> io.NodeOutput:
        from ..host.trajectory_files import load_trajectory

        samples = None if latent is None else latent["samples"]
        trajectory = load_trajectory(file, model, positive, samples, use_anyway=use_anyway)
        return io.NodeOutput(trajectory, trajectory.sigmas)
