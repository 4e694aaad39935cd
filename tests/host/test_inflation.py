"""Attention over frames inside the real models, against attention replaced by the host's own means."""

import pytest
import torch
from comfy.context_windows import IndexListContextWindow
from spacetime_edit.core.inflation import Inflation
from spacetime_edit.core.regions import Region
from spacetime_edit.host.attention_call import INFLATION
from spacetime_edit.host.attention_tap import AttentionTap
from spacetime_edit.host.checkpointing import checkpointed
from spacetime_edit.host.families import family_of
from spacetime_edit.host.features import FeatureRecorder
from spacetime_edit.host.gradients import latent_gradient
from spacetime_edit.host.inflation import inflate_attention, inflation_of
from spacetime_edit.host.inversion import invert
from spacetime_edit.host.region_patch import RegionModulation, patch_regions
from spacetime_edit.host.region_prompt import Layout, with_layout
from spacetime_edit.host.sampling import TrajectorySampler
from spacetime_edit.tests.host import support

FRAMES, SIDE = 4, 8
BOTH_PROMPTS = support.sd15_conditioning(), support.sd15_conditioning(1)
ALL, SPARSE, ALONE = Inflation(), Inflation("first + previous"), Inflation("per frame")


@pytest.fixture(scope="module")
def sd15():
    with torch.inference_mode():
        return support.sd15_model()


def latent(frames=FRAMES, seed=3):
    return 3 * torch.randn(frames, 4, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def predicted(model, x=None, cfg=3.0, positive=BOTH_PROMPTS[0]):
    return support.prediction(model, positive, latent() if x is None else x, BOTH_PROMPTS[1], cfg, 8.0)


def replaced(model, attention, frames=FRAMES):
    """A clone whose self-attention is `attention(query, key, value)` of one prompt's (F, H, N, D), by attn1 replace."""
    patched = model.clone()

    def attn1(query, key, value, extra_options):
        heads = extra_options["n_heads"]
        parts = [t.double().unflatten(-1, (heads, -1)).transpose(1, 2).split(frames) for t in (query, key, value)]
        out = torch.cat([attention(*of_prompt) for of_prompt in zip(*parts, strict=True)])
        return out.transpose(1, 2).flatten(2).to(query.dtype)

    for block, number, index in PLACES:
        patched.set_model_attn1_replace(attn1, block, number, index)
    return patched


PLACES = [
    (side, n, i) for side, last in (("input", 8), ("middle", 2), ("output", 8)) for n in range(last) for i in (0,)
]


def over_frames(keys, moved=lambda scores, frame, others: scores):
    """Dense attention of each frame to the frames it should see; `moved` changes the scores before the softmax."""

    def attention(query, key, value):
        outputs = []
        for frame in range(len(query)):
            others = list(range(len(query))) if keys == "all frames" else [0, max(frame - 1, 0)]
            k, v = (torch.cat(list(t[others]), 1) for t in (key, value))
            scores = query[frame] @ k.mT * query.shape[-1] ** -0.5
            outputs.append(moved(scores, frame, others).softmax(-1) @ v)
        return torch.stack(outputs)

    return attention


@pytest.mark.parametrize("inflation", [ALL, SPARSE], ids=str)
def test_predictions_are_those_of_the_dense_form(sd15, inflation):
    ours, plain = predicted(inflate_attention(sd15, inflation)), predicted(sd15)
    wanted = predicted(replaced(sd15, over_frames(inflation.keys)))
    assert support.relative(ours, wanted) < 1e-3 * support.relative(plain, wanted)
    assert support.relative(plain, wanted) > 1e-3


def test_the_reference_itself_is_the_model_where_frames_see_themselves(sd15):
    alone = over_frames("all frames")
    wanted = predicted(replaced(sd15, lambda *qkv: torch.cat([alone(*(t[i : i + 1] for t in qkv)) for i in range(4)])))
    assert support.relative(predicted(sd15), wanted) < 1e-5


NEUTRAL = {
    "per frame": (ALONE, FRAMES),
    "no such level": (Inflation(levels=frozenset({32})), FRAMES),
    "one frame": (Inflation(shared_norms=True), 1),
}


@pytest.mark.parametrize("case", NEUTRAL.values(), ids=NEUTRAL)
def test_what_asks_for_nothing_changes_no_bit(sd15, case):
    inflation, frames = case
    x = latent(frames)
    assert torch.equal(predicted(inflate_attention(sd15, inflation), x), predicted(sd15, x))
    assert torch.equal(predicted(inflate_attention(inflate_attention(sd15, SPARSE), ALONE)), predicted(sd15))


def test_the_last_one_holds(sd15):
    twice = inflate_attention(inflate_attention(sd15, SPARSE), Inflation(shared_norms=True))
    assert torch.equal(predicted(twice), predicted(inflate_attention(sd15, Inflation(shared_norms=True))))
    assert inflation_of(twice) == Inflation(shared_norms=True) and inflation_of(sd15) is None


def test_levels_choose_the_layers(sd15):
    made = [predicted(inflate_attention(sd15, Inflation(levels=levels))) for levels in ({1}, {2}, {1, 2}, None)]
    assert not torch.equal(made[0], made[1]) and torch.equal(made[2], made[3])


def test_norms_over_the_clip_are_those_of_the_definition(sd15):
    ours = predicted(inflate_attention(sd15, Inflation("per frame", shared_norms=True)))

    def over_the_clip(module, args, output):
        x = args[0].double().unflatten(0, (-1, FRAMES))
        groups = x.unflatten(2, (module.num_groups, -1))
        mean, variance = (f(groups, dim=(1, 3, 4, 5), keepdim=True) for f in (torch.mean, var))
        normed = ((groups - mean) / (variance + module.eps).sqrt()).flatten(2, 3).flatten(0, 1)
        return (normed * module.weight[:, None, None] + module.bias[:, None, None]).to(output)

    network = sd15.model.diffusion_model
    blocks = [m for m in network.modules() if type(m).__name__ == "ResBlock"]
    norms = [norm for b in blocks for norm in (b.in_layers[0], b.out_layers[0])] + [network.out[0]]
    handles = [norm.register_forward_hook(over_the_clip) for norm in norms]
    wanted = predicted(sd15)
    for handle in handles:
        handle.remove()
    assert support.relative(ours, wanted) < 1e-5
    assert support.relative(predicted(sd15), wanted) > 1e-3


def var(x, **options):
    return torch.var(x, unbiased=False, **options)


def test_a_run_leaves_the_model_as_it_was(sd15):
    before = support.Untouched(sd15)
    predicted(inflate_attention(sd15, Inflation(shared_norms=True)))
    assert before.changed() == []


def test_overrides_of_other_packs_are_called_as_often(sd15):
    counts = []
    for inflate in (False, True):
        model, seen = sd15.clone(), []

        def other_pack(func, *args, seen=seen, **kwargs):
            seen.append(args[0].shape)
            return func(*args, **kwargs)

        model.model_options["transformer_options"]["optimized_attention_override"] = other_pack
        predicted(inflate_attention(model, ALL) if inflate else model)
        counts.append(len(seen))
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("inflation", [ALL, SPARSE], ids=str)
def test_the_embedded_model_takes_it_too(tiny, inflation):
    positive, x = support.encode(tiny), latent()
    inflated, plain = (
        support.prediction(model, positive, x) for model in (inflate_attention(tiny.model, inflation), tiny.model)
    )
    assert support.relative(inflated, plain) > 0.01


# --- together with regions ----------------------------------------------


def layout():
    left, right = torch.zeros(2, FRAMES, SIDE, SIDE)
    for f in range(FRAMES):
        left[f, 2 * (f % 2) : 6, 0:4] = 1
        right[f, 2:8, 6 - 2 * (f // 2) : 8] = 1
    right = right * (1 - left)
    return Layout("a prompt", (Region("a", left), Region("b", right)), ((1, 2), (4,)), 7)


@pytest.mark.parametrize("inflation", [ALL, SPARSE], ids=str)
@pytest.mark.parametrize("order", ["inflated first", "inflated last"])
def test_regions_act_over_the_frames_that_attend(sd15, inflation, order):
    made = layout()
    modulation = RegionModulation(cross_strength=0.0, self_strength=2.0, end=1.0)
    steps = [lambda m: inflate_attention(m, inflation), lambda m: patch_regions(m, modulation)]
    model = sd15
    for step in steps if order == "inflated first" else steps[::-1]:
        model = step(model)
    percents = []
    tap = AttentionTap(model, [lambda call: percents.append(call.percent)])
    watched = model.clone()
    watched.model_options = tap.install(watched.model_options)
    ours = predicted(watched, positive=with_layout(BOTH_PROMPTS[0], made))
    masks = torch.stack([r.mask for r in made.regions]).double()
    masks = torch.cat([masks, 1 - masks.sum(0, keepdim=True)])

    def moved(scores, frame, others):
        side = round((scores.shape[1]) ** 0.5)
        u = torch.nn.functional.avg_pool2d(masks, SIDE // side).flatten(2)  # (K, F, N)
        size = 1 - (u[:, frame] * u.mean((1, 2))[:, None]).sum(0)
        a = (2.0 * 0.3 * (1 - percents[0]) ** 5 * size)[:, None]
        shared = u[:, frame].T @ torch.cat([u[:, other] for other in others], 1)
        low, high = scores.amin(-1, keepdim=True), scores.amax(-1, keepdim=True)
        return scores + a * shared * (high - scores) - a * (1 - shared) * (scores - low)

    wanted, plain = predicted(replaced(sd15, over_frames(inflation.keys, moved))), predicted(sd15)
    without = predicted(inflate_attention(sd15, inflation))
    assert support.relative(ours, wanted) < 2e-3 * support.relative(plain, wanted)
    assert support.relative(without, wanted) > 1e-3


def test_in_a_context_window_the_first_frame_is_the_windows(tiny):
    """What a window of frames 1 and 3 sees is what a clip of these two sees."""
    positive, x = support.encode(tiny), latent(2)
    model = inflate_attention(tiny.model, SPARSE)
    alone = support.prediction(model, positive, x)
    model = model.clone()
    model.model_options["transformer_options"]["context_window"] = IndexListContextWindow([1, 3], total_frames=4)
    assert torch.equal(support.prediction(model, positive, x), alone)


# --- gradients and trajectories -----------------------------------------


def test_recomputed_blocks_are_inflated_again(sd15):
    """Attention, norms and regions: the gradient with checkpointing is the one without."""
    inflated, positive = inflate_attention(sd15, Inflation(shared_norms=True)), with_layout(BOTH_PROMPTS[0], layout())
    model = patch_regions(inflated, RegionModulation(2.0, 2.0, end=1.0))

    def gradient(checkpoint, model=model):
        def run(guider, x, sigma, extra_args):
            base, cond, options = guider.inner_model, guider.conds["positive"][0], extra_args["model_options"]
            recorder = FeatureRecorder(None)
            tap = AttentionTap(model, [recorder], differentiable=True)
            arguments = dict(model_options=tap.install(options), mutates=True)
            loss = lambda denoised: torch.tanh(denoised).double().mean()  # noqa: E731
            if not checkpoint:
                return latent_gradient(base, x, sigma, cond, loss, **arguments)[1]
            with checkpointed(base.diffusion_model, family_of(model), tap, recorder):
                return latent_gradient(base, x, sigma, cond, loss, **arguments)[1]

        return support.at_one_sigma(support.guider_of(model, positive), latent(), run)

    assert support.relative(gradient(True), gradient(False)) < 1e-5
    assert support.relative(gradient(False, sd15), gradient(False)) > 0.01
    assert support.relative(gradient(False, inflated), gradient(False)) > 0.01  # regions act, not the frames alone


def test_an_edit_needs_the_inflation_of_the_inversion(sd15):
    inflated = inflate_attention(sd15, ALL)
    trajectory = invert(inflated, BOTH_PROMPTS[0], latent(), torch.tensor([8.0, 2.0, 0.0]))
    assert trajectory.model.model_options["transformer_options"][INFLATION] == ALL
    sampler, empty = TrajectorySampler(trajectory), torch.zeros(trajectory.shape)

    def edit(model):
        guider = support.guider_of(model, BOTH_PROMPTS[0], BOTH_PROMPTS[1], 2.0)
        return guider.sample(empty, empty, sampler, trajectory.sigmas, disable_pbar=True, seed=0)

    assert edit(inflated).isfinite().all()
    for model in (sd15, inflate_attention(sd15, SPARSE)):
        with pytest.raises(ValueError, match="the inverted one 'all frames'; connect the same Inflate Attention"):
            edit(model)


def test_a_lora_acts_as_in_the_model_that_it_was_merged_into(sd15):
    """Before and after the node, on a weight of self-attention."""
    key = "diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_v.weight"
    difference = torch.randn(64, 64, generator=torch.Generator().manual_seed(9))

    def with_lora(model):
        patched = model.clone()
        assert patched.add_patches({key: ("diff", (difference,))}, 0.5)
        return patched

    before, after = inflate_attention(with_lora(sd15), ALL), with_lora(inflate_attention(sd15, ALL))
    merged = support.sd15_model()
    merged.model.get_parameter(key).add_(0.5 * difference)
    wanted, without = predicted(inflate_attention(merged, ALL)), predicted(inflate_attention(sd15, ALL))
    assert support.relative(without, wanted) > 1e-3
    for model in (before, after):
        assert support.relative(predicted(model), wanted) < 1e-5
