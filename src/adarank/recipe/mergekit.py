"""What mergekit's dialect has and recipes here have not, and its other way to list whole models."""

from __future__ import annotations

from typing import Any

# What mergekit's dialect has and this tool does not do: named, so that the error says more than "unknown key".
NOT_DONE = {
    "slices": "Layers are not rearranged here (frankenmerging): give one slice of all layers, or list whole models under models.",
    "modules": "Module-wise recipes are not merged here; list whole models under models.",
    "tokenizer": "Vocabularies are never resized here; all models must share the base's.",
    "chat_template": "Edit tokenizer_config.json of the output instead.",
    "tokenizer_source": "Only 'base': vocabularies are never resized here; all models must share the base's.",
}


# mergekit's methods that this tool has not, and the nearest that it has.
NOT_HERE = {
    "passthrough": "It copies layers and merges nothing; copy the model, or use mergekit for layer slices.",
}


def of_one_slice(values: dict[str, Any]) -> dict[str, Any]:
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
    if not ranges or any(own != ranges[0] for own in ranges) or slices[0].keys() - {"sources", "parameters"}:
        return values
    own = {
        "models": [{key: value for key, value in source.items() if key != "layer_range"} for source in sources],
        "parameters": {**(values.get("parameters") or {}), **(slices[0].get("parameters") or {})},
        "layer_range": ranges[0],
    }
    return {key: value for key, value in values.items() if key != "slices"} | own
