"""Judging without labels: the signals, the step that is kept, collapse."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import adarank
from adarank.adapt.agreement import Signals, change, collapsed, first_collapse, level, mean_agreement, signals, worse
from adarank.adapt.choice import best_step, choose_best, line_points, nearest_step
from adarank.errors import AdaptationError, DataError
from adarank.recipe.reader import load_recipe
from adarank.workflow.merge import merge
from make import agreeing, randn
from text_zoo import ADAPT, make_zoo, recipe

PLAIN = Signals(agreeing(0.8, 256), 0.5, 0.1, 0.3, 0.5, 0.5)


def judged(*agreements: tuple[float, ...]) -> dict[int, dict[str, Signals]]:
    """Judgements 25 steps apart; each has one number per task. Of two the one that agrees more does so wherever the other does."""
    return {25 * i: {f"t{t}": replace(PLAIN, agreed=agreeing(a)) for t, a in enumerate(own)}
            for i, own in enumerate(agreements)}  # fmt: skip


def drawn(seed: int, steps: int, tasks: int = 3, inputs: int = 30) -> dict[int, dict[str, Signals]]:
    """Judgements whose tasks agree with their experts on inputs drawn at random, with a share that drifts."""
    draw = np.random.default_rng(seed)
    shares = np.clip(0.6 + 0.15 * draw.standard_normal((steps, tasks)), 0.1, 0.95)
    return {25 * i: {f"t{t}": replace(PLAIN, agreed=(draw.random(inputs) < shares[i, t]).tobytes()) for t in range(tasks)}
            for i in range(steps)}  # fmt: skip


def table(seen: dict[int, dict[str, Signals]]) -> np.ndarray:
    """(judgements, tasks, inputs), 1 where a task agrees with its expert."""
    return np.array([[list(own.agreed) for own in of_step.values()] for of_step in seen.values()], dtype=int)


@given(st.integers(1, 30), st.integers(2, 5), st.integers(0, 10**6))
def test_signals_are_numpys(count: int, classes: int, seed: int) -> None:
    logits, expert = (2 * randn(seed + i, count, classes) for i in (0, 1))
    found = signals(logits, expert)
    a, b = (x.double().numpy() for x in (logits, expert))
    p, q = (np.exp(x) / np.exp(x).sum(axis=1, keepdims=True) for x in (a, b))
    own, wanted = a.argmax(axis=1), b.argmax(axis=1)
    shares = [[float(np.mean(y == c)) for c in range(classes)] for y in (own, wanted)]
    assert found.agreement == pytest.approx(np.mean(own == wanted))
    assert found.histogram == pytest.approx(sum(max(0.0, x - y) for x, y in zip(*shares, strict=True)))
    assert found.divergence == pytest.approx(float(np.mean(np.sum(q * np.log(q / p), axis=1))))
    assert found.entropy == pytest.approx(float(np.mean(-np.sum(p * np.log(p), axis=1))))
    assert (found.largest, found.expert_largest, found.inputs) == (max(shares[0]), max(shares[1]), count)


def test_the_expert_agrees_with_itself() -> None:
    found = signals(randn(1, 9, 3), randn(1, 9, 3))
    assert (found.agreement, found.histogram) == (1, 0)
    assert found.divergence == pytest.approx(0, abs=1e-9)


@given(st.integers(0, 10**6), st.integers(1, 7), st.sampled_from([0.0, 1.0, 2.5]))
def test_the_best_step_is_the_one_that_a_search_finds(seed: int, steps: int, tolerance: float) -> None:
    seen = drawn(seed, steps)
    agreed = table(seen)
    shares, inputs = agreed.mean(axis=2), agreed.shape[2]
    smoothed = (agreed[0].sum(axis=1) + 1) / (inputs + 2)  # one input that agrees and one that does not are added
    behind = shares < shares[0] - tolerance * np.sqrt(smoothed * (1 - smoothed) / (inputs + 2)) - 1e-9
    means = agreed.mean(axis=(1, 2))
    fit = [i for i in range(steps) if not behind[i].any() and means[i] > means[0] + 1e-9]
    wanted = 0
    if fit:
        top = max(fit, key=lambda i: (round(means[i], 9), i))
        apart = agreed[top] - agreed
        level = [apart[i].sum() <= np.sqrt(np.abs(apart[i]).sum()) + 1e-9 for i in range(steps)]
        wanted = max(i for i in fit if level[i])
    assert best_step(seen, tolerance) == 25 * wanted


@given(st.integers(0, 10**6), st.integers(2, 7), st.sampled_from([0.0, 1.0]))
def test_a_new_judgement_changes_the_best_step_only_to_itself(seed: int, steps: int, tolerance: float) -> None:
    seen = drawn(seed, steps)
    before = {step: own for step, own in seen.items() if step < max(seen)}
    assert best_step(seen, tolerance) in (best_step(before, tolerance), max(seen))
    assert nearest_step(seen) in (nearest_step(before), max(seen))


def test_a_gain_at_one_tasks_cost_is_rolled_back_and_says_so() -> None:
    found = choose_best(judged((0.5, 0.8), (0.9, 0.79), (0.95, 0.7)), 0.0)
    assert (found.step, found.rolled_back) == (0, True)
    assert "t1 at 2" in found.why


def test_of_level_steps_the_latest_is_kept() -> None:
    """One of 100 inputs more is within chance, four are not."""
    assert best_step(judged((0.5,), (0.8,), (0.79,)), 0.0) == 50
    assert best_step(judged((0.5,), (0.8,), (0.76,)), 0.0) == 25
    assert best_step(judged((0.5,), (0.5,), (0.5,)), 0.0) == 0  # no nearer than the start


@given(st.integers(0, 10**6), st.integers(2, 5))
def test_a_roll_back_names_the_tolerance_that_would_keep_it(seed: int, steps: int) -> None:
    seen = drawn(seed, steps)
    found = choose_best(seen, 0.0)
    named = re.search(r"step (\d+), at ([\d.]+)%, would be kept with tolerance: ([\d.]+)", found.why)
    assert (named is not None) == (found.rolled_back and nearest_step(seen) > 0)
    if named:
        step, tolerance = int(named[1]), float(named[3])
        assert step == nearest_step(seen)
        assert not worse(seen[step], seen[0], tolerance)
        assert worse(seen[step], seen[0], tolerance - 0.11)


@given(st.integers(0, 10**6), st.integers(1, 7), st.sampled_from([0.0, 1.0]))
def test_the_line_is_searched_where_a_task_pays_for_a_gain(seed: int, steps: int, tolerance: float) -> None:
    seen = drawn(seed, steps)
    nearest, kept = nearest_step(seen), best_step(seen, tolerance)
    means = dict(zip(seen, table(seen).mean(axis=(1, 2)), strict=True))
    pays = bool(worse(seen[nearest], seen[0], tolerance)) and means[nearest] > means[kept] + 1e-9
    assert line_points(seen, tolerance) == ([(nearest, share) for share in (0.8, 0.6, 0.4, 0.2)] if pays else [])


def test_a_gain_for_all_is_kept_and_says_why() -> None:
    found = choose_best(judged((0.5, 0.8), (0.6, 0.8), (0.9, 0.7)), 0.0)
    assert (found.step, found.rolled_back) == (25, False)
    assert "70.00%, 65.00% at the start" in found.why


def test_nothing_taken_is_no_roll_back() -> None:
    assert not choose_best(judged((0.5, 0.5)), 0.0).rolled_back


def test_tolerance_is_in_standard_errors() -> None:
    start = {"a": replace(PLAIN, agreed=agreeing(0.5))}
    for agreement, tolerance, expected in (
        (0.46, 1.0, False),
        (0.44, 1.0, True),
        (0.44, 2.0, False),
        (0.49, 0.0, True),
    ):
        now = {"a": replace(PLAIN, agreed=agreeing(agreement))}
        assert bool(worse(now, start, tolerance)) == expected, (agreement, tolerance)


@given(st.integers(0, 10**6))
def test_inputs_are_lost_and_gained_one_by_one(seed: int) -> None:
    """Two judgements are level if the mean difference of their inputs is within its standard error."""
    (one, other) = drawn(seed, 2, tasks=1).values()
    differences = np.array(list(one["t0"].agreed)) - np.array(list(other["t0"].agreed), dtype=int)
    assert change(one["t0"], other["t0"]) == ((differences < 0).sum(), (differences > 0).sum())
    error = np.sqrt(np.mean(differences**2) / len(differences))
    assert level(one, other) == (-differences.mean() <= error + 1e-9)


@pytest.mark.parametrize(("start", "expert", "now", "histogram", "expected"), [
    (0.60, 0.52, 0.99, 0.47, True),   # one class takes over
    (0.55, 0.52, 0.84, 0.32, True),   # on the way there
    (0.98, 0.85, 1.00, 0.15, True),   # the last others go
    (0.98, 0.85, 0.985, 0.13, False),  # as at the start
    (0.96, 0.97, 0.99, 0.02, False),  # as its expert
    (0.32, 0.26, 0.47, 0.21, False),  # skewed, no collapse
    (0.50, 0.99, 0.99, 0.00, False),  # the expert gives one class
    (1.00, 0.60, 1.00, 0.40, False),  # was so at the start
])  # fmt: skip
def test_collapse_is_called_when_one_class_takes_over(
    start: float, expert: float, now: float, histogram: float, expected: bool
) -> None:
    first = replace(PLAIN, largest=start, expert_largest=expert)
    assert collapsed(replace(PLAIN, largest=now, expert_largest=expert, histogram=histogram), first) is expected


def test_the_first_collapse_is_kept_per_task() -> None:
    seen = judged((0.8, 0.8), (0.7, 0.8), (0.6, 0.8))
    for step in (25, 50):
        seen[step]["t0"] = replace(seen[step]["t0"], largest=0.97, histogram=0.47)
    assert first_collapse(seen) == {"t0": 25}


def test_predictions_may_lie_on_one_class_alone() -> None:
    found = signals(torch.tensor([[3.0, 0.0]] * 4), torch.tensor([[0.0, 3.0], [3.0, 0.0]] * 2))
    assert (found.agreement, found.histogram, found.largest, found.expert_largest) == (0.5, 0.5, 1.0, 0.5)


def test_a_network_that_gives_no_numbers_agrees_with_nobody() -> None:
    expert = torch.tensor([[2.0, 0.0]] * 9 + [[0.0, 2.0]])
    start, broken = signals(expert.flip(-1), expert), signals(torch.full((10, 2), math.nan), expert)
    assert (start.agreement, broken.agreement) == (0.0, 0.0)
    assert mean_agreement({"a": broken}) == -math.inf
    judged = {0: {"a": start}, 5: {"a": broken}}
    assert best_step(judged, 0.0) == 0
    assert choose_best(judged, 9.0).step == 0
    half = signals(torch.cat([expert[:5], torch.full((5, 2), math.nan)]), expert)
    assert half.agreement == 0.5


def test_experts_of_one_output_have_no_classes_to_agree_on(tmp_path: Path) -> None:
    own = nn.Linear(4, 1)
    with pytest.raises(AdaptationError, match="no classes to agree on"):
        adarank.adapt(nn.Linear(4, 1), {"a": own}, {"a": [torch.randn(3, 4)]})
    zoo = make_zoo(tmp_path)
    file = zoo / "models" / "mood" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "problem_type": "regression"}))
    with pytest.raises(
        DataError, match=r"task 'mood': .* gives 2 numbers for an input|one number an input, where it gives 2"
    ):
        merge(load_recipe(recipe(zoo, **ADAPT)), tmp_path / "out")


def test_judging_looks_at_no_more_than_asked_evenly_spread(problem: Any) -> None:
    base, experts, batches = problem
    asked: list[int] = []

    def forward(module: nn.Module, batch: Tensor) -> Tensor:
        asked.extend(i for i, own in enumerate(batches["a"]) if own is batch and not torch.is_grad_enabled())
        return module(batch)

    settings = adarank.AdaptSettings(steps=0, check_inputs=24, objective="entropy")
    found = adarank.adapt(base, experts, batches, settings=settings, forward=forward)
    assert set(asked) == {0, 2, 4}
    assert found.history.judged[0]["a"].inputs == 24
