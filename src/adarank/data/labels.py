"""Labels of a task's rows, as its expert's configuration reads them: one class, several classes, or a number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from adarank.errors import DataError
from adarank.io.parsing import parse_json

Problem = Literal[
    "single_label_classification", "multi_label_classification", "regression", "generation",
    "token_classification", "spans", "multiple_choice", "embedding",
]  # fmt: skip
OF_CLASSIFIERS: tuple[Problem, ...] = (
    "single_label_classification", "multi_label_classification", "regression"
)  # fmt: skip
"""What the head of a classifier may give, by its configuration."""


@dataclass(frozen=True)
class Answer:
    """What a generating model's text is scored by.

    Attributes:
        text: the answer to the prompt; None where the input is running text, which is scored itself.
        options: what the answer is chosen from; empty where it is free.
    """

    text: str | None = None
    options: tuple[str, ...] = ()


Label = int | float | tuple[int, ...] | tuple[str, ...] | Answer
"""A class number; a number; the numbers of all classes that an input has, or of each of its words; its right answers as texts; or
the answer to a prompt."""


def problem_of(config: Mapping[str, Any]) -> Problem:
    """What an expert's outputs are, as `transformers` decides it: by `problem_type`, else by how many there are."""
    named = config.get("problem_type")
    if named in ("regression", "multi_label_classification", "single_label_classification"):
        problem: Problem = named
        return problem
    try:
        return "regression" if _outputs(config) == 1 else "single_label_classification"
    except TypeError:  # said where labels are read
        return "single_label_classification"


def _outputs(config: Mapping[str, Any]) -> Any:
    """How many outputs a configuration tells; one that names no classes has transformers' default of two."""
    return len(config.get("id2label") or {}) or config.get("num_labels") or 2


def class_names(config: Mapping[str, Any], task: str) -> tuple[str, ...]:
    """The classes' names in the order of their numbers; numbers where the configuration names none."""
    _, count = _classes(config, task)
    given = config.get("id2label")
    names = {str(number): str(name) for number, name in given.items()} if isinstance(given, Mapping) else {}
    return tuple(names.get(str(number), str(number)) for number in range(count))


def read_labels(values: Sequence[Any], config: Mapping[str, Any], task: str) -> list[Label | None]:
    """Labels from the cells of a column; None where one is withheld: an empty cell, and -1 where labels are classes.

    Several classes are a list of their numbers or names, or of a 0 or 1 for every class; in text files they stand
    apart by commas, or as a JSON list. Of numbers -1 is one, unless all are.

    Arguments:
        config: the expert's `config.json`.

    Raises:
        DataError: a label is none that the expert knows.
    """
    plain = [value.tolist() if hasattr(value, "tolist") else value for value in values]  # of NumPy's arrays and numbers
    problem = problem_of(config)
    if problem == "regression":
        return [*_numbers(plain, config, task)]
    if problem == "multi_label_classification":
        return [*_class_lists(plain, config, task)]
    by_name, classes = _classes(config, task)
    return [
        None if _withheld(value) else _class(value, by_name, classes, f"task '{task}': row {row}")
        for row, value in enumerate(plain, start=1)
    ]


def word_labels(
    values: Sequence[Any] | None, words: int, config: Mapping[str, Any], task: str, row: int
) -> tuple[int, ...]:
    """The classes of a row's words, by number or name; -1 of words without one (-100 and empty ones, too).

    Raises:
        DataError: a label is none that the expert knows, or there are not as many as words.
    """
    where = f"task '{task}': row {row}"
    if values is None or len(values) != words:
        count = "no list of labels" if values is None else f"{len(values)} labels"
        raise DataError(f"{where} has {words} words and {count}. Give a label for each word.")
    by_name, classes = _classes(config, task)
    return tuple(-1 if _withheld(v) or str(v) == "-100" else _class(v, by_name, classes, where) for v in values)


def known_labels(labels: Sequence[Label | None], task: str, remedy: str) -> list[Label]:
    """Labels, none of them withheld.

    Raises:
        DataError: some are.
    """
    known = [label for label in labels if label is not None]
    if len(known) < len(labels):
        raise DataError(
            f"task '{task}': {len(labels) - len(known)} of {len(labels)} rows carry no labels, so they can be neither scored nor trained on. {remedy}"
        )
    return known


def _withheld(value: Any) -> bool:
    """How files say that a label is withheld."""
    return value is None or value != value or str(value).strip() in ("-1", "")


def _class(value: Any, by_name: Mapping[str, int], classes: int, where: str) -> int:
    named = by_name.get(value) if isinstance(value, str) else None
    number = int(value) if named is None and _is_integer(value) else named
    if number is None or not 0 <= number < classes:
        known = ", ".join(by_name) or f"0 to {classes - 1}"
        raise DataError(f"{where} has label {value!r}; the expert knows {known}. Use its class numbers or names.")
    return number


def _classes(config: Mapping[str, Any], task: str) -> tuple[dict[str, int], int]:
    """Class name -> number, and how many classes there are, by an expert's `config.json`."""
    try:
        by_name = {str(label): int(number) for label, number in (config.get("label2id") or {}).items()}
        return by_name, int(_outputs(config))
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise DataError(
            f"task '{task}': config.json of its expert names no classes that can be read (label2id, id2label or num_labels: {error}). Mend it."
        ) from None


def _is_integer(value: Any) -> bool:
    try:
        return float(value) == int(value)
    except (TypeError, ValueError, OverflowError):
        return False


def _numbers(values: Sequence[Any], config: Mapping[str, Any], task: str) -> list[float | None]:
    """Numbers of a regression task."""
    if _classes(config, task)[1] != 1:
        raise DataError(
            f"task '{task}': its expert gives {_classes(config, task)[1]} numbers for an input (regression). Such tasks can be merged, but neither adapted on nor scored: leave their data out."
        )
    numbers: list[float | None] = []
    for row, value in enumerate(values, start=1):
        if value is None or value != value or str(value).strip() == "":
            numbers.append(None)
            continue
        try:
            if isinstance(value, bool) or not abs(number := float(value)) < float("inf"):
                raise ValueError
        except (TypeError, ValueError, OverflowError):
            raise DataError(
                f"task '{task}': row {row} has label {value!r}, and its expert gives a number (regression). Give a finite number."
            ) from None
        numbers.append(number)
    return [None] * len(numbers) if all(number in (None, -1.0) for number in numbers) else numbers


def _class_lists(values: Sequence[Any], config: Mapping[str, Any], task: str) -> list[tuple[int, ...] | None]:
    """The numbers of each row's classes."""
    by_name, classes = _classes(config, task)
    lists = [None if _withheld(value) else _as_list(value) for value in values]
    given = [
        [int(v) if v not in by_name and _is_integer(v) else v for v in items] for items in lists if items is not None
    ]
    # as numbers of classes, 0 and 1 alone would name one of them twice in any longer list
    if given and all(len(items) == classes and set(items) <= {0, 1} for items in given):
        return [None if items is None else tuple(i for i, v in enumerate(items) if int(v)) for items in lists]
    numbers: list[tuple[int, ...] | None] = []
    for row, items in enumerate(lists, start=1):
        where = f"task '{task}': row {row}"
        chosen = None if items is None else [_class(value, by_name, classes, where) for value in items]
        if chosen is not None and len(set(chosen)) < len(chosen):
            raise DataError(
                f"{where} names a class twice: {items!r}. Give each class's number or name once, or a 0 or 1 for all {classes} classes."
            )
        numbers.append(None if chosen is None else tuple(sorted(chosen)))
    return numbers


def _as_list(value: Any) -> list[Any]:
    """A cell's classes: a list, a JSON list as text, or text with commas."""
    if isinstance(value, str):
        text = value.strip()
        try:
            parsed = parse_json(text) if text.startswith("[") else text.split(",")
        except ValueError:
            parsed = text.split(",")
        return [v.strip() if isinstance(v, str) else v for v in parsed]
    return list(value) if isinstance(value, (list, tuple)) else [value]
