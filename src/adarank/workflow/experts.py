"""The experts' own outputs on their tasks' unlabelled inputs: computed once, kept beside the state of adaptation."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adarank.adapt.agreement import Judge, signals
from adarank.adapt.objectives import NEED_EXPERT, NEED_FEATURES
from adarank.adapt.settings import AdaptSettings
from adarank.data.spec import Split
from adarank.data.task import TaskData
from adarank.io.checkpoint import DAMAGED
from adarank.io.record import Note
from adarank.io.state import write_state
from adarank.models import TaskModels
from adarank.models.head_inputs import Pool, head_inputs, head_parts
from adarank.models.predict import predict
from adarank.recipe.job import Job
from adarank.workflow.build_networks import family_of, network_tensors

FILE = "experts.pt"


@dataclass(frozen=True)
class Outputs:
    """What an expert says of its task's inputs. Rows are those of the task's table; uncomputed ones are 0.

    Attributes:
        logits: (rows, classes).
        features: (rows, width) inputs of its head, if an objective compares them.
    """

    logits: Tensor
    features: Tensor | None = None


def watched(data: TaskData, settings: AdaptSettings) -> tuple[TaskData, Split]:
    """The inputs that a task is judged on: of select, or of adapt where select is empty; `check_inputs` at most."""
    split: Split = "select" if data.splits.rows["select"] else "adapt"
    return data.spread(split, settings.check_inputs), split


def expert_outputs(
    job: Job,
    models: TaskModels,
    data: Mapping[str, TaskData],
    settings: AdaptSettings,
    mark: Any = None,
    folder: Path | None = None,
    note: Note = lambda text: None,
) -> dict[str, Outputs]:
    """Every expert's outputs on the inputs that its task adapts on (if its objective needs them) and is judged on.

    The models hold the base's tensors afterwards, if anything had to be computed.

    Arguments:
        mark: what tells the experts and their data from others, as plain data.
        folder: where outputs are kept; those found there with the same mark are not computed again.
    """
    wanted = {task: _wanted(own, settings) for task, own in data.items()}
    rows = {task: [[split, *own.splits.rows[split]] for own, split in parts] for task, parts in wanted.items()}
    kinds = {task: bool(NEED_FEATURES & settings.weights(task).keys()) for task in data}
    fingerprint = hashlib.sha256(json.dumps([mark, rows, kinds], sort_keys=True).encode()).hexdigest()
    found = _read(folder / FILE, fingerprint) if folder else None
    if found is not None:
        return found
    note("Asking the experts")
    found = {}
    for task, parts in wanted.items():
        models.fill(network_tensors(job, task))
        found[task] = ask(job, models, task, parts, kinds[task])
    models.fill(network_tensors(job, "base"))
    if folder:
        outputs = {task: {"logits": own.logits, "features": own.features} for task, own in found.items()}
        write_state(folder / FILE, {"fingerprint": fingerprint, "outputs": outputs}, "the experts' outputs")
    return found


def judge_of(
    job: Job,
    models: TaskModels,
    data: Mapping[str, TaskData],
    settings: AdaptSettings,
    experts: Mapping[str, Outputs],
    most: int | None = None,
) -> Judge:
    """Compares what the models hold with the experts' outputs, on the watched inputs. Reads no label.

    Arguments:
        most: look at so many of them per task, spread evenly.
    """
    inputs = {task: watched(own, settings) for task, own in data.items()}
    if most is not None:
        inputs = {task: (own.spread(split, most), split) for task, (own, split) in inputs.items()}

    def judge(step: int) -> Any:
        found = {}
        for task, (own, split) in inputs.items():
            rows, logits = predict(family_of(job), models.modules[task], own, split)
            found[task] = signals(logits, experts[task].logits[rows])
        return found

    return judge


def _wanted(data: TaskData, settings: AdaptSettings) -> list[tuple[TaskData, Split]]:
    """What an expert is asked: all it adapts on, if its objective compares with it, and what it is judged on."""
    own, split = watched(data, settings)
    if not (NEED_EXPERT | NEED_FEATURES) & settings.weights(data.name).keys():
        return [(own, split)]
    return [(data, "adapt")] if split == "adapt" else [(data, "adapt"), (own, split)]


def ask(
    job: Job,
    models: TaskModels,
    task: str,
    parts: list[tuple[TaskData, Split]],
    features: bool,
    pool: Pool | None = None,
) -> Outputs:
    """What a task's network, as the models hold it now, says of some inputs.

    Arguments:
        parts: splits of the task, or of a part of its rows.
        features: keep what its head is given, too, brought to one vector per input by `pool`.
    """
    module = models.modules[task]
    heads = head_parts(models, task) if features else []
    logits, widths = [], []
    rows: list[int] = []
    for own, split in parts:
        with head_inputs(module, heads, pool) as seen:
            asked, answers = predict(family_of(job), module, own, split)
        rows += asked
        logits.append(answers)
        widths += [own.cpu() for own in seen]
    count = len(parts[0][0].examples.lengths)
    return Outputs(_by_row(rows, torch.cat(logits), count), _by_row(rows, torch.cat(widths), count) if widths else None)


def _by_row(rows: list[int], values: Tensor, count: int) -> Tensor:
    found = torch.zeros(count, values.shape[-1])
    found[rows] = values
    return found


def _read(path: Path, fingerprint: str) -> dict[str, Outputs] | None:
    """What is kept, or None if there is nothing, it is damaged, or it is of others: then it is computed anew."""
    try:
        content = torch.load(path, weights_only=True)
        if content["fingerprint"] != fingerprint:
            return None
        return {task: Outputs(own["logits"], own["features"]) for task, own in content["outputs"].items()}
    except (pickle.UnpicklingError, *DAMAGED):
        return None
