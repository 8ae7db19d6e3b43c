"""What is known of a merge from headers alone, and what is said of a method's settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from adarank.alignment.layers import Span
from adarank.alignment.selection import Action
from adarank.alignment.task_vectors import AlignedCheckpoints
from adarank.io.writer import Layout
from adarank.models import Family
from adarank.settings import Settings

if TYPE_CHECKING:
    from adarank.method.contract import MergeMethod


@dataclass(frozen=True)
class Site:
    """One tensor of the network, as far as headers tell.

    Attributes:
        dtype: of the task's tensor that will come out.
        floats: of parts that are computed: float32 (float64 for float64), or what the recipe says.
        action: what happens to it; a kept one is shared as it is.
        tasks: how many there are.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    floats: torch.dtype
    action: Action
    tasks: int

    @property
    def numel(self) -> int:
        """How many numbers it holds."""
        return torch.Size(self.shape).numel()

    @property
    def merged(self) -> bool:
        """Whether a method merges it."""
        return self.action in ("decompose", "scale")


def sites_of(
    network: AlignedCheckpoints, tensors: Layout | None = None, floats: torch.dtype | None = None
) -> list[Site]:
    """Every tensor of the network, in its order.

    Arguments:
        tensors: name -> (shape, dtype) of what each task's network has; by default as in the base.
        floats: dtype of computed parts, if the recipe says.
    """
    sites = []
    for name, info in network.tensors.items():
        dtype = tensors[name][1] if tensors else info.dtype
        computed = floats or torch.promote_types(dtype, torch.float32)
        sites.append(Site(name, info.shape, dtype, computed, network.choices[name].action, len(network.tasks)))
    return sites


@dataclass(frozen=True)
class Outline:
    """What is known of a merge from headers alone.

    Attributes:
        layout: the tensors of one merged model, heads not among them.
        floats: dtype of computed parts, if the recipe says.
        family: the kind of models, if they have tasks.
        dequantised: tensors of the inputs are made as they are read: of codes and scales, or of a model and an adapter.
        memory: bytes that the method may hold; None if there is no budget.
    """

    network: AlignedCheckpoints
    layout: Layout
    floats: torch.dtype | None = None
    family: Family | None = None
    dequantised: bool = False
    memory: int | None = None

    def sites(self) -> list[Site]:
        """Every tensor of the network, in its order."""
        return sites_of(self.network, self.layout, self.floats)

    def head_numel(self) -> int:
        """Numbers in all tasks' heads together."""
        network = self.network
        return sum(network.experts[task].info(name).numel for task in network.tasks for name in network.heads[task])

    def head_widths(self) -> dict[str, int]:
        """Task -> the length of what its head is given, as far as headers tell: the columns of its first matrix."""
        return {task: self._head_width(task) for task in self.network.tasks}

    def _head_width(self, task: str) -> int:
        shapes = [self.network.experts[task].info(name).shape for name in self.network.heads[task]]
        return next((shape[1] for shape in shapes if len(shape) == 2), 0)


@dataclass(frozen=True)
class Given:
    """What a recipe, or Python, says of a method.

    Attributes:
        parameters: its settings. Those that models may carry are one value for all or {task: value}.
        models: task -> settings of that model alone.
        adapt: what the adapt block says; None without one.
        preset: the preset that the adapt block names.
        names: the tensors that will be merged; none while no checkpoint is opened.
        seed: the recipe's; None from Python, where a method's default stands.
        folder: where relative paths count from.
        find: name -> method, for methods that are put on another.
        span: the layers that lists over the layers run over, where these are a slice.
        text: the tasks are of texts, as far as that is known; no model is open before `names` are.
    """

    parameters: Mapping[str, Any] = field(default_factory=dict)
    models: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    adapt: Mapping[str, Any] | None = None
    preset: str | None = None
    names: Sequence[str] = ()
    seed: int | None = None
    folder: Path = Path(".")
    find: Callable[[str, str], type[MergeMethod]] | None = None
    span: Span | None = None
    text: bool = False


@dataclass(frozen=True)
class Another:
    """A method that a method is put on, as a recipe would say it.

    Attributes:
        key: where the settings lie, for errors.
        method: what they are when parsed.
    """

    key: str
    merge_method: str
    parameters: Mapping[str, Any]
    adapt: Settings | None
    method: MergeMethod
