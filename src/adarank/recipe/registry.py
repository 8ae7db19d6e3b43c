"""All methods by name: the built-in ones, and those of other packages. Names of methods are looked up here alone."""

from __future__ import annotations

import inspect
from typing import Any

from adarank.adapt.distilled import DISTILLED
from adarank.adapt.methods import ADAPTIVE
from adarank.adapt.multitask import Multitask
from adarank.errors import RecipeError
from adarank.io.plugins import Registry
from adarank.method import MergeMethod
from adarank.methods import METHODS as STREAMED
from adarank.modular import MODULAR

_FACTS = ("name", "formula", "source")


def _flaw(name: str, given: Any) -> str:
    """What is wrong with a method of another package that is installed under a name."""
    if not (inspect.isclass(given) and issubclass(given, MergeMethod)):
        return "is no class that derives from adarank.method.MergeMethod"
    missing = [fact for fact in _FACTS if not isinstance(getattr(given, fact, None), str)]
    if missing:
        return f"does not say its {', '.join(missing)}"
    return "" if given.name == name else f"calls itself '{given.name}'"


METHODS: Registry[type[MergeMethod]] = Registry(
    "adarank.methods", "method", {**STREAMED, **ADAPTIVE, **DISTILLED, **MODULAR, Multitask.name: Multitask}, _flaw
)
"""Name -> method. Another package adds one by an entry point of the group `adarank.methods`."""


def method_class(given: str | type[MergeMethod]) -> type[MergeMethod]:
    """A method given from Python: its name, or its class.

    Raises:
        RecipeError: there is none of that name, or it is no class of methods.
    """
    if isinstance(given, str):
        return METHODS.named(given, "method: unknown method")
    name = getattr(given, "name", "")
    flaw = _flaw(name, given)
    if flaw:
        raise RecipeError(f"method: {given!r} {flaw}.")
    return given
