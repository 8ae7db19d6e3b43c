"""What adaptation keeps: the best judged step, the start when nothing is better, the same after any interruption."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adarank.adapt import AdaptSettings, History, adapt
from adarank.adapt.agreement import Signals, first_collapse, signals
from adarank.adapt.learner import Loss
from adarank.adapt.objectives import entropy
from adarank.errors import Interrupted
from make import agreeing, randn
from test_adapt_loop import Problem, assert_same, boom, told

SETTINGS = AdaptSettings(
    steps=12, lr_masks=0.05, lr_lambda=0.05, schedule="constant", check_every=2, tolerance=1.0,
)  # fmt: skip


class Judged(Problem):
    """The problem of the loop's tests, judged by its experts' outputs, with losses that remember their past."""

    def __init__(self) -> None:
        super().__init__()
        self.memory: dict[str, Tensor] = {}
        self.inputs = randn(99, 40, 5)
        self.losses = {task: self.remembering(task, loss) for task, loss in self.losses.items()}
        self.asked: list[int] = []

    def remembering(self, task: str, inner: Loss) -> Loss:
        def loss(step: int) -> Tensor:
            value = inner(step)
            self.memory[task] = 0.5 * self.memory.get(task, torch.zeros(())) + value.detach()
            return value * (1 + self.memory[task])

        return loss

    def answers(self, task: str) -> Tensor:
        return torch.nn.functional.linear(self.inputs, self.experts[task]["weight"], self.experts[task]["bias"])

    @torch.no_grad()
    def judge(self, step: int) -> dict[str, Signals]:
        self.asked.append(step)
        return {task: signals(self.net(self.inputs), self.answers(task)) for task in self.losses}

    def run(self, settings: AdaptSettings = SETTINGS, state: Path | None = None, fingerprint: str = "f") -> History:
        return adapt(self.live, self.losses, settings, state, fingerprint, judge=self.judge, memory=self.memory)


class Collapsing(Judged):
    """Entropy alone, on small inputs: the bias decides, and both tasks go to the one class that it favours."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs = 0.2 * self.inputs
        self.losses = {task: lambda step: entropy(self.net(self.inputs)) for task in self.losses}

    def answers(self, task: str) -> Tensor:
        return self.inputs @ self.experts[task]["weight"].T

    def run(self, settings: AdaptSettings = SETTINGS, state: Path | None = None, fingerprint: str = "f") -> History:
        fast = settings.model_copy(update={"lr_masks": 0.2, "lr_lambda": 0.2})
        return super().run(fast, state, fingerprint)


def seeded(kind: type[Judged], settings: AdaptSettings = SETTINGS, state: Path | None = None) -> tuple[Judged, History]:
    torch.manual_seed(0)
    problem = kind()
    return problem, problem.run(settings, state)


def without_time(history: History) -> History:
    history.judging_seconds = 0.0
    return told(history)


def test_it_is_judged_at_the_start_at_every_check_and_at_the_end() -> None:
    problem, history = seeded(Judged, SETTINGS.model_copy(update={"check_every": 5}))
    assert problem.asked == [0, 5, 10, 12]
    assert list(history.judged) == problem.asked


def test_the_best_step_gives_the_weights_of_stopping_there() -> None:
    """A rule that prefers a step in the middle: agreement that falls after it."""
    torch.manual_seed(0)
    problem = Judged()
    real = problem.judge
    problem.judge = lambda step: {  # type: ignore[method-assign]
        task: replace(own, agreed=agreeing(1 - abs(step - 6) / 10)) for task, own in real(step).items()
    }
    history = problem.run()
    assert history.choice
    assert (history.choice.step, history.step) == (6, 12)
    short, _ = seeded(Judged, SETTINGS.model_copy(update={"steps": 6, "keep": "last"}))
    assert_same(problem, short)
    assert problem.live.mask_file(("a", "b"), "average", {}).kept_share() == short.live.kept_share()


def test_a_run_that_collapses_a_task_is_rolled_back_to_the_start() -> None:
    problem, history = seeded(Collapsing)
    start, _ = seeded(Collapsing, SETTINGS.model_copy(update={"steps": 0}))
    assert history.judged[12]["a"].largest > 0.95 > 0.5 > history.judged[0]["a"].largest
    seen = first_collapse(history.judged)
    assert set(seen) == {"a", "b"}
    assert max(seen.values()) <= 4
    assert history.choice
    assert history.choice.rolled_back
    assert history.choice.step == 0
    assert "none of 6 judged steps was better than the start" in history.choice.why
    assert_same(problem, start)


def test_the_last_step_is_kept_if_asked() -> None:
    problem, history = seeded(Collapsing, SETTINGS.model_copy(update={"keep": "last"}))
    assert history.choice
    assert (history.choice.step, history.choice.rolled_back) == (12, False)
    start, _ = seeded(Collapsing, SETTINGS.model_copy(update={"steps": 0}))
    assert not torch.equal(problem.live.lam, start.live.lam)


@pytest.mark.parametrize("kind", [Judged, Collapsing])
@pytest.mark.parametrize("at", [0, 4, 5, 7, 11])
def test_a_killed_run_keeps_the_same_step_with_the_same_bits(tmp_path: Path, kind: type[Judged], at: int) -> None:
    whole, wanted = seeded(kind)
    torch.manual_seed(0)
    first = kind()
    first.hook("b", at, boom)
    with pytest.raises(ZeroDivisionError):
        first.run(SETTINGS, tmp_path / "state.pt")
    second, found = seeded(kind, SETTINGS, tmp_path / "state.pt")
    assert_same(whole, second)
    assert found.resumed_from == ([2 * (at // 2)] if at >= 2 else [])
    assert without_time(found) == without_time(wanted)
    assert not set(second.asked) & set(range(1, 2 * (at // 2) + 1))  # what was judged is not judged again


def test_a_stopped_run_goes_on_unchanged(tmp_path: Path) -> None:
    whole, wanted = seeded(Collapsing)
    torch.manual_seed(0)
    first = Collapsing()
    first.hook("b", 4, lambda value: (os.kill(os.getpid(), signal.SIGTERM), value)[1])
    with pytest.raises(Interrupted, match="step 5 of 12"):
        first.run(SETTINGS, tmp_path / "state.pt")
    second, found = seeded(Collapsing, SETTINGS, tmp_path / "state.pt")
    assert found.resumed_from == [5]
    assert_same(whole, second)
    assert without_time(found) == without_time(wanted)


def test_a_run_of_long_steps_is_saved_between_judgements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter(range(0, 10**6, 40))  # two looks at the clock are more than the longest time without a saved state
    monkeypatch.setattr(time, "monotonic", lambda: next(seconds))
    torch.manual_seed(0)
    first = Judged()
    first.hook("b", 7, boom)
    with pytest.raises(ZeroDivisionError):
        first.run(SETTINGS.model_copy(update={"check_every": 50}), tmp_path / "state.pt")
    _, found = seeded(Judged, SETTINGS.model_copy(update={"check_every": 50}), tmp_path / "state.pt")
    assert len(found.resumed_from) == 1
    assert found.resumed_from[0] >= 5


def test_a_finished_run_taken_up_again_keeps_the_same(tmp_path: Path) -> None:
    first, wanted = seeded(Collapsing, SETTINGS, tmp_path / "state.pt")
    second, found = seeded(Collapsing, SETTINGS, tmp_path / "state.pt")
    assert second.asked == []
    assert_same(first, second)
    assert without_time(found) == without_time(wanted)


STRICT = SETTINGS.model_copy(update={"tolerance": 0.0, "check_every": 8})


class Falling(Judged):
    """Agreement as a table says it: `a` gains with every step, but `b` is below its start from step 4 on."""

    lead = 0.02  # by how much `a` rises per step

    @torch.no_grad()
    def judge(self, step: int) -> dict[str, Signals]:
        found = super().judge(step)
        shares = {"a": 0.5 + self.lead * step, "b": 0.5 if step == 0 else 0.49}
        return {task: replace(own, agreed=agreeing(shares[task])) for task, own in found.items()}


class Losing(Falling):
    lead = -0.01


def test_a_task_behind_on_the_whole_line_ends_in_the_start() -> None:
    problem, history = seeded(Falling, STRICT)
    assert history.choice
    assert problem.asked == [0, 8, 12, *[12] * 4]  # steps, then points on the line
    assert (history.step, history.choice.step, history.choice.rolled_back) == (12, 0, True)
    assert "and 4 points on the line to it" in history.choice.why
    start, _ = seeded(Falling, STRICT.model_copy(update={"steps": 0}))
    assert_same(problem, start)


class Overshot(Falling):
    """On the line to the start `b` is level with it where less than `near` of the way is left."""

    near = 0.7

    @torch.no_grad()
    def judge(self, step: int) -> dict[str, Signals]:
        before, found = self.__dict__.setdefault("seen", {}), super().judge(step)
        now = {name: own.clone() for name, own in self.live.learned().items()}
        if step not in before:
            before[step] = now
            return found
        way = before[step]["lam"] - before[0]["lam"]
        share = float((now["lam"] - before[0]["lam"]).norm() / way.norm())
        shares = {"a": 0.5 + 0.1 * share, "b": 0.5 if share < self.near else 0.49}
        return {task: replace(own, agreed=agreeing(shares[task])) for task, own in found.items()}


@pytest.mark.parametrize(("near", "share", "points"), [(0.9, 0.8, 1), (0.7, 0.6, 2), (0.25, 0.2, 4)])
def test_the_line_search_keeps_the_farthest_that_fits(near: float, share: float, points: int) -> None:
    torch.manual_seed(0)
    problem = Overshot()
    problem.near = near
    history = problem.run(STRICT)
    assert history.choice
    assert (history.choice.step, history.choice.share, history.choice.rolled_back) == (12, pytest.approx(share), False)
    assert len(history.line_points) == points
    assert history.judged_kept == history.line_points[-1].judged
    for name, own in problem.live.learned().items():
        first, last = (problem.seen[step][name] for step in (0, 12))
        assert torch.allclose(own, (1 - share) * first + share * last, rtol=0, atol=1e-7)
    before = problem.net.weight.clone()
    problem.live.write()
    assert torch.equal(problem.net.weight, before)  # the network is that of what is kept


@pytest.mark.parametrize(
    ("kind", "change"),
    [(Overshot, {"tolerance": 1.0}), (Overshot, {"keep": "last"}), (Losing, {}), (Judged, {"tolerance": 9.0})],
)
def test_there_is_no_line_search_where_nothing_would_be_gained(kind: type[Judged], change: dict[str, Any]) -> None:
    _, history = seeded(kind, STRICT.model_copy(update=change))
    assert history.line_points == []
    assert history.step == 12


@pytest.mark.parametrize("stopped_at", [1, 2])
def test_a_run_stopped_in_its_line_search_ends_the_same(tmp_path: Path, stopped_at: int) -> None:
    whole, wanted = seeded(Overshot, STRICT)
    torch.manual_seed(0)
    first = Overshot()
    first.near = 0.1  # so that no point ends the search
    judge, points = first.judge, []

    def stopping(step: int) -> dict[str, Signals]:
        points.append(step in first.seen)
        if sum(points) == stopped_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return judge(step)

    first.seen = {}
    first.judge = stopping  # type: ignore[method-assign]
    with pytest.raises(Interrupted, match="step 12 of 12"):
        first.run(STRICT, tmp_path / "state.pt")
    torch.manual_seed(0)
    second = Overshot()
    second.seen = first.seen
    found = second.run(STRICT, tmp_path / "state.pt")
    assert second.asked == [12, 12]
    assert_same(whole, second)
    assert without_time(found) == without_time(wanted)
