"""Unlabelled inputs that come in batches, as the Python interface is given them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor

from adarank.adapt.outcomes import Classes, Outcomes
from adarank.adapt.problem import Chunk, Predict, Predictions
from adarank.adapt.settings import AdaptSettings
from adarank.errors import DataError, itemise
from adarank.settings import nearest

T = TypeVar("T")


@dataclass
class BatchInputs:
    """One task's batches. Predictions are looked up by (held out or not, place of the batch).

    Arguments:
        batches: what is adapted on: step i takes batch i modulo their number.
        held_out: what steps are judged on; with none it is `batches`.
        learns_head: the task's head is learned from all batches, so that experts predict those, too, that no step will use.

    Attributes:
        size: inputs in the first of the judged batches; known once there are predictions.
    """

    batches: Sequence[Any]
    held_out: Sequence[Any]
    settings: AdaptSettings
    learns_head: bool = False
    size: int = field(default=1, init=False)

    @property
    def one_pass(self) -> int:
        """How many batches are adapted on."""
        return len(self.batches)

    def step(self, step: int) -> Chunk:
        """The step's batch."""
        place = step % len(self.batches)
        return (False, place), self.batches[place]

    def outcomes(self, expert: Predictions | None) -> Outcomes:
        """Classes: modules say no more of their outputs."""
        return Classes()

    @property
    def generate(self) -> bool:
        """False: a batch's logits are kept as they are, whatever they are of."""
        return False

    @property
    def held_out_from_steps(self) -> bool:
        """True if there are batches that are held out."""
        return bool(self.held_out)

    def adapted_on(self) -> list[Chunk]:
        """The batches that steps will see, or all if the head is learned from them."""
        most = len(self.batches) if self.learns_head else self.settings.steps
        return [self.step(step) for step in range(min(most, len(self.batches)))]

    def judged_on(self, most: int | None = None) -> Iterable[Chunk]:
        """Whole batches, evenly spread, as they may come sorted by their classes: one at least, `check_inputs` inputs at most."""
        judged = spread(self._candidates(), self.settings.check_inputs // self.size)
        return judged if most is None else spread(judged, most // self.size)

    def predictions(self, predict: Predict, adapted_on: bool) -> Predictions:
        """Predictions of the judged batches, and of those that steps will see."""
        first, batch = self._candidates()[0]
        known = {first: predict(batch)}
        logits = known[first].logits
        assert isinstance(logits, Tensor)  # all of them are kept
        self.size = max(1, len(logits))
        for where, batch in [*(self.adapted_on() if adapted_on else ()), *self.judged_on()]:
            if where not in known:
                known[where] = predict(batch)
        features = {where: each.features for where, each in known.items() if each.features is not None}
        return Predictions({where: each.logits for where, each in known.items()}, features or None)

    def _candidates(self) -> list[Chunk]:
        held_out = bool(self.held_out)
        return [((held_out, place), batch) for place, batch in enumerate(self.held_out or self.batches)]


def spread(items: Sequence[T], count: int) -> list[T]:
    """So many of the items, one at least, evenly spread over them."""
    count = min(len(items), max(1, count))
    return [items[i * len(items) // count] for i in range(count)]


def checked_batches(
    batches: Mapping[str, Sequence[Any]], held_out: Mapping[str, Sequence[Any]] | None, experts: Mapping[str, Any]
) -> tuple[dict[str, Sequence[Any]], dict[str, Sequence[Any]]]:
    """Each task's batches and what is held out, as lists; a `DataError` if a task has no batches."""
    listed = _listed("batches", batches, experts)
    empty = [task for task in experts if not listed.get(task)]
    if empty:
        raise DataError(
            f"batches: none for {', '.join(map(repr, empty))}. Every task needs at least one unlabelled batch."
        )
    return listed, _listed("held_out", held_out or {}, experts)


def _listed(what: str, given: Mapping[str, Any], experts: Mapping[str, Any]) -> dict[str, Sequence[Any]]:
    """task -> list of batches, from lists, loaders or generators. All problems at once."""
    problems = [f"'{task}' is no expert.{nearest(task, experts)}" for task in given if task not in experts]
    problems += [
        f"of '{task}' there is one {type(batches).__name__}. Give each task a list of batches."
        for task, batches in given.items()
        if isinstance(batches, (Tensor, Mapping, str)) or not isinstance(batches, Iterable)
    ]
    if problems:
        raise DataError(f"{what}: {problems[0]}" if len(problems) == 1 else itemise(f"{what}:", problems))
    return {task: batches if isinstance(batches, (list, tuple)) else list(batches) for task, batches in given.items()}
