"""Metrics on inputs with a known answer, their invariants, and independent libraries."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from spacetime_edit.core import metrics
from torchmetrics.functional.image import structural_similarity_index_measure

F, H, W = 5, 24, 32
SEEDS = st.integers(0, 2**31 - 1)


def clip(seed=0, frames=F, height=H, width=W):
    return torch.rand(frames, height, width, 3, generator=torch.Generator().manual_seed(seed))


def sliding(dx, dy, frames=F, seed=0):
    """A picture that moves by whole pixels, and its flow."""
    large = clip(seed, 1, H + 4 * abs(dy) + 8, W + 4 * abs(dx) + 8)[0]
    top, left = (4 + max(0, d) * (frames - 1) for d in (dy, dx))
    made = torch.stack(
        [large[top - i * dy : top - i * dy + H, left - i * dx : left - i * dx + W] for i in range(frames)]
    )
    flow = torch.tensor([dx, dy], dtype=torch.float32).view(1, 2, 1, 1).expand(frames - 1, 2, H, W)
    return made, flow


# --- known answers ------------------------------------------------------


@pytest.mark.parametrize("kind", ["l1", "l2"])
@pytest.mark.parametrize("step", [(0, 0), (2, 0), (0, -1), (-1, 2)])
def test_a_picture_that_moves_as_its_flow_says_has_no_warp_error(step, kind):
    frames, flow = sliding(*step)
    assert metrics.warp_error(frames, flow, kind) <= 1e-6
    wrong = flow + 1
    assert metrics.warp_error(frames, wrong, kind) > 0.05


def test_warp_error_of_a_known_difference_and_without_occluded_pixels():
    frames, flow = torch.zeros(2, H, W, 3), torch.zeros(1, 2, H, W)
    frames[1] = 0.5
    assert metrics.warp_error(frames, flow, "l1") == pytest.approx(0.5)
    assert metrics.warp_error(frames, flow, "l2") == pytest.approx(0.25)
    frames[1, :, W // 2 :] = 0
    occlusion = torch.zeros(1, H, W)
    occlusion[:, :, : W // 2] = 1
    assert metrics.warp_error(frames, flow, "l1", occlusion) == 0
    with pytest.raises(ValueError, match="flow: it leads every pixel out of the picture"):
        metrics.warp_error(frames, flow + 100)


def test_q_edit_is_the_papers():
    assert metrics.q_edit(0.3656, 0.0142) == pytest.approx(25.75, abs=0.005)
    with pytest.raises(ValueError, match="warp: it is 0"):
        metrics.q_edit(0.3, 0)


def test_motion_error_is_the_length_of_the_difference():
    _, flow = sliding(2, 0)
    assert metrics.motion_error(flow, flow) == 0
    assert metrics.motion_error(flow, flow + torch.tensor([3.0, 4.0]).view(1, 2, 1, 1)) == pytest.approx(5)


def tracks(*directions, frames=F):
    steps = torch.tensor(directions, dtype=torch.float32)[:, None] * torch.arange(frames)[None, :, None]
    return steps + 10


def test_motion_fidelity_of_constructed_tracks():
    right, left, down, still = (1, 0), (-1, 0), (0, 1), (0, 0)
    fidelity = lambda a, b: metrics.motion_fidelity(tracks(*a), tracks(*b))  # noqa: E731
    assert fidelity([right], [right]) == pytest.approx(1)
    assert fidelity([right], [(5, 0)]) == pytest.approx(1)  # speed does not count
    assert fidelity([right], [left]) == pytest.approx(-1)
    assert fidelity([right], [down]) == pytest.approx(0)
    assert fidelity([still], [still]) == 1 and fidelity([still], [right]) == 0
    assert fidelity([right, left], [right]) == pytest.approx(
        ((1 - 1) / 2 + 1) / 2
    )  # one of the source's has no partner
    with pytest.raises(ValueError, match="tracks: one of the clips has none"):
        metrics.motion_fidelity(tracks(right), tracks(right)[:0])


def test_flicker_and_seam():
    ramp = torch.linspace(0, 0.8, F).view(F, 1, 1, 1).expand(F, H, W, 3)
    assert metrics.flicker(ramp) <= 1e-6
    blink = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0]).view(F, 1, 1, 1).expand(F, H, W, 3)
    assert metrics.flicker(blink) == pytest.approx(2)
    assert metrics.seam(ramp, [2]) == pytest.approx(1)
    jump = ramp.clone()
    jump[3:] += 0.2
    assert metrics.seam(jump, [3]) == pytest.approx(2)
    with pytest.raises(ValueError, match=r"boundaries: \[0\]; expected frames from 1 to 4"):
        metrics.seam(ramp, [0])
    with pytest.raises(ValueError, match="flicker needs at least 3"):
        metrics.flicker(ramp[:2])


def test_what_lies_inside_the_mask_does_not_count():
    source, edit = clip(1), clip(1)
    mask = torch.zeros(1, H, W)
    mask[:, 4:10, 4:10] = 1
    edit[:, 4:10, 4:10] = 0
    black = lambda a, b: (a - b).abs().mean((1, 2, 3))  # noqa: E731
    assert metrics.background_psnr(source, edit, mask) == 100
    assert metrics.background_lpips(source, edit, mask, black) == 0 < metrics.frame_lpips(source, edit, black)
    assert metrics.background_ssim(source, source, mask) == pytest.approx(1)
    with pytest.raises(ValueError, match="mask: it covers the whole clip"):
        metrics.background_psnr(source, edit, torch.ones(1, H, W))
    with pytest.raises(ValueError, match=r"edit: its size is \(4, 24, 32, 3\), that of source \(5, 24, 32, 3\)"):
        metrics.background_psnr(source, edit[:4], mask)
    with pytest.raises(ValueError, match="mask: it has 2 frames, the clip 5"):
        metrics.background_ssim(source, edit, torch.zeros(2, H, W))


# --- independent libraries ----------------------------------------------


def test_psnr_and_ssim_are_those_of_other_libraries():
    source = clip(1)
    edit = (source + 0.1 * (clip(2) - 0.5)).clamp(0, 1)
    none = torch.zeros(1, H, W)
    whole = peak_signal_noise_ratio(source.double().numpy(), edit.double().numpy(), data_range=1.0)
    assert abs(metrics.background_psnr(source, edit, none) - whole) <= 1e-5
    inner = torch.ones(1, H, W)
    inner[:, 5:-5, 5:-5] = 0  # windows of 11 pixels inside the picture: libraries differ in how they fill its border
    ours = metrics.background_ssim(source, edit, inner)
    options = dict(channel_axis=-1, data_range=1.0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
    pairs = [(a.double().numpy(), b.double().numpy()) for a, b in zip(source, edit, strict=True)]
    by_skimage = [structural_similarity(a, b, **options) for a, b in pairs]
    assert abs(ours - sum(by_skimage) / F) <= 1e-5
    images = (x.movedim(-1, 1) for x in (source, edit))
    _, full = structural_similarity_index_measure(*images, data_range=1.0, return_full_image=True)
    assert abs(ours - float(full[..., 5:-5, 5:-5].mean())) <= 1e-5


# --- invariants ---------------------------------------------------------


@settings(max_examples=25, deadline=None, derandomize=True)
@given(SEEDS)
def test_cosines_are_bounded_and_perfect_for_equal_embeddings(seed):
    g = torch.Generator().manual_seed(seed)
    frames, text = torch.randn(F, 16, generator=g), torch.randn(16, generator=g)
    assert -1 <= metrics.text_alignment(frames, text) <= 1
    assert metrics.text_alignment(text.expand(F, -1), 3 * text) == pytest.approx(1)
    assert metrics.frame_consistency(text.expand(F, -1)) == pytest.approx(1)
    assert metrics.frame_consistency(frames) == pytest.approx(metrics.frame_consistency(frames.flip(0)))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(SEEDS)
def test_more_noise_is_worse_and_order_of_clips_does_not_matter(seed):
    source, noise, mask = clip(seed), clip(seed + 1) - 0.5, torch.zeros(1, H, W)
    edits = [source + amount * noise for amount in (0.01, 0.1, 0.4)]
    for metric in (metrics.background_psnr, metrics.background_ssim):
        values = [metric(source, edit, mask) for edit in edits]
        assert values == sorted(values, reverse=True)
        assert metric(source, edits[1], mask) == pytest.approx(metric(edits[1], source, mask))
    flow = torch.zeros(F - 1, 2, H, W)
    still = source[:1].expand(F, -1, -1, -1)
    errors = [metrics.warp_error(still + amount * noise, flow) for amount in (0.0, 0.1, 0.4)]
    assert errors == sorted(errors) and errors[0] <= 1e-12


@settings(max_examples=25, deadline=None, derandomize=True)
@given(SEEDS)
def test_motion_fidelity_is_symmetric_bounded_and_never_nan(seed):
    g = torch.Generator().manual_seed(seed)
    a, b = torch.randn(4, F, 2, generator=g), torch.randn(3, F, 2, generator=g)
    a[0], b[0] = 5.0, 2.0  # that stand still
    value = metrics.motion_fidelity(a, b)
    assert -1 <= value <= 1 and value == pytest.approx(metrics.motion_fidelity(b, a))
    assert metrics.motion_fidelity(a, a) == pytest.approx(1)


def test_one_frame_is_refused():
    with pytest.raises(ValueError, match="frames: there is 1; expected a clip of at least 2"):
        metrics.frame_consistency(torch.randn(1, 4))
    with pytest.raises(ValueError, match="frames: there is 1"):
        metrics.warp_error(clip(frames=1), torch.zeros(0, 2, H, W))
