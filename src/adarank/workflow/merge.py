"""The flow: checkpoints → task vectors → method or adaptation → one merged checkpoint with its record.

All that can be checked is checked before anything is spent.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from adarank.adapt.history import Progress
from adarank.data.task import TaskData
from adarank.errors import OutputError, Problems
from adarank.io.output_folder import check_outside, remove_ours
from adarank.io.progress import stage
from adarank.io.record import Clock, Note, machine, versions
from adarank.io.writer import atomic_folder, check_output, check_shards, claimed, state_folder, write_record
from adarank.outputs.card import write_card
from adarank.outputs.write import check_side_files, write_result
from adarank.recipe.draft import Draft
from adarank.recipe.job import Job, open_job
from adarank.recipe.paths import read_paths
from adarank.recipe.plan import describe, unheeded
from adarank.recipe.reader import RecipeLike, read_draft
from adarank.recipe.schema import Recipe
from adarank.workflow.adapt import telling_of_collapse
from adarank.workflow.answers import with_answers
from adarank.workflow.context import RecipeContext
from adarank.workflow.heads import with_learned_heads
from adarank.workflow.left_over import state_of
from adarank.workflow.load_tasks import load_opened, load_tasks, refuse_without_classes
from adarank.workflow.prepare import Prepared, job_reads_data, prepare, reads_data
from adarank.workflow.stages import beginning, going_on, merged_stages, worth_keeping
from adarank.workflow.track import check_trackers, tracked


def merge(
    recipe: RecipeLike,
    out: Path | str,
    force: bool = False,
    note: Note = lambda text: None,
    progress: Progress | None = None,
    data: Mapping[str, TaskData] | None = None,
) -> dict[str, Any]:
    """Do what a recipe says and write the merged model to `out`.

    Arguments:
        recipe: its file, a mapping with the same keys, or what `load_recipe` returns.
        out: the folder to write; it appears whole or not at all.
        force: replace `out` if adarank wrote it and nobody has changed it since.
        note: called with a line of text as each stage begins.
        progress: called after each adaptation step.
        data: the recipe's tasks, if they are loaded already.

    Returns:
        The record, as in `adarank.json`: recipe, settings, hashes of all inputs, versions, seed, action per tensor, seconds, bytes.

    Raises:
        AdaRankError: anything wrong with recipe, inputs, data or output; nothing is left behind.
        Interrupted: adaptation was stopped; the same call continues it.

    Example:
        record = adarank.merge_recipe("recipe.yaml", "out")
        print(record["settings"]["parameters"], record["seconds"])
    """
    problems = Problems()
    draft = read_draft(recipe, problems)
    if problems.errors:
        with problems.noted():
            check_output(Path(out), force)
    if draft is None:
        problems.refuse()
    assert draft is not None
    with claimed(Path(out), force) as place:
        return _merge(draft, problems, place, force, note, progress, data)


def _merge(
    draft: Draft,
    problems: Problems,
    out: Path,
    force: bool,
    note: Note,
    progress: Progress | None,
    data: Mapping[str, TaskData] | None,
) -> dict[str, Any]:
    """What `merge` does, once the output is this run's alone."""
    clock = Clock()
    recipe, prepared = draft.recipe, prepare(draft, problems)
    _check(prepared, recipe, out, problems)
    if data is None:
        data = load_opened(prepared.opened, problems) if prepared.opened and reads_data(draft) else {}
    of_stages: dict[str, Mapping[str, TaskData]] = {}
    for name, job in prepared.before.items():
        with problems.noted():
            of_stages[name] = load_tasks(job) if job_reads_data(job) else {}
    stages = prepared.whole(problems)
    for job, of_job in zip(stages.jobs, [*of_stages.values(), data], strict=True):
        job.method.of_data(of_job)  # what it cannot use is refused before anything is computed
    state = state_of(out)
    with going_on(state, note) if stages.before else nullcontext():
        made = merged_stages(recipe, state, of_stages, partial(_run, force=True, note=note, progress=progress), note)
        job = open_job(recipe, made.folders) if stages.before else stages.output
        record = _run(job, out, data, clock, force, note, progress, made.recorded())
    remove_ours(state)
    return record


def _check(prepared: Prepared, recipe: Recipe, out: Path, problems: Problems) -> None:
    """Note what keeps opened stages from being merged to an output."""
    for job in prepared.jobs:
        with problems.noted():
            check_outside(out, read_paths(job))
            check_side_files(job)
        with problems.noted():
            refuse_without_classes(job)
        with problems.noted():
            check_trackers(job.recipe.report_to)
    if prepared.stages is None:
        return
    with problems.noted():
        _check_disk(prepared.jobs, out)
    if recipe.max_shard_size is not None:
        with problems.noted():
            check_shards(prepared.stages.output.layout(), recipe.max_shard_size)


def _run(
    job: Job,
    out: Path,
    data: Mapping[str, TaskData],
    clock: Clock,
    force: bool,
    note: Note,
    progress: Progress | None,
    more: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """One stage, checked, to its folder.

    Arguments:
        more: what the record has beside what is of the stage itself.
    """
    recipe = job.recipe
    torch.manual_seed(recipe.seed)
    note("Hashing the inputs")
    record = {**beginning(job), "versions": versions(), "machine": machine(recipe.device), **(more or {})}
    state = state_of(out)
    with _kept(state) if data else nullcontext():
        data = with_answers(job, data, record["inputs"], state, note)
        about = {name: record[name] for name in ("recipe", "settings", "seed")}
        with tracked(recipe.report_to, out, state, about, note, telling_of_collapse(note, progress)) as following:
            context = RecipeContext(job, data, record, state / "state.pt", note, following)
            result = job.method.run(context)
        if recipe.heads == "learn":
            result, of_heads = with_learned_heads(context, result)
            record |= of_heads
    note("Writing the bundle" if result.parts else "Writing the merged model")
    with atomic_folder(out, force) as folder, stage("Writing", job.output_bytes()):
        record |= write_result(folder, job, result)
        record |= {**result.recorded(), **unheeded(job), "plan": describe(job), **clock.spent()}
        write_card(folder, record)
        write_record(folder, record)
    return record


@contextmanager
def _kept(state: Path) -> Iterator[None]:
    """While it is open `state` is this run's folder. What fails before a state is saved leaves nothing of it behind."""
    with state_folder(state):
        try:
            yield
        except Exception:  # of whatever kind
            if not worth_keeping(state):
                remove_ours(state)
            raise


def _check_disk(jobs: Sequence[Job], out: Path) -> None:
    parent = next(p for p in (out.resolve(), *out.resolve().parents) if p.exists())
    free = shutil.disk_usage(parent).free
    needed = sum(job.output_bytes() for job in jobs)
    if needed > free:
        raise OutputError(
            f"{out}: {needed / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free. Free space or give another path."
        )
