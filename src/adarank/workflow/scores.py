"""Scores of a model on each task, and the table that puts experts, base and merged models side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import nn

from adarank.data.answers import answer_score
from adarank.data.metrics import LOSS, ClassScore, class_scores, has_loss, less_is_better, score
from adarank.data.spec import Split
from adarank.data.task import TaskData
from adarank.models.family import Family
from adarank.models.generation import GeneratingModels
from adarank.models.predict import predict
from adarank.models.text_heads import SpanExamples
from adarank.models.text_scores import score_text


@dataclass(frozen=True)
class Table:
    """Scores in per cent (losses and perplexities as they are), a row per model and a column per task.

    Attributes:
        split: which split was scored.
        protocol: `disjoint`, or `transductive` when models were adapted on the scored inputs.
        rows: model -> task -> score.
        counts: task -> number of scored inputs.
        bundles: row -> kind of the bundle that it is of, whose user must know something of every input.
        metrics: task -> what it is scored by; accuracy where a task is not in it.
        source: what measured, where that was not adarank.
        notes: what else is to be said of the scores, in sentences.
        classes: model -> task -> precision, recall and F1 of each class, where they were wanted.
    """

    split: Split
    protocol: str
    counts: Mapping[str, int]
    rows: dict[str, dict[str, float]] = field(default_factory=dict)
    bundles: dict[str, str] = field(default_factory=dict)
    metrics: Mapping[str, str] = field(default_factory=dict)
    classes: dict[str, dict[str, tuple[ClassScore, ...]]] = field(default_factory=dict)
    source: str = ""
    notes: tuple[str, ...] = ()

    def metric(self, task: str) -> str:
        """What a task is scored by."""
        return self.metrics.get(task, "accuracy")

    def averaged(self) -> list[str]:
        """The tasks that means are over: those scored in per cent; where there are none, all."""
        shares = [task for task in self.counts if not less_is_better(self.metric(task))]
        return shares or list(self.counts)

    def mean(self, row: str) -> float:
        """Mean score over the tasks of `averaged`."""
        scores = [self.rows[row][task] for task in self.averaged()]
        return sum(scores) / len(scores)

    def normalised(self, row: str, reference: str = "experts") -> float | None:
        """Mean over tasks of score ÷ expert's score, of losses and perplexities the expert's ÷ its own, in per cent; None without experts.

        So 100 is as good as the experts, and more is better whatever the metric. Tasks whose expert scores 0 or less
        (a correlation may) are left out, and losses of 0.
        """
        if reference not in self.rows:
            return None
        pairs = [
            (expert, self.rows[row][task]) if less_is_better(self.metric(task)) else (self.rows[row][task], expert)
            for task, expert in self.rows[reference].items()
        ]
        shares = [above / below for above, below in pairs if below > 0]
        return 100 * sum(shares) / len(shares) if shares else None

    def plain(self) -> dict[str, Any]:
        """As data for JSON, with each row's mean and normalised mean."""
        means = {row: {"mean": self.mean(row), "normalised": self.normalised(row)} for row in self.rows}
        content = asdict(self)
        bundles = content.pop("bundles")
        for name in ("classes", "source", "notes"):
            if not content[name]:
                del content[name]
        return {**content, "task_aware": bundles, "summary": means}


@dataclass(frozen=True)
class TaskScore:
    """What a model comes to on one task.

    Attributes:
        value: its score, as `data.metrics` counts it.
        classes: of each class; empty unless wanted.
        loss: beside the score; NaN unless wanted.
    """

    value: float
    classes: tuple[ClassScore, ...] = ()
    loss: float = math.nan


def measure_task(
    family: Family, module: nn.Module, data: TaskData, split: Split, per_class: bool = False, loss: bool = False
) -> TaskScore:
    """The score of one task on a labelled split, with its loss and the scores of each of its classes, if they are wanted."""
    if isinstance(family, GeneratingModels):
        mean = score_text(family, module, replace(data, metric=LOSS), split) if loss else math.nan
        return TaskScore(score_text(family, module, data, split), loss=mean)
    rows, logits = predict(family, module, data, split)
    labels = data.targets(rows)
    if isinstance(data.examples, SpanExamples):
        answers = [label if isinstance(label, tuple) else () for label in labels]
        return TaskScore(100 * answer_score(answers, data.examples.answers(rows, logits), data.metric))  # type: ignore[arg-type]
    value = score(labels, logits, data.metric, data.problem, data.classes)
    classes = class_scores(labels, logits, data.problem, data.classes) if per_class else ()
    known = loss and has_loss(data.problem)
    return TaskScore(value, classes, score(labels, logits, LOSS, data.problem) if known else math.nan)


def evaluate_task(family: Family, module: nn.Module, data: TaskData, split: Split) -> float:
    """The score of one task on a labelled split, as `data.metrics` counts it."""
    return measure_task(family, module, data, split).value
