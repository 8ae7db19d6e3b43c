"""A recipe's tasks, read, split and encoded; every task's problem in one error."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adarank.data.read import Table, read_table
from adarank.data.spec import SPLITS, DataSettings, Split, SplitData, TaskSpec
from adarank.data.splits import by_file, by_fraction, limited
from adarank.data.task import TaskData
from adarank.errors import AdaRankError, DataError, itemise
from adarank.models.base import Family
from adarank.plan import Job


def load_task(
    name: str,
    spec: TaskSpec,
    family: Family,
    expert: Path,
    config: Mapping[str, Any],
    folder: Path,
    settings: DataSettings,
    seed: int,
) -> TaskData:
    """Read one task's files, split them and encode their inputs.

    Arguments:
        expert: folder of the task's expert: its tokenizer or processor and its label names.
        config: the expert's `config.json`.
        folder: where relative paths count from.
        seed: of the adaptation batches.

    Raises:
        DataError: a file, column or label is unusable.
    """
    if spec.data is None:
        raise DataError(f"task '{name}': no data. Give a file or dataset under task: data.")
    columns = family.columns(spec)
    tables: dict[Split, Table] = {}
    if isinstance(spec.data, SplitData):
        for split in SPLITS:
            source = getattr(spec.data, split)
            if source is not None:
                tables[split] = read_table(source, folder, columns, [spec.columns.label])
        if not tables:
            raise DataError(f"task '{name}': none of adapt, select and test is given. Give at least one file.")
    else:
        tables["adapt"] = read_table(spec.data, folder, columns, [spec.columns.label])
    table = _stack(list(tables.values()), columns)
    labels = tuple(label for part in tables.values() for label in _labels(part, spec, config, name))
    keys = _keys(table, columns)
    counts = {split: len(part[columns[0]]) for split, part in tables.items()}
    splits = by_file(keys, counts, settings) if isinstance(spec.data, SplitData) else by_fraction(keys, settings)
    examples, notes = family.encode(table, spec, expert)
    notes += [
        f"{count} {split} input(s) left out: they are in a later split too" for split, count in splits.dropped.items()
    ]
    return TaskData(
        name, spec.metric, examples, labels, limited(splits, spec.limit, settings.split_seed), seed, tuple(notes)
    )


def load_tasks(job: Job) -> dict[str, TaskData]:
    """Every task of a job. All tasks' problems come in one error."""
    data: dict[str, TaskData] = {}
    problems: list[str] = []
    for task, entry in job.recipe.experts.items():
        checkpoint = job.experts[task]
        try:
            if entry.task is None or job.family is None:
                raise DataError(f"task '{task}': the model has no task. Give its kind and data in the recipe.")
            data[task] = load_task(
                task,
                entry.task,
                job.family,
                checkpoint.folder,
                checkpoint.config,
                job.recipe.folder,
                job.recipe.data,
                job.recipe.seed,
            )
        except AdaRankError as error:
            problems.append(str(error))
    if len(problems) == 1:
        raise DataError(problems[0])
    if problems:
        raise DataError(itemise(f"{len(problems)} tasks have unusable data:", problems))
    return data


def _stack(tables: list[Table], columns: list[str]) -> Table:
    return {column: [value for table in tables for value in table[column]] for column in columns}


def _keys(table: Table, columns: list[str]) -> list[Any]:
    """What makes two rows the same input."""
    values = [[v.tobytes() if hasattr(v, "tobytes") else str(v) for v in table[column]] for column in columns]
    return list(zip(*values, strict=True))


def _labels(table: Table, spec: TaskSpec, config: Mapping[str, Any], name: str) -> list[int | None]:
    """Class numbers: integers as they are, names through the expert's label2id."""
    count = len(next(iter(table.values())))
    if spec.columns.label not in table:
        return [None] * count
    by_name = {str(label): int(number) for label, number in (config.get("label2id") or {}).items()}
    classes = len(config.get("id2label") or {}) or None
    found: list[int | None] = []
    for row, value in enumerate(table[spec.columns.label], start=1):
        number = by_name.get(str(value)) if not _is_integer(value) else int(value)
        if number is None or number < 0 or (classes is not None and number >= classes):
            known = ", ".join(by_name) or f"0 to {classes}"
            raise DataError(
                f"task '{name}': row {row} has label {value!r}; the expert knows {known}. Use its class numbers or names."
            )
        found.append(number)
    return found


def _is_integer(value: Any) -> bool:
    try:
        return float(value) == int(value)
    except (TypeError, ValueError):
        return False
