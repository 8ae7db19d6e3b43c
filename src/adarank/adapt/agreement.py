"""How near a task's predictions are to its expert's, without labels, and whether it has collapsed.

The expert's predictions on the same inputs are the reference; labels are never read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adarank.adapt.objectives import divergences, entropies
from adarank.adapt.top_logits import TopLogits, matched
from adarank.errors import AdaptationError


@dataclass(frozen=True)
class Signals:
    """What one task's predictions look like beside its expert's, on the same unlabelled inputs.

    Attributes:
        agreed: for each input 1 where both predict the same class, else 0.
        divergence: mean Kullback-Leibler divergence from the expert's predictions, in nats.
        histogram: total-variation distance between the histograms of predicted classes, 0 to 1.
        entropy: mean entropy of the predictions, in nats.
        largest, expert_largest: share of inputs that get the most frequent class, here and from the expert.
    """

    agreed: bytes
    divergence: float
    histogram: float
    entropy: float
    largest: float
    expert_largest: float

    @property
    def inputs(self) -> int:
        """How many inputs this rests on."""
        return len(self.agreed)

    @property
    def agreement(self) -> float:
        """Share of inputs where both predict the same class."""
        return sum(self.agreed) / len(self.agreed)

    def numbers(self) -> dict[str, float]:
        """All of it in numbers, as a record has them."""
        of_all = {name: value for name, value in vars(self).items() if name != "agreed"}
        return {"agreement": self.agreement, **of_all, "inputs": self.inputs}


Judged = Mapping[str, Signals]
"""task -> signals: one judgement."""


Judge = Callable[[int], Judged]
"""step -> task -> signals of the weights that the networks hold now."""


@dataclass(frozen=True)
class Compared:
    """Predictions beside the expert's, one by one: what signals are counted from.

    Attributes:
        predicted, wanted: (inputs,) the class that is predicted, and the expert's.
        answered: (inputs,) whether the prediction is a number at all.
        divergences, entropies: (inputs,) float64, in nats.
        classes: how many there are.
    """

    predicted: Tensor
    wanted: Tensor
    answered: Tensor
    divergences: Tensor
    entropies: Tensor
    classes: int


@torch.no_grad()
def compare(logits: Tensor, expert: Tensor | TopLogits) -> Compared:
    """Compare predictions with the expert's on the same inputs, in the same order.

    Arguments:
        logits: (inputs, classes), float.
        expert: (inputs, classes) logits, or the largest of them.

    Raises:
        AdaptationError: there is one class, so nothing to agree on.
    """
    if logits.shape[-1] < 2:
        raise AdaptationError(
            "The experts give one number for each input: there are no classes to agree on. Adaptation is of classifiers; use a method that does not adapt."
        )
    whole = isinstance(expert, Tensor)
    here, there = matched(logits, expert)
    return Compared(
        predicted=logits.argmax(dim=-1).cpu(),
        wanted=expert.argmax(dim=-1).cpu() if isinstance(expert, Tensor) else expert.best,
        answered=~logits.isnan().any(dim=-1).cpu(),  # a prediction of NaN agrees with none
        divergences=divergences(here.double(), there.double()).cpu(),
        entropies=entropies(logits.double() if whole else logits).double().cpu(),  # of a vocabulary doubles are large
        classes=logits.shape[-1],
    )


def summary(parts: Sequence[Compared]) -> Signals:
    """The signals of all predictions that were compared, in parts."""
    predicted, wanted, answered, apart, spread = (
        torch.cat([getattr(part, name) for part in parts])
        for name in ("predicted", "wanted", "answered", "divergences", "entropies")
    )
    classes = max(part.classes for part in parts)  # of neighbours as many as a batch has texts
    counts, targets = (torch.bincount(y, minlength=classes).double() / len(y) for y in (predicted, wanted))
    return Signals(
        agreed=bytes(((predicted == wanted) & answered).tolist()),
        divergence=float(apart.mean()),
        histogram=float((counts - targets).abs().sum() / 2),
        entropy=float(spread.mean()),
        largest=float(counts.max()),
        expert_largest=float(targets.max()),
    )


def signals(logits: Tensor, expert: Tensor | TopLogits) -> Signals:
    """Compare predictions with the expert's: `compare`, and the `summary` of it.

    Example:
        expert = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
        assert signals(expert, expert).agreement == 1.0
    """
    return summary([compare(logits, expert)])


def mean_agreement(judged: Judged) -> float:
    """Mean over tasks; -inf if some task's predictions are NaN."""
    if any(math.isnan(of_task.entropy) for of_task in judged.values()):
        return -math.inf
    mean = sum(of_task.agreement for of_task in judged.values()) / len(judged)
    return round(mean, 12)  # so that equal shares are equal


def change(now: Signals, before: Signals) -> tuple[int, int]:
    """Inputs (lost, gained) since another judgement: that agreed with the expert then alone, or now alone."""
    pairs = list(zip(before.agreed, now.agreed, strict=True))
    return sum(then > here for then, here in pairs), sum(then < here for then, here in pairs)


def standard_error(of_task: Signals) -> float:
    """Of the agreement, a share a of n inputs: √(a(1-a)/n), with one agreeing and one other input added, so that it is above 0
    for a task that agrees everywhere."""
    share = (sum(of_task.agreed) + 1) / (of_task.inputs + 2)
    return math.sqrt(share * (1 - share) / (of_task.inputs + 2))


def worse(judged: Judged, start: Judged, tolerance: float) -> list[str]:
    """Tasks behind their start: their agreement is below it by more than `tolerance` standard errors of the start's.

    A paired test of inputs lost against gained would be stricter where few change: a task that agrees on 246 of 256 and loses
    two would hold back what all the others gain.
    """
    return [
        task
        for task, first in start.items()
        if judged[task].agreement < first.agreement - tolerance * standard_error(first) - 1e-12
    ]


def level(judged: Judged, other: Judged) -> bool:
    """True if the mean agreement is not below the other's by more than one standard error of the difference, input by input."""
    changes = [(change(judged[task], of_task), of_task.inputs) for task, of_task in other.items()]
    below = sum((lost - gained) / inputs for (lost, gained), inputs in changes)
    return below <= math.sqrt(sum((lost + gained) / inputs**2 for (lost, gained), inputs in changes)) + 1e-12


def collapsed(now: Signals, start: Signals) -> bool:
    """True if one class took over that the expert predicts less often.

    What the most frequent class leaves to all others is less than half of what it left at the start and of what the
    expert leaves, and the histogram is at least 0.05 away from the expert's. A task whose
    expert gives almost one class alone has not collapsed, nor has one that was so at the start.
    """
    left = 1 - now.largest
    return left < 0.5 * min(1 - start.largest, 1 - now.expert_largest) and now.histogram >= 0.05


def first_collapse(judged: Mapping[int, Judged]) -> dict[str, int]:
    """task -> the first judged step at which it had collapsed, for those that ever did."""
    first: dict[str, int] = {}
    for step, judgement in sorted(judged.items()):
        for task, of_task in judgement.items():
            if collapsed(of_task, judged[0][task]):
                first.setdefault(task, step)
    return first
