"""A recipe's tasks, read, split and encoded; every task's problem in one error."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

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
    labels: tuple[int | None, ...]
    splits: Splits


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
        columns = self.family.columns(spec)
        tables = self._tables(name, spec, columns)
        table: Table = {c: [value for part in tables.values() for value in part[c]] for c in columns}
        labels = tuple(label for part in tables.values() for label in _labels(part, spec, config, name))
        keys = list(zip(*([self.family.key(value) for value in table[c]] for c in columns), strict=True))
        counts = {split: len(part[columns[0]]) for split, part in tables.items()}
        whole = not isinstance(spec.data, SplitData)
        splits = by_fraction(keys, self.settings) if whole else by_file(keys, counts, self.settings)
        return Rows(table, labels, limited(splits, spec.limit, self.settings.split_seed))

    def load(self, name: str, spec: TaskSpec, expert: Path, config: Mapping[str, Any]) -> TaskData:
        """Read a task and encode its inputs with the tokenizer or processor in the expert's folder."""
        rows = self.read(name, spec, config)
        named = spec.model_copy(update={"name": name})  # a recipe may leave the name to the model's path
        examples, notes = self.family.encode(rows.table, named, expert)
        dropped = [
            f"{n} {split} input(s) left out: they are in a later split too" for split, n in rows.splits.dropped.items()
        ]
        return TaskData(name, spec.metric, examples, rows.labels, rows.splits, self.seed, (*notes, *dropped))

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


def _labels(table: Table, spec: TaskSpec, config: Mapping[str, Any], name: str) -> list[int | None]:
    """Class numbers: integers as they are, names through the expert's label2id."""
    count = len(next(iter(table.values())))
    if config.get("num_labels") == 1 or config.get("problem_type") in ("regression", "multi_label_classification"):
        kind = config.get("problem_type") or "a model of one output"
        raise DataError(
            f"task '{name}': its expert is no classifier of one class per input ({kind}). Such tasks can be merged, but neither adapted on nor scored: leave their data out."
        )
    if spec.columns.label not in table:
        return [None] * count
    by_name, classes = _classes(config, name)
    numbers: list[int | None] = []
    for row, stored in enumerate(table[spec.columns.label], start=1):
        value = stored.tolist() if hasattr(stored, "tolist") else stored  # of NumPy's numbers and arrays plain ones
        if (
            value is None or value != value or str(value).strip() in ("-1", "")
        ):  # how files say that a label is withheld
            numbers.append(None)
            continue
        named = by_name.get(value) if isinstance(value, str) else None
        number = int(value) if named is None and _is_integer(value) else named
        if number is None or not 0 <= number < classes:
            known = ", ".join(by_name) or f"0 to {classes - 1}"
            raise DataError(
                f"task '{name}': row {row} has label {value!r}; the expert knows {known}. Use its class numbers or names."
            )
        numbers.append(number)
    return numbers


def _classes(config: Mapping[str, Any], task: str) -> tuple[dict[str, int], int]:
    """Class name -> number, and how many classes there are, by an expert's `config.json`."""
    try:
        by_name = {str(label): int(number) for label, number in (config.get("label2id") or {}).items()}
        # a configuration that names no classes has transformers' default of two
        return by_name, len(config.get("id2label") or {}) or int(config.get("num_labels") or 2)
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise DataError(
            f"task '{task}': config.json of its expert names no classes that can be read (label2id, id2label or num_labels: {error}). Mend it."
        ) from None


def _is_integer(value: Any) -> bool:
    try:
        return float(value) == int(value)
    except (TypeError, ValueError, OverflowError):
        return False
