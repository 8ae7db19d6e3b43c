"""What adarank must know of a kind of model, and how `transformers` is asked to load one."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from adarank.data.labels import Label, Problem, class_names, problem_of, read_labels
from adarank.data.read import Table
from adarank.data.spec import TaskSpec
from adarank.data.task import Batch, Examples
from adarank.errors import RecipeError, itemise
from adarank.io.checkpoint import Checkpoint
from adarank.models.loading import LOCALLY, loading
from adarank.models.tied import refuse_missing


class Family(Protocol):
    """What adarank must know of a kind of model.

    Attributes:
        kind: what recipes call it.
        architectures: what the class names of its models contain, one of these.
        keep_embeddings: embedding tables are kept from the base by default.
        paths: text in an input column is the path of a file that holds the input.
        token_budget: padded tokens (or their like) in one batch when nothing is learned from it; `cpu_token_budget`: where that is
            on the CPU, which gains nothing by large batches, and loses by their padding.
        mlps: what the two linear layers of a block's MLP are called in checkpoints, after the block's own name.
        expanded: parameters of shape (1, ...) that networks of the family expand over the batch.
        head_apart: no class of `transformers` has a task's head, so that an ordinary folder holds it beside the base's class.
        headless: all tensors of a model merge: it has no head of a task.
        by_class: models are of the family only where their configuration or the recipe says so, whatever their architecture.
        generates: models give tokens one after another: they predict each token of a text, and have no head of a task.
    """

    kind: str
    architectures: tuple[str, ...]
    keep_embeddings: bool
    paths: bool
    token_budget: int
    cpu_token_budget: int
    mlps: tuple[tuple[str, str], ...]
    expanded: tuple[str, ...]
    head_apart: bool = False
    generates: bool = False
    headless: bool = False
    by_class: bool = False

    def auto_class(self) -> Any:
        """The class of `transformers` that finds a model's own class by its configuration."""
        ...

    def complete(
        self, base: Checkpoint | None, experts: Mapping[str, Checkpoint], tasks: Mapping[str, TaskSpec], folder: Path
    ) -> tuple[dict[str, Checkpoint], dict[str, str]]:
        """Experts with all that their tasks' networks hold, and patterns of what stays the base's -> why.

        Arguments:
            tasks: task -> what the recipe says of it.
            folder: where relative paths count from.

        Raises:
            RecipeError: what the recipe says makes no network of this family.
        """
        idle = [f"task '{task}': classes, templates and head_file are of zero-shot-image-classification, and this is {self.kind}. Remove them, or give kind."
                for task, spec in tasks.items() if spec.classes or spec.templates or spec.head_file]  # fmt: skip
        idle += [f"task '{task}': {text}" for task, spec in tasks.items() for text in self.without_effect(spec)]
        if idle:
            raise RecipeError(idle[0] if len(idle) == 1 else itemise(f"recipe: {len(idle)} problem(s).", idle))
        return dict(experts), {}

    def without_effect(self, spec: TaskSpec) -> list[str]:
        """What a task says that is not of this family, in sentences: settings of generating models."""
        given = sorted({"answers", "max_new_tokens", "stop"} & spec.model_fields_set)
        given += [f"columns.{key}" for key in ("answer", "choices") if getattr(spec.columns, key) is not None]
        return [f"{', '.join(given)}: of generating models, and this is {self.kind}. Remove it, or give kind."] if given else []  # fmt: skip

    def load(self, expert: Checkpoint) -> nn.Module:
        """A model with its head, in float32 and evaluation mode."""
        expert.check_bytes()
        if expert.in_one_folder:
            return load_quietly(self.auto_class(), expert.folder)
        state = {name: expert.read(name) for name in expert.tensors}
        return load_made(self.auto_class(), expert.config, state, expert.label)

    def check_folder(self, folder: Path) -> None:
        """Raise a `CheckpointError` if a folder has no file of what encodes a task's inputs. Loads nothing."""
        ...

    def columns(self, spec: TaskSpec) -> list[str]:
        """The input columns that the task needs."""
        ...

    def label_columns(self, spec: TaskSpec) -> list[str]:
        """The columns that labels are read from, where they are there."""
        return [spec.columns.label]

    def class_names(self, config: Mapping[str, Any], task: str) -> tuple[str, ...]:
        """The names of the classes that a model knows, in the order of their numbers; none where outputs are no classes."""
        return () if self.generates else class_names(config, task)

    def problem(self, config: Mapping[str, Any]) -> Problem:
        """What a model's outputs are, by its `config.json`."""
        return problem_of(config)

    def labels(self, table: Table, spec: TaskSpec, config: Mapping[str, Any], task: str) -> list[Label | None]:
        """A label for each row of a table, None where it is withheld.

        Raises:
            DataError: a label is none that the expert knows.
        """
        if spec.columns.label not in table:
            return [None] * len(next(iter(table.values())))
        return read_labels(table[spec.columns.label], config, task)

    def key(self, value: Any) -> Hashable:
        """What makes two values of an input column the same input."""
        ...

    def encode(self, table: Table, spec: TaskSpec, folder: Path) -> tuple[Examples, list[str]]:
        """Encoded inputs, and notes on what was cut."""
        ...

    def logits(self, module: nn.Module, batch: Batch) -> Tensor:
        """(predictions, classes) float32 logits: of each input one, of generating models one for each token that counts."""
        ...


def load_quietly(auto_class: Any, folder: Path) -> nn.Module:
    """A model of `folder` in float32 and evaluation mode, without the loader's own progress bars and notes.

    Raises:
        CheckpointError: the folder's config and weights make no model of this class, not a whole one, or one whose code
            lies beside them.
    """
    with loading(folder, f"cannot be loaded as {auto_class.__name__}", "Check config.json and the weights."):
        module, report = auto_class.from_pretrained(str(folder), output_loading_info=True, **LOCALLY)
    refuse_missing(module, report["missing_keys"], str(folder))
    made: nn.Module = module.to(torch.float32).eval()
    return made


def load_made(auto_class: Any, config: Mapping[str, Any], state: Mapping[str, Tensor], label: str) -> nn.Module:
    """A model whose tensors are in no folder of its own, in float32 and evaluation mode.

    Raises:
        CheckpointError: config and tensors make no model of this class, or not a whole one.
    """
    from transformers import AutoConfig

    with loading(Path(label), f"cannot be loaded as {auto_class.__name__}", "Check config.json and the weights."):
        settings = AutoConfig.for_model(**config)
        module, report = _class_of(auto_class, settings).from_pretrained(
            None, config=settings, state_dict=dict(state), dtype=torch.float32, output_loading_info=True, **LOCALLY
        )
    refuse_missing(module, report["missing_keys"], label)
    made: nn.Module = module.to(torch.float32).eval()
    return made


def _class_of(auto_class: Any, settings: Any) -> Any:
    """The class of a configuration; of several the one that it names, or the first."""
    made = auto_class._model_mapping[type(settings)]
    if not isinstance(made, (tuple, list)):
        return made
    named = settings.architectures or ()
    return next((each for each in made if each.__name__ in named), made[0])
