"""The catalogue of methods, read off the methods themselves."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Any, get_args

import annotated_types  # pydantic's own vocabulary of bounds

from adarank.adapt.methods import ADAPTIVE, PRESETS, AdaptiveMethod
from adarank.adapt.settings import AdaptSettings
from adarank.errors import RecipeError
from adarank.methods import METHODS, Method
from adarank.modular import MODULAR, Modular
from adarank.multitask import Multitask
from adarank.settings import Settings, nearest


@dataclass(frozen=True)
class Setting:
    """One setting: its name in recipes, default, allowed range and meaning."""

    name: str
    default: str
    allowed: str
    meaning: str


@dataclass(frozen=True)
class Entry:
    """One method: its formula, needs, settings and source."""

    name: str
    summary: str
    formula: str
    needs: str
    settings: tuple[Setting, ...]
    source: str


def catalogue() -> dict[str, Entry]:
    """Method name -> entry; adaptive methods and the reference last."""
    found = {name: _entry(kind, _needs(kind), ()) for name, kind in METHODS.items()}
    found["masked"] = _entry(METHODS["masked"], "base, experts and a masks file", ())
    for name, kind in ADAPTIVE.items():
        fixed = {"learn_masks"} if name != "adarank" else set()
        found[name] = _entry(kind, "base, experts and unlabelled inputs of each task", (AdaptSettings,), fixed)
    for name, module in MODULAR.items():
        needs = f"base, experts and unlabelled inputs of each task; in use it must know {module.knows}"
        found[name] = _entry(module, needs, (AdaptSettings,), None, module)
    found[Multitask.name] = _entry(Multitask, Multitask.needs, ())
    return found


def entry(name: str) -> Entry:
    """One method.

    Raises:
        RecipeError: no such method.
    """
    found = catalogue()
    if name not in found:
        raise RecipeError(f"methods: unknown method '{name}'.{nearest(name, found)}")
    return found[name]


def presets() -> dict[str, dict[str, Any]]:
    """Preset name -> the parameters and adapt settings it stands for."""
    return {name: {key: dict(values) for key, values in preset.items()} for name, preset in PRESETS.items()}


def _needs(kind: type[Method]) -> str:
    inputs = "base and experts" if getattr(kind, "origin", None) == "pretrained" else "experts"
    read = inputs if kind.passes == 1 else f"{inputs}, read {kind.passes} times"
    read += f" and {kind.data}" if kind.data else ""
    return f"{read}; in use, each input's task" if kind.task_aware else read


def _entry(
    kind: type[Method] | type[AdaptiveMethod] | type[Modular] | type[Multitask],
    needs: str,
    more: tuple[type[Settings], ...],
    fixed: set[str] | None = None,
    module: type[Modular] | None = None,
) -> Entry:
    unused = set(module.unused) if module else set()
    loop = [s for extra in more for s in _settings(extra, unused, "adapt.")]
    if module:  # which has defaults of its own
        own = {f"adapt.{key}": str(value) for key, value in module.defaults.items()}
        loop = [replace(s, default=own.get(s.name, s.default)) for s in loop]
    settings = [*_settings(kind, fixed or set()), *loop]
    summary = (inspect.getdoc(kind) or "").split("\n\n")[0].replace("\n", " ")
    return Entry(kind.name, summary, kind.formula, needs, tuple(settings), kind.source)


def _settings(kind: type[Settings], fixed: set[str], prefix: str = "") -> list[Setting]:
    found = []
    for key, field in kind.model_fields.items():
        if key in fixed or field.exclude:
            continue
        if isinstance(field.annotation, type) and issubclass(field.annotation, Settings) and not field.is_required():
            found += _settings(field.annotation, set(), f"{prefix}{key}.")
            continue
        default = "required" if field.is_required() else _yaml(field.default)
        allowed = ", ".join(_bound(rule) for rule in field.metadata if _bound(rule)) or _choices(field.annotation)
        found.append(Setting(prefix + (field.alias or key), default, allowed, field.description or ""))
    return found


def _yaml(value: Any) -> str:
    """A default as a recipe writes it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(list(value)) if isinstance(value, tuple) else str(value)


def _bound(rule: Any) -> str:
    match rule:
        case annotated_types.Gt(gt=value):
            return f"> {value}"
        case annotated_types.Ge(ge=value):
            return f"≥ {value}"
        case annotated_types.Lt(lt=value):
            return f"< {value}"
        case annotated_types.Le(le=value):
            return f"≤ {value}"
    return ""


def _choices(annotation: Any) -> str:
    values = get_args(annotation)
    return (
        ", ".join(str(value) for value in values) if values and all(isinstance(value, str) for value in values) else ""
    )
