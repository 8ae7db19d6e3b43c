"""adarank from Python, without files: state dicts and modules in, state dicts and modules out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adarank.adapt.loop import History, Loss, Progress
from adarank.adapt.loop import adapt as run_adaptation
from adarank.adapt.methods import ADAPTIVE
from adarank.adapt.objective import entropy
from adarank.adapt.settings import AdaptSettings
from adarank.checkpoint import MemorySource
from adarank.errors import DataError, RecipeError
from adarank.evaluate import score
from adarank.masks import MaskFile
from adarank.methods import METHODS, merge_tensors
from adarank.models import share
from adarank.select import Select
from adarank.settings import nearest, parse
from adarank.task_vectors import Network, align

State = Mapping[str, Tensor]
Forward = Callable[[nn.Module, Any], Tensor]
Objective = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Adapted:
    """What `adapt` found.

    Attributes:
        modules: task -> the merged network with that task's head, ready to use. They share memory.
        state: the merged tensors, heads not among them.
        masks: masks and λ; `masks.save(path)` writes the file that the method `masked` applies.
        history: losses and components kept, step by step.
    """

    modules: Mapping[str, nn.Module]
    state: dict[str, Tensor]
    masks: MaskFile
    history: History


def merge(
    base: nn.Module | State | None,
    experts: Mapping[str, nn.Module | State],
    method: str = "cart",
    parameters: Mapping[str, Any] | None = None,
    select: Select | None = None,
) -> dict[str, Tensor]:
    """Merge experts by a data-free method.

    Arguments:
        base: the model that the experts were fine-tuned from (None for methods that need none).
        experts: task -> fine-tuned model.
        method: a name that `adarank methods` lists.
        parameters: the method's settings, such as `{"rank": 0.08, "lambda": 1.0}`.
        select: overrides of what happens to which tensor.

    Returns:
        Tensor name -> merged tensor, in the base's dtypes. Task heads are not in it.

    Raises:
        RecipeError: an unknown method or setting.
        MismatchError: tensors that cannot be paired; all are listed.

    Example:
        merged = adarank.merge(base.state_dict(), {"a": a.state_dict(), "b": b.state_dict()}, "cart", {"rank": 0.1})
    """
    if method not in METHODS:
        hint = " It adapts on data: use adarank.adapt." if method in ADAPTIVE else nearest(method, METHODS)
        raise RecipeError(f"method: '{method}' is no data-free method.{hint}")
    network = _network(base, experts, select)
    chosen = parse(METHODS[method], parameters or {}, f"parameters of '{method}'")
    chosen.check(network)
    return {name: tensor.to(network.tensors[name].dtype) for name, tensor in merge_tensors(chosen, network)}


def adapt(
    base: nn.Module | State,
    experts: Mapping[str, nn.Module],
    batches: Mapping[str, Sequence[Any]],
    method: str = "adarank",
    parameters: Mapping[str, Any] | None = None,
    settings: AdaptSettings | None = None,
    forward: Forward | None = None,
    objective: Objective = entropy,
    select: Select | None = None,
    progress: Progress | None = None,
) -> Adapted:
    """Merge experts by adapting on unlabelled batches. The modules given are copied, not changed.

    Arguments:
        base: the model that the experts were fine-tuned from.
        experts: task -> fine-tuned module with its head.
        batches: task -> its unlabelled batches; step i uses batch i, from the start again when they are used up.
        method: `adarank`, `adamerging` or `cart++`.
        parameters: the method's settings, such as `{"origin": "average", "rank": 0.16, "lambda": 2.0}`.
        settings: steps and step sizes. Its `batch_size` is not used: batches come as they are.
        forward: (module, batch) -> logits of shape (batch, classes). By default the module is called with the
            batch (a mapping as keyword arguments, a tuple as positional ones).
        objective: logits -> scalar to minimise.
        select: overrides of what happens to which tensor, such as `Select(head=("fc.*",))`.
        progress: called after each step.

    Raises:
        DataError: a task has no batches.
        AdaRankError: as for `merge`, and if a loss is not finite.
    """
    if method not in ADAPTIVE:
        raise RecipeError(f"method: '{method}' does not adapt.{nearest(method, ADAPTIVE)}")
    empty = [task for task in experts if not batches.get(task)]
    if empty:
        raise DataError(
            f"batches: none for {', '.join(map(repr, empty))}. Every task needs at least one unlabelled batch."
        )
    chosen = parse(ADAPTIVE[method], parameters or {}, f"parameters of '{method}'")
    settings = settings or AdaptSettings()
    network = _network(base, experts, select)
    models = share(((task, copy.deepcopy(module).float().eval()) for task, module in experts.items()), network)
    models.fill((name, network.kept(name)) for name, choice in network.choices.items() if choice.action == "keep")
    device = next(iter(models.shared.values())).device
    live = chosen.start(network, models.shared, settings, device)
    call = forward or _call

    def loss_of(task: str) -> Loss:
        own = batches[task]
        return lambda step: objective(call(models.modules[task], own[step % len(own)]))

    history = run_adaptation(live, {task: loss_of(task) for task in experts}, settings, progress=progress)
    state = {name: models.shared[name].detach().clone() for name in network.tensors if name in models.shared}
    return Adapted(models.modules, state, live.mask_file(network.tasks, chosen.origin, {}), history)


@torch.no_grad()
def evaluate(
    modules: Mapping[str, nn.Module],
    labelled: Mapping[str, Sequence[tuple[Any, Sequence[int]]]],
    forward: Forward | None = None,
    metric: str = "accuracy",
) -> dict[str, float]:
    """Score each task's module on labelled batches.

    Arguments:
        modules: task -> module, for instance `Adapted.modules`.
        labelled: task -> pairs of (batch, labels).
        forward: as for `adapt`.
        metric: `accuracy` or `matthews`.

    Returns:
        task -> score ×100.
    """
    call = forward or _call
    scores = {}
    for task, pairs in labelled.items():
        found = [
            (call(modules[task], batch).argmax(dim=-1).tolist(), [int(label) for label in labels])
            for batch, labels in pairs
        ]
        scores[task] = score([y for _, own in found for y in own], [p for own, _ in found for p in own], metric)
    return scores


def _network(
    base: nn.Module | State | None, experts: Mapping[str, nn.Module | State], select: Select | None
) -> Network:
    sources = {task: MemorySource(_state(expert), f"expert '{task}'") for task, expert in experts.items()}
    return align(MemorySource(_state(base), "base") if base is not None else None, sources, select, task_heads=True)


def _state(model: nn.Module | State) -> State:
    return model.state_dict() if isinstance(model, nn.Module) else model


def _call(module: nn.Module, batch: Any) -> Tensor:
    if isinstance(batch, Mapping):
        out = module(**batch)
    elif isinstance(batch, (tuple, list)):
        out = module(*batch)
    else:
        out = module(batch)
    logits: Tensor = out if isinstance(out, Tensor) else out.logits
    return logits
