"""All figures of `adarank analyse`, by name."""

from __future__ import annotations

from adarank.analysis.components import Components
from adarank.analysis.figure import Figure
from adarank.analysis.interference import Interference
from adarank.analysis.landscape import Landscape
from adarank.analysis.masks import Masks
from adarank.analysis.radar import Radar
from adarank.analysis.rank_sweep import RankSweep
from adarank.analysis.ranks import Ranks
from adarank.analysis.task_count import TaskCount
from adarank.errors import RecipeError
from adarank.settings import nearest

_ALL: tuple[type[Figure], ...] = (
    Components,
    Ranks,
    Masks,
    Radar,
    RankSweep,
    TaskCount,
    Landscape,
    Interference,
)
FIGURES: dict[str, type[Figure]] = {figure.name: figure for figure in _ALL}


def figure_of(name: str) -> type[Figure]:
    """The figure of a name.

    Raises:
        RecipeError: there is none of that name; says which is nearest.
    """
    if name not in FIGURES:
        raise RecipeError(f"analyse: unknown figure '{name}'.{nearest(name, FIGURES)}")
    return FIGURES[name]
