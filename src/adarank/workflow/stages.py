"""The stages of a recipe that are merged before its output, each in a folder of the run's own, gone on from if it is stopped.

    .NAME.state/stages/1/     the first stage of the output NAME: an output like others, whole or not there at all
    .NAME.state/stages/2/     removed with the rest once NAME is written

A stage that lies there is taken as it is if its record says that it is of the same recipe, settings, seed and inputs.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adarank.data.task import TaskData
from adarank.errors import CheckpointError, Interrupted, OutputError
from adarank.io.checkpoint import Checkpoint
from adarank.io.files import read_json
from adarank.io.output_folder import RECORD, check_replaceable, remove_ours
from adarank.io.record import Clock, Note
from adarank.io.writer import state_folder
from adarank.recipe.job import Job, open_job
from adarank.recipe.paths import portable
from adarank.recipe.plan import settings_in_force
from adarank.recipe.schema import Recipe
from adarank.workflow.answers import FOLDER as ANSWERS

Run = Callable[[Job, Path, Mapping[str, TaskData], Clock], dict[str, Any]]
_LEFT_OUT = ("plan", "files", "versions", "machine")


@dataclass(frozen=True)
class Made:
    """Stages that are merged.

    Attributes:
        folders: name -> its output.
        records: name -> its record.
    """

    folders: dict[str, Checkpoint] = field(default_factory=dict)
    records: dict[str, dict[str, Any]] = field(default_factory=dict)

    def recorded(self) -> dict[str, Any]:
        """What the output's record has of them: their recipes, settings, seeds, inputs, and what their methods report."""
        if not self.records:
            return {}
        records = self.records.items()
        return {"stages": {name: {k: v for k, v in of.items() if k not in _LEFT_OUT} for name, of in records}}


def beginning(job: Job, inputs: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What tells one merge from another: the record's first entries.

    Arguments:
        inputs: the hashes of the inputs; by default they are computed here.
    """
    return {
        "recipe": portable(job.recipe),
        "settings": settings_in_force(job),
        "seed": job.recipe.seed,
        "inputs": job.inputs() if inputs is None else inputs,
    }


def merged_stages(
    recipe: Recipe, state: Path, data: Mapping[str, Mapping[str, TaskData]], run: Run, note: Note
) -> Made:
    """Merge what a recipe needs before its output, or take what an earlier run of it has merged.

    Arguments:
        state: the folder in which their outputs lie.
        data: stage -> task -> its inputs.
        run: merges an opened stage to a folder; returns its record.
    """
    made = Made()
    for number, (name, stage) in enumerate(recipe.stages.items(), 1):
        clock, job = Clock(), open_job(stage, made.folders)
        place = state / "stages" / str(number)
        record = _finished(place, job)
        note(f"Stage {number} of {len(recipe.stages) + 1}, {name}" + (": merged already" if record else ""))
        if record is None:
            shutil.rmtree(
                place, ignore_errors=True
            )  # of another recipe, or damaged: all that lies there is the run's own
        made.records[name] = record or run(job, place, data[name], clock)
        made.folders[name] = Checkpoint(place, f"stage '{name}'")
    if made.records:
        note(f"Stage {len(recipe.stages) + 1} of {len(recipe.stages) + 1}, the output")
    return made


def _finished(place: Path, job: Job) -> dict[str, Any] | None:
    """The record of a stage that is merged already, as it would be now; None if there is none, or its files were changed."""
    try:
        check_replaceable(place)
        record = read_json(place / RECORD)
    except (CheckpointError, OutputError):
        return None
    now = beginning(job)
    return record if _plain({key: record.get(key) for key in now}) == _plain(now) else None


def _plain(content: Any) -> Any:
    """Data as JSON gives it back: keys are texts, tuples lists."""
    if isinstance(content, Mapping):
        return {str(key): _plain(value) for key, value in content.items()}
    return [_plain(value) for value in content] if isinstance(content, (list, tuple)) else content


@contextmanager
def going_on(state: Path, note: Note) -> Iterator[None]:
    """While it is open `state` is this run's folder. What fails before a stage is merged leaves nothing of it behind.

    Raises:
        Interrupted: in place of Ctrl-C, if there is something to go on from.
    """
    kept = f"What is merged already lies in {state}; the same command goes on from there."
    with state_folder(state):
        try:
            yield
        except KeyboardInterrupt:
            if not worth_keeping(state):
                remove_ours(state)
                raise
            raise Interrupted(f"Stopped. {kept}") from None
        except Exception:  # of whatever kind
            if worth_keeping(state):
                note(kept)
            else:
                remove_ours(state)
            raise


def worth_keeping(state: Path) -> bool:
    """Whether a run can go on from what lies there: a saved state, of a start that is adapted itself too, generated answers, or a
    merged stage."""
    return any(state.rglob("state.pt")) or any(state.rglob(f"{ANSWERS}/*/*.pt")) or any(state.rglob(RECORD))
