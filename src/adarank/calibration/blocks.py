"""Blocks of a network, and a merge calibrated block by block beside the experts' own streams (`streams.py` measures them)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from adarank.calibration.streams import Layer, Pairing, layers_of, order_of, run, watching
from adarank.io.checkpoint import check_finite
from adarank.methods.base import merge_tensor
from adarank.methods.calibrated.base import CalibratesBlocks, Fit, Moments, Pair, Statistics

if TYPE_CHECKING:
    from adarank.calibration.gather import Gatherer

_BLOCK = re.compile(r"(?:.*\.)?\d+(?=\.)")


def block_of(name: str) -> str:
    """The block that a tensor is part of: its name up to its last number; its module where it has none."""
    match = _BLOCK.match(name)
    return match.group() if match else name.rpartition(".")[0]


def calibrated_by_block(gatherer: Gatherer, method: CalibratesBlocks) -> Statistics:
    """The tensors of the blocks, each fitted behind the calibrated earlier ones: by name, the same for every task."""
    walk = _Walk(gatherer, method)
    blocks = list(dict.fromkeys(map(block_of, walk.calls)))
    numbered = [number for number, block in enumerate(blocks) if _BLOCK.match(f"{block}.")]
    last = numbered[-1] if numbered else len(blocks)
    known: dict[str, Tensor] = {}
    for number, block in enumerate(blocks):
        part = walk.calibrated(block, number >= last)
        known |= part
        walk.put(part)
    return Statistics(known.keys(), lambda name, task: known[name])


class _Walk:
    """The merge as far as it is calibrated, in the networks and beside them."""

    def __init__(self, gatherer: Gatherer, method: CalibratesBlocks) -> None:
        self._gatherer, self._method, self._network = gatherer, method, gatherer.network
        network, models = gatherer.network, gatherer.models
        self._device = next(iter(models.shared.values())).device
        before = method.with_statistics(Statistics())
        self._merged = {name: merge_tensor(before, network, name, self._device) for name in network.tensors}
        matrices = [name for name in network.merged() if network.choices[name].action == "decompose"]
        self._layers = {
            task: layers_of(models.modules[task], models.shared, network.merged(), matrices) for task in network.tasks
        }
        models.fill(self._merged.items())
        first, sample = network.tasks[0], gatherer.sample
        self.calls = order_of(sample.call, models.modules[first], sample.batches(first), self._layers[first])

    def put(self, tensors: dict[str, Tensor]) -> None:
        """Tensors of a calibrated block."""
        self._merged |= tensors
        self._gatherer.models.fill(tensors.items())

    def calibrated(self, block: str, last: bool) -> dict[str, Tensor]:
        """The tensors of a block, fitted behind the calibrated earlier ones. The networks hold the merge afterwards."""
        fits: dict[str, Fit] = {}
        here: dict[str, Layer] = {}
        parts = self._gatherer.by_task(partial(self._taken, block, last))
        for task, part in parts.items():
            for layer in self._of_block(task, block):
                here[layer.weight] = layer
                fit = fits.setdefault(layer.weight, self._method.fit(layer.norm))
                fit.add(Moments.of_named(part, layer.weight), *self._of(task, layer))
        calibrated: dict[str, Tensor] = {}
        for weight, fit in fits.items():
            calibrated |= self._named(here[weight], fit.solved(self._of(None, here[weight]), self._now(here[weight])))
        return calibrated

    def _of_block(self, task: str, block: str) -> list[Layer]:
        return [layer for layer in self._layers[task] if block_of(layer.weight) == block and layer.weight in self.calls]

    def _taken(self, block: str, last: bool, task: str) -> Mapping[str, Tensor]:
        measure = partial(self._measured, task, self._of_block(task, block), last)
        return self._gatherer.taken(f"{task}/{block}", task, f"Features of {block}", None, measure)

    def _measured(self, task: str, layers: list[Layer], last: bool) -> dict[str, Tensor]:
        """The layers' moments by name. The networks hold the expert before, and the merge afterwards."""
        models, sample = self._gatherer.models, self._gatherer.sample
        pairing = Pairing(
            {layer.weight: self.calls[layer.weight] for layer in layers},
            self._method.target,
            self._method.last_weight(self._network) if last else 1.0,
        )
        with watching(layers, pairing.keep):
            run(sample.call, models.modules[task], sample.batches(task), pairing)
        models.fill(self._merged.items())
        with watching(layers, pairing.pair):
            run(sample.call, models.modules[task], sample.batches(task), pairing)
        return {key: part for layer in layers for key, part in pairing.moments(layer).named(layer.weight).items()}

    def _of(self, task: str | None, layer: Layer) -> Pair:
        """A layer's weight and bias in an expert; in the base without a task. Fits are made on the CPU, in float64."""
        member = self._network.base if task is None else self._network.experts[task]
        assert member is not None
        bias = member.read(layer.bias) if layer.bias else None
        return self._pair(layer, member.read(layer.weight), bias)

    def _now(self, layer: Layer) -> Pair:
        return self._pair(layer, self._merged[layer.weight], self._merged[layer.bias] if layer.bias else None)

    def _pair(self, layer: Layer, weight: Tensor, bias: Tensor | None) -> Pair:
        weight = weight.T if layer.inputs_first else weight
        return weight.cpu().double(), None if bias is None else bias.cpu().double()

    def _named(self, layer: Layer, pair: Pair) -> dict[str, Tensor]:
        weight, bias = pair
        tensors = {layer.weight: weight.T if layer.inputs_first else weight}
        if layer.bias is not None and bias is not None:
            tensors[layer.bias] = bias
        return {
            name: check_finite(tensor.float().contiguous(), name, "the calibrated layer")
            for name, tensor in tensors.items()
        }
