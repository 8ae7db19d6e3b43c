"""What a data-free method is, and the one loop over tensors.

A method is a function of one tensor at a time, (origin, {task: task vector}) -> merged tensor, so a merge streams:
in memory are a few copies of the largest tensor, whatever the size of the model.

Method files take what they are written with from here, so that beside this file two others say all about any of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from adarank.alignment.task_vectors import BLOCK, AlignedCheckpoints, Deltas, OriginKind
from adarank.errors import AdaRankError, MismatchError, RecipeError, itemise
from adarank.io.checkpoint import check_result
from adarank.io.writer import Layout, Streamed
from adarank.method import Context, Given, MergeMethod, Outline, Result
from adarank.methods.per_tensor import Flag, PerTensor, TensorWeights, flag, resolve, rest
from adarank.settings import parse

__all__ = [
    "AdaRankError",
    "AlignedCheckpoints",
    "Deltas",
    "Flag",
    "Given",
    "Merging",
    "Method",
    "MismatchError",
    "OriginKind",
    "PerTensor",
    "RecipeError",
    "TensorWeights",
    "check_one_other",
    "flag",
    "itemise",
    "length",
    "merge_tensor",
    "merge_tensors",
    "rest",
    "scaled_mean",
    "weighted_sum",
]

M = TypeVar("M", bound="Method")
_SUMMING = 2  # copies of a tensor: a sum and one task vector
_LEAST_BLOCK = 2**14  # entries; of fewer the calls would take longer than the sums


class Method(MergeMethod):
    """Base of the data-free methods: a frozen object of settings with two functions of one tensor.

    Class attributes, beside those of the contract (`method/contract.py`):
        origin: what task vectors are counted from.
        spectral: True if it decomposes matrices; the memory plan counts an SVD's workspace then.
        passes: how often the checkpoints are read. Methods about the whole model read them first, in `prepare`.
        elementwise: True if an entry of the result depends on the same entry of origin and task vectors alone, so that
            tensors are merged in blocks. A subclass does not inherit it, as it may change the formula.
    """

    by_tensor: ClassVar[bool] = True
    origin: ClassVar[OriginKind]
    spectral: ClassVar[bool] = False
    passes: ClassVar[int] = 1
    elementwise: ClassVar[bool] = False

    def merge_matrix(self, name: str, origin: Tensor, deltas: Deltas) -> Tensor:
        """Merge one matrix (`decompose`). `origin` is float32 and may be mapped: never write to it."""
        raise NotImplementedError

    def merge_other(self, name: str, origin: Tensor, deltas: Deltas) -> Tensor:
        """Merge one tensor that is not decomposed (`scale`): by default as a matrix is."""
        return self.merge_matrix(name, origin, deltas)

    def origin_kind(self, network: AlignedCheckpoints) -> OriginKind:
        """What task vectors are counted from."""
        return self.origin

    def prepare(self: M, network: AlignedCheckpoints, device: torch.device | str) -> M:
        """The method with all that it must know of the whole model before the first tensor is merged.

        Called once before merging. May read every tensor, one at a time; returns a copy, as settings are frozen.
        """
        return self

    def workspace(self, tasks: int, decomposed: bool) -> int:
        """Copies of a tensor in float32 held beside its origin, for the memory plan: a sum and one task vector; of a matrix that
        is decomposed U, V, what the driver works in, and what is multiplied out again."""
        return 14 if decomposed and self.spectral else _SUMMING

    @classmethod
    def resolve(cls: type[M], given: Given) -> M:
        """The method with the settings of a recipe, checked."""
        values = resolve(cls, given.parameters, given.models, given.names, given.span)
        if given.seed is not None and "seed" in cls.model_fields:
            values.setdefault("seed", given.seed)
        return parse(cls, values, f"parameters of '{cls.name}'")

    def over(self: M, given: Given) -> M:
        """The method resolved anew: its settings may differ by tensor."""
        return type(self).resolve(given)

    @classmethod
    def takes_slices(cls) -> bool:
        """Whether it merges each tensor from that tensor alone."""
        return cls.passes == 1 and not cls.data and not cls.in_use

    def shares_work(self) -> bool:
        """Whether several processes can merge its tensors: each its own."""
        return not self.in_use

    @classmethod
    def needs_base(cls) -> bool:
        """Whether the method needs a base model."""
        return getattr(cls, "origin", None) == "pretrained"

    @classmethod
    def passes_over(cls) -> str:
        """In words: how often the checkpoints are read."""
        return "the checkpoints once" if cls.passes == 1 else f"the checkpoints {cls.passes} times"

    @classmethod
    def example(cls) -> Mapping[str, Any]:
        """Values of the settings that have no default, for the catalogue's figures."""
        return {}

    @classmethod
    def memory(cls) -> str:
        """In words: what the method holds in memory."""
        method = cls.model_construct(**cls.example())
        one, two = (1 + method.workspace(tasks, True) for tasks in (1, 2))
        copies = f"{one}" if one == two else f"{2 * one - two} + {two - one}·T"  # it may grow with the tasks
        blocks = "a block of 2¹⁸ entries"
        return f"{copies} float32 copies of {blocks if method.by_entry else 'the largest tensor'}"

    @property
    def by_entry(self) -> bool:
        """Whether the class itself says that it is elementwise."""
        return bool(vars(type(self)).get("elementwise"))

    @property
    def decomposes(self) -> bool:
        """Whether matrices are decomposed by SVD."""
        return self.spectral

    def held_bytes(self, outline: Outline) -> int:
        """Bytes held at once at most, for the memory plan."""
        return max((self._streamed_bytes(outline, name) for name in outline.network.merged()), default=0)

    def _streamed_bytes(self, outline: Outline, name: str) -> int:
        """What merging one tensor holds at a time: its origin and the workspace."""
        network, info = outline.network, outline.network.tensors[name]
        copies, block = self._copies(outline, name), self.block(outline)
        if self.by_entry and info.numel > block and network.in_place():
            return 4 * copies * block
        solved = network.choices[name].action == "decompose"
        return 4 * (copies * info.numel + (self.solving(info.shape) if solved else 0))

    def _copies(self, outline: Outline, name: str) -> int:
        """Copies in float32 of what is merged at a time: a tensor, or a block of it."""
        network = outline.network
        copies = self.workspace(len(network.tasks), network.choices[name].action == "decompose")
        if copies <= _SUMMING and network.tensors[name].dtype != torch.float32:
            copies += 1  # a model's tensor in float32; where more is held it is let go before
        mapped = self.origin_kind(network) == "pretrained" and network.base_is_mapped(name)
        return copies + (not mapped) + 2 * outline.dequantised  # what is put together as it is read

    def block(self, outline: Outline) -> int:
        """Entries that are merged at a time where they do not depend on each other: fewer where a budget has no room for more."""
        if outline.memory is None:
            return BLOCK
        copies = max((self._copies(outline, name) for name in outline.network.merged()), default=1)
        return max(_LEAST_BLOCK, min(BLOCK, outline.memory // (4 * copies)))

    def solving(self, shape: tuple[int, ...]) -> int:
        """Numbers of four bytes held beside, while a matrix of this shape is merged; the memory plan counts them."""
        return 0

    def run(self, context: Context) -> Result:
        """Merge tensor by tensor."""
        return Result(Merging(self, context.network, context.device, self.block(context.outline())))


def check_one_other(method: str, network: AlignedCheckpoints) -> None:
    """Raise a `RecipeError` unless there is one model beside the base."""
    if len(network.experts) != 1:
        raise RecipeError(
            f"models: '{method}' goes from base_model to one other model, got {len(network.experts)} others"
            f" ({', '.join(network.tasks)}). Make one of two models the base_model, or use nuslerp or linear."
        )


def length(tensor: Tensor) -> float:
    """‖x‖ of a tensor as one vector, in float64: PyTorch's float32 norms add one by one."""
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))


def weighted_sum(origin: Tensor, deltas: Deltas, coefficient: Callable[[str], float]) -> Tensor:
    """origin + Σ_t coefficient(t)·δ_t, holding one task vector at a time."""
    total = origin.clone()
    for task in deltas:  # not items(): its variable would hold one task vector while the next is made
        total.add_(deltas[task], alpha=coefficient(task))
    return total


def scaled_mean(origin: Tensor, deltas: Deltas, scale: float) -> Tensor:
    """origin + scale · mean_t δ_t: how spectral methods merge what is no matrix."""
    return weighted_sum(origin, deltas, lambda task: scale / len(deltas))


def merge_tensors(
    method: Method,
    network: AlignedCheckpoints,
    device: torch.device | str = "cpu",
    layout: Layout | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the merged model that is not a head, in the network's order, one in memory at a time.

    Arguments:
        layout: name -> (shape, dtype) of the tensors that are wanted, their dtypes as for `merge_tensor`; by default of all.

    Raises:
        RecipeError: the method is task-aware: it merges into no single model.
    """
    prepared = _prepared(method, network, device)
    for name in network.tensors:
        if layout is None:
            yield name, merge_tensor(prepared, network, name, device)
        elif name in layout:
            yield name, merge_tensor(prepared, network, name, device, layout[name][1])


def _prepared(method: M, network: AlignedCheckpoints, device: torch.device | str) -> M:
    if method.in_use:
        raise RecipeError(f"'{method.name}' {method.python[1]}")
    with torch.no_grad():  # never around a yield: the caller's code would run without gradients too
        return method.prepare(network, device)


@torch.no_grad()
def merge_tensor(
    method: Method,
    network: AlignedCheckpoints,
    name: str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """One tensor of the merged model, by a prepared method. One that no adapter changes stays the base's, as stored.

    Arguments:
        dtype: what the caller will cast it to. It comes so where that spares memory and holds every value, else in
            float32 (float64 if one of the inputs has it so).
    """
    if _in_blocks(method, network, name):
        with suppress(AdaRankError):  # what is wrong is said of the whole tensor, below
            return _by_entry(method, network, name, device).whole(name, dtype)
    return network.kept(name) if _stays(method, network, name) else _merged(method, network, name, device)


def _stays(method: Method, network: AlignedCheckpoints, name: str) -> bool:
    """Whether a tensor is not merged: it is kept or averaged, or no adapter changes it."""
    if network.choices[name].action not in ("decompose", "scale"):
        return True
    return method.origin_kind(network) != "zero" and network.unchanged(name)


def _in_blocks(method: Method, network: AlignedCheckpoints, name: str, size: int = BLOCK) -> bool:
    """Whether a tensor is merged a block of `size` entries at a time."""
    large = method.by_entry and network.tensors[name].numel > size
    return large and network.in_place() and not _stays(method, network, name)


def _merged(method: Method, network: AlignedCheckpoints, name: str, device: torch.device | str) -> Tensor:
    kind = method.origin_kind(network)
    origin = network.origin(name, kind, device)
    deltas = network.deltas(name, origin, kind)
    decomposed = network.choices[name].action == "decompose"
    merged = (method.merge_matrix if decomposed else method.merge_other)(name, origin, deltas)
    return check_result(merged, name, f"the result of '{method.name}'")


def _by_entry(
    method: Method, network: AlignedCheckpoints, name: str, device: torch.device | str, size: int = BLOCK
) -> Streamed:
    """As `_merged`, in blocks that stay in the processor's cache: temporaries of whole tensors cost more than the sums."""

    def parts() -> Iterator[Tensor]:
        for block in network.blocks(name, method.origin_kind(network), size):
            yield merged(block)

    @torch.no_grad()
    def merged(block: AlignedCheckpoints) -> Tensor:
        try:
            return _merged(method, block, name, device)
        except AdaRankError:
            _merged(method, network, name, device)  # what is wrong is said of the whole tensor
            raise

    return Streamed(network.tensors[name].shape, parts)


@dataclass(frozen=True)
class Merging:
    """What `merge_tensors` yields; what is to be written may be had in the dtypes of its layout, or as it is computed.

    Attributes:
        block: entries merged at a time for a writer, where they do not depend on each other.
    """

    method: Method
    network: AlignedCheckpoints
    device: torch.device | str = "cpu"
    block: int = BLOCK

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return merge_tensors(self.method, self.network, self.device)

    def in_dtypes(self, layout: Layout) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of the layout's tensors, in its dtype where that spares memory and holds every value."""
        return merge_tensors(self.method, self.network, self.device, layout)

    def to_write(self, layout: Layout) -> Iterator[tuple[str, Tensor | Streamed]]:
        """(name, tensor) of the layout's tensors; what is merged in blocks comes block by block."""
        prepared = _prepared(self.method, self.network, self.device)
        for name in (name for name in self.network.tensors if name in layout):
            if _in_blocks(prepared, self.network, name, self.block):
                yield name, _by_entry(prepared, self.network, name, self.device, self.block)
            else:
                yield name, merge_tensor(prepared, self.network, name, self.device)
