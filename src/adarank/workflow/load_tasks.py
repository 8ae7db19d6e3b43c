"""A recipe's tasks, read, split and encoded; every task's problem in one error."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from adarank.data.labels import Label, Problem
from adarank.data.metrics import chosen_metric
from adarank.data.read import Table, read_table
from adarank.data.spec import DataSettings, HubData, Split, SplitData, TaskSpec
from adarank.data.splits import Splits, budgeted, by_file, by_fraction, limited
from adarank.data.task import TaskData
from adarank.errors import AdaRankError, DataError, Problems, RecipeError, itemise, raise_together
from adarank.io.checkpoint import Checkpoint
from adarank.io.progress import advance, stage
from adarank.models import FAMILIES
from adarank.models.family import Family
from adarank.recipe.job import Job, Opened
from adarank.recipe.task_kinds import kind_of_task

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
        columns, problem = self.family.columns(spec), self.family.problem(config)
        classes = self.family.class_names(config, name)
        metric = chosen_metric(spec.metric, problem, len(classes), f"task '{name}'")
        tables = self.read_inputs(name, spec)
        table: Table = {c: [value for part in tables.values() for value in part[c]] for c in columns}
        labels = tuple(label for part in tables.values() for label in self.family.labels(part, spec, config, name))
        keys = list(zip(*([self.family.key(value) for value in table[c]] for c in columns), strict=True))
        counts = {split: len(part[columns[0]]) for split, part in tables.items()}
        whole = not isinstance(spec.data, SplitData)
        splits = by_fraction(keys, self.settings) if whole else by_file(keys, counts, self.settings)
        chosen = budgeted(limited(splits, spec.limit, self.settings.split_seed), self.settings)
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

    def read_inputs(self, name: str, spec: TaskSpec) -> dict[Split, Table]:
        """The task's tables by split; a single file counts as `adapt` until it is split.

        Raises:
            DataError: a file or a column is unusable.
        """
        columns = self.family.columns(spec)
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
            split: read_table(source, self.folder, columns, self.family.label_columns(spec), self.family.paths)
            for split, source in given.items()
        }


def load_tasks(job: Job) -> dict[str, TaskData]:
    """Every task of a job, encoded. All tasks' problems come in one error."""
    problems = Problems()
    loaded = load_opened(_whole(job), problems)
    problems.refuse()
    return loaded


def check_tasks(job: Job) -> dict[str, Rows]:
    """Every task of a job, read and checked but not encoded: enough to plan. All problems come in one error."""
    problems = Problems()
    checked = check_opened(_whole(job), problems)
    problems.refuse()
    return checked


def load_opened(opened: Opened, problems: Problems) -> dict[str, TaskData]:
    """The tasks of what could be opened, encoded; what is wrong is noted as one error."""
    return _each(
        opened,
        problems,
        lambda reader, name, spec, expert: reader.load(name, spec, expert.processor_folder, expert.config),
    )


def scored_by(data: Mapping[str, TaskData], metric: str | None, problems: Problems) -> dict[str, TaskData]:
    """The tasks with another metric than their recipe's; None leaves them as they are. Where it does not fit is noted."""
    changed = dict(data)
    for task, of_task in data.items() if metric is not None else ():
        with problems.noted():
            chosen = chosen_metric(metric, of_task.problem, len(of_task.classes), f"task '{task}'")
            changed[task] = replace(of_task, metric=chosen)
    return changed


def check_opened(opened: Opened, problems: Problems) -> dict[str, Rows]:
    """As `load_opened`, without encoding."""

    def checked(reader: TaskReader, name: str, spec: TaskSpec, expert: Checkpoint) -> Rows:
        here = Problems()
        with here.noted():
            reader.family.check_folder(expert.processor_folder)
        with here.noted():
            rows = reader.read(name, spec, expert.config)
        here.refuse(f"task '{name}':")
        return rows

    return _each(opened, problems, checked)


def _whole(job: Job) -> Opened:
    return Opened(job, job.recipe, True, job.experts, job.family)


def _each(opened: Opened, problems: Problems, do: Callable[[TaskReader, str, TaskSpec, Checkpoint], R]) -> dict[str, R]:
    loaded: dict[str, R] = {}
    texts: list[str] = []
    recipe = opened.recipe
    with stage("Reading the data", len(recipe.experts)):
        for task, entry in recipe.experts.items():
            try:
                expert, family = opened.experts.get(task), _family(opened, task)
                if opened.job is not None and (entry.task is None or family is None):
                    raise DataError(f"task '{task}': the model has no task. Give its kind and data in the recipe.")
                if family is not None and entry.task is not None and not _left_alone(opened, entry.task):
                    reader = TaskReader(family, recipe.data, recipe.folder, recipe.seed)
                    if expert is None:
                        reader.read_inputs(task, entry.task)
                    else:
                        loaded[task] = do(reader, task, entry.task, expert)
            except AdaRankError as error:
                texts.append(str(error))
            advance()
    with problems.noted():
        raise_together(texts)
    return loaded


def _family(opened: Opened, task: str) -> Family | None:
    """The kind of a task's model: of all, else as its part of the recipe or its expert's configuration tells."""
    spec, expert = opened.recipe.experts[task].task, opened.experts.get(task)
    if opened.family is not None or opened.job is not None or spec is None:
        return opened.family
    kind = spec.kind if expert is None else kind_of_task(spec, expert)
    return FAMILIES[kind] if kind else None


def _left_alone(opened: Opened, spec: TaskSpec) -> bool:
    """Where something is wrong already: data that are not there as what the recipe says of them is wrong, or far away."""
    if opened.job is not None:
        return False
    parts = [spec.data.adapt, spec.data.select, spec.data.test] if isinstance(spec.data, SplitData) else [spec.data]
    return (spec.data is None and not opened.sound) or any(isinstance(part, HubData) for part in parts)


def refuse_without_classes(job: Job) -> None:
    """Refuse tasks whose outputs are other than one class of an input, where the recipe has something learned that needs that.

    Raises:
        DataError: there are such tasks; all are named.
    """
    if job.family is None:
        return
    if job.family.generates:
        _refuse_of_generating(job, job.family)
        return
    texts: list[str] = []
    heads = ["heads: learn reads its outputs as shares of classes. Remove heads."] if job.recipe.heads == "learn" else []  # fmt: skip
    for task, expert in job.experts.items():
        problem, outputs = job.family.problem(expert.config), len(job.family.class_names(expert.config, task))
        if problem != "single_label_classification":
            texts += [
                f"task '{task}': its expert is no classifier of one class per input ({_called(expert.config, problem)}), and {what}"
                for what in [*job.method.unfit_for(task, problem, outputs), *heads]
            ]
    raise_together(texts)


def _refuse_of_generating(job: Job, family: Family) -> None:
    """Refuse what is of classifiers alone in a recipe of generating models."""
    name = job.method.name
    texts = []
    if job.method.of_inputs:
        texts.append(f"merge_method: '{name}' reads one prediction of each input, and models of {family.kind} predict every token. Use one such as adarank, regmean or ties.")  # fmt: skip
    if job.recipe.heads == "learn":
        texts.append(f"heads: learn is for classifiers: models of {family.kind} have no head of a task. Remove heads.")
    if job.method.in_force().get("adapt", {}).get("learn_heads") is True:
        texts.append(f"adapt: learn_heads is for classifiers: models of {family.kind} have no head of a task. Remove it.")  # fmt: skip
    if texts:
        raise RecipeError(texts[0] if len(texts) == 1 else itemise(f"recipe: {len(texts)} problem(s).", texts))


def _called(config: Mapping[str, Any], problem: Problem) -> str:
    return str(config.get("problem_type") or ("a model of one output" if problem == "regression" else problem))
