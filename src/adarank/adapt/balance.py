"""How much each task's loss counts in a step: more, where it is worse than at the start.

    r_t = max(0, m_t - m_t⁰) / u_t         m_t: running mean of the task's losses, m_t⁰: mean of its first ones
    u_t = max(|m_t⁰|, mean_t |m_t⁰|)
    w_t = ½ + ½ T · softmax(κ r + d)_t     d_t: how far judgements have the task behind its start

With d = 0 the second half is the gradient of (T/κ) log Σ_t exp(κ r_t), a smooth maximum: the worse a task gets, the more it
counts, so that no task pays for the others; tasks that improve count equally, however much. Two things keep one task from
taking all the weight: the half that is shared evenly, and the unit u_t, since a task that starts near its expert has a loss of
almost 0, which a few inputs multiply. d accounts for agreement with the expert, which is what is promised, where the loss does
not show it. κ = 0 is the papers' plain sum. The weights depend on past losses and judgements alone: no label, no hidden state.

Tasks that are still behind after the last step are repaired: in the further steps they weigh as much as all the others.

The weights by loss are those of group DRO (Sagawa et al. 2020, arXiv:1911.08731), with progress in the place of the loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from adarank.adapt.agreement import Judged, standard_error, worse

FIRST = 8  # losses that m_t⁰ is the mean of; until then all tasks count alike
MOMENTUM = 0.9
EVEN = 0.5  # share of the whole weight that is spread evenly over the tasks, so that none is ever left out


def task_weights(losses: Sequence[Sequence[float]], strength: float, debts: Sequence[float]) -> list[float]:
    """The weight of each task in the next step; their mean is 1.

    Arguments:
        losses: one sequence of past losses per task, all of one length.
        strength: κ, 0 or more.
        debts: d_t of each task, as `behind` gives them.
    """
    if strength == 0 or len(losses[0]) < FIRST:  # too early to compare
        return [1.0] * len(losses)
    starts = [sum(past[:FIRST]) / FIRST for past in losses]
    usual = sum(map(abs, starts)) / len(starts)
    units = [max(abs(start), usual, 1e-3) for start in starts]
    exponents = [
        strength * max(0.0, _running(past, start) - start) / unit + debt
        for past, start, unit, debt in zip(losses, starts, units, debts, strict=True)
    ]
    shares = torch.tensor(exponents, dtype=torch.float64).softmax(dim=0)
    weights: list[float] = (EVEN + (1 - EVEN) * len(losses) * shares).tolist()
    return weights


def repair_weights(debts: Sequence[float]) -> list[float]:
    """The weight of each task in a step of repair: those with a debt have half of the whole, in equal parts; the mean is 1.

    A debt counts, not the last judgement alone: a task that was behind shortly before would fall behind next.
    """
    owing = sum(debt > 0 for debt in debts)
    others = len(debts) - owing
    if not owing or not others:
        return [1.0] * len(debts)
    half = len(debts) / 2
    return [half / owing if debt > 0 else half / others for debt in debts]


def behind(tasks: Sequence[str], judged: Mapping[int, Judged]) -> list[float]:
    """d_t of each task: how far judgements so far have it behind its start, in standard errors.

    A judgement at which it agreed less with its expert than at the start adds how many errors less, 1 to 3; any other takes
    1 off, down to 0.
    """
    debts = dict.fromkeys(tasks, 0.0)
    for _, judgement in sorted(judged.items())[1:]:
        fallen = set(worse(judgement, judged[0], 0.0))
        for task in judgement.keys() & debts.keys():
            first = judged[0][task]
            errors = (first.agreement - judgement[task].agreement) / standard_error(first)
            debts[task] = max(0.0, debts[task] + (min(max(errors, 1.0), 3.0) if task in fallen else -1.0))
    return list(debts.values())


def _running(losses: Sequence[float], start: float) -> float:
    """The running mean after the first ones, whose mean it starts from."""
    now = start
    for loss in losses[FIRST:]:
        now = MOMENTUM * now + (1 - MOMENTUM) * loss
    return now
