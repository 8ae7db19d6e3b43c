"""What methods from statistics have in common: how many inputs they look at, and where the statistics are found.

A statistic is a tensor about one tensor of one expert, taken on that expert's own inputs before anything is merged
(`calibration/gather.py`). What such a method does with them is a function of one tensor at a time, as of every method.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from pydantic import Field, PrivateAttr
from torch import Tensor

from adarank.methods.base import Method, Network, OriginKind, RecipeError


def _nothing(name: str, task: str) -> Tensor:
    raise KeyError(name)


@dataclass(frozen=True)
class Statistics:
    """Statistics by tensor and task, each read when it is asked for.

    Attributes:
        names: tensors that every task has a statistic of.
        read: (tensor, task) -> its statistic. It may be mapped from a file: never write to it.
        inputs_first: those among `names` that are stored as (in, out), where a linear layer's weight is (out, in).
    """

    names: Collection[str] = ()
    read: Callable[[str, str], Tensor] = _nothing
    inputs_first: frozenset[str] = frozenset()


M = TypeVar("M", bound="Informed")


class Informed(Method):
    """Base of the methods that take statistics of the experts on their inputs. Tensors without one are averaged.

    Class attributes:
        decides: the settings that the statistics hang on; the others may change and the statistics serve again.
    """

    origin: ClassVar[OriginKind] = "average"
    data: ClassVar[str] = "unlabelled inputs of each task"
    decides: ClassVar[tuple[str, ...]] = ("examples", "seed")

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

    def knowing(self: M, statistics: Statistics) -> M:
        """The same method with statistics."""
        known = self.model_copy()
        known._statistics, known._undetermined = statistics, {}
        return known

    def prepare(self: M, network: Network, device: torch.device | str) -> M:
        _ = self.statistics  # refused before a tensor is read
        return self

    def identity(self) -> dict[str, Any]:
        """The method's name and the settings that its statistics hang on."""
        return {"method": self.name, **self.model_dump(include=set(self.decides))}

    def held(self, shape: tuple[int, ...], decomposed: bool) -> int:
        """Numbers of four bytes held for a tensor while one expert's statistics are taken; for the memory plan."""
        raise NotImplementedError
