"""Metrics of edits with whatever models the user has: what can be measured, and what is missing for the rest."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import comfy.model_management
import torch
from torch import Tensor

from ..core import metrics
from ..core.flow import Flow, follow, grid_points
from .optical_flow import ClipFlow, estimator_of

EMBEDDED_AT_ONCE = 16
TRACKS_A_SIDE = 16
"""Points along the shorter side of the picture, for motion fidelity."""
LESS, MORE = "less is better", "more is better"


@dataclass(frozen=True)
class Row:
    """One metric: its value, None where it cannot be had, which direction is better, and how it was made or why not."""

    name: str
    value: float | None
    better: str
    note: str = ""


def measure(source: Tensor, edit: Tensor, **options) -> list[Row]:
    """All metrics of one edit, in the order of a table; see `compare`."""
    return compare(source, {"edit": edit}, **options)[0]


def compare(
    source: Tensor,
    edits: Mapping[str, Tensor],
    *,
    prompt: str = "",
    mask: Tensor | None = None,
    clip=None,
    clip_vision=None,
    flow_model=None,
    flow: ClipFlow | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[list[Row]]:
    """All metrics of each edit of a clip.

    source, and edits by name: (F, H, W, 3) in [0, 1], the same size; mask (F or 1, H, W), 1 = edited. clip,
    clip_vision, flow_model: the host's CLIP, CLIP_VISION and OPTICAL_FLOW; flow: of the source, where it is known.
    ValueError, naming the edit, for clips of different size, one frame, NaN, or a flow of another clip.
    """
    _check(source, edits, mask, flow)
    edits = list(edits.values())
    by_flow = _by_flow(source, edits, estimator_of(flow_model), flow, progress)
    made_by = "RAFT" if flow_model is not None else "Lucas-Kanade; connect an OPTICAL_FLOW model for RAFT's"
    tables = []
    for edit, found in zip(edits, by_flow, strict=True):
        rows = _by_embeddings(edit, prompt, clip, clip_vision)
        rows += _of_motion(rows[0].value, found, made_by)
        tables.append([*rows, *_of_background(source, edit, mask), *_of_time(source, edit)])
    return tables


def as_text(rows: Sequence[Row]) -> str:
    """A table of one edit, in columns."""
    cells = [(row.name, number(row.value), row.better, row.note) for row in rows]
    widths = [max(len(cell[i]) for cell in cells) for i in range(3)]
    lines = ["  ".join([*(c.ljust(w) for c, w in zip(cell, widths, strict=False)), cell[3]]) for cell in cells]
    return "\n".join(line.rstrip() for line in lines)


def as_json(rows: Sequence[Row]) -> str:
    """Values by name, null where there is none."""
    return json.dumps({row.name: row.value for row in rows}, indent=1)


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _check(source: Tensor, edits: Mapping[str, Tensor], mask: Tensor | None, flow: ClipFlow | None) -> None:
    for name, edit in edits.items():
        if source.shape != edit.shape:
            raise ValueError(
                f"{name}: its shape (frames, height, width, channels) is {tuple(edit.shape)}, the source's "
                f"{tuple(source.shape)}; expected the same clip size in both, so take the images that were encoded"
            )
    if len(source) < 2:
        raise ValueError(f"source: it has {len(source)} frame; expected a clip of at least 2")
    for name, values in (("source", source), *edits.items(), ("mask", mask)):
        if values is not None and values.isnan().any():
            raise ValueError(f"{name}: it holds NaN; expected numbers from 0 to 1, so check the node it comes from")
    wanted = (len(source) - 1, *source.shape[1:3])
    if flow is not None and flow.occlusion.shape != wanted:
        raise ValueError(
            f"flow: it is of {len(flow.occlusion) + 1} frames of {flow.occlusion.shape[2]} x {flow.occlusion.shape[1]} "
            f"pixels, the source has {len(source)} of {source.shape[2]} x {source.shape[1]}; connect the flow of source"
        )


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


@dataclass
class _Moved:
    """What flow says of an edit: over pairs of frames, and of points followed through both clips.

    warp_sum, compared: see `metrics.warp_sums`; cuts: pairs of frames with nothing to compare.
    """

    warp_sum: float = 0.0
    compared: float = 0.0
    cuts: int = 0
    motion: float = 0.0
    fidelity: float = 0.0


def _by_flow(
    source: Tensor, edits: Sequence[Tensor], estimate: Flow, known: ClipFlow | None, progress: Callable
) -> list[_Moved]:
    """Warp error, motion error and motion fidelity of each edit, pair by pair of frames."""
    pairs, found = len(source) - 1, [_Moved() for _ in edits]
    points = grid_points(*source.shape[1:3], max(4, min(source.shape[1:3]) // TRACKS_A_SIDE))
    tracks = [[points] for _ in (source, *edits)]
    for i in range(pairs):
        of_source = estimate(source[i], source[i + 1]) if known is None else known.forward[i]
        hidden = None if known is None else known.occlusion[i][None]
        tracks[0].append(follow(tracks[0][-1], of_source))
        for k, (edit, moved) in enumerate(zip(edits, found, strict=True), 1):
            comfy.model_management.throw_exception_if_processing_interrupted()
            of_edit = estimate(edit[i], edit[i + 1])
            total, count = metrics.warp_sums(edit[i : i + 2], of_source[None], occlusion=hidden)
            moved.warp_sum, moved.compared, moved.cuts = (
                moved.warp_sum + total,
                moved.compared + count,
                moved.cuts + (count == 0),
            )
            moved.motion += metrics.motion_error(of_source[None], of_edit[None]) / pairs
            tracks[k].append(follow(tracks[k][-1], of_edit))
        progress(i + 1, pairs)
    of_source, *of_edits = (torch.stack(track, 1) for track in tracks)
    for moved, of_edit in zip(found, of_edits, strict=True):
        moved.fidelity = metrics.motion_fidelity(of_source, of_edit)
    return found


def _of_motion(alignment: float | None, found: _Moved, made_by: str) -> list[Row]:
    warp = 100 * found.warp_sum / found.compared if found.compared else None
    cut = f", without {found.cuts} pairs of frames that share nothing" if found.cuts else ""
    rows = [Row("warp error x 100", warp, LESS, f"mean square, by the source's flow ({made_by}){cut}")]
    if alignment is not None and warp:
        rows.append(Row("Q-edit", metrics.q_edit(100 * alignment, warp), MORE, "text alignment / warp error"))
    else:
        rows.append(Row("Q-edit", None, MORE, "wants text alignment and a clip that changes"))
    rows.append(Row("motion error, px", found.motion, LESS, f"flow of source and edit ({made_by})"))
    rows.append(Row("motion fidelity", found.fidelity, MORE, f"points followed through both clips ({made_by})"))
    return rows


def _of_time(source: Tensor, edit: Tensor) -> list[Row]:
    if len(edit) < 3:
        return [Row("flicker x 100", None, LESS, "wants at least 3 frames")]
    return [Row("flicker x 100", 100 * metrics.flicker(edit), LESS, f"source {100 * metrics.flicker(source):.3f}")]


def _of_background(source: Tensor, edit: Tensor, mask: Tensor | None) -> list[Row]:
    names = {"background PSNR, dB": metrics.background_psnr, "background SSIM": metrics.background_ssim}
    if mask is None:
        return [Row(name, None, MORE, "connect a mask (1 = edited)") for name in names]
    mask = mask.reshape(-1, *mask.shape[-2:])
    if mask.min() == 1:
        return [Row(name, None, MORE, "the mask covers the whole clip") for name in names]
    return [Row(name, function(source, edit, mask), MORE, "outside the mask") for name, function in names.items()]
