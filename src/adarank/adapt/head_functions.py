"""A task's head as a function of what the body gives it, and that for all its inputs: with these it is learned without the body."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.module import register_module_forward_hook

from adarank.adapt.problem import Chunk, Problem
from adarank.models.head_inputs import head_parts

Head = Mapping[str, Tensor]
Call = Callable[[Head, Tensor], Tensor]
"""(head, what it is given) -> logits."""


@dataclass(frozen=True)
class HeadExamples:
    """What a head is given, (inputs, width), and its expert's logits, (inputs, classes)."""

    given: Tensor
    expert: Tensor

    def rows(self, chosen: Tensor) -> HeadExamples:
        """Those of some inputs."""
        return HeadExamples(self.given[chosen], self.expert[chosen])

    def joined(self, others: HeadExamples) -> HeadExamples:
        """Those of these and of other inputs."""
        return HeadExamples(torch.cat([self.given, others.given]), torch.cat([self.expert, others.expert]))


@dataclass(frozen=True)
class HeadFunction:
    """A part of a task's network that turns one vector per input into the logits.

    Attributes:
        entry: the part of the network that is given these vectors.
        part: what makes the logits of them: `entry` itself, or a chain of parts that begins with it.
        learned: name in `part` -> the tensors of the head that it has.
    """

    entry: nn.Module
    part: nn.Module
    learned: Mapping[str, nn.Parameter]

    @property
    def layers(self) -> int:
        """How many layers hold what is learned. With one the problem is convex."""
        learned = {id(tensor) for tensor in self.learned.values()}
        return sum(any(id(p) in learned for p in module.parameters(recurse=False)) for module in self.part.modules())

    @property
    def dtype(self) -> torch.dtype:
        """Double precision where it is cheap."""
        return torch.float64 if self.layers == 1 else torch.float32

    def start(self) -> Head:
        """A copy of what is to be learned, as it is now."""
        return {name: tensor.detach().to(self.dtype, copy=True) for name, tensor in self.learned.items()}

    def call(self) -> Call:
        """The part with another head in place of what it holds; the rest of it is as it is now."""
        rest = {n: t.detach().to(self.dtype) for n, t in self.part.state_dict().items() if t.is_floating_point()}

        def call(head: Head, given: Tensor) -> Tensor:
            logits: Tensor = functional_call(self.part, {**rest, **head}, (given,))
            return logits

        return call

    @torch.no_grad()
    def write(self, head: Head) -> None:
        """Put a head into the network."""
        for name, tensor in self.learned.items():
            tensor.copy_(head[name])


@dataclass(frozen=True)
class Learnable:
    """A function to learn, and from what.

    Attributes:
        examples: of the inputs that are adapted on.
        judged: of those that are held out; None where there are none.
    """

    function: HeadFunction
    examples: HeadExamples
    judged: HeadExamples | None


def learnable(problem: Problem, task: str) -> list[Learnable]:
    """The last layer of the task's head, and all of the head where that is more; as far as one vector per input decides them.

    The body is run once.

    Raises:
        RecipeError: the task has no head.
    """
    inputs, parts = problem.inputs[task], head_parts(problem.models, task)
    passes = (_passed(problem, task, parts, chunk) for chunk in inputs.adapted_on())
    first = next(passes)
    functions = _functions(problem, task, parts, first)
    if not functions:
        return []
    examples = _examples(functions, chain([first], passes))
    judged: Sequence[HeadExamples | None] = [None] * len(functions)
    if inputs.held_out_from_steps:
        judged = _examples(functions, (_passed(problem, task, parts, chunk) for chunk in inputs.judged_on()))
    return list(map(Learnable, functions, examples, judged))


@dataclass(frozen=True)
class _Pass:
    """What came of one batch.

    Attributes:
        calls: (part, its first tensor, its output) of all that ran from the first part of the head on, as they ended.
        logits, expert: of the network and of the task's expert.
    """

    calls: Sequence[tuple[nn.Module, Tensor, Tensor]]
    logits: Tensor
    expert: Tensor

    def given(self, function: HeadFunction) -> Tensor | None:
        """(inputs, width) of which a function makes the logits; None if it does not.

        Of several positions of an input it is the one whose output the logits are, or the first, if that is enough.
        """
        calls = [(given, output) for part, given, output in self.calls if part is function.entry]
        if len(calls) != 1:
            return None
        given, output = calls[0]
        if given.dim() == output.dim() == 3 and output.shape[-1] == self.logits.shape[-1]:  # every position has logits
            place = (output - self.logits[:, None]).abs().amax(dim=-1).argmin(dim=1)
            given = given[torch.arange(len(given), device=given.device), place]
        if given.dim() == 3:
            given = given[:, :1]
        if given.dim() not in (2, 3):
            return None
        again = function.part(given)
        fits = again.shape == self.logits.shape and torch.allclose(again.float(), self.logits, atol=1e-4)
        return given if fits else None


@torch.no_grad()
def _passed(problem: Problem, task: str, parts: Sequence[nn.Module], chunk: Chunk) -> _Pass:
    (where, batch), module = chunk, problem.models.modules[task]
    calls: list[tuple[nn.Module, Tensor, Tensor]] = []

    def begin(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        calls.clear()  # a network that routes its inputs passes them twice

    def take(part: nn.Module, arguments: tuple[Any, ...], named: Mapping[str, Any], output: Any) -> None:
        given = next((v for v in (*arguments, *named.values()) if isinstance(v, Tensor)), None)
        if given is not None and isinstance(output, Tensor) and (calls or any(part is one for one in parts)):
            calls.append((part, given, output))

    # of all modules: some networks make activations as they go
    handles = [module.register_forward_pre_hook(begin), register_module_forward_hook(take, with_kwargs=True)]
    try:
        logits = problem.forward(module, batch)
    finally:
        for handle in handles:
            handle.remove()
    expert = problem.predictions[task].logits[where]
    assert isinstance(expert, Tensor)  # models that predict tokens have no head of a task
    return _Pass(calls, logits, expert)


def _functions(problem: Problem, task: str, parts: Sequence[nn.Module], first: _Pass) -> list[HeadFunction]:
    head = {id(tensor) for tensor in problem.models.heads[task].values()}

    def fitting(candidates: Iterable[tuple[nn.Module, nn.Module]]) -> HeadFunction | None:
        for entry, part in candidates:
            learned = {name: tensor for name, tensor in part.named_parameters() if id(tensor) in head}
            function = HeadFunction(entry, part, learned)
            if first.given(function) is not None:
                return function
        return None

    with torch.no_grad():
        last = fitting((part, part) for part in reversed(parts))
        whole = fitting([*_enclosing(problem.models.modules[task], parts), *_chain(first)])
    functions = [function for function in (last, whole) if function is not None]
    same = len(functions) == 2 and len(functions[0].learned) >= len(functions[1].learned)
    return functions[:1] if same else functions


def _examples(functions: Sequence[HeadFunction], passes: Iterable[_Pass]) -> list[HeadExamples]:
    given: list[list[Tensor]] = [[] for _ in functions]
    expert = []
    for each in passes:
        for seen, function in zip(given, functions, strict=True):
            vectors = each.given(function)
            assert vectors is not None  # the function was chosen by the first batch
            seen.append(vectors.to(function.dtype, copy=True))  # not a view of all positions
        expert.append(each.expert)
    return [HeadExamples(torch.cat(seen), torch.cat(expert).to(seen[0])) for seen in given]


def _enclosing(module: nn.Module, parts: Sequence[nn.Module]) -> Iterator[tuple[nn.Module, nn.Module]]:
    """The smallest part of a module that has all these in it, unless it is the module itself."""
    wanted = {id(part) for part in parts}
    paths = [name.split(".") for name, part in module.named_modules() if id(part) in wanted]
    shared = 0
    while all(len(path) > shared and path[shared] == paths[0][shared] for path in paths):
        shared += 1
    if shared:
        part = module.get_submodule(".".join(paths[0][:shared]))
        yield part, part


def _chain(first: _Pass) -> Iterator[tuple[nn.Module, nn.Module]]:
    """What runs from the head's first part on, as long as each takes what the one before it gave: a pooler, say, its
    activation, dropout, and a classifier."""
    if not first.calls:
        return
    parts, now = [first.calls[0][0]], first.calls[0][2]
    for part, given, output in first.calls[1:]:
        if given is now:
            parts.append(part)
            now = output
    if len(parts) > 1:
        yield parts[0], nn.Sequential(*parts).eval()
