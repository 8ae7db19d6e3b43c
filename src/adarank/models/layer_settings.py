"""The configuration of a model whose layers come from several: their number, and what it says of single layers.

num_hidden_layers: 7                            (n_layer, num_layers, n_layers)
layer_types: [full, sliding, full, …]           a list with an entry for each layer follows the layers
mlp_only_layers: [0, 3]                         and so does a list of layers' numbers
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from adarank.alignment.layers import DEPTHS, depth
from adarank.models.configurations import with_defaults

_PER_LAYER = re.compile(r"layer|block|attn|attention|mlp")
_NUMBERED = frozenset({"mlp_only_layers", "cross_attention_layers", "moe_layers", "full_attn_idxs"})

Taken = Sequence[tuple[Mapping[str, Any], range]]
"""(a model's configuration, the numbers of its layers), in the output's order."""


def with_layers(config: Mapping[str, Any], taken: Taken) -> dict[str, Any]:
    """A configuration, changed to what the layers of an output are.

    Arguments:
        config: of the model that the output is otherwise configured as.
        taken: where its layers come from.

    Example:
        with_layers({"n_layer": 4}, [({"n_layer": 4}, range(3)), ({"n_layer": 4}, range(1, 4))]) == {"n_layer": 6}
    """
    changed = dict(config)
    changed |= {key: sum(len(layers) for _, layers in taken) for key in DEPTHS if key in config}
    filled = [(_filled(of), layers) for of, layers in taken]
    for key in per_layer(_filled(config)):
        if all(key in per_layer(of) for of, _ in filled):
            changed[key] = [of[key][layer] for of, layers in filled for layer in layers]
    for key in _NUMBERED & config.keys():
        changed[key] = _renumbered([(of.get(key) or [], layers) for of, layers in taken])
    if "attention_types" in config and "attention_layers" in changed:  # GPT-Neo: [[types, how often]]
        changed["attention_types"] = [[changed["attention_layers"], 1]]
    return changed


def differing(sources: Taken) -> list[str]:
    """What configurations say otherwise of layers that are merged with one another, in sentences.

    Arguments:
        sources: the models of one slice, each with as many layers.
    """
    (first, start), *others = [(_filled(of), layers) for of, layers in sources]
    texts = []
    for other, layers in others:
        for key in sorted(per_layer(first) & per_layer(other)):
            pairs = [(first[key][i], other[key][j], i, j) for i, j in zip(start, layers, strict=True)]
            texts += [f"{key} is {a!r} of layer {i} and {b!r} of layer {j}" for a, b, i, j in pairs if a != b][:1]
    return texts


def per_layer(config: Mapping[str, Any]) -> set[str]:
    """The settings of a configuration that are lists with an entry for each layer."""
    count = depth(config)
    return {
        key
        for key, value in config.items()
        if isinstance(value, list) and len(value) == count and _PER_LAYER.search(key) and key not in _NUMBERED
    }


def _filled(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A configuration with the lists that its class makes where a file leaves them out."""
    made = with_defaults(str(config.get("model_type", "")), config)
    return {**{key: value for key, value in (made or {}).items() if isinstance(value, list)}, **config}


def _renumbered(taken: Sequence[tuple[Sequence[int], range]]) -> list[int]:
    numbers, at = [], 0
    for listed, layers in taken:
        numbers += [at + layer - layers.start for layer in layers if layer in listed]
        at += len(layers)
    return numbers
