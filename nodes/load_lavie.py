"""Node: Load LaVie."""

from comfy_api.latest import io

from .types import weight_dtype_input


class LoadLaVie(io.ComfyNode):
    """LaVie's base model as MODEL."""

    @classmethod
    def define_schema(cls):
        from ..host.loaders import lavie

        return io.Schema(
            node_id="STE_LoadLaVie",
            display_name="Load LaVie",
            category="Spacetime Edit/load",
            description=(
                "Loads the base model of LaVie, a text-to-video model of 16 frames of 512 x 320 pixels, from "
                "lavie_base.pt. A batch of latent images is one clip, one image a frame. Text encoder and VAE are "
                "those of a Stable Diffusion 1.x checkpoint."
            ),
            search_aliases=["lavie", "lavie base", "text to video", "video model"],
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=lavie.list_files(),
                    tooltip="lavie_base.pt, or the same as safetensors, in models/diffusion_models.",
                ),
                weight_dtype_input(),
            ],
            outputs=[io.Model.Output(display_name="MODEL", tooltip="The diffusion model. Latents: one image a frame.")],
        )

    @classmethod
    def fingerprint_inputs(cls, model_name, weight_dtype):
        from ..host.loaders import lavie

        return lavie.fingerprint(model_name)

    @classmethod
    def execute(cls, model_name, weight_dtype="default") -> io.NodeOutput:
        from ..host.loaders import lavie

        return io.NodeOutput(lavie.load_lavie(lavie.file_path(model_name), weight_dtype=weight_dtype))
