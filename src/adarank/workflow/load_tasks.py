"""A recipe's tasks, read, split and encoded; every task's problem in one error."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from adarank.data.labels import Label, Problem, class_names, problem_of, read_labels
from adarank.data.metrics import chosen_metric
from adarank.data.read import Table, read_table
from adarank.data.spec import DataSettings, HubData, Split, SplitData, TaskSpec
from adarank.data.splits import Splits, by_file, by_fraction, limited
from adarank.data.task import TaskData
from adarank.errors import AdaRankError, DataError, raise_together
from adarank.io.checkpoint import Checkpoint
from adarank.models.family import Family
from adarank.recipe.job import Job

R = TypeVar("R")


@dataclass(frozen=True)
class Rows:
    """A task's table, checked but not yet encoded."""

    table: Table
    labels: tuple[Label | None, ...]
    splits: Splits
    problem: Problem
    classes: tuple[str, ...]
    metric: str


@dataclass(frozen=True)
class TaskReader:
    """Reads tasks of one family.

    Attributes:
        folder: where relative paths of data count from.
        seed: of the adaptation batches.
    """

    family: Family
    settings: DataSettings
    folder: Path
    seed: int = 0

    def read(self, name: str, spec: TaskSpec, config: Mapping[str, Any]) -> Rows:
        """Read a task's files, check columns and labels, and split.

        Arguments:
            config: the expert's `config.json`, which names the classes.

        Raises:
            DataError: a file, column or label is unusable.
        """
        columns, problem, classes = self.family.columns(spec), problem_of(config), class_names(config, name)
        metric = chosen_metric(spec.metric, problem, len(classes), f"task '{name}'")
        tables = self._tables(name, spec, columns)
        table: Table = {c: [value for part in tables.values() for value in part[c]] for c in columns}
        labels = tuple(label for part in tables.values() for label in _labels(part, spec, config, name))
        keys = list(zip(*([self.family.key(value) for value in table[c]] for c in columns), strict=True))
        counts = {split: len(part[columns[0]]) for split, part in tables.items()}
        whole = not isinstance(spec.data, SplitData)
        splits = by_fraction(keys, self.settings) if whole else by_file(keys, counts, self.settings)
        chosen = limited(splits, spec.limit, self.settings.split_seed)
        return Rows(table, labels, chosen, problem, classes, metric)

    def load(self, name: str, spec: TaskSpec, expert: Path, config: Mapping[str, Any]) -> TaskData:
        """Read a task and encode its inputs with the tokenizer or processor in the expert's folder."""
        rows = self.read(name, spec, config)
        named = spec.model_copy(update={"name": name})  # a recipe may leave the name to the model's path
        examples, notes = self.family.encode(rows.table, named, expert)
        dropped = [
            f"{n} {split} input(s) left out: they are in a later split too" for split, n in rows.splits.dropped.items()
        ]
        remarks = (*notes, *dropped)
        return TaskData(name, rows.metric, examples, rows.labels, rows.splits, self.seed, remarks, rows.problem, rows.classes)  # fmt: skip

    def _tables(self, name: str, spec: TaskSpec, columns: list[str]) -> dict[Split, Table]:
        """The task's tables by split; a single file counts as `adapt` until it is split."""
        if spec.data is None:
            raise DataError(f"task '{name}': no data. Give a file or dataset under task: data.")
        sources: dict[Split, str | HubData | None] = {"adapt": None}
        if isinstance(spec.data, SplitData):
            sources = {"adapt": spec.data.adapt, "select": spec.data.select, "test": spec.data.test}
        else:
            sources["adapt"] = spec.data
        given = {split: source for split, source in sources.items() if source is not None}
        if not given:
            raise DataError(f"task '{name}': none of adapt, select and test is given. Give at least one file.")
        return {
            split: read_table(source, self.folder, columns, [spec.columns.label], self.family.paths)
            for split, source in given.items()
        }


def load_tasks(job: Job) -> dict[str, TaskData]:
    """Every task of a job, encoded. All tasks' problems come in one error."""
    return _each(
        job, lambda reader, name, spec, expert: reader.load(name, spec, expert.processor_folder, expert.config)
    )


def check_tasks(job: Job) -> dict[str, Rows]:
    """Every task of a job, read and checked but not encoded: enough to plan. All problems come in one error."""
    return _each(job, lambda reader, name, spec, expert: reader.read(name, spec, expert.config))


def _each(job: Job, do: Callable[[TaskReader, str, TaskSpec, Checkpoint], R]) -> dict[str, R]:
    loaded: dict[str, R] = {}
    problems: list[str] = []
    for task, entry in job.recipe.experts.items():
        try:
            if entry.task is None or job.family is None:
                raise DataError(f"task '{task}': the model has no task. Give its kind and data in the recipe.")
            reader = TaskReader(job.family, job.recipe.data, job.recipe.folder, job.recipe.seed)
            loaded[task] = do(reader, task, entry.task, job.experts[task])
        except AdaRankError as error:
            problems.append(str(error))
    raise_together(problems)
    return loaded


def _labels(table: Table, spec: TaskSpec, config: Mapping[str, Any], name: str) -> list[Label | None]:
    if spec.columns.label not in table:
        return [None] * len(next(iter(table.values())))
    return read_labels(table[spec.columns.label], config, name)


def refuse_without_classes(job: Job) -> None:
    """Refuse tasks whose outputs are no classes, where the recipe has what networks give read as shares of classes.

    Raises:
        DataError: there are such tasks; all are named.
    """
    if job.method.of_classes:
        who = f"'{job.method.name}'"
    elif job.recipe.heads == "learn":
        who = "heads: learn"
    else:
        return
    raise_together(
        [
            f"task '{task}': its expert is no classifier of one class per input ({_called(expert.config)}), and {who} reads its outputs as shares of classes. "
            "Merge by a method that does not, such as cart, ties or regmean; the task is scored all the same."
            for task, expert in job.experts.items()
            if problem_of(expert.config) != "single_label_classification"
        ]
    )


def _called(config: Mapping[str, Any]) -> str:
    return str(config.get("problem_type") or "a model of one output")
