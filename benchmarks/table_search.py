"""A row's settings on select, with labels: a grid that widens until its best point lies inside."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from table_rows import WORTH, Grid

from adarank.methods import Method
from adarank.settings import parse
from adarank.workflow.search import Point, each_tasks_best, edges, try_points

if TYPE_CHECKING:
    from table_bench import Bench


def widened(bench: Bench, kind: type[Method], name: str, axes: Grid, folder: Path) -> list[Point]:
    """The points of a grid and those that it was widened by, until the best lies inside, or it is level there."""

    def tried(values: Mapping[str, Iterable[Any]]) -> list[Point]:
        grid = [dict(zip(values, point, strict=True)) for point in itertools.product(*values.values())]
        points = [(settings, parse(kind, settings, name)) for settings in grid]
        return try_points(bench.job, bench.models, bench.data, points, folder)

    points = tried(axes)
    gained = math.inf
    while (beyond := edges(kind, points)) and gained >= WORTH:
        near, before = _near(points), max(point.mean for point in points)
        for axis, (_, further) in beyond.items():
            points += [p for p in tried({**near, axis: [further]}) if p not in points]
        gained = max(point.mean for point in points) - before
    return points + each_tasks_best(kind, points)


def _near(points: Sequence[Point]) -> dict[str, list[Any]]:
    """Of each axis, the best point's value and those next to it."""
    best = max(points, key=lambda point: point.mean).settings
    near = {}
    for axis, at in best.items():
        values = sorted({point.settings[axis] for point in points})
        place = values.index(at)
        near[axis] = values[max(0, place - 1) : place + 2]
    return near
