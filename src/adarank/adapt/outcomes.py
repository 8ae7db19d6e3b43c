"""How what networks give is read as predictions beside the expert's: each a choice among outcomes, with its probabilities.

    classes   the classes of an input                                            (inputs, classes)
    pairs     for each class of an input, whether it has it                      (inputs, classes) -> (inputs · classes, 2)
    tokens    the class of each token                                            (inputs, tokens, classes) -> (tokens, classes)
    spans     where an answer begins, and where it ends                          (inputs, 2, tokens) -> (2 · inputs, tokens)
    numbers   which part of the range of the expert's numbers an input falls in  (inputs, 1) -> (inputs, parts)
    vectors   whether a vector has the direction of the expert's, or the other   (inputs, texts, width) -> (inputs · texts, 2)

So divergence, entropy, agreement and collapse mean the same for all. A divergence is 0 only where network and expert agree.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from adarank.adapt.agreement import Compared, compare
from adarank.adapt.top_logits import TopLogits, matched
from adarank.data.labels import Problem
from adarank.errors import AdaptationError


class Outcomes(Protocol):
    """How a task's outputs are read.

    Attributes:
        of_one_class: one class is predicted of each input, so that running means of predictions and heads can be learned.
        entropies: predictions have an entropy without the expert's.
    """

    of_one_class: bool = False
    entropies: bool = True

    def read(self, outputs: Tensor) -> Tensor:
        """(predictions, outcomes) logits of what a network gave, with their graph."""
        ...

    def matched(self, outputs: Tensor, expert: Any) -> tuple[Tensor, Tensor]:
        """(predictions, outcomes) logits of a network, with their graph, and of the expert, for the same inputs."""
        return self.read(outputs), self.read(expert.to(outputs))

    def compared(self, outputs: Tensor, expert: Any) -> Compared:
        """What is seen of a network's predictions beside the expert's."""
        return compare(*self.matched(outputs, expert))


@dataclass(frozen=True)
class Classes(Outcomes):
    """One class of each input, or of each token of a text that is generated: logits as they are."""

    of_one_class: bool = True

    def read(self, outputs: Tensor) -> Tensor:
        """As they are."""
        return outputs

    def matched(self, outputs: Tensor, expert: Tensor | TopLogits) -> tuple[Tensor, Tensor]:
        """Over all classes, or those that were kept of the expert's."""
        return matched(outputs, expert)

    def compared(self, outputs: Tensor, expert: Tensor | TopLogits) -> Compared:
        """As `compare` does it."""
        return compare(outputs, expert)


@dataclass(frozen=True)
class Pairs(Outcomes):
    """Several classes of an input: each is had or not, with logits 0 and z, as binary cross-entropy has it."""

    def read(self, outputs: Tensor) -> Tensor:
        """(inputs · classes, 2)."""
        each = outputs.flatten()
        return torch.stack([torch.zeros_like(each), each], dim=-1)


@dataclass(frozen=True)
class Tokens(Outcomes):
    """One class of each token; tokens that have none are NaN."""

    def read(self, outputs: Tensor) -> Tensor:
        """(tokens, classes) of those that have one."""
        return outputs[~outputs.isnan().all(dim=-1)]

    def matched(self, outputs: Tensor, expert: Tensor) -> tuple[Tensor, Tensor]:
        """Of the tokens for which the expert gives a class, whatever the network gives there."""
        counted = ~expert.isnan().all(dim=-1)
        return outputs[counted.to(outputs.device)], expert[counted].to(outputs)


@dataclass(frozen=True)
class Spans(Outcomes):
    """Where an answer begins and where it ends; tokens where none can are -∞."""

    def read(self, outputs: Tensor) -> Tensor:
        """(2 · inputs, tokens)."""
        return outputs.flatten(0, 1)


@dataclass(frozen=True)
class Numbers(Outcomes):
    """A number x of each input, read as p_k ∝ exp(-(x - c_k)² / 2w²) over evenly spaced c_k of distance w, so that

        divergence ≈ (x - expert)² / 2w²        w: half the standard deviation of the expert's numbers

    and an input agrees where both are nearest to the same c_k.

    Attributes:
        centres: (outcomes,) the c_k, from below the expert's least number to above its greatest.
    """

    centres: Tensor = field(default_factory=lambda: torch.arange(2.0))
    entropies: bool = False

    @classmethod
    def of(cls, expert: Tensor) -> Numbers:
        """Of the expert's numbers, (inputs, 1).

        Raises:
            AdaptationError: they are all one number, or not finite.
        """
        numbers = expert.double()
        width = float(numbers.std(correction=0)) / 2
        if not math.isfinite(width) or width <= 0:
            raise AdaptationError("The expert gives one number for all inputs, or none at all, so there is nothing to learn. Look at its model and data.")  # fmt: skip
        low, high = float(numbers.min()) - 2 * width, float(numbers.max()) + 2 * width
        count = min(256, math.ceil((high - low) / width) + 1)  # far outliers share the last ones
        return cls(float(numbers.mean()) + width * (torch.arange(count) - round((float(numbers.mean()) - low) / width)))

    def read(self, outputs: Tensor) -> Tensor:
        """(inputs, outcomes)."""
        centres = self.centres.to(outputs)
        return -(((outputs - centres) / (centres[1] - centres[0])) ** 2) / 2


@dataclass(frozen=True)
class Vectors(Outcomes):
    """A vector of each text, with the probability (1 + cosine) / 2 that it has the direction of the expert's: the divergence is

        -log((1 + cos(x, expert)) / 2)        0 where the directions are the same

    A text agrees where its nearest neighbour among the texts of its batch is the one that it has by the expert's vectors.
    """

    entropies: bool = False

    def read(self, outputs: Tensor) -> Tensor:
        """(inputs · texts, width) unit vectors: directions, not logits."""
        return functional.normalize(outputs.flatten(0, -2), dim=-1)

    def matched(self, outputs: Tensor, expert: Tensor) -> tuple[Tensor, Tensor]:
        """(inputs · texts, 2) log-probabilities."""
        cosine = (self.read(outputs) * self.read(expert.to(outputs))).sum(dim=-1).clamp(-1, 1)
        same = torch.stack([(1 + cosine) / 2, (1 - cosine) / 2], dim=-1).clamp_min(1e-12).log()
        return same, torch.tensor([0.0, -torch.inf]).to(same).expand_as(same)

    @torch.no_grad()
    def compared(self, outputs: Tensor, expert: Tensor) -> Compared:
        """Nearest neighbours beside the expert's, and divergences."""
        each = compare(*self.matched(outputs, expert))
        here, there = (_nearest(self.read(vectors).cpu()) for vectors in (outputs, expert))
        nothing = torch.zeros_like(each.entropies)
        return Compared(here, there, each.answered, each.divergences, nothing, len(each.answered))


def _nearest(units: Tensor) -> Tensor:
    """(texts,) of each unit vector the place of its nearest neighbour."""
    return (units @ units.T).fill_diagonal_(-torch.inf).argmax(dim=-1)


def outcomes_of(problem: Problem, expert: Tensor | None) -> Outcomes:
    """How outputs are read.

    Arguments:
        problem: what they are, as `data.labels.Problem` has it.
        expert: the expert's, of inputs that are judged; numbers are read by their range, and cannot be without them.
    """
    if problem == "regression":
        return Numbers() if expert is None else Numbers.of(expert)
    known: dict[Problem, Outcomes] = {
        "multi_label_classification": Pairs(),
        "token_classification": Tokens(),
        "spans": Spans(),
        "embedding": Vectors(),
        "multiple_choice": Classes(of_one_class=False),
    }
    return known.get(problem, Classes())
