"""Recipes: mergekit's YAML dialect, extended by what adaptation and evaluation need."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, field_validator

from adarank.adapt.base import AdaptBlock
from adarank.alignment.selection import Select
from adarank.data.spec import DataSettings, TaskSpec
from adarank.method import Given, MergeMethod
from adarank.recipe.registry import METHODS
from adarank.settings import Settings

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
_Dtype = Literal["float32", "float16", "bfloat16", "float64"]


def _empty_if_none(value: Any) -> Any:
    """YAML reads a key without a value as None: no parameters are meant."""
    return {} if value is None else value


class ModelEntry(Settings):
    """One expert: where it is, its own parameters, and its task."""

    _nothing = field_validator("parameters", mode="before")(_empty_if_none)

    model: str
    parameters: dict[str, Any] = Field({}, description="settings")
    task: TaskSpec | None = None


class Recipe(Settings):
    """A whole recipe. `folder` is where its relative paths count from."""

    _nothing = field_validator("parameters", mode="before")(_empty_if_none)

    merge_method: str
    models: tuple[ModelEntry, ...]
    base_model: str | None = None
    parameters: dict[str, Any] = Field({}, description="settings")
    select: Select = Select()
    dtype: _Dtype | None = None
    out_dtype: _Dtype | None = None
    tokenizer_source: Literal["base"] | None = None
    adapt: AdaptBlock | None = None
    heads: Literal["expert", "learn"] = "expert"
    data: DataSettings = DataSettings()
    seed: int = Field(0, ge=0, lt=2**63)
    device: str = "auto"
    folder: Path = Field(Path("."), exclude=True)
    layer_range: tuple[int, int] | None = None  # of the one slice that the models were given in: it must be all layers

    @property
    def kind(self) -> type[MergeMethod]:
        """The class of the method."""
        return METHODS[self.merge_method]

    @property
    def experts(self) -> dict[str, ModelEntry]:
        """Task name -> model. The base, if it is listed among the models as mergekit allows, is no expert."""
        base = None if self.kind.lists_base else self.base_model
        entries = [m for m in self.models if m.model != base or m.task is not None]
        return dict(zip(_task_names(entries), entries, strict=True))

    @property
    def kinds(self) -> set[str]:
        """Kinds that the recipe itself gives its tasks."""
        return {entry.task.kind for entry in self.experts.values() if entry.task and entry.task.kind}

    def output_dtype(self) -> torch.dtype | None:
        """The dtype of the output, or None for each tensor's own in the base."""
        name = self.out_dtype or self.dtype
        return DTYPES[name] if name else None

    def given(self, names: Sequence[str] = ()) -> Given:
        """What the recipe says of its method.

        Arguments:
            names: the tensors that it merges; none while no checkpoint is opened.
        """
        block, preset = self.adapt.split() if self.adapt else (None, None)
        models = {task: entry.parameters for task, entry in self.experts.items()}
        return Given(self.parameters, models, block, preset, names, self.seed, self.folder, METHODS.named)

    def method(self, names: Sequence[str] = ()) -> MergeMethod:
        """The method with all its settings; `names` as for `given`.

        Raises:
            RecipeError: settings that do not fit.
        """
        return self.kind.resolve(self.given(names))


def _task_names(entries: list[ModelEntry]) -> list[str]:
    """Each expert's task name: as given, else the last part of its path; made unique by a number."""
    names = [e.task.name if e.task and e.task.name else Path(e.model.split("@")[0]).name for e in entries]
    counts = Counter(names)
    taken = {name for name in names if counts[name] == 1}
    unique = []
    for name in names:
        if counts[name] > 1:
            name = next(n for n in (f"{name}-{i}" for i in count(1)) if n not in taken)
            taken.add(name)
        unique.append(name)
    return unique
