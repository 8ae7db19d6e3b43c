"""Settings: flat, frozen, validated objects that sit beside the code they steer."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from adarank.errors import RecipeError, itemise


class Settings(BaseModel):
    """A frozen pydantic model that refuses unknown keys. Fields may be given by name or alias.

    Class attributes:
        replaced: settings that are no more -> what stands in their place, in words.
    """

    replaced: ClassVar[Mapping[str, str]] = {}

    model_config = ConfigDict(
        frozen=True, extra="forbid", populate_by_name=True, arbitrary_types_allowed=True, allow_inf_nan=False
    )


S = TypeVar("S", bound=Settings)


def nearest(word: str, known: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the closest of `known`, or the whole list when none is close."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if not names:
        return " There is none to set."
    return f" Did you mean '{close[0]}'?" if close else f" Known: {', '.join(names)}."


def keys(kind: type[BaseModel]) -> list[str]:
    """The settings of a kind as recipes write them."""
    return [field.alias or name for name, field in kind.model_fields.items() if not field.exclude]


def parse(kind: type[S], values: Mapping[str, Any], where: str) -> S:
    """`kind(**values)`, with every problem of `values` in one `RecipeError` that names `where`."""
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        raise refusal(kind, error, where) from None


def refusal(kind: type[BaseModel], error: ValidationError, where: str) -> RecipeError:
    """What pydantic refuses, in sentences."""
    problems = [_sentence(kind, problem) for problem in error.errors()]
    return RecipeError(itemise(f"{where}: {len(problems)} problem(s).", problems))


_PLAIN = {  # pydantic names its own classes here, which no user knows
    **dict.fromkeys(("model_type", "model_attributes_type", "dict_type", "mapping_type"), "a mapping of settings"),
    **dict.fromkeys(("tuple_type", "list_type"), "a list"),
}


def _sentence(kind: type[BaseModel], problem: Any) -> str:
    location = problem["loc"]
    path = ".".join(str(part) for part in location)
    if problem["type"] == "extra_forbidden":
        owner = _kind_at(kind, location[:-1])
        if issubclass(owner, Settings) and location[-1] in owner.replaced:
            return f"{path}: is no setting any more: {owner.replaced[location[-1]]}."
        return f"{path}: unknown key.{nearest(str(location[-1]), keys(owner))}"
    if problem["type"] in _PLAIN:
        return f"{path or 'value'}: {_PLAIN[problem['type']]} is needed, got {_short(problem['input'])}"
    if problem["type"] == "string_unicode":
        return f"{path or 'a key'}: has half of a character, a lone surrogate, got {_short(problem['input'])}. Write it whole."
    got = "" if problem["type"] == "missing" else f" (got {_short(problem['input'])})"
    message = problem["ctx"]["error"] if problem["type"] == "value_error" else problem["msg"]  # ours, without a prefix
    return f"{path or 'value'}: {message}{got}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _kind_at(kind: type[BaseModel], location: Iterable[Any]) -> type[BaseModel]:
    """The settings at a path inside nested ones. A union's path names the class that was tried."""
    current: type[BaseModel] = kind
    inside: Any = None
    for part in location:
        named = _settings_named(inside, str(part))
        if named is not None:
            current = named
            continue
        field = current.model_fields.get(str(part)) or _by_alias(current, str(part))
        if field is not None:
            inside = field.annotation
            current = _settings_in(inside) or current
    return current


def _by_alias(kind: type[BaseModel], alias: str) -> Any:
    return next((field for field in kind.model_fields.values() if field.alias == alias), None)


def _settings_named(annotation: Any, name: str) -> type[BaseModel] | None:
    """The settings class called `name` inside a type."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation if annotation.__name__ == name else None
    inner = (_settings_named(argument, name) for argument in getattr(annotation, "__args__", ()))
    return next((kind for kind in inner if kind is not None), None)


def _settings_in(annotation: Any) -> type[BaseModel] | None:
    """The first settings class inside a type such as `list[ModelEntry]` or `Adapt | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    inner = (_settings_in(argument) for argument in getattr(annotation, "__args__", ()))
    return next((kind for kind in inner if kind is not None), None)
