"""The flow: checkpoints → task vectors → method or adaptation → one merged checkpoint with its record.

All that can be checked is checked before anything is spent.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from adarank.adapt.history import Progress
from adarank.data.task import TaskData
from adarank.errors import OutputError, Problems
from adarank.io import processes
from adarank.io.beside import beside
from adarank.io.output_folder import check_outside, remove_ours
from adarank.io.process_memory import give_back, give_back_at_once
from adarank.io.progress import stage
from adarank.io.record import Clock, Note, machine, versions
from adarank.io.writer import check_output, check_shards, state_folder, write_record
from adarank.method import Result
from adarank.outputs.card import write_card
from adarank.outputs.write import check_side_files
from adarank.recipe.draft import Draft
from adarank.recipe.job import Job, open_job
from adarank.recipe.paths import read_paths
from adarank.recipe.plan import check_memory, describe, notes_of, unheeded
from adarank.recipe.reader import RecipeLike, read_draft
from adarank.recipe.schema import Recipe
from adarank.workflow.adapt import telling_of_collapse
from adarank.workflow.answers import with_answers
from adarank.workflow.context import RecipeContext
from adarank.workflow.heads import with_learned_heads
from adarank.workflow.left_over import state_of
from adarank.workflow.load_tasks import load_opened, refuse_without_classes
from adarank.workflow.prepare import Prepared, prepare
from adarank.workflow.stages import beginning, going_on, merged_stages, worth_keeping
from adarank.workflow.together import (
    check_shared_work,
    claimed_together,
    folder_together,
    note_idle,
    shared_by,
    write_together,
)
from adarank.workflow.track import check_trackers, tracked


def merge(
    recipe: RecipeLike,
    out: Path | str,
    force: bool = False,
    note: Note = lambda text: None,
    progress: Progress | None = None,
    data: Mapping[str, TaskData] | None = None,
    memory: int | None = None,
) -> dict[str, Any]:
    """Do what a recipe says and write the merged model to `out`.

    Arguments:
        recipe: its file, a mapping with the same keys, or what `load_recipe` returns.
        out: the folder to write; it appears whole or not at all.
        force: replace `out` if adarank wrote it and nobody has changed it since.
        note: called with a line of text as each stage begins.
        progress: called after each adaptation step.
        data: the recipe's tasks, if they are loaded already.
        memory: a budget in bytes of anonymous memory (what is held beside mapped files), the process itself included. What cannot
            keep it is refused before anything is spent; the result is the same with any budget.

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
    with claimed_together(Path(out), force) as place:
        return _merge(draft, problems, place, force, note, progress, data, memory)


def _merge(
    draft: Draft,
    problems: Problems,
    out: Path,
    force: bool,
    note: Note,
    progress: Progress | None,
    data: Mapping[str, TaskData] | None,
    memory: int | None,
) -> dict[str, Any]:
    """What `merge` does, once the output is this run's alone."""
    clock = Clock()
    recipe, prepared = draft.recipe, prepare(draft, problems)
    _check(prepared, recipe, out, problems, memory)
    with problems.noted():
        check_shared_work(recipe, list(prepared.jobs.values()))
    of_stages = prepared.data(load_opened, problems) if data is None else {"": data}
    jobs = prepared.whole(problems)
    for name, job in jobs.items():
        job.method.of_data(of_stages[name])  # what it cannot use is refused before anything is computed
    state = state_of(out)
    with going_on(out, note) if recipe.stages else nullcontext():
        run = partial(_run, force=True, note=note, progress=progress, memory=memory)
        made = merged_stages(recipe, state, of_stages, run, note)
        job = open_job(recipe, made.folders) if recipe.stages else jobs[""]
        record = _run(job, out, of_stages[""], clock, force, note, progress, memory, made.recorded())
    if processes.rank() == 0:
        remove_ours(state)
    return record


def _check(prepared: Prepared, recipe: Recipe, out: Path, problems: Problems, memory: int | None) -> None:
    """Note what keeps opened stages from being merged to an output."""
    for name, job in prepared.jobs.items():
        with problems.of(prepared.label(name)) as here:
            with here.noted():
                check_outside(out, read_paths(job))
                check_side_files(job)
            with here.noted():
                refuse_without_classes(job)
            with here.noted():
                check_memory(replace(job, memory=memory))
            with here.noted():
                check_trackers(job.recipe.report_to)
            if not name and recipe.max_shard_size is not None:
                with here.noted():
                    check_shards(job.layout(), recipe.max_shard_size)
    if len(prepared.jobs) == len(prepared.parts):
        with problems.noted():
            _check_disk(prepared.jobs.values(), out)


def _run(
    job: Job,
    out: Path,
    data: Mapping[str, TaskData],
    clock: Clock,
    force: bool,
    note: Note,
    progress: Progress | None,
    memory: int | None = None,
    more: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """One stage, checked, to its folder.

    Arguments:
        memory: the budget, as for `merge`.
        more: what the record has beside what is of the stage itself.
    """
    job, recipe = replace(job, memory=memory), job.recipe
    if memory is not None:
        give_back_at_once()
    torch.manual_seed(recipe.seed)
    processes.check_agreement("recipe and checkpoints", [json.dumps(beginning(job, {})), job.layout(), versions()])
    with beside(job.hashed_share) as hashed:
        record = {**beginning(job, {}), "versions": versions(), "machine": machine(recipe.device), **(more or {})}
        if data:  # what is kept of the experts is found by their hashes
            for text in notes_of(job):  # now, as all that follows may take long
                note(f"note: {text}")
            note("Hashing the inputs")
            record["inputs"] = job.joined_hashes(hashed.result())
        result = _made(job, out, data, record, note, progress)
        give_back()
        note_idle(job, note)
        note("Writing the bundle" if result.parts else "Writing the merged model")
        with folder_together(out, force) as folder, stage("Writing", job.output_bytes()):
            written = write_together(folder, job, result)
            record["inputs"] = record["inputs"] or job.joined_hashes(hashed.result())
            record |= {**written.recorded, **unheeded(job), "plan": describe(job), **clock.spent()}
            record |= shared_by(record)
            if processes.rank() == 0:
                write_card(folder, record)
                write_record(folder, record, written.digests)
    return record


def _made(
    job: Job,
    out: Path,
    data: Mapping[str, TaskData],
    record: dict[str, Any],
    note: Note,
    progress: Progress | None,
) -> Result:
    """What the job's method gives, heads learned where the recipe says so; what the record has of them is added to it."""
    recipe, state = job.recipe, state_of(out)
    with _kept(state) if data else nullcontext():
        data = with_answers(job, data, record["inputs"], state, note)
        about = {name: record[name] for name in ("recipe", "settings", "seed")}
        trackers = recipe.report_to if processes.rank() == 0 else ()
        with tracked(trackers, out, state, about, note, telling_of_collapse(note, progress)) as following:
            result = job.method.run(RecipeContext(job, data, record, state / "state.pt", note, following))
        if recipe.heads == "learn":
            result, of_heads = with_learned_heads(RecipeContext(job, data, record, state / "state.pt", note), result)
            record |= of_heads
    return result


@contextmanager
def _kept(state: Path) -> Iterator[None]:
    """While it is open `state` is this run's folder. What fails before a state is saved leaves nothing of it behind."""
    if processes.rank() > 0:
        yield
        return
    with state_folder(state):
        try:
            yield
        except Exception:  # of whatever kind
            if not worth_keeping(state) and processes.size() == 1:  # others may still write there
                remove_ours(state)
            raise


def _check_disk(jobs: Collection[Job], out: Path) -> None:
    parent = next(p for p in (out.resolve(), *out.resolve().parents) if p.exists())
    free = shutil.disk_usage(parent).free
    needed = sum(job.output_bytes() for job in jobs)
    if needed > free:
        raise OutputError(
            f"{out}: {needed / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free. Free space or give another path."
        )
