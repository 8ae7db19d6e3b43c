"""A merge whose layers are merged slice by slice: each slice has its own models, its own settings, and one method."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from adarank.alignment.task_vectors import AlignedCheckpoints
from adarank.io.writer import Layout, Streamed
from adarank.method.context import Context, Result
from adarank.method.contract import MergeMethod
from adarank.method.outline import Outline


@dataclass(frozen=True)
class SlicePart:
    """One slice: its models, aligned, and the method with the slice's settings."""

    network: AlignedCheckpoints
    method: MergeMethod


class Sliced(MergeMethod):
    """The slices' methods as one. Each merges its tensors, one at a time, in the output's order.

    Arguments:
        parts: the slices, in the output's order.
    """

    name: ClassVar[str] = "slices"
    formula: ClassVar[str] = "as each slice's method"
    source: ClassVar[str] = "mergekit's slices"

    parts: tuple[Any, ...]  # SlicePart; pydantic would take its fields apart

    def in_force(self) -> dict[str, Any]:
        """Every setting with its value, slice by slice."""
        return {"parameters": [part.method.in_force()["parameters"] for part in self.parts]}

    def notes(self, network: AlignedCheckpoints) -> list[str]:
        """What a user may not expect of the methods here."""
        return list(dict.fromkeys(note for part in self.parts for note in part.method.notes(part.network)))

    @property
    def decomposes(self) -> bool:
        """Whether matrices are decomposed in any slice."""
        return any(part.method.decomposes for part in self.parts)

    def shares_work(self) -> bool:
        """The methods of slices merge tensor by tensor."""
        return True

    def held_bytes(self, outline: Outline) -> int:
        """Bytes held at once at most: slices are merged in turn."""
        held: list[int] = [part.method.held_bytes(replace(outline, network=part.network)) for part in self.parts]
        return max(held)

    def run(self, context: Context) -> Result:
        """Merge slice by slice, tensor by tensor."""
        return Result(_Joined(self.parts, context))


@dataclass(frozen=True)
class _Joined:
    """The slices' tensors, one slice after another."""

    parts: Sequence[SlicePart]
    context: Context

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return (pair for result in self._results() for pair in result.tensors)

    def in_dtypes(self, layout: Layout) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of the layout's tensors, as each slice's method gives them."""
        return (pair for result in self._results() for pair in result.in_dtypes(layout))

    def to_write(self, layout: Layout) -> Iterator[tuple[str, Tensor | Streamed]]:
        """(name, tensor) of the layout's tensors, as each slice's method gives them to a writer."""
        return (pair for result in self._results() for pair in result.to_write(layout))

    def _results(self) -> Iterator[Result]:
        context = self.context
        return (part.method.run(Context(part.network, context.device, context.seed)) for part in self.parts)
