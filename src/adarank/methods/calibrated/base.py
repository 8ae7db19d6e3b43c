"""What methods from statistics have in common: how many inputs they look at, and where the statistics are kept.

A statistic is a tensor about one tensor of one expert, taken on that expert's own inputs before anything is merged
(`calibration/gather.py`). What such a method does with them is a function of one tensor at a time, as of every method.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from pydantic import Field, PrivateAttr
from torch import Tensor

from adarank.data.splits import limited
from adarank.errors import raise_together
from adarank.method import Context, Outline, Result
from adarank.methods.base import AlignedCheckpoints, Merging, Method, OriginKind, RecipeError


def _nothing(name: str, task: str) -> Tensor:
    raise KeyError(name)


@dataclass(frozen=True)
class Statistics:
    """Statistics by tensor and task, each read when it is looked up.

    Attributes:
        names: tensors that every task has a statistic of.
        read: (tensor, task) -> its statistic. It may be mapped from a file: never write to it.
        inputs_first: those among `names` that are stored as (in, out), where a linear layer's weight is (out, in).
    """

    names: Collection[str] = ()
    read: Callable[[str, str], Tensor] = _nothing
    inputs_first: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Moments:
    """Of what a layer is given on one task's inputs, float64. s: in the merge, t: the target.

    Attributes:
        mean, target: (width,) means of x_s and of x_t.
        second: (width, width) mean of x_s x_sᵀ; of a layer norm (width,) the mean squares.
        cross: (width, width) mean of x_s x_tᵀ.
    """

    mean: Tensor
    target: Tensor
    second: Tensor
    cross: Tensor

    def named(self, name: str) -> dict[str, Tensor]:
        """As tensors of a file, float32 on the CPU."""
        return {f"{name}/{field.name}": getattr(self, field.name).float().cpu() for field in fields(self)}

    @classmethod
    def of_named(cls, tensors: Mapping[str, Tensor], name: str) -> Moments:
        """What `named` gave."""
        return cls(**{field.name: tensors[f"{name}/{field.name}"].double() for field in fields(cls)})


M = TypeVar("M", bound="CalibratedMethod")


Pair = tuple[Tensor, Tensor | None]
"""Weight and bias of a layer, float64; the weight of a linear layer as (out, in)."""


class Fit(Protocol):
    """What fits one layer to all tasks."""

    def add(self, moments: Moments, weight: Tensor, bias: Tensor | None) -> None:
        """A task: what the layer is given, and the expert's own weight and bias."""
        ...

    def solved(self, base: Pair, merged: Pair) -> Pair:
        """Weight and bias, given those of the base and of the merge before."""
        ...


class CalibratesBlocks(Protocol):
    """What fits the layers of a block, given what they are given (`featcal.py`)."""

    @property
    def target(self) -> float:
        """α, the share of the expert's own stream in the target."""
        ...

    def last_weight(self, network: AlignedCheckpoints) -> float:
        """What all positions but the first weigh in the last block and behind it."""
        ...

    def with_statistics(self, statistics: Statistics) -> Any:
        """The method with tensors that are calibrated already."""
        ...

    def fit(self, norm: bool) -> Fit:
        """What a layer's tensors are fitted with: a layer norm's, or a linear layer's."""
        ...


class Gathers(Protocol):
    """What takes statistics of the experts (`calibration/gather.py`)."""

    def squared_gradients(self, classes: int, seed: int) -> Statistics:
        """Of every merged tensor that gets a gradient: the mean square of single inputs' gradients of log-likelihoods."""
        ...

    def gram_matrices(self, dtype: torch.dtype = torch.float32) -> Statistics:
        """Of every linear layer: the mean outer product of what it is given in the expert, summed in this dtype."""
        ...

    def gram_matrices_by_block(self, known_by: Callable[[Statistics], M]) -> M:
        """The method with Gram matrices of what layers are given behind the already merged earlier blocks.

        Arguments:
            known_by: the method with statistics.
        """
        ...

    def calibrated_by_block(self, method: CalibratesBlocks) -> Statistics:
        """The tensors of the blocks, each fitted behind the calibrated earlier ones: by name, the same for every task."""
        ...


class CalibratedMethod(Method):
    """Base of the methods that take statistics of the experts on their inputs.

    Class attributes:
        decides: the settings that the statistics depend on; when others change, the statistics are used again.
        rest: what happens to tensors without statistics, in a word or two.
    """

    origin: ClassVar[OriginKind] = "average"
    data: ClassVar[str] = "unlabelled inputs of each task"
    use: ClassVar[str] = "takes statistics of"
    decides: ClassVar[tuple[str, ...]] = ("examples", "seed")
    rest: ClassVar[str] = "averaged"

    examples: int = Field(256, ge=1, description="inputs of each task's adapt split that are looked at, at most")
    seed: int = Field(0, description="of the choice of inputs, and of draws; by default the recipe's seed")
    _statistics: Statistics | None = PrivateAttr(default=None)
    _undetermined: dict[str, str] = PrivateAttr(default_factory=dict)

    @property
    def reads_labels(self) -> bool:
        """Whether the statistics need labels of the inputs."""
        return False

    @property
    def statistics(self) -> Statistics:
        """What the method knows of the experts.

        Raises:
            RecipeError: nothing yet.
        """
        if self._statistics is None:
            raise RecipeError(
                f"method: '{self.name}' takes statistics of the experts on {self.data}. Give each task its data in a recipe, or batches to adarank.merge."
            )
        return self._statistics

    @property
    def undetermined(self) -> dict[str, str]:
        """Tensors that the statistics determine only in part -> "directions of so many"; grows as tensors are merged."""
        return self._undetermined

    def with_statistics(self: M, statistics: Statistics) -> M:
        """The same method with statistics."""
        known = self.model_copy()
        known._statistics, known._undetermined = statistics, {}
        return known

    def prepare(self: M, network: AlignedCheckpoints, device: torch.device | str) -> M:
        """A copy of the method that knows what it needs of the whole model."""
        _ = self.statistics  # refused before a tensor is read
        return self

    def identity(self) -> dict[str, Any]:
        """The method's name and the settings that its statistics depend on."""
        return {"method": self.name, **self.model_dump(include=set(self.decides))}

    def held(self, shape: tuple[int, ...], decomposed: bool) -> int:
        """Numbers of four bytes held for a tensor while one expert's statistics are taken; for the memory plan."""
        raise NotImplementedError

    @property
    def inputs_at_once(self) -> int:
        """Inputs of a forward pass, where the statistics are of batches."""
        return 1

    def gathered(self: M, gathers: Gathers) -> M:
        """The same method with its statistics."""
        raise NotImplementedError

    @classmethod
    def passes_over(cls) -> str:
        """In words: how often the checkpoints are read."""
        return f"{super().passes_over()} to merge, and before it each expert with its inputs once"

    @classmethod
    def memory(cls) -> str:
        """In words: what the method holds in memory."""
        return f"{super().memory()}; before, one network and one expert's statistics"

    def sampled(self, tasks: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """The rows of each task's adapt split that statistics are taken of: a seeded choice.

        Arguments:
            tasks: task -> what has its `splits` and `labels`.

        Raises:
            DataError: a task has none, or they lack the labels that are read; all such tasks are named.
        """
        rows = {task: limited(of.splits, self.examples, self.seed).rows["adapt"] for task, of in tasks.items()}
        problems = [
            f"task '{task}': no rows to take statistics of. Give its data an adapt split, or a larger adapt fraction."
            for task, chosen in rows.items()
            if not chosen
        ]
        for task, chosen in rows.items() if self.reads_labels else ():
            unlabelled = sum(tasks[task].labels[row] is None for row in chosen)
            if unlabelled:
                problems.append(
                    f"task '{task}': {unlabelled} of the {len(chosen)} adapt inputs carry no label, and 'kind: empirical' reads it. "
                    "Name the label column under task: columns, or leave out kind: by default no label is read."
                )
        raise_together(problems)
        return rows

    def of_data(self, tasks: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs that statistics are taken of, and whether their labels are read."""
        inputs = {task: len(rows) for task, rows in self.sampled(tasks).items()}
        return {"statistics": {"inputs": inputs, "labels_read": self.reads_labels}}

    def held_bytes(self, outline: Outline) -> int:
        """The more of merging, and of one expert's statistics beside the network and every head."""
        network = outline.network
        statistics = sum(
            self.held(network.tensors[name].shape, network.choices[name].action == "decompose")
            for name in network.merged()
        )
        body = sum(info.numel for info in network.tensors.values())
        return max(super().held_bytes(outline), 4 * (body + outline.head_numel() + statistics))

    def run(self, context: Context) -> Result:
        """Take the statistics, then merge tensor by tensor."""
        known, report = context.with_statistics(self)
        block = self.block(context.outline())
        return Result(Merging(known, context.network, context.device, block), block="statistics", report=report)
