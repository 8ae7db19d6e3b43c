"""The loop: a start, steps, a judgement now and then, and of what was judged the best is kept.

    start     the λ and rank at which merged model and experts agree best on a few unlabelled inputs (`start_search.py`)
    step      one forward and backward per task, one pull-back of the summed gradients, one step of Adam
    judge     every `check_every` steps: on which unlabelled inputs each task agrees with its expert (`agreement.py`)
    keep      the best judged step that leaves no task behind its start, or a point on the line to a better one (`choice.py`)

The loop knows no data, no model and no objective: a task is a function from the step's number to a scalar loss, the
judge one from the step's number to signals, and what is learned a `Learner`. What losses remember lies in a memory
that is saved with the state. That makes every step a pure function of (settings, saved state), so an interrupted run
continues exactly where it was.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adarank.adapt.agreement import Judge, Signals
from adarank.adapt.choice import Choice, LinePoint, best_step, choose_best, fits, line_points, nearest_step
from adarank.adapt.history import History, Progress
from adarank.adapt.learner import Learner, Loss, Memory, between
from adarank.adapt.settings import AdaptSettings
from adarank.adapt.start_search import Grid, Tried, best_of, find_start
from adarank.errors import AdaptationError, Interrupted
from adarank.io import processes
from adarank.io.state import read_state, write_state

SAVED_WITHIN = 60.0  # seconds: the state is saved at every judgement, and in between where steps take long


def adapt(
    live: Learner,
    losses: Mapping[str, Loss],
    settings: AdaptSettings,
    state: Path | None = None,
    fingerprint: str = "",
    progress: Progress | None = None,
    judge: Judge | None = None,
    memory: Memory | None = None,
    grid: Grid | None = None,
    quick_check: Judge | None = None,
    one_pass: int | None = None,
) -> History:
    """Learn in place; what is learned and the network are those of the kept step afterwards.

    Arguments:
        live: what is learned, such as the λ and masks of live merged weights.
        losses: task -> loss of a step. Their gradients add up.
        state: file in which the state is kept, and from which an interrupted run continues; None keeps none.
        fingerprint: identifies inputs and settings; a state with another one is refused.
        judge: called at the start, every `check_every` steps and at the end. Without one the last step is kept, and the state
            is saved as often.
        progress: called after each step.
        memory: what the losses remember; filled from the state when a run continues.
        grid: starts of λ and rank to choose from before the first step. Without one the live weights start as they are.
        quick_check: a judge that chooses among them; by default the judge itself.
        one_pass: steps after which the task with the fewest inputs has seen each of them, for `check_every: auto`.

    Raises:
        AdaptationError: a loss is not finite; names task and step.
        Interrupted: a signal asked to stop; the state was saved.
        RecipeError: the state file belongs to another run.
    """
    history = History({task: [] for task in losses})
    every = settings.interval(one_pass)
    run = _Run(live, settings, every, history, state, fingerprint, judge, {} if memory is None else memory)
    quick_check = quick_check or judge
    if not run.restore() and quick_check is not None and grid is not None and grid.open:
        run.find_start(grid, quick_check)
    live.write()
    with stop_on_signal() as stopped:
        run.judge_if_due()
        while not run.over():
            started = time.perf_counter()
            run.take_step(losses)
            run.history.seconds += time.perf_counter() - started
            run.judge_if_due()
            if progress:
                progress(run.history, settings.steps)
            if any(processes.gathered(bool(stopped))) and not run.over():
                run.stop()
            run.save_if_due()
        run.search_line(stopped)
    run.keep()
    return run.history


@contextmanager
def stop_on_signal() -> Iterator[list[int]]:
    """A list that is no longer empty once SIGINT or SIGTERM came; a second one interrupts at once."""
    caught: list[int] = []
    previous: dict[int, Any] = {}

    def note(number: int, frame: object) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(number)

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[int(number)] = signal.signal(number, note)
    except ValueError:  # not in the main thread: handlers stay as they are
        pass
    try:
        yield caught
    finally:
        for caught_number, handler in previous.items():
            signal.signal(caught_number, handler)


@dataclass
class _Run:
    """An optimiser over the live weights, with its state on disk."""

    live: Learner
    settings: AdaptSettings
    every: int  # steps between two judgements
    history: History
    state: Path | None
    fingerprint: str
    judge: Judge | None
    memory: Memory
    start: dict[str, Tensor] = field(default_factory=dict)  # what is learned, as it was before the first step
    best: dict[str, Tensor] = field(default_factory=dict)  # at the judged step that would be kept
    nearest: dict[str, Tensor] = field(default_factory=dict)  # and at the one nearest to the experts

    def __post_init__(self) -> None:
        self.optimiser = self.live.optimiser(self.settings)
        self.saved = time.monotonic()

    def find_start(self, grid: Grid, quick_check: Judge) -> None:
        """Choose a start of the grid."""
        started = time.perf_counter()
        self.history.starts = find_start(self.live, grid, quick_check)
        self.history.judging_seconds += time.perf_counter() - started

    def take_step(self, losses: Mapping[str, Loss]) -> None:
        step = self.history.step
        step_losses = self._gradients(losses)
        if self.live.ascend():
            self._gradients(losses)
            self.live.descend()
        for task, value in step_losses.items():
            self.history.losses[task].append(value)
        for group in self.optimiser.param_groups:
            group["lr"] = group["start"] * self.settings.factor(step)
        self.optimiser.step()
        self.live.write()
        share = self.live.kept_share()
        if share is not None:
            self.history.kept.append(share)

    def _gradients(self, losses: Mapping[str, Loss]) -> dict[str, float]:
        """Take the gradient of what is learned where it is; the losses there."""
        self.live.zero_grad()
        values = []
        for loss in processes.share(list(losses.values())):
            value = loss(self.history.step)
            value.backward()
            values.append(value.detach())
        shared = processes.whole(torch.stack(values).tolist() if values else [])
        step_losses = dict(zip(losses, shared, strict=True))
        self._check(step_losses)
        self.live.pull_back()
        self._check_gradients()
        return step_losses

    def judge_if_due(self) -> None:
        """Judge the current weights, and copy what was learned if they are the best so far."""
        step, judged = self.history.step, self.history.judged
        if self.judge is None or step in judged or not self._due():
            return
        judged[step] = self._judgement(step)
        if step == 0:
            self.start = self._now()
        if best_step(judged, self.settings.tolerance) == step:
            self.best = self._now()
        if nearest_step(judged) == step:
            self.nearest = self._now()

    def over(self) -> bool:
        """True if all steps are taken."""
        return self.history.step >= self.settings.steps

    def search_line(self, stopped: list[int]) -> None:
        """Where the nearest step leaves a task behind, judge points on the line to the start until one does not."""
        points = line_points(self.history.judged, self.settings.tolerance) if self.settings.keep == "best" else []
        if not points:
            return
        self.save()
        last = self._now()
        for step, share in points:
            if any(processes.gathered(bool(stopped))):
                self._set(last)
                self.stop()
            on_line = between(self.start, self.nearest, share)
            self._set(on_line)
            self.live.write()
            point = LinePoint(step, share, self._judgement(step))
            self.history.line_points.append(point)
            if fits(point, self.history.judged, self.settings.tolerance):
                if self._chosen().share == share:
                    self.best = on_line
                break
        self._set(last)
        self.live.write()

    def stop(self) -> None:
        """Save, and raise `Interrupted`."""
        self.save()
        again = "Run the same command to continue." if self.state else "No state was kept."
        raise Interrupted(f"Stopped at step {self.history.step} of {self.settings.steps}. {again}")

    def keep(self) -> None:
        """Make what is learned and the network those of the kept step, and say which it is."""
        last = self.history.step
        if self.settings.keep == "last" or not self.history.judged:
            why = (
                "the last step, as keep: last asks"
                if self.settings.keep == "last"
                else "the last step; none was judged"
            )
            self.history.choice = Choice(last, why)
            return
        self.history.choice = self._chosen()
        if (self.history.choice.step, self.history.choice.share) != (last, 1.0):
            self._set(self.best)
            self.live.write()

    def _now(self) -> dict[str, Tensor]:
        """A copy of what is learned now; on the CPU, as saved states are."""
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in self.live.learned().items()}

    def _due(self) -> bool:
        return self.history.step % self.every == 0 or self.history.step == self.settings.steps

    def _judgement(self, step: int) -> dict[str, Signals]:
        assert self.judge is not None  # it was asked for before
        started = time.perf_counter()
        judgement = dict(self.judge(step))
        self.history.judging_seconds += time.perf_counter() - started
        return judgement

    def _chosen(self) -> Choice:
        return choose_best(self.history.judged, self.settings.tolerance, self.history.line_points)

    def _check(self, values: Mapping[str, float]) -> None:
        bad = [task for task, value in values.items() if not math.isfinite(value)]
        if bad:
            where = f"; the last good state is {self.state}" if self.state and self.state.exists() else ""
            raise AdaptationError(
                f"Stopped: the loss of task '{bad[0]}' is {values[bad[0]]} at step {self.history.step + 1}{where}. "
                "Lower the step sizes, or check that task's inputs."
            )

    def _check_gradients(self) -> None:
        """A finite loss may have an infinite slope: one Adam step would spoil the state for good."""
        gradients = [p.grad for group in self.optimiser.param_groups for p in group["params"] if p.grad is not None]
        if not all(bool(gradient.isfinite().all()) for gradient in gradients):
            raise AdaptationError(
                f"Stopped: the losses of step {self.history.step + 1} are finite, but their gradient is not. "
                "Lower the step sizes, or check the tasks' inputs."
            )

    def save_if_due(self) -> None:
        """Save at every judgement, and where the last one was long ago."""
        if self._due() or time.monotonic() - self.saved > SAVED_WITHIN:
            self.save()

    def save(self) -> None:
        """Write the state, if one is kept."""
        self.saved = time.monotonic()
        if self.state is None:
            return
        memory = self._memory()
        if processes.rank() > 0:
            return
        content: dict[str, Any] = {
            "fingerprint": self.fingerprint,
            "learned": self._now(),
            "optimiser": self.optimiser.state_dict(),
            "rng": [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])],
            "losses": self.history.losses,
            "kept": self.history.kept,
            "seconds": self.history.seconds,
            "resumed_from": self.history.resumed_from,
            "judged": {
                step: {task: asdict(signals) for task, signals in judgement.items()}
                for step, judgement in self.history.judged.items()
            },
            "judging_seconds": self.history.judging_seconds,
            "start": self.start,
            "best": self.best,
            "nearest": self.nearest,
            "starts": [asdict(tried) for tried in self.history.starts],
            "memory": memory,
        }
        write_state(self.state, content, "the state")

    def _memory(self) -> dict[str, Tensor]:
        """What the losses remember, of several processes each task's by the one that steps it."""
        memories = processes.gathered({name: tensor.cpu() for name, tensor in self.memory.items()})
        stepped_by = {task: number % len(memories) for number, task in enumerate(self.history.losses)}
        names = dict.fromkeys(name for memory in memories for name in memory)
        return {name: memories[stepped_by.get(name, 0)][name] for name in names}

    def restore(self) -> bool:
        """Continue from the saved state; False if there is none."""
        if self.state is None or not self.state.exists():
            return False
        content = read_state(self.state, self.fingerprint)
        starts = [Tried(**tried) for tried in content["starts"]]
        if starts:  # which components may come back depends on the start
            self.live.reset(best_of(starts).scale, best_of(starts).rank)
        self._set(content["learned"])
        self.optimiser.load_state_dict(content["optimiser"])
        cpu, *devices = content["rng"]
        torch.set_rng_state(cpu)
        if devices and len(devices) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(devices)
        past = [*content["resumed_from"], len(next(iter(content["losses"].values())))]
        judged = {
            step: {task: Signals(**signals) for task, signals in judgement.items()}
            for step, judgement in content["judged"].items()
        }
        self.history = History(
            content["losses"], content["kept"], content["seconds"], past, judged, content["judging_seconds"]
        )
        self.history.starts = starts
        self.start, self.best, self.nearest = (content[name] for name in ("start", "best", "nearest"))
        self.memory.clear()
        self.memory.update(content["memory"])
        return True

    @torch.no_grad()
    def _set(self, numbers: Mapping[str, Tensor]) -> None:
        for name, tensor in self.live.learned().items():
            tensor.copy_(numbers[name])
