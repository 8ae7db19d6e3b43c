"""What a block is learned towards: what the experts' block gives on its own stream, or the experts' predictions.

states       Σ_t Σ_x ‖block_ℓ(z_t) - e_t‖² / ‖e_t‖²        z_t: the merged stream before the block; e_t: the expert's behind it
predictions  Σ_t Σ_x ℓ(f_t(z_t))                           f_t: the block, what is behind it, the task's head; ℓ: the objective
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from adarank.adapt.agreement import Judged
from adarank.adapt.learner import Loss
from adarank.adapt.passage import Passage
from adarank.adapt.problem import Chunk, Problem, compares
from adarank.io import processes
from adarank.models.chain import hidden, positions

MERGED, EXPERT = "merged", "expert"  # the two streams
_SMALLEST = 1e-9  # a distance, relative to the length of what the expert gives, below which it is rounding


class Goal(Protocol):
    """What a block, which is held and filled, is learned towards.

    Attributes:
        name: what records call it.
    """

    name: ClassVar[str]

    def distances(self) -> dict[str, float]:
        """task -> how far the merge is from its expert, on the judged inputs; each process looks at its tasks. All must call it."""
        ...

    def losses(self, start: dict[str, float]) -> dict[str, Loss]:
        """task -> its loss at a step.

        Arguments:
            start: the distances at the block's start.
        """
        ...


def nearer(before: dict[str, float], after: dict[str, float]) -> bool:
    """Whether the mean over the tasks, of each one's distance relative to what it was, has fallen."""
    return sum(after[task] / max(before[task], _SMALLEST) for task in before) < len(before)


def goes_to_predictions(problem: Problem) -> bool:
    """Whether the last block is learned towards predictions: every task has its expert's as its target, and none a head to learn."""
    tasks = problem.inputs
    return not problem.function and all(compares(problem.settings, t) and not problem.learns_head(t) for t in tasks)


def batches_of(problem: Problem, task: str) -> int:
    """How many batches steps of a block see: those of the first pass, again and again."""
    return min(problem.inputs[task].one_pass, max(1, problem.settings.steps))


def all_batches(problem: Problem, task: str) -> Iterator[Any]:
    """Those that steps see, and those that are held out."""
    inputs = problem.inputs[task]
    yield from (inputs.step(number)[1] for number in range(batches_of(problem, task)))
    yield from (batch for _, batch in inputs.judged_on())


def judged_by_block(
    problem: Problem, passage: Passage, stream: str, fill: Callable[[int], None], step: int, most: int | None = None
) -> Judged:
    """What is seen of weights, on the judged inputs, after these went through one block after another; the stream is let go of.

    Of several processes each brings its tasks' inputs. All must call it.

    Arguments:
        fill: fills the block at a place, which is held. Processes may share that work.
        most: look at so many inputs per task.
    """
    chunks: dict[str, Callable[[], Iterable[Chunk]]] = {
        task: partial(problem.inputs[task].judged_on, most) for task in processes.share(list(problem.inputs))
    }
    passage.bring(stream, chunks, fill)
    judged = replace(problem, forward=passage.after(stream)).judge(most)(step)
    passage.forget(stream, chunks)
    return judged


@dataclass(frozen=True)
class _Towards:
    """What is learned where."""

    problem: Problem
    passage: Passage
    place: int

    def _again(self, task: str, loss: Loss) -> Loss:
        """A task's loss over the batches that steps of a block see, again and again."""
        batches = batches_of(self.problem, task)
        return lambda step: loss(step % batches)


class TowardsStates(_Towards):
    """Towards what the experts' blocks gave on their streams."""

    name: ClassVar[str] = "states"

    @torch.no_grad()
    def distances(self) -> dict[str, float]:
        """The means over the judged batches."""
        tasks = list(self.problem.inputs)
        return dict(zip(tasks, processes.mapped(self._mean_distance, tasks), strict=True))

    def _mean_distance(self, task: str) -> float:
        values = [float(self._distance(task, batch)) for _, batch in self.problem.inputs[task].judged_on()]
        return sum(values) / len(values)

    def losses(self, start: dict[str, float]) -> dict[str, Loss]:
        """Distances relative to the start's, so that tasks weigh alike."""
        return {task: self._loss(task, max(before, _SMALLEST)) for task, before in start.items()}

    def _loss(self, task: str, unit: float) -> Loss:
        inputs = self.problem.inputs[task]
        return self._again(task, lambda step: self._distance(task, inputs.step(step)[1]) / unit)

    def _distance(self, task: str, batch: Any) -> Tensor:
        """‖z - e‖² / ‖e‖² over the positions that count: what the block gives in the merge, and what the expert's gave."""
        chain, place = self.passage.chains[task], self.place
        mask = chain.mask(place, batch)
        given = self.passage.given(MERGED, task, chain.needed(place), batch)
        merged = positions(hidden(chain.run(place, batch, given)), mask)
        expert = positions(hidden(self.passage.given(EXPERT, task, [place], batch)[place]), mask).to(merged)
        return (merged - expert).square().sum() / expert.square().sum().clamp_min(_SMALLEST)


class TowardsPredictions(_Towards):
    """Towards the experts' predictions, by the objective with which whole networks are adapted."""

    name: ClassVar[str] = "predictions"

    @cached_property
    def _here(self) -> Problem:
        return replace(self.problem, forward=self.passage.from_block(MERGED, self.place))

    def distances(self) -> dict[str, float]:
        """The divergences from the experts' predictions."""
        return {task: signals.divergence for task, signals in self._here.judge()(0).items()}

    def losses(self, start: dict[str, float]) -> dict[str, Loss]:
        """The objective, whose tasks weigh as it weighs them."""
        return {task: self._again(task, loss) for task, loss in self._here.losses().items()}
