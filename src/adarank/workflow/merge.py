"""The flow: checkpoints → task vectors → method or adaptation → one merged checkpoint with its record.

All that can be checked is checked before anything is spent.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from adarank.adapt.history import Progress
from adarank.data.task import TaskData
from adarank.errors import OutputError
from adarank.io.output_folder import check_outside, remove_ours
from adarank.io.record import Clock, Note, machine, versions
from adarank.io.writer import atomic_folder, check_shards, claimed, state_folder, write_record
from adarank.outputs.write import check_side_files, write_result
from adarank.recipe.job import Job, open_job
from adarank.recipe.paths import portable, read_paths
from adarank.recipe.plan import describe, settings_in_force, unheeded
from adarank.recipe.reader import RecipeLike, load_recipe
from adarank.recipe.schema import Recipe
from adarank.workflow.context import RecipeContext
from adarank.workflow.heads import with_learned_heads
from adarank.workflow.load_tasks import load_tasks


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
    recipe = load_recipe(recipe)
    with claimed(Path(out), force) as place:
        return _merge(recipe, place, force, note, progress, data)


def _merge(
    recipe: Recipe,
    out: Path,
    force: bool,
    note: Note,
    progress: Progress | None,
    data: Mapping[str, TaskData] | None,
) -> dict[str, Any]:
    """What `merge` does, once the output is this run's alone."""
    clock = Clock()
    job = open_job(recipe)
    check_outside(out, read_paths(job))
    check_side_files(job)
    _check_disk(job, out)
    if recipe.max_shard_size is not None:
        check_shards(job.layout(), recipe.max_shard_size)
    torch.manual_seed(recipe.seed)
    if data is None:
        data = load_tasks(job) if job.method.data or recipe.heads == "learn" else {}
    job.method.of_data(data)  # refused here, before anything is computed
    note("Hashing the inputs")
    record: dict[str, Any] = {
        "recipe": portable(recipe),
        "settings": settings_in_force(job),
        "seed": recipe.seed,
        "versions": versions(),
        "machine": machine(recipe.device),
        "inputs": job.inputs(),
    }
    state = out.parent / f".{out.name}.state"
    with _kept(state) if data else nullcontext():
        context = RecipeContext(job, data, record, state / "state.pt", note, progress)
        result = job.method.run(context)
        if recipe.heads == "learn":
            result, of_heads = with_learned_heads(context, result)
            record |= of_heads
    note("Writing the bundle" if result.parts else "Writing the merged model")
    with atomic_folder(out, force) as folder:
        record |= write_result(folder, job, result)
        record |= {**result.recorded(), **unheeded(job), "plan": describe(job), **clock.spent()}
        write_record(folder, record)
    remove_ours(state)
    return record


@contextmanager
def _kept(state: Path) -> Iterator[None]:
    """While it is open `state` is this run's folder. What fails before a state is saved leaves nothing of it behind."""
    with state_folder(state):
        try:
            yield
        except Exception:  # of whatever kind
            if not any(state.rglob("state.pt")):  # of a start that is adapted itself, too
                remove_ours(state)
            raise


def _check_disk(job: Job, out: Path) -> None:
    parent = next(p for p in (out.resolve(), *out.resolve().parents) if p.exists())
    free = shutil.disk_usage(parent).free
    needed = job.output_bytes()
    if needed > free:
        raise OutputError(
            f"{out}: {needed / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free. Free space or give another path."
        )
