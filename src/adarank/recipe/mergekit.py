"""What mergekit's dialect has and recipes here have not, what it has without effect, and its other ways to list whole models."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

# What mergekit's dialect has and this tool does not do: named, so that the error says more than "unknown key".
NOT_DONE = {
    "slices": "Layers are not rearranged here (frankenmerging): give one slice of all layers, or list whole models under models.",
    "modules": "Only a module 'default' of whole models is read here; list whole models under models.",
}


# mergekit's methods that this tool has not, and the nearest that it has.
NOT_HERE = {
    "passthrough": "It copies layers and merges nothing; copy the model, or use mergekit for layer slices.",
}


# Its methods that are here too, and every setting that any of its methods has.
SHARED = frozenset({
    "arcee_fusion", "breadcrumbs", "breadcrumbs_ties", "dare_linear", "dare_ties", "della", "della_linear",
    "karcher", "linear", "model_stock", "multislerp", "nearswap", "nuslerp", "ram", "ramplus_tl", "sce", "slerp",
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


def whole_models(values: dict[str, Any]) -> dict[str, Any]:
    """mergekit's other ways to list whole models: a module `default` alone, and one slice. Anything else as it is."""
    return _of_one_slice(_of_one_module(values))


def _of_one_module(values: dict[str, Any]) -> dict[str, Any]:
    """The form that mergekit writes into model cards: what `modules: {default: …}` says, as if it stood outside."""
    modules = values.get("modules")
    inside = modules.get("default") if isinstance(modules, dict) and len(modules) == 1 else None
    if not isinstance(inside, dict) or inside.keys() - {"models", "slices", "parameters"}:
        return values
    if {"models", "slices"} & values.keys():
        return values
    outside = {key: value for key, value in values.items() if key != "modules"}
    given = [each.get("parameters") or {} for each in (outside, inside)]
    if not all(isinstance(each, dict) for each in given):
        return values
    return outside | inside | {"parameters": {**given[0], **given[1]}}


def _of_one_slice(values: dict[str, Any]) -> dict[str, Any]:
    """mergekit's other way to list whole models: one slice of the same layers of each. Anything else as it is."""
    slices = values.get("slices")
    if "models" in values or not (isinstance(slices, list) and len(slices) == 1 and isinstance(slices[0], dict)):
        return values
    sources = slices[0].get("sources")
    if not isinstance(sources, list) or not all(
        isinstance(s, dict) and {"model", "layer_range"} <= s.keys() for s in sources
    ):
        return values
    ranges = [source["layer_range"] for source in sources]
    if not ranges or any(layers != ranges[0] for layers in ranges) or slices[0].keys() - {"sources", "parameters"}:
        return values
    whole = {
        "models": [{key: value for key, value in source.items() if key != "layer_range"} for source in sources],
        "parameters": {**(values.get("parameters") or {}), **(slices[0].get("parameters") or {})},
        "layer_range": ranges[0],
    }
    return {key: value for key, value in values.items() if key != "slices"} | whole
