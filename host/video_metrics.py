"""Metrics of an edit with whatever models the user has: what can be measured, and what is missing for the rest."""

from collections.abc import Callable
from dataclasses import dataclass

import comfy.model_management
import torch
from torch import Tensor

from ..core import metrics
from ..core.flow import estimate_flow

EMBEDDED_AT_ONCE = 16
LESS, MORE = "less is better", "more is better"


@dataclass(frozen=True)
class Row:
    """One metric: its value, None where it cannot be had, which direction is better, and how it was made or why not."""

    name: str
    value: float | None
    better: str
    note: str = ""


def measure(
    source: Tensor,
    edit: Tensor,
    *,
    prompt: str = "",
    mask: Tensor | None = None,
    clip=None,
    clip_vision=None,
    flow_model=None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Row]:
    """All metrics of an edit, in the order of a table.

    source, edit: (F, H, W, 3) in [0, 1], the same size; mask (F or 1, H, W), 1 = edited. clip, clip_vision, flow_model:
    the host's CLIP, CLIP_VISION and OPTICAL_FLOW. ValueError for clips of different size, one frame or NaN.
    """
    _check(source, edit, mask)
    rows = _by_embeddings(edit, prompt, clip, clip_vision)
    flow = _flow_of(flow_model)
    made_by = "RAFT" if flow_model is not None else "Lucas-Kanade; connect an OPTICAL_FLOW model for RAFT's"
    warp, motion = _by_flow(source, edit, flow, progress)
    rows += [Row("warp error x 100", 100 * warp, LESS, f"mean square, by the source's flow ({made_by})")]
    if rows[0].value is not None and warp > 0:
        rows.append(Row("Q-edit", metrics.q_edit(100 * rows[0].value, 100 * warp), MORE, "text alignment / warp error"))
    else:
        rows.append(Row("Q-edit", None, MORE, "wants text alignment and a clip that changes"))
    rows.append(Row("motion error, px", motion, LESS, f"flow of source and edit ({made_by})"))
    rows += _of_background(source, edit, mask)
    if len(edit) > 2:
        rows.append(
            Row("flicker x 100", 100 * metrics.flicker(edit), LESS, f"source {100 * metrics.flicker(source):.3f}")
        )
    return rows


def _check(source: Tensor, edit: Tensor, mask: Tensor | None) -> None:
    if source.shape != edit.shape:
        raise ValueError(
            f"edit: its shape (frames, height, width, channels) is {tuple(edit.shape)}, the source's "
            f"{tuple(source.shape)}; expected the same clip size in both, so take the images that were encoded"
        )
    if len(source) < 2:
        raise ValueError(f"source: it has {len(source)} frame; expected a clip of at least 2")
    for name, values in (("source", source), ("edit", edit), ("mask", mask)):
        if values is not None and values.isnan().any():
            raise ValueError(f"{name}: it holds NaN; expected numbers from 0 to 1, so check the node it comes from")


def _by_embeddings(edit: Tensor, prompt: str, clip, clip_vision) -> list[Row]:
    """Text alignment and frame consistency."""
    if clip_vision is None:
        wants = "connect CLIP Vision (Load CLIP Vision, such as clip_vision_h)"
        return [Row("text alignment (CLIP-T)", None, MORE, wants), Row("frame consistency (CLIP-F)", None, MORE, wants)]
    parts = [clip_vision.encode_image(part)["image_embeds"] for part in edit.split(EMBEDDED_AT_ONCE)]
    frames = torch.cat(parts).float()
    consistency = Row("frame consistency (CLIP-F)", metrics.frame_consistency(frames), MORE, "cosine")
    return [_alignment(frames, prompt, clip), consistency]


def _alignment(frames: Tensor, prompt: str, clip) -> Row:
    name = "text alignment (CLIP-T)"
    if clip is None or not prompt.strip():
        return Row(name, None, MORE, "connect CLIP and write the prompt of the edit")
    _, pooled = clip.encode_from_tokens(clip.tokenize(prompt), return_pooled=True)
    if pooled is None or pooled.shape[-1] != frames.shape[-1]:
        own = "no pooled output" if pooled is None else f"{pooled.shape[-1]} channels"
        return Row(name, None, MORE, f"CLIP has {own}, CLIP Vision {frames.shape[-1]}: they are not of one model")
    if not _projects(clip):
        return Row(name, None, MORE, "this CLIP has no text projection (checkpoints lack it); load one with it")
    return Row(name, metrics.text_alignment(frames, pooled[0].float()), MORE, "cosine")


def _projects(clip) -> bool:
    """Whether a CLIP's pooled output is in the space of images: its projection is more than the identity."""
    found = [p for name, p in clip.cond_stage_model.named_parameters() if name.endswith("text_projection.weight")]
    return any(not torch.equal(p.float().cpu(), torch.eye(*p.shape)) for p in found)


def _flow_of(flow_model) -> Callable[[Tensor, Tensor], Tensor]:
    """From one frame (H, W, 3) to the next: (2, H, W) in pixels."""
    if flow_model is None:
        return estimate_flow
    from comfy_extras.void_noise_warp import RaftOpticalFlow

    comfy.model_management.load_model_gpu(flow_model)
    raft = RaftOpticalFlow(flow_model.model)
    return lambda a, b: raft(a.movedim(-1, 0), b.movedim(-1, 0)).cpu()


def _by_flow(source: Tensor, edit: Tensor, flow, progress) -> tuple[float, float]:
    """Warp error and motion error, pair by pair of frames."""
    errors, motions, pairs = [], [], len(source) - 1
    for i in range(pairs):
        comfy.model_management.throw_exception_if_processing_interrupted()
        of_source, of_edit = flow(source[i], source[i + 1])[None], flow(edit[i], edit[i + 1])[None]
        errors.append(metrics.warp_error(edit[i : i + 2], of_source))
        motions.append(metrics.motion_error(of_source, of_edit))
        progress(i + 1, pairs)
    return sum(errors) / pairs, sum(motions) / pairs


def _of_background(source: Tensor, edit: Tensor, mask: Tensor | None) -> list[Row]:
    names = {"background PSNR, dB": metrics.background_psnr, "background SSIM": metrics.background_ssim}
    if mask is None:
        return [Row(name, None, MORE, "connect a mask (1 = edited)") for name in names]
    mask = mask.reshape(-1, *mask.shape[-2:])
    if mask.min() == 1:
        return [Row(name, None, MORE, "the mask covers the whole clip") for name in names]
    return [Row(name, function(source, edit, mask), MORE, "outside the mask") for name, function in names.items()]
