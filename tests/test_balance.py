"""How much each task's loss counts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adarank.adapt.balance import FIRST, MOMENTUM, task_weights


@given(st.integers(1, 6), st.integers(FIRST, 30), st.floats(0.1, 8.0), st.integers(0, 99))
def test_weights_are_the_slopes_of_the_smooth_maximum(tasks: int, steps: int, strength: float, seed: int) -> None:
    losses = np.random.default_rng(seed).uniform(0.1, 3.0, (tasks, steps))
    start = losses[:, :FIRST].mean(axis=1)
    decay = MOMENTUM ** np.arange(steps - FIRST - 1, -1, -1) * (1 - MOMENTUM)
    mean = start * MOMENTUM ** (steps - FIRST) + losses[:, FIRST:] @ decay
    ratio = torch.tensor((mean - start) / start, requires_grad=True)
    (tasks / strength * torch.logsumexp(strength * ratio, dim=0)).backward()
    assert ratio.grad is not None
    assert task_weights(losses.tolist(), strength) == pytest.approx(ratio.grad.tolist())


def test_a_task_that_gets_worse_counts_more() -> None:
    better, worse = [1.0] * FIRST + [0.5] * 20, [1.0] * FIRST + [1.2] * 20
    own = task_weights([better, worse, better], 4.0)
    assert own[1] > 5 * own[0] == 5 * own[2]
    assert sum(own) == pytest.approx(3)


@pytest.mark.parametrize("length", [0, 1, FIRST - 1])
def test_the_first_steps_and_strength_0_are_the_plain_sum(length: int) -> None:
    assert task_weights([[1.0] * length, [5.0] * length], 4.0) == [1.0, 1.0]
    assert task_weights([[1.0] * 40, [5.0] * 20 + [9.0] * 20], 0.0) == [1.0, 1.0]


def test_it_does_not_depend_on_the_unit_of_a_loss() -> None:
    fall, rise = [1.0, 0.9] * 10, [1.0, 1.1] * 10
    assert task_weights([[100 * v for v in fall], rise], 3.0) == pytest.approx(task_weights([fall, rise], 3.0))


def test_losses_below_0_that_fall_have_fallen() -> None:
    sinking, rising = [-1.0] * FIRST + [-1.5] * 9, [-1.0] * FIRST + [-0.5] * 9
    first, second = task_weights([sinking, rising], 4.0)
    assert first < 1 < second
