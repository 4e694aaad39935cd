"""Save Trajectory: keep an inversion for another session."""

from comfy_api.latest import io, ui

from .types import TRAJECTORY_TYPE, show_on_node, valid


class SaveTrajectory(io.ComfyNode):
    """Latents, sigmas and a fingerprint of what made them, in one safetensors file."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="STE_SaveTrajectory",
            display_name="Save Trajectory",
            category="Spacetime Edit/trajectory",
            description="Writes an inverted clip to a file in the output folder, so that Load Trajectory brings it "
            "back without inverting again. The file holds the latents and a fingerprint of model, prompt and clip, not "
            "the model or the prompt itself.",
            search_aliases=["save inversion", "export trajectory", "store latents", "ddim inversion"],
            inputs=[
                TRAJECTORY_TYPE.Input("trajectory", tooltip="The inverted clip, from Invert Video."),
                io.String.Input(
                    "filename_prefix",
                    default="trajectories/clip",
                    tooltip="Folder and beginning of the name, below ComfyUI's output folder. A number is added, so "
                    "nothing is overwritten.",
                ),
            ],
            outputs=[
                TRAJECTORY_TYPE.Output(display_name="trajectory", tooltip="The same trajectory, to go on editing with.")
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, filename_prefix=None):
        from ..host.trajectory_files import check_prefix

        return filename_prefix is None or valid(check_prefix, filename_prefix)

    @classmethod
    def execute(cls, trajectory, filename_prefix) -> io.NodeOutput:
        from ..host.trajectory_files import describe_file, save_trajectory

        note = f"Saved {describe_file(save_trajectory(trajectory, filename_prefix))}"
        show_on_node(cls, note)
        return io.NodeOutput(trajectory, ui=ui.PreviewText(note))
