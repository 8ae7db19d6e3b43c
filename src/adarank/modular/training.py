"""Modules, trained and put into a bundle's parts.

A method says what it learns, from which losses, on networks that carry its modules (`Built`); the loop, its judge and
its state are adaptation's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adarank.adapt.agreement import Judge, Judged, mean_agreement
from adarank.adapt.history import History
from adarank.adapt.learner import Loss, Memory, Parameters
from adarank.adapt.loop import adapt
from adarank.adapt.settings import AdaptSettings
from adarank.data.task import TaskData
from adarank.io.bundle import WHOLE, Piece
from adarank.io.writer import Layout
from adarank.method import Context, Site
from adarank.models import Family, TaskModels
from adarank.models.head_inputs import head_parts
from adarank.models.tied import held_tensors, module_keys


@dataclass(frozen=True)
class Work:
    """What a method builds its modules with.

    Attributes:
        settings: of the loop.
        models: networks that hold the start's tensors, and what the method puts on them.
        predictions: the experts' predictions, as far as the settings need them.
        memory: what losses remember from step to step.
    """

    context: Context
    settings: AdaptSettings
    models: TaskModels
    predictions: Mapping[str, Any]
    memory: Memory

    @property
    def data(self) -> Mapping[str, TaskData]:
        """Task -> its inputs."""
        return self.context.data

    @property
    def device(self) -> torch.device | str:
        """Where tensors are computed."""
        return self.context.device

    @property
    def family(self) -> Family:
        """The kind of models."""
        return self.context.family

    def sites(self) -> dict[str, Site]:
        """Every tensor of the network, by name."""
        return {site.name: site for site in self.context.outline().sites()}

    def losses(self) -> Mapping[str, Loss]:
        """Task -> the objective of adaptation on its batch of a step."""
        return self.context.losses(self.models, self.settings, self.predictions, self.memory)

    def features(self, task: str, pool: Any = None) -> Tensor:
        """(rows, width) what a task's head is given in the merged body, for the rows adapted on and judged on."""
        return self.context.features(self.models, task, self.settings, pool).to(self.device)

    def judged_rows(self, task: str) -> list[int]:
        """The rows of a task's inputs that a judge looks at."""
        return self.context.judged_rows(task, self.settings)

    def head(self, task: str) -> list[torch.nn.Module]:
        """The parts of a task's module that hold the tensors of its head."""
        return head_parts(self.models, task)

    def keys(self, task: str) -> dict[str, str]:
        """Merged tensor of the network -> its name in a task's module."""
        network, module = self.context.network, self.models.modules[task]
        return module_keys(network, task, network.merged(), module, held_tensors(module))


@dataclass(frozen=True)
class Built:
    """A method's modules on the networks.

    Attributes:
        learned: name -> every tensor that is learned.
        losses: task -> loss of a step.
        part: (task, or None for what is shared; part; tensor) -> what a bundle stores there.
        widths: task -> length of the vector that its head is given.
        left: tensors that tasks differ in, and that no layer can merge input by input.
        about: what the record says beside, once all is learned.
        separate: what is learned, by task, where no task's part depends on another's.
    """

    learned: Mapping[str, Tensor]
    losses: Mapping[str, Loss]
    part: Callable[[str | None, str, str], Tensor]
    widths: Mapping[str, int]
    left: tuple[str, ...] = ()
    about: Callable[[], dict[str, Any]] = dict
    separate: Mapping[str, Sequence[Tensor]] | None = None


def train(work: Work, built: Built, lr: float, fingerprint: str) -> dict[str, Any]:
    """Train the modules, without labels, from a saved state if there is one; returns what a record says of it."""
    settings = work.settings
    judge = work.context.judge(work.models, settings, work.predictions)
    work.context.note("Training the modules, without labels")
    learner = Parameters(built.learned, lr)
    if built.separate is None or settings.keep == "last":
        history = _trained(work, built, learner, settings, judge, fingerprint)
        return work.context.report(history, settings)
    each = _Each(built.separate, work.memory)
    last = settings.model_copy(update={"keep": "last"})
    history = _trained(work, built, learner, last, each.watching(judge), fingerprint)
    steps = each.keep()
    kept = {task: history.judged[step][task] for task, step in steps.items()}
    return work.context.report(history, settings, kept) | {
        "step_kept": None,
        "steps_kept": steps,
        "why_kept": "each task's adapter is of the judged step nearest to its expert",
    }


def _trained(
    work: Work, built: Built, learner: Parameters, settings: AdaptSettings, judge: Judge, fingerprint: str
) -> History:
    """The loop over what is learned."""
    context = work.context
    one_pass = min(of.one_pass(settings.batch_size) for of in work.data.values())
    return adapt(
        learner,
        built.losses,
        settings,
        context.state,
        fingerprint,
        context.progress,
        judge,
        work.memory,
        one_pass=one_pass,
    )


def pieces(
    built: Built, whole: Iterator[tuple[str, Tensor]], shared: Layout, of_tasks: Mapping[str, Layout]
) -> Iterator[Piece]:
    """A bundle's parts in the order of their layouts.

    Arguments:
        whole: (name, tensor) of the network that the modules are put on.
    """
    tensors = dict(whole)
    for owner, layout in ((None, shared), *of_tasks.items()):
        for stored in layout:
            part, _, name = stored.partition(":")
            yield owner, stored, tensors[name] if part == WHOLE else built.part(owner, part, name).detach()


class _Each:
    """The best judged step of each task by itself. What it remembers is saved with the loop's state."""

    def __init__(self, separate: Mapping[str, Sequence[Tensor]], memory: Memory) -> None:
        self._separate, self._memory = separate, memory

    def watching(self, judge: Judge) -> Judge:
        """The judge, after which the tasks that are nearer to their experts than ever before are remembered."""

        def judged(step: int) -> Judged:
            signals = judge(step)
            for task, of_task in signals.items():
                value = mean_agreement({task: of_task})
                if f"{task}/value" not in self._memory or value > float(self._memory[f"{task}/value"]):
                    self._memory[f"{task}/value"] = torch.tensor(value, dtype=torch.float64)
                    self._memory[f"{task}/step"] = torch.tensor(step)
                    for number, tensor in enumerate(self._separate[task]):
                        self._memory[f"{task}/{number}"] = tensor.detach().clone()
            return signals

        return judged

    @torch.no_grad()
    def keep(self) -> dict[str, int]:
        """Give each task its best; returns the steps."""
        for task, tensors in self._separate.items():
            for number, tensor in enumerate(tensors):
                tensor.copy_(self._memory[f"{task}/{number}"])
        return {task: int(self._memory[f"{task}/step"]) for task in self._separate}
