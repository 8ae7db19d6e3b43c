"""What figures are computed with: a recipe's aligned models, its tasks, and their scores and losses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from adarank.alignment.layers import layer_number
from adarank.alignment.task_vectors import AlignedCheckpoints, OriginKind, TaskVectors
from adarank.data.metrics import LOSS, loss, score
from adarank.data.spec import Split
from adarank.data.task import TaskData
from adarank.errors import RecipeError
from adarank.models import Family, TaskModels
from adarank.models.generation import GeneratingModels
from adarank.models.predict import predict, split_batches
from adarank.models.text_scores import parts_of_loss, score_text
from adarank.recipe.job import Job
from adarank.spectral.svd import stored_spectra


@dataclass(frozen=True)
class Measured:
    """A task's score, as its metric counts it (per cent, a loss as it is), and its loss."""

    score: float
    loss: float


@dataclass(frozen=True)
class Bench:
    """A recipe, opened for analysis.

    Attributes:
        job: its checkpoints, aligned.
        load: gives one network per task over shared tensors, filled with the base's.
        data: task -> its inputs; empty if the figure reads none.
        split: what is scored.
        scratch: a folder for spectra, so that no SVD is done twice.
        outputs: name -> folder that `merge` wrote.
        scorers: model -> what gives each task's score and loss by it: base, experts and outputs.
    """

    job: Job
    load: Callable[[], TaskModels]
    scratch: Path
    data: Mapping[str, TaskData] = field(default_factory=dict)
    split: Split = "test"
    outputs: Mapping[str, Path] = field(default_factory=dict)
    scorers: Mapping[str, Callable[[], Mapping[str, Measured]]] = field(default_factory=dict)

    @property
    def network(self) -> AlignedCheckpoints:
        """The aligned checkpoints."""
        return self.job.network

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks, in the recipe's order."""
        return self.network.tasks

    @cached_property
    def matrices(self) -> list[str]:
        """The tensors that are decomposed, in the network's order."""
        return [name for name, choice in self.network.choices.items() if choice.action == "decompose"]

    @cached_property
    def models(self) -> TaskModels:
        """The networks, loaded when they are needed first."""
        return self.load()

    @property
    def family(self) -> Family:
        """The kind of the tasks' models."""
        if self.job.family is None:
            raise RecipeError("The models of this recipe have no tasks. Give each a task with its data.")
        return self.job.family

    def origins(self) -> tuple[OriginKind, ...]:
        """What task vectors can be counted from: the base, if there is one, and the average."""
        return ("pretrained", "average") if self.network.base is not None else ("average",)

    def decompositions(self) -> int:
        """How many there are of every task vector of every matrix, from each origin."""
        return len(self.matrices) * len(self.tasks) * len(self.origins())

    def origin(self, name: str, kind: OriginKind) -> tuple[Tensor, TaskVectors]:
        """A tensor's origin, and the task vectors about it."""
        origin = self.network.origin(name, kind, self.job.recipe.device)
        return origin, self.network.deltas(name, origin, kind)

    def layer(self, name: str) -> int | None:
        """The number of the layer that a tensor is in."""
        return layer_number(name)

    def inputs(self, task: str) -> int:
        """How many inputs of a task are scored."""
        return len(self.data[task].splits.rows[self.split])

    def all_inputs(self) -> int:
        """How many inputs of all tasks are scored."""
        return sum(map(self.inputs, self.tasks))

    def fill(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Write shared tensors of the networks."""
        self.models.fill(tensors)

    def measure(self, task: str) -> Measured:
        """A task's score and loss with the tensors that the networks hold now."""
        data = self.data[task]
        if isinstance(self.family, GeneratingModels):
            module, by_loss = self.models.modules[task], replace(data, metric=LOSS)
            scores = (score_text(self.family, module, of, self.split) for of in (data, by_loss))
            return Measured(*scores)
        rows, logits = predict(self.family, self.models.modules[task], data, self.split)
        labels = data.targets(rows)
        lost = score(labels, logits, LOSS, data.problem)
        return Measured(lost if data.metric == LOSS else score(labels, logits, data.metric, data.problem), lost)

    def measure_all(self) -> dict[str, Measured]:
        """Every task's score and loss with the tensors that the networks hold now."""
        return {task: self.measure(task) for task in self.tasks}

    def gradients(self, task: str) -> dict[str, Tensor]:
        """Tensor -> gradient of a task's mean loss over the split, at the tensors that the networks hold now."""
        module = self.models.modules[task]
        parameters = {n: t for n, t in self.models.shared.items() if t.requires_grad}
        module.zero_grad(set_to_none=True)
        with torch.enable_grad():
            for part in self._parts_of_loss(task, module):
                part.backward()
        gradients = {n: t.grad.detach() for n, t in parameters.items() if t.grad is not None}
        for tensor in parameters.values():
            tensor.grad = None
        return gradients

    def _parts_of_loss(self, task: str, module: nn.Module) -> Iterator[Tensor]:
        """Scalars with their graphs, which add up to a task's mean loss."""
        data, total = self.data[task], self.inputs(task)
        if isinstance(self.family, GeneratingModels):
            yield from parts_of_loss(self.family, module, data, self.split)
            return
        for rows, batch in split_batches(self.family, data, self.split, next(module.parameters()).device):
            logits = self.family.logits(module, batch)
            yield loss(data.targets(rows), logits, data.problem) * (len(rows) / total)

    @contextmanager
    def one_svd(self) -> Iterator[None]:
        """While it is open every matrix's SVD is done once, whichever part asks for it."""
        with stored_spectra(self.scratch / "spectra"), torch.no_grad():
            yield
