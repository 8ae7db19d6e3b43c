"""The flow: checkpoints → task vectors → method or adaptation → one merged checkpoint with its record.

All that can be checked is checked before anything is spent.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from adarank.adapt.history import Progress
from adarank.data.task import TaskData
from adarank.errors import AdaRankError, OutputError
from adarank.io.record import Clock, Note, machine, versions
from adarank.io.writer import RECORD, atomic_folder, check_output, write_json
from adarank.outputs.write import write_result
from adarank.recipe.job import Job, open_job
from adarank.recipe.plan import describe, settings_in_force, unheeded
from adarank.recipe.reader import RecipeLike, load_recipe
from adarank.workflow.context import Run
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
    """Do what a recipe says and write the merged model to `out`; returns the record.

    Arguments:
        recipe: its file, what would be in it, or what `load_recipe` gives.
        note: told each stage as it begins.
        progress: called after each adaptation step.
        data: the recipe's tasks, if they are loaded already.

    Raises:
        AdaRankError: anything wrong with recipe, inputs, data or output; nothing is left behind.
        Interrupted: adaptation was stopped; the same call continues it.
    """
    recipe = load_recipe(recipe)
    out = Path(out)
    check_output(out, force)
    clock = Clock()
    job = open_job(recipe)
    _check_disk(job, out)
    torch.manual_seed(recipe.seed)
    if data is None:
        data = load_tasks(job) if job.method.data or recipe.heads == "learn" else {}
    job.method.of_data(data)  # refused here, before anything is computed
    note("Hashing the inputs")
    record: dict[str, Any] = {
        "recipe": recipe.model_dump(mode="json", by_alias=True, exclude_unset=True),
        "settings": settings_in_force(job),
        "seed": recipe.seed,
        "versions": versions(),
        "machine": machine(recipe.device),
        "inputs": job.inputs(),
    }
    state = out.parent / f".{out.name}.state"
    with _no_leavings(state):
        run = Run(job, data, record, state / "state.pt", note, progress)
        result = job.method.run(run)
        if recipe.heads == "learn":
            result, of_heads = with_learned_heads(run, result)
            record |= of_heads
    note("Writing the bundle" if result.parts else "Writing the merged model")
    with atomic_folder(out, force) as folder:
        record |= write_result(folder, job, result)
        record |= {**result.recorded(), "kept_though_changed": unheeded(job), "plan": describe(job), **clock.spent()}
        write_json(folder / RECORD, record)
    shutil.rmtree(state, ignore_errors=True)
    return record


@contextmanager
def _no_leavings(state: Path) -> Iterator[None]:
    """An adaptation that fails before it has saved a state leaves nothing of it behind, nor do statistics that fail."""
    try:
        yield
    except AdaRankError:
        if not any(state.rglob("state.pt")):  # of a start that is adapted itself, too
            shutil.rmtree(state, ignore_errors=True)
        raise


def _check_disk(job: Job, out: Path) -> None:
    parent = next(p for p in (out.resolve(), *out.resolve().parents) if p.exists())
    free = shutil.disk_usage(parent).free
    needed = job.output_bytes()
    if needed > free:
        raise OutputError(
            f"{out}: {needed / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free. Free space or give another path."
        )
