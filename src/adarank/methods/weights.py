"""Per-model weights as mergekit's recipes write them, resolved to one number per tensor.

weight: 0.5                                     the same for every tensor
weight: [0, 0.5, 1]                             a gradient over the layers, interpolated linearly
weight: [{filter: mlp, value: 0.5}, {value: 1}] the first entry whose filter is part of the tensor's name
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from adarank.errors import RecipeError

_LAYER = re.compile(r"(?:^|\.)(\d+)\.")


class TensorWeights:
    """Model -> weight, for each tensor of a network.

    Arguments:
        settings: model -> weight as a recipe writes it.
        fallback: weight, as a recipe writes it, of models that are left out and of tensors that no filter covers.
        names: every tensor's name; gradients run from the first layer (0) to the last (1), and tensors
            outside the layers take a gradient's first value.
    """

    def __init__(self, settings: Mapping[str, Any], names: Sequence[str], fallback: Any = None) -> None:
        self._settings, self._fallback = settings, fallback
        layers = [int(match.group(1)) for name in names if (match := _LAYER.search(name))]
        self._last = max(layers, default=0)
        for task in settings:
            for name in names:
                self.of(task, name)

    def of(self, task: str, name: str) -> float:
        """The weight of a model in one tensor.

        Raises:
            RecipeError: the setting is not a number, a gradient or a list of filters that covers the tensor.
        """
        default = 1.0 if self._fallback is None else self._fallback
        return self._value(task, self._settings.get(task, default), name)

    def _value(self, task: str, setting: Any, name: str) -> float:
        number = _number(setting)
        if number is not None:
            return number
        if isinstance(setting, Mapping):
            setting = [setting]
        if isinstance(setting, list) and setting and all(_number(v) is not None for v in setting):
            return self._gradient([float(v) for v in setting], name)
        if isinstance(setting, list):
            return self._filtered(task, setting, name)
        raise RecipeError(
            f"models: weight of '{task}' must be a number, a list of numbers or a list of filters, got {setting!r}."
        )

    def _filtered(self, task: str, entries: list[Any], name: str) -> float:
        for entry in entries:
            if not isinstance(entry, Mapping):
                return self._value(task, entry, name)
            if set(entry) - {"filter", "value"} or "value" not in entry:
                raise RecipeError(
                    f"models: weight of '{task}': a filter entry has 'value' and perhaps 'filter', got {dict(entry)!r}."
                )
            wanted = entry.get("filter")
            if wanted is None or wanted == "*" or wanted in name:
                return self._value(task, entry["value"], name)
        if self._fallback is not None and entries is not self._fallback:
            return self._value(task, self._fallback, name)
        raise RecipeError(
            f"models: no filter in the weight of '{task}' covers tensor '{name}'. End the list with an entry {{value: …}} that has no filter."
        )

    def _gradient(self, values: list[float], name: str) -> float:
        match = _LAYER.search(name)
        position = 0.0 if match is None else int(match.group(1)) / self._last if self._last else 1.0
        scaled = position * (len(values) - 1)
        low = int(scaled)
        high = min(low + 1, len(values) - 1)
        return (1 - (scaled - low)) * values[low] + (scaled - low) * values[high]


def _number(value: Any) -> float | None:
    """A finite number, also one that YAML takes for text (`1e-1`); None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
