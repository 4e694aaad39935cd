"""The nodes of ST-Layout from end to end on an example clip: masks decide what the prompt's order does not say."""

import nodes
import pytest
import torch
from spacetime_edit.host import region_finding
from spacetime_edit.host.inflation import inflation_of
from spacetime_edit.host.loaders.example_clips import clip_names, load_clip
from spacetime_edit.host.region_prompt import LAYOUT
from spacetime_edit.nodes.encode_regional_prompt import EncodeRegionalPrompt
from spacetime_edit.nodes.inflate_attention import InflateAttention
from spacetime_edit.nodes.invert_video import InvertVideo
from spacetime_edit.nodes.preview_regions import PreviewRegions
from spacetime_edit.nodes.preview_token_attention import PreviewTokenAttention
from spacetime_edit.nodes.region_prompt import RegionPrompt
from spacetime_edit.nodes.regions_from_attention import RegionsFromAttention
from spacetime_edit.nodes.regions_from_masks import RegionsFromMasks
from spacetime_edit.nodes.sample_trajectory import SampleFromTrajectory
from spacetime_edit.nodes.st_layout_patch import STLayoutAttentionPatch
from spacetime_edit.tests.host import support
from spacetime_edit.tools.shape_world import instruments, world

PROMPT = "a cyan triangle on the left and a purple circle on the right, white background"
LEFT, RIGHT = "a purple circle", "a cyan triangle"  # the other way round
STEPS = 12


@pytest.fixture(scope="module")
def clip():
    return load_clip(clip_names()[5])  # a blue circle and a red circle


def regions(clip, left=LEFT, right=RIGHT):
    (first,) = RegionPrompt.execute(clip.mask_1, left).result
    return RegionPrompt.execute(clip.mask_2, right, regions=first).result[0]


def encoded(tiny, clip, mode="paper"):
    return EncodeRegionalPrompt.execute(tiny.clip, PROMPT, mode, regions=regions(clip)).result[0]


def patched(model, *, cross=3.0, own=1.0, end=0.6, levels=""):
    strengths = {"cross_strength": cross, "self_strength": own, "temporal_strength": 0.0}
    return STLayoutAttentionPatch.execute(model, start_percent=0.0, end_percent=end, levels=levels, **strengths).result[
        0
    ]


@pytest.fixture(scope="module")
def inverted(tiny, clip):
    with torch.inference_mode():
        latent = nodes.VAEEncode().encode(tiny.vae, clip.images)[0]
        positive = support.encode(tiny, clip.source_prompt)
        options = dict(scheduler="ddim_uniform", refinements=0, check_reconstruction=False)
        return latent, InvertVideo.execute(tiny.model, positive, latent, STEPS, **options).result


def edit(tiny, clip, inverted, model, conditioning):
    latent, (trajectory, sigmas, *_) = inverted
    sampler = SampleFromTrajectory.execute(trajectory, 4.0, "trajectory", clip.mask_1 + clip.mask_2).result[0]
    guider = support.guider_of(model, conditioning, support.encode(tiny, ""), 4.0)
    out = guider.sample(torch.zeros_like(latent["samples"]), latent["samples"], sampler, sigmas, disable_pbar=True)
    return tiny.vae.decode(out).movedim(-1, 1).clamp(0, 1)


def test_masks_decide_against_the_prompts_order(tiny, clip, inverted):
    conditioning = encoded(tiny, clip)
    colours = []
    for model in (patched(tiny.model), patched(tiny.model, cross=0.0, own=0.0)):
        frames = edit(tiny, clip, inverted, model, conditioning)
        colours.append([pair.colour for pair in instruments.identify(frames, 2)])
    assert colours == [["purple", "cyan"], ["cyan", "purple"]]


def test_strength_zero_is_the_plain_edit_bit_for_bit(tiny, clip, inverted):
    conditioning = encoded(tiny, clip)
    plain = edit(tiny, clip, inverted, tiny.model, support.encode(tiny, PROMPT))
    assert torch.equal(plain, edit(tiny, clip, inverted, patched(tiny.model, cross=0, own=0), conditioning))
    assert torch.equal(plain, edit(tiny, clip, inverted, tiny.model, conditioning))  # nor does it without the patch


def test_regions_chain_in_their_order(clip):
    made = regions(clip)
    assert [region.phrase for region in made] == [LEFT, RIGHT]
    assert torch.equal(made[1].mask, clip.mask_2)


def test_open_regions_are_a_plain_prompt(tiny):
    (conditioning,) = EncodeRegionalPrompt.execute(tiny.clip, PROMPT, "paper").result
    assert torch.equal(conditioning[0][0], support.encode(tiny, PROMPT)[0][0])
    assert conditioning[0][1][LAYOUT].regions == ()


def test_the_modes_encode_the_same_and_splice_does_not(tiny, clip):
    paper, released = (encoded(tiny, clip, mode) for mode in ("paper", "released"))
    assert torch.equal(paper[0][0], released[0][0])
    (spliced,) = EncodeRegionalPrompt.execute(tiny.clip, PROMPT, "released", True, regions(clip)).result
    assert not torch.equal(spliced[0][0], released[0][0])


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"levels": "2;4"}, "levels: '2;4' is no list of 1, 2, 4, 8 and so on"),
        ({"levels": "0"}, "levels: '0' is no list of 1, 2, 4"),
        ({"levels": "2,3"}, "levels: '2,3' is no list of 1, 2, 4"),
        ({"start_percent": 0.6, "end_percent": 0.4}, "start_percent, end_percent: 0.6 and 0.4"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_the_run(values, words):
    assert words in STLayoutAttentionPatch.validate_inputs(**values)
    assert STLayoutAttentionPatch.validate_inputs(0.0, 0.3, "2, 4,8") is True


def test_regions_from_a_batch_of_masks(clip):
    masks = torch.cat([clip.mask_1, clip.mask_2])
    (made,) = RegionsFromMasks.execute(f"{LEFT}\n{RIGHT}", masks=masks).result
    assert [r.phrase for r in made] == [LEFT, RIGHT] and torch.equal(made[0].mask, clip.mask_1)
    (more,) = RegionsFromMasks.execute("", masks=clip.mask_1, regions=made).result
    assert len(more) == 3 and more[2].phrase == ""


def test_regions_from_colours_are_those_of_the_masks(clip):
    video = torch.zeros_like(clip.images)
    video[..., 0], video[..., 2] = (clip.mask_1 > 0.5).float(), (clip.mask_2 > 0.5).float()
    areas = [float((m > 0.5).sum()) for m in (clip.mask_1, clip.mask_2)]
    order = (0, 1) if areas[0] > areas[1] else (1, 0)
    (made,) = RegionsFromMasks.execute("a\nb", colours=video).result
    for region, which in zip(made, order, strict=True):
        assert torch.equal(region.mask, ((clip.mask_1, clip.mask_2)[which] > 0.5).float())


def test_regions_from_sam3_tracks(clip):
    from comfy.ldm.sam3.tracker import pack_masks

    tracks = torch.stack([clip.mask_1, clip.mask_2], 1) > 0.5
    data = {"packed_masks": pack_masks(tracks), "orig_size": (64, 64), "n_frames": len(tracks)}
    (made,) = RegionsFromMasks.execute("a\nb", track_data=data).result
    assert torch.equal(made[1].mask, tracks[:, 1].float())
    with pytest.raises(ValueError, match="SAM3 tracked 2 objects, there are 3 lines"):
        RegionsFromMasks.execute("a\nb\nc", track_data=data)


@pytest.mark.parametrize("connected", [(), ("masks", "colours")])
def test_one_source_of_regions_is_connected(clip, connected):
    given = {"masks": clip.mask_1, "colours": clip.images}
    with pytest.raises(ValueError, match="connect exactly one"):
        RegionsFromMasks.execute("a", **{name: given[name] for name in connected})


def test_preview_shows_each_region_and_puts_out_their_union(clip):
    shown, union = PreviewRegions.execute(clip.images, regions(clip), 1.0).result
    torch.testing.assert_close(union, (1 - (1 - clip.mask_1) * (1 - clip.mask_2)), atol=1e-5, rtol=0)
    assert torch.equal(shown[:, 0, 0], clip.images[:, 0, 0, :3])
    left, right = (shown[mask > 0.999] for mask in (clip.mask_1, clip.mask_2))
    assert left.std(0).max() < 0.02 and right.std(0).max() < 0.02
    assert (left.mean(0) - right.mean(0)).abs().max() > 0.2
    with pytest.raises(ValueError, match="there are none"):
        PreviewRegions.execute(clip.images, (), 0.5)


# --- regions and words in the model's own attention ---------------------


def found(clip, inverted, phrases="", kinds=3):
    return RegionsFromAttention.execute(inverted[1][0], clip.images, kinds, phrases, True, 0).result


def number_of(clip, regions, mask):
    """The number, from 1, of the region that covers most of `mask`."""
    return 1 + max(range(len(regions)), key=lambda k: float((regions[k].mask * mask).sum()))


def test_a_clip_of_one_region_has_an_empty_mask(clip, inverted, monkeypatch):
    whole = torch.ones_like(clip.mask_1)
    monkeypatch.setattr(region_finding, "regions_from_attention", lambda *_, **__: [whole])
    every, union, _ = found(clip, inverted)
    assert len(every) == 1 and torch.equal(union, torch.zeros_like(whole))


def test_regions_of_attention_are_named_by_lines(clip, inverted):
    every, union, shown = found(clip, inverted)
    assert shown.shape == clip.images.shape and all(r.phrase == "" for r in every)
    assert torch.stack([r.mask for r in every]).sum(0).eq(1).all()
    torch.testing.assert_close(union, 1 - every[0].mask)
    left, right = (number_of(clip, every, mask) for mask in (clip.mask_1, clip.mask_2))
    assert 1 not in (left, right) and left != right
    lines = [""] * len(every)
    lines[left - 1], lines[right - 1] = LEFT, RIGHT
    named, union, _ = found(clip, inverted, "\n".join(lines))
    assert {r.phrase for r in named} == {LEFT, RIGHT} and len(named) == 2
    assert torch.equal(union, named[0].mask + named[1].mask)
    with pytest.raises(ValueError, match=f"there are 9 lines for {len(every)} regions"):
        found(clip, inverted, "\n".join("abcdefghi"))


def test_masks_of_attention_edit_as_masks_do(tiny, clip, inverted):
    every = found(clip, inverted)[0]
    lines = [""] * len(every)
    for mask, phrase in ((clip.mask_1, LEFT), (clip.mask_2, RIGHT)):
        lines[number_of(clip, every, mask) - 1] = phrase
    named = found(clip, inverted, "\n".join(lines))[0]
    (conditioning,) = EncodeRegionalPrompt.execute(tiny.clip, PROMPT, "paper", regions=named).result
    frames = edit(tiny, clip, inverted, patched(tiny.model), conditioning)
    assert [pair.colour for pair in instruments.identify(frames, 2)] == ["purple", "cyan"]


def test_token_attention_is_shown_before_and_after(tiny, clip, inverted):
    conditioning = encoded(tiny, clip)
    arguments = inverted[1][0], clip.images, conditioning, RIGHT, 0.1
    alone, _ = PreviewTokenAttention.execute(*arguments).result
    both, attention = PreviewTokenAttention.execute(*arguments, model=patched(tiny.model)).result
    assert alone.shape == clip.images.shape and both.shape[2] == 2 * alone.shape[2]
    assert float(attention.max()) == 1 and attention.shape == clip.mask_1.shape
    assert attention[clip.mask_2 > 0.5].mean() > 2 * attention[clip.mask_1 > 0.5].mean()
    with pytest.raises(ValueError, match="phrase 'a green dog' in the prompt"):
        PreviewTokenAttention.execute(*arguments[:3], "a green dog", 0.1)
    with pytest.raises(ValueError, match="images: they are 3, the trajectory's clip has 8;"):
        PreviewTokenAttention.execute(arguments[0], clip.images[:3], *arguments[2:])


def test_inflation_by_its_node(tiny):
    (inflated,) = InflateAttention.execute(tiny.model, "first + previous", "2, 4", True).result
    assert str(inflation_of(inflated)) == "first + previous at levels 2,4, norms over the clip"
    assert inflation_of(InflateAttention.execute(tiny.model, "per frame").result[0]) is None
    assert "is no list of 1, 2, 4" in InflateAttention.validate_inputs("2;4")


def test_masks_of_other_frames_are_refused_by_name(tiny, clip):
    (made,) = RegionPrompt.execute(clip.mask_1, LEFT).result
    (made,) = RegionPrompt.execute(clip.mask_2[:5], RIGHT, regions=made).result
    with pytest.raises(ValueError, match=r"region 2 \('a cyan triangle'\): it has 5 frames, the clip has 8"):
        PreviewRegions.execute(clip.images, made, 0.5)


def test_the_world_knows_the_prompt():
    """The prompt is one that the embedded model was trained on: the masks overrule a model that understands it."""
    assert world.parse_caption(PROMPT).objects[0] == world.Pair("cyan", "triangle")
