"""Block after block of a merge beside the experts' own: what linear layers and layer norms are given in both.

The network is walked from its inputs on, a block at a time. For each block and task the expert is run whole, then the merge with
all earlier blocks calibrated; passes end behind the block. What layers are given in the expert is kept for one block and task.
"""

from __future__ import annotations

import itertools
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adarank.calibration.hooks import Seen, counted, linear_layers
from adarank.methods.calibrated.base import Moments


@dataclass(frozen=True)
class Layer:
    """A layer that is calibrated.

    Attributes:
        weight, bias: their tensors' names in the network; no bias where it has none that is merged.
        norm: a layer norm, not a linear layer.
        inputs_first: the weight is stored as (in, out).
    """

    weight: str
    bias: str | None
    module: nn.Module
    norm: bool
    inputs_first: bool


def layers_of(module: nn.Module, shared: Mapping[str, Tensor], merged: list[str], matrices: list[str]) -> list[Layer]:
    """The layers of a module whose tensors are merged.

    Arguments:
        shared: name in the network -> the module's parameter.
        merged, matrices: names of all tensors that are merged, and of the matrices among them.
    """
    names = {id(shared[name]): name for name in merged if name in shared}

    def name_of(tensor: Tensor | None) -> str | None:
        return None if tensor is None else names.get(id(tensor))

    linear = [
        Layer(layer.name, name_of(layer.module.bias), layer.module, False, layer.inputs_first)  # type: ignore[arg-type]
        for layer in linear_layers(module, shared, matrices)
    ]
    # not of subclasses that normalise over another axis, as ConvNeXt's does where channels come first
    norms = [part for part in module.modules() if isinstance(part, nn.LayerNorm) and _is_plain(part)]
    return linear + [
        Layer(weight, bias, part, True, False)
        for part in norms
        if (weight := name_of(part.weight)) and (bias := name_of(part.bias))
    ]


def _is_plain(norm: nn.LayerNorm) -> bool:
    return type(norm).forward is nn.LayerNorm.forward


@contextmanager
def watching(layers: list[Layer], take: Callable[[Layer, Tensor], None]) -> Iterator[None]:
    """While it is open, whatever the layers are given goes to `take`."""

    def taker(layer: Layer) -> Any:
        def hook(_: nn.Module, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> None:
            take(layer, next(iter((*arguments, *named.values()))).detach())

        return hook

    handles = [layer.module.register_forward_pre_hook(taker(layer), with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Pairing:
    """Moments of what layers are given in the merge, paired with what they are given in an expert.

    Arguments:
        calls: weight's name -> how often the layer runs in a forward pass.
        target: α, the share of the expert's in the target.
        last: the weight of all positions but the first; 1 where all count alike.
    """

    def __init__(self, calls: Mapping[str, int], target: float, last: float) -> None:
        self._calls, self._target, self._last = calls, target, last
        self._kept: dict[str, deque[Tensor]] = defaultdict(deque)
        self._sums: dict[str, list[Tensor]] = {}
        self._missing: dict[str, int] = {}
        self._mask: Tensor | None = None

    def begin(self, batch: Any) -> None:
        """Told before each forward pass."""
        self._mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        self._missing = dict(self._calls)

    def keep(self, layer: Layer, given: Tensor) -> None:
        """What a layer is given in the expert."""
        self._kept[layer.weight].append(given)
        self._count(layer)

    def pair(self, layer: Layer, given: Tensor) -> None:
        """What it is given in the merge, in the same order."""
        expert = self._kept[layer.weight].popleft()
        weights = self._weights(layer, given)
        if layer.norm:
            assert isinstance(layer.module, nn.LayerNorm)
            given = nn.functional.layer_norm(given.float(), layer.module.normalized_shape, eps=layer.module.eps)
        merged, other = (counted(part, self._mask).double() for part in (given, expert))
        target = self._target * other + (1 - self._target) * merged
        heavy = merged * weights
        parts = [weights.sum(), heavy.sum(0), (target * weights).sum(0)]
        parts += [(heavy * merged).sum(0)] if layer.norm else [heavy.T @ merged, heavy.T @ target]
        sums = self._sums.get(layer.weight)
        self._sums[layer.weight] = parts if sums is None else [a.add_(b) for a, b in zip(sums, parts, strict=True)]
        self._count(layer)

    def moments(self, layer: Layer) -> Moments:
        """Of all that was paired for a layer, float64."""
        count, mean, target, second, *cross = self._sums[layer.weight]
        return Moments(mean / count, target / count, second / count, cross[0] / count if cross else second)

    def _weights(self, layer: Layer, given: Tensor) -> Tensor:
        """(n, 1): what each vector that counts weighs. Keys and values of other positions are read by the first one."""
        weights = torch.ones(*given.shape[:-1], 1, device=given.device)
        read = layer.weight.removesuffix(".weight").rsplit(".", 1)[-1] in _READ_BY_ALL
        if given.dim() == 3 and not read:
            weights[:, 1:] = self._last
        return counted(weights, self._mask).double()

    def _count(self, layer: Layer) -> None:
        self._missing[layer.weight] -= 1
        if not any(self._missing.values()):
            raise Seen


_READ_BY_ALL = ("k_proj", "v_proj", "key", "value", "qkv", "c_attn", "in_proj")


@torch.no_grad()
def run(call: Callable[[nn.Module, Any], Tensor], module: nn.Module, batches: Iterator[Any], pairing: Pairing) -> None:
    """Every batch through a module, until the layers that are watched have run."""
    for batch in batches:
        pairing.begin(batch)
        with suppress(Seen):
            call(module, batch)


def order_of(
    call: Callable[[nn.Module, Any], Tensor], module: nn.Module, batches: Iterator[Any], layers: list[Layer]
) -> dict[str, int]:
    """Weight's name -> how often its layer runs in a forward pass, in the order in which they first run."""
    calls: dict[str, int] = {}

    def take(layer: Layer, given: Tensor) -> None:
        calls[layer.weight] = calls.get(layer.weight, 0) + 1

    with torch.no_grad(), watching(layers, take):
        for batch in itertools.islice(batches, 1):
            call(module, batch)
    return calls
