"""Scores of a model on each task, and the table that puts experts, base and merged models side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from adarank.data.spec import Split
from adarank.data.task import TaskData
from adarank.models.family import Family
from adarank.models.predict import predict


@dataclass(frozen=True)
class Table:
    """Scores ×100, a row per model and a column per task.

    Attributes:
        split: which split was scored.
        protocol: `disjoint`, or `transductive` when models were adapted on the scored inputs.
        rows: model -> task -> score.
        counts: task -> number of scored inputs.
        bundles: row -> kind of the bundle that it is of, whose user must know something of every input.
    """

    split: Split
    protocol: str
    counts: Mapping[str, int]
    rows: dict[str, dict[str, float]] = field(default_factory=dict)
    bundles: dict[str, str] = field(default_factory=dict)

    def mean(self, row: str) -> float:
        """Mean score over tasks."""
        scores = self.rows[row].values()
        return sum(scores) / len(scores)

    def normalised(self, row: str, reference: str = "experts") -> float | None:
        """Mean over tasks of score ÷ expert's score, in per cent; None without experts.

        Tasks whose expert scores 0 or less (a Matthews correlation may) are left out.
        """
        if reference not in self.rows:
            return None
        pairs = [(self.rows[row][task], expert) for task, expert in self.rows[reference].items() if expert > 0]
        return 100 * sum(merged / expert for merged, expert in pairs) / len(pairs) if pairs else None

    def plain(self) -> dict[str, Any]:
        """As data for JSON, with each row's mean and normalised mean."""
        means = {row: {"mean": self.mean(row), "normalised": self.normalised(row)} for row in self.rows}
        content = asdict(self)
        bundles = content.pop("bundles")
        return {**content, "task_aware": bundles, "summary": means}


def score(labels: Sequence[int], predictions: Sequence[int], metric: str) -> float:
    """Accuracy or Matthews correlation, ×100."""
    from sklearn.metrics import accuracy_score, matthews_corrcoef  # imported on use: it is slow, and merging needs none

    if metric == "matthews":
        return 100 * float(matthews_corrcoef(labels, predictions))
    return 100 * float(accuracy_score(labels, predictions))


def evaluate_task(family: Family, module: nn.Module, data: TaskData, split: Split) -> float:
    """The score of one task on a labelled split, ×100."""
    rows, logits = predict(family, module, data, split)
    return score(data.targets(rows), logits.argmax(dim=-1).tolist(), data.metric)
