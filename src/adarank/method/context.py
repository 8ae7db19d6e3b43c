"""What a running method is given, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from adarank.alignment.task_vectors import AlignedCheckpoints
from adarank.data.task import TaskData
from adarank.errors import RecipeError
from adarank.io.bundle import Parts
from adarank.io.checkpoint import check_result
from adarank.io.record import Note
from adarank.io.writer import Layout, Streamed
from adarank.method.outline import Outline
from adarank.models import Family, TaskModels

if TYPE_CHECKING:
    from adarank.method.contract import MergeMethod


class Context:
    """What a running method is given, so that it need know nothing of recipes, files and folders.

    This class has what every merge has. From Python and from recipes come subclasses of it that have more; what a
    context has not is refused with what to do about it.

    Attributes:
        data: task -> its inputs, split; empty if the method reads none.
        note, progress: called with each stage as it begins, and after every step.
        state: the file in which an unfinished run is kept; None if it is not.
    """

    data: Mapping[str, TaskData] = {}
    note: Note
    progress: Any = None
    state: Path | None = None

    def __init__(self, network: AlignedCheckpoints, device: torch.device | str = "cpu", seed: int = 0) -> None:
        self._network, self._device, self._seed = network, device, seed
        self.note = lambda text: None

    @property
    def network(self) -> AlignedCheckpoints:
        """Base and experts, aligned."""
        return self._network

    @property
    def device(self) -> torch.device | str:
        """Where tensors are computed."""
        return self._device

    @property
    def seed(self) -> int:
        """Of whatever is drawn."""
        return self._seed

    @property
    def family(self) -> Family:
        """The kind of models, if they have tasks."""
        raise self._refused("the kind of the models")

    def outline(self) -> Outline:
        """What headers tell."""
        layout = {name: (info.shape, info.dtype) for name, info in self.network.tensors.items()}
        return Outline(self.network, layout)

    def models(self) -> TaskModels:
        """One network per task over shared tensors, filled with the base's."""
        raise self._refused("networks")

    def fingerprint(self, marks: Mapping[str, Any] | None = None, block: str = "adapt") -> str:
        """Identifies the run. A saved state of another run is refused here, before anything is computed.

        Arguments:
            marks: task -> what tells all that is read of it from others, as plain data; by default its inputs.
            block: the settings that hold `save_every`, which decides no number.
        """
        raise self._refused("a saved state")

    def with_statistics(self, method: Any) -> tuple[Any, dict[str, Any]]:
        """The method with the statistics that it takes of the experts, and what a record says of them."""
        raise self._refused("statistics of the experts")

    def adapted(self, method: Any) -> Result:
        """What adaptation by the method's settings gives: live weights, stepped on unlabelled inputs."""
        raise self._refused("adaptation")

    def another(self, method: MergeMethod) -> tuple[Result, dict[str, Any]]:
        """What another method gives on the same models and inputs, and its settings in force."""
        raise self._refused("another method's result")

    def expert_predictions(self, models: TaskModels, settings: Any) -> Any:
        """The experts' predictions on the inputs, as far as the settings need them. The models hold the base's tensors afterwards."""
        raise self._refused("the experts' predictions")

    def losses(
        self, models: TaskModels, settings: Any, predictions: Any, memory: dict[str, Tensor]
    ) -> Mapping[str, Callable[[int], Tensor]]:
        """Task -> its objective on the task's batch of a step.

        Arguments:
            predictions: what `expert_predictions` gave.
            memory: where running means are kept from step to step.
        """
        raise self._refused("losses")

    def judge(self, models: TaskModels, settings: Any, predictions: Any) -> Callable[[int], Any]:
        """Compares what the models hold with the experts' predictions."""
        raise self._refused("a judge")

    def judged_rows(self, task: str, settings: Any) -> list[int]:
        """The rows of a task's inputs that a judge looks at."""
        raise self._refused("a judge")

    def features(self, models: TaskModels, task: str, settings: Any, pool: Any = None) -> Tensor:
        """(rows, width) what a task's head is given by what the models hold, for the rows adapted on and judged on.

        Arguments:
            pool: brings it to one vector per input; by default a mean over positions.
        """
        raise self._refused("features")

    def report(self, history: Any, settings: Any, kept: Any = None) -> dict[str, Any]:
        """What a record says of a run of the loop with a judge.

        Arguments:
            kept: task -> signals of what is kept, if that is not one step of all tasks.
        """
        raise self._refused("a report")

    def _refused(self, what: str) -> RecipeError:
        return RecipeError(
            f"The method asks for {what}, which only a recipe gives. Write a recipe and use adarank.merge_recipe."
        )


@runtime_checkable
class Castable(Protocol):
    """Tensors of a result that may be had in part, and in the dtypes of a layout."""

    def in_dtypes(self, layout: Layout) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of the layout's tensors, in its dtype where that spares memory and holds every value."""
        ...

    def to_write(self, layout: Layout) -> Iterator[tuple[str, Tensor | Streamed]]:
        """(name, tensor) of the layout's tensors, computed as they are written where the method can; cast by the writer."""
        ...


@dataclass(frozen=True)
class Result:
    """What a run gave: what is to be written, and what the record says.

    Attributes:
        tensors: (name, tensor) of one merged model, heads not among them, in the network's order; one in memory at a time.
        parts: a bundle's parts, in place of one model.
        heads: task -> its head, where it is not its expert's, under the names that the expert's files use.
        files: name -> what writes a further file of this name, given its path.
        block: what the record calls `report`; empty if there is nothing to say.
        report: plain data. It may grow while tensors are read.
        modules: task -> the network in memory that the result is of, where there is one.
    """

    tensors: Iterable[tuple[str, Tensor]] = ()
    parts: Parts | None = None
    heads: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    files: Mapping[str, Callable[[Path], None]] = field(default_factory=dict)
    block: str = ""
    report: Mapping[str, Any] = field(default_factory=dict)
    modules: Mapping[str, nn.Module] = field(default_factory=dict)

    def in_dtypes(self, layout: Layout) -> Iterator[tuple[str, Tensor]]:
        """The layout's part of `tensors`, for whoever casts them to its dtypes: they come so where the method can spare memory by it."""
        if isinstance(self.tensors, Castable):
            return self.tensors.in_dtypes(layout)
        return ((name, tensor) for name, tensor in self.tensors if name in layout)

    def to_write(self, layout: Layout) -> Iterator[tuple[str, Tensor | Streamed]]:
        """The layout's part of `tensors`, for a writer that casts them to its dtypes."""
        if isinstance(self.tensors, Castable):
            return self.tensors.to_write(layout)
        return ((name, tensor) for name, tensor in self.tensors if name in layout)

    def recorded(self) -> dict[str, Mapping[str, Any]]:
        """What the record has of it."""
        return {self.block: self.report} if self.block else {}


def changed_tensors(
    network: AlignedCheckpoints, changed: Mapping[str, Tensor], by: str
) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of a result, heads not among them, in the network's order: what a loop changed, the rest as kept.

    Arguments:
        by: what changed them, for the error about a value that is not finite.
    """
    for name in network.tensors:
        tensor = changed.get(name)
        yield name, network.kept(name) if tensor is None else check_result(tensor.detach(), name, by)
