"""The ways in which mergekit's recipes refer to a model, as one text: a path or hub id, with `@revision` and `+adapter`."""

from __future__ import annotations

from typing import Any

_KEYS = frozenset({"model", "path", "revision", "lora"})


def reference(given: Any) -> Any:
    """A model given as a mapping, as text; anything else as it is.

    Raises:
        ValueError: the mapping has other keys, or says something twice.

    Example:
        reference({"model": {"path": "org/name", "revision": "v1"}, "lora": "org/adapter"}) == "org/name@v1+org/adapter"
    """
    if not isinstance(given, dict):
        return given
    unknown = sorted(str(key) for key in given.keys() - _KEYS)
    if unknown:
        raise ValueError(f"a model is given by path and revision, and has no {', '.join(unknown)}")
    if ("model" in given) == ("path" in given):
        raise ValueError("a model needs one of model and path")
    place, revision = reference(given.get("model", given.get("path"))), given.get("revision")
    if not isinstance(place, str) or not isinstance(revision, str | None):
        raise ValueError("path and revision of a model are texts")
    if revision and "@" in place:
        raise ValueError("a model has its revision twice")
    adapter = reference(given.get("lora"))
    if not isinstance(adapter, str | None):
        raise ValueError("lora is the path or hub id of an adapter")
    if adapter and "+" in place:
        raise ValueError("a model has its adapter twice")
    model = f"{place}@{revision}" if revision else place
    return f"{model}+{adapter}" if adapter else model
