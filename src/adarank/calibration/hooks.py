"""What is measured of an expert on its inputs: Gram matrices of what linear layers are given, squared gradients.

    G = Σ_x x xᵀ / n                       over the n vectors x that a linear layer is given
    F = mean_inputs Σ_y w_y (∂ log p_y / ∂θ)²        w_y: probability of label y under whatever labels are drawn from

Which vectors x count. A layer that works position by position is given (batch, positions, width): a vector for each
position of each input. Padding is no input, so only the positions that the attention mask names count; (batch·positions,
width) and (positions, batch, width) are the same, written otherwise. What has no such axes, as (batch, width) behind a
pooler, is one vector per input, and all count. Images have no mask: every patch counts, and a class token with them.
Positions that a model adds inside itself (to fill windows) count as well, as they do in its own outputs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adarank.models.chain import positions
from adarank.models.clip_networks import PackedAttention


@dataclass(frozen=True)
class LinearLayer:
    """A linear layer of a network.

    Attributes:
        name: its weight's name in the network.
        inputs_first: the weight is stored as (in, out): `transformers`' Conv1D. Else as (out, in).
    """

    name: str
    module: nn.Module
    inputs_first: bool


def linear_layers(module: nn.Module, shared: Mapping[str, Tensor], names: Collection[str]) -> list[LinearLayer]:
    """The linear layers whose weights are among `names`. A weight that several layers are tied to comes several times.

    Attention with q, k and v in one matrix is a linear layer of what it is given, for that matrix.

    Arguments:
        shared: name in the network -> the module's parameter.
    """
    from transformers.pytorch_utils import Conv1D  # imported on use: it is slow

    known = {id(shared[name]): name for name in names if name in shared}
    weights = {nn.Linear: "weight", Conv1D: "weight", PackedAttention: "in_proj_weight"}
    layers = []
    for part in module.modules():
        weight = next((getattr(part, name) for kind, name in weights.items() if isinstance(part, kind)), None)
        if weight is not None and id(weight) in known:
            layers.append(LinearLayer(known[id(weight)], part, isinstance(part, Conv1D)))
    return layers


class Seen(Exception):
    """Ends a forward pass whose rest is not needed."""


class Grams:
    """Sums of x xᵀ over what linear layers are given, by layer, in the order in which layers first ran.

    Arguments:
        stop: layers after whose first run in a pass the pass is ended by raising `Seen`; none: passes run to their end.
        dtype: of the sums.

    Attributes:
        calls: layer -> how often it ran.
    """

    def __init__(self, stop: Collection[str] = (), dtype: torch.dtype = torch.float32) -> None:
        self._dtype = dtype
        self.calls: Counter[str] = Counter()
        self._sums: dict[str, Tensor] = {}
        self._rows: Counter[str] = Counter()
        self._stop, self._missing = frozenset(stop), set(stop)
        self._mask: Tensor | None = None

    def begin(self, batch: Any) -> None:
        """Told before each forward pass: its batch, whose `attention_mask`, if it has one, tells what is padding."""
        self._mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        self._missing = set(self._stop)

    def add(self, name: str, given: Tensor) -> None:
        """Add a layer's input (…, width) to its sum."""
        vectors = counted(given, self._mask).to(self._dtype)
        if name not in self._sums:
            self._sums[name] = vectors.new_zeros(vectors.shape[1], vectors.shape[1])
        self._sums[name].addmm_(vectors.T, vectors)
        self._rows[name] += len(vectors)
        self.calls[name] += 1
        self._missing.discard(name)
        if self._stop and not self._missing:
            raise Seen

    def means(self) -> dict[str, Tensor]:
        """Layer -> G, (width, width) on the CPU, in the place of the sums: nothing can be added afterwards."""
        return {name: total.div_(max(1, self._rows[name])).cpu() for name, total in self._sums.items()}


@contextmanager
def recording_grams(layers: Sequence[LinearLayer], grams: Grams) -> Iterator[None]:
    """While it is open, whatever `layers` are given is added to `grams`."""

    def taker(name: str) -> Any:
        def take(_: nn.Module, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> None:
            grams.add(name, next(iter((*arguments, *named.values()))))

        return take

    handles = [layer.module.register_forward_pre_hook(taker(layer.name), with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def counted(given: Tensor, mask: Tensor | None) -> Tensor:
    """(n, width) float32, without a graph: the vectors of a layer's input that count, as `positions` says."""
    return positions(given.detach().float(), mask)


def label_weights(logits: Tensor, label: int | None, classes: int, generator: torch.Generator) -> dict[int, float]:
    """Label -> weight in the expectation over labels of one input.

    Arguments:
        logits: (classes,).
        label: the input's own label, which then has all weight; None for those that the model itself would give.
        classes: up to so many classes the weights are the model's probabilities; of more, so many labels are drawn.
    """
    if label is not None:
        return {label: 1.0}
    p = logits.detach().double().softmax(dim=-1).cpu()
    if len(p) <= classes:
        return dict(enumerate(p.tolist()))
    drawn = Counter(torch.multinomial(p, classes, replacement=True, generator=generator).tolist())
    return {number: count / classes for number, count in sorted(drawn.items())}


def add_squared_gradients(
    total: Mapping[str, Tensor], parameters: Mapping[str, Tensor], logits: Tensor, weights: Mapping[int, float]
) -> None:
    """Add Σ_y w_y (∂ log p_y / ∂θ)² of one input to `total`, in place.

    Arguments:
        total: name -> sum, like `parameters`. What the logits do not depend on is left alone.
        logits: (classes,), with their graph.
        weights: y -> w_y.
    """
    log_p = logits.log_softmax(dim=-1)
    for count, (label, weight) in enumerate(weights.items(), start=1):
        gradients = torch.autograd.grad(
            log_p[label], list(parameters.values()), retain_graph=count < len(weights), allow_unused=True
        )
        for name, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                total[name].addcmul_(gradient, gradient, value=weight)
