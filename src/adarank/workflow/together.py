"""One merge by several processes: which merges they can share, and who claims, writes and records what.

The first process claims the output, writes configuration, heads and the record, and puts the output in its place. Of the files of
weights each process writes every n-th, into the first one's workspace, which lies in a folder that all see.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from adarank.errors import OutputError, Problems, RecipeError
from adarank.io import processes
from adarank.io.lock import resolved
from adarank.io.record import Note
from adarank.io.writer import atomic_folder, claimed, planned_shards
from adarank.method import Result
from adarank.outputs.write import Written, write_result, write_weights
from adarank.recipe.job import Job
from adarank.recipe.schema import Recipe

_SEEN_SECONDS = 10.0  # until every machine sees what another one has made in a shared folder


def check_shared_work(recipe: Recipe, jobs: Sequence[Job]) -> None:
    """Refuse what several processes cannot share.

    Raises:
        RecipeError: all that stands against it.
    """
    if processes.size() == 1:
        return
    alone = {
        "stages": "a recipe of several stages" if len(jobs) > 1 or recipe.stages else "",
        "heads": "learning heads" if recipe.heads == "learn" else "",
        "output.lora": "writing an adapter" if recipe.output.lora is not None else "",
        "task": "what generating models learn from prompts"
        if any(job.family and job.family.generates for job in jobs)
        else "",
        "merge_method": ", ".join(f"'{job.method.name}'" for job in jobs if not job.method.shares_work()),
    }
    problems = Problems()
    for key, what in alone.items():
        if what:
            problems.errors.append(
                RecipeError(
                    f"{key}: {what} runs in one process, and {processes.size()} were started. Run it without the launcher."
                )
            )
    problems.refuse()


@contextmanager
def claimed_together(out: Path, force: bool) -> Iterator[Path]:
    """As `writer.claimed`, by the first process for all."""
    if processes.rank() > 0:
        processes.meet()
        yield resolved(out)
        return
    with claimed(out, force) as place:
        processes.meet()
        yield place


@contextmanager
def folder_together(out: Path, force: bool) -> Iterator[Path]:
    """As `writer.atomic_folder`, by the first process for all.

    Raises:
        OutputError: the folder is not one that all machines share.
    """
    if processes.rank() > 0:
        folder = processes.from_first(lambda: out)
        _check_seen(folder)
        yield folder
        return
    with atomic_folder(out, force) as folder:
        yield processes.from_first(lambda: folder)


def write_together(folder: Path, job: Job, result: Result) -> Written:
    """This process's share of an output; what it returns is of all of it."""
    if processes.rank() > 0:
        written = write_weights(folder, job, result)
        for name in written.digests:  # before the first process puts the output in its place
            with (folder / name).open("rb") as handle:
                os.fsync(handle.fileno())
    else:
        written = write_result(folder, job, result)
    parts = processes.gathered((written.digests, result.recorded()))
    digests = {name: digest for of_one, _ in parts for name, digest in of_one.items()}
    return Written({**written.recorded, **_joined([report for _, report in parts])}, digests)


def shared_by(record: Mapping[str, Any]) -> dict[str, Any]:
    """What a record says of the processes that shared the work; nothing of one alone."""
    if processes.size() == 1:
        return {}
    peaks = processes.gathered(record["peak_resident_bytes"])
    return {"processes": {"count": processes.size(), "peak_resident_bytes": peaks}}


def note_idle(job: Job, note: Note) -> None:
    """Say how many processes will have no file to write."""
    paths = [module.path for module in job.root.modules]
    shards = len(planned_shards(job.layout(), paths, job.recipe.max_shard_size))
    idle = processes.size() - shards
    if idle > 0:
        size = job.output_bytes() // processes.size() // 10**6
        note(
            f"The output has {shards} file(s) of weights, so that {idle} of {processes.size()} processes write none. "
            f"Give --max-shard-size {max(1, size)}MB or less to share the work."
        )


def _check_seen(folder: Path) -> None:
    ends = time.monotonic() + _SEEN_SECONDS
    while not folder.is_dir():
        if time.monotonic() > ends:
            raise OutputError(
                f"{folder}: is not seen by {processes.names()[processes.rank()]}. The output must lie in a folder that all machines share."
            )
        time.sleep(0.1)


def _joined(reports: Sequence[Any]) -> Any:
    """Reports that grow as tensors are merged, of all processes: tables are joined, of other entries the first one's stand."""
    if not all(isinstance(report, Mapping) for report in reports):
        return reports[0]
    keys = dict.fromkeys(key for report in reports for key in report)
    return {key: _joined([report[key] for report in reports if key in report]) for key in keys}
