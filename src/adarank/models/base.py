"""Networks that share their merged weights: one `nn.Module` per task, all over the same leaf tensors.

A family (`models/text.py`, …) knows how to load its models and encode their inputs. What is here knows neither:
it ties the tensors of several modules together by name, and fills them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from adarank.data.read import Table
from adarank.data.spec import TaskSpec
from adarank.data.task import Batch, Examples
from adarank.errors import MismatchError, itemise
from adarank.task_vectors import Network


class Family(Protocol):
    """What adarank must know of a kind of model.

    Attributes:
        kind: what recipes call it.
        keep_embeddings: embedding tables are kept from the base by default.
        token_budget: padded tokens (or their like) in one batch when scoring.
    """

    kind: str
    keep_embeddings: bool
    token_budget: int

    def load(self, folder: Path) -> nn.Module:
        """A model with its head, in float32 and evaluation mode."""
        ...

    def columns(self, spec: TaskSpec) -> list[str]:
        """The input columns that the task needs."""
        ...

    def encode(self, table: Table, spec: TaskSpec, folder: Path) -> tuple[Examples, list[str]]:
        """Encoded inputs, and notes on what was cut."""
        ...

    def logits(self, module: nn.Module, batch: Batch) -> Tensor:
        """(batch, classes) float32 logits."""
        ...


@dataclass(frozen=True)
class TaskModels:
    """One module per task over shared tensors.

    Attributes:
        modules: task -> module; each has its own head.
        shared: tensor name (as in the base) -> the parameter or buffer that all modules use.
    """

    modules: Mapping[str, nn.Module]
    shared: Mapping[str, Tensor]

    @torch.no_grad()
    def fill(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Write shared tensors in place, by name."""
        for name, value in tensors:
            if name in self.shared:
                self.shared[name].copy_(value)


def share(pairs: Iterable[tuple[str, nn.Module]], network: Network) -> TaskModels:
    """Tie all tensors of the modules that are not heads, so that writing one writes it for every task.

    Arguments:
        pairs: (task, module). May be lazy: each module's own copies are let go before the next is made.

    Raises:
        MismatchError: a tensor of the network is in none of the modules under a name that fits.
    """
    shared: dict[str, Tensor] = {}
    problems: list[str] = []
    modules: dict[str, nn.Module] = {}
    for task, module in pairs:
        modules[task] = module
        held = {
            **dict(module.named_parameters(remove_duplicate=False)),
            **dict(module.named_buffers(remove_duplicate=False)),
        }
        for name in network.tensors:
            if name in network.heads[task]:
                continue
            key = module_key(network, task, name, held)
            if key is not None:
                tensor = shared.setdefault(name, held[key])
                for twin in [k for k, t in held.items() if t is held[key]]:  # tied weights stay tied
                    _set(module, twin, tensor)
            elif network.choices[name].action != "keep":
                problems.append(f"{name}: no such tensor in the model of task '{task}' ({type(module).__name__})")
    if problems:
        raise MismatchError(
            itemise("Checkpoints and architecture do not fit:", problems[:20], "Check config.json beside the weights.")
        )
    for name, tensor in shared.items():
        tensor.requires_grad_(
            tensor.is_floating_point() and network.choices[name].action != "keep" and isinstance(tensor, nn.Parameter)
        )
    shared_ids = {id(tensor) for tensor in shared.values()}
    for module in modules.values():
        for parameter in module.parameters():
            if id(parameter) not in shared_ids:
                parameter.requires_grad_(False)
    return TaskModels(modules, shared)


def module_key(network: Network, task: str, name: str, held: Mapping[str, Tensor]) -> str | None:
    """The name that a tensor of the network has in a task's module."""
    stored = network.experts[task].names.get(name, name)
    renamed = stored.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
    candidates = [stored, renamed, network.experts[task].backbone + name]
    return next((key for key in candidates if key in held), None)


def _set(module: nn.Module, key: str, tensor: Tensor) -> None:
    path, _, leaf = key.rpartition(".")
    owner = module.get_submodule(path)
    if leaf in owner._parameters:
        owner._parameters[leaf] = tensor  # type: ignore[assignment]
    else:
        owner._buffers[leaf] = tensor
