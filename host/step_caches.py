"""Step caches of a model (EasyCache, LazyCache and their kind), and the model without them.

A cache answers in the network's place, which is no answer where attention or gradients are asked for.
"""

from collections.abc import Mapping

from comfy.model_patcher import create_model_options_clone
from comfy.patcher_extension import WrappersMP

CACHED = (WrappersMP.DIFFUSION_MODEL, WrappersMP.CALC_COND_BATCH, WrappersMP.PREDICT_NOISE, WrappersMP.OUTER_SAMPLE)
"""Where step caches put their wrappers."""


def caches_in(model_options: dict, wrappers: Mapping = {}) -> set[str]:
    """Names of the step caches (EasyCache, LazyCache and their kind) in the options of a model, and in its wrappers."""
    inner = model_options.get("transformer_options", {})
    places = (inner.get("wrappers", {}), wrappers)
    found = {name for own in places for place in CACHED for name in own.get(place, {}) if _is_cache(name)}
    return found or {name for name in inner if _is_cache(name)}


def without_caches(model):
    """(a clone of a ModelPatcher without its step caches, their names); the model itself where it has none."""
    names = caches_in(model.model_options, model.wrappers)
    if not names:
        return model, names
    bare = model.clone()
    bare.model_options = uncached(bare.model_options)
    for place in CACHED:
        for name in names:
            bare.remove_wrappers_with_key(place, name)
    return bare, names


def _is_cache(name: object) -> bool:
    return isinstance(name, str) and "cache" in name.lower()


def uncached(model_options: dict) -> dict:
    """A copy of the options of a model without step caches."""
    options = create_model_options_clone(model_options)
    inner = options.setdefault("transformer_options", {})
    for name in [name for name in inner if _is_cache(name)]:
        del inner[name]
    for place in CACHED:
        own = inner.get("wrappers", {}).get(place, {})
        for name in [name for name in own if _is_cache(name)]:
            del own[name]
    return options
