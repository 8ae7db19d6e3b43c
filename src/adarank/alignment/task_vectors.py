"""Base and experts, paired tensor by tensor, and the task vectors between them.

    τ_t = W_t - origin        origin: the base, the mean of the experts, or zero

`AlignedCheckpoints`, as `alignment/align.py` makes them, are read one tensor at a time. Of experts that are adapters
over the base it knows task vectors as factors too: about the base where an expert is one, about the average where all are.

    τ_t = s_t B_t A_t                              about the base
    τ_t = s_t B_t A_t - mean_u s_u B_u A_u         about the average, of at most the summed rank
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import repeat
from typing import Literal

import torch
from torch import Tensor

from adarank.alignment.selection import Choice
from adarank.errors import RecipeError
from adarank.io.checkpoint import Checkpoint, MemorySource, Source, TensorInfo, check_finite
from adarank.io.low_rank import Factors, about_average, stacked

BLOCK = 2**18
"""Entries worked on at a time where none depends on others: some float32 copies of them fit a processor's cache."""

OriginKind = Literal["pretrained", "average", "zero"]

Deltas = Mapping[str, Tensor]
"""task -> task vector of one tensor, float32, in the recipe's order. May compute each value when it is looked up."""


@dataclass(frozen=True)
class Member:
    """One checkpoint of the network, with the names its tensors have in the base.

    Attributes:
        names: name in the base -> name in this checkpoint.
        dropped: name in this checkpoint -> why it is not used.
        backbone: what the checkpoint's own names start with inside the backbone, such as `bert.`.
        spare: name in the base -> further name of a tensor in this checkpoint, where several share its memory.
    """

    source: Source
    names: dict[str, str]
    dropped: dict[str, str] = field(default_factory=dict)
    backbone: str = ""
    spare: Mapping[str, str] = field(default_factory=dict)

    def info(self, name: str) -> TensorInfo:
        """Shape, dtype and file of a tensor."""
        return self.source.tensors[self.names[name]]

    def read(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        """The tensor in float32 (float64 stays), checked for NaN. It may be mapped: never write to it."""
        return self._widened(name, self._stored(name), device)

    def minus(self, name: str, origin: Tensor, zero: bool) -> Tensor:
        """The tensor, read on the origin's device, less the origin: in place where that is no one's memory but ours.

        Arguments:
            zero: the origin is zero.
        """
        stored = self._stored(name)
        tensor = self._widened(name, stored, origin.device)
        if tensor is stored or tensor.dtype != origin.dtype:
            return tensor - origin
        return tensor if zero else tensor.sub_(origin)

    def _stored(self, name: str) -> Tensor:
        info = self.info(name)
        return check_finite(self.source.read(info.name), info.name, info.file)

    def _widened(self, name: str, stored: Tensor, device: torch.device | str) -> Tensor:
        """`stored` itself where nothing is to be changed."""
        return stored.to(device=device, dtype=torch.promote_types(self.info(name).dtype, torch.float32))

    @property
    def in_place(self) -> bool:
        """Whether what is read lies in memory or in a mapped file, so that holding it costs nothing."""
        source = self.source
        if not isinstance(source, (Checkpoint, MemorySource)) or type(source).read not in (
            Checkpoint.read,
            MemorySource.read,
        ):
            return False
        return source.in_place

    def cut(self, name: str, size: int) -> Iterator[Member]:
        """The member with this tensor alone, as a vector of the next `size` of its entries, read once."""
        info = self.info(name)
        for part in self.source.read(info.name).reshape(-1).split(size):
            yield replace(self, source=MemorySource({info.name: part}, info.file))


@dataclass(frozen=True)
class AlignedCheckpoints:
    """Aligned base and experts.

    Attributes:
        base: the pretrained model; None for methods that need none.
        experts: task -> expert, in the recipe's order.
        tensors: every tensor that is not a head -> what it is, under its name in the base.
        choices: the same names -> what happens to them and why.
        heads: task -> names (in the base's naming) of the tensors that belong to the task.
    """

    base: Member | None
    experts: Mapping[str, Member]
    tensors: Mapping[str, TensorInfo]
    choices: Mapping[str, Choice]
    heads: Mapping[str, tuple[str, ...]]

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks, in the order of the experts."""
        return tuple(self.experts)

    def merged(self) -> list[str]:
        """Names of the tensors that a method merges, in the base's order."""
        return [n for n, c in self.choices.items() if c.action in ("decompose", "scale")]

    def averages(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of what is the experts' mean, whatever the method."""
        return ((n, self.kept(n)) for n, c in self.choices.items() if c.action == "average")

    def reference(self) -> Member:
        """The base, or the first expert when there is no base: it gives names, dtypes and kept tensors."""
        return self.base or next(iter(self.experts.values()))

    def origin(self, name: str, kind: OriginKind, device: torch.device | str = "cpu") -> Tensor:
        """What task vectors are counted from, for one tensor, in float32 (float64 if one has it so)."""
        if kind == "pretrained":
            if self.base is None:
                raise RecipeError("This method counts task vectors from the base. Give base_model.")
            return self.base.read(name, device).to(self._widest(name, self.base))
        experts = list(self.experts.values())
        changes = self.changes(name, device) if kind == "average" else {}
        if self.base is not None and changes and len(changes) == len(experts):
            mean = stacked(list(changes.values()), [1 / len(experts)] * len(experts)).dense()
            start = self.base.read(name, device).to(mean.dtype)
            return start + mean.reshape(start.shape)
        widest = self._widest(name)
        total = torch.zeros(experts[0].info(name).shape, device=device, dtype=widest)
        if kind == "zero":
            return total
        for expert in experts:
            total.add_(expert.read(name, device))
        return total.div_(len(experts))

    def _widest(self, name: str, *others: Member) -> torch.dtype:
        """float64 if an expert has the tensor so: task vectors and origin are of one dtype."""
        dtypes = {member.info(name).dtype for member in (*self.experts.values(), *others)}
        return torch.float64 if torch.float64 in dtypes else torch.float32

    def deltas(self, name: str, origin: Tensor, kind: OriginKind | None = None) -> TaskVectors:
        """Task vectors of one tensor about `origin`, each computed when it is looked up.

        Arguments:
            kind: what `origin` is; without it no task vector is known as factors.
        """
        return TaskVectors(self, name, origin, kind)

    def change_rank(self, task: str, name: str) -> int | None:
        """The most that the rank of a task vector about the base can be; None unless the expert is an adapter over the base."""
        expert = self.experts[task]
        if self.base is None or name not in self.base.names or name not in expert.names:
            return None
        return expert.source.change_rank(expert.names[name], self.base.source, self.base.names[name])

    def unchanged(self, name: str) -> bool:
        """Whether all experts are adapters over the base, and none of them changes a tensor."""
        return all(self.change_rank(task, name) == 0 for task in self.experts)

    def changes(self, name: str, device: torch.device | str) -> dict[str, Factors]:
        """task -> its task vector about the base as factors, for the experts of which it is known so."""
        changes = {}
        for task, expert in self.experts.items():
            if self.base is not None and self.change_rank(task, name) is not None:
                change = expert.source.change(expert.names[name], self.base.source, self.base.names[name])
                if change is not None:
                    changes[task] = change.to(device, self._widest(name, self.base))
        return changes

    def components(self, name: str, kind: OriginKind) -> tuple[int, ...]:
        """How many singular components each task's vector of a matrix has, zero ones beyond its rank not among them."""
        shape = self.tensors[name].shape
        most = min(shape[0], self.tensors[name].numel // max(shape[0], 1))
        ranks = [self.change_rank(task, name) for task in self.experts]
        if kind == "average":
            known = [rank for rank in ranks if rank is not None]
            ranks = [sum(known) if len(known) == len(ranks) else None] * len(ranks)
        return tuple(most if rank is None or kind == "zero" else min(rank, most) for rank in ranks)

    def blocks(self, name: str, kind: OriginKind, size: int = BLOCK) -> Iterator[AlignedCheckpoints]:
        """The network with one tensor alone, as vectors of `size` of its entries at a time.

        Arguments:
            kind: what task vectors are counted from; the base is read for "pretrained" alone.
        """
        bases = self.base.cut(name, size) if self.base is not None and kind == "pretrained" else repeat(None)
        for base, *experts in zip(bases, *(expert.cut(name, size) for expert in self.experts.values()), strict=False):
            yield replace(self, base=base, experts=dict(zip(self.experts, experts, strict=True)))

    def base_is_mapped(self, name: str) -> bool:
        """Whether the base's tensor in float32 is what its file holds, so that it takes no memory."""
        return self.base is not None and self.base.in_place and self.base.info(name).dtype == torch.float32

    def in_place(self) -> bool:
        """Whether all that is read lies in memory or in mapped files."""
        members = (*self.experts.values(), *([self.base] if self.base is not None else []))
        return all(member.in_place for member in members)

    def kept(self, name: str) -> Tensor:
        """A tensor that no method merges: the base's as stored, or the experts' mean in float32 where it is averaged."""
        if self.choices[name].action == "average":
            return self.origin(name, "average")
        member = self.reference()
        info = member.info(name)
        return check_finite(member.source.read(info.name), info.name, info.file)

    def head(self, task: str) -> dict[str, Tensor]:
        """The tensors that belong to a task, under the names that the expert's own files use."""
        expert = self.experts[task]
        infos = [expert.info(name) for name in self.heads[task]]
        return {i.name: check_finite(expert.source.read(i.name), i.name, i.file) for i in infos}


class TaskVectors(Mapping[str, Tensor]):
    """task -> W_task - origin. Lazy, so that a loop over tasks holds one task vector at a time."""

    def __init__(self, network: AlignedCheckpoints, name: str, origin: Tensor, kind: OriginKind | None = None) -> None:
        self._network, self._name, self._origin, self._kind = network, name, origin, kind

    def __getitem__(self, task: str) -> Tensor:
        factors = self.factors(task)
        if factors is not None:
            return factors.dense().reshape(self._origin.shape)
        return self._network.experts[task].minus(self._name, self._origin, self._kind == "zero")

    def factors(self, task: str) -> Factors | None:
        """A task vector as factors of its matrix (rows, everything else); None where only the whole is known."""
        return self._factors.get(task)

    @cached_property
    def _factors(self) -> Mapping[str, Factors]:
        if self._kind not in ("pretrained", "average"):
            return {}
        changes = self._network.changes(self._name, self._origin.device)
        if self._kind == "average":
            return about_average(changes) if len(changes) == len(self) else {}
        return changes

    def __iter__(self) -> Iterator[str]:
        return iter(self._network.experts)

    def __len__(self) -> int:
        return len(self._network.experts)


def member_tensors(
    network: AlignedCheckpoints, member: Member, names: Iterable[str] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of one checkpoint of a network, for every tensor (of `names`) that it shares with it."""
    for name in network.tensors if names is None else names:
        if name in member.names:
            info = member.info(name)
            yield name, check_finite(member.source.read(info.name), info.name, info.file)
