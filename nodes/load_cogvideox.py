"""Node: Load CogVideoX."""

from comfy_api.latest import io

from .types import weight_dtype_input


class LoadCogVideoX(io.ComfyNode):
    """CogVideoX's transformer, as released, as MODEL."""

    @classmethod
    def define_schema(cls):
        from ..host.loaders import cogvideox

        return io.Schema(
            node_id="STE_LoadCogVideoX",
            display_name="Load CogVideoX",
            category="Spacetime Edit/load",
            description=(
                "Loads CogVideoX 5B or 1.5 5B from the files that its authors released, which ComfyUI's own loader "
                "does not read. Text encoder: CLIPLoader with type cogvideox and a T5 XXL; VAE: VAELoader."
            ),
            search_aliases=["cogvideox", "cogvideo", "cog", "video transformer", "text to video"],
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=cogvideox.list_files(),
                    tooltip=(
                        "A safetensors file of CogVideoX's folder transformer, in models/diffusion_models. Of a model "
                        "in pieces the first; all of them must lie beside it."
                    ),
                ),
                weight_dtype_input(),
            ],
            outputs=[io.Model.Output(display_name="MODEL", tooltip="The diffusion model. Latents: 4 n + 1 frames.")],
        )

    @classmethod
    def fingerprint_inputs(cls, model_name, weight_dtype):
        from ..host.loaders import cogvideox

        return cogvideox.fingerprint(model_name)

    @classmethod
    def execute(cls, model_name, weight_dtype="default") -> io.NodeOutput:
        from ..host.loaders import cogvideox

        return io.NodeOutput(cogvideox.load_cogvideox(cogvideox.files_of(model_name), weight_dtype=weight_dtype))
