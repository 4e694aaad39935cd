"""Region modulation inside the real models, against the definition written out densely by another override."""

from bisect import bisect_left

import pytest
import torch
from comfy.context_windows import (
    IndexListContextHandler,
    IndexListContextWindow,
    get_matching_context_schedule,
    get_matching_fuse_method,
)
from comfy.samplers import calculate_sigmas, sampler_object
from spacetime_edit.core.regions import EVERY, Region
from spacetime_edit.host import region_patch
from spacetime_edit.host.attention_call import SOURCE_RUN
from spacetime_edit.host.attention_tap import AttentionTap
from spacetime_edit.host.region_patch import RegionModulation, patch_regions
from spacetime_edit.host.region_prompt import LAYOUT, Layout, encode_regional_prompt, with_layout
from spacetime_edit.host.regional_prompts import RegionalPrompts
from spacetime_edit.tests.host import support
from torch.nn.functional import avg_pool2d

PROMPT = "a red circle on the left and a green square on the right, gray background"
FRAMES = 4


def boxes():
    """Two boxes of FRAMES x 64 x 64 that move, one disjoint from the other, with edges on the grid of 8 x 8 tokens."""
    left, right = torch.zeros(2, FRAMES, 64, 64)
    for f in range(FRAMES):
        left[f, 8 * (f % 2) : 32, 0:24] = 1
        right[f, 16:48, 40 - 8 * (f // 2) : 64] = 1
    return left, right


def regions():
    left, right = boxes()
    return Region("red circle", left), Region("a green square", right)


@pytest.fixture
def regional(tiny):
    """The conditioning of PROMPT with its two regions."""
    return encode_regional_prompt(tiny.clip, PROMPT, regions())


def layout_of(conditioning):
    return conditioning[0][1][LAYOUT]


def clip_latent(frames=FRAMES, side=16, seed=3):
    return torch.randn(frames, 4, side, side, generator=torch.Generator().manual_seed(seed))


# --- the dense form -----------------------------------------------------


def dense_override(layout, percent, mode, self_strength=1.0, cross_strength=1.0):
    """A listener with every formula written out again, with tokens x tokens tensors in float64."""
    t = 1 - percent
    masks = torch.stack([r.mask for r in layout.regions])  # disjoint: the partition is these and the rest

    def memberships(grid):
        side = 64 // grid[1]
        if mode == "paper":
            owned = torch.stack([avg_pool2d(m[:, None], side)[:, 0].flatten(1) for m in masks], -1).double()
            return torch.cat([owned, 1 - owned.sum(-1, keepdim=True)], -1)
        return torch.stack([m[:, ::side, ::side].flatten(1) for m in masks], -1).double()

    def softmax(call, shared, a):
        scores = (call.query.double() @ call.key.double().mT) * call.scale
        low, high = scores.amin(-1, keepdim=True), scores.amax(-1, keepdim=True)
        shared, a = shared[:, None].double(), a[:, None, :, None].double()
        moved = scores + a * shared * (high - scores) - a * (1 - shared) * (scores - low)
        return (moved.softmax(-1) @ call.value.double()).to(call.value.dtype)

    def listener(call):
        if call.kind == "temporal":
            return None
        u = memberships(call.grid)
        frame = [row.frames[0] for row in call.rows]
        prompt = torch.tensor([row.prompt for row in call.rows])
        mine = u[frame]
        if call.kind == "spatial":
            share = u.mean((0, 1)) / (1 if mode == "paper" else FRAMES)
            size = (1 - (mine * share).sum(-1)).clamp(0, 1)
            a = self_strength * 0.3 * t**5 * size
            if mode == "released":
                a = a * (prompt == 1)[:, None]
            shared = mine @ mine.mT
            return softmax(call, shared.clamp(max=1) if mode == "released" else shared, a)
        size = (1 - (mine * u.mean(1)[frame][:, None]).sum(-1)).clamp(0, 1)
        a = cross_strength * t**5 * size * (prompt == 0)[:, None]
        words = torch.zeros(call.key.shape[2], u.shape[-1], dtype=torch.float64)
        for k, places in enumerate(layout.positions):
            for place in places:
                words[place :: layout.length, k] = 1
        return softmax(call, mine @ words.T, a)

    return listener


def percent_of(model, sigma):
    """By the host's own schedule, to a millionth: the strength of regions follows a power of it."""
    falling, parts = model.get_model_object("model_sampling").percent_to_sigma, 10**6
    return bisect_left(range(parts), -sigma, key=lambda n: -float(falling(n / parts))) / parts


@pytest.mark.parametrize("mode", ["paper", "released"])
def test_predictions_are_those_of_the_dense_form(tiny, mode):
    conditioning = encode_regional_prompt(tiny.clip, PROMPT, regions(), mode)
    sigma, negative = 8.0, support.encode(tiny, "")
    modulation = RegionModulation(end=1.0)
    ours = support.prediction(patch_regions(tiny.model, modulation), conditioning, clip_latent(), negative, 3.0, sigma)
    reference = tiny.model.clone()
    listener = dense_override(layout_of(conditioning), percent_of(tiny.model, sigma), mode)
    reference.model_options = AttentionTap(reference, [listener]).install(reference.model_options)
    wanted = support.prediction(reference, conditioning, clip_latent(), negative, 3.0, sigma)
    plain = support.prediction(tiny.model, conditioning, clip_latent(), negative, 3.0, sigma)
    assert support.relative(ours, wanted) < 1e-4 * support.relative(plain, wanted)
    assert support.relative(plain, wanted) > 0.01  # it does something


@pytest.fixture(scope="module")
def sd15():
    with torch.inference_mode():
        return support.sd15_model()


@pytest.mark.parametrize("negative_tokens", [7, 14], ids=["prompts of one length", "the host repeats the positive"])
def test_sd15_takes_regions_frame_by_frame(sd15, negative_tokens):
    layout = Layout("a prompt", regions(), ((1, 2), (4,)), 7)
    sigma, positive = 8.0, with_layout(support.sd15_conditioning(), layout)
    arguments = positive, clip_latent(side=8), support.sd15_conditioning(1, negative_tokens), 3.0, sigma
    ours = support.prediction(patch_regions(sd15, RegionModulation(end=1.0)), *arguments)
    reference = sd15.clone()
    listener = dense_override(layout, percent_of(sd15, sigma), "paper")
    reference.model_options = AttentionTap(reference, [listener]).install(reference.model_options)
    wanted, plain = support.prediction(reference, *arguments), support.prediction(sd15, *arguments)
    assert support.relative(ours, wanted) < 1e-4 * support.relative(plain, wanted)
    assert support.relative(plain, wanted) > 1e-3


# --- neutrality -------------------------------------------------------

NEUTRAL = {
    "strength 0": {"self_strength": 0.0, "cross_strength": 0.0},
    "window elsewhere": {"start": 0.9, "end": 1.0},
    "no such level": {"levels": frozenset({32})},
}


@pytest.mark.parametrize("settings", NEUTRAL.values(), ids=NEUTRAL)
def test_neutral_settings_change_no_bit(tiny, regional, settings):
    patched = patch_regions(tiny.model, RegionModulation(**settings))
    arguments = regional, clip_latent(), support.encode(tiny, ""), 3.0, 8.0
    assert torch.equal(support.prediction(patched, *arguments), support.prediction(tiny.model, *arguments))


def test_no_regions_change_no_bit(tiny):
    conditioning = encode_regional_prompt(tiny.clip, PROMPT, ())
    patched = patch_regions(tiny.model, RegionModulation(end=1.0))
    arguments = conditioning, clip_latent(), support.encode(tiny, ""), 3.0, 8.0
    assert torch.equal(support.prediction(patched, *arguments), support.prediction(tiny.model, *arguments))
    assert torch.equal(conditioning[0][0], support.encode(tiny, PROMPT)[0][0])


def test_a_regional_prompt_is_a_plain_prompt_to_a_model_without_patch(tiny, regional):
    arguments = clip_latent(), support.encode(tiny, ""), 3.0, 8.0
    plain = support.prediction(tiny.model, support.encode(tiny, PROMPT), *arguments)
    assert torch.equal(support.prediction(tiny.model, regional, *arguments), plain)


def test_a_patch_without_regional_prompt_changes_no_bit_and_says_so(tiny):
    said = []
    patched = patch_regions(tiny.model, RegionModulation(end=1.0, say=said.append))
    arguments = support.encode(tiny, PROMPT), clip_latent(), support.encode(tiny, ""), 3.0, 8.0
    assert torch.equal(support.prediction(patched, *arguments), support.prediction(tiny.model, *arguments))
    assert len(said) == 1 and said[0].startswith("No regional prompt reaches this model")


def test_runs_that_see_the_source_are_left_alone(tiny, regional):
    patched = patch_regions(tiny.model, RegionModulation(end=1.0))
    patched.model_options["transformer_options"][SOURCE_RUN] = True
    arguments = regional, clip_latent(), None, 1.0, 8.0
    assert torch.equal(support.prediction(patched, *arguments), support.prediction(tiny.model, *arguments))


def test_self_and_cross_have_their_own_strength(tiny, regional):
    results = []
    for own, cross in ((1.0, 0.0), (0.0, 1.0), (1.0, 1.0)):
        modulation = RegionModulation(own, cross, end=1.0)
        results.append(support.prediction(patch_regions(tiny.model, modulation), regional, clip_latent(), sigma=8.0))
    assert support.relative(results[0], results[1]) > 1e-3 and support.relative(results[1], results[2]) > 1e-3


def test_a_run_leaves_the_model_as_it_was(tiny, regional):
    before = support.Untouched(tiny.model)
    patched = patch_regions(tiny.model, RegionModulation(end=1.0, temporal_strength=1.0))
    support.prediction(patched, regional, clip_latent(), support.encode(tiny, ""), 3.0, 8.0)
    assert before.changed() == []


def test_overrides_of_other_packs_are_called_as_often(tiny, regional):
    counts = []
    for modulation in (None, RegionModulation(end=1.0)):
        model, seen = tiny.model.clone(), []

        def other_pack(func, *args, seen=seen, **kwargs):
            seen.append(args[0].shape)
            return func(*args, **kwargs)

        model.model_options["transformer_options"]["optimized_attention_override"] = other_pack
        model = model if modulation is None else patch_regions(model, modulation)
        support.prediction(model, regional, clip_latent(), sigma=8.0)
        counts.append(len(seen))
    assert counts[0] == counts[1] > 0


def test_masks_of_another_number_of_frames_are_refused(tiny, regional):
    """Also more of them than the clip has: which of them were meant is not known."""
    patched = patch_regions(tiny.model, RegionModulation(end=1.0))
    for frames in (3, 6):
        with pytest.raises(ValueError, match=rf"^regions: .* have {FRAMES} frames, the clip has {frames};"):
            support.prediction(patched, regional, clip_latent(frames), sigma=8.0)


def in_window(model, frames):
    """A clone that sees a context window of these frames."""
    windowed = model.clone()
    windowed.model_options["transformer_options"]["context_window"] = IndexListContextWindow(frames, None, FRAMES)
    return windowed


@pytest.mark.parametrize("mode", ["paper", "released"])
def test_in_a_context_window_sizes_are_those_of_the_clip(tiny, mode):
    """Against the dense form, whose shares are of all frames, where the model sees frames 1 and 3."""
    conditioning, shown = encode_regional_prompt(tiny.clip, PROMPT, regions(), mode), [1, 3]
    arguments = conditioning, clip_latent(2), support.encode(tiny, ""), 3.0, 8.0
    ours = support.prediction(in_window(patch_regions(tiny.model, RegionModulation(end=1.0)), shown), *arguments)
    reference = tiny.model.clone()
    listener = dense_override(layout_of(conditioning), percent_of(tiny.model, 8.0), mode)
    reference.model_options = AttentionTap(reference, [listener]).install(reference.model_options)
    wanted, plain = (support.prediction(in_window(m, shown), *arguments) for m in (reference, tiny.model))
    assert support.relative(ours, wanted) < 1e-4 * support.relative(plain, wanted)
    assert support.relative(plain, wanted) > 0.01


def test_in_a_context_window_masks_follow_its_frames(tiny, regional):
    """A window of frames 1 and 3 predicts what a clip of just these two, with just their masks, does: over time too."""
    shown, latent = [1, 3], clip_latent(2)
    patched = patch_regions(tiny.model, RegionModulation(end=1.0, temporal_strength=1.0))
    cut = [Region(r.phrase, r.mask[shown]) for r in regions()]
    alone = encode_regional_prompt(tiny.clip, PROMPT, cut)
    ours, wanted, plain = (
        support.prediction(model, prompt, latent, sigma=8.0)
        for model, prompt in ((in_window(patched, shown), regional), (patched, alone), (tiny.model, regional))
    )
    # sizes are shares of the whole clip in a window, which differ a little
    assert support.relative(ours, wanted) < 0.1 * support.relative(plain, wanted)


# --- what people do to masks --------------------------------------------


def edited_by(tiny, masks, mode="paper", said=None):
    """A prediction with these masks, in the order of the phrases. said: gets what is told on the node."""
    regions = [Region(phrase, mask) for phrase, mask in zip(("red circle", "green square"), masks, strict=False)]
    conditioning = encode_regional_prompt(tiny.clip, PROMPT, regions, mode)
    say = [].append if said is None else said.append
    model = patch_regions(tiny.model, RegionModulation(3.0, 3.0, 1.0, end=1.0, say=say))
    return support.prediction(model, conditioning, clip_latent(), support.encode(tiny, ""), 3.0, 8.0)


@pytest.mark.parametrize("mode", ["paper", "released"])
def test_masks_that_cover_each_other_are_named_and_do_no_harm(tiny, mode):
    (left, _), said = boxes(), []
    both = edited_by(tiny, [left, left], mode, said)
    assert both.isfinite().all()
    assert any("Region 1 ('red circle') covers nothing" in text for text in said) == (mode == "paper")
    full = edited_by(tiny, [torch.ones_like(left), torch.ones_like(left)], mode)
    plain = support.prediction(tiny.model, support.encode(tiny, PROMPT), clip_latent(), support.encode(tiny, ""), 3, 8)
    assert full.isfinite().all()
    if mode == "paper":  # a region that covers everything has size term 0; the public code's is nearly 1 in self
        assert support.relative(full, plain) < 1e-4


@pytest.mark.parametrize("mode", ["paper", "released"])
def test_an_empty_region_is_named_and_the_others_act(tiny, mode):
    (left, right), said = boxes(), []
    with_empty = edited_by(tiny, [left, torch.zeros_like(right)], mode, said)
    assert [text for text in said if "Region 2 ('green square') covers nothing" in text]
    assert support.relative(with_empty, edited_by(tiny, [left, right], mode)) > 1e-3
    assert with_empty.isfinite().all()


def test_a_region_of_one_pixel_acts_at_every_level(tiny):
    left, _ = boxes()
    dot = torch.zeros_like(left)
    dot[:, 40, 40] = 1
    seen = edited_by(tiny, [left, dot])
    assert seen.isfinite().all() and support.relative(seen, edited_by(tiny, [left, 0 * dot])) > 1e-4


SD15_LAYOUT = Layout("a prompt", regions(), ((1,), (4,)), 7)


@pytest.mark.parametrize(
    ("strengths", "message"),
    [
        ({}, "Regions act in part: another node replaces the spatial attention of 1 of 14 layers"),
        ({"cross_strength": 0.0}, "Regions act in part: another node replaces the spatial attention of 1 of 7 layers"),
        ({"self_strength": 0.0}, None),
    ],
)
def test_layers_that_another_pack_replaces_are_named(sd15, strengths, message):
    model, said = sd15.clone(), []
    model.set_model_attn1_replace(lambda q, k, v, extra: q, "middle", 0, 0)
    patched = patch_regions(model, RegionModulation(end=1.0, say=said.append, **strengths))
    positive = with_layout(support.sd15_conditioning(), SD15_LAYOUT)
    for _ in range(2):
        support.prediction(patched, positive, clip_latent(side=8), sigma=8.0)
    assert said == [] if message is None else len(said) == 2 and all(text.startswith(message) for text in said)


def test_models_without_cross_attention_are_told(tiny, regional, monkeypatch):
    layers = {path: at for path, at in region_patch.attention_layers(tiny.model).items() if at.kind != "cross"}
    monkeypatch.setattr(region_patch, "attention_layers", lambda model: layers)
    run = lambda **options: support.prediction(  # noqa: E731
        patch_regions(tiny.model, RegionModulation(**options)), regional, clip_latent(), sigma=8.0
    )
    with pytest.raises(ValueError, match=r"model: UNet3D .* has no cross-attention.*set cross_strength .* to 0"):
        run()
    run(cross_strength=0.0)


# --- prompts ------------------------------------------------------------


def test_positions_are_those_of_the_words(tiny):
    layout = layout_of(encode_regional_prompt(tiny.clip, PROMPT, regions()))
    words = PROMPT.replace(",", " ,").split()
    places = [["red", "circle"], ["a", "green", "square"]]
    assert [[words[p - 1] for p in positions] for positions in layout.positions] == places  # after the start token
    assert layout.length == tiny.clip.encode_from_tokens_scheduled(tiny.clip.tokenize(PROMPT))[0][0].shape[1]


def test_weights_in_the_prompt_are_no_obstacle(tiny):
    weighted = PROMPT.replace("red circle", "(red circle:1.3)")
    conditioning = encode_regional_prompt(tiny.clip, weighted, regions())
    plain = encode_regional_prompt(tiny.clip, PROMPT, regions())
    assert layout_of(conditioning).positions == layout_of(plain).positions
    assert torch.equal(conditioning[0][0], support.encode(tiny, weighted)[0][0])


def test_every_occurrence(tiny):
    prompt = "a red circle on the left and a red circle on the right, gray background"
    region = Region("red circle", boxes()[0], EVERY)
    assert layout_of(encode_regional_prompt(tiny.clip, prompt, [region])).positions == ((2, 3, 9, 10),)


@pytest.mark.parametrize(
    ("phrase", "message"),
    [
        ("blue circle", "phrase 'blue circle' in the prompt 'a red circle on the left.*it is not there"),
        ("on the", "it is there 2 times, and no occurrence is chosen"),
    ],
)
def test_a_phrase_that_is_not_meant_names_both(tiny, phrase, message):
    with pytest.raises(ValueError, match=message):
        encode_regional_prompt(tiny.clip, PROMPT, [Region(phrase, boxes()[0])])


def test_a_region_without_words_is_a_region(tiny):
    assert layout_of(encode_regional_prompt(tiny.clip, PROMPT, [Region(" ", boxes()[0])])).positions == ((),)


def test_spliced_phrases_are_as_if_alone(tiny):
    plain = encode_regional_prompt(tiny.clip, PROMPT, regions())
    layout = layout_of(plain)
    spliced = encode_regional_prompt(tiny.clip, PROMPT, regions(), splice=True)
    places = sorted(p for positions in layout.positions for p in positions)
    others = [p for p in range(layout.length) if p not in places]
    assert torch.equal(spliced[0][0][:, others], plain[0][0][:, others])
    alone = support.encode(tiny, "red circle")[0][0]
    assert torch.equal(spliced[0][0][:, list(layout.positions[0])], alone[:, 1:3])


def predicted(tiny, conditioning):
    patched = patch_regions(tiny.model, RegionModulation(end=1.0))
    return support.prediction(patched, conditioning, clip_latent(), sigma=8.0)


def test_a_prompt_that_was_changed_is_refused_and_named(tiny, regional):
    embedding, about = regional[0]
    message = "positive: the regional prompt 'a red circle on .*' was changed after Encode Regional Prompt"
    for changed in (embedding * 1.01, embedding[:, :9]):
        with pytest.raises(ValueError, match=message):
            predicted(tiny, [[changed, about]])
    handmade = Layout(PROMPT, regions(), layout_of(regional).positions, embedding.shape[1] + 1)
    with pytest.raises(ValueError, match=message):
        predicted(tiny, with_layout(regional, handmade))


def test_a_prompt_that_is_changed_inside_the_model_is_refused_and_named(sd15):
    model = sd15.clone()
    longer = lambda q, k, v, extra: (q, *(torch.cat([t, t[:, :1]], 1) for t in (k, v)))  # noqa: E731
    model.set_model_attn2_patch(longer)
    patched = patch_regions(model, RegionModulation(end=1.0))
    positive = with_layout(support.sd15_conditioning(), SD15_LAYOUT)
    with pytest.raises(ValueError, match="positive: the regional prompt 'a prompt' has 7 text tokens, but .* sees 8"):
        support.prediction(patched, positive, clip_latent(side=8), sigma=8.0)


# --- made once for a run ------------------------------------------------


def in_windows(model):
    """Of three frames each, of which the last begins the next."""
    schedule, fuse = get_matching_context_schedule("standard_static"), get_matching_fuse_method("pyramid")
    model.model_options["context_handler"] = IndexListContextHandler(
        schedule, fuse, context_length=3, context_overlap=1, dim=0
    )
    return model


@pytest.mark.parametrize("of", [lambda model: model, in_windows], ids=["whole clip", "context windows"])
def test_what_layers_and_steps_share_is_made_once_and_no_bit_changes(tiny, monkeypatch, of):
    """Two prompts with the regions exchanged, one after another."""
    prompts = (PROMPT, regions(), 0.0, 0.4), ("a red circle, a green square", regions()[::-1], 0.4, 1.0)
    positive = [
        [tensor, about | {"start_percent": start, "end_percent": end}]
        for prompt, own, start, end in prompts
        for tensor, about in encode_regional_prompt(tiny.clip, prompt, own)
    ]
    model = of(patch_regions(tiny.model, RegionModulation(end=1.0, temporal_strength=1.0)))
    sigmas = calculate_sigmas(model.get_model_object("model_sampling"), "normal", 8)
    made, factors = [], region_patch.region_factors
    monkeypatch.setattr(region_patch, "region_factors", lambda *given: made.append(1) or factors(*given))

    def sampled():
        """The result, and how many times the regions of a call were made."""
        made.clear()
        guider, noise = support.guider_of(model, positive, support.encode(tiny, ""), 3.0), clip_latent()
        empty = torch.zeros_like(noise)
        return guider.sample(noise, empty, sampler_object("euler"), sigmas, disable_pbar=True, seed=0), len(made)

    (kept, few), _ = sampled(), monkeypatch.setattr(RegionalPrompts, "once", lambda self, key, make: make())
    anew, many = sampled()
    assert torch.equal(kept, anew)
    assert few * 8 <= many
