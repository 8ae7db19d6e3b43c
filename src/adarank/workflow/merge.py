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
from torch import Tensor

from adarank.adapt.history import Progress
from adarank.data.task import TaskData
from adarank.errors import AdaRankError, OutputError
from adarank.io.record import Clock, Note, machine, versions
from adarank.io.writer import RECORD, atomic_folder, check_output, write_checkpoint, write_json
from adarank.methods import Informed, merge_tensors
from adarank.methods.task_aware.base import Taskwise
from adarank.outputs.write import parts_of, write_bundle, write_head, write_root_files
from adarank.recipe.job import Job, open_job
from adarank.recipe.plan import describe, settings_in_force, unheeded
from adarank.recipe.reader import RecipeLike, load_recipe
from adarank.spectral.mask_file import FILE as MASKS_FILE
from adarank.workflow.adapt import Adaptation, adapt_job
from adarank.workflow.calibrate import inform_job, sampled
from adarank.workflow.context import Run
from adarank.workflow.load_tasks import load_tasks
from adarank.workflow.modular import Assembly, assemble_job
from adarank.workflow.train import Training, train_job


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
        force: replace `out` if adarank wrote it.
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
    out = Path(out)
    check_output(out, force)
    clock = Clock()
    job = open_job(recipe)
    _check_disk(job, out)
    torch.manual_seed(recipe.seed)
    if data is None:
        data = load_tasks(job) if recipe.needs_data else {}
    if isinstance(job.method, Informed):
        sampled(job.method, data)  # refused here, before anything is computed
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
    learned: Adaptation | Training | Assembly | None = None
    with _no_leavings(state):
        if job.method is None:
            learn = train_job if recipe.trains else assemble_job if recipe.modular else adapt_job
            learned = learn(Run(job, data, record, state / "state.pt", note, progress))
            tensors = learned.tensors()
        else:
            method, found = inform_job(job, data, record["inputs"], state, note)
            record |= {"statistics": found} if found else {}
            tensors = merge_tensors(method, job.network, recipe.device)
    note("Writing the bundle" if job.task_aware else "Writing the merged model")
    with atomic_folder(out, force) as folder:
        if isinstance(learned, Assembly):
            record["bundle"] = write_bundle(folder, job, learned.parts())
        elif isinstance(job.method, Taskwise):
            record["bundle"] = write_bundle(folder, job, parts_of(job, job.method))
        else:
            _write_merged(folder, job, tensors, learned)
        record |= {"training" if recipe.trains else "adaptation": learned.report} if learned else {}
        record |= {"kept_though_changed": unheeded(job), "plan": describe(job), **clock.spent()}
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


def _write_merged(
    folder: Path, job: Job, tensors: Iterator[tuple[str, Tensor]], learned: Adaptation | Training | Assembly | None
) -> None:
    """One model: its weights, what lies beside them, each task's head, and the masks."""
    write_checkpoint(folder, job.layout(), tensors)
    write_root_files(folder, job)
    for task, names in job.network.heads.items():
        if names:
            head = learned.head(task) if isinstance(learned, Training) else job.network.head(task)
            write_head(folder / "heads" / task, job, task, head)
    if isinstance(learned, Adaptation):
        learned.masks.save(folder / MASKS_FILE)


def _check_disk(job: Job, out: Path) -> None:
    parent = next(p for p in (out.resolve(), *out.resolve().parents) if p.exists())
    free = shutil.disk_usage(parent).free
    needed = job.output_bytes()
    if needed > free:
        raise OutputError(
            f"{out}: {needed / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free. Free space or give another path."
        )
