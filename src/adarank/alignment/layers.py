"""Which layer of a network a tensor is in, read off its name.

encoder.layer.3.output.dense.weight     layer 3, of encoder.layer: the first number between dots
embeddings.LayerNorm.bias               in no layer, but a part of embeddings
"""

from __future__ import annotations

import re
from collections.abc import Sequence
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
