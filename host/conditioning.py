"""What a model needs to find in a conditioning beside the prompt."""

from collections.abc import Iterable, Mapping

from .families import family_of

PICTURE = "concat_latent_image"
"""Key under which the host's image-to-video nodes put the latent of the picture."""


def check_picture(model, settings: Iterable[Mapping], name: str) -> None:
    """ValueError where a ModelPatcher's network reads a picture beside the latent and one of `settings` holds none.

    settings: the dict of each entry of a CONDITIONING. The host would draw on from a black picture.
    """
    attributes, own = vars(model.model.diffusion_model), model.model.latent_format.latent_channels
    channels = attributes.get("in_channels", attributes.get("in_dim", own))
    optional = family_of(model).picture_optional
    if channels > own and not optional and not all(PICTURE in each for each in settings):
        raise ValueError(
            f"{name}: this {family_of(model).name} model draws on from a picture (it reads {channels} channels, a "
            f"latent has {own}), but the conditioning holds none; put the model's image-to-video node between the text "
            f"encoder and this input, with the first frame of the clip"
        )
