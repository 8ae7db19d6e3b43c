"""Effective ranks: how many top components hold a share of each task vector's energy.

    rank = min { k : Σ_{r≤k} σ_r² ≥ energy · Σ_r σ_r² }

Figure 3 of AdaRank (Lee et al. 2025, arXiv:2503.22178), here of every matrix, and about the average too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import Field

from adarank.analysis import drawing
from adarank.analysis.bench import Bench
from adarank.analysis.figure import Figure, Row, mean, values_of, where
from adarank.spectral.svd import effective_rank, singular_values

ABOUT = {"pretrained": "about the base", "average": "about the average"}


class Ranks(Figure):
    """Effective rank of every matrix's task vectors, about the base and about the average."""

    name: ClassVar[str] = "ranks"
    summary: ClassVar[str] = "effective ranks of every matrix and task, about the base and about the average"
    source: ClassVar[str] = "AdaRank, Figure 3"
    data: ClassVar[str] = ""
    decomposed: ClassVar[bool] = True

    energy: float = Field(0.95, gt=0, le=1, description="share of Σσ² that the counted components hold")

    def parts(self, bench: Bench) -> list[str]:
        """The matrices."""
        return bench.matrices

    def cost(self, bench: Bench) -> Mapping[str, int]:
        """Singular values of every task vector."""
        return {"decompositions": bench.decompositions()}

    def compute(self, bench: Bench, part: str) -> list[Row]:
        """One matrix: a row per origin and task."""
        rows: list[Row] = []
        for kind in bench.origins():
            _, deltas = bench.origin(part, kind)
            for task in deltas:
                s = singular_values(deltas, task, part)
                rank = effective_rank(s, self.energy)
                rows.append(
                    {
                        "tensor": part,
                        "layer": bench.layer(part),
                        "origin": kind,
                        "task": task,
                        "effective_rank": rank,
                        "components": s.numel(),
                        "share": rank / s.numel(),
                        "norm": float(s.double().square().sum().sqrt()),
                    }
                )
        return rows

    def sentences(self, rows: Sequence[Row]) -> list[str]:
        """Which task and layers need most, about each origin."""
        said = []
        for kind in values_of(rows, "origin"):
            here = where(rows, origin=kind)
            tasks = {task: mean([row["share"] for row in where(here, task=task)]) for task in values_of(here, "task")}
            most, least = max(tasks, key=lambda t: tasks[t]), min(tasks, key=lambda t: tasks[t])
            said.append(
                f"{ABOUT[str(kind)]}: {100 * self.energy:g}% of the energy lies in {100 * mean(list(tasks.values())):.1f}% of the components on average; "
                f"most for {most} ({100 * tasks[most]:.1f}%), least for {least} ({100 * tasks[least]:.1f}%)"
            )
            layers = by_layer(here)
            if len(layers) > 1:
                first, last = min(layers), max(layers)
                said.append(
                    f"{ABOUT[str(kind)]}: {100 * layers[first]:.1f}% in layer {first}, {100 * layers[last]:.1f}% in layer {last}; "
                    f"most in layer {max(layers, key=lambda n: layers[n])}"
                )
        return said

    def draw(self, rows: Sequence[Row]) -> Any:
        """A map of tasks by matrices and lines by layer, for each origin."""
        kinds = values_of(rows, "origin")
        most = max(float(row["share"]) for row in rows)
        figure, axes = drawing.grid(2, len(kinds), 3.4, 2.4)
        for column, kind in enumerate(kinds):
            here = where(rows, origin=kind)
            names, tasks = values_of(here, "tensor"), values_of(here, "task")
            share = {(row["task"], row["tensor"]): row["share"] for row in here}
            cells = [[100 * float(share[task, name]) for name in names] for task in tasks]
            drawing.heat(axes[0][column], cells, tasks, drawing.layer_ticks([row["layer"] for row in where(here, task=tasks[0])]),
                         f"effective rank {ABOUT[kind]}, %", "matrices, by layer", ends=(0, 100 * most))  # fmt: skip
            drawing.lines(
                axes[1][column],
                {task: _points(by_layer(where(here, task=task))) for task in tasks},
                ("layer", f"effective rank ({100 * self.energy:g}%), %"),
            )
        drawing.legend_below(figure, axes[1][0])
        return figure


def by_layer(rows: Sequence[Row]) -> dict[int, float]:
    """Layer -> mean share over its matrices and tasks; matrices outside of layers are left out."""
    layers: dict[int, list[float]] = {}
    for row in rows:
        if row["layer"] is not None:
            layers.setdefault(int(row["layer"]), []).append(float(row["share"]))
    return {number: mean(shares) for number, shares in sorted(layers.items())}


def _points(layers: Mapping[int, float]) -> list[tuple[float, float]]:
    return [(number, 100 * share) for number, share in layers.items()]
