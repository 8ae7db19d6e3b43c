"""Statistics of the experts on their tasks' inputs, streamed batch by batch, one expert at a time, and kept by tensor.

In memory are one network, and the statistics of one expert (of one block of it for RegMean++). Given a folder, what is
done is kept there in a file per expert (and block), so that an interrupted run takes it up, settings that change nothing
of it find it again, and merging reads one tensor's statistics of one task at a time.
"""

from __future__ import annotations

import hashlib
import itertools
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from adarank.alignment.task_vectors import AlignedCheckpoints, member_tensors
from adarank.calibration.blocks import block_of, calibrated_by_block
from adarank.calibration.hooks import Grams, Seen, add_squared_gradients, label_weights, linear_layers, recording_grams
from adarank.io import processes
from adarank.io.checkpoint import check_finite
from adarank.io.record import Note
from adarank.io.state import read_kept, write_state
from adarank.methods.base import merge_tensor
from adarank.methods.calibrated.base import CalibratedMethod, CalibratesBlocks, Statistics
from adarank.models import TaskModels

M = TypeVar("M", bound=CalibratedMethod)


@dataclass(frozen=True)
class Sample:
    """The inputs that statistics are taken of.

    Attributes:
        call: (module, batch) -> (batch, classes) logits.
        batches: task -> its batches.
        singles: task -> its inputs, each as a batch of one, with their labels; None where labels are not to be read.
    """

    call: Callable[[nn.Module, Any], Tensor]
    batches: Callable[[str], Iterator[Any]]
    singles: Callable[[str], Iterator[tuple[Any, int | None]]]


class Store:
    """Statistics by part (a task, or a block of a task) and tensor.

    Arguments:
        folder: where each part is a file, and found again; None to hold all in memory.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._parts: dict[str, Mapping[str, Tensor]] = {}

    @property
    def kept_in_files(self) -> bool:
        """Whether other processes find what is kept."""
        return self._folder is not None

    def part(self, key: str) -> Mapping[str, Tensor] | None:
        """Tensor -> statistic, mapped from the part's file; None if it is not there, or damaged."""
        path = self._path(key)
        if key not in self._parts and path is not None and path.exists():
            kept = read_kept(path, mapped=True)
            if kept is None:
                return None
            self._parts[key] = kept
        return self._parts.get(key)

    def keep(self, key: str, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Add a part; returns it as `part` does."""
        path = self._path(key)
        if path is None:
            self._parts[key] = tensors
        else:
            write_state(path, tensors, "statistics")
        kept = self.part(key)
        assert kept is not None
        return kept

    def _path(self, key: str) -> Path | None:
        return self._folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.pt" if self._folder else None


@dataclass(frozen=True)
class Gatherer:
    """Takes the statistics that a method asks for. The models hold other tensors afterwards."""

    network: AlignedCheckpoints
    models: TaskModels
    sample: Sample
    store: Store
    note: Note = lambda text: None

    def inform(self, method: M) -> M:
        """`method` with its statistics."""
        return method.gathered(self)

    def squared_gradients(self, classes: int, seed: int) -> Statistics:
        """Of every merged tensor that gets a gradient, the mean square of single inputs' gradients.

        Arguments:
            classes: up to so many, the expectation over labels is a sum over all; of more, so many labels are drawn.
            seed: of these draws.
        """
        shared = self.models.shared
        parameters = {name: shared[name] for name in self.network.merged() if shared[name].requires_grad}
        parts = self.by_task(
            lambda task: self.taken(
                task, task, "Squared gradients", None, partial(self._fisher, classes, seed, task, parameters)
            )
        )
        return Statistics(parameters.keys(), lambda name, task: parts[task][name])

    def _fisher(self, classes: int, seed: int, task: str, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{task}".encode()))
        total = {name: torch.zeros_like(parameter, requires_grad=False) for name, parameter in parameters.items()}
        count = 0
        for batch, label in self.sample.singles(task):
            logits = self.sample.call(self.models.modules[task], batch)[0]
            add_squared_gradients(total, parameters, logits, label_weights(logits, label, classes, generator))
            count += 1
        return {name: squares.div_(count).cpu() for name, squares in total.items()}

    def gram_matrices(self, dtype: torch.dtype = torch.float32) -> Statistics:
        """Of every linear layer, the mean outer product of what it is given in the expert.

        Arguments:
            dtype: of the sums.
        """
        names = self._matrices()
        return self._of_layers(
            self.by_task(
                lambda task: self.taken(
                    task, task, "Gram matrices", None, partial(self._measured, task, names, dtype=dtype)
                )
            )
        )

    def gram_matrices_by_block(self, known_by: Callable[[Statistics], M]) -> M:
        """The method with Gram matrices of what layers are given behind the already merged earlier blocks.

        Arguments:
            known_by: the method with statistics.
        """
        known = known_by(Statistics())
        self._merge(known, None)  # what has no Gram matrix is averaged, now as in the end
        parts: dict[str, dict[str, Tensor]] = {task: {} for task in self.network.tasks}
        calls = self._calls(self._matrices())
        for block in dict.fromkeys(map(block_of, calls)):
            layers = [name for name in calls if block_of(name) == block]
            members = [name for name in self.network.merged() if block_of(name) == block]
            once = all(calls[name] == 1 for name in layers)
            for task, gathered in self.by_task(partial(self._of_block, block, layers, members, once)).items():
                parts[task].update(gathered)
            known = known_by(self._of_layers(parts))
            self._merge(known, members)
        return known

    def _of_block(
        self, block: str, layers: list[str], members: list[str], once: bool, task: str
    ) -> Mapping[str, Tensor]:
        measure = partial(self._measured, task, layers, stop=once)
        return self.taken(f"{task}/{block}", task, f"Gram matrices of {block}", members, measure)

    def calibrated_by_block(self, method: CalibratesBlocks) -> Statistics:
        """The tensors of the blocks, each fitted behind the calibrated earlier ones: by name, the same for every task.

        Arguments:
            method: what fits them. Without statistics it gives the merge before.
        """
        return calibrated_by_block(self, method)

    def by_task(self, take: Callable[[str], Mapping[str, Tensor]]) -> dict[str, Mapping[str, Tensor]]:
        """Task -> its part of the store. Of several processes each takes the statistics of some tasks, and finds the others'.

        Arguments:
            take: task -> its part, as `taken` gives it.
        """
        if self.store.kept_in_files:
            for task in processes.share(self.network.tasks):
                take(task)
            processes.meet()
        return {task: take(task) for task in self.network.tasks}

    def taken(
        self, key: str, task: str, what: str, names: list[str] | None, measure: Callable[[], dict[str, Tensor]]
    ) -> Mapping[str, Tensor]:
        """A part of the store, measured if it is not there, with the expert's tensors (of `names`; None: all) in the networks."""
        part = self.store.part(key)
        if part is not None:
            return part
        self.note(f"{what} on {task}")
        self.models.fill(member_tensors(self.network, self.network.experts[task], names))
        tensors = measure()
        for name, tensor in tensors.items():
            check_finite(tensor, name, f"statistics of task '{task}'")
        return self.store.keep(key, tensors)

    def _merge(self, method: CalibratedMethod, names: list[str] | None) -> None:
        """Put merged tensors (of `names`; None: all) into the networks."""
        device = next(iter(self.models.shared.values())).device
        chosen = self.network.tensors if names is None else names
        self.models.fill((name, merge_tensor(method, self.network, name, device)) for name in chosen)

    def _matrices(self) -> list[str]:
        return [name for name in self.network.merged() if self.network.choices[name].action == "decompose"]

    def _calls(self, names: list[str]) -> Mapping[str, int]:
        """Linear layer -> how often it runs in a forward pass, in the order in which layers first run."""
        task = self.network.tasks[0]
        grams = Grams()
        self._watch(task, names, grams, itertools.islice(self.sample.batches(task), 1))
        return grams.calls

    def _measured(
        self, task: str, names: list[str], stop: bool = False, dtype: torch.dtype = torch.float32
    ) -> dict[str, Tensor]:
        """Layer -> Gram matrix of what it is given on a task's inputs, with the weights that the models hold now.

        Arguments:
            stop: the layers run once in a forward pass, so that it may end behind the last of them.
        """
        grams = Grams(names if stop else (), dtype)
        self._watch(task, names, grams, self.sample.batches(task))
        return grams.means()

    @torch.no_grad()
    def _watch(self, task: str, names: list[str], grams: Grams, batches: Iterator[Any]) -> None:
        module = self.models.modules[task]
        with recording_grams(linear_layers(module, self.models.shared, names), grams):
            for batch in batches:
                grams.begin(batch)
                with suppress(Seen):
                    self.sample.call(module, batch)

    def _of_layers(self, parts: Mapping[str, Mapping[str, Tensor]]) -> Statistics:
        task = self.network.tasks[0]
        known = set.intersection(*(set(gathered) for gathered in parts.values()))
        layers = linear_layers(self.models.modules[task], self.models.shared, known)
        turned = frozenset(layer.name for layer in layers if layer.inputs_first)
        return Statistics(known, lambda name, task: parts[task][name], turned)
