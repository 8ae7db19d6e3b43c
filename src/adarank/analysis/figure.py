"""What every figure of `adarank analyse` says of itself: what it computes, in which parts, and how it is drawn.

A figure is settings with a name. Its parts are computed one after the other and kept as they are done, so that an
interrupted analysis goes on; its rows are a tidy table, the same that is written as CSV or Parquet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, get_origin

from pydantic import model_validator

from adarank.analysis.bench import Bench
from adarank.errors import RecipeError
from adarank.settings import Settings

Row = dict[str, Any]
"""One line of a figure's table: column -> value."""


class Figure(Settings):
    """Base of all figures. Its fields are the settings.

    Class attributes:
        name: what the command line calls it.
        summary: what it shows, in a line.
        source: the papers' figures that it is after.
        data: what it reads of the tasks' data, in words; empty if it reads none.
        outputs: what it needs of outputs of `merge`, in words; empty if it takes none.
        tasks: how many experts it takes at least.
        decomposed: it takes matrices that are decomposed.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    source: ClassVar[str]
    data: ClassVar[str] = "labels of the scored split"
    outputs: ClassVar[str] = ""
    tasks: ClassVar[int] = 1
    decomposed: ClassVar[bool] = False

    @model_validator(mode="before")
    @classmethod
    def _listed(cls, given: Any) -> Any:
        """One value for a setting that is a list, as it may be typed."""
        if not isinstance(given, Mapping):
            return given
        lists = {
            field.alias or name for name, field in cls.model_fields.items() if get_origin(field.annotation) is tuple
        }
        return {k: (v,) if k in lists and not isinstance(v, (list, tuple)) else v for k, v in given.items()}

    def check(self, bench: Bench) -> None:
        """Raise a `RecipeError` if the recipe has not what the figure needs. Called before any work."""
        if len(bench.tasks) < self.tasks:
            raise RecipeError(
                f"{self.name}: takes {self.tasks} experts or more, and the recipe has {len(bench.tasks)}."
            )
        if self.decomposed and not bench.matrices:
            raise RecipeError(f"{self.name}: no matrix of these models is decomposed. Let select: decompose name some.")
        if self.outputs and not bench.outputs:
            raise RecipeError(f"{self.name}: {self.outputs}, are needed. Give --output FOLDER for each.")

    def parts(self, bench: Bench) -> list[str]:
        """The names of the parts, in the order in which they are computed."""
        raise NotImplementedError

    def cost(self, bench: Bench) -> Mapping[str, int]:
        """What will be computed: how many of each thing, such as `forward passes of single inputs`."""
        raise NotImplementedError

    def compute(self, bench: Bench, part: str) -> list[Row]:
        """The rows of one part."""
        raise NotImplementedError

    def sentences(self, rows: Sequence[Row]) -> list[str]:
        """What the rows say, in plain words: numbers that were measured, and no more."""
        raise NotImplementedError

    def draw(self, rows: Sequence[Row]) -> Any:
        """A matplotlib figure of the rows."""
        raise NotImplementedError


def values_of(rows: Sequence[Row], column: str) -> list[Any]:
    """The distinct values of a column, in the order in which they come."""
    return list(dict.fromkeys(row[column] for row in rows))


def where(rows: Sequence[Row], **wanted: Any) -> list[Row]:
    """The rows that have these values."""
    return [row for row in rows if all(row[column] == value for column, value in wanted.items())]


def mean(numbers: Sequence[float]) -> float:
    """Their mean; NaN of none."""
    return sum(numbers) / len(numbers) if numbers else float("nan")
