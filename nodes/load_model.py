"""Node: Load Video Diffusers Model."""

from comfy_api.latest import io

from .types import weight_dtype_input


class LoadVideoDiffusersModel(io.ComfyNode):
    """A text-to-video folder in diffusers layout as MODEL, CLIP, VAE."""

    @classmethod
    def define_schema(cls):
        from ..host.loaders import unet3d

        return io.Schema(
            node_id="STE_LoadVideoDiffusersModel",
            display_name="Load Video Diffusers Model",
            category="Spacetime Edit/load",
            description=(
                "Loads a text-to-video model of the ModelScope / Zeroscope family, or Show-1's key frame model, from a "
                "folder in diffusers layout. The result works with the usual nodes: CLIP Text Encode, KSampler, VAE "
                "Encode and VAE Decode. A batch of latent images is one clip, one image a frame. A tiny "
                "model for trying things out is part of the pack."
            ),
            search_aliases=[
                "zeroscope",
                "modelscope",
                "show-1",
                "text to video",
                "diffusers loader",
                "unet3d",
                "tiny model",
            ],
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=[unet3d.EMBEDDED, *unet3d.list_folders()],
                    default=unet3d.EMBEDDED,
                    tooltip=(
                        "A folder below models/diffusers, for example a download of "
                        "cerspense/zeroscope_v2_576w, damo-vilab/text-to-video-ms-1.7b or showlab/show-1-base. The "
                        "embedded tiny model draws coloured shapes in 8 frames of 64 x 64 pixels and needs no download."
                    ),
                ),
                weight_dtype_input(),
            ],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="The diffusion model. Latents: one image a frame."),
                io.Clip.Output(display_name="CLIP", tooltip="The text encoder, for CLIP Text Encode."),
                io.Vae.Output(display_name="VAE", tooltip="Turns frames into latents and latents into frames."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, model_name, weight_dtype):
        from ..host.loaders import unet3d

        return unet3d.fingerprint(model_name)

    @classmethod
    def execute(cls, model_name, weight_dtype="default") -> io.NodeOutput:
        from ..host.loaders import unet3d

        return io.NodeOutput(*unet3d.load_folder(unet3d.folder_path(model_name), weight_dtype=weight_dtype))
