"""What adaptation minimises: pure functions of a batch's logits. The engine knows none of them.

entropy             mean entropy of the predictions                                       (AdaMerging, AdaRank)
self-label          divergence from the expert's predictions on the same inputs           (distillation without labels)
trusted-label       the expert's class, where it is surer than the merged model           (SyMerge)
infomax             mean entropy minus the entropy of the mean prediction                 (SHOT)
filtered-entropy    entropy of the inputs that are reliable and not redundant             (EATA, SAR)
features            distance to the expert's last hidden representation, and those of
                    other layers that are chosen                                          (Surgery)

A new objective is a function and a line in `OBJECTIVES`. Another package adds one by an entry point of the group
`adarank.objectives`: a function of `View` and `SelfLabel` that gives a scalar with its graph. What it looks at
beside the logits it names in its attribute `needs`, a set of `expert`, `mean` and `features`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor

from adarank.io.plugins import Registry
from adarank.settings import Settings, nearest

MOMENTUM = 0.9  # how slowly running mean predictions forget
# An input is reliable if its entropy is below this share of log(classes), and redundant if the cosine of its prediction with
# the running mean prediction is above that. The papers' values (0.05, 0.4) are for many classes: with two, a mean of (½, ½)
# has cosine 0.71 with every sure prediction.
MARGIN, REDUNDANCY = 0.4, 0.95


class SelfLabel(Settings):
    """Settings of `self-label`.

    Arguments:
        temperature: divides both logits; the loss is multiplied by its square, so that gradients keep their size.
        hard: the target is the expert's most probable class, not its probabilities.
        confidence: inputs where the expert's largest probability is below this are left out.
        top_logits: of generating models: how many logits of the expert are kept of each token that counts, the largest; all
            other tokens of the vocabulary are one more, with the probability that is left.
        layers: of the objective `features`: further hidden layers whose outputs are compared, beside what the head is given:
            names of modules, such as `encoder.layer.3`, or patterns of them.
    """

    temperature: float = Field(1.0, gt=0, description="divides both logits before the softmax")
    hard: bool = Field(False, description="target: the expert's most probable class instead of its probabilities")
    confidence: float = Field(
        0.0, ge=0, lt=1, description="inputs where the expert's largest probability is below this are left out"
    )
    top_logits: int = Field(
        64, ge=1, description="of generating models: logits of the expert that are kept of each token, the largest"
    )
    layers: tuple[str, ...] = Field(
        (), description="of the objective features: modules whose outputs are compared, beside what the head is given"
    )

    @model_validator(mode="after")
    def _fits(self) -> SelfLabel:
        if self.hard and self.temperature != 1:
            raise ValueError(f"temperature {self.temperature:g} does nothing to hard labels. Remove one of the two")
        return self


@dataclass(frozen=True)
class View:
    """What objectives may look at: one batch of one task.

    Attributes:
        logits: (batch, classes) of the merged model, with their graph.
        expert: (batch, outcomes) logits of the task's expert on the same inputs, where an objective needs them. Outcomes
            are classes; of generating models the most probable tokens, and all others as one more.
        mean: (classes,) running mean prediction, this batch included, without a graph, where an objective needs it.
        features, expert_features: (batch, width) inputs of the head, where an objective needs them; beside them the outputs of
            further layers that are chosen.
        matched: (batch, outcomes) logits of the merged model over the expert's outcomes; None: they are `logits`.
        rest: the last outcome is all other classes together.
        widths: of the features the width of each part.
    """

    logits: Tensor
    expert: Tensor | None = None
    mean: Tensor | None = None
    features: Tensor | None = None
    expert_features: Tensor | None = None
    matched: Tensor | None = None
    rest: bool = False
    widths: tuple[int, ...] = ()


def entropy(logits: Tensor) -> Tensor:
    """Mean Shannon entropy of the predictions, in nats.

        H = mean_x -Σ_c p(c|x) log p(c|x)        p = softmax(logits)

    Arguments:
        logits: (batch, classes), float.

    Returns:
        A scalar between 0 and log(classes).

    Source: AdaMerging (arXiv:2310.02575) and AdaRank (arXiv:2503.22178), Equation 6.
    """
    return entropies(logits).mean()


def self_label(
    logits: Tensor,
    expert: Tensor,
    temperature: float = 1.0,
    hard: bool = False,
    confidence: float = 0.0,
    rest: bool = False,
) -> Tensor:
    """Mean divergence from the expert's predictions on the same inputs, in nats.

        soft    T² · mean_x Σ_c q(c|x) (log q(c|x) - log p(c|x))        q = softmax(expert / T), p = softmax(logits / T)
        hard    mean_x -log p(argmax_c q(c|x) | x)

    Unlike entropy it cannot be lowered by predicting one class always, nor by one task at another's cost: soft, it is 0
    only where the merged model predicts what the expert predicts. Needs no labels, and one pass of each expert over its inputs.

    Arguments:
        logits, expert: (batch, classes), float.
        confidence: inputs where max_c softmax(expert) is below this are left out; 0 if none is left.
        rest: the last column is of all other classes together, so that it is no class that can be the most probable.

    Returns:
        A scalar, 0 or more.

    Source: Hinton et al. 2015, arXiv:1503.02531, without labels; hard labels: Lee 2013, Pseudo-Label.
    """
    surest = expert.softmax(dim=-1)[..., : expert.shape[-1] - rest].max(dim=-1)
    if hard:
        each = -logits.log_softmax(dim=-1).gather(-1, surest.indices[..., None]).squeeze(-1)
    else:
        each = temperature**2 * divergences(logits / temperature, expert / temperature)
    return _mean_where(each, surest.values >= confidence)


def trusted_label(logits: Tensor, expert: Tensor, rest: bool = False) -> Tensor:
    """Mean cross-entropy to the expert's class, over the inputs where the expert is to be trusted.

        mean_x -log p(ŷ(x)|x) over x with argmax p = ŷ or max q ≥ max p        ŷ = argmax q, q = softmax(expert), p = softmax(logits)

    Left out are inputs where the merged model is surer of another class; 0 if none is left.

    Arguments:
        logits, expert: (batch, classes), float.
        rest: as for `self_label`.

    Source: SyMerge, arXiv:2412.19098.
    """
    classes = expert.shape[-1] - rest
    surest, predicted = (part.detach().softmax(dim=-1)[..., :classes].max(dim=-1) for part in (expert, logits))
    each = -logits.log_softmax(dim=-1).gather(-1, surest.indices[..., None]).squeeze(-1)
    return _mean_where(each, (surest.values >= predicted.values) | (surest.indices == predicted.indices))


def divergences(logits: Tensor, expert: Tensor) -> Tensor:
    """(batch,) Kullback-Leibler divergence of each prediction from the expert's, in nats: Σ_c q (log q - log p)."""
    log_q = expert.log_softmax(dim=-1)
    apart = log_q - logits.log_softmax(dim=-1)
    # classes of probability 0 by the expert count nothing, even where both logits are -∞, as those that a head masks
    return (log_q.exp() * apart.where(log_q.exp() > 0, 0.0)).sum(dim=-1)


def infomax(logits: Tensor, mean: Tensor) -> Tensor:
    """Mean entropy minus the entropy of the mean prediction, in nats: low if each prediction is sure and the classes are balanced.

        L = mean_x H(p(·|x)) - H(m)        m: running mean of the predictions, this batch included

    Of m only this batch's share has a graph. Its gradient is taken with the weight it would have if the whole mean
    were this batch, since a share of 1 - momentum would make the second term as many times weaker.

    Arguments:
        logits: (batch, classes), float.
        mean: (classes,) from `running_mean`, without a graph.

    Returns:
        A scalar between -log(classes) and log(classes).

    Source: Krause et al. 2010; SHOT (Liang et al. 2020, arXiv:2002.08546), Equation 4.
    """
    log_mean = mean.clamp_min(1e-12).log()
    pull = -(logits.softmax(dim=-1).mean(dim=0) * log_mean).sum()  # its slope in p is that of H at m
    spread = -(mean * log_mean).sum()
    return entropy(logits) - (spread + pull - pull.detach())


def filtered_entropy(logits: Tensor, mean: Tensor, margin: float = MARGIN, redundancy: float = REDUNDANCY) -> Tensor:
    """Mean weighted entropy of the inputs that are reliable and not redundant, in nats.

        kept(x)   H(x) < E₀  and  cos(p(·|x), m) ≤ redundancy        E₀ = margin · log(classes)
        L = mean over kept x of exp(E₀ - H(x)) H(x),  the weight without a gradient;  0 if none is kept

    Arguments:
        logits: (batch, classes), float.
        mean: (classes,) from `running_mean`, without a graph.

    Source: EATA (Niu et al. 2022, arXiv:2204.02610), Equations 3 to 6, with the mean over all inputs seen, where theirs
    is over kept ones; the margin is also SAR's (Niu et al. 2023, arXiv:2302.12400).
    """
    each = entropies(logits)
    detached = each.detach()
    limit = margin * math.log(logits.shape[-1])
    p = logits.detach().softmax(dim=-1)
    cosine = (p @ mean) / (p.norm(dim=-1) * mean.norm()).clamp_min(1e-12)
    kept = (detached < limit) & (cosine.clamp_max(1.0) <= redundancy)
    return _mean_where(each * (limit - detached).exp(), kept)


def feature_distance(features: Tensor, expert: Tensor, widths: Sequence[int] = ()) -> Tensor:
    """Squared distance to the expert's features, relative to theirs: 0 where they agree, 1 for features of 0.

        D = mean_l D_l        D_l = Σ_x ‖f_l(x) - g_l(x)‖² / Σ_x ‖g_l(x)‖²        l: what the head is given, and further layers

    Arguments:
        features, expert: (batch, width), float: the inputs of the task's head; beside them the outputs of further layers.
        widths: the width of each of these; one without it.

    Source: the distance that Surgery (Yang et al. 2024, arXiv:2402.02705) lowers, squared and normalised.
    """
    parts = [part.split(list(widths) or part.shape[-1], dim=-1) for part in (features, expert)]
    each = [(f - g).square().sum() / g.square().sum().clamp_min(1e-12) for f, g in zip(*parts, strict=True)]
    return torch.stack(each).mean() if len(each) > 1 else each[0]


def running_mean(logits: Tensor, past: Tensor | None, momentum: float = MOMENTUM) -> Tensor:
    """(classes,) mean prediction over the batches so far, without a graph: the batch's mean if there was none before."""
    of_batch = logits.detach().softmax(dim=-1).mean(dim=0)
    return of_batch if past is None else momentum * past.to(of_batch) + (1 - momentum) * of_batch


Weights = dict[str, float]
"""objective -> its weight in the sum that a task minimises."""


def _given(tensor: Tensor | None) -> Tensor:
    assert tensor is not None  # a View has what `needs` names
    return tensor


Loss = Callable[[View, SelfLabel], Tensor]
_BUILT_IN: dict[str, Loss] = {
    "self-label": lambda v, labels: self_label(
        v.logits if v.matched is None else v.matched,
        _given(v.expert),
        **labels.model_dump(exclude={"top_logits", "layers"}),
        rest=v.rest,
    ),
    "trusted-label": lambda v, _: trusted_label(v.logits if v.matched is None else v.matched, _given(v.expert), v.rest),
    "entropy": lambda v, _: entropy(v.logits),
    "infomax": lambda v, _: infomax(v.logits, _given(v.mean)),
    "filtered-entropy": lambda v, _: filtered_entropy(v.logits, _given(v.mean)),
    "features": lambda v, _: feature_distance(_given(v.features), _given(v.expert_features), v.widths),
}
_NEEDS = {
    "self-label": "expert",
    "trusted-label": "expert",
    "infomax": "mean",
    "filtered-entropy": "mean",
    "features": "features",
}
OBJECTIVES: Registry[Loss] = Registry(
    "adarank.objectives", "objective", _BUILT_IN, lambda name, given: "" if callable(given) else "is no function"
)


def needs(name: str) -> frozenset[str]:
    """What an objective looks at beside the logits: of `expert`, `mean` and `features`."""
    if name in _BUILT_IN:
        return frozenset({_NEEDS[name]} if name in _NEEDS else ())
    return frozenset(getattr(OBJECTIVES[name], "needs", ()))


class Needing:
    """The objectives that look at a part of a `View`; `&` gives those among some names."""

    def __init__(self, *parts: str) -> None:
        self._parts = parts

    def __and__(self, names: Iterable[str]) -> set[str]:
        return {name for name in names if needs(name) & set(self._parts)}

    def __or__(self, other: Needing) -> Needing:
        return Needing(*self._parts, *other._parts)


NEED_EXPERT, NEED_MEAN, NEED_FEATURES = Needing("expert"), Needing("mean"), Needing("features")


def objective(view: View, weights: Weights, labels: SelfLabel) -> Tensor:
    """The weighted sum of a task's objectives on one batch: a scalar with its graph."""
    parts = [weight * OBJECTIVES[name](view, labels) for name, weight in weights.items()]
    return sum(parts[1:], parts[0])


def as_weights(given: str | Mapping[str, float]) -> Weights:
    """A name, or name -> weight, as weights."""
    return {given: 1.0} if isinstance(given, str) else dict(given)


def check_objective(given: Any) -> Any:
    """`given`, if it is the name of an objective or a mapping from such names to weights above 0.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(given, (str, Mapping)) or not given:
        raise ValueError("an objective's name or a mapping from names to weights was needed")
    for name, weight in as_weights(given).items():
        if name not in OBJECTIVES:
            raise ValueError(f"unknown objective '{name}'.{nearest(str(name), OBJECTIVES)}")
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < math.inf:
            raise ValueError(f"the weight of '{name}' must be a number above 0, got {weight!r}")
    return given


def entropies(logits: Tensor) -> Tensor:
    """(batch,) Shannon entropy of each prediction, in nats."""
    log_p = logits.log_softmax(dim=-1)
    return -(log_p.exp() * log_p.where(log_p.exp() > 0, 0.0)).sum(dim=-1)


def _mean_where(each: Tensor, kept: Tensor) -> Tensor:
    """Mean over the kept inputs; 0, with a graph, if there is none."""
    return (each * kept).sum() / kept.sum().clamp_min(1)
