"""The exceptions of adarank; `AdaRankError` catches them all.

    AdaRankError
    ├── RecipeError       the recipe, or a setting given from Python, is wrong
    ├── CheckpointError   a checkpoint is missing, damaged or unsafe to read
    ├── MismatchError     base and experts are not the same network
    ├── DataError         a data file, column, label or split is unusable
    ├── AdaptationError   adaptation cannot go on (a loss is not finite, ...)
    ├── Interrupted       stopped by a signal; the state was saved
    └── OutputError       the output cannot be written where it was asked for

Every message is a sentence that says what, where, what was got and needed, and what to do.
"""

from __future__ import annotations

from collections.abc import Sequence


class AdaRankError(Exception):
    """Base of every error that adarank raises on purpose."""


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


def raise_together(problems: Sequence[str]) -> None:
    """Raise one `DataError` of the problems that tasks' data have, if there are any."""
    if problems:
        heading = f"{len(problems)} tasks have unusable data:"
        raise DataError(problems[0] if len(problems) == 1 else itemise(heading, problems))


def listed(error: AdaRankError) -> list[str]:
    """The problems that an error lists, each with what its heading names."""
    heading, *lines = str(error).split("\n")
    return [f"{heading.split(':')[0]}: {line.strip()}" for line in lines] or [heading]


def itemise(heading: str, problems: Sequence[str], remedy: str = "", most: int | None = None) -> str:
    """One message for all `problems`: a heading, a line each, and what to do. At most `most` lines, and how many more."""
    lines = [heading, *(f"  {problem}" for problem in problems[:most])]
    if most is not None and len(problems) > most:
        lines.append(f"  … and {len(problems) - most} more like these")
    return "\n".join([*lines, remedy] if remedy else lines)
