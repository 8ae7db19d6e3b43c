"""adarank from Python, without files: state dicts and modules in, state dicts and modules out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adarank.adapt.history import Adapted, Progress
from adarank.adapt.learner import Loss, Memory
from adarank.adapt.loop import adapt as run_adaptation
from adarank.adapt.methods import ADAPTIVE
from adarank.adapt.multitask import Multitask
from adarank.adapt.objectives import NEED_EXPERT, NEED_FEATURES, NEED_MEAN, View, running_mean
from adarank.adapt.objectives import objective as combined
from adarank.adapt.problem import Asked
from adarank.adapt.settings import AdaptSettings
from adarank.alignment.align import align
from adarank.alignment.selection import Select
from adarank.alignment.task_vectors import Network
from adarank.calibration.gather import Gatherer, Sample, Store
from adarank.errors import DataError, RecipeError, itemise
from adarank.io.checkpoint import MemorySource, cast
from adarank.methods import METHODS, Informed, Method, merge_tensors
from adarank.methods.per_tensor import resolve
from adarank.methods.task_aware.base import Taskwise, in_memory, rebuilt, sites_of
from adarank.models import share
from adarank.models.predict import Forward
from adarank.modular import MODULAR
from adarank.settings import nearest, parse
from adarank.workflow.scores import score

State = Mapping[str, Tensor]
Objective = Callable[[Tensor], Tensor] | str | Mapping[str, float]


def merge(
    base: nn.Module | State | None,
    experts: Mapping[str, nn.Module | State],
    method: str = "cart",
    parameters: Mapping[str, Any] | None = None,
    select: Select | None = None,
    batches: Mapping[str, Sequence[Any]] | None = None,
    forward: Forward | None = None,
) -> dict[str, Tensor]:
    """Merge experts by a method that does not adapt. docs/methods.md has the source of each.

    Arguments:
        base: the model that the experts were fine-tuned from (None for methods that need none).
        experts: task -> fine-tuned model; modules with their heads for methods that take statistics.
        method: a name that `adarank methods` lists.
        parameters: the method's settings, such as `{"rank": 0.08, "lambda": 1.0}`. Those that a recipe gives per
            model are one value for all or {task: value}.
        select: overrides of what happens to which tensor.
        batches: task -> its unlabelled batches, for `fisher`, `regmean` and `regmean++`; pairs of (batch, labels) for
            `fisher` of kind `empirical`. All are used, as they come: `examples` and `batch_size` are for recipes. Of
            batches that are mappings, `attention_mask` tells `regmean` what is padding.
        forward: as for `adapt`.

    Returns:
        Tensor name -> merged tensor of the base's shape and dtype. Task heads are not in it.

    Raises:
        RecipeError: an unknown method or setting.
        DataError: the method takes statistics, and a task has no batches or none that it can use.
        MismatchError: tensors that cannot be paired; all are listed.
        OutputError: a merged value is beyond what the dtype can hold.

    Example:
        base, a, b = (torch.nn.Linear(8, 4) for _ in range(3))
        merged = adarank.merge(base, {"a": a, "b": b}, "cart", {"rank": 0.5})
        base.load_state_dict(merged)

        batches = {task: [torch.randn(16, 8)] for task in "ab"}  # unlabelled: a calibrated method needs inputs
        merged = adarank.merge(None, {"a": a, "b": b}, "regmean", batches=batches)
    """
    network = _network(base, experts, select)
    chosen = _method(network, method, parameters)
    if isinstance(chosen, Informed):
        chosen = _informed(chosen, network, experts, batches or {}, forward or _call)
    wider = "Give base and experts in a wider dtype, such as bfloat16."
    device = next(iter(_state(base if base is not None else next(iter(experts.values()))).values())).device
    merged = {}
    for name, tensor in merge_tensors(chosen, network):
        found = cast(tensor, network.tensors[name].dtype, name, wider).to(device)
        merged[name] = found.clone() if network.choices[name].action == "keep" else found  # not the caller's own
    return merged


def merge_each(
    base: nn.Module | State | None,
    experts: Mapping[str, nn.Module | State],
    method: str = "emr",
    parameters: Mapping[str, Any] | None = None,
    select: Select | None = None,
) -> dict[str, dict[str, Tensor]]:
    """Give each task weights of its own by a task-aware method, as a bundle has them. docs/methods.md has the source of each.

    Arguments:
        base, experts, parameters, select: as for `merge`.
        method: a task-aware method, such as `emr`, `tall_masks`, `tsv_c` or `cart_indexing`.

    Returns:
        task -> tensor name -> tensor of the base's shape and dtype. Task heads are not in it.

    Raises:
        AdaRankError: as for `merge`, and if the method is not task-aware.

    Example:
        base, a, b = (torch.nn.Linear(8, 4) for _ in range(3))
        each = adarank.merge_each(base, {"a": a, "b": b}, "emr")
        a.load_state_dict(each["a"])
    """
    network = _network(base, experts, select)
    chosen = _method(network, method, parameters)
    if not isinstance(chosen, Taskwise):
        raise RecipeError(f"method: '{method}' gives one model for all tasks. Use adarank.merge.")
    sites = sites_of(network)
    shared, own = in_memory(chosen, network, sites)
    layout = {site.name: (site.shape, site.dtype) for site in sites}
    return {task: dict(rebuilt(type(chosen), layout, shared, own[task])) for task in experts}


def adapt(
    base: nn.Module | State,
    experts: Mapping[str, nn.Module],
    batches: Mapping[str, Sequence[Any]],
    method: str = "adarank",
    parameters: Mapping[str, Any] | None = None,
    settings: AdaptSettings | Mapping[str, Any] | None = None,
    forward: Forward | None = None,
    objective: Objective | None = None,
    select: Select | None = None,
    progress: Progress | None = None,
    held_out: Mapping[str, Sequence[Any]] | None = None,
) -> Adapted:
    """Merge experts by adapting on unlabelled batches. The modules given are copied, not changed.

    Source: AdaRank is of Lee et al. 2025, arXiv:2503.22178; AdaMerging of Yang et al. 2024, arXiv:2310.02575.

    Arguments:
        base: the model that the experts were fine-tuned from.
        experts: task -> fine-tuned module with its head.
        batches: task -> its unlabelled batches; step i uses batch i, from the start again when they are used up.
        method: `adarank`, `adamerging`, `adamerging++` or `cart++`.
        parameters: the method's settings, such as `{"origin": "average", "rank": 0.16, "lambda": 2.0}`.
        settings: steps and step sizes, as `AdaptSettings` or a mapping of its fields. Its `batch_size` is not used: batches come as they are.
        forward: (module, batch) -> logits of shape (batch, classes). By default the module is called with the
            batch (a mapping as keyword arguments, a tuple as positional ones).
        objective: what every task minimises instead of what `settings` say (`self-label` unless they say otherwise): a
            name, weights of several, or a function logits -> scalar.
        select: overrides of what happens to which tensor, such as `Select(head=("fc.*",))`.
        progress: called after each step.
        held_out: task -> unlabelled batches to judge steps on; `batches` where a task has none. With `keep="best"` in
            the settings, which is the default, the step kept is the one nearest to the experts on these.

    Returns:
        Modules and merged tensors in float32, masks with λ, and the history of the steps.

    Raises:
        DataError: a task has no batches.
        AdaRankError: as for `merge`, and if a loss is not finite.

    Example:
        base, a, b = (torch.nn.Linear(8, 4) for _ in range(3))
        batches = {task: [torch.randn(16, 8) for _ in range(4)] for task in "ab"}
        adapted = adarank.adapt(base, {"a": a, "b": b}, batches, settings={"steps": 5})
        logits = adapted.modules["a"](batches["a"][0])  # (16, 4)
    """
    if method not in ADAPTIVE:
        raise RecipeError(f"method: '{method}' does not adapt.{_elsewhere(method) or nearest(method, ADAPTIVE)}")
    batches, held_out = _listed("batches", batches, experts), _listed("held_out", held_out or {}, experts)
    empty = [task for task in experts if not batches.get(task)]
    if empty:
        raise DataError(
            f"batches: none for {', '.join(map(repr, empty))}. Every task needs at least one unlabelled batch."
        )
    chosen = parse(ADAPTIVE[method], parameters or {}, f"parameters of '{method}'")
    settings = settings if isinstance(settings, AdaptSettings) else parse(AdaptSettings, settings or {}, "settings")
    settings, own_objective = _settled(settings, objective, experts)
    network = _network(base, experts, select)
    call = forward or _call
    if not network.merged():
        raise RecipeError("select: every tensor is kept or belongs to a head, so nothing is left to merge.")
    asked = Asked(call, batches, held_out, settings, own_objective is None)
    models = share(((task, asked.expert(task, module)) for task, module in experts.items()), network)
    models.fill((name, network.kept(name)) for name, choice in network.choices.items() if choice.action == "keep")
    device = next(iter(models.shared.values())).device
    live = chosen.start(network, models.shared, settings, device)
    memory: Memory = {}

    def loss_of(task: str) -> Loss:
        own = batches[task]
        weights = settings.weights(task)

        def loss(step: int) -> Tensor:
            logits = call(models.modules[task], own[step % len(own)])
            if own_objective is not None:
                return own_objective(logits)
            if NEED_MEAN & weights.keys():
                memory[task] = running_mean(logits, memory.get(task), settings.momentum)
            expert = asked.targets[task][step % len(own)].to(logits) if NEED_EXPERT & weights.keys() else None
            return combined(View(logits, expert, memory.get(task)), weights, settings.self_label, settings.filter)

        return loss

    losses = {task: loss_of(task) for task in experts}
    judge = asked.judge(models.modules)
    one_pass = min(len(batches[task]) for task in experts)
    with torch.enable_grad():  # whatever the caller has switched off
        history = run_adaptation(
            live, losses, settings, progress=progress, judge=judge, memory=memory, grid=chosen.grid, one_pass=one_pass
        )
    live.zero_grad()
    state = {name: models.shared[name].detach().clone() for name in network.tensors if name in models.shared}
    return Adapted(models.modules, state, live.mask_file(network.tasks, chosen.origin, {}), history)


def _listed(what: str, given: Mapping[str, Any], experts: Mapping[str, Any]) -> dict[str, Sequence[Any]]:
    """task -> list of batches, from lists, loaders or generators. All problems at once."""
    problems = [f"'{task}' is no expert.{nearest(task, experts)}" for task in given if task not in experts]
    problems += [
        f"of '{task}' there is one {type(own).__name__}. Give each task a list of batches."
        for task, own in given.items()
        if isinstance(own, (Tensor, Mapping, str)) or not isinstance(own, Iterable)
    ]
    if problems:
        raise DataError(f"{what}: {problems[0]}" if len(problems) == 1 else itemise(f"{what}:", problems))
    return {task: own if isinstance(own, (list, tuple)) else list(own) for task, own in given.items()}


def _settled(
    settings: AdaptSettings, objective: Objective | None, experts: Mapping[str, Any]
) -> tuple[AdaptSettings, Callable[[Tensor], Tensor] | None]:
    """The settings with the objective given beside them, and the objective itself if it is a function."""
    function = objective if callable(objective) else None
    if isinstance(objective, (str, Mapping)):
        given = {**settings.model_dump(exclude_unset=True), "objective": objective, "objectives": {}}
        settings = parse(AdaptSettings, given, "adapt")
    strangers = [task for task in settings.objectives if task not in experts]
    if strangers:
        raise RecipeError(f"adapt.objectives: unknown task '{strangers[0]}'.{nearest(strangers[0], experts)}")
    if function is None and any(NEED_FEATURES & settings.weights(task).keys() for task in experts):
        raise RecipeError(
            "adapt: objective 'features' is for recipes. Use self-label, or give a function of the logits."
        )
    return settings, function


def _informed(
    method: Informed,
    network: Network,
    experts: Mapping[str, nn.Module | State],
    batches: Mapping[str, Sequence[Any]],
    call: Forward,
) -> Informed:
    """The method with statistics of copies of the experts on the batches given."""
    problems = [
        f"experts: '{task}' is no module, and '{method.name}' runs it."
        for task, expert in experts.items()
        if not isinstance(expert, nn.Module)
    ]
    problems += [f"batches: none for '{task}', and '{method.name}' takes statistics of {method.data}." for task in experts
                 if not batches.get(task)]  # fmt: skip
    if method.reads_labels:
        problems += [f"batches: one of '{task}' is no pair of (batch, labels), and labels are to be read." for task, own in batches.items()
                     if not all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in own)]  # fmt: skip
    if problems:
        raise DataError(itemise("The experts cannot be measured.", problems))
    copies = ((task, copy.deepcopy(own).float().eval()) for task, own in experts.items() if isinstance(own, nn.Module))
    models = share(copies, network)
    models.fill((name, network.kept(name)) for name, choice in network.choices.items() if choice.action == "keep")
    return Gatherer(network, models, _sample(batches, call, method.reads_labels), Store()).inform(method)


def _sample(batches: Mapping[str, Sequence[Any]], call: Forward, labelled: bool) -> Sample:
    """The batches given, as what statistics are taken of; `labelled`: they are pairs of (batch, labels)."""

    def whole(task: str) -> Iterator[Any]:
        return (own[0] if labelled else own for own in batches[task])

    def singles(task: str) -> Iterator[tuple[Any, int | None]]:
        for own in batches[task]:
            batch, labels = own if labelled else (own, None)
            for number, single in enumerate(_singles(batch)):
                yield single, None if labels is None else int(labels[number])

    return Sample(call, whole, singles)


def _singles(batch: Any) -> Iterator[Any]:
    """A batch's inputs one by one: every tensor in it is cut along its first axis."""
    if isinstance(batch, Tensor):
        yield from batch.split(1)
        return
    named = isinstance(batch, Mapping)
    items = list(batch.items() if named else enumerate(batch) if isinstance(batch, (tuple, list)) else ())
    cut = {key: value.split(1) for key, value in items if isinstance(value, Tensor) and value.dim()}
    if not cut:
        raise DataError(
            f"batches: Fisher information is of single inputs, and a {type(batch).__name__} cannot be cut into them. Give tensors, or tuples or mappings of them."
        )
    for number in range(len(next(iter(cut.values())))):
        single = {key: cut[key][number] if key in cut else value for key, value in items}
        yield single if named else tuple(single.values())


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
        labelled: task -> pairs of (batch, labels); labels are class numbers, as many as the batch has inputs.
        forward: as for `adapt`: (module, batch) -> logits of shape (batch, classes).
        metric: `accuracy` or `matthews`, Matthews' correlation coefficient, as scikit-learn computes them.

    Returns:
        task -> score ×100.

    Raises:
        DataError: a module gives something other than logits of shape (batch, classes).

    Example:
        module, inputs = torch.nn.Linear(8, 4), torch.randn(16, 8)
        scores = adarank.evaluate({"a": module}, {"a": [(inputs, [0, 1, 2, 3] * 4)]})
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


def _method(network: Network, method: str, parameters: Mapping[str, Any] | None) -> Method:
    """A data-free method with its settings, checked against the network."""
    if method not in METHODS:
        hint = _elsewhere(method) or nearest(method, METHODS)
        raise RecipeError(f"method: '{method}' is none that merges without adapting.{hint}")
    values = resolve(METHODS[method], parameters or {}, {task: {} for task in network.tasks}, network.merged())
    chosen = parse(METHODS[method], values, f"parameters of '{method}'")
    chosen.check(network)
    return chosen


def _elsewhere(method: str) -> str:
    """Where a known method is to be had, after a blank; nothing for an unknown one."""
    if method in ADAPTIVE:
        return " It adapts on data: use adarank.adapt."
    if method in METHODS:
        return f" Use adarank.{'merge_each' if issubclass(METHODS[method], Taskwise) else 'merge'}."
    if method in MODULAR:
        return " It trains modules: give it as a recipe to adarank.merge_recipe, and load its bundle with adarank.from_bundle."
    return " It trains on labels: give it as a recipe to adarank.merge_recipe." if method == Multitask.name else ""


def _network(
    base: nn.Module | State | None, experts: Mapping[str, nn.Module | State], select: Select | None
) -> Network:
    sources = {task: MemorySource(_state(expert), f"expert '{task}'") for task, expert in experts.items()}
    return align(MemorySource(_state(base), "base") if base is not None else None, sources, select, task_heads=True)


def _state(model: nn.Module | State) -> State:
    return model.state_dict() if isinstance(model, nn.Module) else model


def _call(module: nn.Module, batch: Any) -> Tensor:
    dtype = next((own.dtype for own in module.parameters() if own.is_floating_point()), torch.float32)

    def fitting(value: Any) -> Any:  # adaptation is in float32, whatever the dtype that inputs came in
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    if isinstance(batch, Mapping):
        out = module(**{key: fitting(value) for key, value in batch.items()})
    elif isinstance(batch, (tuple, list)):
        out = module(*map(fitting, batch))
    else:
        out = module(fitting(batch))
    if isinstance(out, Mapping) and "logits" in out:  # as outputs of transformers are, too
        out = out["logits"]
    logits = out[0] if isinstance(out, (tuple, list)) else getattr(out, "logits", out)
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        got = f"a tensor {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise DataError(
            f"A module gave {got} where logits (batch, classes) were needed. Give `forward`, a function of module and batch."
        )
    return logits
