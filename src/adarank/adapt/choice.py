"""Which of the judged steps is kept, and why."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from adarank.adapt.agreement import Judged, Signal, mean_signal, standard_error, worse


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


def best_step(judged: Mapping[int, Judged], signal: Signal, tolerance: float) -> int:
    """Of the judged steps at which no task is `worse` than at the start, the one with the best mean
    signal; of equals the earliest. The start always qualifies, so it is kept when nothing is better.

    Whether a step qualifies depends on it and the start alone, so the result changes only to the step judged last.
    """
    start = judged[0]
    fit = [step for step, judgement in sorted(judged.items()) if step == 0 or not worse(judgement, start, tolerance)]
    return max(fit, key=lambda step: (mean_signal(judged[step], signal), -step))


def choose_best(
    judged: Mapping[int, Judged], signal: Signal, tolerance: float, line_points: Sequence[LinePoint] = ()
) -> Choice:
    """`best_step`, or the point on the line to the start that is better, with the reason for it."""
    step = best_step(judged, signal, tolerance)
    kept = LinePoint(step, 1.0, judged[step])
    for point in line_points:
        if fits(point, judged, tolerance) and mean_signal(point.judged, signal) > mean_signal(kept.judged, signal):
            kept = point
    start, now = (_shown(mean_signal(signals, signal), signal) for signals in (judged[0], kept.judged))
    within = f" by more than {tolerance:g} standard error(s)" if tolerance else ""
    later = {s: worse(judgement, judged[0], tolerance) for s, judgement in judged.items() if s > 0}
    if kept.step > 0:
        why = f"mean {signal} with the experts {now}, {start} at the start; no task agrees less{within}"
        return Choice(kept.step, why, share=kept.share)
    if not later:
        return Choice(0, "no step was taken")
    fell = Counter(task for tasks in later.values() for task in tasks)
    refused = sum(bool(tasks) for tasks in later.values())
    names = ", ".join(f"{task} at {times}" for task, times in fell.most_common(3))
    least = f"; at {refused} of them a task agreed less with its expert{within} ({names})" if refused else ""
    points = f" and {len(line_points)} points on the line to it" if line_points else ""
    why = f"none of {len(later)} judged steps{points} was better than the start (mean {signal} {start}){least}"
    return Choice(0, why + _forgone(judged, signal), rolled_back=True)


def fits(point: LinePoint, judged: Mapping[int, Judged], tolerance: float) -> bool:
    """True if no task is `worse` there than at the start."""
    return not worse(point.judged, judged[0], tolerance)


def _forgone(judged: Mapping[int, Judged], signal: Signal) -> str:
    """The step that a larger tolerance would keep, in words; empty where none is better than the start."""
    start = judged[0]
    step = max(judged, key=lambda s: (mean_signal(judged[s], signal), -s))
    if step == 0:
        return ""
    errors = max((first.agreement - judged[step][t].agreement) / standard_error(first) for t, first in start.items())
    return f"; step {step}, at {_shown(mean_signal(judged[step], signal), signal)}, would be kept with tolerance: {math.ceil(10 * errors) / 10:g}"


def _shown(value: float, signal: Signal) -> str:
    """A mean signal as sentences have it: agreement in percent, divergence in nats."""
    return f"{100 * value:.2f}%" if signal == "agreement" else f"{-value:.4f}"
