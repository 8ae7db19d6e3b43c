"""Which of the judged steps is kept, and why.

    kept      of the steps at which no task is behind its start, the latest that is as near to the experts as any
    line      where a step that leaves a task behind is nearer still: points on the line from the start to it, from the
              farthest, until one leaves no task behind

Steps are as near as the nearest of them if its mean agreement is higher by no more than one standard error of the
difference, input by input: later ones have settled more.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from adarank.adapt.agreement import Judged, level, mean_agreement, standard_error, worse

SHARES = (0.8, 0.6, 0.4, 0.2)  # of the way from the start: the points of the line search


@dataclass(frozen=True)
class Choice:
    """The step that is kept.

    Attributes:
        step: how many steps had been taken; 0 is the start.
        why: in words.
        rolled_back: steps were taken, and the start is kept.
        share: of the way from the start to that step, in (0, 1].
    """

    step: int
    why: str
    rolled_back: bool = False
    share: float = 1.0


@dataclass(frozen=True)
class LinePoint:
    """A point on the line from the start to a judged step, and how it was judged.

    Attributes:
        step, share: where it lies, as in `Choice`.
    """

    step: int
    share: float
    judged: Judged


def best_step(judged: Mapping[int, Judged], tolerance: float) -> int:
    """Of the judged steps at which no task is behind its start, the latest that is as near to the experts as any; 0, the
    start, if none of them is nearer than the start.

    Whether a step qualifies depends on it and the start alone, so a new judgement changes the result only to itself.
    """
    return _latest_of_the_nearest(
        judged, (s for s, judgement in judged.items() if not worse(judgement, judged[0], tolerance))
    )


def nearest_step(judged: Mapping[int, Judged]) -> int:
    """As `best_step`, whichever tasks are behind."""
    return _latest_of_the_nearest(judged, judged)


def _latest_of_the_nearest(judged: Mapping[int, Judged], steps: Iterable[int]) -> int:
    start = mean_agreement(judged[0])
    nearer = [step for step in steps if mean_agreement(judged[step]) > start]
    if not nearer:
        return 0
    nearest = max(nearer, key=lambda step: (mean_agreement(judged[step]), step))
    return max(step for step in nearer if level(judged[step], judged[nearest]))


def line_points(judged: Mapping[int, Judged], tolerance: float) -> list[tuple[int, float]]:
    """(step, share of the way to it from the start): the points to judge once all steps are taken, the farthest first. None if
    the nearest step leaves no task behind."""
    if not judged:
        return []
    nearest, kept = nearest_step(judged), best_step(judged, tolerance)
    gains = mean_agreement(judged[nearest]) > mean_agreement(judged[kept])
    return [(nearest, share) for share in SHARES] if gains and worse(judged[nearest], judged[0], tolerance) else []


def choose_best(judged: Mapping[int, Judged], tolerance: float, points: Sequence[LinePoint] = ()) -> Choice:
    """`best_step`, or the point on the line to the start that is better, with the reason for it."""
    step = best_step(judged, tolerance)
    kept = LinePoint(step, 1.0, judged[step])
    for point in points:
        if fits(point, judged, tolerance) and mean_agreement(point.judged) > mean_agreement(kept.judged):
            kept = point
    start, now = (f"{100 * mean_agreement(judgement):.2f}%" for judgement in (judged[0], kept.judged))
    within = f" by more than {tolerance:g} standard error(s)" if tolerance else ""
    later = {s: worse(judgement, judged[0], tolerance) for s, judgement in judged.items() if s > 0}
    if kept.step > 0:
        why = f"mean agreement with the experts {now}, {start} at the start; no task agrees less{within}"
        return Choice(kept.step, why, share=kept.share)
    if not later:
        return Choice(0, "no step was taken")
    fell = Counter(task for tasks in later.values() for task in tasks)
    refused = sum(bool(tasks) for tasks in later.values())
    names = ", ".join(f"{task} at {times}" for task, times in fell.most_common(3))
    least = f"; at {refused} of them a task agreed less with its expert{within} ({names})" if refused else ""
    on_line = f" and {len(points)} points on the line to it" if points else ""
    why = f"none of {len(later)} judged steps{on_line} was better than the start (mean agreement {start}){least}"
    return Choice(0, why + _forgone(judged), rolled_back=True)


def fits(point: LinePoint, judged: Mapping[int, Judged], tolerance: float) -> bool:
    """True if no task is behind its start there."""
    return not worse(point.judged, judged[0], tolerance)


def _forgone(judged: Mapping[int, Judged]) -> str:
    """The step that a larger tolerance would keep, in words; empty where none is better than the start."""
    step = nearest_step(judged)
    if step == 0:
        return ""
    errors = max(
        (first.agreement - judged[step][t].agreement) / standard_error(first) for t, first in judged[0].items()
    )
    needed = math.ceil(10 * errors) / 10
    return f"; step {step}, at {100 * mean_agreement(judged[step]):.2f}%, would be kept with tolerance: {needed:g}"
