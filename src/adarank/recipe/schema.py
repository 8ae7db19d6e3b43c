"""Recipes: mergekit's YAML dialect, extended by what adaptation and evaluation need."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, PrivateAttr, field_validator, model_validator

from adarank.adapt.base import AdaptBlock
from adarank.alignment.layers import Span
from adarank.alignment.selection import Select
from adarank.data.spec import DataSettings, TaskSpec
from adarank.io.hub import called, same_model
from adarank.method import Given, MergeMethod
from adarank.recipe.mergekit import chained, with_effect, without_effect
from adarank.recipe.references import reference
from adarank.recipe.registry import METHODS
from adarank.recipe.sizes import shard_bytes
from adarank.settings import Settings, keys

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
_COPIED: dict[str, Any] = {"merge_method": "passthrough", "base_model": None, "parameters": {}}
_Dtype = Literal["float32", "float16", "bfloat16", "float64"]


def _listed(value: Any) -> Any:
    """One name as a list of it; `none`, as Transformers has it, and nothing as an empty one."""
    return () if value in (None, "none") else (value,) if isinstance(value, str) else value


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
    layer_range: tuple[int, int] | None = None  # of a slice: from the first number to before the second
    parameters: dict[str, Any] = Field({}, description="settings")
    task: TaskSpec | None = None

    @property
    def has_task(self) -> bool:
        """Whether the recipe says more of a task than what tables call the model."""
        given = self.task.model_dump(exclude_unset=True, exclude_none=True) if self.task else {}
        return bool(given.keys() - {"name"})


class Zero(Settings):
    """A row of zeros."""

    kind: Literal["zero"]


class ModelToken(Settings):
    """The row of one token of one of the recipe's models."""

    _as_text = field_validator("model", mode="before")(reference)

    kind: Literal["model_token"]
    model: str
    token: str | None = None
    token_id: int | None = Field(None, ge=0)

    @model_validator(mode="after")
    def _one_of_two(self) -> ModelToken:
        if (self.token is None) == (self.token_id is None):
            raise ValueError("a model_token needs one of token and token_id")
        return self


class TokenEntry(Settings):
    """Where a token's row comes from in models that lack it; with `force`, in all."""

    source: str | ModelToken | Zero
    force: bool = False

    @field_validator("source", mode="before")
    @classmethod
    def _by_kind(cls, value: Any) -> Any:
        """Kinds by their names, so that an error speaks of the one that is meant; other mappings name a model."""
        if isinstance(value, dict) and "kind" in value:
            kinds: dict[Any, type[Settings]] = {"zero": Zero, "model_token": ModelToken}
            if value["kind"] not in kinds:
                raise ValueError("kind is one of model_token and zero")
            return kinds[value["kind"]].model_validate(value)
        return reference(value)


class Slice(Settings):
    """Layers of the output: those of one model, or of several, merged."""

    _nothing = field_validator("parameters", mode="before")(_empty_if_none)

    _as_text = field_validator("base_model", mode="before")(reference)

    sources: tuple[ModelEntry, ...]
    base_model: str | None = None
    parameters: dict[str, Any] = Field({}, description="settings")


class TokenizerSettings(Settings):
    """Whose tokenizer the merge comes with: `union`, `base`, or one of the recipe's models; and where rows come from."""

    _as_text = field_validator("source", mode="before")(reference)

    source: str = Field("union", min_length=1)
    tokens: dict[str, TokenEntry] | None = None
    pad_to_multiple_of: int | None = Field(None, ge=0)


class LoraOutput(Settings):
    """The output as a LoRA adapter of the base. Attributes: rank, r of every layer."""

    rank: int = Field(ge=1)


class OutputSettings(Settings):
    """In what form the merged model is written; a whole model if nothing is said."""

    lora: LoraOutput | None = None


class Recipe(Settings):
    """A whole recipe. `folder` is where its relative paths count from."""

    _nothing = field_validator("parameters", mode="before")(_empty_if_none)

    _as_text = field_validator("base_model", "tokenizer_source", mode="before")(reference)
    _as_bytes = field_validator("max_shard_size", mode="before")(shard_bytes)
    _as_list = field_validator("report_to", mode="before")(_listed)

    merge_method: str
    name: str | None = None  # without effect, but in a file of several stages
    models: tuple[ModelEntry, ...] = ()
    slices: tuple[Slice, ...] = ()
    base_model: str | None = None
    parameters: dict[str, Any] = Field({}, description="settings")
    select: Select = Select()
    dtype: _Dtype | None = None
    out_dtype: _Dtype | None = None
    dequantize: bool = False
    tokenizer: TokenizerSettings | None = None
    tokenizer_source: str | None = None  # mergekit's older way to write tokenizer: source
    chat_template: str | None = Field(None, min_length=1)
    max_shard_size: int | None = None
    adapt: AdaptBlock | None = None
    heads: Literal["expert", "learn"] = "expert"
    output: OutputSettings = OutputSettings()
    data: DataSettings = DataSettings()
    report_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    seed: int = Field(0, ge=0, lt=2**63)
    device: str = "auto"
    folder: Path = Field(Path("."), exclude=True)

    _stages: dict[str, Recipe] = PrivateAttr(default_factory=dict)
    _unread: tuple[str, ...] = PrivateAttr(())  # further stages of the file
    _method: MergeMethod | None = PrivateAttr(None)

    @property
    def stages(self) -> Mapping[str, Recipe]:
        """Name -> recipe of what is merged before, and may be named as a model; each after those that it names."""
        return self._stages

    @property
    def unread(self) -> tuple[str, ...]:
        """Names of stages in the same file that it does not need."""
        return self._unread

    def after(self, stages: Mapping[str, Recipe], unread: tuple[str, ...] = ()) -> Recipe:
        """The recipe with stages that are merged before it.

        Arguments:
            unread: names of further stages of the file, which it does not need.
        """
        recipe = self.model_copy()
        recipe._stages, recipe._unread = dict(stages), unread
        return recipe

    @property
    def references(self) -> set[str]:
        """Every model that it names."""
        named = {entry.model for entry in self._entries()} | {each.base_model for each in self.slices}
        return {name for name in (*named, self.base_model) if name is not None}

    @property
    def kind(self) -> type[MergeMethod]:
        """The class of the method."""
        return METHODS[self.merge_method]

    @property
    def tokenizer_settings(self) -> TokenizerSettings | None:
        """Whose tokenizer is asked for, in either form; None if the recipe does not say."""
        if self.tokenizer is None and self.tokenizer_source is not None:
            return TokenizerSettings(source=self.tokenizer_source)
        return self.tokenizer

    @property
    def experts(self) -> dict[str, ModelEntry]:
        """Task name -> model. The base, if it is listed among the models as mergekit allows, is no expert."""
        entries = [entry for entry in self._entries() if not self.is_base(entry)]
        if self.adds_base and self.base_model is not None:
            entries = [ModelEntry(model=self.base_model), *entries]
        reserved = {"base"} if self.base_model else set()  # what tables and records call the base
        return dict(zip(_task_names(entries, reserved, self.folder), entries, strict=True))

    def _entries(self) -> list[ModelEntry]:
        """The models; of slices each once, whatever they take of it."""
        sources = {source.model: ModelEntry(model=source.model) for each in self.slices for source in each.sources}
        return [*self.models, *sources.values()]

    @property
    def tasks(self) -> dict[str, TaskSpec]:
        """Task name -> what the recipe says of the task, for models that have one. A name alone is a label."""
        return {name: entry.task for name, entry in self.experts.items() if entry.task and entry.has_task}

    @property
    def adds_base(self) -> bool:
        """True if the base is not listed and merged all the same, as mergekit does where a method has no base."""
        if self.slices or self.base_model is None:
            return False
        return self.kind.merges_base and not any(map(self._names_base, self.models))

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

    def parts(self) -> tuple[Recipe, ...]:
        """A recipe for each slice, whose models are the slice's sources. Without slices there are none."""
        return tuple(self._part(each) for each in self.slices)

    def _part(self, of: Slice) -> Recipe:
        base = None if self.kind.merges_base else of.base_model or self.base_model
        listed = [same_model(source.model, base, self.folder) for source in of.sources]
        parameters = chained(of.parameters, self.parameters)
        changes: dict[str, Any] = {"models": of.sources, "slices": (), "name": None, "parameters": parameters}
        if all(listed) and len(listed) == 1:  # nothing to merge: the base's layers as they are
            changes |= _COPIED
        else:
            changes["base_model"] = base if any(listed) else None
        return self.model_copy(update=changes).after({})

    def given(self, names: Sequence[str] = (), span: Span | None = None, text: bool = False) -> Given:
        """What the recipe says of its method.

        Arguments:
            names: the tensors that it merges; none while no checkpoint is opened.
            span: the layers that lists over the layers run over, where these are a slice.
            text: the tasks are of texts.
        """
        block, preset = self.adapt.split() if self.adapt else (None, None)
        name, kind = self.merge_method, self.kind
        models = {t: with_effect(name, e.parameters, kind.per_model) for t, e in self.experts.items()}
        parameters = with_effect(name, self.parameters, keys(kind))
        return Given(parameters, models, block, preset, names, self.seed, self.folder, METHODS.named, span, text)

    def method(self, names: Sequence[str] = (), span: Span | None = None, text: bool = False) -> MergeMethod:
        """The method with all its settings, which are parsed once; the arguments as for `given`.

        Raises:
            RecipeError: settings that do not fit.
        """
        if self.kind.by_tensor:
            return self.kind.resolve(self.given(names, span))
        if self._method is None:
            self._method = self.kind.resolve(self.given())
        return self._method.over(self.given(names, span, text)) if names else self._method

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Recipe:
        """As pydantic's, with the method left to be parsed anew: its settings may be among the changes."""
        copied = super().model_copy(update=update, deep=deep)
        copied._method = None
        return copied

    def notes(self) -> list[str]:
        """What the recipe says without effect, and a base that is merged like the models, in sentences."""
        named = [f"name: '{self.name}', without effect."] if self.name is not None else []
        if self.report_to and not self.kind.takes_steps:
            named.append(f"report_to: without effect, as {self.merge_method} takes no steps.")
        named += [f"stage '{stage}' is named by no other, and is not merged." for stage in self.unread]
        if self.slices:
            return [*named, *dict.fromkeys(note for part in self.parts() for note in part.notes())]
        name, sentences = self.merge_method, named
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
