"""Which layer of a network a tensor is in, read off its name.

encoder.layer.3.output.dense.weight     layer 3, of encoder.layer: the first number between dots
embeddings.LayerNorm.bias               in no layer, but a part of embeddings
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

_NUMBER = re.compile(r"(?:^|\.)(\d+)\.")


def layer_number(name: str) -> int | None:
    """The number of the layer that a tensor is in; None outside of layers. In networks of stages it is the stage's."""
    match = _NUMBER.search(name)
    return int(match.group(1)) if match else None


@dataclass(frozen=True)
class Span:
    """The layers that lists over the layers run over, and what models call the tensors where that is not the output's name.

    Attributes:
        first, last: numbers of layers in the output.
        called: model -> name in the output -> name in the model's own file, which the filters of its settings see.
    """

    first: int
    last: int
    called: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def position(self, name: str) -> float:
        """Where in the layers a tensor is: 0 in the first and outside of them, 1 in the last."""
        layer = layer_number(name)
        if layer is None:
            return 0.0
        return (layer - self.first) / (self.last - self.first) if self.last > self.first else 1.0

    def seen(self, model: str, name: str) -> str:
        """The name that filters of a model's settings are compared with."""
        return self.called.get(model, {}).get(name, name)


def whole_span(names: Sequence[str]) -> Span:
    """All layers from the first."""
    return Span(0, max((layer_number(name) or 0 for name in names), default=0))


DEPTHS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
"""What configurations call the number of layers."""


def depth(config: Mapping[str, Any]) -> int | None:
    """How many layers a configuration says that there are."""
    known = (config.get(key) for key in DEPTHS)
    return next((number for number in known if isinstance(number, int)), None)


def layer_groups(names: Sequence[str]) -> list[str]:
    """What each tensor belongs to: its layer (`encoder.layer.3`), else its outermost module that is not all tensors'.

    Arguments:
        names: of all tensors, as what is common to all of them (`vit.`) tells no two apart.
    """
    levels = zip(*(name.split(".")[:-1] for name in names), strict=False)
    shared = sum(1 for _ in takewhile(lambda level: len(set(level)) == 1, levels))
    return [_group(name, shared) for name in names]


def _group(name: str, shared: int) -> str:
    match = _NUMBER.search(name)
    return name[: match.end(1)] if match else ".".join(name.split(".")[:-1][: shared + 1])


def inputs_first(shapes: Mapping[str, tuple[int, ...]]) -> frozenset[str]:
    """The matrices that are stored as (in, out), as `transformers`' Conv1D stores them; all others are (out, in).

    Read off their biases, which have an entry for each output. Of a square matrix that says nothing: it is stored as the
    network's others are, if these are all stored as (in, out).

    Arguments:
        shapes: name -> shape of every tensor of a network.

    Example:
        >>> sorted(inputs_first({"fc.weight": (2, 3), "fc.bias": (3,), "out.weight": (3, 3), "out.bias": (3,)}))
        ['fc.weight', 'out.weight']
    """
    matrices = {name: shape for name, shape in shapes.items() if len(shape) == 2 and name.endswith("weight")}
    outputs = {name: shapes.get(name.removesuffix("weight") + "bias") for name in matrices}
    turned = {name for name, shape in matrices.items() if outputs[name] == shape[1:] != shape[:1]}
    plain = {name for name, shape in matrices.items() if outputs[name] == shape[:1] != shape[1:]}
    square = {name for name, shape in matrices.items() if outputs[name] == shape[:1] == shape[1:]}
    return frozenset(turned | (square if turned and not plain else set()))
