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

INVERT, CAPTURE, OPTIMIZER, SAMPLE, DDS, RUN = (
    "STE_InvertVideo",
    "STE_CaptureSTRScore",
    "STE_STRLatentOptimizer",
    "STE_SampleFromTrajectory",
    "STE_VideoDDSOptimize",
    "SamplerCustomAdvanced",
)

READ = (INVERT, CAPTURE, OPTIMIZER, SAMPLE, DDS, RUN)


@dataclass(frozen=True)
class Plan:
    """One edit. prompts: with which the guider calls the model in a step, 2 with CFG.

    layers, radius, strength, iterations, start, end, low_memory: of the STR nodes; layers, terms (weights by name),
    low_memory: of Video DDS Optimize. The rest as in Invert Video.
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
    terms: tuple[tuple[str, float], ...] = ()

    @property
    def matching(self) -> bool:
        return self.method == "STR-Match" and self.strength > 0


def edits_in(graph: Graph, node: str) -> list[Plan]:
    """The edits whose clip is the latent that `node` gets, in the order of the graph; each once."""
    latent = graph.get(node, {}).get("inputs", {}).get("latent")
    if not isinstance(latent, list):
        return []
    found = [*_of_inversions(graph, latent), *_of_distillations(graph, latent)]
    return list(dict.fromkeys(found))


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
        inversion = _values(node["inputs"], steps="steps", scheduler="scheduler", refinements="refinements")
        for sampler, _ in _behind(graph, SAMPLE, "trajectory", key):
            yield Plan("prompt swap", **inversion, **_guidance(graph, sampler))
        for score, own in _behind(graph, CAPTURE, "trajectory", key):
            form = _values(own, layers="layers", radius="radius")
            for sampler, inputs in _behind(graph, OPTIMIZER, "score", score):
                names = dict(strength="strength", iterations="iterations", start="start_percent", end="end_percent")
                matching = _values(inputs, **names) | {"low_memory": inputs.get("memory") == "low"}
                yield Plan("STR-Match", **inversion, **form, **matching, **_guidance(graph, sampler))


def _of_distillations(graph: Graph, latent: list) -> Iterator[Plan]:
    for node in graph.values():
        inputs = node["inputs"]
        if node["class_type"] == DDS and inputs.get("latent") == latent:
            names = ("s_ssm", "t_ssm", "relevance", "frame_difference")
            terms = tuple((name, float(inputs[name])) for name in names if isinstance(inputs.get(name), (int, float)))
            own = _values(inputs, steps="steps", layers="layers") | {"low_memory": inputs.get("memory") == "low"}
            yield Plan("DreamMotion", terms=terms, **own)


def _guidance(graph: Graph, sampler: str) -> dict[str, int]:
    """With how many prompts the guider beside a sampler calls the model; of a sweep or an unknown guider: as a rule."""
    for _, inputs in _behind(graph, RUN, "sampler", sampler):
        guider = graph.get(str(inputs["guider"][0])) if isinstance(inputs.get("guider"), list) else None
        if guider is None:
            continue
        of_prompts = [name for name in ("positive", "cond1", "cond2", "negative") if name in guider["inputs"]]
        cfg = guider["inputs"].get("cfg")
        return {"prompts": 1 if cfg == 1 else max(1, len(of_prompts))}
    return {}


def _values(inputs: Mapping, **names: str) -> dict:
    """By our names, the inputs that are values; what comes by a link is not known before it runs."""
    return {own: inputs[name] for own, name in names.items() if name in inputs and not isinstance(inputs[name], list)}
