"""What the most remarkable change of the masks did to each task: measured by taking it back.

    D_j(W) - D_j(W + λ (1 - b) σ u vᵀ)        D_j: mean divergence of task j's predictions from its expert's, on the judged inputs

u, σ, v is the strongest component of one task and matrix, b its mask: the one that is kept least of all strongest ones. By
forward passes of the judge, not to first order; no label is read, and the networks hold the same afterwards.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from adarank.adapt.block_goals import judged_by_block
from adarank.adapt.exchange import Exchange
from adarank.adapt.history import Learned
from adarank.adapt.passage import Passage
from adarank.adapt.problem import Problem


@torch.no_grad()
def strongest_change(problem: Problem, learned: Learned, passage: Passage | None = None) -> dict[str, Any] | None:
    """The component, its mask, and task -> divergence as it is kept and with the component whole.

    None where every strongest component is whole, or its factors are not at hand.

    Arguments:
        problem: its networks hold what is kept.
        passage: over the networks, whose blocks are filled in turn, where a block was learned at a time.
    """
    masks = learned.masks
    least = masks.least_kept() if masks is not None else None
    if masks is None or least is None or least[2] >= 1 or least[0] not in learned.factors:
        return None
    name, task, value = least
    parameter = learned.parameters[name]
    kept = parameter.detach().clone()

    def fill(place: int) -> None:
        assert passage is not None
        passage.fill(place, learned.parameters)
        problem.models.fill([(name, parameter)] if name in passage.inside[place] else [])

    judge = problem.judge() if passage is None else partial(judged_by_block, problem, passage, "changed", fill)
    try:
        block = learned.factors[name]
        if block.here:
            parameter.copy_(block.compose(masks.lam[name], masks.with_strongest(name, task, 1)))
        Exchange({name: parameter}, [name] if block.here else []).send()
        after = judge(learned.history.step)
    finally:
        parameter.copy_(kept)
    before = learned.history.judged_kept
    divergence = {
        each: {"kept": round(before[each].divergence, 6), "whole": round(after[each].divergence, 6)} for each in after
    }
    return {"tensor": name, "task": task, "mask": round(value, 5), "divergence": divergence}
