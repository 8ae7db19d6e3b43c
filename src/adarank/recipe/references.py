"""The ways in which mergekit's recipes refer to a model, as one text: a path or hub id, with `@revision`."""

from __future__ import annotations

from typing import Any

from adarank.io.hub import NO_ADAPTERS

_KEYS = frozenset({"model", "path", "revision", "lora"})


def reference(given: Any) -> Any:
    """A model given as a mapping, as text; anything else as it is.

    Raises:
        ValueError: the mapping has other keys, or an adapter.

    Example:
        reference({"model": {"path": "org/name", "revision": "v1"}}) == "org/name@v1"
    """
    if not isinstance(given, dict):
        return given
    unknown = sorted(str(key) for key in given.keys() - _KEYS)
    if unknown:
        raise ValueError(f"a model is given by path and revision, and has no {', '.join(unknown)}")
    if given.get("lora") is not None:
        raise ValueError(NO_ADAPTERS)
    if ("model" in given) == ("path" in given):
        raise ValueError("a model needs one of model and path")
    place, revision = reference(given.get("model", given.get("path"))), given.get("revision")
    if not isinstance(place, str) or not isinstance(revision, str | None):
        raise ValueError("path and revision of a model are texts")
    if revision and "@" in place:
        raise ValueError("a model has its revision twice")
    return f"{place}@{revision}" if revision else place
