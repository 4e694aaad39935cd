"""Masks of what the host's SAM3 nodes have tracked."""

import torch
from torch import Tensor
from torch.nn.functional import interpolate


def masks_of_tracks(track_data: dict, objects: int) -> Tensor:
    """The masks of the first `objects` tracked objects, those of one after those of another: (objects F, H, W).

    Raises ValueError where fewer were tracked.
    """
    from comfy.ldm.sam3.tracker import unpack_masks

    packed, size = track_data["packed_masks"], track_data["orig_size"]
    found = 0 if packed is None else packed.shape[1]
    if found < objects:
        raise ValueError(
            f"track_data: SAM3 tracked {found} objects, there are {objects} lines of phrases; write one line an "
            f"object, or lower the detection threshold of Run SAM3 Video Track"
        )
    masks = unpack_masks(packed[:, :objects]).float()  # (F, objects, h, w)
    whole = interpolate(masks, size=tuple(size), mode="bilinear", align_corners=False)
    return torch.cat(list(whole.unbind(1)))
