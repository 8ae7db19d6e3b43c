"""Networks that share their merged weights: one `nn.Module` per task, all over the same leaf tensors.

A family (`models/text.py`, …) knows how to load its models and encode their inputs. What is here knows neither:
it ties the tensors of several modules together by name, and fills them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adarank.alignment.selection import computed
from adarank.alignment.task_vectors import AlignedCheckpoints
from adarank.errors import CheckpointError, MismatchError, itemise
from adarank.models.hollow import release
from adarank.models.loading import loaded_names


@dataclass(frozen=True)
class TaskModels:
    """One module per task over shared tensors.

    Attributes:
        modules: task -> module; each has its own head.
        shared: tensor name (as in the base) -> the parameter or buffer that all modules use.
        heads: task -> the tensors of its head in its module, under the names that the expert's own files use.
    """

    modules: Mapping[str, nn.Module]
    shared: Mapping[str, Tensor]
    heads: Mapping[str, Mapping[str, Tensor]]

    @torch.no_grad()
    def fill(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Write shared tensors in place, by name."""
        for name, value in tensors:
            if name in self.shared:
                self.shared[name].copy_(value)


def share(pairs: Iterable[tuple[str, nn.Module]], network: AlignedCheckpoints, empty: bool = False) -> TaskModels:
    """Tie all tensors of the modules that are not heads, so that writing one writes it for every task.

    Arguments:
        pairs: (task, module). May be lazy: each module's own copies are let go before the next is made.
        empty: shared tensors are hollow, to be held and filled some at a time.

    Raises:
        MismatchError: a tensor of the network is in none of the modules under a name that fits.
    """
    shared: dict[str, Tensor] = {}
    problems: list[str] = []
    modules: dict[str, nn.Module] = {}
    heads: dict[str, dict[str, Tensor]] = {}
    for task, module in pairs:
        modules[task] = module
        held = held_tensors(module)
        body = [name for name in network.tensors if name not in network.heads[task]]
        keys = module_keys(network, task, body, module, held)
        heads[task] = head_tensors(network, task, module)
        for name in body:
            key = keys.get(name)
            kept, shape = network.choices[name].action == "keep", network.tensors[name].shape
            if key is not None and kept and tuple(held[key].shape) != shape:
                if not computed(network.tensors[name]):  # a network computes its own, of the length that it needs
                    problems.append(f"{name}: {shape} is kept from the base, and the model of task '{task}' has {tuple(held[key].shape)}")  # fmt: skip
            elif key is not None:
                tensor = shared.setdefault(name, held[key])
                for twin in [k for k, t in held.items() if t is held[key]]:  # tied weights stay tied
                    _set(module, twin, tensor)
                if empty:
                    release([tensor])
            elif not kept:
                problems.append(f"{name}: no such tensor in the model of task '{task}' ({type(module).__name__})")
    if problems:
        remedy = (
            "Check config.json beside the weights. Where transformers joins what the files hold apart (mixtures of experts), "
            "merge by a data-free method, with models that have no task."
        )
        raise MismatchError(itemise("Checkpoints and architecture do not fit:", problems, remedy, 20))
    for name, tensor in shared.items():
        tensor.requires_grad_(
            tensor.is_floating_point()
            and network.choices[name].action in ("decompose", "scale")
            and isinstance(tensor, nn.Parameter)
        )
    shared_ids = {id(tensor) for tensor in shared.values()}
    for module in modules.values():
        for parameter in module.parameters():
            if id(parameter) not in shared_ids:
                parameter.requires_grad_(False)
    return TaskModels(modules, shared, heads)


def head_tensors(network: AlignedCheckpoints, task: str, module: nn.Module) -> dict[str, Tensor]:
    """The tensors of a task's head in its module, under the names that the expert's own files use."""
    held = held_tensors(module)
    keys = module_keys(network, task, network.heads[task], module, held)
    return {network.experts[task].names[name]: held[key] for name, key in keys.items()}


def module_keys(
    network: AlignedCheckpoints, task: str, names: Sequence[str], module: nn.Module, held: Mapping[str, Tensor]
) -> dict[str, str]:
    """Tensor of the network -> its name in a task's module, for those that it has."""
    member = network.experts[task]
    stored = {name: member.names.get(name, name) for name in names}
    floats = {n: member.info(n).shape for n in names if n in member.names and member.info(n).dtype.is_floating_point}
    return stored_keys(stored, floats, module, held, member.backbone)


def stored_keys(
    stored: Mapping[str, str],
    shapes: Mapping[str, Sequence[int]],
    module: nn.Module,
    held: Mapping[str, Tensor],
    backbone: str = "",
) -> dict[str, str]:
    """Name -> name in a module of the tensor that a checkpoint has under another, for those that the module has.

    Arguments:
        stored: name -> name in the checkpoint.
        shapes: name -> shape, of tensors that the loader may have renamed.
        held: the module's tensors by name.
    """
    keys: dict[str, str] = {}
    lost: dict[str, str] = {}
    for name, stored_name in stored.items():
        renamed = stored_name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        inside = backbone + name
        if (
            backbone and inside in stored
        ):  # another tensor's name: open_clip's CLIP has `transformer` and `visual.transformer`
            inside = name
        key = next((key for key in (stored_name, renamed, inside) if key in held), None)
        if key is not None:
            keys[name] = key
        elif name in shapes:
            lost[name] = stored_name
    if lost and hasattr(module, "config"):
        loaded = loaded_names(module, {key: shapes[name] for name, key in lost.items()})
        keys.update({name: loaded[key] for name, key in lost.items() if key in loaded})
    return keys


def held_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Name -> parameter or buffer of a module, every name of a tied one."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    return {**parameters, **dict(module.named_buffers(remove_duplicate=False))}


def _set(module: nn.Module, key: str, tensor: Tensor) -> None:
    path, _, leaf = key.rpartition(".")
    owner = module.get_submodule(path)
    if leaf in owner._parameters:
        owner._parameters[leaf] = tensor  # type: ignore[assignment]
    else:
        owner._buffers[leaf] = tensor


def refuse_missing(module: nn.Module, missing: Iterable[str], where: str) -> None:
    """Parameters that no file holds are random after loading, and float buffers as a fresh network has them.

    Arguments:
        missing: names that the loader missed; those of integer buffers, which are computed, do no harm.
        where: the checkpoint, for the error.

    Raises:
        CheckpointError: there are such tensors; a few are named.
    """
    learned = {name for name, tensor in held_tensors(module).items() if tensor.is_floating_point()}
    lost = sorted(learned.intersection(missing))
    if not lost:
        return
    named = ", ".join(f"'{name}'" for name in lost[:4]) + (f" and {len(lost) - 4} more" if len(lost) > 4 else "")
    body = getattr(module, "base_model_prefix", "")
    in_body = not hasattr(module, body) or any(name.startswith(f"{body}.") for name in lost)
    headless = "" if in_body else " It has no head."
    raise CheckpointError(
        f"{where}: {type(module).__name__} has {len(lost)} tensor(s) that no file there holds: {named}. They would be "
        f"random.{headless} Give the whole model that was fine-tuned for the task, its head included; to merge it "
        "without a head, leave its task out of the recipe."
    )
