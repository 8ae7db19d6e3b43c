"""From a job to a bundle's folder: parts, heads, configurations, sizes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adarank.bundle import About, Names, Piece, finish, task_folder, write_parts
from adarank.companions import write_root_files, write_task_files
from adarank.methods.taskwise import Taskwise, task_parts
from adarank.plan import Job
from adarank.writer import Layout


@dataclass(frozen=True)
class Parts:
    """What a bundle is made of: layouts, and a stream of the parts, so that none need be held.

    Attributes:
        kind: who can read them: a key of `serving.KINDS`.
        settings: in force when they were made, as plain data.
        shared, own, pieces: as for `bundle.write_parts`.
    """

    kind: str
    settings: Mapping[str, Any]
    shared: Layout
    own: Mapping[str, Layout]
    pieces: Iterator[Piece]


def parts_of(job: Job, method: Taskwise) -> Parts:
    """The parts that a job's task-aware method makes, each computed when it is asked for."""
    shared, own = job.part_layouts()
    settings = method.model_dump(mode="json", by_alias=True)
    pieces = task_parts(method, job.network, job.sites(), job.recipe.device)
    return Parts(method.name, settings, shared, own, pieces)


def write_bundle(folder: Path, job: Job, parts: Parts) -> dict[str, Any]:
    """Fill `folder` with a bundle of the job's tasks; returns its sizes (see `bundle.finish`).

    Raises:
        OutputError: the parts do not follow their layouts.
    """
    write_parts(folder, parts.shared, parts.own, parts.pieces)
    write_root_files(folder, job)
    for task in job.network.tasks:
        write_task_files(task_folder(folder, task), job, task)
    names = {task: Names.in_expert(job.network, task) for task in job.network.tasks}
    models = job.family.kind if job.family else None
    return finish(folder, About(parts.kind, parts.settings, models, job.layout(), names))
