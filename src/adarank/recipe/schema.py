"""Recipes: mergekit's YAML dialect, extended by what adaptation and evaluation need."""

from __future__ import annotations

from collections import Counter
from itertools import count
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, field_validator

from adarank.adapt.methods import ADAPTIVE, AdaptiveMethod
from adarank.adapt.multitask import Multitask
from adarank.adapt.presets import with_preset
from adarank.adapt.settings import AdaptSettings
from adarank.alignment.selection import Select
from adarank.data.spec import DataSettings, TaskSpec
from adarank.io.hub import called, same_model
from adarank.methods import METHODS, Method
from adarank.methods.per_tensor import resolve
from adarank.modular import MODULAR, Modular, Surgery
from adarank.modular.base import settled
from adarank.recipe.mergekit import with_effect, without_effect
from adarank.settings import Settings, keys, parse
from adarank.spectral.mask_file import MaskFile

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

    @property
    def has_task(self) -> bool:
        """Whether the recipe says more of a task than what tables call the model."""
        given = self.task.model_dump(exclude_unset=True, exclude_none=True) if self.task else {}
        return bool(given.keys() - {"name"})


class AdaptBlock(AdaptSettings):
    """The `adapt` block: the loop's settings and perhaps a preset that gives their defaults."""

    preset: str | None = Field(None, description="released settings to start from")


class Recipe(Settings):
    """A whole recipe. `folder` is where its relative paths count from."""

    _nothing = field_validator("parameters", mode="before")(_empty_if_none)

    merge_method: str
    name: str | None = None  # of a stage in mergekit's recipes of several; without effect
    models: tuple[ModelEntry, ...]
    base_model: str | None = None
    parameters: dict[str, Any] = Field({}, description="settings")
    select: Select = Select()
    dtype: _Dtype | None = None
    out_dtype: _Dtype | None = None
    dequantize: bool = False
    tokenizer_source: Literal["base"] | None = None
    adapt: AdaptBlock | None = None
    data: DataSettings = DataSettings()
    seed: int = Field(0, ge=0, lt=2**63)
    device: str = "auto"
    folder: Path = Field(Path("."), exclude=True)
    layer_range: tuple[int, int] | None = None  # of the one slice that the models were given in: it must be all layers

    @property
    def merges_base(self) -> bool:
        """True if a base that is listed among the models is merged as they are."""
        kind = METHODS.get(self.merge_method)
        return kind is not None and kind.merges_base

    @property
    def adaptive(self) -> bool:
        return self.merge_method in ADAPTIVE

    @property
    def modular(self) -> bool:
        """True if small modules are trained beside the weights: adapters, routers."""
        return self.merge_method in MODULAR

    @property
    def trains(self) -> bool:
        """True for the reference that is trained on labels: no merge at all."""
        return self.merge_method == Multitask.name

    @property
    def learns(self) -> bool:
        """True if what is written is learned step by step: λ and masks, modules, or a whole network."""
        return self.adaptive or self.modular or self.trains

    @property
    def needs_data(self) -> bool:
        """Whether merging reads the tasks' data."""
        return self.learns or bool(METHODS[self.merge_method].data)

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
        return self.merges_base and self.base_model is not None and not any(map(self._names_base, self.models))

    def is_base(self, entry: ModelEntry) -> bool:
        """True for the base listed among the models, where a method does not merge it."""
        return not self.merges_base and self._names_base(entry) and not entry.has_task

    def _names_base(self, entry: ModelEntry) -> bool:
        return same_model(entry.model, self.base_model, self.folder)

    @property
    def kinds(self) -> set[str]:
        """Kinds that the recipe itself gives its tasks."""
        return {entry.task.kind for entry in self.experts.values() if entry.task and entry.task.kind}

    def output_dtype(self) -> torch.dtype | None:
        """The dtype of the output, or None for each tensor's own in the base."""
        name = self.out_dtype or self.dtype
        return DTYPES[name] if name else None

    def adaptation(self) -> tuple[AdaptiveMethod, AdaptSettings]:
        """The adaptive method and its loop's settings."""
        return with_preset(self.merge_method, self.parameters, *self._adapt())

    def modules(self) -> tuple[Modular, AdaptSettings]:
        """The modular method and its loop's settings."""
        return settled(MODULAR[self.merge_method], self.parameters, *self._adapt())

    def start(self) -> Recipe | None:
        """What the modules of this recipe are put on, as a recipe of its own; None if the method settles it itself."""
        method = self.modules()[0] if self.modular else None
        if not isinstance(method, Surgery):
            return None
        given = method.start
        adapt = None if given.adapt is None else parse(AdaptBlock, given.adapt, "parameters.start.adapt")
        return self.model_copy(
            update={"merge_method": given.merge_method, "parameters": dict(given.parameters), "adapt": adapt}
        )

    def _adapt(self) -> tuple[dict[str, Any], str | None]:
        """What the adapt block says itself, and its preset."""
        if self.adapt is None:
            return {}, None
        return self.adapt.model_dump(exclude_unset=True, exclude={"preset"}), self.adapt.preset

    def training(self) -> Multitask:
        """The settings of multi-task training."""
        return parse(Multitask, self.parameters, f"parameters of '{self.merge_method}'")

    def method(self, names: list[str]) -> Method:
        """The method, if it is not adaptive, with its settings; `names` are the tensors that it merges."""
        kind = METHODS[self.merge_method]
        per_model = {t: with_effect(kind.name, e.parameters, kind.per_model) for t, e in self.experts.items()}
        values = resolve(kind, with_effect(kind.name, self.parameters, keys(kind)), per_model, names)
        if "seed" in kind.model_fields:
            values.setdefault("seed", self.seed)
        if self.merge_method == "masked" and isinstance(values.get("masks"), str):
            values["masks"] = MaskFile.load(self.folder / values["masks"])
        return parse(kind, values, f"parameters of '{self.merge_method}'")

    def notes(self) -> list[str]:
        """What the recipe says without effect, and a base that is merged like the models, in sentences."""
        name, found = self.merge_method, []
        if self.name is not None:
            found.append(f"name: '{self.name}', without effect.")
        if self.adds_base:
            found.append(f"base_model: merged like the models, as {name} has no base.")
        if name not in METHODS:
            return found
        for_all, per_model = keys(METHODS[name]), METHODS[name].per_model
        places = [("parameters", without_effect(name, self.parameters, for_all))]
        places += [(f"models: '{t}'", without_effect(name, e.parameters, per_model)) for t, e in self.experts.items()]
        places += [("models: the base", list(own.parameters)) for own in self.models if self.is_base(own)]
        found += [f"{where}: {', '.join(idle)} without effect in {name}." for where, idle in places if idle]
        misplaced = {key for _, idle in places[1:] for key in idle if key in for_all and key not in per_model}
        found += [f"{key}: {name} takes it for all models, under parameters." for key in sorted(misplaced)]
        return found


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
