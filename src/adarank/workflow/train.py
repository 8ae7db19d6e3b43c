"""Multi-task training of a job: its networks and labelled data put on the loop, and what came out."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from adarank.adapt.history import History
from adarank.adapt.learner import Loss
from adarank.adapt.loop import adapt
from adarank.adapt.multitask import JointTraining, Multitask
from adarank.data.task import TaskData
from adarank.models import TaskModels
from adarank.recipe.job import Job
from adarank.workflow.build_networks import build_models, changed_tensors, family_of
from adarank.workflow.context import Run


@dataclass(frozen=True)
class Training:
    """What training a job gave.

    Attributes:
        report: what the record says of it: what was read, losses, steps.
    """

    job: Job
    models: TaskModels
    report: dict[str, Any]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the trained model that is not a head, in the network's order."""
        return changed_tensors(self.job, self.models.shared, "training")

    def head(self, task: str) -> dict[str, Tensor]:
        """A task's trained head, under the names that its expert's files use."""
        own = {name: tensor.detach() for name, tensor in self.models.heads[task].items()}
        return {**self.job.network.head(task), **own}


def train_job(run: Run) -> Training:
    """Train as the job's recipe says, from a saved state if there is one. Reads labels of the adapt split only.

    Raises:
        DataError: a row of an adapt split carries no label.
    """
    job, data = run.job, run.data
    method = job.recipe.training()
    labels = {task: _labels(own) for task, own in data.items()}
    marks = {task: [mark, sorted(labels[task].items())] for task, mark in run.marks.items()}
    fingerprint = run.fingerprint(marks, "parameters")
    run.note("Loading the networks")
    models = build_models(job)
    if method.heads == "fresh":
        _draw_heads(models, job)
    joint = JointTraining(_trained(job, models, method), method, len(data))
    run.note("Training, with labels")
    for module in models.modules.values():
        module.train()
    torch.manual_seed(job.recipe.seed)  # of dropout, whatever was drawn before
    losses = {task: _loss(job, models, own, labels[task]) for task, own in data.items()}
    history = adapt(joint, losses, method.pace(), run.state, fingerprint, run.progress)
    return Training(job, models, _report(history, method, data))


def _labels(data: TaskData) -> dict[int, int]:
    """Row -> class number, of the adapt split. Rows of other splits are not in it."""
    data.adapt_rows(0, 1)  # refuses an empty split
    rows = data.splits.rows["adapt"]
    return dict(zip(rows, data.targets(rows), strict=True))


def _draw_heads(models: TaskModels, job: Job) -> None:
    """New heads, drawn as their architecture draws them. Each depends on the seed and on its task's name alone."""
    for task, module in models.modules.items():
        kind: Any = type(module)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(zlib.crc32(f"{job.recipe.seed}/{task}/head".encode()))
            drawn = kind(module.config).state_dict()
        own = {id(tensor) for tensor in models.heads[task].values()}
        with torch.no_grad():
            for name, tensor in module.state_dict(keep_vars=True).items():
                if id(tensor) in own:
                    tensor.copy_(drawn[name])


def _trained(job: Job, models: TaskModels, method: Multitask) -> dict[str, Tensor]:
    """What training may change: all of the body that is not kept, counters of batch norms too, and perhaps heads."""
    body = {name: own for name, own in models.shared.items()
            if job.network.choices[name].action != "keep" or name.endswith("num_batches_tracked")}  # fmt: skip
    if method.heads == "fixed":
        return body
    heads = {f"heads/{task}/{name}": own for task, head in models.heads.items() for name, own in head.items()}
    return body | heads


def _loss(job: Job, models: TaskModels, data: TaskData, labels: Mapping[int, int]) -> Loss:
    family, module, device = family_of(job), models.modules[data.name], job.recipe.device
    size = job.recipe.training().batch_size

    def loss(step: int) -> Tensor:
        rows = data.adapt_rows(step, size)
        batch = {k: v.to(device) for k, v in data.examples.batch(rows).items()}
        return cross_entropy(family.logits(module, batch), torch.tensor([labels[row] for row in rows], device=device))

    return loss


def _report(history: History, method: Multitask, data: Mapping[str, TaskData]) -> dict[str, Any]:
    return {
        "what": "a reference, not a merge: trained jointly from the base",
        "protocol": "disjoint",  # no other is allowed
        "reads": "labels of the adapt split of every task; none of select and test",
        "steps": history.step,
        "heads": method.heads,
        "seconds_in_steps": round(history.seconds, 3),
        "resumed_from": history.resumed_from,
        "losses": {task: [round(v, 5) for v in values] for task, values in history.losses.items()},
        "splits": {task: {split: len(rows) for split, rows in own.splits.rows.items()} for task, own in data.items()},
        "notes": [f"{task}: {text}" for task, own in data.items() for text in own.notes],
    }
