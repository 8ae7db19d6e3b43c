"""Live weights of a whole network, a part of it at a time: those of a block, or of one tensor outside of the blocks.

Factors lie in files. In memory are those of one part, and what was learned of none: that lies in files, too.

Of several processes, which share the folder, each has a share of a part's factors in memory; what is learned is in all of them,
and the first one keeps it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from adarank.adapt.factor_files import kept_blocks
from adarank.adapt.learner import LiveLearner, between
from adarank.adapt.settings import AdaptSettings
from adarank.alignment.task_vectors import AlignedCheckpoints
from adarank.errors import RecipeError
from adarank.io import processes
from adarank.io.state import read_kept, write_state
from adarank.spectral.blocks import Blocks, build_blocks, reread_block
from adarank.spectral.mask_file import MaskFile, joined

if TYPE_CHECKING:
    from adarank.adapt.methods import AdaptiveMethod

V = TypeVar("V")


@dataclass
class PartWeights:
    """Merged weights of a network as a function of what is learned of each of its parts.

    Arguments:
        shared: tensor name -> the parameter or buffer that all networks use.
        of_blocks: of each block the names of its merged tensors.
        beside: names of those outside of the blocks, each a part of its own.
        folder: where factors and what is learned are kept. It is of this run alone, whose processes share it.

    Attributes:
        parts: names of merged tensors, those of a part together: the blocks' first.
        share: of the way from the start to what was learned, in [0, 1].
    """

    method: AdaptiveMethod
    network: AlignedCheckpoints
    shared: Mapping[str, Tensor]
    settings: AdaptSettings
    of_blocks: Sequence[Sequence[str]]
    beside: Sequence[str]
    folder: Path
    share: float = 1.0
    _start: tuple[float, float] = field(init=False)

    def __post_init__(self) -> None:
        self.parts = [*self.of_blocks, *([name] for name in self.beside)]
        self.device = next(iter(self.shared.values())).device
        self._basis = self.method.decomposition(self.network, self.device)
        grid = self.method.grid
        self.reset(grid.scales[grid.first[1]], grid.ranks[grid.first[0]])
        for tensor in self.shared.values():  # nothing has a gradient but the part that is learned
            tensor.requires_grad_(False)

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """Merged tensor -> the parameter that holds it."""
        return {name: self.shared[name] for name in self.network.merged()}

    def reset(self, scale: float, rank: float) -> None:
        """Choose the start of all parts: λ, and the share of components kept."""
        self._start = (scale, rank)

    def live(self, number: int) -> LiveLearner:
        """One part, at its start, with its factors in memory. All processes must call it."""
        return self._live(number, {name: self.shared[name] for name in self.parts[number]}, self.blocks(number))

    def _live(self, number: int, parameters: Mapping[str, Tensor], blocks: Mapping[str, Blocks]) -> LiveLearner:
        live = self.method.live(parameters, blocks, self.settings, self._basis)
        live.reset(*self._start)
        return live

    def keep(self, number: int, live: LiveLearner) -> None:
        """Keep what was learned of a part."""
        learned = {name: tensor.detach().cpu() for name, tensor in live.learned().items()}
        if processes.rank() == 0:
            write_state(self._learned(number), learned, "what was learned")

    def write(self) -> None:
        """Compose what is outside of the blocks into the networks."""
        for number in range(len(self.of_blocks), len(self.parts)):
            self.compose(number)

    def compose(self, number: int) -> None:
        """Compose a part into the networks, at `share` of the way to what was learned of it. All processes must call it."""
        live = self._moved(number, self.live(number))
        live.settle()
        live.write()
        self.rest(live)

    def composed(self, number: int) -> dict[str, Tensor]:
        """The same apart from the networks, by each process for itself: tensors by name."""
        if number >= len(self.of_blocks):  # the networks hold it
            return {name: self.shared[name] for name in self.parts[number]}
        tensors = {
            name: torch.empty_like(self.shared[name], memory_format=torch.contiguous_format)
            for name in self.parts[number]
        }
        with processes.alone():
            live = self._moved(number, self._live(number, tensors, self.mapped(number)))
            live.settle()
            live.write()
        return tensors

    def mapped(self, number: int) -> dict[str, Blocks]:
        """The factors of a part, all of them, in every process: mapped from their files."""
        with processes.alone():
            return self.blocks(number, mapped=True)

    def rest(self, live: LiveLearner) -> None:
        """A part is no longer learned."""
        live.zero_grad()
        for parameter in live.parameters.values():
            parameter.requires_grad_(False)

    def mask_file(self, tasks: tuple[str, ...], origin: str, about: Mapping[str, Any]) -> MaskFile | None:
        """The masks and λ of all parts; None if what is learned is something else. All processes must call it."""
        files = [
            self._moved(number, self.live(number)).mask_file(tasks, origin, about) for number in range(len(self.parts))
        ]
        return joined([file for file in files if file is not None], self.network.merged())

    def _moved(self, number: int, live: LiveLearner) -> LiveLearner:
        """A part, from its start to `share` of the way."""
        if self.share and self._learned(number).exists():
            kept = self._kept(number)
            start = {name: tensor.detach().clone() for name, tensor in live.learned().items()}
            at = kept if self.share == 1 else between(start, kept, self.share)
            with torch.no_grad():
                for name, tensor in live.learned().items():
                    tensor.copy_(at[name])
        return live

    def forget_from(self, number: int) -> None:
        """Nothing was learned of a part and of those after it."""
        for later in range(number, len(self.parts)):
            self._learned(later).unlink(missing_ok=True)

    def _kept(self, number: int) -> Mapping[str, Tensor]:
        path = self._learned(number)
        kept: Mapping[str, Tensor] | None = read_kept(path)
        if kept is None:
            raise RecipeError(f"{path}: what was learned is damaged. Delete {path.parent.parent} to start anew.")
        return kept

    def _learned(self, number: int) -> Path:
        return self.folder / f"learned-{number}.pt"

    def blocks(self, number: int, mapped: bool = False) -> dict[str, Blocks]:
        """Origins, task vectors and spectra of a part: of each matrix that is decomposed from its file, if there is one. Where
        none is, and the part is outside of the blocks, task vectors are read when they are looked at: it may be large, and is
        composed now and then alone. Of several processes each has its share in memory; all must call it.

        Arguments:
            mapped: factors stay in their files until they are read, and so do task vectors of parts without any.
        """
        names, kind, spectra = self.parts[number], self.method.planned_origin, self.method.spectra
        decomposed = {name for name in names if spectra and self.network.choices[name].action == "decompose"}
        if not decomposed and (mapped or number >= len(self.of_blocks)):
            return {name: reread_block(self.network, kind, name, self.device, self._basis) for name in names}

        def kept(place: int, make: Callable[[], Blocks]) -> Blocks:
            path = self.folder / f"factors-{number}" / f"{place}.pt"
            if names[place] not in decomposed:
                return make()
            return kept_blocks(path, lambda: {"": make()}, self.device, mapped)[""]

        return build_blocks(self.network, kind, self.device, spectra, self._basis, names, kept)


class _OfParts(Mapping[str, V]):
    """Merged tensor -> something of it; those of one part are in memory at a time."""

    def __init__(self, weights: PartWeights, made: Callable[[int], dict[str, V]]) -> None:
        self._made = made
        self._numbers = {name: number for number, names in enumerate(weights.parts) for name in names}
        self._number, self._held = -1, dict[str, V]()

    def __getitem__(self, name: str) -> V:
        number = self._numbers[name]
        if number != self._number:
            self._held.clear()
            self._number, self._held = number, self._made(number)
        return self._held[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._numbers)

    def __len__(self) -> int:
        return len(self._numbers)


class PartFactors(_OfParts[Blocks]):
    """Merged tensor -> its origin, task vectors and spectra."""

    def __init__(self, weights: PartWeights) -> None:
        super().__init__(weights, weights.mapped)


class PartTensors(_OfParts[Tensor]):
    """Merged tensor -> its value, composed when it is looked up."""

    def __init__(self, weights: PartWeights) -> None:
        super().__init__(weights, weights.composed)
