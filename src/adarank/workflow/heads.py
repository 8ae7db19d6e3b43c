"""Heads of a job's tasks, learned on a merged body, and what a record says of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from adarank.adapt.heads import HeadFit, learn_heads
from adarank.adapt.problem import Problem
from adarank.adapt.settings import AdaptSettings
from adarank.io import processes
from adarank.io.bundle import held_parts
from adarank.io.record import Note
from adarank.method import Result
from adarank.models import TaskModels
from adarank.models.tied import head_tensors
from adarank.recipe.job import Job
from adarank.workflow.problem import problem_of

if TYPE_CHECKING:
    from adarank.workflow.context import RecipeContext

Heads = dict[str, dict[str, Tensor]]
"""task -> its head, under the names that its expert's files use."""
Fill = Callable[[str], None]
"""Gives networks the body of a task."""


def with_learned_heads(run: RecipeContext, result: Result) -> tuple[Result, dict[str, Any]]:
    """What a method gave with heads that were learned on it, and what the record says of them.

    On one body, on each task's body where a bundle has one for each, or on the networks that carry a method's modules.
    """
    settings = AdaptSettings(learn_heads=True)
    models = run.models()
    predictions = run.expert_predictions(models, settings)
    result, models, fill = _bodies(run.job, result, models)
    problem = problem_of(run.job, models, run.data, settings, predictions)
    heads, report = learned_heads(run.job, problem, run.note, fill)
    return replace(result, heads=heads), {"learned_heads": {"protocol": run.job.recipe.data.protocol, **report}}


def _bodies(job: Job, result: Result, models: TaskModels) -> tuple[Result, TaskModels, Fill]:
    """The result, whose tensors or parts are held where they came in a stream; networks that have its bodies; and what gives
    them the body of a task."""
    if result.modules:
        heads = {task: head_tensors(job.network, task, module) for task, module in result.modules.items()}
        return result, TaskModels(result.modules, {}, heads), _nothing
    if result.parts is None:
        tensors = list(result.tensors)
        models.fill(tensors)
        return replace(result, tensors=tensors), models, _nothing
    pieces, layout = list(result.parts.pieces), job.layout()
    shared, of_tasks = held_parts(job.network.tasks, pieces)

    def fill(task: str) -> None:
        models.fill(job.method.task_tensors(layout, shared, of_tasks[task]))

    return replace(result, parts=replace(result.parts, pieces=iter(pieces))), models, fill


def _nothing(task: str) -> None:
    """The networks have their bodies."""


def tasks_of_heads(problem: Problem) -> list[str]:
    """The tasks whose heads are to be learned."""
    auto = problem.settings.learn_heads == "auto"
    return [task for task in problem.inputs if problem.learns_head(task) and (problem.models.heads[task] or not auto)]


def learned_heads(job: Job, problem: Problem, note: Note, fill: Fill = _nothing) -> tuple[Heads, dict[str, Any]]:
    """Heads that are kept, and the block of the record on all that were learned; nothing where none is to be.

    Arguments:
        fill: as for `learn_heads`.
    """
    if processes.rank() > 0 or not tasks_of_heads(problem):
        return {}, {}
    note("Learning the heads")
    fits = learn_heads(problem, fill)
    heads = {task: _head(job, problem, task) for task, fit in fits.items() if fit.kept}
    return heads, {"heads": {task: _rounded(fit) for task, fit in fits.items()}}


def moved_heads(job: Job, problem: Problem) -> Heads:
    """The heads that the networks hold, of the tasks where they are not the expert's."""
    heads = {task: _head(job, problem, task) for task in problem.inputs}
    return {
        task: head
        for task, head in heads.items()
        if not all(torch.equal(head[name], tensor.to(head[name])) for name, tensor in job.network.head(task).items())
    }


def _head(job: Job, problem: Problem, task: str) -> dict[str, Tensor]:
    learned = {name: tensor.detach() for name, tensor in problem.models.heads[task].items()}
    return {**job.network.head(task), **learned}


def _rounded(fit: HeadFit) -> Mapping[str, Any]:
    pairs = {name: [float(f"{value:.5g}") for value in getattr(fit, name)] for name in ("agreement", "divergence")}
    return asdict(fit) | pairs
