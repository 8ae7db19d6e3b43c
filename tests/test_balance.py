"""How much each task's loss counts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adarank.adapt.agreement import Signals
from adarank.adapt.balance import FIRST, MOMENTUM, behind, repair_weights, task_weights


@given(st.integers(1, 6), st.integers(FIRST, 30), st.floats(0.1, 8.0), st.integers(0, 99))
def test_half_is_shared_evenly_and_half_by_the_smooth_maximum(
    tasks: int, steps: int, strength: float, seed: int
) -> None:
    losses = np.random.default_rng(seed).uniform(0.1, 3.0, (tasks, steps))
    start = losses[:, :FIRST].mean(axis=1)
    decay = MOMENTUM ** np.arange(steps - FIRST - 1, -1, -1) * (1 - MOMENTUM)
    mean = start * MOMENTUM ** (steps - FIRST) + losses[:, FIRST:] @ decay
    risen = np.maximum(0, (mean - start) / np.maximum(start, start.mean()))
    ratio = torch.tensor(risen, requires_grad=True)
    (tasks / strength * torch.logsumexp(strength * ratio, dim=0)).backward()
    assert ratio.grad is not None
    wanted = (1 + ratio.grad) / 2
    assert task_weights(losses.tolist(), strength, [0] * tasks) == pytest.approx(wanted.tolist())


def test_a_task_that_gets_worse_counts_more() -> None:
    better, much_better, worse = ([1.0] * FIRST + [last] * 30 for last in (0.9, 0.1, 1.5))
    own = task_weights([better, worse, much_better], 4.0, [0, 0, 0])
    assert own[1] > 2 * own[0] == 2 * own[2]
    assert sum(own) == pytest.approx(3)


@given(st.lists(st.floats(0, 50), min_size=1, max_size=9))
def test_no_task_is_left_to_itself(debts: list[float]) -> None:
    own = task_weights([[1.0] * 20] * len(debts), 4.0, debts)
    assert min(own) >= 0.5
    assert sum(own) == pytest.approx(len(debts))


@pytest.mark.parametrize("length", [0, 1, FIRST - 1])
def test_the_first_steps_and_strength_0_are_the_plain_sum(length: int) -> None:
    assert task_weights([[1.0] * length, [5.0] * length], 4.0, [0, 3]) == [1.0, 1.0]
    assert task_weights([[1.0] * 40, [5.0] * 20 + [9.0] * 20], 0.0, [0, 3]) == [1.0, 1.0]


def test_it_does_not_depend_on_the_unit_of_the_losses() -> None:
    losses = [[1.0, 0.9] * 10, [1.0, 1.1] * 10, [0.2, 0.3] * 10]
    found = task_weights([[100 * v for v in own] for own in losses], 3.0, [0, 0, 0])
    assert found == pytest.approx(task_weights(losses, 3.0, [0, 0, 0]))


def test_a_task_that_starts_at_its_expert_takes_not_all_weight() -> None:
    """Its loss is ten times what it was, and still the smallest."""
    level, lost = [1.0] * 30, [0.01] * FIRST + [0.1] * 22
    first, *_, last = task_weights([level, level, level, lost], 4.0, [0, 0, 0, 0])
    assert 1 < last / first < 2


def test_losses_below_0_that_fall_have_fallen() -> None:
    sinking, rising = [-1.0] * FIRST + [-1.5] * 9, [-1.0] * FIRST + [-0.5] * 9
    first, second = task_weights([sinking, rising], 4.0, [0, 0])
    assert 0.5 < first < 1 < second


def agreeing(**shares: float) -> dict[str, Signals]:
    return {task: Signals(share, 0.0, 0.0, 0.0, 0.5, 0.5, 100) for task, share in shares.items()}


def test_a_debt_multiplies_what_is_not_shared_evenly_by_e() -> None:
    losses = [[1.0] * 20, [1.0] * 20]
    first, second = task_weights(losses, 4.0, [0, 1])
    assert (second - 0.5) / (first - 0.5) == pytest.approx(np.e)


def test_debts_grow_behind_the_start_and_are_paid_back_after() -> None:
    start = agreeing(a=0.5, b=0.5)
    error = (0.25 / 102) ** 0.5
    judged = {0: start, 5: agreeing(a=0.4, b=0.6), 10: agreeing(a=0.49, b=0.5), 15: agreeing(a=0.5, b=0.1)}
    found = [behind(["a", "b"], dict(list(judged.items())[: n + 1])) for n in range(4)]
    first = 0.1 / error  # 2 errors behind
    assert found == [[0, 0], pytest.approx([first, 0]), pytest.approx([first + 1, 0]), pytest.approx([first, 3])]
    assert behind(["a", "b"], {}) == [0, 0]


@given(st.lists(st.floats(0, 5), min_size=1, max_size=9))
def test_in_a_repair_tasks_with_a_debt_weigh_as_the_others(debts: list[float]) -> None:
    weights = repair_weights(debts)
    assert sum(weights) == pytest.approx(len(debts))
    owing = [weight for weight, debt in zip(weights, debts, strict=True) if debt > 0]
    if 0 < len(owing) < len(debts):
        assert sum(owing) == pytest.approx(len(debts) / 2)
    else:
        assert set(weights) == {1.0}
