"""What adaptation needs of a merge: networks over shared tensors, unlabelled inputs of each task, and the experts' predictions on them.

A `Problem` is built from recipes and files (`workflow/problem.py`) or from modules and batches (`adapt/batches.py`). The
experts' predictions, the losses, the judge and the quick check of starts are made here, for both alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from adarank.adapt.agreement import Compared, Judge, Signals, summary
from adarank.adapt.history import History, Progress
from adarank.adapt.learner import Learner, Loss, Memory
from adarank.adapt.loop import adapt
from adarank.adapt.objectives import NEED_EXPERT, NEED_FEATURES, NEED_MEAN, View, objective, running_mean
from adarank.adapt.outcomes import Outcomes
from adarank.adapt.settings import AdaptSettings
from adarank.adapt.start_search import QUICK_CHECK, Grid
from adarank.adapt.top_logits import TopLogits
from adarank.alignment.task_vectors import AlignedCheckpoints, member_tensors
from adarank.io import processes
from adarank.models import TaskModels
from adarank.models.head_inputs import Pool, head_parts, layer_outputs, named_layers
from adarank.models.predict import Forward

Function = Callable[[Tensor], Tensor]
"""Logits (batch, classes) -> scalar loss."""


L = TypeVar("L", bound=Tensor | TopLogits, covariant=True)


class Lookup(Protocol[L]):
    """Numbers of a task's inputs, by where they are: the rows of a table, or a batch's place."""

    def __getitem__(self, where: Any, /) -> L:
        """(inputs, width) of the inputs there."""
        ...


@dataclass(frozen=True)
class Predictions:
    """A network's predictions for a task's inputs.

    Attributes:
        logits: (inputs, classes) of some inputs; of generating models the largest of each of their tokens.
        features: (inputs, width) of what the task's head is given, if it was to be kept.
    """

    logits: Lookup[Tensor | TopLogits]
    features: Lookup[Tensor] | None = None


@dataclass(frozen=True)
class BatchPredictions:
    """A network's predictions for one batch, on the CPU. The attributes are as in `Predictions`."""

    logits: Tensor | TopLogits
    features: Tensor | None


Predict = Callable[[Any], BatchPredictions]
Chunk = tuple[Any, Any]
"""(where, batch): a batch, and where `Predictions` of its inputs are to be looked up."""


class Inputs(Protocol):
    """The unlabelled inputs of one task."""

    @property
    def one_pass(self) -> int:
        """Steps after which every input that is adapted on has been seen."""
        ...

    def step(self, step: int) -> Chunk:
        """What the task adapts on in a step. A pure function of the step."""
        ...

    @property
    def held_out_from_steps(self) -> bool:
        """True if steps are judged on inputs that none of them adapts on."""
        ...

    def adapted_on(self) -> Iterable[Chunk]:
        """All that steps adapt on, each input once."""
        ...

    def judged_on(self, most: int | None = None) -> Iterable[Chunk]:
        """What steps are judged on: held out if there are such inputs, `check_inputs` at most.

        Arguments:
            most: only so many of these, spread evenly.
        """
        ...

    def outcomes(self, expert: Predictions | None) -> Outcomes:
        """How a network's outputs are read as predictions, given the expert's if there are any."""
        ...

    @property
    def generate(self) -> bool:
        """True if the network gives a prediction for each of several tokens of an input."""
        ...

    def predictions(self, predict: Predict, adapted_on: bool) -> Predictions:
        """A network's predictions for the inputs that steps are judged on.

        Arguments:
            predict: runs the network.
            adapted_on: also predict those that are adapted on.
        """
        ...


@dataclass(frozen=True)
class Problem:
    """What the loop works on.

    Attributes:
        models: one network per task over the shared tensors.
        inputs: task -> its inputs.
        forward: (module, batch) -> logits (batch, classes).
        predictions: task -> its expert's predictions.
        function: what every task minimises instead of the objectives of the settings.
        memory: what losses remember from step to step. It is saved with the state.
    """

    models: TaskModels
    inputs: Mapping[str, Inputs]
    settings: AdaptSettings
    forward: Forward
    predictions: Mapping[str, Predictions]
    function: Function | None = None
    memory: Memory = field(default_factory=dict)

    @property
    def one_pass(self) -> int:
        """Steps after which the task with the fewest inputs has seen each of them."""
        return min(inputs.one_pass for inputs in self.inputs.values())

    def learns_head(self, task: str) -> bool:
        """True if the task's head is to be learned: by default where its objective has a target."""
        return not self.function and self.outcomes[task].of_one_class and learns_head(self.settings, task)

    @cached_property
    def outcomes(self) -> dict[str, Outcomes]:
        """task -> how its outputs are read."""
        return {task: inputs.outcomes(self.predictions.get(task)) for task, inputs in self.inputs.items()}

    def losses(self) -> dict[str, Loss]:
        """task -> its loss on its batch of a step, with a graph."""
        return {task: self._loss(task) for task in self.inputs}

    def judge(self, most: int | None = None) -> Judge:
        """Compares the networks' current predictions with the experts'. Reads no label.

        Arguments:
            most: look at so many inputs per task.
        """

        @torch.no_grad()
        def judge(step: int) -> dict[str, Signals]:
            tasks = list(self.inputs)
            judged = processes.mapped(lambda task: self._signals(task, self.inputs[task].judged_on(most)), tasks)
            return dict(zip(tasks, judged, strict=True))

        return judge

    def quick_check(self) -> Judge:
        """The judge on so few inputs that many starts can be compared."""
        return self.judge(QUICK_CHECK)

    def adapt(
        self,
        live: Learner,
        grid: Grid | None = None,
        state: Path | None = None,
        fingerprint: str = "",
        progress: Progress | None = None,
    ) -> History:
        """Learn in place, as `loop.adapt` says."""
        return adapt(
            live,
            self.losses(),
            self.settings,
            state,
            fingerprint,
            progress,
            self.judge(),
            self.memory,
            grid,
            self.quick_check(),
            self.one_pass,
        )

    def _loss(self, task: str) -> Loss:
        weights, module = self.settings.weights(task), self.models.modules[task]
        function = self.function
        head = head_parts(self.models, task) if not function and NEED_FEATURES & weights.keys() else []
        layers = named_layers(module, self.settings.self_label.layers) if head else []

        def loss(step: int) -> Tensor:
            where, batch = self.inputs[task].step(step)
            with layer_outputs(module, head, layers) as seen:
                logits = self.forward(module, batch)
            if function is not None:
                return function(logits)
            if NEED_MEAN & weights.keys():
                self.memory[task] = running_mean(logits, self.memory.get(task))
            view = self._view(task, where, logits, seen[-1] if seen else ())
            return objective(view, weights, self.settings.self_label)

        return loss

    def _view(self, task: str, where: Any, logits: Tensor, of_layers: Sequence[Tensor]) -> View:
        outcomes = self.outcomes[task]
        features = torch.cat(list(of_layers), dim=-1) if of_layers else None
        widths = tuple(part.shape[-1] for part in of_layers)
        if not compares(self.settings, task):
            return View(outcomes.read(logits), mean=self.memory.get(task), features=features, widths=widths)
        expert = self.predictions[task]
        targets = expert.logits[where]
        here, there = outcomes.matched(logits, targets)
        rest = isinstance(targets, TopLogits) and targets.has_rest
        expert_features = expert.features[where].to(logits) if expert.features is not None else None
        return View(outcomes.read(logits), there, self.memory.get(task), features, expert_features, here, rest, widths)

    def _signals(self, task: str, chunks: Iterable[Chunk]) -> Signals:
        return summary([self._compared(task, where, batch) for where, batch in chunks])

    def _compared(self, task: str, where: Any, batch: Any) -> Compared:
        logits, expert = self.forward(self.models.modules[task], batch), self.predictions[task].logits[where]
        return self.outcomes[task].compared(logits.cpu() if isinstance(expert, Tensor) else logits, expert)


def expert_predictions(
    network: AlignedCheckpoints,
    models: TaskModels,
    inputs: Mapping[str, Inputs],
    settings: AdaptSettings,
    forward: Forward,
    function: Function | None = None,
    keep: Callable[[str, Predictions], None] = lambda task, predictions: None,
    expert: Callable[[str], AbstractContextManager[Forward]] | None = None,
) -> dict[str, Predictions]:
    """task -> its expert's predictions, as far as losses and judge need them. The models hold the base's tensors afterwards.

    Arguments:
        keep: called with each task's as soon as they are computed.
        expert: task -> while it is open, what runs its expert. By default the models are filled with it.
    """

    @contextmanager
    def filled(task: str) -> Iterator[Forward]:
        models.fill(member_tensors(network, network.experts[task]))
        yield forward

    def of_expert(task: str) -> Predictions:
        head = head_parts(models, task) if not function and NEED_FEATURES & settings.weights(task).keys() else []
        most = settings.self_label.top_logits if inputs[task].generate else None
        with (expert or filled)(task) as run:
            layers = named_layers(models.modules[task], settings.self_label.layers) if head else []
            predict = predictor(models.modules[task], head, run, most=most, layers=layers)
            predictions = inputs[task].predictions(predict, not function and needs_targets(settings, task))
        keep(task, predictions)
        return predictions

    predictions = dict(zip(inputs, processes.mapped(of_expert, list(inputs)), strict=True))
    if expert is None:
        models.fill(member_tensors(network, network.reference()))
        models.fill(network.averages())
    return predictions


def compares(settings: AdaptSettings, task: str) -> bool:
    """True if the task's objective compares with its expert's predictions."""
    return bool((NEED_EXPERT | NEED_FEATURES) & settings.weights(task).keys())


def learns_head(settings: AdaptSettings, task: str) -> bool:
    """True if the settings ask for the task's head to be learned."""
    return compares(settings, task) if settings.learn_heads == "auto" else settings.learn_heads


def needs_targets(settings: AdaptSettings, task: str) -> bool:
    """True if the expert's predictions are needed on what the task adapts on."""
    return compares(settings, task) or learns_head(settings, task)


def predictor(
    module: nn.Module,
    head: list[nn.Module],
    forward: Forward,
    pool: Pool | None = None,
    most: int | None = None,
    layers: Sequence[nn.Module] = (),
) -> Predict:
    """What predicts batches by a module.

    Arguments:
        head: the parts of the module whose inputs are kept as features; with none there are no features.
        pool: brings what a head is given to one vector per input.
        most: of each prediction keep so many of the largest logits; all by default.
        layers: their outputs are kept beside the features.
    """

    @torch.no_grad()
    def predict(batch: Any) -> BatchPredictions:
        with layer_outputs(module, head, layers, pool) as seen:
            logits = forward(module, batch)
        kept = logits.cpu() if most is None else TopLogits.of(logits, most)
        return BatchPredictions(kept, torch.cat(seen[-1], dim=-1).cpu() if seen else None)

    return predict
