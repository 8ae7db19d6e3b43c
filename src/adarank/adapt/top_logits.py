"""Predictions over many classes, of which only the largest are kept: what experts predict for tokens, small enough to store.

    q_i, i among the k most probable classes;   q_rest = 1 - Σ q_i        (so the kept probability mass is known exactly)

A divergence is then of k + 1 outcomes, the classes that are not kept taken as one. It is never above that of all
classes, is 0 where all predictions agree, and pulls no class of the rest against another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class TopLogits:
    """Of each prediction the largest log-probabilities.

    Attributes:
        values: (predictions, k) float32 log-probabilities, the largest first.
        classes: (predictions, k) int32, whose they are.
        rest: (predictions,) float32 log-probability of all other classes together; empty where there are none.
    """

    values: Tensor
    classes: Tensor
    rest: Tensor

    @classmethod
    def of(cls, logits: Tensor, most: int) -> TopLogits:
        """What is kept of (predictions, classes) logits, on the CPU: `most` classes, or all if there are no more."""
        log_p = logits.float().log_softmax(dim=-1)
        values, classes = log_p.topk(min(most, log_p.shape[-1]), dim=-1)
        rest = _others(log_p, classes) if most < log_p.shape[-1] else values.new_zeros(len(values), 0)
        return cls(values.cpu(), classes.int().cpu(), rest.cpu())

    @property
    def best(self) -> Tensor:
        """(predictions,) the most probable class of each."""
        return self.classes[:, 0].long()

    @property
    def mass(self) -> float:
        """Mean probability of what is kept, all predictions together."""
        return float(self.values.double().exp().sum(dim=-1).mean())

    @property
    def has_rest(self) -> bool:
        """True if not all classes are kept."""
        return self.rest.dim() == 1

    def beside(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """(predictions, outcomes) log-probabilities of a model and of these predictions, over the same outcomes.

        Arguments:
            logits: (predictions, classes) of the model, on any device; with their graph.

        Returns:
            Both over the k classes that are kept, and over all others together if there are others.
        """
        classes = self.classes.to(logits.device, torch.int64)
        log_p = logits.log_softmax(dim=-1)
        kept, values = log_p.gather(-1, classes), self.values.to(logits)
        if not self.has_rest:
            return kept, values
        return (
            torch.cat([kept, _others(log_p, classes)[:, None]], dim=-1),
            torch.cat([values, self.rest.to(logits)[:, None]], dim=-1),
        )

    def plain(self) -> dict[str, Tensor]:
        """As tensors, to be stored."""
        return {"values": self.values, "classes": self.classes, "rest": self.rest}

    def __getitem__(self, chosen: Tensor) -> TopLogits:
        """Those predictions alone."""
        return TopLogits(self.values[chosen], self.classes[chosen], self.rest[chosen])


def matched(logits: Tensor, expert: Tensor | TopLogits) -> tuple[Tensor, Tensor]:
    """A model's logits and the expert's over the same outcomes: all classes, or those that `TopLogits.beside` has."""
    return (logits, expert.to(logits)) if isinstance(expert, Tensor) else expert.beside(logits)


def joined(parts: Sequence[TopLogits]) -> TopLogits:
    """The predictions of all parts, one part after another."""
    return TopLogits(*(torch.cat([getattr(part, name) for part in parts]) for name in ("values", "classes", "rest")))


def _others(log_p: Tensor, classes: Tensor) -> Tensor:
    """(predictions,) log-probability of all but some classes."""
    return log_p.scatter(-1, classes, -torch.inf).logsumexp(dim=-1)


@dataclass(frozen=True)
class TokenTable:
    """Predictions of several tokens of each input, looked up by the inputs' rows.

    Attributes:
        tokens: of all inputs, one after another.
        spans: row -> where its predictions begin, and where they end.
    """

    tokens: TopLogits
    spans: Mapping[int, tuple[int, int]]

    @classmethod
    def of(cls, rows: Sequence[int], counts: Sequence[int], parts: Sequence[TopLogits]) -> TokenTable:
        """The table of rows with so many predictions each, which parts give in that order."""
        ends = torch.tensor([0, *counts]).cumsum(dim=0).tolist()
        return cls(joined(parts), {row: (ends[i], ends[i + 1]) for i, row in enumerate(rows)})

    def __getitem__(self, rows: Sequence[int]) -> TopLogits:
        """The predictions of some rows, in their order."""
        return self.tokens[torch.cat([torch.arange(*self.spans[row]) for row in rows])]

    def plain(self) -> dict[str, Any]:
        """As tensors and numbers, to be stored."""
        return {**self.tokens.plain(), "spans": {row: list(span) for row, span in self.spans.items()}}

    @classmethod
    def read(cls, stored: Mapping[str, Any]) -> TokenTable:
        """What `plain` gave."""
        tokens = TopLogits(stored["values"], stored["classes"], stored["rest"])
        return cls(tokens, {row: (begin, end) for row, (begin, end) in stored["spans"].items()})
