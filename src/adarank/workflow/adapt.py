"""Adaptation of a job: its networks, data and spectra put on the engine, and what came out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from adarank.adapt.agreement import Judged, collapsed, first_collapse
from adarank.adapt.by_block import blocks_folder
from adarank.adapt.history import History, Learned, Progress
from adarank.adapt.methods import AdaptiveMethod
from adarank.adapt.passage import Passage
from adarank.adapt.problem import Chunk, Inputs, Predictions, Problem
from adarank.adapt.settings import AdaptSettings
from adarank.adapt.strongest import strongest_change
from adarank.adapt.top_logits import TokenTable
from adarank.adapt.weights import adapt_weights
from adarank.data.task import TaskData
from adarank.io import processes
from adarank.io.record import Note
from adarank.method import changed_tensors
from adarank.models import TaskModels
from adarank.recipe.job import Job
from adarank.spectral.blocks import Blocks
from adarank.spectral.mask_file import MaskFile
from adarank.spectral.overlap import described
from adarank.spectral.svd import stored_spectra
from adarank.workflow.build_networks import build_models, family_of, hollow_models
from adarank.workflow.heads import learned_heads, moved_heads, tasks_of_heads
from adarank.workflow.problem import problem_of, table_inputs

if TYPE_CHECKING:
    from adarank.workflow.context import RecipeContext

BODY = "body"  # the stream of the merged body that heads are learned on


@dataclass(frozen=True)
class Adaptation:
    """What adapting a job gave.

    Attributes:
        parameters: merged tensor -> the parameter that holds it.
        masks: masks and λ of the kept step; None if something else is learned.
        report: what the record says of it: losses, judgements, the step kept and why, collapse, heads.
        heads: task -> its head, where a learned one is kept.
    """

    job: Job
    parameters: Mapping[str, Tensor]
    masks: MaskFile | None
    report: dict[str, Any]
    heads: Mapping[str, Mapping[str, Tensor]]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the merged model that is not a head, in the network's order."""
        return changed_tensors(self.job.network, self.parameters, "adaptation")


def adapt_job(run: RecipeContext, method: AdaptiveMethod) -> Adaptation:
    """Adapt by a method and its settings, from a saved state if there is one."""
    job, data, settings = run.job, run.data, method.settings
    fingerprint = run.fingerprint()
    run.note("Loading the networks")
    models, passage = _networks(run, settings, fingerprint)
    predictions = run.expert_predictions(models, settings, passage)
    problem = problem_of(job, models, data, settings, predictions)
    mapped = run.folder is not None and method.factors_in_files(job.outline())
    factors = run.folder / "factors" / fingerprint[:32] if run.folder and mapped else None
    # spectra are kept beside the state, so that a run that goes on decomposes nothing anew
    kept = run.folder if method.settings.by == "model" and not mapped else None
    with stored_spectra(kept / "spectra") if kept else nullcontext():
        learned = adapt_weights(
            problem,
            method,
            job.network,
            job.recipe.device,
            run.state,
            fingerprint,
            run.progress,
            run.note,
            passage,
            factors,
        )
    exact = method.learn().precision == "float32"  # else what was judged is not quite what is kept
    effect = strongest_change(problem, learned, passage) if exact else None
    about = {name: run.about[name] for name in ("settings", "inputs", "seed")}
    masks = learned.masks and replace(learned.masks, about=about)
    heads_here = not run.keeps_heads and processes.rank() == 0
    over = _over_merged(problem, passage, learned) if passage is not None and heads_here else problem
    heads, of_heads = ({}, {}) if run.keeps_heads else learned_heads(job, over, run.note)
    if method.joint_heads and not run.keeps_heads:
        heads = moved_heads(job, problem)
        of_heads = {"joint_heads": list(heads)}
    edge = {"start_at_edge": method.grid.at_edge(learned.history.starts)}
    of_loop = report(learned.history, job, settings, data) | edge | _of_masks(learned) | kept_mass(predictions)
    finite = {kind: round(share, 5) for kind, share in learned.origins.items() if math.isfinite(share)}
    of_loop |= {"origins": finite} if len(finite) > 1 else {}  # NaN predictions agree with nothing
    of_loop |= {"strongest_change": effect} if effect else {}
    return Adaptation(job, learned.parameters, masks, of_loop | of_heads, heads)


def _networks(run: RecipeContext, settings: AdaptSettings, fingerprint: str) -> tuple[TaskModels, Passage | None]:
    """The networks of a job; without weights, and what runs them a block at a time, where blocks are learned."""
    if settings.by == "model" or run.folder is None:
        return build_models(run.job), None
    models, folder = hollow_models(run.job), run.folder / blocks_folder(fingerprint)
    batches = {task: inputs.step(0)[1] for task, inputs in table_inputs(run.job, run.data, settings).items()}
    return models, Passage(models, run.job.network, family_of(run.job).logits, batches, folder)


def _over_merged(problem: Problem, passage: Passage, learned: Learned) -> Problem:
    """The problem with the merged body's results on all inputs that heads are learned from."""
    chunks = {task: partial(_for_heads, problem.inputs[task]) for task in tasks_of_heads(problem)}
    if chunks:
        passage.bring(BODY, chunks, lambda place: passage.fill(place, learned.parameters))
    return replace(problem, forward=passage.after(BODY))


def _for_heads(inputs: Inputs) -> Iterator[Chunk]:
    yield from inputs.adapted_on()
    yield from inputs.judged_on()


def _of_masks(learned: Learned) -> dict[str, Any]:
    """What a record says of masks, and of blocks where these were learned one at a time."""
    said: dict[str, Any] = {"blocks": list(learned.blocks)} if learned.blocks else {}
    if learned.masks is not None and learned.masks.masks:
        kept = [round(v, 5) for v in learned.history.kept]
        said |= {"components_kept": learned.masks.kept_share(), "kept": kept, "mask": learned.masks.kind}
        said |= spectra_of(learned.factors, learned.masks)
    return said


def kept_mass(predictions: Mapping[str, Predictions]) -> dict[str, Any]:
    """Of generating models: task -> mean probability, by its expert, of the tokens whose logits were kept."""
    tables = {task: each.logits for task, each in predictions.items() if isinstance(each.logits, TokenTable)}
    return {"top_logits_mass": {task: round(table.tokens.mass, 5) for task, table in tables.items()}} if tables else {}


def spectra_of(factors: Mapping[str, Blocks], masks: MaskFile) -> dict[str, Any]:
    """What a record says of the task vectors' spectra and overlap, before and after; nothing where no matrix was decomposed."""
    if not masks.masks or not factors:
        return {}
    with torch.no_grad():
        return {"spectra": described(factors, masks.masks, masks.lam, masks.tasks)}


def telling_of_collapse(note: Note, progress: Progress | None) -> Progress:
    """Progress that says when a task is first seen to have collapsed, as it is seen."""
    seen: dict[str, int] = {}

    def step(history: History, steps: int) -> None:
        if history.step <= 1:  # another adaptation began
            seen.clear()
        for task, at in first_collapse(history.judged).items():
            if task not in seen:
                seen[task] = at
                now, start = history.judged[at][task], history.judged[0][task]
                note(
                    f"{task} has collapsed at step {at}: it gives one class to {100 * now.largest:.0f}% of its inputs "
                    f"({100 * start.largest:.0f}% at the start, {100 * now.expert_largest:.0f}% by its expert)."
                )
        if progress is not None:
            progress(history, steps)

    return step


def report(
    history: History,
    job: Job,
    settings: AdaptSettings,
    data: Mapping[str, TaskData],
    kept: Judged | None = None,
) -> dict[str, Any]:
    """What a record says of a run of the loop with a judge.

    Arguments:
        kept: task -> signals of what is kept, if that is not one step of all tasks.
    """
    choice = history.choice
    assert choice is not None  # the engine has ended
    # with keep: best only judged steps are kept, and the last one always is judged
    start, kept = history.judged[0], kept or history.judged_kept
    return {
        "protocol": job.recipe.data.protocol,
        "starts": [tried.named() for tried in history.starts],
        "steps": history.step,
        "step_kept": choice.step,
        "share_kept": choice.share,
        "why_kept": choice.why,
        "rolled_back": choice.rolled_back,
        "seconds_in_steps": round(history.seconds, 3),
        "seconds_judging": round(history.judging_seconds, 3),
        "resumed_from": history.resumed_from,
        "losses": {task: [round(v, 5) for v in values] for task, values in history.losses.items()},
        "judged_on": {task: inputs.judged[1] for task, inputs in table_inputs(job, data, settings).items()},
        "judged": {str(step): _rounded(seen) for step, seen in history.judged.items()},
        "way_back": [
            {"step": point.step, "share": point.share, "judged": _rounded(point.judged)}
            for point in history.line_points
        ],
        "largest_class_share": {
            task: {"before": start[task].largest, "after": signals.largest, "expert": signals.expert_largest}
            for task, signals in kept.items()
        },
        "collapsed": [task for task, signals in kept.items() if collapsed(signals, start[task])],
        "collapse_seen": first_collapse(history.judged),
        "splits": {task: {split: len(rows) for split, rows in of.splits.rows.items()} for task, of in data.items()},
        "notes": [f"{task}: {text}" for task, of in data.items() for text in of.notes],
    }


def _rounded(seen: Judged) -> dict[str, dict[str, float]]:
    return {
        task: {name: round(value, 5) for name, value in signals.numbers().items()} for task, signals in seen.items()
    }
