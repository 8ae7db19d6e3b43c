"""Scores over the number of tasks that are merged: mean and standard error over subsets of the tasks.

    score(N) = mean over subsets S of N tasks of mean_{t∈S} score_t(merge of S);  standard error: s / √(number of subsets)

All subsets, or where there are more than `most` of one size a seeded choice of them. Of one task the merge about the average is
its expert.

Figure 6 of CART (Choi et al. 2024, arXiv:2412.12153).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any, ClassVar

import torch
from pydantic import Field

from adarank.analysis import drawing
from adarank.analysis.bench import Bench
from adarank.analysis.figure import Figure, Row, mean, values_of, where
from adarank.errors import RecipeError
from adarank.method import Context, MergeMethod
from adarank.recipe.registry import METHODS

Subset = tuple[str, ...]


class TaskCount(Figure):
    """Each method's scores on subsets of the tasks."""

    name: ClassVar[str] = "task-count"
    summary: ClassVar[str] = "scores over the number of merged tasks: mean and standard error over subsets"
    source: ClassVar[str] = "CART, Figure 6"

    methods: Mapping[str, Mapping[str, Any]] = Field(
        {"average": {}, "task_arithmetic": {"lambda": 0.3}, "cart": {"rank": 0.08, "lambda": 1.0}},
        description="method -> its parameters; methods without data that give one model",
    )
    counts: tuple[int, ...] = Field((), description="numbers of tasks; by default from 1 to all")
    most: int = Field(70, ge=1, description="subsets of one size at most")
    seed: int = Field(0, description="of the choice of subsets, where there are more")

    def check(self, bench: Bench) -> None:
        """Refuse methods that need data or give no single model, and counts that no subset has."""
        super().check(bench)
        for name in self.methods:
            kind = METHODS.named(name, f"{self.name}: methods: unknown method")
            if kind.data or kind.in_use:
                why = f"reads {kind.data}" if kind.data else "gives no single model"
                raise RecipeError(
                    f"{self.name}: methods: '{name}' {why}. Give methods without data that give one model."
                )
            _method(bench, name, self.methods[name]).check(bench.network)
        wrong = [count for count in self.counts if not 1 <= count <= len(bench.tasks)]
        if wrong:
            raise RecipeError(f"{self.name}: counts: {wrong[0]} tasks, and there are {len(bench.tasks)}.")

    def parts(self, bench: Bench) -> list[str]:
        """Every method on every subset."""
        return list(self._points(bench))

    def cost(self, bench: Bench) -> Mapping[str, int]:
        """Merges, and the inputs of each subset's tasks."""
        points = self._points(bench).values()
        inputs = sum(bench.inputs(task) for _, subset in points for task in subset)
        return {"merges": len(points), "forward passes of single inputs": inputs}

    def compute(self, bench: Bench, part: str) -> list[Row]:
        """One subset by one method: a row per task of it."""
        name, subset = self._points(bench)[part]
        network = bench.network
        some = replace(
            network,
            experts={task: network.experts[task] for task in subset},
            heads={task: network.heads[task] for task in subset},
        )
        method = _method(bench, name, self.methods[name])
        bench.fill(method.run(Context(some, bench.job.recipe.device)).tensors)
        measured = {task: bench.measure(task) for task in subset}
        return [
            {
                "method": name,
                "count": len(subset),
                "subset": " ".join(subset),
                "task": task,
                "metric": bench.data[task].metric,
                "score": measured[task].score,
                "loss": measured[task].loss,
            }
            for task in subset
        ]

    def sentences(self, rows: Sequence[Row]) -> list[str]:
        """Each method's mean from the fewest to the most tasks."""
        said = []
        for method in values_of(rows, "method"):
            curve = statistics(where(rows, method=method))
            first, last = min(curve), max(curve)
            said.append(
                f"{method}: mean score {curve[first][0]:.1f} of {first} task(s), {curve[last][0]:.1f} of {last} "
                f"({curve[last][0] - curve[first][0]:+.1f})"
            )
        return said

    def draw(self, rows: Sequence[Row]) -> Any:
        """Means with a bar of one standard error; below, the same of the losses."""
        figure, axes = drawing.grid(1, 2, 3.4, 2.6)
        for axis, column in zip(axes[0], ("score", "loss"), strict=True):
            curves = {method: statistics(where(rows, method=method), column) for method in values_of(rows, "method")}
            drawing.lines(
                axis,
                {
                    method: [(float(count), value) for count, (value, _) in curve.items()]
                    for method, curve in curves.items()
                },
                ("merged tasks", f"mean {column}"),
                errors={method: [error for _, error in curve.values()] for method, curve in curves.items()},
            )
            axis.set_xticks(sorted(values_of(rows, "count")))
        drawing.legend_below(figure, axes[0][0])
        return figure

    def _points(self, bench: Bench) -> dict[str, tuple[str, Subset]]:
        """Name -> method, subset."""
        counts = self.counts or tuple(range(1, len(bench.tasks) + 1))
        subsets = [subset for count in counts for subset in self._subsets(bench.tasks, count)]
        return {f"{method}: {' '.join(subset)}": (method, subset) for subset in subsets for method in self.methods}

    def _subsets(self, tasks: Sequence[str], count: int) -> list[Subset]:
        every = list(combinations(tasks, count))
        if len(every) <= self.most:
            return every
        generator = torch.Generator().manual_seed(self.seed + count)
        chosen = torch.randperm(len(every), generator=generator)[: self.most]
        return [every[place] for place in sorted(chosen.tolist())]


def statistics(rows: Sequence[Row], column: str = "score") -> dict[int, tuple[float, float]]:
    """Count -> mean over its subsets of the mean over tasks, and its standard error (0 of one subset); rows of one method."""
    curve = {}
    for count in sorted(values_of(rows, "count")):
        here = where(rows, count=count)
        means = [mean([row[column] for row in where(here, subset=subset)]) for subset in values_of(here, "subset")]
        middle = mean(means)
        squares = sum((value - middle) ** 2 for value in means)
        error = math.sqrt(squares / (len(means) - 1) / len(means)) if len(means) > 1 else 0.0
        curve[int(count)] = (middle, error)
    return curve


def _method(bench: Bench, name: str, parameters: Mapping[str, Any]) -> MergeMethod:
    changed = {"merge_method": name, "parameters": dict(parameters), "adapt": None}
    return bench.job.recipe.model_copy(update=changed).method(bench.network.merged())
