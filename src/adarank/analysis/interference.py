"""How much task vectors are in each other's way: singular-task interference, and cosines.

    STI ÷ Σs, of all tasks and of each pair               singular-task interference, as in `spectral/overlap.py`
    cosine = ⟨τ_i, τ_j⟩ / (‖τ_i‖ ‖τ_j‖)                  over all merged tensors together

Gargiulo et al. 2024, arXiv:2412.00081 (Task Singular Vectors).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from math import nan
from typing import Any, ClassVar

from pydantic import Field

from adarank.analysis import drawing
from adarank.analysis.bench import Bench
from adarank.analysis.figure import Figure, Row, mean, values_of, where
from adarank.analysis.ranks import ABOUT
from adarank.sparsify.threshold import top_count
from adarank.spectral.overlap import ALL, interferences
from adarank.spectral.svd import spectrum_of


class Interference(Figure):
    """Singular-task interference of every matrix, of all tasks and of each pair, and the cosines of task vectors."""

    name: ClassVar[str] = "interference"
    summary: ClassVar[str] = "singular-task interference of matrices and of pairs of tasks, and cosines of task vectors"
    source: ClassVar[str] = "Gargiulo et al. 2024, arXiv:2412.00081"
    data: ClassVar[str] = ""
    tasks: ClassVar[int] = 2

    rank: float | None = Field(
        None, gt=0, le=1, description="share of each task vector's components that counts; by default 1/T"
    )

    def parts(self, bench: Bench) -> list[str]:
        """Every merged tensor: cosines are of all, interference is of matrices."""
        return bench.network.merged()

    def cost(self, bench: Bench) -> Mapping[str, int]:
        """An SVD of every task vector of every matrix."""
        return {"decompositions": bench.decompositions()}

    def compute(self, bench: Bench, part: str) -> list[Row]:
        """One tensor: rows of interference (of matrices), and the inner products of each pair of tasks."""
        rows: list[Row] = []
        for kind in bench.origins():
            _, deltas = bench.origin(part, kind)
            about: Row = {"tensor": part, "layer": bench.layer(part), "origin": kind}
            vectors = {task: deltas[task].double().flatten() for task in deltas}
            for task, other in [(task, task) for task in vectors] + list(combinations(vectors, 2)):
                product = float(vectors[task] @ vectors[other])
                rows.append(_row(about, "inner_product", task, other, product))
            if part in bench.matrices:
                share = self.rank or 1 / len(vectors)
                spectra = {task: spectrum_of(deltas, task, part) for task in deltas}
                tops = {task: whole.first(top_count(share, whole.count)) for task, whole in spectra.items()}
                rows += [_row(about, "interference", *entry) for entry in interferences(tops)]
        return rows

    def sentences(self, rows: Sequence[Row]) -> list[str]:
        """The nearest pair, the most interfering pair, and the layers, about each origin."""
        said = []
        for kind in values_of(rows, "origin"):
            here = where(rows, origin=kind)
            cosines = {pair: value for pair, value in cosines_of(here).items() if pair[0] != pair[1]}
            nearest, farthest = max(cosines, key=lambda p: cosines[p]), min(cosines, key=lambda p: cosines[p])
            said.append(
                f"{ABOUT[str(kind)]}: cosines from {cosines[farthest]:.2f} ({' and '.join(farthest)}) to {cosines[nearest]:.2f} ({' and '.join(nearest)})"
            )
            pairs, layers = interference_of_pairs(here), interference_by_layer(here)
            if not pairs or not layers:
                continue
            most = max(pairs, key=lambda p: pairs[p])
            said.append(
                f"{ABOUT[str(kind)]}: singular-task interference of all tasks is {mean(list(layers.values())):.1f} times the sum of singular values on average, "
                f"{layers[min(layers)]:.1f} in layer {min(layers)} and {layers[max(layers)]:.1f} in layer {max(layers)}; of two tasks it is largest for {' and '.join(most)}"
            )
        return said

    def draw(self, rows: Sequence[Row]) -> Any:
        """Of each origin the cosines and the pairs' interference as maps; below, interference by layer."""
        kinds = values_of(rows, "origin")
        figure, axes = drawing.grid(len(kinds) + 1, 2, 3.4, 2.2)
        for row, kind in enumerate(kinds):
            here = where(rows, origin=kind)
            tasks = values_of(where(here, kind="inner_product"), "task")
            drawing.heat(axes[row][0], _square(cosines_of(here), tasks), tasks, _numbers(tasks),
                         f"cosines of task vectors {ABOUT[kind]}", "the same tasks, by number", signed=True)  # fmt: skip
            drawing.heat(axes[row][1], _square(interference_of_pairs(here), tasks), [""] * len(tasks), _numbers(tasks),
                         f"interference of two tasks ÷ Σs {ABOUT[kind]}", "the same tasks, by number")  # fmt: skip
            layers = interference_by_layer(here)
            points = [(float(number), value) for number, value in layers.items()]
            drawing.lines(
                axes[-1][row], {"all tasks": points}, ("layer", "interference ÷ Σs"), f"all tasks, {ABOUT[kind]}"
            )
        for axis in axes[-1][len(kinds) :]:
            axis.set_axis_off()
        return figure


def _row(about: Row, kind: str, task: str, other: str, value: float, of: float | None = None) -> Row:
    relative = None if of is None else value / of if of > 0 else 0.0
    return {**about, "kind": kind, "task": task, "other": other, "value": value, "relative": relative}


def cosines_of(rows: Sequence[Row]) -> dict[tuple[str, str], float]:
    """(task, other) -> cosine of their whole task vectors, of all tensors together; the rows are of one origin."""
    sums: dict[tuple[str, str], float] = {}
    for row in where(rows, kind="inner_product"):
        pair = (str(row["task"]), str(row["other"]))
        sums[pair] = sums.get(pair, 0.0) + float(row["value"])
    norms = {task: value**0.5 for (task, other), value in sums.items() if task == other}
    return {
        pair: value / (norms[pair[0]] * norms[pair[1]]) if norms[pair[0]] and norms[pair[1]] else 0.0
        for pair, value in sums.items()
    }


def interference_of_pairs(rows: Sequence[Row]) -> dict[tuple[str, str], float]:
    """(task, other) -> their interference ÷ Σs, mean over matrices; the rows are of one origin."""
    shares: dict[tuple[str, str], list[float]] = {}
    for row in where(rows, kind="interference"):
        shares.setdefault((str(row["task"]), str(row["other"])), []).append(float(row["relative"]))
    return {pair: mean(values) for pair, values in shares.items() if pair[0] != ALL}


def interference_by_layer(rows: Sequence[Row]) -> dict[int, float]:
    """Layer -> interference of all tasks ÷ Σs, mean over its matrices; the rows are of one origin."""
    shares: dict[int, list[float]] = {}
    for row in where(rows, kind="interference", task=ALL):
        if row["layer"] is not None:
            shares.setdefault(int(row["layer"]), []).append(float(row["relative"]))
    return {layer: mean(values) for layer, values in sorted(shares.items())}


def _square(pairs: Mapping[tuple[str, str], float], tasks: Sequence[str]) -> list[list[float]]:
    """Tasks by tasks; a task beside itself is left empty, as it would set the colours."""
    return [[nan if a == b else pairs.get((a, b), pairs.get((b, a), nan)) for b in tasks] for a in tasks]


def _numbers(tasks: Sequence[str]) -> dict[float, str]:
    return {float(place): str(place + 1) for place in range(len(tasks))}
