"""What mergekit's dialect has and recipes here have not, what it has without effect, and its other ways to list whole models."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

# What mergekit's dialect has and this tool does not support: named, so that the error says more than "unknown key".
NOT_DONE = {
    "modules": "Only a module 'default' is read here; list whole models under models.",
}


# Its methods that are here too, and every setting that any of its methods has.
SHARED = frozenset({
    "arcee_fusion", "breadcrumbs", "breadcrumbs_ties", "dare_linear", "dare_ties", "della", "della_linear",
    "karcher", "linear", "model_stock", "multislerp", "nearswap", "nuslerp", "passthrough", "ram", "ramplus_tl", "sce", "slerp",
    "task_arithmetic", "ties",
})  # fmt: skip
SETTINGS = frozenset({
    "alpha", "density", "eps", "epsilon", "filter_wise", "gamma", "int8_mask", "lambda", "max_iter", "normalize",
    "normalize_weights", "nuslerp_flatten", "nuslerp_row_wise", "r", "rescale", "scale", "select_topk", "t", "tol",
    "weight",
})  # fmt: skip


def without_effect(method: str, given: Collection[str], taken: Collection[str]) -> list[str]:
    """Of the parameters `given` in a recipe, those that mergekit has and this method of it does not use.

    Arguments:
        taken: the parameters that the method uses where these stand.
    """
    return [key for key in given if method in SHARED and key in SETTINGS and key not in taken]


def with_effect(method: str, given: Mapping[str, Any], taken: Collection[str]) -> dict[str, Any]:
    """The other ones, unknown ones among them."""
    idle = without_effect(method, given, taken)
    return {key: value for key, value in given.items() if key not in idle}


def beside_parameters(values: Mapping[str, Any]) -> list[str]:
    """Settings of mergekit's methods that stand beside `parameters`, where mergekit passes over them."""
    return [key for key in values if key in SETTINGS and values.get("merge_method") in SHARED]


def whole_models(values: dict[str, Any]) -> dict[str, Any]:
    """mergekit's other ways to list whole models: a module `default` alone, and one slice. Anything else as it is.

    A `random_seed`, which its model cards have and its command line takes, is the seed.
    """
    return _of_one_slice(_of_one_module(_seeded(values)))


def _seeded(values: dict[str, Any]) -> dict[str, Any]:
    if "random_seed" not in values or "seed" in values:
        return values
    return {("seed" if key == "random_seed" else key): value for key, value in values.items()}


def _of_one_module(values: dict[str, Any]) -> dict[str, Any]:
    """The form that mergekit writes into model cards: what `modules: {default: …}` says, as if it stood outside."""
    modules = values.get("modules")
    inside = modules.get("default") if isinstance(modules, dict) and len(modules) == 1 else None
    if not isinstance(inside, dict) or inside.keys() - {"models", "slices", "parameters"}:
        return values
    if {"models", "slices"} & values.keys():
        return values
    outside = {key: value for key, value in values.items() if key != "modules"}
    given = [each.get("parameters") or {} for each in (inside, outside)]
    if not all(isinstance(each, dict) for each in given):
        return values
    return outside | inside | {"parameters": chained(*given)}


def _of_one_slice(values: dict[str, Any]) -> dict[str, Any]:
    """One slice of the same layers of each model, as models that have these layers. Anything else as it is."""
    slices = values.get("slices")
    if "models" in values or not (isinstance(slices, list) and len(slices) == 1 and isinstance(slices[0], dict)):
        return values
    sources, given = slices[0].get("sources"), [each.get("parameters") or {} for each in (slices[0], values)]
    if not isinstance(sources, list) or slices[0].keys() - {"sources", "parameters"}:
        return values
    ranges = [source.get("layer_range") for source in sources if isinstance(source, dict)]
    if len(ranges) < len(sources) or not ranges or ranges[0] is None or any(other != ranges[0] for other in ranges):
        return values
    if not all(isinstance(each, dict) for each in given):
        return values
    outside = {key: value for key, value in values.items() if key != "slices"}
    return outside | {"models": sources, "parameters": chained(*given)}


def chained(inner: Mapping[str, Any], outer: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of which the inner ones go first; what their filters leave out takes the outer ones'."""
    return {**outer, **{key: _before(value, outer[key]) if key in outer else value for key, value in inner.items()}}


def _before(first: Any, then: Any) -> Any:
    entries = [first] if isinstance(first, dict) else first
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        return first
    return [*entries, {"value": then}]
