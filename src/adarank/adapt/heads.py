"""Heads learned on a merged body that stays as it is: each task's own, towards its expert's predictions, without labels.

    h_t = argmin mean_x KL(expert_t(x) ‖ h(z_t(x))) + pull · ‖h - expert's head‖²        z_t(x): what the head is given

What the head is given is computed once. For a head of one layer the problem is convex; L-BFGS solves it. The pull is the one
with the least divergence on inputs that are held out, or by cross-validation where none are. A task keeps its expert's head
unless the learned one agrees with the expert on more of these inputs, by more than one standard error of that difference:
where a body is almost right, few inputs overfit a wide head.

Heads alone: SyMerge (arXiv:2412.19098) finds that they carry label-free adaptation at many tasks, learned together with λ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from adarank.adapt.objectives import divergences
from adarank.adapt.problem import Chunk, Problem
from adarank.errors import RecipeError
from adarank.models.head_inputs import head_parts

PULLS = (1.0, 1e-1, 1e-2, 1e-3, 1e-4)
FOLDS = 4
Head = Mapping[str, Tensor]
Call = Callable[[Head, Tensor], Tensor]
"""(head, what it is given) -> logits."""


@dataclass(frozen=True)
class HeadFit:
    """What learning one task's head gave. Pairs are of the expert's head and of the learned one, on the judged inputs.

    Attributes:
        kept: the learned head is in use; else the expert's.
        pull: the one chosen.
        agreement: shares of inputs where the expert's class is predicted.
        divergence: mean Kullback-Leibler divergences from the expert's predictions, in nats.
        inputs: how many inputs these rest on; `held_out`: whether the head was learned without them, or by cross-validation.
    """

    kept: bool
    pull: float
    agreement: tuple[float, float]
    divergence: tuple[float, float]
    inputs: int
    held_out: bool


@dataclass(frozen=True)
class HeadExamples:
    """What a head is given, (inputs, width), and its expert's logits, (inputs, classes); in float64."""

    given: Tensor
    expert: Tensor

    def rows(self, chosen: Tensor) -> HeadExamples:
        """Those of some inputs."""
        return HeadExamples(self.given[chosen], self.expert[chosen])


def learn_heads(problem: Problem) -> dict[str, HeadFit]:
    """Learn, in place, the head of every task that `settings.learn_heads` selects; the models' other tensors stay as they are.

    Returns:
        task -> what learning its head gave.

    Raises:
        RecipeError: no part of a network turns one vector per input into logits, and `learn_heads` is true.
    """
    fits = {}
    for task in problem.inputs:
        if problem.learns_head(task):
            fit = _learn_head(problem, task)
            if fit is not None:
                fits[task] = fit
    return fits


def _learn_head(problem: Problem, task: str) -> HeadFit | None:
    models, inputs = problem.models, problem.inputs[task]
    if problem.settings.learn_heads == "auto" and not models.heads[task]:
        return None
    layer = _layer_of(problem, task)
    if layer is None:
        if problem.settings.learn_heads == "auto":
            return None
        raise RecipeError(
            f"task '{task}': its head cannot be learned: no part of it turns one vector per input into the logits. "
            "Set learn_heads: false."
        )
    learned = {id(tensor) for tensor in models.heads[task].values()}
    start = {name: tensor.detach().double() for name, tensor in layer.named_parameters() if id(tensor) in learned}
    rest = {name: tensor.detach().double() for name, tensor in layer.state_dict().items() if tensor.is_floating_point()}

    def call(head: Head, given: Tensor) -> Tensor:
        logits: Tensor = functional_call(layer, {**rest, **head}, (given,))
        return logits

    examples = _examples(problem, task, layer, inputs.adapted_on())
    judged = _examples(problem, task, layer, inputs.judged_on()) if inputs.held_out_from_steps else None
    pull, by_learned, by_expert, expert = (
        _held_out(call, start, examples, judged) if judged is not None else _cross_validated(call, start, examples)
    )
    kept = _agrees_more(by_expert, by_learned, expert)
    if kept:
        head = fit_head(call, start, examples, pull)
        with torch.no_grad():
            for name, tensor in layer.named_parameters():
                if name in head:
                    tensor.copy_(head[name])
    measured = [
        (_agreement(logits, expert), float(divergences(logits, expert).mean())) for logits in (by_expert, by_learned)
    ]
    agreement, divergence = zip(*measured, strict=True)
    return HeadFit(kept, pull, agreement, divergence, len(expert), judged is not None)


def _held_out(
    call: Call, start: Head, examples: HeadExamples, judged: HeadExamples
) -> tuple[float, Tensor, Tensor, Tensor]:
    """The best pull, the logits of judged inputs by that head and by the expert's head, and the expert's logits."""
    logits, head = {}, start
    for pull in PULLS:
        head = fit_head(call, start, examples, pull, head)
        logits[pull] = call(head, judged.given)
    return _best(logits, call(start, judged.given), judged.expert)


def _cross_validated(call: Call, start: Head, examples: HeadExamples) -> tuple[float, Tensor, Tensor, Tensor]:
    """The same, each input's logits by a head that was learned without it. From a single input nothing is learned."""
    fold = torch.arange(len(examples.given)) % FOLDS
    logits = {pull: call(start, examples.given) for pull in PULLS}
    for number in range(min(FOLDS, len(examples.given)) if len(examples.given) > 1 else 0):
        head, left_out = start, fold == number
        for pull in PULLS:
            head = fit_head(call, start, examples.rows(~left_out), pull, head)
            logits[pull][left_out] = call(head, examples.given[left_out])
    return _best(logits, call(start, examples.given), examples.expert)


def _best(logits: Mapping[float, Tensor], by_expert: Tensor, expert: Tensor) -> tuple[float, Tensor, Tensor, Tensor]:
    pull = min(logits, key=lambda each: float(divergences(logits[each], expert).mean()))
    return pull, logits[pull], by_expert, expert


def _agrees_more(by_expert: Tensor, by_learned: Tensor, expert: Tensor) -> bool:
    """True if more inputs were gained than lost, by more than one standard error, √(gained + lost)."""
    before, after = (logits.argmax(dim=-1) == expert.argmax(dim=-1) for logits in (by_expert, by_learned))
    gained, lost = int((after & ~before).sum()), int((before & ~after).sum())
    return gained - lost > math.sqrt(gained + lost)


def _agreement(logits: Tensor, expert: Tensor) -> float:
    return float((logits.argmax(dim=-1) == expert.argmax(dim=-1)).double().mean())


def fit_head(call: Call, start: Head, examples: HeadExamples, pull: float, guess: Head | None = None) -> Head:
    """The head of one pull: the minimum of the mean divergence and `pull` times the squared distance to the expert's head.

    Arguments:
        start: the expert's head.
        guess: where the search begins, such as the head of a larger pull.

    Returns:
        name -> tensor in float64, of the shapes of `start`.
    """
    head = {name: tensor.clone().requires_grad_() for name, tensor in (guess or start).items()}
    optimiser = torch.optim.LBFGS(
        list(head.values()), max_iter=100, tolerance_grad=1e-6, tolerance_change=1e-9, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimiser.zero_grad()
        distance = torch.stack([(tensor - start[name]).square().sum() for name, tensor in head.items()]).sum()
        value = divergences(call(head, examples.given), examples.expert).mean() + pull * distance
        value.backward()
        return value

    with torch.enable_grad():
        optimiser.step(loss)
    return {name: tensor.detach() for name, tensor in head.items()}


def _layer_of(problem: Problem, task: str) -> nn.Module | None:
    """The part of the task's module that holds its head, or the largest part of the head that turns one vector per input into logits."""
    parts = head_parts(problem.models, task)
    _, batch = next(iter(problem.inputs[task].adapted_on()))
    for part in (*_enclosing(problem.models.modules[task], parts), *reversed(parts)):
        if _given(problem, task, part, batch) is not None:
            return part
    return None


def _enclosing(module: nn.Module, parts: list[nn.Module]) -> list[nn.Module]:
    """The smallest part of a module that has all these in it, unless it is the module itself."""
    paths = [name.split(".") for name, part in module.named_modules() if any(part is head_part for head_part in parts)]
    shared = 0
    while all(len(path) > shared and path[shared] == paths[0][shared] for path in paths):
        shared += 1
    return [module.get_submodule(".".join(paths[0][:shared]))] if shared else []


def _examples(problem: Problem, task: str, layer: nn.Module, chunks: Iterable[Chunk]) -> HeadExamples:
    given, expert = [], []
    for where, batch in chunks:
        of_batch = _given(problem, task, layer, batch)
        assert of_batch is not None  # the layer was tried
        given.append(of_batch)
        expert.append(problem.predictions[task].logits[where])
    return HeadExamples(torch.cat(given).double(), torch.cat(expert).to(given[0].device).double())


@torch.no_grad()
def _given(problem: Problem, task: str, part: nn.Module, batch: Any) -> Tensor | None:
    """(inputs, width) of which a part of the module makes the logits; None if it does not.

    Of several positions of an input it is the one whose output the logits are, or the first, if that is enough.
    """
    seen: list[tuple[Any, Any]] = []

    def take(_: nn.Module, arguments: tuple[Any, ...], named: Mapping[str, Any], output: Any) -> None:
        seen.append((next((v for v in (*arguments, *named.values()) if isinstance(v, Tensor)), None), output))

    handle = part.register_forward_hook(take, with_kwargs=True)
    try:
        logits = problem.forward(problem.models.modules[task], batch)
    finally:
        handle.remove()
    if len(seen) != 1:
        return None
    given, output = seen[0]
    if not isinstance(given, Tensor) or not isinstance(output, Tensor):
        return None
    if output.dim() == 3 and given.dim() == 3:  # every position has an output
        place = (output - logits[:, None]).abs().amax(dim=-1).argmin(dim=1)
        given = given[torch.arange(len(given), device=given.device), place]
        output = output[torch.arange(len(output), device=output.device), place]
    if output.shape != logits.shape or not torch.allclose(output.float(), logits, atol=1e-4):
        return None
    if given.dim() == 3:
        given = given[:, :1]
    again = part(given)
    fits = again.shape == logits.shape and torch.allclose(again.float(), logits, atol=1e-4)
    return given if fits and given.dim() in (2, 3) else None
