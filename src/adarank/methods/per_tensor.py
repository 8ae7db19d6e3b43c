"""Settings that may differ from model to model and from tensor to tensor, as mergekit's recipes write them.

weight: 0.5                                     the same for every tensor
weight: [0, 0.5, 1]                             a gradient over the layers, interpolated linearly
weight: [{filter: mlp, value: 0.5}, {value: 1}] the first entry whose filter is part of the tensor's name
normalize: [false, true]                        a gradient of switches goes in steps: true in the last layer alone

`PerTensor` is the type of such a setting, `Flag` that of a switch; `resolve` makes one of what a recipe, or Python, gives.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, get_args

from pydantic import BeforeValidator, PlainSerializer
from pydantic.fields import FieldInfo

from adarank.alignment.layers import Span, whole_span
from adarank.errors import RecipeError
from adarank.settings import Settings


class TensorWeights:
    """Model -> number, for each tensor of a network.

    A tensor takes its model's own setting; where that is not given or has no filter for it, the one for all models;
    then `rest`.

    Arguments:
        settings: model -> number, gradient or filters, as a recipe writes it.
        fallback: the same for all models, as a recipe writes it.
        names: every tensor's name; gradients run from the first layer (0) to the last (1), and tensors
            outside the layers take a gradient's first value.
        key: what recipes call the setting, for errors.
        rest: where nothing is given. None: 1 if nothing is given at all, an error if filters leave a tensor out.
        span: the layers that gradients run over, if not all.
    """

    _wanted = "a number, a list of numbers"

    def __init__(
        self,
        settings: Mapping[str, Any],
        names: Sequence[str],
        fallback: Any = None,
        key: str = "weight",
        rest: float | None = None,
        span: Span | None = None,
    ) -> None:
        self._settings, self._fallback, self._key, self._rest = settings, fallback, key, rest
        self._span = span or whole_span(names)
        self._values = {self.of(task, name) for task in settings or ("",) for name in names}

    def of(self, task: str, name: str) -> float:
        """The number of a model in one tensor.

        Raises:
            RecipeError: the setting is not a number, a gradient or a list of filters that covers the tensor.
        """
        given = [self._settings[task]] if task in self._settings else []
        given += [self._fallback] if self._fallback is not None else []
        for setting in given:
            value = self._value(task, setting, name)
            if value is not None:
                return value
        if given and self._rest is None:
            raise RecipeError(
                f"{self._where(task)}: no filter covers tensor '{name}'. End the list with an entry {{value: …}} that has no filter."
            )
        return 1.0 if self._rest is None else self._rest

    def plain(self) -> Any:
        """The setting as data, for a record."""
        given = self._rest if self._fallback is None else self._fallback
        return dict(self._settings) or (1.0 if given is None else given)

    def __ge__(self, bound: float) -> bool:
        """Whether every value is at least `bound`. Settings check their ranges by this and `<=`."""
        return all(value >= bound for value in self._values)

    def __le__(self, bound: float) -> bool:
        return all(value <= bound for value in self._values)

    def __repr__(self) -> str:
        return repr(self.plain())

    def _where(self, task: str) -> str:
        return f"models: {self._key} of '{task}'" if task else f"parameters: {self._key}"

    def _value(self, task: str, setting: Any, name: str) -> float | None:
        """None where no filter covers the tensor."""
        number = self._number(setting)
        if number is not None:
            return number
        if isinstance(setting, Mapping):
            setting = [setting]
        if isinstance(setting, list) and setting:
            steps = [step for step in map(self._number, setting) if step is not None]
            if len(steps) == len(setting):
                return self._gradient(steps, name)
            return self._filtered(task, setting, name)
        raise RecipeError(f"{self._where(task)} must be {self._wanted} or a list of filters, got {setting!r}.")

    def _filtered(self, task: str, entries: list[Any], name: str) -> float | None:
        for entry in entries:
            if not isinstance(entry, Mapping):
                return self._value(task, entry, name)
            if set(entry) - {"filter", "value"} or "value" not in entry:
                raise RecipeError(
                    f"{self._where(task)}: a filter entry has 'value' and perhaps 'filter', got {dict(entry)!r}."
                )
            wanted = entry.get("filter")
            if not isinstance(wanted, str | None):
                raise RecipeError(f"{self._where(task)}: a filter is a part of tensors' names, got {wanted!r}.")
            if wanted is None or wanted == "*" or wanted in self._span.seen(task, name):
                return self._value(task, entry["value"], name)
        return None

    def _gradient(self, values: list[float], name: str) -> float:
        scaled = self._span.position(name) * (len(values) - 1)
        low = int(scaled)
        high = min(low + 1, len(values) - 1)
        return (1 - (scaled - low)) * values[low] + (scaled - low) * values[high]

    @staticmethod
    def _number(value: Any) -> float | None:
        """A finite number, also one that YAML takes for text (`1e-1`); None for anything else."""
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            return None
        try:
            number = float(value)
        except ValueError:
            return None
        return number if math.isfinite(number) else None


class TensorFlags(TensorWeights):
    """Switches for each tensor of a network: 1 where on, 0 where off. A list over the layers goes in steps."""

    _wanted = "true or false, a list of these"

    def plain(self) -> Any:
        """The switch as it was given: true or false, or what the recipe has."""
        given = super().plain()
        return bool(given) if isinstance(given, float) else given

    def _gradient(self, values: list[float], name: str) -> float:
        return values[int(self._span.position(name) * (len(values) - 1))]

    @staticmethod
    def _number(value: Any) -> float | None:
        if isinstance(value, str):
            return {"true": 1.0, "false": 0.0}.get(value.lower())
        return float(value) if isinstance(value, (bool, int, float)) and value in (0, 1) else None


def rest(value: float) -> TensorWeights:
    """The default of a setting: `value` for every model and tensor."""
    return TensorWeights({}, (), rest=value)


def flag(value: bool) -> TensorFlags:
    """The default of a switch."""
    return TensorFlags({}, (), rest=float(value))


def _constant(value: Any) -> TensorWeights:
    """One number for all, where a setting is given from Python without a network."""
    return _for_all(TensorWeights, value, "a number")


def _switch(value: Any) -> TensorWeights:
    """One switch for all."""
    return _for_all(TensorFlags, value, "true or false")


def _for_all(kind: type[TensorWeights], value: Any, wanted: str) -> TensorWeights:
    if isinstance(value, kind):
        return value
    if kind._number(value) is None:
        raise ValueError(
            f"should be {wanted} here; lists are for recipes and adarank.merge, which know the tensors' names"
        )
    return kind({}, ("",), fallback=value)


PerTensor = Annotated[TensorWeights, BeforeValidator(_constant), PlainSerializer(TensorWeights.plain)]
Flag = Annotated[TensorFlags, BeforeValidator(_switch), PlainSerializer(TensorWeights.plain)]


def resolve(
    kind: type[Settings],
    parameters: Mapping[str, Any],
    models: Mapping[str, Mapping[str, Any]],
    names: Sequence[str],
    span: Span | None = None,
) -> dict[str, Any]:
    """`parameters` with every `PerTensor` setting of `kind` made a `TensorWeights` over `names`.

    Arguments:
        parameters: setting -> value for all models, or {model: value}.
        models: model -> its own settings. They go first.
        names: every merged tensor's name.
        span: the layers that gradients run over, if not all.

    Raises:
        RecipeError: a value is not a number, a gradient or a list of filters that covers every tensor.
    """
    values = dict(parameters)
    for field_name, field in kind.model_fields.items():
        if not is_per_tensor(field):
            continue
        key = field.alias or field_name
        shared = values.pop(key, None)
        of_models = {task: given[key] for task, given in models.items() if key in given}
        if isinstance(shared, TensorWeights):
            values[key] = shared
            continue
        if isinstance(shared, Mapping) and shared and set(shared) <= set(models):
            of_models, shared = {**shared, **of_models}, None
        if of_models or shared is not None:
            default = field.default if isinstance(field.default, TensorWeights) else TensorWeights({}, ())
            values[key] = type(default)(of_models, names, shared, key, default._rest, span)
    return values


def is_per_tensor(field: FieldInfo) -> bool:
    """Whether a setting is `PerTensor`, or that or None."""
    return any(_is_weights(part) for part in (field.annotation, *get_args(field.annotation)))


def _is_weights(part: Any) -> bool:
    kind = part if isinstance(part, type) else _first(get_args(part))
    return isinstance(kind, type) and issubclass(kind, TensorWeights)


def _first(parts: Iterable[Any]) -> Any:
    return next(iter(parts), None)
