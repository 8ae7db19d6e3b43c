"""Where adaptation starts, searched for without labels: the rank and λ at which merged model and experts agree best.

    (k, λ) = argmax mean_t agreement of f(W_o + λ Σ_t top_k(δ_t)) with expert t, on unlabelled inputs

Hill climbing on a grid: from one point to its best neighbour, until no neighbour is better. A point costs one composition of the
weights and one quick check, a judgement on fewer inputs; nothing is decomposed anew, and nothing is learned.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from adarank.adapt.agreement import Judge, mean_agreement
from adarank.io.progress import advance, stage

AUTO: Literal["auto"] = "auto"
# Coarse: what adaptation reaches depends little on the start within a step of this grid, and each point costs a quick check.
RANKS = (0.02, 0.08, 0.32, 1.0)
SCALES = (0.05, 0.1, 0.2, 0.3, 0.6, 1.0, 1.6, 2.5)
QUICK_CHECK = 64  # inputs per task, at most: all starts are seen on the same ones, so that few tell them apart


@dataclass(frozen=True)
class Tried:
    """One start that was tried: share of components kept, λ, and the mean agreement there."""

    rank: float
    scale: float
    value: float

    def named(self) -> dict[str, float]:
        """As recipes and records name it."""
        return {"rank": self.rank, "lambda": self.scale, "value": self.value}


@dataclass(frozen=True)
class Grid:
    """The starts that are open: one value where rank or λ is given.

    Attributes:
        ranks, scales: values that may be tried, in ascending order.
        first: index into each, where the climb begins.
    """

    ranks: tuple[float, ...]
    scales: tuple[float, ...]
    first: tuple[int, int]

    @property
    def open(self) -> bool:
        """True if there is anything to find."""
        return len(self.ranks) * len(self.scales) > 1

    def at_edge(self, tried: list[Tried]) -> list[str]:
        """Of `rank` and `lambda` those whose best value is the last of those that may be tried, though others are possible."""
        if not tried:
            return []
        best = best_of(tried)
        edges = {"rank": len(self.ranks) > 1 and best.rank == self.ranks[0],  # the other end is all components
                 "lambda": len(self.scales) > 1 and best.scale in (self.scales[0], self.scales[-1])}  # fmt: skip
        return [name for name, at_edge in edges.items() if at_edge]

    def neighbours(self, at: tuple[int, int]) -> list[tuple[int, int]]:
        """The points one step away in rank or in λ."""
        near = [(at[0] + i, at[1] + j) for i, j in ((1, 0), (-1, 0), (0, 1), (0, -1))]
        return [(i, j) for i, j in near if 0 <= i < len(self.ranks) and 0 <= j < len(self.scales)]


def grid_of(rank: float | str, scale: float | str, usual: tuple[float, float]) -> Grid:
    """The grid for a rank and λ of which each is a number or `auto`.

    Arguments:
        usual: rank and λ where the climb begins; both on the grid.
    """
    ranks = RANKS if rank == AUTO else (float(rank),)
    scales = SCALES if scale == AUTO else (float(scale),)
    return Grid(ranks, scales, (_place(ranks, usual[0]), _place(scales, usual[1])))


def _place(values: tuple[float, ...], usual: float) -> int:
    return values.index(usual) if len(values) > 1 else 0


def climb(grid: Grid, value: Callable[[float, float], float]) -> list[Tried]:
    """All points that were tried, in order. The best, of equals the earliest, has no better neighbour."""
    seen: dict[tuple[int, int], Tried] = {}

    def look(at: tuple[int, int]) -> float:
        if at not in seen:
            rank, scale = grid.ranks[at[0]], grid.scales[at[1]]
            seen[at] = Tried(rank, scale, value(rank, scale))
        return seen[at].value

    here, moved = grid.first, True
    look(here)
    while moved:
        best = max(grid.neighbours(here), key=look, default=here)
        moved = look(best) > look(here)
        here = best if moved else here
    return list(seen.values())


def best_of(tried: list[Tried]) -> Tried:
    """The best start; of equals the first."""
    return max(tried, key=lambda start: start.value)


class HasStarts(Protocol):
    """Weights that can go to a start of the grid."""

    def reset(self, scale: float, rank: float) -> None:
        """Go to λ and rank."""
        ...

    def write(self) -> None:
        """Write the weights into the networks."""
        ...


def find_start(live: HasStarts, grid: Grid, quick_check: Judge) -> list[Tried]:
    """Put the live weights at the best start of the grid; returns what was tried."""

    def value(rank: float, scale: float) -> float:
        live.reset(scale, rank)
        live.write()
        seen = mean_agreement(quick_check(0))
        advance()
        return seen

    with stage("Searching the start"):
        tried = climb(grid, value)
    best = best_of(tried)
    live.reset(best.scale, best.rank)
    return tried
