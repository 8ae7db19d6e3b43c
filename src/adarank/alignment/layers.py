"""Which layer of a network a tensor is in, read off its name.

encoder.layer.3.output.dense.weight     layer 3, of encoder.layer: the first number between dots
embeddings.LayerNorm.bias               in no layer, but a part of embeddings
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import takewhile

_NUMBER = re.compile(r"(?:^|\.)(\d+)\.")


def layer_number(name: str) -> int | None:
    """The number of the layer that a tensor is in; None outside of layers. In networks of stages it is the stage's."""
    match = _NUMBER.search(name)
    return int(match.group(1)) if match else None


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
