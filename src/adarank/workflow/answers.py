"""The experts' answers to their tasks' prompts, generated once and kept beside the state, in a file for each batch of prompts.

Which prompts share a batch is decided by the prompts alone, so that an interrupted run generates the batches that are left as it
would have.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from adarank.data.task import TaskData
from adarank.io.progress import advance, stage
from adarank.io.record import Note
from adarank.io.state import read_kept, write_state
from adarank.models import TaskModels
from adarank.models.generation import GeneratingModels
from adarank.models.greedy import answered, batches_of_rows
from adarank.models.prompts import Ids, Prompts
from adarank.recipe.job import Job
from adarank.workflow.build_networks import build_models, network_tensors

FOLDER = "answers"
"""Of a state: where its answers are."""


def with_answers(
    job: Job,
    data: Mapping[str, TaskData],
    inputs: Mapping[str, Any],
    state: Path,
    note: Note,
    models: Callable[[Job], TaskModels] = build_models,
) -> dict[str, TaskData]:
    """The tasks, those that lack answers to the prompts of their adapt and select splits with their expert's.

    Arguments:
        inputs: hashes of the job's files.
        state: folder in which the answers are kept, and found again.
        models: gives the job's networks, which hold other tensors afterwards. Called only if something has to be generated.

    Raises:
        OutputError: the answers cannot be saved.
    """
    family = job.family
    lacking = {
        task: of.examples for task, of in data.items() if isinstance(of.examples, Prompts) and of.examples.lacks_answers
    }
    if not isinstance(family, GeneratingModels) or not lacking:
        return dict(data)
    note("Generating the experts' answers")
    networks = _Networks(job, models)
    rows = {task: _rows(data[task]) for task in lacking}
    changed = dict(data)
    with stage("The experts' answers", sum(map(len, rows.values()))):
        for task, prompts in lacking.items():
            folder = state / FOLDER / _mark(job, data[task], prompts, inputs)
            answers = _answers(family, prompts, rows[task], folder, partial(networks.of, task))
            examples = family.with_answers(prompts, answers)
            changed[task] = replace(data[task], examples=examples, notes=(*data[task].notes, _note(prompts, answers)))
    return changed


class _Networks:
    """A job's networks, made when the first is needed, filled with one expert at a time."""

    def __init__(self, job: Job, make: Callable[[Job], TaskModels]) -> None:
        self._job, self._make = job, make
        self._models: TaskModels | None = None
        self._holds = ""

    def of(self, task: str) -> nn.Module:
        """A task's network with its expert's tensors."""
        if self._models is None:
            self._models = self._make(self._job)
        if self._holds != task:
            self._models.fill(network_tensors(self._job, task))
            self._holds = task
        return self._models.modules[task]


def _answers(
    family: GeneratingModels, prompts: Prompts, rows: list[int], folder: Path, network: Callable[[], nn.Module]
) -> dict[int, Ids]:
    """Row -> the expert's answer: what is kept in the folder, and what is generated anew and kept there."""
    answers: dict[int, Ids] = {}
    for number, batch in enumerate(batches_of_rows(prompts, rows)):
        file = folder / f"{number}.pt"
        known = read_kept(file) if file.exists() else None
        if known is None:
            known = answered(family, network(), prompts, batch)
            write_state(file, {str(row): ids for row, ids in known.items()}, "the experts' answers")
        answers |= {int(row): tuple(ids) for row, ids in known.items()}
        advance(len(batch))
    return answers


def _rows(data: TaskData) -> list[int]:
    """The rows that methods read without labels: to adapt on, and to judge by."""
    return sorted({*data.splits.rows["adapt"], *data.splits.rows["select"]})


def _mark(job: Job, data: TaskData, prompts: Prompts, inputs: Mapping[str, Any]) -> str:
    """What tells answers from those of other experts, prompts and settings."""
    choices = {name: choice.action for name, choice in job.network.choices.items()}
    limits = [prompts.new_tokens, prompts.most, prompts.stop]
    content = json.dumps([inputs, choices, data.fingerprint(), prompts.texts, limits], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def _note(prompts: Prompts, answers: Mapping[int, Ids]) -> str:
    """How long the answers are, for the record."""
    lengths = [len(ids) for ids in answers.values()]
    full = sum(length >= prompts.new_tokens for length in lengths)
    mean = sum(lengths) / max(1, len(lengths))
    return f"{len(lengths)} prompts answered by the expert, {mean:.1f} tokens each; {full} answers are as long as max_new_tokens lets them be ({prompts.new_tokens})"
