"""What adaptation keeps: the best judged step, the start when nothing is better, the same after any interruption."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adarank.adapt import AdaptSettings, History, adapt
from adarank.adapt.agreement import Signals, first_collapse, signals
from adarank.adapt.history import Progress
from adarank.adapt.learner import Loss
from adarank.adapt.objectives import entropy
from adarank.errors import Interrupted
from make import randn
from test_adapt_loop import Problem, assert_same, boom, told

SETTINGS = AdaptSettings(
    steps=12, lr_masks=0.05, lr_lambda=0.05, schedule="constant", save_every=3, check_every=2, tolerance=1.0,
    patience=None,
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
    problem.judge = (
        lambda step: {  # type: ignore[method-assign]
            task: Signals(1 - abs(step - 6) / 10, *list(vars(own).values())[1:]) for task, own in real(step).items()
        }
    )
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


def test_patience_ends_a_run_that_gets_no_better() -> None:
    _, history = seeded(Collapsing, SETTINGS.model_copy(update={"patience": 2}))
    assert history.step == 4
    assert history.choice
    assert history.choice.step == 0


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
    assert found.resumed_from == ([3 * (at // 3)] if at >= 3 else [])
    assert without_time(found) == without_time(wanted)
    assert not set(second.asked) & set(range(1, 3 * (at // 3) + 1))  # what was judged is not judged again


def test_a_stopped_run_with_patience_goes_on_unchanged(tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"patience": 3})
    whole, wanted = seeded(Collapsing, settings)
    torch.manual_seed(0)
    first = Collapsing()
    first.hook("b", 3, lambda value: (os.kill(os.getpid(), signal.SIGTERM), value)[1])
    with pytest.raises(Interrupted, match="step 4 of 12"):
        first.run(settings, tmp_path / "state.pt")
    second, found = seeded(Collapsing, settings, tmp_path / "state.pt")
    assert found.step == wanted.step == 6
    assert_same(whole, second)
    assert without_time(found) == without_time(wanted)


def test_a_finished_run_taken_up_again_keeps_the_same(tmp_path: Path) -> None:
    first, wanted = seeded(Collapsing, SETTINGS, tmp_path / "state.pt")
    second, found = seeded(Collapsing, SETTINGS, tmp_path / "state.pt")
    assert second.asked == []
    assert_same(first, second)
    assert without_time(found) == without_time(wanted)


REPAIRED = SETTINGS.model_copy(update={"tolerance": 0.0, "check_every": 8, "repair": 3})


class Falling(Judged):
    """Agreement as a table says it: both tasks gain with every step, but `b` is below its start from step 4 to `mended`."""

    mended = 16
    lead = 0.01  # by how much the mean rises per step

    @torch.no_grad()
    def judge(self, step: int) -> dict[str, Signals]:
        found = super().judge(step)
        shares = {"a": 0.5 + 2 * self.lead * step, "b": 0.5 if step == 0 or step >= self.mended else 0.49}
        return {task: replace(own, agreement=shares[task]) for task, own in found.items()}


class Hopeless(Falling):
    mended = 99


class Losing(Falling):
    mended = 99
    lead = -0.001


def test_a_task_behind_at_the_end_is_repaired_by_further_steps() -> None:
    problem, history = seeded(Falling, REPAIRED)
    assert history.choice
    assert problem.asked == [0, 8, 12, 17]  # rounds of five steps; over as soon as no task is behind
    assert (history.step, history.choice.step, history.choice.rolled_back) == (17, 17, False)


def test_a_repair_that_does_not_help_ends_in_the_start() -> None:
    problem, history = seeded(Hopeless, REPAIRED)
    assert history.choice
    assert problem.asked == [0, 8, 12, 17, 22, 27, *[12, 27] * 4]  # steps, rounds, points on two lines
    assert (history.step, history.choice.step, history.choice.rolled_back) == (27, 0, True)
    assert "and 8 points on the line to it" in history.choice.why
    start, _ = seeded(Hopeless, REPAIRED.model_copy(update={"steps": 0}))
    assert_same(problem, start)


class Overshot(Hopeless):
    """As hopeless, but on the line to the start `b` is level with it where less than `near` of the way is left."""

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
        return {task: replace(own, agreement=shares[task]) for task, own in found.items()}


@pytest.mark.parametrize(("near", "share", "points"), [(0.9, 0.8, 1), (0.7, 0.6, 3), (0.25, 0.2, 7)])
def test_if_the_repair_fails_the_line_search_keeps_the_farthest(near: float, share: float, points: int) -> None:
    torch.manual_seed(0)
    problem = Overshot()
    problem.near = near
    history = problem.run(REPAIRED)
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


def test_without_repair_the_line_search_starts_at_the_best_step() -> None:
    torch.manual_seed(0)
    problem = Overshot()
    problem.near = 0.65
    history = problem.run(REPAIRED.model_copy(update={"repair": 0, "retreat": 9}))
    assert [(own.step, round(own.share, 9)) for own in history.line_points] == [
        (12, 0.9),
        (12, 0.8),
        (12, 0.7),
        (12, 0.6),
    ]


@pytest.mark.parametrize(
    ("kind", "change"), [(Overshot, {"retreat": 0}), (Overshot, {"keep": "last"}), (Falling, {}), (Losing, {})]
)
def test_there_is_no_way_back_where_none_is_wanted_or_needed(kind: type[Judged], change: dict[str, Any]) -> None:
    _, history = seeded(kind, REPAIRED.model_copy(update=change))
    assert history.line_points == []


def test_a_run_stopped_on_the_way_back_ends_the_same(tmp_path: Path) -> None:
    whole, wanted = seeded(Overshot, REPAIRED)
    torch.manual_seed(0)
    first = Overshot()
    judge = first.judge

    def stopping(step: int) -> dict[str, Signals]:
        if step in first.seen:
            os.kill(os.getpid(), signal.SIGTERM)
        return judge(step)

    first.seen = {}
    first.judge = stopping  # type: ignore[method-assign]
    with pytest.raises(Interrupted, match="step 27 of 27"):
        first.run(REPAIRED, tmp_path / "state.pt")
    torch.manual_seed(0)
    second = Overshot()
    second.seen = first.seen
    found = second.run(REPAIRED, tmp_path / "state.pt")
    assert second.asked == [12, 27, 12]
    assert_same(whole, second)
    assert without_time(found) == without_time(wanted)


@pytest.mark.parametrize(
    ("kind", "change"),
    [(Losing, {}), (Hopeless, {"repair": 0}), (Hopeless, {"keep": "last"}), (Judged, {"tolerance": 9.0})],
)
def test_there_is_no_repair_where_nothing_would_be_gained(kind: type[Judged], change: dict[str, Any]) -> None:
    _, history = seeded(kind, REPAIRED.model_copy(update=change))
    assert history.step == 12


def test_a_repair_takes_small_steps_with_weights_of_its_own() -> None:
    settings = REPAIRED.model_copy(update={"check_every": 4, "repair": 6})
    torch.manual_seed(0)
    problem = Hopeless()
    weights: dict[str, list[float]] = {"a": [], "b": []}
    sizes: list[float] = []
    for task in weights:

        def hook(value: Tensor, task: str = task) -> Tensor:
            value.register_hook(lambda slope: weights[task].append(slope.item()))
            return value

        problem.losses[task] = lambda step, inner=problem.losses[task], hook=hook: hook(inner(step))
    progress: Progress = lambda history, planned: sizes.append(planned)  # noqa: E731
    adapt(problem.live, problem.losses, settings, progress=progress, judge=problem.judge, memory=problem.memory)
    assert weights["b"][11] > 1.1 > 0.9 > weights["a"][11]  # debts
    assert weights["a"][12:] == weights["b"][12:] == pytest.approx([1.0] * 24)  # one of two tasks: half and half
    assert sizes == [12] * 12 + [36] * 24


class Overdone(Judged):
    """Agreement as a table says it: the mean is highest at step 2 and in a repair, where `b` is below its start until step 12."""

    mended = 12

    @torch.no_grad()
    def judge(self, step: int) -> dict[str, Signals]:
        found = super().judge(step)
        shares = {"a": 0.9 if step == 2 or step > 8 else 0.4, "b": 0.5 if step in (0, self.mended) else 0.49}
        shares["a"] = 0.5 if step == 0 else shares["a"]
        self.seen = {**getattr(self, "seen", {}), step: {n: own.clone() for n, own in self.live.learned().items()}}
        return {task: replace(own, agreement=shares[task]) for task, own in found.items()}


OVERDONE = REPAIRED.model_copy(update={"check_every": 2, "patience": 3})  # steps end at 8, rounds have two steps


def test_a_repair_goes_on_from_the_step_nearest_to_the_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    problem, fresh, first = Overdone(), [], {}
    made = problem.live.optimiser
    monkeypatch.setattr(problem.live, "optimiser", lambda settings: fresh.append(made(settings)) or fresh[-1])
    inner = problem.losses["a"]

    def loss(step: int) -> Tensor:
        first.setdefault(step, {name: own.clone() for name, own in problem.live.learned().items()})
        return inner(step)

    problem.losses["a"] = loss
    history = problem.run(OVERDONE)
    assert problem.asked == [0, 2, 4, 6, 8, 10, 12]
    assert history.ended == 8
    assert all(torch.equal(first[8][name], own) for name, own in problem.seen[2].items())
    assert not all(torch.equal(own, problem.seen[8][name]) for name, own in problem.seen[2].items())
    assert len(fresh) == 2  # the moments of the steps that were undone are forgotten
    assert history.choice
    assert (history.choice.step, history.choice.rolled_back) == (12, False)
    assert all(torch.equal(own, problem.seen[12][name]) for name, own in problem.live.learned().items())


@pytest.mark.parametrize("at", [7, 8, 9, 11])
def test_a_run_killed_in_a_repair_goes_on_with_the_same_bits(tmp_path: Path, at: int) -> None:
    whole, wanted = seeded(Overdone, OVERDONE)
    torch.manual_seed(0)
    first = Overdone()
    first.hook("b", at, boom)
    with pytest.raises(ZeroDivisionError):
        first.run(OVERDONE, tmp_path / "state.pt")
    second, found = seeded(Overdone, OVERDONE, tmp_path / "state.pt")
    assert_same(whole, second)
    assert without_time(found) == without_time(wanted)


@pytest.mark.parametrize("at", [12, 13, 15])
def test_a_run_killed_in_its_repair_goes_on_with_the_same_bits(tmp_path: Path, at: int) -> None:
    whole, wanted = seeded(Falling, REPAIRED)
    torch.manual_seed(0)
    first = Falling()
    first.hook("b", at, boom)
    with pytest.raises(ZeroDivisionError):
        first.run(REPAIRED, tmp_path / "state.pt")
    second, found = seeded(Falling, REPAIRED, tmp_path / "state.pt")
    assert_same(whole, second)
    assert without_time(found) == without_time(wanted)
