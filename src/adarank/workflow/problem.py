"""The problem of adaptation that a recipe's files make: tables of inputs, and the experts' predictions kept beside the state."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adarank.adapt import problem
from adarank.adapt.learner import Memory
from adarank.adapt.objectives import NEED_FEATURES
from adarank.adapt.outcomes import Outcomes, outcomes_of
from adarank.adapt.passage import Passage
from adarank.adapt.problem import BatchPredictions, Chunk, Predict, Predictions, Problem, needs_targets, predictor
from adarank.adapt.settings import AdaptSettings
from adarank.adapt.top_logits import TokenTable, TopLogits
from adarank.data.spec import Split
from adarank.data.task import TaskData
from adarank.io import processes
from adarank.io.progress import advance, stage
from adarank.io.record import Note
from adarank.io.state import read_kept, write_state
from adarank.models import Family, TaskModels
from adarank.models.head_inputs import Pool, head_parts
from adarank.models.predict import split_batches
from adarank.models.prompts import Prompts
from adarank.recipe.job import Job
from adarank.workflow.build_networks import family_of

FILE = "experts.pt"


@dataclass(frozen=True)
class TableInputs:
    """One task's inputs in a table. Predictions are tables of as many rows; those that were not predicted are 0.

    Arguments:
        device: where batches are put.
    """

    data: TaskData
    settings: AdaptSettings
    family: Family
    device: torch.device | str

    @property
    def one_pass(self) -> int:
        """Steps after which each row of the adapt split has been seen."""
        return self.data.one_pass(self.settings.batch_size)

    def outcomes(self, expert: Predictions | None) -> Outcomes:
        """How outputs are read as predictions, by what the task's model gives."""
        data, split = self.judged
        judged = expert.logits[list(data.splits.rows[split])] if expert is not None else None
        return outcomes_of(self.data.problem, judged if isinstance(judged, Tensor) else None)

    @property
    def generate(self) -> bool:
        """True if models of the family give a prediction for each of several tokens."""
        return self.family.generates

    @property
    def judged(self) -> tuple[TaskData, Split]:
        """The task with the rows that it is judged on: of select, or of adapt where select is empty; `check_inputs` at most."""
        split: Split = "select" if self.data.splits.rows["select"] else "adapt"
        return self.data.spread(split, self.settings.check_inputs), split

    def step(self, step: int) -> Chunk:
        """The rows of a step."""
        rows = list(self.data.adapt_rows(step, self.settings.batch_size))
        return rows, {name: tensor.to(self.device) for name, tensor in self.data.examples.batch(rows).items()}

    @property
    def held_out_from_steps(self) -> bool:
        """True if there is a select split."""
        return self.judged[1] == "select"

    def adapted_on(self) -> Iterator[Chunk]:
        """The rows of the adapt split, longest first."""
        return self._batches(self.data, "adapt")

    def judged_on(self, most: int | None = None) -> Iterator[Chunk]:
        """The judged rows, longest first."""
        data, split = self.judged
        return self._batches(data if most is None else data.spread(split, most), split)

    def predictions(self, predict: Predict, adapted_on: bool) -> Predictions:
        """Predictions of all rows of adapt if these are wanted, and of those that are judged."""
        rows: list[int] = []
        parts: list[BatchPredictions] = []
        for batch_rows, batch in self.to_predict(adapted_on):
            rows += batch_rows
            parts.append(predict(batch))
            advance(len(batch_rows))
        features = [part.features for part in parts if part.features is not None]
        return Predictions(self._of_logits(rows, parts), self._table(rows, features) if features else None)

    def _of_logits(self, rows: list[int], parts: list[BatchPredictions]) -> Tensor | TokenTable:
        examples = self.data.examples
        if isinstance(examples, Prompts):
            tokens = [part.logits for part in parts if isinstance(part.logits, TopLogits)]
            return TokenTable.of(rows, [examples.predictions[row] for row in rows], tokens)
        return self._table(rows, [part.logits for part in parts if isinstance(part.logits, Tensor)])

    def to_predict(self, adapted_on: bool) -> Iterator[Chunk]:
        """The rows that `predictions` predicts, in its batches."""
        for data, split in self._to_predict(adapted_on):
            yield from self._batches(data, split)

    def rows_to_predict(self, adapted_on: bool) -> list[list[Any]]:
        """[split, row, row, …] of what `predictions` predicts."""
        return [[split, *data.splits.rows[split]] for data, split in self._to_predict(adapted_on)]

    def _to_predict(self, adapted_on: bool) -> list[tuple[TaskData, Split]]:
        judged = self.judged
        if not adapted_on:
            return [judged]
        return [(self.data, "adapt")] if judged[1] == "adapt" else [(self.data, "adapt"), judged]

    def _batches(self, data: TaskData, split: Split) -> Iterator[Chunk]:
        return split_batches(self.family, data, split, self.device)

    def _table(self, rows: list[int], values: list[Tensor]) -> Tensor:
        table = torch.zeros(len(self.data.examples.lengths), *values[0].shape[1:])
        table[rows] = torch.cat(values)
        return table


def table_inputs(job: Job, data: Mapping[str, TaskData], settings: AdaptSettings) -> dict[str, TableInputs]:
    """task -> its inputs."""
    family = family_of(job)
    return {task: TableInputs(of_task, settings, family, job.recipe.device) for task, of_task in data.items()}


def problem_of(
    job: Job,
    models: TaskModels,
    data: Mapping[str, TaskData],
    settings: AdaptSettings,
    predictions: Mapping[str, Predictions],
    memory: Memory | None = None,
) -> Problem:
    """What a job's networks and data give the loop to work on.

    Arguments:
        predictions: task -> its expert's predictions; only tasks whose objective compares with them are looked up by losses.
        memory: where losses keep running means from step to step.
    """
    inputs = table_inputs(job, data, settings)
    memory = {} if memory is None else memory
    return Problem(models, inputs, settings, family_of(job).logits, predictions, memory=memory)


def expert_predictions(
    job: Job,
    models: TaskModels,
    data: Mapping[str, TaskData],
    settings: AdaptSettings,
    mark: Any = None,
    folder: Path | None = None,
    note: Note = lambda text: None,
    passage: Passage | None = None,
) -> dict[str, Predictions]:
    """Every expert's predictions on the inputs that its task adapts on (if its objective needs them) and is judged on.

    The models hold the base's tensors afterwards, if anything had to be computed.

    Arguments:
        mark: what tells the experts and their data from others, as plain data.
        folder: where predictions are kept; those that lie there with the same mark are not computed again.
        passage: over the models, which runs experts a block at a time.
    """
    inputs = table_inputs(job, data, settings)
    rows = {task: of_task.rows_to_predict(needs_targets(settings, task)) for task, of_task in inputs.items()}
    kinds = {
        task: [
            list(settings.self_label.layers) if NEED_FEATURES & settings.weights(task).keys() else None,
            settings.self_label.top_logits if of_task.generate else None,
        ]
        for task, of_task in inputs.items()
    }
    by_block = None if passage is None else lambda task: passage.expert(task, partial(_to_predict, inputs[task], settings, task))  # fmt: skip
    store = _Store(folder, {task: _digest([mark, task, rows[task], kinds[task]]) for task in inputs})
    known = {task: kept for task in inputs if (kept := store.read(task)) is not None}
    lacking = {task for of_one in processes.gathered([task for task in inputs if task not in known]) for task in of_one}
    left = {task: of_task for task, of_task in inputs.items() if task in lacking}
    if left:
        note("Computing the experts' predictions")
        with stage("The experts' predictions", sum(len(part) - 1 for task in left for part in rows[task])):
            known |= problem.expert_predictions(
                job.network, models, left, settings, family_of(job).logits, keep=store.keep, expert=by_block
            )
    return {task: known[task] for task in inputs}


def _to_predict(inputs: TableInputs, settings: AdaptSettings, task: str) -> Iterator[Chunk]:
    return inputs.to_predict(needs_targets(settings, task))


def head_features(
    job: Job,
    models: TaskModels,
    data: Mapping[str, TaskData],
    settings: AdaptSettings,
    task: str,
    pool: Pool | None = None,
) -> Tensor:
    """(rows, width) what a task's head is given by the tensors that the models hold now, on the rows adapted on and judged on."""
    predict = predictor(models.modules[task], head_parts(models, task), family_of(job).logits, pool)
    features = table_inputs(job, data, settings)[task].predictions(predict, adapted_on=True).features
    assert isinstance(features, Tensor)  # the head's parts were given
    return features


def _plain(predictions: Predictions) -> dict[str, Any]:
    """Predictions as they are stored."""
    logits = predictions.logits
    return {
        "logits": logits.plain() if isinstance(logits, TokenTable) else logits,
        "features": predictions.features,
    }


def _logits(stored: Any) -> Tensor | TokenTable:
    """What `_plain` stored of logits."""
    return stored if isinstance(stored, Tensor) else TokenTable.read(stored)


@dataclass(frozen=True)
class _Store:
    """Experts' predictions in a file for each task, so that an interrupted run goes on with the next expert.

    Attributes:
        folder: where they are kept; None to keep none.
        marks: task -> what tells its predictions from others.
    """

    folder: Path | None
    marks: Mapping[str, str]

    def keep(self, task: str, predictions: Predictions) -> None:
        """Save a task's predictions."""
        if self.folder:
            write_state(self._path(self.folder, task), {"mark": self.marks[task], **_plain(predictions)}, "the experts' predictions")  # fmt: skip

    def read(self, task: str) -> Predictions | None:
        """What is kept, or None if there is nothing, it is damaged, or it is of others: then it is computed anew."""
        content: Any = read_kept(self._path(self.folder, task)) if self.folder else None
        try:
            return Predictions(_logits(content["logits"]), content["features"]) if content["mark"] == self.marks[task] else None  # fmt: skip
        except (LookupError, TypeError, AttributeError):  # nothing was kept, or something else
            return None

    def _path(self, folder: Path, task: str) -> Path:
        return folder / "experts" / self.marks[task] / FILE


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]
