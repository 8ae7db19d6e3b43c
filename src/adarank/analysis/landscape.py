"""Losses on the plane of the experts' first two principal directions, and the paths over rank and λ across it.

    τ̄_i = θ_i - θ̄;   K_ij = ⟨τ̄_i, τ̄_j⟩ over all merged tensors;   K c_a = e_a c_a,  e_1 ≥ e_2
    d_a = Σ_i c_ai τ̄_i / √e_a        a model's place: (⟨θ - θ̄, d_1⟩, ⟨θ - θ̄, d_2⟩);  the plane: θ̄ + x d_1 + y d_2

A path's models lie beside the plane, and are drawn where they are projected to; their own losses are in the table.

Figures 4, 7 and 8 of CART (Choi et al. 2024, arXiv:2412.12153).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from pydantic import Field, PrivateAttr
from torch import Tensor

from adarank.analysis import drawing
from adarank.analysis.bench import Bench
from adarank.analysis.figure import Figure, Row, mean, values_of, where
from adarank.analysis.rank_sweep import ORIGINS, cut, merged
from adarank.errors import RecipeError
from adarank.spectral.svd import spectrum_of


@dataclass(frozen=True)
class Plane:
    """The plane, and where paths lie on it, which is linear in λ.

    Attributes:
        tasks: in the order of the rows of all that follows.
        energies: (2,) the two largest e.
        weights: (T, 2) c_ai / √e_a: with these a direction is a sum of task vectors, and a place a sum of inner products.
        base: (T,) ⟨θ_0 - θ̄, τ̄_i⟩; zeros without a base.
        slopes: (method, share) -> (T,) ⟨Σ_t SVD_k(task vector t), τ̄_i⟩.
    """

    tasks: tuple[str, ...]
    energies: Tensor
    weights: Tensor
    base: Tensor
    slopes: Mapping[tuple[str, float], Tensor]

    def place(self, method: str, share: float, scale: float) -> tuple[float, float]:
        """Where a point of a path is projected to."""
        inner = scale * self.slopes[method, share] + (self.base if method == "TA" else 0)
        x, y = (inner @ self.weights).tolist()
        return x, y

    @cached_property
    def experts(self) -> dict[str, tuple[float, float]]:
        """Task -> where its expert is: √e_a c_ai."""
        places = (self.weights * self.energies).tolist()
        return {task: (x, y) for task, (x, y) in zip(self.tasks, places, strict=True)}


class Landscape(Figure):
    """Losses over the plane, and paths of TA and CART over rank and λ."""

    name: ClassVar[str] = "landscape"
    summary: ClassVar[str] = "losses on the plane of the experts' two principal directions, with paths over rank and λ"
    source: ClassVar[str] = "CART, Figures 4, 7 and 8"
    tasks: ClassVar[int] = 3  # two lie on a line with their average

    points: int = Field(13, ge=2, le=101, description="points of the grid along each side")
    shares: tuple[float, ...] = Field(
        (0.0, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.0), description="kept ranks along a path"
    )
    cart: tuple[float, ...] = Field((0.5, 1.0, 2.0), description="λ of each path of CART; none: no path")
    ta: tuple[float, ...] = Field((0.3,), description="λ of each path of TA; none: no path")
    margin: float = Field(0.1, ge=0, le=2, description="around all that is marked, as a share of its extent")

    _plane: Plane | None = PrivateAttr(None)

    def parts(self, bench: Bench) -> list[str]:
        """The models' places, the points of the paths, the points of the grid."""
        grid = [f"grid {row} {column}" for row in range(self.points) for column in range(self.points)]
        return ["models", *self._paths(bench), *grid]

    def cost(self, bench: Bench) -> Mapping[str, int]:
        """Each SVD once, and all inputs at every point."""
        methods = {method for method, _, _ in self._paths(bench).values()}
        points = self.points**2 + len(self._paths(bench))
        return {
            "decompositions": len(methods) * len(bench.matrices) * len(bench.tasks),
            "forward passes of single inputs": points * bench.all_inputs(),
        }

    def compute(self, bench: Bench, part: str) -> list[Row]:
        """The places of the models, or all tasks' losses at one point."""
        plane = self._of(bench)
        if part == "models":
            rows = [_row("expert", place, task=task) for task, place in plane.experts.items()]
            rows.append(_row("average", (0.0, 0.0)))
            x, y = (plane.base @ plane.weights).tolist()
            return rows + ([_row("base", (x, y))] if bench.network.base is not None else [])
        paths = self._paths(bench)
        if part in paths:
            method, scale, share = paths[part]
            bench.fill(merged(bench, ORIGINS[method], share, scale))
            about: Row = _row("path", plane.place(method, share, scale), method=method, scale=scale, share=share)
        else:
            row, column = map(int, part.split()[1:])
            (left, right), (low, high) = self._extent(bench)
            place = (_between(left, right, column, self.points), _between(low, high, row, self.points))
            bench.fill(_on_plane(bench, plane, place))
            about = _row("grid", place)
        return [{**about, "task": task, "loss": of.loss, "score": of.score} for task, of in bench.measure_all().items()]

    def sentences(self, rows: Sequence[Row]) -> list[str]:
        """Where the mean loss is least on the plane and along each path."""
        grid = mean_losses(where(rows, kind="grid"))
        best = min(grid, key=lambda place: grid[place])
        said = [
            f"on the plane the mean loss is least at ({best[0]:.2f}, {best[1]:.2f}): {grid[best]:.3f}; the average is at (0, 0)"
        ]
        path = where(rows, kind="path")
        for method in values_of(path, "method"):
            for scale in values_of(where(path, method=method), "lambda"):
                here = where(path, method=method, **{"lambda": scale})
                losses = {
                    share: mean([r["loss"] for r in where(here, share=share)]) for share in values_of(here, "share")
                }
                least = min(losses, key=lambda share: losses[share])
                said.append(
                    f"{method}, λ {scale:g}: mean loss of the merged model itself from {losses[min(losses)]:.3f} at 0% of the rank over "
                    f"{losses[least]:.3f} at {100 * least:g}% to {losses[max(losses)]:.3f} at {100 * max(losses):g}%"
                )
        return said

    def draw(self, rows: Sequence[Row]) -> Any:
        """The mean loss over the plane, then each task's, with the paths and the models."""
        grid, tasks = where(rows, kind="grid"), values_of(where(rows, kind="grid"), "task")
        columns = min(3, len(tasks) + 1)
        figure, axes = drawing.grid(-(-(len(tasks) + 1) // columns), columns, 2.3, 2.0)
        flat = [axis for line in axes for axis in line]
        panels = [("mean of all tasks", mean_losses(grid))]
        panels += [(str(task), mean_losses(where(grid, task=task))) for task in tasks]
        for axis, (title, losses) in zip(flat, panels, strict=False):
            drawing.contours(axis, losses, f"loss: {title}")
            self._mark(axis, rows, title)
        for axis in flat[len(panels) :]:
            axis.set_axis_off()
        drawing.legend_below(figure, flat[0])
        return figure

    def _mark(self, axis: Any, rows: Sequence[Row], title: str) -> None:
        """Paths, the average, the base, and the experts: of a task's panel its own alone."""
        path, series = where(rows, kind="path"), {}
        for method in values_of(path, "method"):
            for scale in values_of(where(path, method=method), "lambda"):
                here = where(path, method=method, **{"lambda": scale})
                series[f"{method}, λ {scale:g}"] = list(dict.fromkeys((row["x"], row["y"]) for row in here))
        for kind in ("expert", "average", "base"):
            places = [
                (r["x"], r["y"])
                for r in where(rows, kind=kind)
                if r["task"] in (None, title) or title not in _experts(rows)
            ]
            if places:
                series[kind] = places
        dashes = dict.fromkeys(("expert", "average", "base"), "none")
        drawing.lines(axis, series, ("", ""), f"loss: {title}", dashes=dashes, outlined=True)

    def _paths(self, bench: Bench) -> dict[str, tuple[str, float, float]]:
        """Name -> method, λ, share."""
        scales = {"TA": self.ta if bench.network.base is not None else (), "CART": self.cart}
        return {
            f"path {method} {scale:g} {share:g}": (method, scale, share)
            for method, of_method in scales.items()
            for scale in of_method
            for share in sorted(set(self.shares))
        }

    def _of(self, bench: Bench) -> Plane:
        """The plane, computed once."""
        if self._plane is None:
            wanted = {(method, share) for method, _, share in self._paths(bench).values()}
            self._plane = _plane(bench, sorted(wanted))
        return self._plane

    def _extent(self, bench: Bench) -> tuple[tuple[float, float], tuple[float, float]]:
        """The ends of the grid: all that is marked, with the margin."""
        plane = self._of(bench)
        places = [*plane.experts.values(), (0.0, 0.0), tuple((plane.base @ plane.weights).tolist())]
        places += [plane.place(method, share, scale) for method, scale, share in self._paths(bench).values()]
        ends = []
        for along in zip(*places, strict=True):
            low, high = min(along), max(along)
            ends.append((low - self.margin * (high - low), high + self.margin * (high - low)))
        return ends[0], ends[1]


def _plane(bench: Bench, paths: Sequence[tuple[str, float]]) -> Plane:
    """One pass over the tensors: inner products of all that is placed with the experts' vectors about the average."""
    count = len(bench.tasks)
    gram = torch.zeros(count, count, dtype=torch.float64)
    base = torch.zeros(count, dtype=torch.float64)
    slopes = {path: torch.zeros(count, dtype=torch.float64) for path in paths}
    for name in bench.network.merged():
        average, deltas = bench.origin(name, "average")
        vectors = torch.stack([deltas[task].flatten() for task in deltas])
        gram += (vectors @ vectors.T).double().cpu()
        for method in dict.fromkeys(method for method, _ in paths):
            origin, changes = bench.origin(name, ORIGINS[method])
            shares = [share for path, share in paths if path == method]
            for share, product in _products(bench, name, vectors, changes, shares, method).items():
                slopes[method, share] += product
        if bench.network.base is not None:
            origin = bench.network.origin(name, "pretrained", average.device)
            base += (vectors @ (origin - average).flatten()).double().cpu()
    energies, directions = torch.linalg.eigh(gram)
    two = [count - 1, count - 2]  # they come in rising order
    if energies[two[1]] <= 1e-9 * energies[two[0]]:
        raise RecipeError("landscape: the experts lie on a line about their average, which spans no plane.")
    signs = directions[:, two].sum(0).sign()  # of a direction and its opposite always the same one
    weights = directions[:, two] * torch.where(signs == 0, 1.0, signs) / energies[two].sqrt()
    return Plane(bench.tasks, energies[two], weights, base, slopes)


def _products(
    bench: Bench, name: str, vectors: Tensor, changes: Mapping[str, Tensor], shares: Sequence[float], method: str
) -> dict[float, Tensor]:
    """Share -> (T,) inner products of the summed cut task vectors of one tensor with the experts' vectors about the average."""
    products = {share: vectors.new_zeros(len(vectors)) for share in shares}
    for task in changes:
        if name in bench.matrices:
            spectrum = spectrum_of(changes, task, name)
            for share in shares:
                products[share] += vectors @ cut(spectrum, share).flatten()
        elif method == "TA":
            whole = vectors @ changes[task].flatten()
            for share in shares:
                products[share] += whole
    return {share: product.double().cpu() for share, product in products.items()}


def _on_plane(bench: Bench, plane: Plane, place: tuple[float, float]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of θ̄ + x d_1 + y d_2, one in memory at a time."""
    coefficients = dict(
        zip(plane.tasks, (plane.weights @ torch.tensor(place, dtype=torch.float64)).tolist(), strict=True)
    )
    for name in bench.network.merged():
        origin, deltas = bench.origin(name, "average")
        total = origin.clone()
        for task in deltas:
            total.add_(deltas[task], alpha=coefficients[task])
        yield name, total


def mean_losses(rows: Sequence[Row]) -> dict[tuple[float, float], float]:
    """Place -> mean loss of the rows there."""
    losses: dict[tuple[float, float], list[float]] = {}
    for row in rows:
        losses.setdefault((row["x"], row["y"]), []).append(row["loss"])
    return {place: mean(values) for place, values in losses.items()}


def _experts(rows: Sequence[Row]) -> list[Any]:
    return [row["task"] for row in where(rows, kind="expert")]


def _between(first: float, last: float, step: int, points: int) -> float:
    return first + (last - first) * step / (points - 1)


def _row(kind: str, place: tuple[float, float], task: str | None = None, method: str | None = None,
         scale: float | None = None, share: float | None = None) -> Row:  # fmt: skip
    return {"kind": kind, "x": place[0], "y": place[1], "method": method, "lambda": scale, "share": share, "task": task, "loss": None, "score": None}  # fmt: skip
