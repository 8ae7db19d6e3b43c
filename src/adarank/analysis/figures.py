"""All figures of `adarank analyse`, by name."""

from __future__ import annotations

from adarank.analysis.figure import Figure
from adarank.analysis.interference import Interference
from adarank.analysis.masks import Masks
from adarank.analysis.radar import Radar
from adarank.analysis.ranks import Ranks
from adarank.errors import RecipeError
from adarank.settings import nearest

_ALL: tuple[type[Figure], ...] = (Ranks, Interference, Masks, Radar)
FIGURES: dict[str, type[Figure]] = {figure.name: figure for figure in _ALL}


def figure_of(name: str) -> type[Figure]:
    """The figure of a name.

    Raises:
        RecipeError: there is none of that name; says which is nearest.
    """
    if name not in FIGURES:
        raise RecipeError(f"analyse: unknown figure '{name}'.{nearest(name, FIGURES)}")
    return FIGURES[name]
