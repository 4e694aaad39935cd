"""Which edits of a clip a graph holds, read from its nodes before any of them runs.

A graph is in API format: {id: {"class_type": ..., "inputs": {name: value or [id, output]}}}.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal

Graph = Mapping[str, Mapping]
Method = Literal["prompt swap", "STR-Match", "DreamMotion"]

INVERT, CAPTURE, OPTIMIZER, SWEEP, SAMPLE, DDS, RUN = (
    "STE_InvertVideo",
    "STE_CaptureSTRScore",
    "STE_STRLatentOptimizer",
    "STE_SweepLambda",
    "STE_SampleFromTrajectory",
    "STE_VideoDDSOptimize",
    "SamplerCustomAdvanced",
)

READ = (INVERT, CAPTURE, OPTIMIZER, SWEEP, SAMPLE, DDS, RUN)
TERMS = {"s_ssm": 0.3, "t_ssm": 0.1, "relevance": 0.0, "frame_difference": 0.0}
"""Terms of Video DDS Optimize with their defaults."""


@dataclass(frozen=True)
class Plan:
    """One edit. prompts: with which the guider calls the model in a step, 2 with CFG.

    inversion: id of its Invert Video; part: of the denoising that this model has, in progress from 0 to 1; checked:
    whether the inversion samples the clip back. layers, radius, strength, iterations, start, end, low_memory: of the
    STR nodes; layers, terms (weights by name), low_memory: of Video DDS Optimize. The rest as in Invert Video.
    """

    method: Method = "STR-Match"
    steps: int = 50
    scheduler: str = "ddim_uniform"
    refinements: int = 1
    prompts: int = 2
    layers: str = ""
    radius: int = 0
    strength: float = 1.0
    iterations: int = 3
    start: float = 0.0
    end: float = 0.75
    low_memory: bool = False
    inversion: str = ""
    part: tuple[float, float] = (0.0, 1.0)
    checked: bool = False
    terms: tuple[tuple[str, float], ...] = ()

    @property
    def matching(self) -> bool:
        return self.method == "STR-Match" and self.strength > 0


def edits_in(graph: Graph, node: str) -> list[Plan]:
    """The edits whose clip is the latent that `node` gets, in the order of the graph; as often as each runs."""
    latent = graph.get(node, {}).get("inputs", {}).get("latent")
    if not isinstance(latent, list):
        return []
    return [*_of_inversions(graph, latent), *_of_distillations(graph, latent)]


def digest_of_running() -> str:
    """Of all that `edits_in` may read in the graphs that the server runs at this moment; "" without a server.

    ComfyUI does not count a graph among the inputs of a node, so without this a prediction would outlive its settings.
    """
    from server import PromptServer

    server = getattr(PromptServer, "instance", None)
    if server is None:
        return ""
    running, _ = server.prompt_queue.get_current_queue()
    return digest([item[2] for item in running])


def digest(graphs: Iterable[Graph]) -> str:
    """Changes with whatever `edits_in` may read in a graph, and with nothing else."""
    read = [
        {key: node["inputs"] for key, node in graph.items() if node["class_type"] in READ or _guides(node)}
        for graph in graphs
    ]
    return blake2b(json.dumps(read, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def _guides(node: Mapping) -> bool:
    return "Guider" in node["class_type"]


def _behind(graph: Graph, kind: str, name: str, source: str) -> Iterator[tuple[str, Mapping]]:
    """Ids and inputs of the nodes of a kind whose input `name` comes from a node."""
    for key, node in graph.items():
        value = node["inputs"].get(name)
        if node["class_type"] == kind and isinstance(value, list) and str(value[0]) == source:
            yield key, node["inputs"]


def _of_inversions(graph: Graph, latent: list) -> Iterator[Plan]:
    for key, node in graph.items():
        if node["class_type"] != INVERT or node["inputs"].get("latent") != latent:
            continue
        names = dict(steps="steps", scheduler="scheduler", refinements="refinements", checked="check_reconstruction")
        inversion = _values(node["inputs"], **names) | {"inversion": key, "part": _part(graph, node["inputs"])}
        for sampler, _ in _behind(graph, SAMPLE, "trajectory", key):
            for guidance in _guidances(graph, sampler):
                yield Plan("prompt swap", **inversion, **guidance)
        for score, own in _behind(graph, CAPTURE, "trajectory", key):
            form = _values(own, layers="layers", radius="radius")
            for sampler, inputs in _behind(graph, OPTIMIZER, "score", score):
                names = dict(strength="strength", iterations="iterations", start="start_percent", end="end_percent")
                matching = _values(inputs, **names) | {"low_memory": inputs.get("memory") == "low"}
                for source, strength in _lambdas(graph, sampler):
                    for guidance in _guidances(graph, source):
                        yield Plan("STR-Match", **inversion, **form, **matching | strength, **guidance)


def _of_distillations(graph: Graph, latent: list) -> Iterator[Plan]:
    for node in graph.values():
        inputs = node["inputs"]
        if node["class_type"] == DDS and inputs.get("latent") == latent:
            terms = tuple((TERMS | _values(inputs, **{name: name for name in TERMS})).items())
            own = _values(inputs, steps="steps", layers="layers") | {"low_memory": inputs.get("memory") == "low"}
            yield Plan("DreamMotion", terms=terms, **own)


def _part(graph: Graph, inputs: Mapping) -> tuple[float, float]:
    """Of a pair of models, what one inverts: the first from the clip to to_percent, the other on from there."""
    end = inputs.get("to_percent", 0.0)
    before = inputs.get("trajectory")
    first = graph.get(str(before[0]), {}).get("inputs", {}) if isinstance(before, list) else {}
    reached = first.get("to_percent", 1.0)
    return tuple(0.0 + v if isinstance(v, (int, float)) else d for v, d in ((end, 0.0), (reached, 1.0)))


def _lambdas(graph: Graph, sampler: str) -> Iterator[tuple[str, dict[str, float]]]:
    """Whose sampler runs, with which lambda: a node's own, or those of a sweep behind it."""
    sweeps = list(_behind(graph, SWEEP, "sampler", sampler))
    for key, inputs in sweeps:
        for value in str(inputs.get("lambdas", "")).split(","):
            yield key, {"strength": float(value)} if value.strip().replace(".", "", 1).isdigit() else {}
    if not sweeps:
        yield sampler, {}


def _guidances(graph: Graph, sampler: str) -> list[dict[str, int]]:
    """With how many prompts the guider calls the model, for each run of a sampler; as a rule where that is unknown."""
    found = []
    for _, inputs in _behind(graph, RUN, "sampler", sampler):
        guider = graph.get(str(inputs["guider"][0])) if isinstance(inputs.get("guider"), list) else None
        given = {} if guider is None else guider["inputs"]
        of_prompts = [name for name in PROMPTS if name in given]
        found.append({"prompts": 1 if given.get("cfg") == 1 else len(of_prompts)} if of_prompts else {})
    return found or [{}]


PROMPTS = ("positive", "conditioning", "cond1", "cond2", "negative", "empty_conditioning")
"""Inputs of the host's guiders that are prompts."""


def _values(inputs: Mapping, **names: str) -> dict:
    """By our names, the inputs that are values; what comes by a link is not known before it runs."""
    return {own: inputs[name] for own, name in names.items() if name in inputs and not isinstance(inputs[name], list)}
