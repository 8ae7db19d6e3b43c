"""adarank from Python, without files: state dicts and modules in, state dicts and modules out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adarank.adapt.base import split_block
from adarank.adapt.batches import BatchInputs, checked_batches
from adarank.adapt.heads import HeadFit
from adarank.adapt.heads import learn_heads as learn_task_heads
from adarank.adapt.history import Adapted, Progress
from adarank.adapt.methods import AdaptiveMethod
from adarank.adapt.problem import Problem, expert_predictions, learns_head
from adarank.adapt.settings import AdaptSettings
from adarank.adapt.weights import adapt_weights
from adarank.alignment.align import align
from adarank.alignment.selection import Select
from adarank.alignment.task_vectors import AlignedCheckpoints
from adarank.calibration.batches import Batches
from adarank.data.labels import known_labels, read_labels
from adarank.data.metrics import chosen_metric, problem_by_labels, score
from adarank.errors import Problems, RecipeError
from adarank.io.bundle import held_parts
from adarank.io.checkpoint import MemorySource, cast, check_any
from adarank.method import Given, MergeMethod
from adarank.models import share
from adarank.models.compatibility import check_modules
from adarank.models.predict import Forward, call_module
from adarank.recipe.registry import METHODS, method_class
from adarank.settings import nearest

State = Mapping[str, Tensor]
Objective = Callable[[Tensor], Tensor] | str | Mapping[str, float]


def merge(
    base: nn.Module | State | None,
    experts: Mapping[str, nn.Module | State],
    method: str | type[MergeMethod] | MergeMethod = "cart",
    parameters: Mapping[str, Any] | None = None,
    select: Select | None = None,
    batches: Mapping[str, Sequence[Any]] | None = None,
    forward: Forward | None = None,
) -> dict[str, Tensor]:
    """Merge experts by a method that does not adapt. docs/methods.md has the source of each.

    Arguments:
        base: the model that the experts were fine-tuned from (None for methods that need none).
        experts: task -> fine-tuned model; modules with their heads for methods that take statistics.
        method: a name that `adarank methods` lists; or your class that derives from
            `adarank.methods.base.Method`, or an instance of one with its settings.
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
    network, chosen = _checked(base, experts, select, method, parameters, "merge")
    result = chosen.run(Batches(network, experts, batches or {}, forward or call_module))
    wider = "Give base and experts in a wider dtype, such as bfloat16."
    device = next(iter(_state(base if base is not None else next(iter(experts.values()))).values())).device
    merged = {}
    for name, tensor in result.in_dtypes({name: (info.shape, info.dtype) for name, info in network.tensors.items()}):
        tensor = cast(tensor, network.tensors[name].dtype, name, wider).to(device)
        merged[name] = (
            tensor.clone() if network.choices[name].action == "keep" else tensor
        )  # never the caller's tensor itself
    return merged


def merge_each(
    base: nn.Module | State | None,
    experts: Mapping[str, nn.Module | State],
    method: str | type[MergeMethod] | MergeMethod = "emr",
    parameters: Mapping[str, Any] | None = None,
    select: Select | None = None,
) -> dict[str, dict[str, Tensor]]:
    """Give each task weights of its own by a task-aware method, as a bundle has them. docs/methods.md has the source of each.

    Arguments:
        base, experts, parameters, select: as for `merge`.
        method: a task-aware method, such as `emr`, `tall_masks`, `tsv_c` or `cart_indexing`; or your class that
            derives from `adarank.methods.task_aware.base.TaskAwareMethod`, or an instance of one.

    Returns:
        task -> tensor name -> tensor of the base's shape and dtype. Task heads are not in it.

    Raises:
        AdaRankError: as for `merge`, and if the method is not task-aware.

    Example:
        base, a, b = (torch.nn.Linear(8, 4) for _ in range(3))
        each = adarank.merge_each(base, {"a": a, "b": b}, "emr")
        a.load_state_dict(each["a"])
    """
    network, chosen = _checked(base, experts, select, method, parameters, "merge_each")
    context = Batches(network, experts, {}, call_module)
    parts = chosen.run(context).parts
    assert parts is not None  # as its class says
    shared, of_tasks = held_parts(network.tasks, parts.pieces)
    layout = context.outline().layout
    return {task: dict(chosen.task_tensors(layout, shared, of_tasks[task])) for task in experts}


def adapt(
    base: nn.Module | State,
    experts: Mapping[str, nn.Module],
    batches: Mapping[str, Sequence[Any]],
    method: str | type[AdaptiveMethod] = "adarank",
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
        method: `adarank`, `adamerging`, `adamerging++` or `cart++`; or your class that derives from
            `adarank.adapt.methods.AdaptiveMethod`.
        parameters: the method's settings, such as `{"origin": "average", "rank": 0.16, "lambda": 2.0}`.
        settings: steps and step sizes, as `AdaptSettings` or a mapping of what an adapt block of a recipe has, such as
            `{"preset": "paper", "steps": 500}`; a preset gives settings of the method, too. `batch_size` is not used:
            batches come as they are.
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
    kind: Any = _kind(method, "adapt")
    batches, held_out = checked_batches(batches, held_out, experts)
    block, preset = _block(settings, objective)
    given = Given(parameters or {}, adapt=block, preset=preset, text=_of_texts(experts))
    chosen: AdaptiveMethod = kind.resolve(given)
    loop = chosen.settings
    if callable(objective) and loop.by == "block":
        raise RecipeError("objective: blocks have an objective of their own. Leave the function out, or use by: model.")
    unknown = [task for task in loop.objectives if task not in experts]
    if unknown:
        raise RecipeError(f"adapt.objectives: unknown task '{unknown[0]}'.{nearest(unknown[0], experts)}")
    network = _network(base, experts, select, kind.decomposes_kernels(given))
    if not network.merged():
        raise RecipeError("select: every tensor is kept or belongs to a head, so nothing is left to merge.")
    models = share(((task, copy.deepcopy(module).float().eval()) for task, module in experts.items()), network)
    function, call = objective if callable(objective) else None, forward or call_module
    heads = {task: function is None and learns_head(loop, task) for task in experts}
    inputs = {task: BatchInputs(batches[task], held_out.get(task, ()), loop, heads[task]) for task in experts}
    predictions = expert_predictions(network, models, inputs, loop, call, function)
    device = next(iter(models.shared.values())).device
    problem = Problem(models, inputs, loop, call, predictions, function)
    with torch.enable_grad():  # whatever the caller has switched off
        learned = adapt_weights(problem, chosen, network, device, progress=progress)
    fits = learn_task_heads(problem)
    state = {name: models.shared[name].detach().clone() for name in network.tensors if name in models.shared}
    return Adapted(models.modules, state, learned.masks, learned.history, fits, learned.origins)


def learn_heads(
    base: nn.Module | State | None,
    experts: Mapping[str, nn.Module],
    merged: State,
    batches: Mapping[str, Sequence[Any]],
    forward: Forward | None = None,
    select: Select | None = None,
    held_out: Mapping[str, Sequence[Any]] | None = None,
) -> tuple[dict[str, nn.Module], dict[str, HeadFit]]:
    """Learn each task's head on a merged body, towards its expert's predictions on unlabelled batches.

    A task keeps its expert's head unless the learned one agrees with the expert on clearly more inputs.

    Arguments:
        base, experts, select: what was merged, as for `merge`; experts as modules. They are copied.
        merged: tensor name -> merged tensor, as `merge` gives them.
        batches: task -> its unlabelled batches. All are used.
        forward: as for `adapt`.
        held_out: task -> batches that decide between heads; by cross-validation on `batches` where a task has none.

    Returns:
        task -> the merged network with that task's head (they share the body's memory); task -> what learning its head gave.

    Raises:
        DataError: a task has no batches.
        RecipeError: a task's head cannot be learned.

    Example:
        base, a, b = (torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU()) for _ in range(3))
        for model in (base, a, b):
            model.add_module("classifier", torch.nn.Linear(16, 4))
        experts, batches = {"a": a, "b": b}, {task: [torch.randn(16, 8) for _ in range(4)] for task in "ab"}
        modules, heads = adarank.learn_heads(base, experts, adarank.merge(base, experts, "average"), batches)
    """
    batches, held_out = checked_batches(batches, held_out, experts)
    network, call = _network(base, experts, select), forward or call_module
    loop = AdaptSettings(learn_heads=True)
    models = share(((task, copy.deepcopy(module).float().eval()) for task, module in experts.items()), network)
    inputs = {task: BatchInputs(batches[task], held_out.get(task, ()), loop, learns_head=True) for task in experts}
    predictions = expert_predictions(network, models, inputs, loop, call)
    models.fill(merged.items())
    heads = learn_task_heads(Problem(models, inputs, loop, call, predictions))
    return dict(models.modules), heads


def _of_texts(experts: Mapping[str, nn.Module]) -> bool:
    """True if the experts are networks of transformers that are given tokens."""
    return any(getattr(expert, "main_input_name", None) == "input_ids" for expert in experts.values())


def _block(
    settings: AdaptSettings | Mapping[str, Any] | None, objective: Objective | None
) -> tuple[dict[str, Any], str | None]:
    """The loop's settings as they were given, with the objective given beside them, and the preset."""
    if isinstance(settings, AdaptSettings):
        settings = settings.model_dump(exclude_unset=True)
    values, preset = split_block(settings or {}, "settings")
    if isinstance(objective, (str, Mapping)):
        values |= {"objective": objective, "objectives": {}}
    return values, preset


@torch.no_grad()
def evaluate(
    modules: Mapping[str, nn.Module],
    labelled: Mapping[str, Sequence[tuple[Any, Sequence[Any]]]],
    forward: Forward | None = None,
    metric: str | Mapping[str, str] | None = None,
) -> dict[str, float]:
    """Score each task's module on labelled batches.

    Arguments:
        modules: task -> module, for instance `Adapted.modules`.
        labelled: task -> pairs of (batch, labels), as many labels as the batch has inputs: class numbers; lists of all
            classes that an input has; numbers, where the module has one output.
        forward: as for `adapt`: (module, batch) -> logits of shape (batch, classes).
        metric: of all tasks, or {task: metric}. Of one class an input `accuracy` (the default), `f1`, `macro_f1`, `matthews`;
            of several `micro_f1` (the default), `macro_f1`, `exact_match`; of numbers `pearson` (the default), `spearman`; of any
            `loss`, as transformers trains by.

    Returns:
        task -> score in per cent, as scikit-learn and SciPy compute it; a loss as it is, so that less is better.

    Raises:
        DataError: a module gives something other than logits of shape (batch, outputs), or the metric is not for such labels.

    Example:
        module, inputs = torch.nn.Linear(8, 4), torch.randn(16, 8)
        scores = adarank.evaluate({"a": module}, {"a": [(inputs, [0, 1, 2, 3] * 4)]})
    """
    call = forward or call_module
    scores = {}
    for task, pairs in labelled.items():
        given = [label.tolist() if isinstance(label, Tensor) else label for _, of_batch in pairs for label in of_batch]
        logits = torch.cat([call(modules[task], batch).float().cpu() for batch, _ in pairs])
        problem, outputs = problem_by_labels(given, logits.shape[1]), logits.shape[1]
        wanted = metric.get(task) if isinstance(metric, Mapping) else metric
        chosen = chosen_metric(wanted, problem, outputs, f"task '{task}'")
        labels = read_labels(given, {"problem_type": problem, "num_labels": outputs}, task)
        scores[task] = score(known_labels(labels, task, "Take them out."), logits, chosen, problem)
    return scores


def _checked(
    base: nn.Module | State | None,
    experts: Mapping[str, nn.Module | State],
    select: Select | None,
    method: str | type[MergeMethod] | MergeMethod,
    parameters: Mapping[str, Any] | None,
    function: str,
) -> tuple[AlignedCheckpoints, MergeMethod]:
    """Models and method, each checked by itself, then against each other: what is wrong with either comes at once."""
    problems, network = Problems(), None
    with problems.noted():
        network = _network(base, experts, select, _kernels(method, parameters))
    with problems.noted():
        chosen = _method(list(experts), network.merged() if network else (), method, parameters, function)
    problems.refuse()
    assert network is not None
    chosen.check(network)
    return network, chosen


def _method(
    tasks: Sequence[str],
    names: Sequence[str],
    method: str | type[MergeMethod] | MergeMethod,
    parameters: Mapping[str, Any] | None,
    function: str,
) -> MergeMethod:
    """A method with its settings.

    Arguments:
        function: the one that was called.
    """
    chosen = method if isinstance(method, MergeMethod) else None
    kind = _kind(type(method) if isinstance(method, MergeMethod) else method, function)
    if chosen is not None and parameters:
        raise RecipeError(f"parameters: '{kind.name}' was given with its settings. Give its class, or no parameters.")
    if chosen is None:
        models: dict[str, dict[str, Any]] = {task: {} for task in tasks}
        chosen = kind.resolve(Given(parameters or {}, models, names=names, find=METHODS.named))
    return chosen


def _kind(method: str | type[MergeMethod], function: str) -> type[MergeMethod]:
    """A method's class, if the function that was called runs such methods."""
    kind = method_class(method)
    runs, remedy = kind.python
    if runs != function:
        raise RecipeError(f"method: '{kind.name}' {remedy}")
    return kind


def _kernels(
    method: str | type[MergeMethod] | MergeMethod, parameters: Mapping[str, Any] | None
) -> bool | Collection[str]:
    """Which kernels of convolutions the method decomposes by default; none of a method that is refused later."""
    if isinstance(method, MergeMethod):
        return method.decomposes_kernels(Given(dict(method)))
    with Problems().noted():
        return method_class(method).decomposes_kernels(Given(parameters or {}))
    return False


def _network(
    base: nn.Module | State | None,
    experts: Mapping[str, nn.Module | State],
    select: Select | None,
    kernels: bool | Collection[str] = False,
) -> AlignedCheckpoints:
    sources = {task: MemorySource(_state(expert), f"expert '{task}'") for task, expert in experts.items()}
    problems = Problems()
    for source in sources.values():
        with problems.noted():
            check_any(source)
    problems.refuse()
    start = MemorySource(_state(base), "base") if base is not None else None
    network = align(start, sources, select, task_heads=True, kernels=kernels)
    check_modules(network, base, experts)
    return network


def _state(model: nn.Module | State) -> State:
    return model.state_dict() if isinstance(model, nn.Module) else model
