"""Recipes: mergekit's YAML dialect, extended by what adaptation and evaluation need."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, field_validator, model_validator

from adarank.adapt.base import AdaptBlock
from adarank.alignment.selection import Select
from adarank.data.spec import DataSettings, TaskSpec
from adarank.io.hub import called, same_model
from adarank.method import Given, MergeMethod
from adarank.recipe.mergekit import with_effect, without_effect
from adarank.recipe.references import reference
from adarank.recipe.registry import METHODS
from adarank.settings import Settings, keys

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
_Dtype = Literal["float32", "float16", "bfloat16", "float64"]


def _empty_if_none(value: Any) -> Any:
    """YAML reads a key without a value as None: no parameters are meant."""
    return {} if value is None else value


class ModelEntry(Settings):
    """One expert: where it is, its parameters, and its task."""

    _nothing = field_validator("parameters", mode="before")(_empty_if_none)

    _as_text = field_validator("model", mode="before")(reference)

    @model_validator(mode="before")
    @classmethod
    def _with_adapter(cls, given: Any) -> Any:
        """`lora` beside `model` is the model's adapter, as it is inside of it."""
        if not isinstance(given, dict) or "lora" not in given:
            return given
        rest = {key: value for key, value in given.items() if key != "lora"}
        return {**rest, "model": reference({"model": given.get("model"), "lora": given["lora"]})}

    model: str
    parameters: dict[str, Any] = Field({}, description="settings")
    task: TaskSpec | None = None

    @property
    def has_task(self) -> bool:
        """Whether the recipe says more of a task than what tables call the model."""
        given = self.task.model_dump(exclude_unset=True, exclude_none=True) if self.task else {}
        return bool(given.keys() - {"name"})


class TokenizerSettings(Settings):
    """Whose tokenizer the merge comes with: `union`, `base`, or one of the recipe's models."""

    source: str = Field("union", min_length=1)
    tokens: dict[str, Any] | None = None
    pad_to_multiple_of: int | None = None

    @field_validator("tokens", "pad_to_multiple_of")
    @classmethod
    def _not_done(cls, value: Any) -> Any:
        """mergekit's settings of tables that are made anew; without a value they ask for nothing."""
        if value:
            raise ValueError(
                "is not supported: rows of embedding tables are not made here. Remove it, or resize the models first"
            )
        return value


class LoraOutput(Settings):
    """The output as a LoRA adapter of the base. Attributes: rank, r of every layer."""

    rank: int = Field(ge=1)


class OutputSettings(Settings):
    """In what form the merged model is written; a whole model if nothing is said."""

    lora: LoraOutput | None = None


class Recipe(Settings):
    """A whole recipe. `folder` is where its relative paths count from."""

    _nothing = field_validator("parameters", mode="before")(_empty_if_none)

    _as_text = field_validator("base_model", mode="before")(reference)

    merge_method: str
    name: str | None = None  # of a stage in mergekit's recipes of several; without effect
    models: tuple[ModelEntry, ...]
    base_model: str | None = None
    parameters: dict[str, Any] = Field({}, description="settings")
    select: Select = Select()
    dtype: _Dtype | None = None
    out_dtype: _Dtype | None = None
    dequantize: bool = False
    tokenizer: TokenizerSettings | None = None
    tokenizer_source: str | None = None  # mergekit's older way to write tokenizer: source
    adapt: AdaptBlock | None = None
    heads: Literal["expert", "learn"] = "expert"
    output: OutputSettings = OutputSettings()
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
    def tokenizer_of(self) -> str | None:
        """Whose tokenizer is asked for: `union`, `base` or a model; None if the recipe does not say."""
        return self.tokenizer.source if self.tokenizer is not None else self.tokenizer_source

    @property
    def experts(self) -> dict[str, ModelEntry]:
        """Task name -> model. The base, if it is listed among the models as mergekit allows, is no expert."""
        entries = [entry for entry in self.models if not self.is_base(entry)]
        if self.adds_base and self.base_model is not None:
            entries = [ModelEntry(model=self.base_model), *entries]
        reserved = {"base"} if self.base_model else set()  # what tables and records call the base
        return dict(zip(_task_names(entries, reserved, self.folder), entries, strict=True))

    @property
    def tasks(self) -> dict[str, TaskSpec]:
        """Task name -> what the recipe says of the task, for models that have one. A name alone is a label."""
        return {name: entry.task for name, entry in self.experts.items() if entry.task and entry.has_task}

    @property
    def adds_base(self) -> bool:
        """True if the base is not listed and merged all the same, as mergekit does where a method has no base."""
        return self.kind.merges_base and self.base_model is not None and not any(map(self._names_base, self.models))

    def is_base(self, entry: ModelEntry) -> bool:
        """True for the base listed among the models, where a method does not merge it."""
        return not self.kind.merges_base and self._names_base(entry) and not entry.has_task

    def _names_base(self, entry: ModelEntry) -> bool:
        return same_model(entry.model, self.base_model, self.folder)

    @property
    def kinds(self) -> set[str]:
        """Kinds that the recipe itself gives its tasks."""
        return {entry.task.kind for entry in self.experts.values() if entry.task and entry.task.kind}

    def output_dtype(self) -> torch.dtype | None:
        """The dtype of the output, or None for each tensor's in the base."""
        name = self.out_dtype or self.dtype
        return DTYPES[name] if name else None

    def given(self, names: Sequence[str] = ()) -> Given:
        """What the recipe says of its method.

        Arguments:
            names: the tensors that it merges; none while no checkpoint is opened.
        """
        block, preset = self.adapt.split() if self.adapt else (None, None)
        name, kind = self.merge_method, self.kind
        models = {t: with_effect(name, e.parameters, kind.per_model) for t, e in self.experts.items()}
        parameters = with_effect(name, self.parameters, keys(kind))
        return Given(parameters, models, block, preset, names, self.seed, self.folder, METHODS.named)

    def method(self, names: Sequence[str] = ()) -> MergeMethod:
        """The method with all its settings; `names` as for `given`.

        Raises:
            RecipeError: settings that do not fit.
        """
        return self.kind.resolve(self.given(names))

    def notes(self) -> list[str]:
        """What the recipe says without effect, and a base that is merged like the models, in sentences."""
        name, sentences = self.merge_method, []
        if self.name is not None:
            sentences.append(f"name: '{self.name}', without effect.")
        if self.adds_base:
            sentences.append(f"base_model: merged like the models, as {name} has no base.")
        for_all, per_model = keys(self.kind), self.kind.per_model
        places = [("parameters", without_effect(name, self.parameters, for_all))]
        places += [(f"models: '{t}'", without_effect(name, e.parameters, per_model)) for t, e in self.experts.items()]
        places += [("models: the base", list(entry.parameters)) for entry in self.models if self.is_base(entry)]
        sentences += [f"{where}: {', '.join(idle)} without effect in {name}." for where, idle in places if idle]
        misplaced = {key for _, idle in places[1:] for key in idle if key in for_all and key not in per_model}
        sentences += [f"{key}: {name} takes it for all models, under parameters." for key in sorted(misplaced)]
        return sentences


def _task_names(entries: list[ModelEntry], reserved: set[str], folder: Path) -> list[str]:
    """Each expert's task name: as given, else the last part of its path; made unique by a number.

    Arguments:
        reserved: names that only the recipe itself may ask for, and is refused then.
    """
    given = [e.task.name if e.task else None for e in entries]
    names = [name or called(e.model, folder) for name, e in zip(given, entries, strict=True)]
    counts = Counter(names)
    taken = {name for name in names if counts[name] == 1}
    unique = []
    for name, label in zip(names, given, strict=True):
        if counts[name] > 1 or (not label and name in reserved):
            name = next(n for n in (f"{name}-{i}" for i in count(1)) if n not in taken)
            taken.add(name)
        unique.append(name)
    return unique
