"""What an output as a LoRA adapter of the base will hold, from headers: which part of `peft` carries which tensor.

linear, transposed, embedding, kernel    A and B of the layer
bias                                     bias: all
whole                                    modules_to_save: the module with all its tensors
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from adarank.alignment.adapters import output_is_tied
from adarank.alignment.selection import is_embedding, is_table
from adarank.alignment.task_vectors import AlignedCheckpoints
from adarank.errors import RecipeError, itemise
from adarank.io.checkpoint import TensorInfo
from adarank.models.loading import loading

Carrier = Literal["linear", "transposed", "embedding", "kernel", "bias", "whole"]
_LOW_RANK = ("linear", "transposed", "embedding", "kernel")
_KEEP = "Leave them as they are in the base by select: keep, or write a whole model."


@dataclass(frozen=True)
class Slot:
    """What carries a tensor: `how`, and the module that peft knows it by."""

    how: Carrier
    module: str

    @property
    def low_rank(self) -> bool:
        """Whether it is carried as A and B."""
        return self.how in _LOW_RANK


def slots_of(network: AlignedCheckpoints) -> dict[str, Slot]:
    """Every tensor that a merge may change, and those that are saved along with one -> what carries it.

    Raises:
        RecipeError: some tensors no adapter can carry; all are named.
    """
    assert network.base is not None
    names = [name for name in network.merged() if not network.unchanged(name)]
    modules = _modules(network.base.source.config, names)
    slots = {name: _slot(network.tensors[name], modules) for name in names}
    problems = [
        *_tied(network, slots),
        *(f"{n}: no module is around it" for n, s in slots.items() if s.how == "whole" and not s.module),
    ]
    if problems:
        raise RecipeError(itemise("output.lora: an adapter cannot carry every tensor of this merge:", problems, _KEEP))
    saved = sorted({slot.module for slot in slots.values() if slot.how == "whole"}, key=len, reverse=True)
    inside = {name: module for module in saved for name in network.tensors if name.startswith(f"{module}.")}
    return {**slots, **{name: Slot("whole", module) for name, module in inside.items()}}  # by the outermost


def adapter_bytes(network: AlignedCheckpoints, rank: int) -> int:
    """The most that an adapter's weights take, in float32."""
    slots = slots_of(network)
    infos = {name: network.tensors[name] for name in slots}
    sizes = (rank * (i.shape[0] + i.numel // i.shape[0]) if slots[n].low_rank else i.numel for n, i in infos.items())
    return 4 * sum(sizes)


def _tied(network: AlignedCheckpoints, slots: Mapping[str, Slot]) -> list[str]:
    assert network.base is not None
    source = network.base.source
    if not output_is_tied(source.tensors, source.config):
        return []
    why = "the table of the embeddings and of the output layer, which peft adapts apart"
    return [f"{name}: {why}" for name, slot in slots.items() if slot.how == "embedding" and is_table(name)]


def _modules(config: Mapping[str, Any], names: Iterable[str]) -> dict[str, nn.Module] | None:
    """The modules of the base's class in `transformers`, without memory; None where that class is not known, or has other names."""
    import transformers  # imported on use: it is slow

    given = config.get("architectures")
    kind: Any = getattr(transformers, str(given[0]), None) if isinstance(given, list) and given else None
    if kind is None or config.get("model_type") not in transformers.CONFIG_MAPPING:
        return None
    with (
        loading(Path("config.json"), f"no {kind.__name__} can be made", "Check the base's config.json."),
        torch.device("meta"),
    ):
        module: nn.Module = kind(transformers.AutoConfig.for_model(**config))
    held = {*module.state_dict(), *dict(module.named_buffers())}
    return dict(module.named_modules()) if all(name in held for name in names) else None


def _slot(info: TensorInfo, modules: Mapping[str, nn.Module] | None) -> Slot:
    module, _, leaf = info.name.rpartition(".")
    how = _by_name(info, leaf) if modules is None else _by_class(modules[module], leaf)
    return Slot(how, module)


def _by_class(module: nn.Module, leaf: str) -> Carrier:
    layer = type(module).__name__ == "Conv1D" or isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
    if leaf == "bias" and layer:
        return "bias"
    if leaf != "weight":
        return "whole"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return "kernel" if module.groups == 1 else "whole"
    return "whole" if not layer else "linear" if isinstance(module, nn.Linear) else "transposed"


def _by_name(info: TensorInfo, leaf: str) -> Carrier:
    """Where no class tells: a matrix called a weight is one of a linear layer, or an embedding table by its name."""
    if leaf != "weight" or len(info.shape) < 2:
        return "whole"
    return "kernel" if len(info.shape) > 2 else "embedding" if is_embedding(info.name) else "linear"
