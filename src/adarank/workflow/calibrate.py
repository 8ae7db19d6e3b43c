"""A job's method with the statistics that it needs of the experts on their inputs."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from adarank.calibration.gather import Gatherer, Sample, Store
from adarank.data.labels import Label
from adarank.data.task import Batch, TaskData
from adarank.io.record import Note
from adarank.methods import CalibratedMethod
from adarank.models import TaskModels
from adarank.recipe.job import Job
from adarank.workflow.build_networks import family_of

M = TypeVar("M", bound=CalibratedMethod)


def with_statistics(
    method: M,
    job: Job,
    models: Callable[[], TaskModels],
    data: Mapping[str, TaskData],
    folder: Path | None = None,
    note: Note = lambda text: None,
) -> tuple[M, dict[str, Any]]:
    """A method with the statistics that it takes of the job's experts, and what a record says of them.

    The models hold other tensors afterwards.

    Arguments:
        models: gives the job's networks.
        folder: where statistics of these very checkpoints are kept.

    Raises:
        DataError: a task has no inputs to take statistics of, or no labels where the method reads them.
    """
    rows = method.sampled(data)
    note("Loading the networks")
    networks = models()
    started = time.perf_counter()
    marks = {task: of.fingerprint() for task, of in data.items()}
    choices = {name: choice.action for name, choice in job.network.choices.items()}
    identity = json.dumps([method.identity(), rows, marks, choices], sort_keys=True)
    store = Store(folder / hashlib.sha256(identity.encode()).hexdigest()[:32] if folder else None)
    known = Gatherer(job.network, networks, job_sample(method, job, data, rows), store, note).inform(method)
    report = {
        "protocol": job.recipe.data.protocol,
        "inputs": {task: len(chosen) for task, chosen in rows.items()},
        "labels_read": method.reads_labels,
        "tensors_with_statistics": len(known.statistics.names),
        "tensors_without_statistics": len(job.network.merged()) - len(known.statistics.names),
        "merged_without": method.rest,
        "undetermined": known.undetermined,  # filled as tensors are merged
        "seconds": round(time.perf_counter() - started, 3),
        "splits": {task: {split: len(rows) for split, rows in of.splits.rows.items()} for task, of in data.items()},
        "notes": [f"{task}: {text}" for task, of in data.items() for text in of.notes],
    }
    return known, report


def job_sample(
    method: CalibratedMethod, job: Job, data: Mapping[str, TaskData], rows: Mapping[str, tuple[int, ...]]
) -> Sample:
    """Rows of a job's tasks as a sample, inputs of like length together."""
    family, device = family_of(job), job.recipe.device
    size = method.inputs_at_once

    def encoded(task: str, chosen: list[int]) -> Batch:
        return {key: value.to(device) for key, value in data[task].examples.batch(chosen).items()}

    def batches(task: str) -> Iterator[Batch]:
        order = sorted(rows[task], key=lambda row: (-data[task].examples.lengths[row], row))
        return (encoded(task, order[start : start + size]) for start in range(0, len(order), size))

    def singles(task: str) -> Iterator[tuple[Batch, int | None]]:
        labels = data[task].labels
        return ((encoded(task, [row]), _class(labels[row]) if method.reads_labels else None) for row in rows[task])

    return Sample(family.logits, batches, singles)


def _class(label: Label | None) -> int | None:
    """A label of a task of classes, as `of_classes` lets in no other."""
    return label if isinstance(label, int) else None
