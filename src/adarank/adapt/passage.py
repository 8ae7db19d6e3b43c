"""Tasks' networks run a block at a time over many batches: what every block gives lies in files, and its weights alone are in memory.

All batches go through one block before the next one is filled, with the weights of whichever model is wanted: the base's, an
expert's, those of a merge. Embeddings, heads, and whatever else is outside of the blocks, stay in memory. What the last block
gave is the same, to the bit, as in the whole network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adarank.adapt.problem import Chunk
from adarank.adapt.streams import Streams, name_of
from adarank.alignment.task_vectors import AlignedCheckpoints, member_tensors
from adarank.errors import OutputError
from adarank.io import processes
from adarank.io.state import read_kept, write_state
from adarank.models import TaskModels
from adarank.models.chain import find_chain, numbered, tensors_of
from adarank.models.hollow import allocate, held, release
from adarank.models.predict import Forward

Chunks = Mapping[str, Callable[[], Iterable[Chunk]]]
"""task -> what gives its batches, as often as it is called."""
EXPERTS = "predictions"  # the stream of experts whose predictions are wanted


class Passage:
    """Networks whose shared tensors are in memory only while their block is.

    Arguments:
        models: the networks. Their shared tensors may be hollow; those in blocks are so from here on, but while they are held.
        batches: task -> one of its batches, to find the blocks by.
        folder: where streams are kept. It is of this run alone, whose processes share it.

    Attributes:
        models: as given.
        chains: task -> its network's blocks.
        paths: the blocks' names, in the order in which they run.
        inside: of every block the names of its shared tensors; `outside`: all others.

    Raises:
        RecipeError: the networks have no blocks that can be run alone.
    """

    def __init__(
        self,
        models: TaskModels,
        network: AlignedCheckpoints,
        forward: Forward,
        batches: Mapping[str, Any],
        folder: Path,
    ) -> None:
        self.models, self._network, self._shared = models, network, models.shared
        self._names = {id(tensor): name for name, tensor in models.shared.items()}
        self._tasks = {id(models.modules[task]): number for number, task in enumerate(batches)}
        device = next(iter(models.shared.values())).device
        self._folder, self._streams = folder, Streams(folder / "streams", device)
        self._outside_now: Mapping[str, Tensor] | None = None
        merged = [models.shared[name] for name in network.merged()]
        first = models.modules[next(iter(batches))]
        in_lists = {name for part in numbered(first, merged).values() for name in self._names_in(part)}
        self._put_base([name for name in self._shared if name not in in_lists])
        self.chains = {
            task: find_chain(models.modules[task], forward, batch, merged, self._as_base)
            for task, batch in batches.items()
        }
        chain = next(iter(self.chains.values()))
        self.paths = chain.paths
        self.inside = [self._names_in(chain.block(place)) for place in range(len(chain))]
        within = {name for names in self.inside for name in names}
        self.outside = sorted(self._shared.keys() - within)
        self._put_base([name for name in self.outside if name in in_lists])
        release(self._shared[name] for name in within)
        self._apart = {task: self._differing(task) for task in batches}

    def held(self, place: int) -> AbstractContextManager[None]:
        """While it is open the block at a place has memory, to be filled first."""
        return held([self._shared[name] for name in self.inside[place]])

    def fill(self, place: int, merged: Mapping[str, Tensor]) -> None:
        """Fill a block that is held with merged tensors, and what is not merged with what is kept."""
        names = self.inside[place]
        self.models.fill((name, merged[name]) for name in names if name in merged)
        self.fill_kept(place)

    def fill_kept(self, place: int) -> None:
        """Fill those tensors of a block that is held which are not merged."""
        merged = set(self._network.merged())
        self.models.fill(self._base([name for name in self.inside[place] if name not in merged]))

    def fill_expert(self, task: str, place: int) -> None:
        """Fill a block that is held with a task's expert."""
        self.models.fill(self._of_expert(task, self.inside[place]))

    def fill_all(self, merged: Mapping[str, Tensor]) -> None:
        """Give the networks all their memory again, and fill them."""
        for place, names in enumerate(self.inside):
            allocate(self._shared[name] for name in names)
            self.fill(place, merged)

    def keep_outside(self) -> None:
        """From here on what is outside of the blocks is what the networks hold there now, whoever takes its place for a while.
        All processes must call it.

        Raises:
            OutputError: what was written cannot be read back.
        """
        path = self._folder / "outside.pt"
        names = sorted({name for names in self._apart.values() for name in names})
        if processes.rank() == 0:
            write_state(path, {name: self._shared[name].detach() for name in names}, "what is outside of the blocks")
        processes.meet()
        self._outside_now = read_kept(path, mapped=True)
        if self._outside_now is None:
            raise OutputError(f"{path}: written a moment ago, and now missing or damaged. Run the same command again, and see that nothing else writes there.")  # fmt: skip

    @contextmanager
    def outside_of(self, task: str) -> Iterator[None]:
        """While it is open the networks hold a task's expert outside of the blocks."""
        names = self._apart[task]
        self.models.fill(self._of_expert(task, names))
        try:
            yield
        finally:
            now = self._outside_now
            self.models.fill(self._base(names) if now is None else ((name, now[name]) for name in names))

    @torch.no_grad()
    def run(self, stream: str, task: str, place: int, batches: Iterable[Any]) -> None:
        """Bring batches of a task behind the block at a place, which is held and filled."""
        chain = self.chains[task]
        for batch in batches:
            given = self.given(stream, task, chain.needed(place), batch)
            self._streams.keep(stream, place, self._name(task, batch), chain.run(place, batch, given))

    def given(self, stream: str, task: str, places: Sequence[int], batch: Any) -> dict[int, Any]:
        """What blocks at some places gave on a batch."""
        return self._streams.read(stream, places, self._name(task, batch))

    def bring(self, stream: str, chunks: Chunks, fill: Callable[[int], None]) -> None:
        """Bring batches of several tasks behind the last block.

        Arguments:
            fill: fills the block at a place, which is held.
        """
        self.forget(stream, chunks)
        for place in range(len(self.paths)):
            with self.held(place):
                fill(place)
                for task, of_task in chunks.items():
                    self.run(stream, task, place, (batch for _, batch in of_task()))
            self.forget(stream, chunks, place + 1)

    def after(self, stream: str) -> Forward:
        """Networks' predictions for batches that were brought behind the last block."""
        return self.from_block(stream, len(self.paths))

    def from_block(self, stream: str, place: int) -> Forward:
        """Networks' predictions for batches that were brought before the block at a place: it and those behind it are run."""
        chains = list(self.chains.values())

        def forward(module: nn.Module, batch: Any) -> Tensor:
            number = self._tasks[id(module)]
            chain = chains[number]
            given = self._streams.read(stream, chain.needed(place), name_of(number, batch))
            return chain.logits(batch, given, place)

        return forward

    @contextmanager
    def expert(self, task: str, chunks: Callable[[], Iterable[Chunk]]) -> Iterator[Forward]:
        """While it is open: the predictions of a task's expert for these batches."""
        with self.outside_of(task):
            self.bring(EXPERTS, {task: chunks}, partial(self.fill_expert, task))
            yield self.after(EXPERTS)
        self.forget(EXPERTS, [task])

    def forget(self, stream: str, tasks: Iterable[str], before: int | None = None) -> None:
        """Let go of tasks' batches in a stream, or of what of them the block at a place and later ones do not need."""
        numbers = [self._number(task) for task in tasks]
        if before is None:
            self._streams.forget(stream, numbers)
            return
        needed = next(iter(self.chains.values())).needed(before)
        for place in set(range(before)) - set(needed):
            self._streams.forget(stream, numbers, place)

    def _number(self, task: str) -> int:
        return list(self.chains).index(task)

    def _name(self, task: str, batch: Any) -> str:
        return name_of(self._number(task), batch)

    @contextmanager
    def _as_base(self, part: nn.Module) -> Iterator[None]:
        names = self._names_in(part)
        with held([self._shared[name] for name in names]):
            self.models.fill(self._base(names))
            yield

    def _put_base(self, names: Sequence[str]) -> None:
        allocate(self._shared[name] for name in names)
        self.models.fill(self._base(names))

    def _base(self, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """Tensors as they are before anything is merged: the base's, or the experts' mean where the recipe says so."""
        yield from member_tensors(self._network, self._network.reference(), names)
        averaged = [name for name in names if self._network.choices[name].action == "average"]
        yield from ((name, self._network.kept(name)) for name in averaged)

    def _of_expert(self, task: str, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        member = self._network.experts[task]
        yield from self._base([name for name in names if name not in member.names])
        yield from member_tensors(self._network, member, names)

    def _names_in(self, part: nn.Module) -> list[str]:
        inside = {id(tensor) for tensor in tensors_of(part)}
        return [name for key, name in self._names.items() if key in inside]

    def _differing(self, task: str) -> list[str]:
        """Tensors outside of the blocks that an expert may have otherwise than a merge: those that are merged, and kept ones
        that differ."""
        merged = set(self._network.merged())
        expert = member_tensors(self._network, self._network.experts[task], self.outside)
        return [
            name
            for name, tensor in expert
            if name in merged or not torch.equal(tensor.to(self._shared[name]), self._shared[name])
        ]
