"""Heads learned on a merged body that stays as it is: each task's own, towards its expert's predictions, without labels.

    h_t = argmin mean_x KL(expert_t(x) ‖ h(z_t(x))) + pull · ‖h - expert's head‖²        z_t(x): what the head is given

What the head is given is computed once. Of a head of one layer the problem is convex; L-BFGS solves it. Of a head of several
layers all are learned, from the expert's head on, or the last alone. Which of both, and the pull, is what gives the least
divergence on inputs that are held out, or by cross-validation where none are: pulls are tried from the strongest on, each from
the head of the one before, until the divergence rises. A task keeps its expert's head unless the learned one
diverges less on these inputs, by more than one standard error of the differences, and agrees with the expert on no fewer, up to
one standard error: where a body is almost right, few inputs overfit a wide head.

Heads alone: SyMerge (arXiv:2412.19098) finds that they carry label-free adaptation at many tasks, learned together with λ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from adarank.adapt.head_functions import Call, Head, HeadExamples, HeadFunction, Learnable, learnable
from adarank.adapt.objectives import divergences
from adarank.adapt.problem import Problem
from adarank.errors import RecipeError

PULLS = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
FOLDS = 4


@dataclass(frozen=True)
class HeadFit:
    """What learning one task's head gave. Pairs are of the expert's head and of the learned one, on the judged inputs.

    Attributes:
        kept: the learned head is in use; else the expert's.
        pull: the one chosen.
        layers: how many layers of the head were learned: the last alone, or all.
        agreement: shares of inputs where the expert's class is predicted.
        divergence: mean Kullback-Leibler divergences from the expert's predictions, in nats.
        inputs: how many inputs these rest on; `held_out`: whether the head was learned without them, or by cross-validation.
    """

    kept: bool
    pull: float
    layers: int
    agreement: tuple[float, float]
    divergence: tuple[float, float]
    inputs: int
    held_out: bool


def learn_heads(problem: Problem, fill: Callable[[str], None] = lambda task: None) -> dict[str, HeadFit]:
    """Learn, in place, the head of every task that `settings.learn_heads` selects; the models' other tensors stay as they are.

    Arguments:
        fill: gives the models the body of a task, where each task has another. Called before a task's turn.

    Returns:
        task -> what learning its head gave.

    Raises:
        RecipeError: no part of a network turns one vector per input into logits, and `learn_heads` is true.
    """
    fits = {}
    for task in filter(problem.learns_head, problem.inputs):
        fill(task)
        fit = _learn_head(problem, task)
        if fit is not None:
            fits[task] = fit
    return fits


def _learn_head(problem: Problem, task: str) -> HeadFit | None:
    auto = problem.settings.learn_heads == "auto"
    if auto and not problem.models.heads[task]:
        return None
    functions = learnable(problem, task)
    if functions:
        return _learned(functions)
    if auto:
        return None
    raise RecipeError(
        f"task '{task}': its head cannot be learned: no part of it turns one vector per input into the logits. "
        "Set learn_heads: false."
    )


def _learned(functions: list[Learnable]) -> HeadFit:
    """Choose among the functions, and put what is kept into the network."""
    tried = [_tried(each) for each in functions]
    best = min(tried, key=lambda each: each.divergence)
    with torch.no_grad():
        by_expert = best.function.call()(best.function.start(), best.judged.given)
    kept = _is_nearer(by_expert, best.logits, best.judged.expert)
    if kept:
        best.function.write(best.head())
    agreement = (_agreement(by_expert, best.judged.expert), _agreement(best.logits, best.judged.expert))
    divergence = (mean_divergence(by_expert, best.judged.expert), best.divergence)
    held_out = functions[0].judged is not None
    return HeadFit(kept, best.pull, best.function.layers, agreement, divergence, len(by_expert), held_out)


@dataclass(frozen=True)
class _Tried:
    """The best pull of a function.

    Attributes:
        judged: the inputs that decide; `logits`: of these, by heads that were learned without them.
        head: gives the head learned from all that it may be learned from.
    """

    function: HeadFunction
    pull: float
    judged: HeadExamples
    logits: Tensor
    divergence: float
    head: Callable[[], Head]


def _tried(given: Learnable) -> _Tried:
    """Try pulls, the strongest first, until the divergence rises."""
    call, start = given.function.call(), given.function.start()
    judged = given.judged or given.examples
    fit = _held_out if given.judged is not None else _cross_validated
    best: _Tried | None = None
    for pull, logits, head in fit(call, start, given.examples, judged):
        divergence = mean_divergence(logits, judged.expert)
        if best is not None and not divergence <= best.divergence:
            break
        best = _Tried(given.function, pull, judged, logits, divergence, head)
    assert best is not None  # there are pulls
    return best


Path = Iterator[tuple[float, Tensor, Callable[[], Head]]]
"""(pull, logits of the judged inputs, what gives the head), a pull at a time."""


def _held_out(call: Call, start: Head, examples: HeadExamples, judged: HeadExamples) -> Path:
    """What is held out decides; then the head is learned from it, too: the body was not adapted on it, and more inputs teach more."""
    head, every = start, examples.joined(judged)
    for pull in PULLS:
        head = fit_head(call, start, examples, pull, head)
        yield pull, call(head, judged.given), partial(fit_head, call, start, every, pull, head)


def _cross_validated(call: Call, start: Head, examples: HeadExamples, judged: HeadExamples) -> Path:
    """Each input's logits are by a head that was learned without it. One input alone teaches nothing."""
    fold = torch.arange(len(examples.given)) % FOLDS
    folds = [fold == number for number in range(min(FOLDS, len(fold)))] if len(fold) > 1 else []
    heads = [start] * len(folds)
    for pull in PULLS:
        logits = call(start, judged.given)
        for number, left_out in enumerate(folds):
            heads[number] = fit_head(call, start, examples.rows(~left_out), pull, heads[number])
            logits[left_out] = call(heads[number], judged.given[left_out])
        yield pull, logits, partial(fit_head, call, start, examples, pull)


def mean_divergence(logits: Tensor, expert: Tensor) -> float:
    """Mean Kullback-Leibler divergence from the expert's predictions, in nats."""
    return float(divergences(logits, expert).mean())


def _is_nearer(by_expert: Tensor, by_learned: Tensor, expert: Tensor) -> bool:
    """True if the learned head diverges less, and does not agree on fewer inputs; both by paired tests of one standard error.

    Agreement alone would miss most of what is gained: where it rises from 0.84 to 0.85 of 256 inputs, that is within chance,
    while the divergence, which every input has a part in, may have fallen by two standard errors.
    """
    less = divergences(by_expert, expert) - divergences(by_learned, expert)
    nearer = less.mean() > less.std(correction=0) / math.sqrt(len(less))
    before, after = (logits.argmax(dim=-1) == expert.argmax(dim=-1) for logits in (by_expert, by_learned))
    gained, lost = int((after & ~before).sum()), int((before & ~after).sum())
    return bool(nearer) and lost - gained <= math.sqrt(gained + lost)


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
    # a short memory: long ones cost more than they bring, as all else of a step is small
    optimiser = torch.optim.LBFGS(
        list(head.values()), max_iter=200, history_size=20, tolerance_grad=1e-6, tolerance_change=1e-9,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def loss() -> Tensor:
        optimiser.zero_grad()
        distance = torch.stack([(tensor - start[name]).square().sum() for name, tensor in head.items()]).sum()
        value = divergences(call(head, examples.given), examples.expert).mean() + pull * distance
        value.backward()
        return value

    with torch.enable_grad():
        optimiser.step(loss)
    return {name: tensor.detach() for name, tensor in head.items()}
