"""Things known by name: those that adarank has itself, and those that other installed packages add by entry points.

A package adds one in its `pyproject.toml`, under a name of its own:

    [project.entry-points."adarank.methods"]
    half = "half_package:Half"

It is imported when its name is asked for, and never before.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from adarank.errors import RecipeError
from adarank.settings import nearest

T = TypeVar("T")
# What importing another package's module may raise.
_OF_IMPORTS = (
    ImportError,
    AttributeError,
    NameError,
    SyntaxError,
    TypeError,
    ValueError,
    LookupError,
    RuntimeError,
    OSError,
)


class Registry(Mapping[str, T], Generic[T]):
    """Name -> thing, in the order of the built-in ones, then those of other packages by name.

    Arguments:
        group: the entry points' group.
        what: what a thing is called in errors, such as `method`.
        built_in: those that adarank has itself.
        flaw: what is wrong with a thing that another package gives under a name; empty if nothing is.

    Raises:
        RecipeError: (of every look-up of such a name) the package's part cannot be imported, is not what it should be,
            or has a name that is taken.
    """

    def __init__(self, group: str, what: str, built_in: Mapping[str, T], flaw: Callable[[str, Any], str]) -> None:
        self.group, self.what, self.built_in, self._flaw = group, what, dict(built_in), flaw
        self._seen: tuple[tuple[str, ...], dict[str, list[EntryPoint]]] | None = None

    def named(self, name: str, unknown: str) -> T:
        """What is called so.

        Arguments:
            unknown: how the error begins if nothing is, such as `recipe: unknown merge_method`.

        Raises:
            RecipeError: nothing is; the error names the nearest of all names.
        """
        if name not in self:
            raise RecipeError(f"{unknown} '{name}'.{nearest(name, self)}")
        return self[name]

    def __getitem__(self, name: str) -> T:
        points = self._points().get(name, [])
        if points and (name in self.built_in or len(points) > 1):
            owners = [*(["adarank itself"] if name in self.built_in else []), *sorted(map(_package, points))]
            raise RecipeError(
                f"{self.what} '{name}': several are installed under this name, by {', '.join(owners)}. Uninstall or rename all but one."
            )
        return self._loaded(points[0]) if points else self.built_in[name]

    def __contains__(self, name: object) -> bool:
        return name in self.built_in or name in self._points()

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*self.built_in, *sorted(self._points())]))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def _points(self) -> dict[str, list[EntryPoint]]:
        """Name -> the entry points under it: two packages may take the same, and a package may be found twice.

        Looked up once for each state of `sys.path`: losses ask for their objectives every step.
        """
        if self._seen is None or self._seen[0] != tuple(sys.path):
            self._seen = (tuple(sys.path), self._installed())
        return self._seen[1]

    def _installed(self) -> dict[str, list[EntryPoint]]:
        points: dict[str, dict[tuple[str, str], EntryPoint]] = {}
        for point in entry_points(group=self.group):
            points.setdefault(point.name, {})[_package(point), point.value] = point
        return {name: list(each.values()) for name, each in points.items()}

    def _loaded(self, point: EntryPoint) -> T:
        try:
            thing: T = point.load()
        except _OF_IMPORTS as error:
            flaw = f"cannot be imported ({type(error).__name__}: {error})"
        else:
            flaw = self._flaw(point.name, thing)
        if flaw:
            raise RecipeError(
                f"{self.what} '{point.name}' of {_package(point)}: {point.value} {flaw}. Update that package, or uninstall it."
            )
        return thing


def _package(point: EntryPoint) -> str:
    return f"package '{point.dist.name}'" if point.dist else "an unnamed package"
