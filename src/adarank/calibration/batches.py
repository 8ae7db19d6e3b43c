"""Statistics of modules in memory, on the batches that somebody gives from Python."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from adarank.alignment.task_vectors import AlignedCheckpoints
from adarank.calibration.gather import Gatherer, Sample, Store
from adarank.errors import DataError, itemise
from adarank.method import Context
from adarank.models import share
from adarank.models.predict import Forward


class Batches(Context):
    """What a method is given that runs from Python, without files.

    Arguments:
        experts: task -> fine-tuned model; modules where statistics are taken.
        batches: task -> its batches; pairs of (batch, labels) where labels are read.
        call: (module, batch) -> (batch, classes) logits.
    """

    def __init__(
        self,
        network: AlignedCheckpoints,
        experts: Mapping[str, nn.Module | Mapping[str, Tensor]],
        batches: Mapping[str, Sequence[Any]],
        call: Forward,
    ) -> None:
        super().__init__(network)
        self._experts, self._batches, self._call = experts, batches, call

    def with_statistics(self, method: Any) -> tuple[Any, dict[str, Any]]:
        """The method with statistics of copies of the experts on the batches given."""
        self._refuse(method)
        experts, network = self._experts, self.network
        copies = (
            (t, copy.deepcopy(expert).float().eval()) for t, expert in experts.items() if isinstance(expert, nn.Module)
        )
        models = share(copies, network)
        models.fill((name, network.kept(name)) for name, choice in network.choices.items() if choice.action == "keep")
        sample = _sample(self._batches, self._call, method.reads_labels)
        return Gatherer(network, models, sample, Store()).inform(method), {}

    def _refuse(self, method: Any) -> None:
        """All that keeps the experts from being measured, in one error."""
        problems = [
            f"experts: '{task}' is no module, and '{method.name}' runs it."
            for task, expert in self._experts.items()
            if not isinstance(expert, nn.Module)
        ]
        problems += [f"batches: none for '{task}', and '{method.name}' takes statistics of {method.data}."
                     for task in self._experts if not self._batches.get(task)]  # fmt: skip
        if method.reads_labels:
            problems += [f"batches: one of '{task}' is no pair of (batch, labels), and labels are to be read."
                         for task, given in self._batches.items()
                         if not all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in given)]  # fmt: skip
        if problems:
            raise DataError(itemise("The experts cannot be measured.", problems))


def _sample(batches: Mapping[str, Sequence[Any]], call: Forward, labelled: bool) -> Sample:
    """The batches given, as what statistics are taken of; `labelled`: they are pairs of (batch, labels)."""

    def whole(task: str) -> Iterator[Any]:
        return (item[0] if labelled else item for item in batches[task])

    def singles(task: str) -> Iterator[tuple[Any, int | None]]:
        for item in batches[task]:
            batch, labels = item if labelled else (item, None)
            for number, single in enumerate(_singles(batch)):
                yield single, None if labels is None else int(labels[number])

    return Sample(call, whole, singles)


def _singles(batch: Any) -> Iterator[Any]:
    """A batch's inputs one by one: every tensor in it is cut along its first axis."""
    if isinstance(batch, Tensor):
        yield from batch.split(1)
        return
    named = isinstance(batch, Mapping)
    items = list(batch.items() if named else enumerate(batch) if isinstance(batch, (tuple, list)) else ())
    cut = {key: value.split(1) for key, value in items if isinstance(value, Tensor) and value.dim()}
    if not cut:
        raise DataError(
            f"batches: Fisher information is of single inputs, and a {type(batch).__name__} cannot be cut into them. Give tensors, or tuples or mappings of them."
        )
    for number in range(len(next(iter(cut.values())))):
        single = {key: cut[key][number] if key in cut else value for key, value in items}
        yield single if named else tuple(single.values())
