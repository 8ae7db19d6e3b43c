"""Judging steps without labels: how near each task is to its expert, which step to keep, whether a task has collapsed.

The expert's predictions on the same inputs are the yardstick; what the answers are is never asked.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from adarank.adapt.objectives import divergences, entropy
from adarank.errors import AdaptationError

Signal = Literal["agreement", "divergence"]


@dataclass(frozen=True)
class Signals:
    """What one task's predictions look like beside its expert's, on the same unlabelled inputs.

    Attributes:
        agreement: share of inputs where both predict the same class.
        divergence: mean Kullback-Leibler divergence from the expert's predictions, in nats.
        histogram: total-variation distance between the histograms of predicted classes, 0 to 1.
        entropy: mean entropy of the predictions, in nats.
        largest, expert_largest: share of inputs that get the most frequent class, here and from the expert.
        inputs: how many inputs this rests on.
    """

    agreement: float
    divergence: float
    histogram: float
    entropy: float
    largest: float
    expert_largest: float
    inputs: int


Judged = Mapping[str, Signals]
Judge = Callable[[int], Judged]
"""step -> task -> signals of the weights that the networks hold now."""


@dataclass(frozen=True)
class Choice:
    """The step that is kept.

    Attributes:
        step: how many steps had been taken; 0 is the start.
        why: in words.
        rolled_back: steps were taken, and the start is kept.
        share: of the way from the start to that step.
    """

    step: int
    why: str
    rolled_back: bool = False
    share: float = 1.0


@dataclass(frozen=True)
class Back:
    """A point on the line from the start to a judged step, and how it was judged.

    Attributes:
        step, share: what it lies between, as in `Choice`.
    """

    step: int
    share: float
    judged: Judged


@torch.no_grad()
def signals(logits: Tensor, expert: Tensor) -> Signals:
    """Compare predictions with the expert's.

    Arguments:
        logits, expert: (inputs, classes), float.
    """
    if logits.shape[-1] < 2:
        raise AdaptationError(
            "The experts give one number for each input: there are no classes to agree on. Adaptation is of classifiers; use a method that does not adapt."
        )
    own, wanted = logits.argmax(dim=-1), expert.argmax(dim=-1)
    answered = ~logits.isnan().any(dim=-1)  # a network that gives no numbers agrees with nobody
    counts, targets = (torch.bincount(y, minlength=logits.shape[-1]).double() / len(y) for y in (own, wanted))
    return Signals(
        agreement=float(((own == wanted) & answered).double().mean()),
        divergence=float(divergences(logits.double(), expert.double()).mean()),
        histogram=float((counts - targets).abs().sum() / 2),
        entropy=float(entropy(logits.double())),
        largest=float(counts.max()),
        expert_largest=float(targets.max()),
        inputs=len(own),
    )


def mean_signal(judged: Judged, signal: Signal) -> float:
    """Mean over tasks, signed so that more is better; -inf if some task's predictions are no numbers."""
    if any(math.isnan(own.entropy) for own in judged.values()):
        return -math.inf
    values = [own.agreement if signal == "agreement" else -own.divergence for own in judged.values()]
    mean = sum(values) / len(values)
    return round(mean, 12) if math.isfinite(mean) else -math.inf  # rounded, so that equal shares are equal


def standard_error(own: Signals) -> float:
    """Of the agreement, a share a of n inputs: √(a(1-a)/n), with one agreeing and one other input added, so that it is not 0
    for a task that agrees everywhere."""
    share = (own.agreement * own.inputs + 1) / (own.inputs + 2)
    return math.sqrt(share * (1 - share) / (own.inputs + 2))


def mean_error(judged: Judged) -> float:
    """Standard error of the mean agreement over tasks."""
    return math.sqrt(sum(standard_error(own) ** 2 for own in judged.values())) / len(judged)


def worse(judged: Judged, start: Judged, tolerance: float) -> list[str]:
    """Tasks whose agreement is below the start's by more than `tolerance` standard errors of it."""
    return [
        task
        for task, first in start.items()
        if judged[task].agreement < first.agreement - tolerance * standard_error(first) - 1e-12
    ]


def best_step(judged: Mapping[int, Judged], signal: Signal, tolerance: float) -> int:
    """Of the judged steps at which no task is `worse` than at the start, the one with the best mean
    signal; the earlier one of equals. The start always qualifies, so it is the answer when nothing is better.

    Whether a step qualifies depends on it and the start alone, so the answer changes only to the step judged last.
    """
    start = judged[0]
    fit = [step for step, own in sorted(judged.items()) if step == 0 or not worse(own, start, tolerance)]
    return max(fit, key=lambda step: (mean_signal(judged[step], signal), -step))


def choose_best(judged: Mapping[int, Judged], signal: Signal, tolerance: float, backs: Sequence[Back] = ()) -> Choice:
    """`best_step`, or the point on the way back to the start that is better, with the reason for it."""
    step = best_step(judged, signal, tolerance)
    sign = 1 if signal == "agreement" else -1
    kept = Back(step, 1.0, judged[step])
    for back in backs:
        if fits(back, judged, tolerance) and mean_signal(back.judged, signal) > mean_signal(kept.judged, signal):
            kept = back
    start, found = (sign * mean_signal(own, signal) for own in (judged[0], kept.judged))
    within = f" by more than {tolerance:g} standard error(s)" if tolerance else ""
    later = {s: worse(own, judged[0], tolerance) for s, own in judged.items() if s > 0}
    if kept.step > 0:
        why = f"mean {signal} with the experts {found:.4f}, {start:.4f} at the start; no task agrees less{within}"
        return Choice(kept.step, why, share=kept.share)
    if not later:
        return Choice(0, "no step was taken")
    fell = Counter(task for tasks in later.values() for task in tasks)
    refused = sum(bool(tasks) for tasks in later.values())
    names = ", ".join(f"{task} at {times}" for task, times in fell.most_common(3))
    least = f"; at {refused} of them a task agreed less with its expert{within} ({names})" if refused else ""
    points = f" and {len(backs)} points on the way back to it" if backs else ""
    why = f"none of {len(later)} judged steps{points} was better than the start (mean {signal} {start:.4f}){least}"
    return Choice(0, why + _forgone(judged, signal), rolled_back=True)


def fits(back: Back, judged: Mapping[int, Judged], tolerance: float) -> bool:
    """True if no task is `worse` there than at the start."""
    return not worse(back.judged, judged[0], tolerance)


def _forgone(judged: Mapping[int, Judged], signal: Signal) -> str:
    """The step that a larger tolerance would keep, in words; nothing where none is better than the start."""
    start = judged[0]
    step = max(judged, key=lambda own: (mean_signal(judged[own], signal), -own))
    if step == 0:
        return ""
    errors = max((first.agreement - judged[step][t].agreement) / standard_error(first) for t, first in start.items())
    found = (1 if signal == "agreement" else -1) * mean_signal(judged[step], signal)
    return f"; step {step}, at {found:.4f}, would be kept with tolerance: {math.ceil(10 * errors) / 10:g}"


def collapsed(now: Signals, start: Signals) -> bool:
    """True if one class took over that the expert does not give so often.

    What the most frequent class leaves to all others is less than half of what it left at the start and of what the
    expert leaves, and the histogram is at least 0.05 away from the expert's. A task that is all but one class with its
    own expert is no collapse, nor is one that was so at the start.
    """
    left = 1 - now.largest
    return left < 0.5 * min(1 - start.largest, 1 - now.expert_largest) and now.histogram >= 0.05


def first_collapse(judged: Mapping[int, Judged]) -> dict[str, int]:
    """task -> the first judged step at which it had collapsed, for those that ever did."""
    found: dict[str, int] = {}
    for step, own in sorted(judged.items()):
        for task, seen in own.items():
            if collapsed(seen, judged[0][task]):
                found.setdefault(task, step)
    return found
