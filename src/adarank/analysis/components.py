"""What adding single components of one expert does to the merge of the others.

    θ_m = θ_0 + λ Σ_{j≠i} τ_j                                                   Eq. 3 of AdaRank
    ΔL_j(r) = L_j(θ_m + λ σ_ir u_ir v_irᵀ) - L_j(θ_m)        net: Σ_j ΔL_j(r)        Eq. 4
    first order:  ΔL_j(r) ≈ λ σ_ir u_irᵀ G_j v_ir,   G_j = dL_j/dW at θ_m

The r-th components of all matrices are added at once, or those of some (`matrices`; of one matrix: one component at a time).
By forward passes that takes one for each r; to first order one backward pass for each task gives all components of all
matrices, by the closed-form gradient of `spectral/blocks.py`.

Figures 1 and 2 of AdaRank (Lee et al. 2025, arXiv:2503.22178).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, PrivateAttr
from torch import Tensor

from adarank.analysis import drawing
from adarank.analysis.bench import Bench
from adarank.analysis.figure import Figure, Row, mean, values_of, where
from adarank.errors import RecipeError
from adarank.settings import nearest
from adarank.sparsify.threshold import top_count
from adarank.spectral.blocks import from_spectra
from adarank.spectral.svd import Spectrum, spectrum_of

MERGE, EXACT, FIRST, EACH = "merge", "exact", "first order", "first order, each matrix"
"""Kinds of rows: losses of θ_m itself; changes of them by forward passes, to first order, and matrix by matrix."""


@dataclass(frozen=True)
class Without:
    """The merge of all experts but one.

    Attributes:
        tensors: every merged tensor of it.
        tops: matrix -> the left-out expert's components that are added by forward passes.
        losses: task -> loss.
    """

    task: str
    tensors: Mapping[str, Tensor]
    tops: Mapping[str, Spectrum]
    losses: Mapping[str, float]

    def plus(self, component: int, scale: float) -> Iterator[tuple[str, Tensor]]:
        """Every matrix with the component of that number (from 0) added; as it is where there is none."""
        for name, top in self.tops.items():
            tensor = self.tensors[name]
            if component < top.s.numel():
                outer = torch.outer(top.u[:, component], top.v[:, component])
                tensor = tensor + (scale * top.s[component] * outer).reshape(tensor.shape)
            yield name, tensor


class Components(Figure):
    """Changes of every task's loss by each component of each expert."""

    name: ClassVar[str] = "components"
    summary: ClassVar[str] = "what adding each singular component of one expert does to the merge of the others"
    source: ClassVar[str] = "AdaRank, Figures 1 and 2"
    tasks: ClassVar[int] = 2
    decomposed: ClassVar[bool] = True

    scale: float = Field(0.3, alias="lambda", description="λ of the merge and of the component")
    origin: Literal["pretrained", "average"] = Field("pretrained", description="what task vectors are counted from")
    of: tuple[str, ...] = Field((), description="whose components are added; by default every task's")
    matrices: tuple[str, ...] = Field(("*",), description="patterns of the matrices that they are added to")
    top: float = Field(0.1, gt=0, le=1, description="share of the components that is measured by forward passes")

    _merge: Without | None = PrivateAttr(None)

    def check(self, bench: Bench) -> None:
        """Refuse tasks, matrices and origins that the recipe has not."""
        super().check(bench)
        for task in self.of:
            if task not in bench.tasks:
                raise RecipeError(f"{self.name}: of: no task '{task}'.{nearest(task, bench.tasks)}")
        if self.origin not in bench.origins():
            raise RecipeError(f"{self.name}: origin: the recipe has no base_model. Give it, or origin=average.")
        if not self._chosen(bench):
            raise RecipeError(
                f"{self.name}: matrices: none of {len(bench.matrices)} decomposed matrices, such as '{bench.matrices[0]}', fits {', '.join(self.matrices)}."
            )

    def parts(self, bench: Bench) -> list[str]:
        """Of each task the first order, and every component that is measured."""
        counts = range(1, self._measured(bench) + 1)
        return [part for task in self._tasks(bench) for part in (_part(task), *(_part(task, r) for r in counts))]

    def cost(self, bench: Bench) -> Mapping[str, int]:
        """A pass over all inputs for each component and for each merge, and one with gradients for each merge."""
        merges, inputs = len(self._tasks(bench)), bench.all_inputs()
        return {
            "decompositions": merges * len(self._chosen(bench)),
            "forward passes of single inputs": merges * inputs * (1 + self._measured(bench)),
            "passes with gradients": merges * inputs,
        }

    def compute(self, bench: Bench, part: str) -> list[Row]:
        """The first order of one task's components, or one component exactly."""
        task, component = next(
            (task, r)
            for task in self._tasks(bench)
            for r in (0, *range(1, self._measured(bench) + 1))
            if _part(task, r) == part
        )
        merge = self._without(bench, task)
        if component == 0:
            return self._first_order(bench, merge)
        bench.fill(merge.plus(component - 1, self.scale))
        change = {other: bench.measure(other).loss - merge.losses[other] for other in bench.tasks}
        return [_row(EXACT, task, component, change)]

    def sentences(self, rows: Sequence[Row]) -> list[str]:
        """What the strongest components do, how many help, and whether the first order tells it."""
        tasks, exact = values_of(where(rows, kind=EXACT), "task"), where(rows, kind=EXACT)
        first = where(exact, component=1)
        said = [
            f"adding the strongest component lowers its own task's loss for {sum(r['own'] < 0 for r in first)} of {len(tasks)} tasks, "
            f"raises the sum of the others' for {sum(r['net'] - r['own'] > 0 for r in first)}, and raises the sum of all for {sum(r['net'] > 0 for r in first)}"
        ]
        worst = max(first, key=lambda row: row["net"] - row["own"])
        hurt = max(
            (task for task in tasks_of(rows) if task != worst["task"]), key=lambda task: worst[_on(task)], default=""
        )
        if hurt and worst[_on(hurt)] > 0:
            said.append(f"most harm is done by {worst['task']}'s, to {hurt} ({worst[_on(hurt)]:+.3f})")
        said.append(
            f"of {len(exact)} measured components {sum(r['net'] < 0 for r in exact)} lower the sum of all losses; "
            f"strongest ones change it by {mean([r['net'] for r in first]):+.4f} on average, the last measured by {mean([r['net'] for r in exact if r['component'] == max(values_of(exact, 'component'))]):+.4f}"
        )
        correlation, signs = agreement(rows)
        said.append(
            f"exact and first-order changes correlate by {correlation:.3f}, and {100 * signs:.0f}% have the same sign"
        )
        return said

    def draw(self, rows: Sequence[Row]) -> Any:
        """Of each task net and own changes by component; last a map of the strongest component's effect on every task."""
        tasks = values_of(where(rows, kind=EXACT), "task")
        columns = min(3, len(tasks) + 1)
        figure, axes = drawing.grid(-(-(len(tasks) + 1) // columns), columns, 2.3, 1.9)
        flat = [axis for line in axes for axis in line]
        for place, (axis, task) in enumerate(zip(flat, tasks, strict=False)):
            series: dict[str, list[tuple[float, float]]] = {}
            for kind, style in ((EXACT, ""), (FIRST, ", first order")):
                most = len(where(rows, kind=EXACT, task=task))
                here = where(rows, kind=kind, task=task)[:most]
                series |= {f"{what}{style}": [(row["component"], row[what]) for row in here] for what in ("net", "own")}
            dashes = {name: "--" if "first" in name else "-" for name in series}
            beside = "change of loss" if place % columns == 0 else ""
            drawing.lines(axis, series, ("component", beside), f"components of {task}", dashes=dashes)
            axis.locator_params(nbins=4)
        strongest = where(rows, kind=EXACT, component=1)
        cells = [[row[_on(other)] for other in tasks_of(rows)] for row in strongest]
        ticks = {float(place): str(place + 1) for place in range(len(tasks_of(rows)))}
        drawing.heat(flat[len(tasks)], cells, tasks, ticks, "by the strongest component", "on task", signed=True)
        for axis in flat[len(tasks) + 1 :]:
            axis.set_axis_off()
        drawing.legend_below(figure, flat[0])
        return figure

    def _tasks(self, bench: Bench) -> tuple[str, ...]:
        return self.of or bench.tasks

    def _chosen(self, bench: Bench) -> list[str]:
        return [name for name in bench.matrices if any(fnmatchcase(name, pattern) for pattern in self.matrices)]

    def _measured(self, bench: Bench) -> int:
        """How many components are measured by forward passes: of the matrix that has most."""
        infos = [bench.network.tensors[name] for name in self._chosen(bench)]
        return max(top_count(self.top, min(info.shape[0], info.numel // info.shape[0])) for info in infos)

    def _without(self, bench: Bench, task: str) -> Without:
        """The merge of the others, in the networks; made anew only when the task changes."""
        if self._merge is None or self._merge.task != task:
            count, tensors, tops = self._measured(bench), {}, {}
            for name in bench.network.merged():
                origin, deltas = bench.origin(name, self.origin)
                tensors[name] = origin.clone()
                for other in deltas:
                    if other != task:
                        tensors[name].add_(deltas[other], alpha=self.scale)
                if name in self._chosen(bench):
                    tops[name] = _top(spectrum_of(deltas, task, name), count)
            bench.fill(tensors.items())
            losses = {other: bench.measure(other).loss for other in bench.tasks}
            self._merge = Without(task, tensors, tops, losses)
        return self._merge

    def _first_order(self, bench: Bench, merge: Without) -> list[Row]:
        """The merge's losses, the changes of each matrix, and those of all matrices at once."""
        bench.fill(merge.tensors.items())
        changes: dict[str, dict[str, list[float]]] = {name: {} for name in merge.tops}
        sigma: dict[str, list[float]] = {}
        for other in bench.tasks:
            gradients = bench.gradients(other)
            for name in merge.tops:
                origin, deltas = bench.origin(name, self.origin)
                spectrum = spectrum_of(deltas, merge.task, name)
                sigma[name] = spectrum.s.tolist()
                gradient = gradients.get(name)
                slopes = torch.zeros_like(spectrum.s) if gradient is None else self._slopes(origin, spectrum, gradient)
                changes[name][other] = slopes.tolist()
        rows = [{**_row(MERGE, merge.task, None, merge.losses), "own": merge.losses[merge.task]}]
        each = [
            {**_row(EACH, merge.task, r + 1, {other: of[other][r] for other in of}), "tensor": name, "layer": bench.layer(name), "sigma": sigma[name][r]}
            for name, of in changes.items()
            for r in range(len(sigma[name]))
        ]  # fmt: skip
        for r in range(1, max(map(len, sigma.values()), default=0) + 1):
            here = [row for row in each if row["component"] == r]
            rows.append(_row(FIRST, merge.task, r, {o: sum(row[_on(o)] for row in here) for o in bench.tasks}))
        return rows + each

    def _slopes(self, origin: Tensor, spectrum: Spectrum, gradient: Tensor) -> Tensor:
        """(r,) λ σ_r u_rᵀ G v_r."""
        kept = torch.ones(spectrum.s.numel(), dtype=torch.bool)
        return from_spectra(origin, [spectrum]).gradient(gradient, torch.tensor([self.scale]), kept, True).mask


def tasks_of(rows: Sequence[Row]) -> list[str]:
    """The tasks whose losses rows have."""
    return [column.removeprefix("on ") for column in rows[0] if column.startswith("on ")]


def agreement(rows: Sequence[Row]) -> tuple[float, float]:
    """Correlation of exact and first-order changes over components and tasks, and the share of them with one sign."""
    first = {(row["task"], row["component"]): row for row in where(rows, kind=FIRST)}
    pairs = [
        (row[_on(other)], first[row["task"], row["component"]][_on(other)])
        for row in where(rows, kind=EXACT)
        for other in tasks_of(rows)
    ]
    exact, linear = np.array(pairs).T
    flat = np.ptp(exact) == 0 or np.ptp(linear) == 0
    return (0.0 if flat else float(np.corrcoef(exact, linear)[0, 1])), float(np.mean(np.sign(exact) == np.sign(linear)))


def _top(spectrum: Spectrum, count: int) -> Spectrum:
    """The first components, as far as they are there."""
    return Spectrum(spectrum.u[:, :count].clone(), spectrum.s[:count], spectrum.v[:, :count].clone())


def _part(task: str, component: int = 0) -> str:
    return f"{task}: component {component}" if component else f"{task}: first order"


def _on(task: str) -> str:
    return f"on {task}"


def _row(kind: str, task: str, component: int | None, changes: Mapping[str, float]) -> Row:
    about: Row = {"kind": kind, "task": task, "component": component, "tensor": None, "layer": None, "sigma": None}
    return {**about, "net": sum(changes.values()), "own": changes[task], **{_on(o): c for o, c in changes.items()}}
