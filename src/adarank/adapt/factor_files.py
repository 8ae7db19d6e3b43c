"""Origins, task vectors and spectra in files, from which they are read or mapped; and what adaptation holds in memory, predicted.

    4 · ( Σ_W (live + origin + components) + kept + heads + max(gradients + one matrix's products, one matrix's SVD) + Σ_W factors )

bytes, W over the merged tensors; where a block is learned at a time, the largest block. Of several processes each has origins and factors of its share. A budget of memory that has no room for the last sum has factors mapped from files.
"""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from adarank.alignment.layers import layer_groups, layer_number
from adarank.alignment.task_vectors import AlignedCheckpoints
from adarank.io import processes
from adarank.io.state import read_kept, write_state
from adarank.method import Outline
from adarank.spectral.blocks import Blocks, factor_numbers, holders

if TYPE_CHECKING:
    from adarank.adapt.methods import AdaptiveMethod

_BY_COMPONENT = (
    10  # logits, where they start, their pace, gradient and moments, masks, and what is kept of the best step
)
_SVD = 14  # copies of a matrix: itself and its origin, U, V, what the driver works in
_SMALL = 2**14  # numbers: what is less stays in memory


def kept_blocks(
    path: Path, make: Callable[[], Mapping[str, Blocks]], device: torch.device | str = "cpu", mapped: bool = False
) -> dict[str, Blocks]:
    """Tensor -> blocks from a file, which is made if it is not there, or damaged.

    Arguments:
        mapped: they stay in the file until they are read, and take no memory that the system cannot have back.
    """
    kept = read_kept(path, mapped)
    if kept is None:
        blocks = dict(make())
        write_state(path, {name: vars(block) for name, block in blocks.items()}, "the factors")
        if not mapped:
            return blocks
        blocks.clear()
        kept = read_kept(path, mapped)
    return {name: Blocks(**fields).to(device) for name, fields in kept.items()}


class FactorFiles:
    """Where a run's factors lie that are mapped from files, a file for each large tensor.

    Arguments:
        folder: of these very settings and inputs.
        wholes: whole task vectors are asked for, too.
    """

    def __init__(self, folder: Path, wholes: bool) -> None:
        self._folder, self._wholes = folder, wholes

    def __call__(self, number: int, make: Callable[[], Blocks]) -> Blocks:
        """A tensor's blocks: from its file if there is one.

        Arguments:
            number: of the tensor in the network.
        """
        path = self._folder / f"{number}.pt"
        made: list[Blocks] = []
        if not path.exists():
            made.append(make())
            if made[0].origin.numel() < _SMALL:
                return made[0]
        return kept_blocks(path, lambda: {"": self._filled(made.pop() if made else make())}, mapped=True)[""]

    def _filled(self, blocks: Blocks) -> Blocks:
        if self._wholes and blocks.components:
            blocks.multiply_out()
        return blocks


class Holding:
    """What adaptation by a method holds in memory, from headers alone.

    Arguments:
        outline: of its merge, with the budget if there is one.
    """

    def __init__(self, method: AdaptiveMethod, outline: Outline) -> None:
        self._method, self._outline, self._network = method, outline, outline.network
        self._merged = self._network.merged()

    def total(self) -> int:
        """All that is held at once, within the budget where mapped factors bring it there."""
        if self._method.settings.by == "block":
            return 4 * self._by_block()
        return 4 * (self._rest() + self._factors(in_files=self.in_files()))

    def in_files(self) -> bool:
        """Whether factors are mapped from files: the budget has no room for them."""
        room = self._outline.memory
        if room is None or self._method.settings.by == "block":
            return False
        return 4 * (self._rest() + self._factors(in_files=False)) > room

    def _rest(self) -> int:
        """Numbers that are held whether factors are or not."""
        by_tensor = sum(self._numel(name) + _BY_COMPONENT * self._components(name) for name in self._merged)
        by_tensor += self._of_process({name: self._origin(name) + self._halves(name) for name in self._merged})
        gradients = sum(self._numel(name) for name in self._merged)
        products = max((2 * self._rows(n) * self._components(n) for n in self._merged), default=0)
        svd = max((_SVD * self._numel(name) for name in self._merged if self._decomposed(name)), default=0)
        return by_tensor + self._kept() + self._outline.head_numel() + max(gradients + products, svd)

    def _factors(self, in_files: bool) -> int:
        """Numbers of all factors; of those that stay in memory, and of the largest, which is made there, where they lie in files."""
        sizes = {name: self._method.stored_numbers(self._network, name) for name in self._merged}
        if not in_files:
            return self._of_process(sizes)
        small = {name: size if self._numel(name) < _SMALL else 0 for name, size in sizes.items()}
        return self._of_process(small) + max(sizes.values(), default=0)

    def _of_process(self, sizes: Mapping[str, int]) -> int:
        """The sum of numbers of merged tensors of the process that holds most of them; of one, of all."""
        ranks = holders(self._network, list(sizes), self._method.planned_origin, self._method.spectra)
        held = Counter[int]()
        for rank, size in zip(ranks, sizes.values(), strict=True):
            held[rank] += size
        return max(held.values(), default=0)

    def _by_block(self) -> int:
        """All that is held of the largest block, and the weights of what is in none."""
        blocks, outside = dict[str, list[str]](), self._outline.head_numel()
        names = list(self._network.tensors)
        for name, group in zip(names, layer_groups(names), strict=True):
            if layer_number(name) is None:
                outside += self._numel(name)
            else:
                blocks.setdefault(group, []).append(name)
        return outside + max(map(self._of_block, blocks.values()), default=0)

    def _of_block(self, names: Sequence[str]) -> int:
        """Numbers of a block: weights, of what is merged gradients and components, and the process's share of origins and factors."""
        merged = [name for name in names if name in self._merged]
        stored = {name: self._method.stored_numbers(self._network, name) + self._halves(name) for name in merged}
        of_process = self._of_process({name: self._numel(name) + stored[name] for name in merged})
        by_tensor = sum(self._numel(name) + _BY_COMPONENT * self._components(name) for name in merged)
        return sum(map(self._numel, names)) + by_tensor + of_process

    def _kept(self) -> int:
        choices = self._network.choices.items()
        return sum(self._numel(name) for name, choice in choices if choice.action in ("keep", "average"))

    def _origin(self, name: str) -> int:
        """Numbers of an origin: none where it is mapped from the base's file."""
        mapped = self._method.origin == "pretrained" and self._network.base_is_mapped(name)
        return 0 if mapped else self._numel(name)

    def _halves(self, name: str) -> int:
        """Numbers that the same factors in bfloat16 take the memory of."""
        if not (self._decomposed(name) and self._method.soft and self._method.learn().precision == "bfloat16"):
            return 0
        return factor_numbers(self._network, name, self._method.planned_origin) // 2

    def _decomposed(self, name: str) -> bool:
        return self._method.spectra and self._network.choices[name].action == "decompose"

    def _components(self, name: str) -> int:
        return sum(self._network.components(name, self._method.planned_origin)) if self._decomposed(name) else 0

    def _rows(self, name: str) -> int:
        return self._network.tensors[name].shape[0] if self._network.tensors[name].shape else 1

    def _numel(self, name: str) -> int:
        return self._network.tensors[name].numel


def has_room(method: AdaptiveMethod, network: AlignedCheckpoints, device: torch.device | str) -> bool:
    """Whether every process is to hold all factors: on GPUs, which compose sooner than weights are sent, if half of the memory
    that a process has of its GPU has room for them. All must call it."""
    device = torch.device(device)
    if device.type != "cuda":
        return False
    gpu = (platform.node(), torch.cuda.current_device() if device.index is None else device.index)
    together = processes.gathered(gpu).count(gpu)  # processes may share a GPU
    merged = network.merged()
    numbers = sum(3 * network.tensors[name].numel + method.stored_numbers(network, name) for name in merged)
    return all(processes.gathered(8 * numbers * together < torch.cuda.get_device_properties(device).total_memory))
