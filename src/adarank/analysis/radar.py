"""Each task's score by base, experts and outputs, as shares of the experts' on a radar.

Figures 4 and 6 of AdaRank (Lee et al. 2025, arXiv:2503.22178).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import cos, pi
from typing import Any, ClassVar

from adarank.analysis import drawing
from adarank.analysis.bench import Bench
from adarank.analysis.figure import Figure, Row, mean, values_of, where
from adarank.data.metrics import less_is_better

EXPERTS = "experts"


class Radar(Figure):
    """Scores of models by task."""

    name: ClassVar[str] = "radar"
    summary: ClassVar[str] = "each task's score by base, experts and outputs, as a share of its expert's"
    source: ClassVar[str] = "AdaRank, Figures 4 and 6"
    outputs: ClassVar[str] = "folders that merge wrote"

    def parts(self, bench: Bench) -> list[str]:
        """The models; the experts first, as the others are shares of their scores."""
        return [EXPERTS, *(model for model in bench.scorers if model != EXPERTS)]

    def cost(self, bench: Bench) -> Mapping[str, int]:
        """Every model on every input."""
        return {"forward passes of single inputs": len(bench.scorers) * bench.all_inputs()}

    def compute(self, bench: Bench, part: str) -> list[Row]:
        """One model: a row per task."""
        measured = bench.scorers[part]()
        return [
            {
                "model": part,
                "task": task,
                "metric": bench.data[task].metric,
                "score": measured[task].score,
                "loss": measured[task].loss,
                "inputs": bench.inputs(task),
            }
            for task in bench.tasks
        ]

    def sentences(self, rows: Sequence[Row]) -> list[str]:
        """Every model's mean and its weakest task."""
        said = []
        for model in values_of(rows, "model"):
            shares = relative(rows, model)
            weakest = min(shares, key=lambda task: shares[task]) if shares else ""
            text = f"; furthest from its expert: {weakest} ({100 * shares[weakest]:.1f}% of its score)" if shares and model != EXPERTS else ""  # fmt: skip
            scores = [float(row["score"]) for row in where(rows, model=model) if not less_is_better(row["metric"])]
            losses = [float(row["loss"]) for row in where(rows, model=model)]
            of = f"mean score {mean(scores):.1f}, " if scores else ""
            said.append(f"{model}: {of}mean loss {mean(losses):.3f}{text}")
        return said

    def draw(self, rows: Sequence[Row]) -> Any:
        """One closed line per model; 100 is the expert."""
        figure, axes = drawing.grid(1, 1, 5.4, 4.4, polar=True)
        axis, tasks = axes[0][0], values_of(rows, "task")
        angles = [2 * pi * place / len(tasks) for place in range(len(tasks))]
        series = {}
        for model in values_of(rows, "model"):
            shares = relative(rows, model)
            points = [(angle, 100 * shares.get(task, 0.0)) for angle, task in zip(angles, tasks, strict=True)]
            series[str(model)] = [*points, *points[:1]]
        drawing.lines(axis, series, ("", ""), "score, % of the expert's")
        axis.set_xticks(angles, tasks)
        for name, angle in zip(axis.get_xticklabels(), angles, strict=True):
            beside = round(cos(angle), 6)
            name.set_horizontalalignment("left" if beside > 0 else "right" if beside < 0 else "center")
        axis.set_ylim(bottom=0)
        drawing.legend_below(figure, axis)
        return figure


def relative(rows: Sequence[Row], model: Any) -> dict[str, float]:
    """Task -> a model's score ÷ its expert's, of a loss the expert's ÷ its own; without tasks where that means nothing."""
    experts = {row["task"]: row for row in where(rows, model=EXPERTS)}
    shares = {}
    for row in where(rows, model=model):
        above, below = float(row["score"]), float(experts[row["task"]]["score"])
        if less_is_better(row["metric"]):
            above, below = below, above
        if below > 0:
            shares[str(row["task"])] = max(0.0, above / below)
    return shares
