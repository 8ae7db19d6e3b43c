"""The catalogue of methods, read off the methods themselves."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, get_args

import annotated_types  # pydantic's vocabulary of bounds
from pydantic.fields import FieldInfo

from adarank.adapt.presets import PRESETS
from adarank.method import MergeMethod
from adarank.methods.per_tensor import TensorWeights
from adarank.recipe.registry import METHODS
from adarank.settings import Settings


@dataclass(frozen=True)
class Setting:
    """One setting: its name in recipes, default, allowed range and meaning."""

    name: str
    default: str
    allowed: str
    meaning: str


@dataclass(frozen=True)
class Entry:
    """One method.

    Attributes:
        needs: models and data, and whether labels are read.
        reads: how often checkpoints and inputs are gone through.
        memory: what is held at a time; `adarank plan` estimates the bytes for a recipe.
    """

    name: str
    summary: str
    formula: str
    needs: str
    reads: str
    memory: str
    settings: tuple[Setting, ...]
    source: str


def catalogue() -> dict[str, Entry]:
    """Method name -> entry; adaptive methods, modules, the reference and other packages' methods last."""
    return {name: entry_of(METHODS[name]) for name in METHODS}


def entry(name: str) -> Entry:
    """One method.

    Raises:
        RecipeError: no such method.
    """
    return entry_of(METHODS.named(name, "methods: unknown method"))


def presets() -> dict[str, dict[str, Any]]:
    """Preset name -> the parameters and adapt settings it stands for."""
    return {name: {key: dict(values) for key, values in preset.items()} for name, preset in PRESETS.items()}


def entry_of(kind: type[MergeMethod]) -> Entry:
    """The entry of a method's class."""
    settings = [*_settings(kind, kind.fixed), *_loop(kind)]
    summary = (inspect.getdoc(kind) or "").split("\n\n")[0].replace("\n", " ")
    return Entry(
        kind.name, summary, kind.formula, kind.needs(), kind.passes_over(), kind.memory(), tuple(settings), kind.source
    )


def _loop(kind: type[MergeMethod]) -> list[Setting]:
    """Settings of the adapt block, with the method's defaults."""
    if kind.adapt_block is None:
        return []
    defaults = _flat(kind.defaults, "adapt.")
    settings = _settings(kind.adapt_block, kind.unused, "adapt.")
    return [replace(setting, default=defaults.get(setting.name, setting.default)) for setting in settings]


def _flat(values: Mapping[str, Any], prefix: str) -> dict[str, str]:
    """Defaults by the names of their settings, those of groups too."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: _yaml(value)}
    return flat


def _settings(kind: type[Settings], fixed: Collection[str], prefix: str = "") -> list[Setting]:
    settings = []
    for key, field in kind.model_fields.items():
        if key in fixed or field.exclude:
            continue
        if isinstance(field.annotation, type) and issubclass(field.annotation, Settings) and not field.is_required():
            settings += _settings(field.annotation, (), f"{prefix}{key}.")
            continue
        default = "required" if field.is_required() else _yaml(field.default)
        allowed = ", ".join(_bound(rule) for rule in field.metadata if _bound(rule)) or _choices(field)
        settings.append(Setting(prefix + (field.alias or key), default, allowed, field.description or ""))
    return settings


def _yaml(value: Any) -> str:
    """A default as a recipe writes it."""
    if isinstance(value, TensorWeights):
        value = value.plain()
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


def _choices(field: FieldInfo) -> str:
    values = get_args(field.annotation)
    if isinstance(field.json_schema_extra, dict):
        values = tuple(field.json_schema_extra.get("choices", ()))  # type: ignore[arg-type]
    return ", ".join(map(str, values)) if values and all(isinstance(value, str) for value in values) else ""
