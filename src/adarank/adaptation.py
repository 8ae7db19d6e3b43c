"""Adaptation of a job: its networks, data and spectra put on the engine, and what came out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adarank.adapt.live import LiveWeights
from adarank.adapt.loop import AdaptSettings, History, Loss, Progress, adapt
from adarank.adapt.objective import entropy, self_label
from adarank.checkpoint import check_finite
from adarank.data.spec import Split
from adarank.data.task import TaskData
from adarank.evaluate import largest_class_share, predict
from adarank.masks import MaskFile
from adarank.models import TaskModels
from adarank.networks import build_models, family_of, network_tensors
from adarank.plan import Job, Note

_WATCHED = 256  # inputs per task on which collapse is looked for


@dataclass(frozen=True)
class Adaptation:
    """What adapting a job gave.

    Attributes:
        masks: masks and λ.
        report: what the record says of it: losses, components kept, collapse.
    """

    job: Job
    live: LiveWeights
    masks: MaskFile
    report: dict[str, Any]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the merged model that is not a head, in the network's order."""
        for name in self.job.network.tensors:
            own = self.live.parameters.get(name)
            yield name, self.job.network.kept(name) if own is None else check_finite(own.detach(), name, "adaptation")


def adapt_job(
    job: Job,
    data: Mapping[str, TaskData],
    about: Mapping[str, Any],
    state: Path,
    note: Note,
    progress: Progress | None,
) -> Adaptation:
    """Adapt as the job's recipe says, from a saved state if there is one.

    Arguments:
        about: the settings, the inputs' hashes and the seed: what, beside the data, decides every number.
        state: file in which the state is kept.
    """
    method, settings = job.recipe.adaptation()
    note("Loading the networks")
    models = build_models(job)
    note("Decomposing the task vectors" if method.spectra else "Reading the task vectors")
    live = method.start(job.network, models.shared, settings, job.recipe.device)
    losses = task_losses(job, models, data, settings)
    live.write()
    before = _watch(job, models, data)
    note("Adapting")
    history = adapt(live, losses, settings, state, _fingerprint(job, about, data), progress)
    after = _watch(job, models, data)
    watched = {task: {"before": before[task], "after": after[task]} for task in data}
    masks = live.mask_file(job.network.tasks, method.origin, {k: about[k] for k in ("settings", "inputs", "seed")})
    return Adaptation(job, live, masks, _report(history, live, job, watched, data))


def task_losses(job: Job, models: TaskModels, data: Mapping[str, TaskData], settings: AdaptSettings) -> dict[str, Loss]:
    """task -> objective on the task's batch of a step.

    For `self-label` every expert is run once over its adapt inputs; the models hold the base's tensors afterwards.
    """
    family = family_of(job)
    targets = expert_logits(job, models, data) if settings.objective == "self-label" else {}

    def loss_of(task: str) -> Loss:
        def loss(step: int) -> Tensor:
            rows = data[task].adapt_rows(step, settings.batch_size)
            batch = {k: v.to(job.recipe.device) for k, v in data[task].examples.batch(rows).items()}
            logits = family.logits(models.modules[task], batch)
            return self_label(logits, targets[task][list(rows)].to(logits)) if targets else entropy(logits)

        return loss

    return {task: loss_of(task) for task in job.network.tasks}


def expert_logits(job: Job, models: TaskModels, data: Mapping[str, TaskData]) -> dict[str, Tensor]:
    """task -> the expert's logits on the task's adapt inputs, by row number (zeros for all other rows)."""
    found = {}
    for task in job.network.tasks:
        models.fill(network_tensors(job, task))
        rows, logits = predict(family_of(job), models.modules[task], data[task], "adapt")
        found[task] = torch.zeros(len(data[task].examples.lengths), logits.shape[-1])
        found[task][rows] = logits
    models.fill(network_tensors(job, "base"))
    return found


def _watch(job: Job, models: TaskModels, data: Mapping[str, TaskData]) -> dict[str, float]:
    """task -> share of the most frequent prediction on unlabelled select inputs (adapt inputs where there are none)."""
    shares = {}
    for task, own in data.items():
        split: Split = "select" if own.splits.rows["select"] else "adapt"
        _, logits = predict(family_of(job), models.modules[task], own.first(split, _WATCHED), split)
        shares[task] = largest_class_share(logits)
    return shares


def collapsed(before: float, after: float) -> bool:
    """True if a task came to predict one class nearly always and did not do so before."""
    return after >= 0.95 and after > before + 0.03


def _report(
    history: History,
    live: LiveWeights,
    job: Job,
    watched: Mapping[str, Mapping[str, float]],
    data: Mapping[str, TaskData],
) -> dict[str, Any]:
    return {
        "protocol": job.recipe.data.protocol,
        "steps": history.step,
        "step_kept": "the last one; no label was read",
        "seconds_in_steps": round(history.seconds, 3),
        "resumed_from": history.resumed_from,
        "components_kept": live.kept_share(),
        "losses": {task: [round(v, 5) for v in values] for task, values in history.losses.items()},
        "kept": [round(v, 5) for v in history.kept],
        "largest_class_share": watched,
        "collapsed": [task for task, seen in watched.items() if collapsed(seen["before"], seen["after"])],
        "splits": {task: {split: len(rows) for split, rows in own.splits.rows.items()} for task, own in data.items()},
        "notes": [f"{task}: {text}" for task, own in data.items() for text in own.notes],
    }


def _fingerprint(job: Job, about: Mapping[str, Any], data: Mapping[str, TaskData]) -> str:
    """Identifies what an adaptation is of. Not the machine: a run may be taken elsewhere, at the cost of its last bits."""
    choices = {name: choice.action for name, choice in job.network.choices.items()}
    rows = {task: own.fingerprint() for task, own in data.items()}
    settings = {
        **about["settings"],
        "adapt": {k: v for k, v in about["settings"]["adapt"].items() if k != "save_every"},
    }
    text = json.dumps([settings, about["inputs"], about["seed"], choices, rows], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
