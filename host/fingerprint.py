"""What made a trajectory, as far as a file can tell, and how that differs from what is connected."""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from comfy.quant_ops import QuantizedTensor
from torch import Tensor

from .families import NEVER, family_of, noise_space
from .inflation import inflation_of

WEIGHT_SAMPLES = 16
NOT_INFLATED = NOT_PATCHED = "none"
MAX_JSON = 64 * 2**10
CLIP_TOLERANCE = 1e-3
"""Largest difference of two latents of one clip, in the model's scale (unit variance): a VAE on another device."""

MADE_BY = {
    "base_model": "model class",
    "diffusion_model": "diffusion model class",
    "latent_format": "latent format",
    "space": "noise space",
    "inflation": "inflation",
}
HASHED = {"loras": "LoRAs of model and prompt (SHA-256)", "prompt": "prompt (SHA-256)"}


@dataclass(frozen=True)
class Fingerprint:
    """What made a trajectory.

    sigma_range: smallest and largest sigma of the model's sampling. weights: `weight_samples` of the diffusion model;
    loras: `patches_digest`. prompt, clip: SHA-256 of the conditioning and of the clean latent z_0, whose shape is
    `shape`.
    """

    base_model: str
    diffusion_model: str
    latent_format: str
    space: str
    inflation: str
    sigma_range: tuple[float, float]
    weights: tuple[tuple[float, float], ...]
    loras: str
    prompt: str
    shape: tuple[int, ...]
    clip: str

    @classmethod
    def of(cls, model, conditioning: list, clean: Tensor) -> "Fingerprint":
        """model: ModelPatcher; conditioning: the host's; clean: z_0 in the model's scale."""
        sampling = model.get_model_object("model_sampling")
        return cls(
            base_model=type(model.model).__name__,
            diffusion_model=type(model.model.diffusion_model).__name__,
            latent_format=type(model.model.latent_format).__name__,
            space=noise_space(model).name,
            inflation=str(inflation_of(model) or NOT_INFLATED),
            sigma_range=(float(sampling.sigma_min), float(sampling.sigma_max)),
            weights=weight_samples(model),
            loras=patches_digest(model, conditioning),
            prompt=sha256(tensor for tensor, _ in conditioning if tensor is not None),
            shape=tuple(clean.shape),
            clip=sha256([clean]),
        )

    @classmethod
    def parse(cls, text: str) -> "Fingerprint":
        """From the JSON in a file; ValueError for whatever is no fingerprint."""
        if len(text) > MAX_JSON:
            raise ValueError(f"it has {len(text)} characters, expected at most {MAX_JSON}")
        try:
            data = json.loads(text)
            low, high = data["sigma_range"]
            fingerprint = cls(
                **{name: str(data[name]) for name in (*MADE_BY, "loras", "prompt", "clip")},
                sigma_range=(float(low), float(high)),
                weights=tuple((float(value), float(unit)) for value, unit in data["weights"]),
                shape=tuple(int(size) for size in data["shape"]),
            )
        except (KeyError, TypeError, OverflowError, RecursionError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from error
        if len(fingerprint.weights) != WEIGHT_SAMPLES:
            raise ValueError(f"{len(fingerprint.weights)} weight samples, expected {WEIGHT_SAMPLES}")
        return fingerprint


@dataclass(frozen=True)
class Difference:
    """A field in which a file and what is connected differ; `final`: not even use_anyway helps."""

    field: str
    saved: object
    connected: object
    final: bool

    def __str__(self) -> str:
        return f"{self.field}: {self.saved} in the file, {self.connected} connected"


def weight_samples(model) -> tuple[tuple[float, float], ...]:
    """(value, unit) of the centre element of 16 weight matrices, evenly spaced by name, without any LoRA.

    unit: one step of the type that the weight is stored in. Casting moves a weight by half a step of the coarser type,
    so copies of one model in fp32, fp16, bf16 and fp8 agree within one, and another fine-tune mostly does not. In fp8
    a step is an eighth of the value, at least 0.002: a light fine-tune kept in fp8 passes for the original. Vectors are
    left out: they differ little between fine-tunes, and copies in fp8 have scales of their own among them. Of packed
    weights it is a byte, with unit 0: such a copy agrees with itself alone.
    """
    family, network = family_of(model), model.model.diffusion_model
    guests = re.compile(f"(?:{family.injected[1]}).*" if family.injected else NEVER)  # they come and go
    matrices = {n: p for n, p in network.named_parameters() if p.ndim >= 2 and not guests.fullmatch(n)}
    names = sorted(matrices)
    chosen = (names[k * (len(names) - 1) // (WEIGHT_SAMPLES - 1)] for k in range(WEIGHT_SAMPLES))
    return tuple(_sample(_original(model, f"diffusion_model.{name}", matrices[name])) for name in chosen)


def _original(model, key: str, weight: Tensor) -> Tensor:
    """The weight before the host patched a LoRA into it."""
    if key in model.backup:
        return model.backup[key].weight
    return model.hook_backup[key][0] if key in model.hook_backup else weight


def _sample(weight: Tensor) -> tuple[float, float]:
    if not isinstance(weight, QuantizedTensor) and not weight.dtype.is_floating_point:
        packed = weight.detach().as_subclass(Tensor).flatten()  # bytes of a GGUF file, whose shape is not the weight's
        return float(packed[len(packed) // 2]), 0.0
    stored = torch.finfo(torch.float8_e4m3fn if isinstance(weight, QuantizedTensor) else weight.dtype)
    value = float(weight[tuple(size // 2 for size in weight.shape)].float())
    return value, stored.eps * max(abs(value), stored.smallest_normal)


def patches_digest(model, conditioning: list) -> str:
    """SHA-256 of the LoRAs on a ModelPatcher's diffusion model and of the hooks on a prompt; "none" without either.

    Of each patch its strengths and, of its tensors, shape and centre element: enough to tell two LoRAs apart.
    """
    found = [
        (key, sorted(str([_facts(part) for part in patch]) for patch in patches))
        for key, patches in model.patches.items()
        if key.startswith("diffusion_model.")
    ]
    for _, about in conditioning:
        for hook in getattr(about.get("hooks"), "hooks", ()):
            frames = [(frame.start_percent, frame.strength) for frame in hook.hook_keyframe.keyframes]
            weights = sorted(
                (str(key), str(_facts(value))) for key, value in (getattr(hook, "weights", 0) or {}).items()
            )
            found.append((type(hook).__name__, [str(getattr(hook, "strength_model", "")), str(frames), str(weights)]))
    return hashlib.sha256(str(sorted(found)).encode()).hexdigest() if found else NOT_PATCHED


def _facts(value: object) -> object:
    """Of a part of one of the host's patches, a nest of tensors, numbers and adapters."""
    value = getattr(value, "weights", value)
    if isinstance(value, Tensor):
        plain = value.detach().flatten()
        return tuple(value.shape), float(plain[len(plain) // 2]) if len(plain) else 0.0
    if isinstance(value, list | tuple):
        return [_facts(part) for part in value]
    return value if isinstance(value, str | int | float | None) else type(value).__name__


def sha256(tensors: Iterable[Tensor]) -> str:
    """Of shapes and values as fp32, bit for bit.

    Rounding first would not make two devices agree: of 59,000 values of a prompt some always lie at a rounding edge.
    """
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(str(tuple(tensor.shape)).encode())
        digest.update(tensor.detach().float().cpu().flatten().numpy())
    return digest.hexdigest()


def differences(saved: Fingerprint, clean: Tensor, model, positive: list, latent: Tensor | None) -> list[Difference]:
    """All fields in which a file with the clean latent `clean` and what is connected differ."""
    connected = Fingerprint.of(model, positive, clean)
    return [
        *_model_differences(saved, connected, model.model.latent_format),
        *_weight_differences(saved.weights, connected.weights),
        *_clip_differences(clean, latent, model.model),
        *(
            Difference(field, getattr(saved, name)[:12], getattr(connected, name)[:12], final=False)
            for name, field in HASHED.items()
            if getattr(saved, name) != getattr(connected, name)
        ),
    ]


def _model_differences(saved: Fingerprint, connected: Fingerprint, latent_format) -> Iterator[Difference]:
    for name, field in MADE_BY.items():
        if getattr(saved, name) != getattr(connected, name):
            yield Difference(field, getattr(saved, name), getattr(connected, name), final=True)
    ranges = saved.sigma_range, connected.sigma_range
    if not all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(*ranges, strict=True)):
        yield Difference("sigmas of the model", *("{:.4g} to {:.4g}".format(*pair) for pair in ranges), final=True)
    dimensions, channels = latent_format.latent_dimensions + 2, latent_format.latent_channels
    if len(saved.shape) != dimensions or saved.shape[1] != channels:
        expected = f"a model of {dimensions} dimensions with {channels} channels"
        yield Difference("latent shape", saved.shape, expected, final=True)


def _weight_differences(saved: Sequence[tuple], connected: Sequence[tuple]) -> Iterator[Difference]:
    pairs = zip(saved, connected, strict=True)
    apart = [(a, b) for (a, unit_a), (b, unit_b) in pairs if not abs(a - b) <= max(unit_a, unit_b)]
    if apart:
        field = f"weights ({len(apart)} of {WEIGHT_SAMPLES} samples: another fine-tune or another model)"
        yield Difference(field, *(f"{value:.4g}" for value in apart[0]), final=False)


def _clip_differences(clean: Tensor, latent: Tensor | None, base_model) -> Iterator[Difference]:
    if latent is None:
        return
    if latent.shape != clean.shape:
        yield Difference("clip shape", tuple(clean.shape), tuple(latent.shape), final=True)
        return
    latent = latent.float()
    connected = base_model.process_latent_in(latent) if latent.count_nonzero() else latent  # as CFGGuider does
    distance = float((connected.cpu() - clean.float()).abs().max())
    if not distance <= CLIP_TOLERANCE:
        yield Difference("clip", "a latent", f"one up to {distance:.3g} away from it", final=False)
