"""How much each task's loss counts in a step: more, the less it has fallen since the start.

    r_t = (m_t - m_t⁰) / |m_t⁰|            m_t: running mean of the task's losses, m_t⁰: mean of its first ones
    w_t = T · softmax(κ r)_t

These are the slopes of (T/κ) log Σ_t exp(κ r_t), a smooth maximum: a task that gets worse pulls the harder, the worse it
gets, so that no task pays for the others. κ = 0 is the papers' plain sum. A function of past losses alone: no label, no
state of its own.

The weights by loss are those of group DRO (Sagawa et al. 2020, arXiv:1911.08731), with progress in the place of the loss.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

FIRST = 8  # losses that m_t⁰ is the mean of; until then all tasks count alike
MOMENTUM = 0.9


def task_weights(losses: Sequence[Sequence[float]], strength: float) -> list[float]:
    """The weight of each task in the next step; their mean is 1.

    Arguments:
        losses: one sequence of past losses per task, all of one length.
        strength: κ, 0 or more.
    """
    if strength == 0 or len(losses[0]) < FIRST:
        return [1.0] * len(losses)
    progress = torch.tensor([_relative(own) for own in losses], dtype=torch.float64)
    weights: list[float] = (torch.softmax(strength * progress, dim=0) * len(losses)).tolist()
    return weights


def _relative(losses: Sequence[float]) -> float:
    start = now = sum(losses[:FIRST]) / FIRST
    for loss in losses[FIRST:]:
        now = MOMENTUM * now + (1 - MOMENTUM) * loss
    return (now - start) / max(abs(start), 1e-3)
