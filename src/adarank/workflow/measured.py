"""Tables of what other programs measured: a row for each model, on the same tasks, by the same metrics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from adarank.errors import DataError, itemise
from adarank.workflow.scores import Table


@dataclass(frozen=True)
class Measured:
    """One model on one task.

    Attributes:
        metric: by which.
        value: in per cent where it is a share, else as it is.
        inputs: how many it rests on; 0 if the file does not say.
        note: what else is to be said of it, a sentence; empty if nothing is.
    """

    metric: str
    value: float
    inputs: int = 0
    note: str = ""


def named_path(source: str) -> tuple[str, Path]:
    """The name that stands before a path as `NAME=PATH`, empty if there is none, and the path."""
    name, equals, rest = source.partition("=")
    return ("", Path(source)) if not equals or Path(source).exists() else (name, Path(rest))


def add_row(rows: dict[str, Mapping[str, Measured]], row: str, scores: Mapping[str, Measured], source: str) -> None:
    """Add a model's scores.

    Raises:
        DataError: there is a row of this name.
    """
    if row in rows:
        raise DataError(f"{source}: a second row called '{row}'. Give each a name: NAME={named_path(source)[1]}.")
    rows[row] = scores


def measured_table(rows: Mapping[str, Mapping[str, Measured]], source: str, command: str) -> Table:
    """The table of rows that are of the same tasks, metrics and numbers of inputs.

    Arguments:
        source: the program that measured.
        command: how it is run, for the error.

    Raises:
        DataError: rows differ in these.
    """
    (name, first), *others = rows.items()
    problems = [text for row, scores in others for text in _differences(name, first, row, scores)]
    if problems:
        raise DataError(itemise("The results are not of the same tasks:", problems, f"Run {command} on all models alike."))  # fmt: skip
    return Table(
        "test",
        "disjoint",
        {task: score.inputs for task, score in first.items()},
        {row: {task: score.value for task, score in scores.items()} for row, scores in rows.items()},
        metrics={task: score.metric for task, score in first.items()},
        source=source,
        notes=tuple(score.note for score in first.values() if score.note),
    )


def _differences(name: str, first: Mapping[str, Measured], row: str, scores: Mapping[str, Measured]) -> list[str]:
    """How the tasks of two rows differ, in words."""
    both = [task for task in first if task in scores]
    return [
        *(f"'{row}' lacks {task}" for task in first if task not in scores),
        *(f"'{name}' lacks {task}" for task in scores if task not in first),
        *(
            f"{task} is {first[task].metric} in '{name}' and {scores[task].metric} in '{row}'"
            for task in both
            if first[task].metric != scores[task].metric
        ),
        *(
            f"{task} has {first[task].inputs} inputs in '{name}' and {scores[task].inputs} in '{row}'"
            for task in both
            if first[task].inputs != scores[task].inputs
        ),
    ]
