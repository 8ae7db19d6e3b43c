"""Tables of tasks and models: scores with what is certain of them, and agreement with the experts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from adarank.data.metrics import CHOICE_ACCURACY, EXACT_MATCH, less_is_better
from adarank.errors import DataError
from adarank.report.figures import radar

_SHARES = ("accuracy", EXACT_MATCH, CHOICE_ACCURACY)  # metrics that are a share of the inputs, and so have an interval
_Z = 1.959964  # 95% of a normal distribution lie within


def interval(share: float, inputs: int) -> tuple[float, float]:
    """The 95% interval of a share that was seen on so many inputs. Source: Wilson 1927, JASA 22, 209-212.

    Example:
        low, high = interval(0.9, 100)  # 0.826, 0.945
    """
    if inputs < 1:
        return 0.0, 1.0
    centre = share + _Z**2 / (2 * inputs)
    width = _Z * math.sqrt(share * (1 - share) / inputs + _Z**2 / (4 * inputs**2))
    whole = 1 + _Z**2 / inputs
    # rounding may put the share itself outside where it is 0 or 1
    return min(share, max(0.0, (centre - width) / whole)), max(share, min(1.0, (centre + width) / whole))


def cell(value: float, inputs: int | None, expert: float | None = None) -> dict[str, Any]:
    """One number of a table, ×100.

    Arguments:
        inputs: what it rests on, where it is a share of them; None for another metric.
        expert: what the task's expert has, where the table has one.
    """
    ends = None if inputs is None or not 0 <= value <= 100 else interval(value / 100, inputs)
    return {
        "value": round(value, 2),
        "interval": None if ends is None else tuple(round(100 * end, 1) for end in ends),
        "normalised": round(100 * value / expert, 1) if expert is not None and expert > 0 else None,
    }


def _scored(score: float, inputs: int, expert: float | None, metric: str) -> dict[str, Any]:
    """A score as `cell`: with an interval where it is a share of the inputs; of a loss, less is better than the expert."""
    shown = cell(score, inputs if metric in _SHARES else None, expert)
    if less_is_better(metric):
        shown["normalised"] = round(100 * expert / score, 1) if expert is not None and score > 0 else None
    return shown


def score_table(scores: Mapping[str, Any]) -> dict[str, Any]:
    """What `adarank evaluate --json` printed, as the page shows it: a row per task, a column per model.

    Raises:
        DataError: it is something else.
    """
    try:
        rows, counts, metrics = scores["rows"], scores["counts"], scores.get("metrics", {})
        experts = rows.get("experts", {})
        table = [
            {
                "task": task,
                "inputs": int(count),
                "cells": [
                    _scored(float(row[task]), int(count), experts.get(task), metrics.get(task, "accuracy"))
                    for row in rows.values()
                ],
            }
            for task, count in counts.items()
        ]
        means = [scores["summary"][model] for model in rows]
        series = {
            model: [row["cells"][place]["normalised"] for row in table] for place, model in enumerate(rows) if experts
        }
        return {
            "radar": radar("Score, % of the expert's.", list(counts), series) if series else None,
            "split": str(scores["split"]),
            "protocol": str(scores["protocol"]),
            "models": list(rows),
            "rows": table,
            "means": [
                {"value": round(mean["mean"], 2), "normalised": mean["normalised"] and round(mean["normalised"], 1)}
                for mean in means
            ],
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"scores: not what adarank evaluate --json prints ({type(error).__name__}: {error}). Give a file with that."
        ) from None


def judged_kept(block: Mapping[str, Any]) -> Mapping[str, Mapping[str, float]]:
    """task -> signals of what a run of the loop kept: a judged step, one for each task, or a point on the line to one."""
    for point in block["way_back"]:
        if (point["step"], point["share"]) == (block["step_kept"], block["share_kept"]):
            of_point: Mapping[str, Mapping[str, float]] = point["judged"]
            return of_point
    return {task: block["judged"][str(step)][task] for task, step in steps_kept(block).items()}


def steps_kept(block: Mapping[str, Any]) -> dict[str, int]:
    """task -> the step of which its weights are kept."""
    return block.get("steps_kept") or dict.fromkeys(block["judged"]["0"], block["step_kept"])


def kept_in_words(block: Mapping[str, Any]) -> str:
    """Which step was kept: `step 40 of 50`, half-way to it, or one of its own for each task."""
    if block.get("steps_kept"):
        each = ", ".join(f"{task} {step}" for task, step in block["steps_kept"].items())
        return f"the step that suits each task best, of {block['steps']} ({each})"
    way = "" if block["share_kept"] == 1 else f", {block['share_kept']:g} of the way to it"
    return f"step {block['step_kept']} of {block['steps']}{way}"


def agreement_table(block: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row per task: agreement with its expert at the start and as kept, the largest class, and whether it collapsed."""
    start, kept = block["judged"]["0"], judged_kept(block)
    return [_agreement(task, start[task], signals, task in block["collapsed"]) for task, signals in kept.items()]


def _agreement(task: str, start: Mapping[str, float], kept: Mapping[str, float], collapsed: bool) -> dict[str, Any]:
    inputs = int(kept["inputs"])
    return {
        "task": task,
        "inputs": inputs,
        "start": cell(100 * start["agreement"], inputs),
        "kept": cell(100 * kept["agreement"], inputs),
        "divergence": float(kept["divergence"]),
        "largest": round(100 * kept["largest"], 1),
        "expert_largest": round(100 * kept["expert_largest"], 1),
        "collapsed": collapsed,
    }
