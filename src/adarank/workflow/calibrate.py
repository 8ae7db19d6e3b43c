"""A job's method with the statistics that it needs of the experts on their inputs."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from adarank.calibration.gather import Gatherer, Sample, Store
from adarank.data.splits import limited
from adarank.data.task import Batch, TaskData
from adarank.io.record import Note
from adarank.methods import Informed, Method, RegMean
from adarank.models import TaskModels
from adarank.recipe.job import Job
from adarank.workflow.build_networks import build_models, family_of
from adarank.workflow.load_tasks import Rows, raise_together


def sampled(method: Informed, tasks: Mapping[str, Rows | TaskData]) -> dict[str, tuple[int, ...]]:
    """The rows of each task's adapt split that a method takes its statistics of: a seeded choice.

    Raises:
        DataError: a task has none, or they lack the labels that the method reads; all such tasks are named.
    """
    rows = {task: limited(own.splits, method.examples, method.seed).rows["adapt"] for task, own in tasks.items()}
    problems = [
        f"task '{task}': no rows to take statistics of. Give its data an adapt split, or a larger adapt fraction."
        for task, own in rows.items()
        if not own
    ]
    for task, own in rows.items() if method.reads_labels else ():
        bare = sum(tasks[task].labels[row] is None for row in own)
        if bare:
            problems.append(
                f"task '{task}': {bare} of the {len(own)} adapt inputs carry no label, and 'kind: empirical' reads it. "
                "Name the label column under task: columns, or leave out kind: by default no label is read."
            )
    raise_together(problems)
    return rows


def inform_job(
    job: Job, data: Mapping[str, TaskData], inputs: Mapping[str, Any], state: Path, note: Note
) -> tuple[Method, dict[str, Any]]:
    """The job's method with the statistics it asks for, and what a record says of them: nothing of data-free methods.

    Arguments:
        inputs: hashes of the checkpoints.
        state: folder in which statistics are kept until the merge is done.
    """
    assert job.method is not None  # it does not adapt
    if not isinstance(job.method, Informed):
        return job.method, {}
    note("Loading the networks")
    models = build_models(job)
    of = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:32]
    return inform(job.method, job, models, data, state / of, note)


def inform(
    method: Method,
    job: Job,
    models: TaskModels,
    data: Mapping[str, TaskData],
    folder: Path | None = None,
    note: Note = lambda text: None,
) -> tuple[Method, dict[str, Any]]:
    """A method with the statistics it asks for, taken of the job's experts, and what a record says of them.

    Data-free methods come back as they are. The models hold other tensors afterwards.

    Arguments:
        folder: where statistics of these very checkpoints are kept.

    Raises:
        DataError: a task has no inputs to take statistics of, or no labels where the method reads them.
    """
    if not isinstance(method, Informed):
        return method, {}
    started = time.perf_counter()
    rows = sampled(method, data)
    marks = {task: own.fingerprint() for task, own in data.items()}
    choices = {name: choice.action for name, choice in job.network.choices.items()}
    identity = json.dumps([method.identity(), rows, marks, choices], sort_keys=True)
    store = Store(folder / hashlib.sha256(identity.encode()).hexdigest()[:32] if folder else None)
    known = Gatherer(job.network, models, job_sample(method, job, data, rows), store, note).inform(method)
    report = {
        "protocol": job.recipe.data.protocol,
        "inputs": {task: len(own) for task, own in rows.items()},
        "labels_read": method.reads_labels,
        "tensors_with_statistics": len(known.statistics.names),
        "tensors_averaged": len(job.network.merged()) - len(known.statistics.names),
        "undetermined": known.undetermined,  # filled as tensors are merged
        "seconds": round(time.perf_counter() - started, 3),
        "splits": {task: {split: len(own) for split, own in of.splits.rows.items()} for task, of in data.items()},
        "notes": [f"{task}: {text}" for task, own in data.items() for text in own.notes],
    }
    return known, report


def job_sample(method: Informed, job: Job, data: Mapping[str, TaskData], rows: Mapping[str, tuple[int, ...]]) -> Sample:
    """Rows of a job's tasks as a sample, inputs of like length together."""
    family, device = family_of(job), job.recipe.device
    size = method.batch_size if isinstance(method, RegMean) else 1

    def encoded(task: str, chosen: list[int]) -> Batch:
        return {key: value.to(device) for key, value in data[task].examples.batch(chosen).items()}

    def batches(task: str) -> Iterator[Batch]:
        order = sorted(rows[task], key=lambda row: (-data[task].examples.lengths[row], row))
        return (encoded(task, order[start : start + size]) for start in range(0, len(order), size))

    def singles(task: str) -> Iterator[tuple[Batch, int | None]]:
        labels = data[task].labels
        return ((encoded(task, [row]), labels[row] if method.reads_labels else None) for row in rows[task])

    return Sample(family.logits, batches, singles)
