"""Base, experts and merged outputs of a recipe, scored in one table."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adarank.alignment.adapters import with_adapter
from adarank.alignment.task_vectors import AlignedCheckpoints
from adarank.data.spec import Split
from adarank.data.task import TaskData
from adarank.errors import CheckpointError, MismatchError, Problems
from adarank.io.adapter import Adapter, is_adapter
from adarank.io.bundle import held_parts, is_bundle
from adarank.io.checkpoint import Checkpoint
from adarank.io.files import read_json
from adarank.io.hub import local_path
from adarank.io.progress import stage
from adarank.io.record import Note
from adarank.io.writer import RECORD
from adarank.method import Result
from adarank.models import TaskModels
from adarank.outputs.bundle import Bundle
from adarank.recipe.job import Job
from adarank.recipe.reader import RecipeLike
from adarank.recipe.schema import Recipe
from adarank.workflow.build_networks import build_models, family_of, network_tensors
from adarank.workflow.load_tasks import load_opened, scored_by
from adarank.workflow.prepare import check_labels, open_recipe, whole
from adarank.workflow.scores import Table, TaskScore, measure_task


def evaluate(
    recipe: RecipeLike,
    outputs: Sequence[Path | str] = (),
    split: Split = "test",
    note: Note = lambda text: None,
    per_class: bool = False,
    metric: str | None = None,
) -> Table:
    """Score base, experts and merged outputs on one split of every task.

    Arguments:
        recipe: its file, a mapping with the same keys, or what `load_recipe` returns.
        outputs: folders written by `merge`; a row each.
        split: `test`, or `select` while choosing settings.
        note: called with a line of text as each model's scoring begins.
        per_class: count precision, recall and F1 of every class, too.
        metric: score every task by this one, such as `loss`, in place of the recipe's.

    Returns:
        Scores by row and task (`table.rows`), in per cent, a loss as it is (`table.metrics` names each task's metric);
        the number of inputs (`table.counts`), means (`table.mean(row)`), and if wanted `table.classes`.

    Raises:
        AdaRankError: anything wrong with recipe, data or outputs; an output of other models is a `MismatchError`.

    Example:
        table = adarank.evaluate_recipe("recipe.yaml", ["merged"])
        print(table.mean("merged"), table.rows["experts"]["sentiment"])
    """
    problems = Problems()
    opened = open_recipe(recipe, problems)
    data = scored_by(load_opened(opened, problems) if opened else {}, metric, problems)
    check_labels(data, split, problems)
    rows: dict[str, ScoredOutput] = {}
    for path in map(Path, outputs):
        with problems.noted():
            local_path(path)
            if opened and opened.job:
                rows[_row(path, opened.recipe)] = open_output(path, opened.job)
    job = whole(opened, problems)
    recipe, models = job.recipe, build_models(job)
    protocol = "transductive" if recipe.data.protocol == "transductive" else "disjoint"
    counts = {task: len(of.splits.rows[split]) for task, of in data.items()}
    table = Table(split, protocol, counts, metrics={task: of.metric for task, of in data.items()})
    scoring = Scoring(job, models, data, split, per_class)

    def add(row: str, scores: Mapping[str, TaskScore]) -> None:
        table.rows[row] = values(scores)
        if per_class:
            table.classes[row] = {task: score.classes for task, score in scores.items() if score.classes}

    if job.base is not None:
        note("Scoring the base")
        add("base", scoring.all())
    for name, output in rows.items():
        note(f"Scoring {name}")
        add(name, output.score(scoring))
        if output.kind:
            table.bundles[name] = output.kind
    note("Scoring the experts")
    add("experts", scoring.experts())
    return table


@dataclass(frozen=True)
class Scoring:
    """What is scored by what: a job's networks on one split of its tasks.

    Attributes:
        per_class, losses: every class is counted, and every loss, too.
    """

    job: Job
    models: TaskModels
    data: Mapping[str, TaskData]
    split: Split
    per_class: bool = False
    losses: bool = False

    def base(self) -> dict[str, TaskScore]:
        """Every task with the base's tensors, and the experts' mean where that is asked for."""
        self.models.fill(network_tensors(self.job, "base"))
        self.models.fill(self.job.network.averages())
        return self.all()

    def all(self) -> dict[str, TaskScore]:
        """Every task with the tensors that the models hold now."""
        with self._stage():
            return {task: self._measured(task, self.models.modules[task]) for task in self.job.network.tasks}

    def experts(self) -> dict[str, TaskScore]:
        """Each task by its expert. The models hold the last expert's tensors afterwards."""
        return self.each(lambda task: network_tensors(self.job, task))

    def bundle(self, bundle: Bundle) -> dict[str, TaskScore]:
        """Each task by the network that a bundle has for it, with the head that it has there."""
        stored = {task: head for task in self.job.network.tasks if (head := bundle.head(task)) is not None}
        with heads_held(self.models, stored):
            return self.each(bundle.tensors, bundle if bundle.kind.dress else None)

    def each(
        self, tensors: Callable[[str], Iterator[tuple[str, Tensor]]], bundle: Bundle | None = None
    ) -> dict[str, TaskScore]:
        """Each task with the tensors given for it; a bundle puts more than tensors into a copy of the module."""
        scores = {}
        with self._stage():
            for task in self.job.network.tasks:
                self.models.fill(tensors(task))
                module = self.models.modules[task]
                if bundle is not None:
                    module = bundle.dress(task, copy.deepcopy(module))
                scores[task] = self._measured(task, module)
        return scores

    def _stage(self) -> AbstractContextManager[None]:
        """While it is open, what is scored shows as progress."""
        return stage("Scoring", sum(len(of_task.splits.rows[self.split]) for of_task in self.data.values()))

    def _measured(self, task: str, module: nn.Module) -> TaskScore:
        return measure_task(family_of(self.job), module, self.data[task], self.split, self.per_class, self.losses)


def values(scores: Mapping[str, TaskScore]) -> dict[str, float]:
    """Task -> score."""
    return {task: score.value for task, score in scores.items()}


@contextmanager
def heads_of(out: Path, models: TaskModels) -> Iterator[None]:
    """While it is open the models have the heads of an output: those of the experts, unless it was trained.

    Raises:
        MismatchError: it was trained, and the head of a task is not there or is of another shape.
    """
    trained = "training" in read_json(out / RECORD)
    stored: dict[str, Checkpoint] = {}
    for task, head in models.heads.items():
        file = out / "heads" / task / "head.safetensors"
        if file.exists():
            stored[task] = Checkpoint(file)
        elif head and trained:
            raise MismatchError(
                f"{file}: is missing, and the heads of this output were trained. Copy the output again."
            )
    with heads_held(models, stored):
        yield


@contextmanager
def heads_held(models: TaskModels, stored: Mapping[str, Checkpoint]) -> Iterator[None]:
    """While it is open the models have these heads, and their own where there is none. Then they have their own again."""
    before = {task: {n: tensor.detach().clone() for n, tensor in head.items()} for task, head in models.heads.items()}
    for task, file in stored.items():
        _fill_head(models.heads[task], {name: file.read(name) for name in file.tensors}, file.label)
    try:
        yield
    finally:
        for task, head in models.heads.items():
            _fill_head(head, before[task], "experts")


@torch.no_grad()
def _fill_head(head: Mapping[str, Tensor], tensors: Mapping[str, Tensor], file: str) -> None:
    other = [name for name, tensor in head.items() if name not in tensors or tensors[name].shape != tensor.shape]
    if other:
        raise MismatchError(
            f"{file}: lacks tensor '{other[0]}' {tuple(head[other[0]].shape)} of the expert's head, or has another shape. Give an output of this recipe's models."
        )
    for name, tensor in head.items():
        tensor.copy_(tensors[name])


def score_all(job: Job, models: TaskModels, data: Mapping[str, TaskData], split: Split) -> dict[str, float]:
    """The score of every task with the tensors that the models hold now."""
    return values(Scoring(job, models, data, split).all())


def score_experts(job: Job, models: TaskModels, data: Mapping[str, TaskData], split: Split) -> dict[str, float]:
    """Each task's score by its expert. The models hold the last expert's tensors afterwards."""
    return values(Scoring(job, models, data, split).experts())


def score_bundle(
    job: Job, models: TaskModels, data: Mapping[str, TaskData], bundle: Bundle, split: Split
) -> dict[str, float]:
    """Each task's score by the network that a bundle has for it, with the head that it has there."""
    return values(Scoring(job, models, data, split).bundle(bundle))


def score_result(
    job: Job, models: TaskModels, data: Mapping[str, TaskData], result: Result, split: Split
) -> dict[str, float]:
    """The score of every task with what a method gave, which is not written anywhere."""
    scoring = Scoring(job, models, data, split)
    if result.parts is None:
        models.fill(result.tensors)
        return values(scoring.all())
    layout, tensors_of = job.layout(), job.method.task_tensors
    shared, of_tasks = held_parts(job.network.tasks, result.parts.pieces)
    return values(scoring.each(lambda task: tensors_of(layout, shared, of_tasks[task])))


def _row(path: Path, recipe: Recipe) -> str:
    """A row's name: the output's path, whether it was trained on labels, and whether what it learned from may be scored."""
    record = read_json(path / RECORD)
    try:
        return _row_of(path, record, recipe)
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path / RECORD}: a damaged record ({type(error).__name__}: {error}). Copy it again, or merge again."
        ) from None


def _row_of(path: Path, record: Mapping[str, Any], recipe: Recipe) -> str:
    used = next(
        (record[block] for block in ("adaptation", "statistics", "training", "learned_heads") if record.get(block)),
        None,
    )
    if not used:
        return str(path)
    if used["protocol"] == "transductive":
        return f"{path} [transductive]"
    if record["settings"]["data"] == recipe.data.model_dump():
        return f"{path} [trained with labels of its adapt split]" if "training" in record else str(path)
    use = (
        "adapted on"
        if "adaptation" in record
        else "informed by"
        if "statistics" in record
        else "trained with labels of"
        if "training" in record
        else "heads learned on"
    )
    return f"{path} [{use} other splits, which may hold scored inputs]"


@dataclass(frozen=True)
class ScoredOutput:
    """A folder that `merge` wrote, opened.

    Attributes:
        kind: the method of a bundle; empty for one model.
        score: of every task, by what it is scored on.
    """

    kind: str
    score: Callable[[Scoring], dict[str, TaskScore]]


def open_output(path: Path, job: Job) -> ScoredOutput:
    """An output of a job's models, to be scored.

    Raises:
        MismatchError: it is of other models.
    """
    network, base = job.network, job.base
    if is_bundle(path):
        return _opened_bundle(path, network)
    model = with_adapter(base, Adapter(path)) if base is not None and is_adapter(path) else Checkpoint(path)
    _refuse_lacks(path, network, model.tensors)

    def scored(scoring: Scoring) -> dict[str, TaskScore]:
        scoring.models.fill((name, model.read(name)) for name in network.tensors)
        with heads_of(path, scoring.models):
            return scoring.all()

    return ScoredOutput("", scored)


def _opened_bundle(path: Path, network: AlignedCheckpoints) -> ScoredOutput:
    bundle = Bundle(path)
    _refuse_lacks(path, network, bundle.about.tensors)
    missing = [task for task in network.tasks if task not in bundle.tasks]
    if missing:
        raise MismatchError(
            f"{path}: has no task {', '.join(map(repr, missing))} of this recipe. Give a bundle of this recipe's models."
        )
    return ScoredOutput(bundle.about.kind, lambda scoring: scoring.bundle(bundle))


def _refuse_lacks(path: Path, network: AlignedCheckpoints, held: Collection[str]) -> None:
    lost = [name for name in network.tensors if name not in held]
    if lost:
        raise MismatchError(
            f"{path}: lacks {len(lost)} tensor(s) of this recipe's network, such as '{lost[0]}'. Give an output of this recipe's models."
        )
