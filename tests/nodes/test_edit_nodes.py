"""The editing nodes: one whole graph, and what they say to wrong input before the model runs."""

import asyncio
import logging
from types import SimpleNamespace

import comfy.context_windows
import comfy.samplers
import comfy_extras.nodes_custom_sampler as custom_sampler
import nodes
import pytest
import torch
from spacetime_edit.host.loaders.unet3d import EMBEDDED, load_folder
from spacetime_edit.nodes.capture_score import CaptureSTRScore
from spacetime_edit.nodes.example_clip import LoadExampleClip
from spacetime_edit.nodes.invert_video import InvertVideo
from spacetime_edit.nodes.load_model import LoadVideoDiffusersModel
from spacetime_edit.nodes.sample_trajectory import SampleFromTrajectory
from spacetime_edit.nodes.str_optimizer import STRLatentOptimizer
from spacetime_edit.tests.host import support

FRAMES, SIDE, STEPS = 3, 8, 2
PACK = (
    LoadVideoDiffusersModel,
    LoadExampleClip,
    InvertVideo,
    SampleFromTrajectory,
    CaptureSTRScore,
    STRLatentOptimizer,
)


class Graph:
    """The chain of nodes of an edit on a model that counts its calls; every step takes overrides."""

    def __init__(self, model, positive):
        self.counter = support.CallCounter(model)
        self.model, self.positive = self.counter.model, positive
        self.latent = {"samples": torch.randn(FRAMES, 4, SIDE, SIDE, generator=torch.Generator().manual_seed(3))}

    def invert(self, **inputs):
        given = dict(model=self.model, positive=self.positive, latent=self.latent, steps=STEPS, scheduler="simple")
        return InvertVideo.execute(**{**given, "refinements": 0, "check_reconstruction": False, **inputs})

    def sample(self, trajectory, **inputs):
        given = dict(trajectory=trajectory, dilation=0.0, blend="trajectory")
        return SampleFromTrajectory.execute(**{**given, **inputs}).result[0]

    def optimise(self, score, **inputs):
        window = dict(start_percent=0.0, end_percent=1.0, iterations=1)
        given = dict(score=score, strength=1.0, dilation=0.0, blend="trajectory", **window)
        return STRLatentOptimizer.execute(**{**given, **inputs}).result[0]

    def run(self, sampler, sigmas, guider=None, latent=None):
        """SamplerCustomAdvanced's latent."""
        guider = guider or custom_sampler.CFGGuider.execute(self.model, self.positive, self.positive, 1.0).result[0]
        noise = custom_sampler.RandomNoise.execute(5).result[0]
        return custom_sampler.SamplerCustomAdvanced.execute(
            noise, guider, sampler, sigmas, latent or self.latent
        ).result[0]["samples"]


@pytest.fixture
def graph(tiny):
    return Graph(tiny.model, support.encode(tiny))


@pytest.fixture(scope="module")
def inverted(tiny):
    """(trajectory, sigmas) of the graph's clip."""
    with torch.inference_mode():
        return Graph(tiny.model, support.encode(tiny)).invert().result


@pytest.fixture(scope="module")
def sd15_graph():
    with torch.inference_mode():
        return Graph(support.sd15_model(), support.sd15_conditioning())


def refused(graph, message):
    """Expects a ValueError that starts like `message`, and no model call."""

    class Refused:
        def __enter__(self):
            self.calls = graph.counter.calls
            self.expected = pytest.raises(ValueError, match=message)
            self.expected.__enter__()

        def __exit__(self, *error):
            seen = self.expected.__exit__(*error)
            assert graph.counter.calls == self.calls, "the model ran before the error"
            return seen

    return Refused()


# good input


def test_nodes_hand_over_what_the_sockets_promise(graph):
    trajectory, sigmas = graph.invert().result
    assert torch.equal(sigmas, trajectory.sigmas) and len(sigmas) == STEPS + 1
    score = CaptureSTRScore.execute(trajectory, "d1,m0", 1).result[0]
    assert score.blocks == {"d1", "m0"} and score.trajectory is trajectory
    result = graph.run(graph.optimise(score), sigmas)
    assert result.shape == graph.latent["samples"].shape and torch.isfinite(result).all()
    plain = graph.run(graph.sample(trajectory), sigmas)
    assert torch.equal(graph.run(graph.optimise(score, strength=0.0), sigmas), plain)
    assert not torch.equal(result, plain)


def test_check_reconstruction_reports_decibels(graph):
    output = graph.invert(check_reconstruction=True)
    assert "dB" in str(output.ui.as_dict())
    assert graph.invert().ui is None


def test_a_noise_mask_of_set_latent_noise_mask_is_the_mask(graph, inverted):
    trajectory, sigmas = inverted
    mask = torch.zeros(1, SIDE, SIDE)
    mask[:, :, :4] = 1
    latent = nodes.SetLatentNoiseMask().set_mask(graph.latent, mask)[0]
    on_latent = graph.run(graph.sample(trajectory), sigmas, latent=latent)
    assert torch.equal(on_latent, graph.run(graph.sample(trajectory, mask=mask), sigmas))
    with refused(graph, "^mask: the latent already carries a noise mask"):
        graph.run(graph.sample(trajectory, mask=mask), sigmas, latent=latent)


# wrong input


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((FRAMES, 16, SIDE, SIDE), r"^latent: its shape .* with 4 channels; encode the clip with the VAE"),
        ((1, 4, SIDE, SIDE), r"^latent: it has 1 frame; a video of at least 2 frames is needed"),
        ((1, 4, FRAMES, SIDE, SIDE), r"^latent: .*frame"),  # this family keeps its frames in the batch
    ],
    ids=["channels", "one frame", "the layout of a video transformer"],
)
def test_a_latent_that_is_no_clip_of_this_model(graph, shape, message):
    with refused(graph, message):
        graph.invert(latent={"samples": torch.randn(shape)})


def test_an_unknown_model_family_is_named_by_its_class(graph):
    class Unheard(torch.nn.Module):
        pass

    model = SimpleNamespace(model=SimpleNamespace(diffusion_model=Unheard()))
    with refused(graph, "^model: .* with Unheard is not a supported model family; expected one of: UNet3D"):
        graph.invert(model=model)


@pytest.mark.parametrize("node", ["sample", "optimise"])
def test_a_mask_with_other_frames(graph, inverted, node):
    trajectory, _ = inverted
    given = trajectory if node == "sample" else CaptureSTRScore.execute(trajectory, "", 1).result[0]
    with refused(graph, "^mask: it has 5 frames, the clip has 3; connect one mask"):
        getattr(graph, node)(given, mask=torch.ones(5, 64, 64))


@pytest.mark.parametrize("shape", [(FRAMES + 1, 4, SIDE, SIDE), (FRAMES, 4, SIDE, 2 * SIDE)], ids=["frames", "size"])
def test_a_latent_of_another_clip(graph, inverted, shape):
    trajectory, sigmas = inverted
    with refused(graph, r"^latent_image: its shape .* is not the trajectory's .*; connect the latent that Invert"):
        graph.run(graph.sample(trajectory), sigmas, latent={"samples": torch.ones(shape)})


def test_the_trajectory_of_another_model(graph, inverted, tiny):
    """Even the same folder, loaded twice: the weights could have been changed."""
    trajectory, sigmas = inverted
    other = Graph(load_folder(EMBEDDED)[0], graph.positive)
    with refused(
        other, "^guider: its model is not the one that was inverted but another loaded copy of the UNet3D.*; connect"
    ):
        other.run(other.sample(trajectory), sigmas)


@pytest.mark.parametrize("sigmas", [[14.0, 3.0, 0.0], [10.0, 5.0, 2.0, 1.0, 0.0]], ids=["values", "length"])
def test_sigmas_of_another_schedule(graph, inverted, sigmas):
    with refused(graph, "^sigmas: .* are not a contiguous part .*; connect the SIGMAS output of Invert Video"):
        graph.run(graph.sample(inverted[0]), torch.tensor(sigmas))


def test_a_model_without_temporal_attention(sd15_graph):
    trajectory, _ = sd15_graph.invert().result
    assert torch.isfinite(trajectory.latents).all()
    with refused(sd15_graph, r"^trajectory: its model \(SD 1.5\) has no temporal attention.*; load a text-to-video"):
        CaptureSTRScore.execute(trajectory, "", 1)


@pytest.mark.parametrize("layers", ["d9", "x0", "d0-", "u0,q"])
def test_unknown_blocks(graph, inverted, layers):
    with refused(graph, r"^layers: '.*(d0, d1, d2, m0|d1-d2,m0,u0-u1)"):
        CaptureSTRScore.execute(inverted[0], layers, 1)


@pytest.mark.parametrize("strength", [float("nan"), float("inf"), -0.01, 2.01])
def test_a_wrong_lambda(graph, inverted, strength):
    score = CaptureSTRScore.execute(inverted[0], "", 1).result[0]
    with refused(graph, "^lambda: it is .*; expected a share of the way to a full match, from 0"):
        graph.optimise(score, strength=strength)


def test_a_window_that_ends_before_it_starts(graph, inverted):
    score = CaptureSTRScore.execute(inverted[0], "", 1).result[0]
    with refused(graph, r"^start_percent, end_percent: 0.6 and 0.4; expected 0 <= start_percent <= end_percent <= 1"):
        graph.optimise(score, start_percent=0.6, end_percent=0.4)


@pytest.mark.parametrize(("mask", "words"), [(0.0, "mask: it is empty"), (1.0, "mask: it covers the whole clip")])
def test_empty_and_full_masks_warn(graph, inverted, mask, words, caplog):
    trajectory, sigmas = inverted
    with caplog.at_level(logging.WARNING, "spacetime_edit"):
        graph.run(graph.sample(trajectory, mask=torch.full((1, 64, 64), mask)), sigmas)
    assert words in caplog.text


def test_a_result_that_stays_noisy_warns(graph, inverted, caplog):
    """The high_sigmas of SplitSigmas, where a weaker edit wants the low ones."""
    trajectory, sigmas = inverted
    for part, warns in ((sigmas[:-1], True), (sigmas[1:], False)):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "spacetime_edit"):
            graph.run(graph.sample(trajectory), part)
        assert ("take the low_sigmas" in caplog.text) == warns


class OddGuider(comfy.samplers.CFGGuider):
    """A guider of another pack, with its own name for the prompt."""

    def set_conds(self, cond):
        self.inner_set_conds({"cond": cond})

    def predict_noise(self, x, timestep, model_options=None, seed=None):
        raise AssertionError("the guider ran before the error")


def test_a_guider_without_positive_prompt(graph, inverted):
    trajectory, sigmas = inverted
    guider = OddGuider(graph.model)
    guider.set_conds(graph.positive)
    with refused(graph, "^guider: OddGuider has no model or no positive prompt that can be edited; use CFGGuider"):
        graph.run(graph.sample(trajectory), sigmas, guider=guider)


def test_several_gpus(graph, inverted):
    trajectory, sigmas = inverted
    with refused(graph, "^model: editing runs on one GPU"):
        clone = graph.model.clone()
        sampler = graph.sample(trajectory)
        guider = custom_sampler.CFGGuider.execute(clone, graph.positive, graph.positive, 1.0).result[0]
        guider.model_options = {**guider.model_options, "multigpu_clones": {}}
        graph.run(sampler, sigmas, guider=guider)


@pytest.mark.parametrize("dilation", [-1.0, float("nan")])
def test_a_wrong_dilation(graph, inverted, dilation):
    with refused(graph, "^dilation: it is .*; expected a number of pixels of at least 0"):
        graph.sample(inverted[0], mask=torch.ones(1, SIDE, SIDE), dilation=dilation)


def test_a_negative_radius(graph, inverted):
    with refused(graph, "^radius is -1, expected a number of frames, or 0"):
        CaptureSTRScore.execute(inverted[0], "", -1)


def test_a_positive_without_prompt(graph):
    with refused(graph, "^positive: it holds no prompt; connect a CLIP Text Encode"):
        graph.invert(positive=[])


def test_context_windows_of_one_model_only_are_refused_for_matching(graph, inverted):
    trajectory, sigmas = inverted
    windowed = graph.model.clone()
    windows = comfy.context_windows
    windowed.model_options["context_handler"] = windows.IndexListContextHandler(
        windows.get_matching_context_schedule("standard_static"), windows.get_matching_fuse_method("pyramid")
    )
    guider = custom_sampler.CFGGuider.execute(windowed, graph.positive, graph.positive, 1.0).result[0]
    score = CaptureSTRScore.execute(trajectory, "", 1).result[0]
    with refused(graph, "^model: only one of the inverted model and the edit's has context windows"):
        graph.run(graph.optimise(score), sigmas, guider=guider)
    assert graph.run(graph.sample(trajectory), sigmas, guider=guider).isfinite().all()


# a whole graph


@pytest.fixture
def executor(monkeypatch):
    """execute(prompt) -> (success, messages, outputs) by the host's own validation and PromptExecutor."""
    import execution
    from comfy_extras.nodes_custom_sampler import CFGGuider, RandomNoise, SamplerCustomAdvanced
    from server import PromptServer

    for node in (*PACK, CFGGuider, RandomNoise, SamplerCustomAdvanced):
        monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, node.define_schema().node_id, node)

    class Server:
        client_id = last_node_id = last_prompt_id = None
        sockets_metadata = {}

        def __init__(self):
            self.messages = []

        def send_sync(self, event, data, sid=None):
            self.messages.append((event, data))

        def queue_updated(self):
            pass

        def send_progress_text(self, text, node_id):
            self.messages.append(("text on node " + node_id, text))

    def execute(prompt):
        server = Server()
        monkeypatch.setattr(PromptServer, "instance", server, raising=False)
        cache = {"lru": 0, "ram": 0, "ram_inactive": 0}
        runner = execution.PromptExecutor(server, cache_type=execution.CacheType.CLASSIC, cache_args=cache)
        loop = asyncio.new_event_loop()
        try:
            valid = loop.run_until_complete(execution.validate_prompt("test", prompt, None))
            if not valid[0]:
                return False, valid[3], {}
            with torch.inference_mode(False):  # the host enters it by itself
                loop.run_until_complete(runner.execute_async(prompt, "test", {}, valid[2]))
        finally:
            loop.close()
        return runner.success, server.messages, runner.history_result.get("outputs", {})

    return execute


def prompt_of(**optimizer):
    """A whole edit in the API's form; STR Latent Optimizer is node 8."""
    inputs = {"score": ["7", 0], "strength": 1.0, "start_percent": 0.0, "end_percent": 1.0, "mask": ["2", 1]}
    inputs |= {"dilation": 4.0, "blend": "trajectory", "iterations": 1}
    inputs |= {"task": "change", "memory": "low", **optimizer}
    form = {"paths": "both", "direction": "one way", "per_pair": True}
    clip = LoadExampleClip.define_schema().inputs[0].options[0]
    steps = {"steps": 2, "scheduler": "simple", "refinements": 0, "check_reconstruction": True}
    graph = {
        "1": ("STE_LoadVideoDiffusersModel", {"model_name": EMBEDDED, "weight_dtype": "default"}),
        "2": ("STE_LoadExampleClip", {"clip": clip, "edit": 1}),
        "3": ("CLIPTextEncode", {"clip": ["1", 1], "text": ["2", 3]}),
        "4": ("CLIPTextEncode", {"clip": ["1", 1], "text": ["2", 4]}),
        "5": ("VAEEncode", {"pixels": ["2", 0], "vae": ["1", 2]}),
        "6": ("STE_InvertVideo", {"model": ["1", 0], "positive": ["3", 0], "latent": ["5", 0], **steps}),
        "7": ("STE_CaptureSTRScore", {"trajectory": ["6", 0], "layers": "m0", "radius": 1, **form}),
        "8": ("STE_STRLatentOptimizer", inputs),
        "9": ("CFGGuider", {"model": ["1", 0], "positive": ["4", 0], "negative": ["3", 0], "cfg": 3.0}),
        "10": ("RandomNoise", {"noise_seed": 1}),
        "11": (
            "SamplerCustomAdvanced",
            {"noise": ["10", 0], "guider": ["9", 0], "sampler": ["8", 0], "sigmas": ["6", 1], "latent_image": ["5", 0]},
        ),
        "12": ("VAEDecode", {"samples": ["11", 0], "vae": ["1", 2]}),
        "13": ("PreviewImage", {"images": ["12", 0]}),
    }
    return {key: {"class_type": name, "inputs": inputs} for key, (name, inputs) in graph.items()}


def test_a_whole_graph_runs_in_the_host(executor):
    success, messages, outputs = executor(prompt_of())
    assert success, [data for event, data in messages if event == "execution_error"]
    assert len(outputs["13"]["images"]) == 8
    assert "dB" in str(outputs["6"])
    assert [text for event, text in messages if event == "text on node 6" and "dB" in text]


def test_the_host_refuses_values_outside_the_widgets(executor):
    success, errors, _ = executor(prompt_of(strength=-1.0, task="sideways"))
    assert not success
    assert {error["extra_info"]["input_name"] for error in errors["8"]["errors"]} == {"strength", "task"}


@pytest.mark.parametrize(
    ("node", "values", "words"),
    [
        ("8", {"start_percent": 0.6, "end_percent": 0.4}, "start_percent, end_percent: 0.6 and 0.4"),
        ("7", {"layers": "d1;u0"}, "layers: 'd1;u0' is not a block or a range of blocks"),
    ],
)
def test_settings_that_cannot_work_stop_the_prompt_before_anything_runs(executor, node, values, words):
    prompt = prompt_of()
    prompt[node]["inputs"] |= values
    success, errors, _ = executor(prompt)
    assert not success
    assert any(words in error["details"] for error in errors[node]["errors"]), errors[node]
