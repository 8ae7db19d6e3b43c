"""The exceptions of adarank; `AdaRankError` catches them all.

    AdaRankError
    ├── RecipeError       the recipe, or a setting given from Python, is wrong
    ├── CheckpointError   a checkpoint is missing, damaged or unsafe to read
    ├── MismatchError     base and experts are not the same network
    ├── DataError         a data file, column, label or split is unusable
    ├── AdaptationError   adaptation cannot go on (a loss is not finite, ...)
    ├── Interrupted       stopped by a signal; the state was saved
    ├── OutputError       the output cannot be written where it was asked for
    └── ProcessError      of several processes that share the work, another one has stopped or died

Every message is a sentence that says what, where, what was got and needed, and what to do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


class AdaRankError(Exception):
    """Base of every error that adarank raises on purpose. Its message says what is wrong, where, and what to do.

    Example:
        try:
            adarank.merge_recipe("missing.yaml", "merged-missing")
        except adarank.AdaRankError as error:
            print(error)
    """


class RecipeError(AdaRankError):
    """The recipe, or a setting given from Python, is wrong."""


class CheckpointError(AdaRankError):
    """A checkpoint is missing, damaged or unsafe to read."""


class MismatchError(AdaRankError):
    """Base and experts are not the same network."""


class DataError(AdaRankError):
    """A data file, a column, a label or a split is unusable."""


class AdaptationError(AdaRankError):
    """Adaptation cannot go on."""


class Interrupted(AdaRankError):
    """Adaptation was stopped by a signal after its state was saved."""


class OutputError(AdaRankError):
    """The output cannot be written where it was asked for."""


class ProcessError(AdaRankError):
    """Of several processes that share the work of a command another one has stopped or died, or they do not meet."""


class Problems:
    """What independent checks refuse, gathered so that all of it comes at once.

    Attributes:
        errors: what was noted, in order.

    Example:
        problems = Problems()
        for check in checks:
            with problems.noted():
                check()
        problems.refuse()
    """

    def __init__(self) -> None:
        self.errors: list[AdaRankError] = []

    @contextmanager
    def noted(self) -> Iterator[None]:
        """What is raised inside is noted; what comes after the block goes on."""
        try:
            yield
        except AdaRankError as error:
            self.errors.append(error)

    def refuse(self, heading: str = "") -> None:
        """Raise what was noted, if anything: one error as it is; several as one that is of each of their kinds."""
        if len(self.errors) == 1:
            raise self.errors[0]
        if self.errors:
            given = dict.fromkeys(type(error) for error in self.errors)
            kinds = tuple(k for k in given if not any(k is not other and issubclass(other, k) for other in given))
            kind = kinds[0] if len(kinds) == 1 else type("SeveralErrors", kinds, {})
            items = [str(error).replace("\n", "\n    ") for error in self.errors]
            raise kind(itemise(heading or "Several things are wrong:", items, most=None))


def raise_together(problems: Sequence[str]) -> None:
    """Raise one `DataError` of the problems that tasks' data have, if there are any."""
    if problems:
        heading = f"{len(problems)} tasks have unusable data:"
        raise DataError(problems[0] if len(problems) == 1 else itemise(heading, problems))


def listed(error: AdaRankError) -> list[str]:
    """The problems that an error lists, each with what its heading names."""
    heading, *lines = str(error).split("\n")
    return [f"{heading.split(':')[0]}: {line.strip()}" for line in lines] or [heading]


def itemise(heading: str, problems: Sequence[str], remedy: str = "", most: int | None = 20) -> str:
    """One message for all `problems`: a heading, a line each, and what to do. At most `most` lines, and how many more."""
    lines = [heading, *(f"  {problem}" for problem in problems[:most])]
    if most is not None and len(problems) > most:
        lines.append(f"  … and {len(problems) - most} more like these")
    return "\n".join([*lines, remedy] if remedy else lines)


@contextmanager
def reading(
    kind: type[AdaRankError], path: str | Path, remedy: str = "Check the path and its permissions."
) -> Iterator[None]:
    """Turns what the system says of a file that cannot be read (no permission, a loop of links, …) into a sentence."""
    try:
        yield
    except OSError as error:
        raise kind(f"{error.filename or path}: cannot be read ({error.strerror or error}). {remedy}") from None
