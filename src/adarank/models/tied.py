"""Networks that share their merged weights: one `nn.Module` per task, all over the same leaf tensors.

A family (`models/text.py`, …) knows how to load its models and encode their inputs. What is here knows neither:
it ties the tensors of several modules together by name, and fills them.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from adarank.alignment.task_vectors import Network
from adarank.data.read import Table
from adarank.data.spec import TaskSpec
from adarank.data.task import Batch, Examples
from adarank.errors import CheckpointError, MismatchError, RecipeError, itemise
from adarank.io.checkpoint import Checkpoint


class Family(Protocol):
    """What adarank must know of a kind of model.

    Attributes:
        kind: what recipes call it.
        architectures: what the class names of its models contain, one of these.
        keep_embeddings: embedding tables are kept from the base by default.
        paths: text in an input column is the path of a file that holds the input.
        token_budget: padded tokens (or their like) in one batch when scoring.
        mlps: what the two linear layers of a block's MLP are called in checkpoints, after the block's own name.
        expanded: parameters of shape (1, ...) that networks of the family expand over the batch.
    """

    kind: str
    architectures: tuple[str, ...]
    keep_embeddings: bool
    paths: bool
    token_budget: int
    mlps: tuple[tuple[str, str], ...]
    expanded: tuple[str, ...]

    def auto_class(self) -> Any:
        """The class of `transformers` that finds a model's own class by its configuration."""
        ...

    def complete(
        self, base: Checkpoint | None, experts: Mapping[str, Checkpoint], tasks: Mapping[str, TaskSpec], folder: Path
    ) -> tuple[dict[str, Checkpoint], dict[str, str]]:
        """Experts with all that their tasks' networks hold, and patterns of what stays the base's -> why.

        Arguments:
            tasks: task -> what the recipe says of it.
            folder: where relative paths count from.

        Raises:
            RecipeError: what the recipe says makes no network of this family.
        """
        idle = [f"task '{task}': classes and templates are of zero-shot-image-classification, and this is {self.kind}. Remove them, or give kind."
                for task, spec in tasks.items() if spec.classes or spec.templates]  # fmt: skip
        if idle:
            raise RecipeError(idle[0] if len(idle) == 1 else itemise(f"recipe: {len(idle)} problem(s).", idle))
        return dict(experts), {}

    def load(self, expert: Checkpoint) -> nn.Module:
        """A model with its head, in float32 and evaluation mode."""
        return load_quietly(self.auto_class(), expert.folder)

    def columns(self, spec: TaskSpec) -> list[str]:
        """The input columns that the task needs."""
        ...

    def key(self, value: Any) -> Hashable:
        """What makes two values of an input column the same input."""
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
    heads: dict[str, dict[str, Tensor]] = {}
    for task, module in pairs:
        modules[task] = module
        held = held_tensors(module)
        own = [name for name in network.tensors if name not in network.heads[task]]
        keys = module_keys(network, task, own, module, held)
        own_keys = module_keys(network, task, network.heads[task], module, held)
        heads[task] = {network.experts[task].names[name]: held[key] for name, key in own_keys.items()}
        for name in own:
            key = keys.get(name)
            if key is not None:
                tensor = shared.setdefault(name, held[key])
                for twin in [k for k, t in held.items() if t is held[key]]:  # tied weights stay tied
                    _set(module, twin, tensor)
            elif network.choices[name].action != "keep":
                problems.append(f"{name}: no such tensor in the model of task '{task}' ({type(module).__name__})")
    if problems:
        remedy = (
            "Check config.json beside the weights. Where transformers joins what the files hold apart (mixtures of experts), "
            "merge by a data-free method, with models that have no task."
        )
        raise MismatchError(itemise("Checkpoints and architecture do not fit:", problems, remedy, 20))
    for name, tensor in shared.items():
        tensor.requires_grad_(
            tensor.is_floating_point() and network.choices[name].action != "keep" and isinstance(tensor, nn.Parameter)
        )
    shared_ids = {id(tensor) for tensor in shared.values()}
    for module in modules.values():
        for parameter in module.parameters():
            if id(parameter) not in shared_ids:
                parameter.requires_grad_(False)
    return TaskModels(modules, shared, heads)


def module_keys(
    network: Network, task: str, names: Sequence[str], module: nn.Module, held: Mapping[str, Tensor]
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
    found: dict[str, str] = {}
    lost: dict[str, str] = {}
    for name, own in stored.items():
        renamed = own.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        key = next((key for key in (own, renamed, backbone + name) if key in held), None)
        if key is not None:
            found[name] = key
        elif name in shapes:
            lost[name] = own
    if lost and hasattr(module, "config"):
        loaded = loaded_names(module, {key: shapes[name] for name, key in lost.items()})
        found.update({name: loaded[key] for name, key in lost.items() if key in loaded})
    return found


def held_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Name -> parameter or buffer of a module, every name of a tied one."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    return {**parameters, **dict(module.named_buffers(remove_duplicate=False))}


def loaded_names(module: nn.Module, shapes: Mapping[str, Sequence[int]]) -> dict[str, str]:
    """Name in a checkpoint -> name in the module that `transformers` loads it into.

    Its loader renames tensors of some architectures. To be told how, it is given a checkpoint in which every tensor
    is filled with a number of its own; where these numbers come out is where the tensors went.
    """
    first = 1000  # no constant that fresh weights are filled with
    numbered = dict(enumerate(shapes, first))
    probe = {name: torch.tensor(float(i)).expand(tuple(shapes[name])) for i, name in numbered.items()}
    found: dict[str, str] = {}
    with quiet_transformers(), torch.random.fork_rng():
        loader: Any = type(module)
        tried = loader.from_pretrained(None, config=module.config, state_dict=probe, dtype=torch.float32)
    for key, tensor in tried.state_dict().items():
        number = float(tensor.flatten()[0]) if tensor.is_floating_point() and tensor.numel() else 0.0
        name = numbered.get(int(number)) if math.isfinite(number) else None
        if name and tuple(tensor.shape) == tuple(shapes[name]) and bool((tensor == number).all()):
            found[name] = key
    return found


def _set(module: nn.Module, key: str, tensor: Tensor) -> None:
    path, _, leaf = key.rpartition(".")
    owner = module.get_submodule(path)
    if leaf in owner._parameters:
        owner._parameters[leaf] = tensor  # type: ignore[assignment]
    else:
        owner._buffers[leaf] = tensor


def load_quietly(auto_class: Any, folder: Path) -> nn.Module:
    """A model of `folder` in float32 and evaluation mode, without the loader's own progress bars and notes.

    Raises:
        CheckpointError: the folder's config and weights make no model of this class.
    """
    try:
        with quiet_transformers():
            module: nn.Module = auto_class.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        # TypeError: config.json names no architectures, and the model type has several
        raise CheckpointError(
            f"{folder}: cannot be loaded as {auto_class.__name__} ({str(error).splitlines()[0][:200]}). Check config.json and the weights."
        ) from None
    return module.to(torch.float32).eval()


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no notes on missing heads from its loader."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()
