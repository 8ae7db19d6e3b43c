"""The adaptation loop: it learns, it can be stopped anywhere and goes on as if it had not been."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adarank.adapt import AdaptSettings, History, Learn, LiveWeights, adapt
from adarank.adapt.learner import Loss
from adarank.errors import AdaptationError, Interrupted, RecipeError
from adarank.spectral.blocks import scaled_block, task_vector_blocks
from make import generator, randn

SETTINGS = AdaptSettings(steps=9, lr_masks=0.05, lr_lambda=0.02, schedule="constant", check_every=3)


class Problem:
    """Two tasks over one linear layer; each wants the outputs of its own expert."""

    def __init__(self, learn: Learn | None = None, scale: float = 0.1) -> None:
        self.net = nn.Linear(5, 4)
        origin = {"weight": randn(1, 4, 5), "bias": randn(2, 4)}
        self.deltas = {n: {t: randn(i, *v.shape) for i, t in ((3, "a"), (4, "b"))} for n, v in origin.items()}
        self.experts = {t: {n: origin[n] + self.deltas[n][t] for n in origin} for t in "ab"}
        blocks = {
            "weight": task_vector_blocks(origin["weight"], self.deltas["weight"]),
            "bias": scaled_block(origin["bias"], self.deltas["bias"]),
        }
        self.live = LiveWeights(dict(self.net.named_parameters()), blocks, learn or Learn(temperature=1.0), scale, 0.5)
        self.losses: dict[str, Loss] = {"a": self.loss("a"), "b": self.loss("b")}

    def loss(self, task: str) -> Loss:
        def loss(step: int) -> Tensor:
            x = torch.randn(8, 5, generator=generator(step)) + 0.01 * torch.rand(
                8, 5
            )  # some of it from the global state
            expert = self.experts[task]
            return (self.net(x) - torch.nn.functional.linear(x, expert["weight"], expert["bias"])).square().mean()

        return loss

    @torch.no_grad()
    def unseen(self) -> float:
        """Mean loss over steps that no run takes."""
        return float(sum(loss(step) for loss in self.losses.values() for step in range(1000, 1050)))

    def hook(self, task: str, at: int, act: Callable[[Tensor], Tensor]) -> None:
        """Let something happen to a task's loss at a step."""
        inner = self.losses[task]
        self.losses[task] = lambda step: act(inner(step)) if step == at else inner(step)

    def run(self, settings: AdaptSettings = SETTINGS, state: Path | None = None, fingerprint: str = "f") -> History:
        return adapt(self.live, self.losses, settings, state, fingerprint)

    def numbers(self) -> list[Tensor]:
        return [self.live.lam.detach().clone(), self.live.logits.detach().clone(),
                *(p.detach().clone() for p in self.net.parameters())]  # fmt: skip


def assert_same(first: Problem, second: Problem) -> None:
    assert all(torch.equal(a, b) for a, b in zip(first.numbers(), second.numbers(), strict=True))


def told(history: History) -> History:
    """A history without what depends on the clock and on interruptions."""
    return replace(history, seconds=0.0, resumed_from=[])


def boom(value: Tensor) -> Tensor:
    raise ZeroDivisionError("killed")


@pytest.mark.parametrize(("learn", "share"), [
    (Learn(temperature=1.0), 0.9), (Learn(masks=False), 0.9), (Learn(lam=False, temperature=1.0), 0.99),
])  # fmt: skip
def test_adaptation_reduces_the_loss(learn: Learn, share: float) -> None:
    """On inputs that no step saw. Masks alone can only switch what λ = 0.1 lets through."""
    problem = Problem(learn)
    problem.live.write()
    before = problem.unseen()
    history = problem.run(SETTINGS.model_copy(update={"steps": 60, "lr_lambda": 0.05}))
    assert problem.unseen() < share * before
    assert history.step == 60


def test_what_is_not_learned_stays() -> None:
    lam, masks = Problem(Learn(masks=False)), Problem(Learn(lam=False))
    before = lam.numbers()
    lam.run()
    masks.run()
    assert torch.equal(lam.live.logits, before[1])
    assert not torch.equal(lam.live.lam, before[0])
    assert torch.equal(masks.live.lam, before[0])
    assert not torch.equal(masks.live.logits, before[1])


def test_the_network_holds_the_final_merged_weights() -> None:
    problem = Problem()
    problem.run()
    held = problem.numbers()
    problem.live.write()
    assert all(torch.equal(a, b) for a, b in zip(held, problem.numbers(), strict=True))


def test_zero_steps_leave_the_start() -> None:
    problem = Problem()
    problem.live.write()
    before = problem.numbers()
    history = problem.run(SETTINGS.model_copy(update={"steps": 0}))
    assert history.step == 0
    assert all(torch.equal(a, b) for a, b in zip(before, problem.numbers(), strict=True))


def test_two_runs_are_equal_bit_for_bit() -> None:
    runs = [Problem(), Problem()]
    histories = []
    for problem in runs:
        torch.manual_seed(0)
        histories.append(told(problem.run()))
    assert histories[0] == histories[1]
    assert_same(*runs)


def uninterrupted(settings: AdaptSettings = SETTINGS) -> tuple[Problem, History]:
    torch.manual_seed(0)
    problem = Problem()
    return problem, problem.run(settings)


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
@pytest.mark.parametrize("at", [0, 2, 3, 4, 7])
@pytest.mark.parametrize("task", ["a", "b"])
def test_a_killed_run_goes_on_as_if_it_had_not_been(tmp_path: Path, at: int, task: str, schedule: str) -> None:
    settings = SETTINGS.model_copy(update={"schedule": schedule})
    whole, wanted = uninterrupted(settings)
    torch.manual_seed(0)
    first = Problem()
    first.hook(task, at, boom)
    with pytest.raises(ZeroDivisionError):
        first.run(settings, tmp_path / "state.pt")
    torch.manual_seed(0)
    second = Problem()
    found = second.run(settings, tmp_path / "state.pt")
    assert_same(whole, second)
    assert told(found) == told(wanted)
    assert found.resumed_from == ([3 * (at // 3)] if at >= 3 else [])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("at", [0, 4, 7])
def test_a_signal_saves_the_state_and_the_run_goes_on(tmp_path: Path, number: int, at: int) -> None:
    def stop(value: Tensor) -> Tensor:
        os.kill(os.getpid(), number)
        return value

    whole, wanted = uninterrupted()
    before = signal.getsignal(number)
    torch.manual_seed(0)
    first = Problem()
    first.hook("a", at, stop)
    with pytest.raises(Interrupted, match=f"step {at + 1} of 9"):
        first.run(state=tmp_path / "state.pt")
    assert signal.getsignal(number) is before
    torch.manual_seed(123)
    second = Problem()
    found = second.run(state=tmp_path / "state.pt")
    assert_same(whole, second)
    assert told(found) == told(wanted)
    assert found.resumed_from == [at + 1]


def test_a_signal_in_the_last_step_lets_the_run_finish(tmp_path: Path) -> None:
    def stop(value: Tensor) -> Tensor:
        os.kill(os.getpid(), signal.SIGTERM)
        return value

    whole, wanted = uninterrupted()
    torch.manual_seed(0)
    problem = Problem()
    problem.hook("b", 8, stop)
    assert told(problem.run(state=tmp_path / "state.pt")) == told(wanted)
    assert_same(whole, problem)


def test_a_second_signal_interrupts_at_once(tmp_path: Path) -> None:
    def stop_twice(value: Tensor) -> Tensor:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return value

    problem = Problem()
    problem.hook("a", 4, stop_twice)
    with pytest.raises(KeyboardInterrupt):
        problem.run(state=tmp_path / "state.pt")


def test_a_run_taken_up_again_when_finished_changes_nothing(tmp_path: Path) -> None:
    torch.manual_seed(0)
    first = Problem()
    wanted = first.run(state=tmp_path / "state.pt")
    second = Problem()
    assert told(second.run(state=tmp_path / "state.pt")) == told(wanted)
    assert_same(first, second)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("task", ["a", "b"])
def test_a_loss_that_is_nan_names_its_task_and_changes_nothing(tmp_path: Path, task: str, value: float) -> None:
    torch.manual_seed(0)
    good = Problem()
    good.run(SETTINGS.model_copy(update={"steps": 5}))
    torch.manual_seed(0)
    problem = Problem()
    problem.hook(task, 5, lambda loss: loss * value)
    with pytest.raises(AdaptationError, match=rf"task '{task}'.* at step 6.*state\.pt"):
        problem.run(state=tmp_path / "state.pt")
    assert_same(good, problem)
    assert torch.load(tmp_path / "state.pt")["learned"]["lam"].isfinite().all()


def test_a_gradient_that_is_nan_is_refused_and_changes_nothing() -> None:
    """√0 has a finite value and an infinite slope."""
    torch.manual_seed(0)
    good = Problem()
    good.run(SETTINGS.model_copy(update={"steps": 5}))
    torch.manual_seed(0)
    problem = Problem()
    problem.hook("b", 5, lambda loss: loss + (loss * 0).sqrt())
    with pytest.raises(AdaptationError, match="step 6"):
        problem.run()
    assert_same(good, problem)


def test_the_state_of_another_run_is_refused(tmp_path: Path) -> None:
    Problem().run(state=tmp_path / "state.pt", fingerprint="one")
    content = (tmp_path / "state.pt").read_bytes()
    with pytest.raises(RecipeError, match="another run"):
        Problem().run(state=tmp_path / "state.pt", fingerprint="two")
    assert (tmp_path / "state.pt").read_bytes() == content


def shortened(content: bytes, share: float) -> bytes:
    return content[: int(share * len(content))]


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_state_is_refused(tmp_path: Path, share: float) -> None:
    file = tmp_path / "state.pt"
    Problem().run(state=file, fingerprint="f")
    file.write_bytes(shortened(file.read_bytes(), share))
    with pytest.raises(RecipeError, match=r"state\.pt.*damaged"):
        Problem().run(state=file)


@pytest.mark.parametrize("content", [{"fingerprint": "f"}, {"lam": torch.ones(2)}, [1, 2], torch.ones(3)])
def test_a_file_that_is_no_state_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "state.pt")
    with pytest.raises(RecipeError, match=r"state\.pt"):
        Problem().run(state=tmp_path / "state.pt")


@pytest.mark.parametrize("content", [b"r", b"q", b"hello", b"\x80\x02.", b"(", b"}"])
def test_noise_instead_of_a_state_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "state.pt").write_bytes(content)
    with pytest.raises(RecipeError, match=r"state\.pt"):
        Problem().run(state=tmp_path / "state.pt")


def test_a_state_is_never_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash while the second state is saved leaves the first."""
    real, saves = torch.save, []

    def save(content: Any, path: Path) -> None:
        saves.append(path)
        if len(saves) == 2:
            Path(path).write_bytes(b"half")
            raise ZeroDivisionError
        real(content, path)

    whole, _ = uninterrupted()
    monkeypatch.setattr(torch, "save", save)
    torch.manual_seed(0)
    with pytest.raises(ZeroDivisionError):
        Problem().run(state=tmp_path / "state.pt")
    second = Problem()
    assert second.run(state=tmp_path / "state.pt").resumed_from == [3]
    assert_same(whole, second)


@pytest.mark.parametrize("steps", [1, 10, 500])
def test_the_cosine_factor_falls_from_one_to_near_zero(steps: int) -> None:
    settings = AdaptSettings(steps=steps, schedule="cosine")
    factors = [settings.factor(step) for step in range(steps)]
    assert factors[0] == 1
    assert all(a > b for a, b in pairwise(factors))
    assert steps == 1 or factors[-1] < 6 / steps**2 + 1e-9
    assert AdaptSettings(steps=steps, schedule="constant").factor(steps - 1) == 1


def test_clamped_lambda_is_used_within_its_range() -> None:
    problem = Problem(Learn(masks=False, clamp=(0.0, 0.15)))
    problem.run(SETTINGS.model_copy(update={"steps": 40, "lr_lambda": 0.05}))
    used = problem.live.used_lam()
    assert used.min() >= 0
    assert used.max() <= 0.15
    assert (problem.live.lam > 0.15).any()


def test_nothing_to_learn_is_refused() -> None:
    with pytest.raises(RecipeError, match="neither"):
        Problem(Learn(masks=False, lam=False)).run()


def test_history_tells_every_step() -> None:
    seen: list[tuple[int, int]] = []
    problem = Problem()
    history = adapt(problem.live, problem.losses, SETTINGS, progress=lambda h, total: seen.append((h.step, total)))
    assert seen == [(step, 9) for step in range(1, 10)]
    assert {task: len(values) for task, values in history.losses.items()} == {"a": 9, "b": 9}
    assert history.kept[-1] == problem.live.kept_share()
