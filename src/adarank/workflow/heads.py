"""Heads of a job's tasks, learned on a merged body, and what a record says of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from adarank.adapt.heads import HeadFit, learn_heads
from adarank.adapt.problem import Problem
from adarank.adapt.settings import AdaptSettings
from adarank.io.record import Note
from adarank.method import Result
from adarank.recipe.job import Job
from adarank.workflow.problem import problem_of

if TYPE_CHECKING:
    from adarank.workflow.context import RecipeContext

Heads = dict[str, dict[str, Tensor]]
"""task -> its head, under the names that its expert's files use."""


def with_learned_heads(run: RecipeContext, result: Result) -> tuple[Result, dict[str, Any]]:
    """A merged model with heads that were learned on it, and what the record says of them."""
    settings = AdaptSettings(learn_heads=True)
    models = run.models()
    predictions = run.expert_predictions(models, settings)
    tensors = list(result.tensors)
    models.fill(tensors)
    problem = problem_of(run.job, models, run.data, settings, predictions)
    heads, report = learned_heads(run.job, problem, run.note)
    return replace(result, tensors=tensors, heads=heads), {
        "learned_heads": {"protocol": run.job.recipe.data.protocol, **report}
    }


def learned_heads(job: Job, problem: Problem, note: Note) -> tuple[Heads, dict[str, Any]]:
    """Heads that are kept, and the block of the record on all that were learned; nothing where none is to be."""
    if not any(map(problem.learns_head, problem.inputs)):
        return {}, {}
    note("Learning the heads")
    fits = learn_heads(problem)
    heads = {task: _head(job, problem, task) for task, fit in fits.items() if fit.kept}
    return heads, {"heads": {task: _rounded(fit) for task, fit in fits.items()}}


def _head(job: Job, problem: Problem, task: str) -> dict[str, Tensor]:
    learned = {name: tensor.detach() for name, tensor in problem.models.heads[task].items()}
    return {**job.network.head(task), **learned}


def _rounded(fit: HeadFit) -> Mapping[str, Any]:
    pairs = {name: [round(value, 5) for value in getattr(fit, name)] for name in ("agreement", "divergence")}
    return asdict(fit) | pairs
