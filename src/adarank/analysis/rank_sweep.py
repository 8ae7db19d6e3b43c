"""Scores over the kept rank, from the strongest components or from the weakest, merged or each task by itself.

    merged   W = origin + λ Σ_t SVD_k(W_t - origin)        TA: origin W₀; CART: origin W̄
    routed   W_t = origin + SVD_k(W_t - origin)
    reversed: the k weakest components in place of the k strongest

Tensors that are not decomposed are as in the methods `svd_k`, `cart` and, routed, `cart_indexing`: about the base they move by
λ Σ_t τ_t, about the average they stay there; routed they are the task's own. Nothing is kept of matrices at k = 0.

Figures 1, 2, 3 and 5 of CART (Choi et al. 2024, arXiv:2412.12153).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator
from torch import Tensor

from adarank.alignment.task_vectors import OriginKind
from adarank.analysis import drawing
from adarank.analysis.bench import Bench
from adarank.analysis.figure import Figure, Row, mean, values_of, where
from adarank.data.metrics import less_is_better
from adarank.spectral.svd import Spectrum, spectrum_of

ORIGINS: dict[str, OriginKind] = {"TA": "pretrained", "CART": "average"}
Order = Literal["top", "reversed"]
Way = Literal["merged", "routed"]
SHARES = (0.0, 0.01, 0.02, 0.04, 0.08, 0.12, 0.16, 0.24, 0.32, 0.5, 0.75, 1.0)


class RankSweep(Figure):
    """Each task's score and loss at every kept rank."""

    name: ClassVar[str] = "rank-sweep"
    summary: ClassVar[str] = "scores of TA and CART over the kept rank, from the top and reversed, merged and routed"
    source: ClassVar[str] = "CART, Figures 1, 2, 3 and 5"
    decomposed: ClassVar[bool] = True

    shares: tuple[float, ...] = Field(SHARES, description="shares of each matrix's components that are kept")
    ta: float = Field(0.3, description="λ of TA where merged")
    cart: float = Field(1.0, description="λ of CART where merged")
    orders: tuple[Order, ...] = Field(("top", "reversed"), description="which components are kept first")
    ways: tuple[Way, ...] = Field(("merged", "routed"), description="one model, or each task by itself")

    @field_validator("shares")
    @classmethod
    def _within(cls, shares: tuple[float, ...]) -> tuple[float, ...]:
        if not shares or not all(0 <= share <= 1 for share in shares):
            raise ValueError("shares from 0 to 1 are needed")
        return tuple(sorted(set(shares)))

    def parts(self, bench: Bench) -> list[str]:
        """The points."""
        return list(self._points(bench))

    def cost(self, bench: Bench) -> Mapping[str, int]:
        """All inputs at every point; each SVD once."""
        return {
            "decompositions": bench.decompositions(),
            "forward passes of single inputs": len(self._points(bench)) * bench.all_inputs(),
        }

    def compute(self, bench: Bench, part: str) -> list[Row]:
        """One point: a row per task."""
        method, way, order, share = self._points(bench)[part]
        if way == "merged":
            bench.fill(merged(bench, ORIGINS[method], share, self.scale(method), order))
        rows: list[Row] = []
        for task in bench.tasks:
            if way == "routed":
                bench.fill(routed(bench, ORIGINS[method], share, task, order))
            measured = bench.measure(task)
            rows.append(
                {
                    "method": method,
                    "way": way,
                    "order": order,
                    "share": share,
                    "task": task,
                    "metric": bench.data[task].metric,
                    "score": measured.score,
                    "loss": measured.loss,
                }
            )
        return rows

    def scale(self, method: str) -> float:
        """λ of a method where merged."""
        return self.ta if method == "TA" else self.cart

    def sentences(self, rows: Sequence[Row]) -> list[str]:
        """Where each curve is highest, and where its ends are."""
        said = []
        for way in values_of(rows, "way"):
            for order in values_of(rows, "order"):
                for method in values_of(rows, "method"):
                    curve = means(where(rows, way=way, order=order, method=method))
                    best = max(curve, key=lambda share: curve[share])
                    ends = f"{curve[min(curve)]:.1f} at {100 * min(curve):g}%, {curve[max(curve)]:.1f} at {100 * max(curve):g}%"
                    said.append(
                        f"{method} {way}, {order}: best mean score {curve[best]:.1f} at {100 * best:g}% of the rank ({ends})"
                    )
        return said

    def draw(self, rows: Sequence[Row]) -> Any:
        """Mean score over the rank for each way and order; below, each task's where merged from the top."""
        ways, orders, methods = values_of(rows, "way"), values_of(rows, "order"), values_of(rows, "method")
        shares = sorted(values_of(rows, "share"))
        columns = max(len(orders), len(methods))
        figure, axes = drawing.grid(len(ways) + 1, columns, 3.4, 2.2)
        for line, way in zip(axes, ways, strict=False):
            for axis, order in zip(line, orders, strict=False):
                curves = {m: _curve(means(where(rows, way=way, order=order, method=m)), shares) for m in methods}
                drawing.lines(axis, curves, ("kept rank, %", "mean score"), f"{way}, {order}")
                axis.legend()
        for axis, method in zip(axes[-1], methods, strict=False):
            here = where(rows, way=ways[0], order=orders[0], method=method)
            tasks = values_of(here, "task")
            curves = {task: _curve({r["share"]: r["score"] for r in where(here, task=task)}, shares) for task in tasks}
            drawing.lines(axis, curves, ("kept rank, %", "score"), f"{method} {ways[0]}, {orders[0]}: each task")
        for axis in (axis for line in axes for axis in line):
            axis.set_xticks(range(len(shares)), [f"{100 * share:g}" for share in shares])
            axis.set_visible(bool(axis.lines))
        drawing.legend_below(figure, axes[-1][0])
        return figure

    def _points(self, bench: Bench) -> dict[str, tuple[str, Way, Order, float]]:
        """Name -> method, way, order, share."""
        methods = [method for method, kind in ORIGINS.items() if kind in bench.origins()]
        return {
            f"{method} {way} {order} {share:g}": (method, way, order, share)
            for method in methods
            for way in self.ways
            for order in self.orders
            for share in self.shares
        }


def merged(
    bench: Bench, kind: OriginKind, share: float, scale: float, order: Order = "top"
) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of origin + λ Σ_t of the cut task vectors, one in memory at a time."""
    for name in bench.network.merged():
        origin, deltas = bench.origin(name, kind)
        total = origin.clone()
        if name in bench.matrices:
            for task in deltas:
                total.add_(cut(spectrum_of(deltas, task, name), share, order).reshape(origin.shape), alpha=scale)
        elif kind == "pretrained":
            for task in deltas:
                total.add_(deltas[task], alpha=scale)
        yield name, total


def routed(
    bench: Bench, kind: OriginKind, share: float, task: str, order: Order = "top"
) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of origin + the task's cut vector, one in memory at a time."""
    for name in bench.network.merged():
        origin, deltas = bench.origin(name, kind)
        delta = deltas[task]
        if name in bench.matrices:
            delta = cut(spectrum_of(deltas, task, name), share, order).reshape(origin.shape)
        yield name, origin + delta


def cut(spectrum: Spectrum, share: float, order: Order = "top") -> Tensor:
    """The matrix of the ⌊share·r⌋ strongest or weakest components, at least one where share > 0."""
    count = min(spectrum.count, max(int(share > 0), math.floor(share * spectrum.count + 1e-9)))
    if order == "top":
        return spectrum.reconstruct(count)
    first = spectrum.count - count  # those that are zero and are not there are the weakest
    return (spectrum.u[:, first:] * spectrum.s[first:]) @ spectrum.v[:, first:].T


def means(rows: Sequence[Row]) -> dict[float, float]:
    """Share -> mean score over the tasks that are scored in per cent; where all are losses, the negative mean loss."""
    shares = [row for row in rows if not less_is_better(row["metric"])]
    return {
        share: mean([row["score"] for row in where(shares, share=share)])
        if shares
        else -mean([row["loss"] for row in where(rows, share=share)])
        for share in sorted(values_of(rows, "share"))
    }


def _curve(curve: Mapping[float, float], shares: Sequence[float]) -> list[tuple[float, float]]:
    """Evenly spaced: small shares are where curves turn."""
    return [(float(shares.index(share)), value) for share, value in curve.items()]
