"""Hidden representations: what a task's head is given, of any architecture, and what chosen layers give."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from adarank.errors import RecipeError
from adarank.models.tied import TaskModels
from adarank.settings import nearest

Pool = Callable[[Tensor, Tensor | None], Tensor]
"""(what a head is given, attention mask or None) -> (batch, width)."""
_REMEDY = "Name a block, such as encoder.layer.3."


def head_parts(models: TaskModels, task: str) -> list[nn.Module]:
    """The parts of a task's module that hold tensors of its head; of a generating model its layer of output.

    Raises:
        RecipeError: it has none: all its tensors are merged ones.
    """
    parts = owners(models.modules[task], models.heads[task].values())
    if not parts and (output := getattr(models.modules[task], "get_output_embeddings", lambda: None)()) is not None:
        return [output]
    if not parts:
        raise RecipeError(
            f"What heads are given is asked for, and task '{task}' has no head. Use another objective or method, or "
            "name the head's tensors under select: head."
        )
    return parts


def owners(module: nn.Module, tensors: Iterable[Tensor]) -> list[nn.Module]:
    """The parts of a module that hold one of its tensors themselves."""
    wanted = {id(tensor) for tensor in tensors}
    return [part for part in module.modules() if any(id(tensor) in wanted for tensor in part._parameters.values())]


def named_layers(module: nn.Module, patterns: Sequence[str]) -> list[nn.Module]:
    """The parts of a module that some names or patterns are of, each once, in the module's order.

    Arguments:
        patterns: of paths in the module, with or without what its body is called there (`bert.`).

    Raises:
        RecipeError: one is of none.
    """
    prefix = f"{getattr(module, 'base_model_prefix', '')}."
    parts = {path.removeprefix(prefix): (path, part) for path, part in module.named_modules() if path}

    def fits(short: str, pattern: str) -> bool:
        return fnmatchcase(short, pattern) or fnmatchcase(parts[short][0], pattern)

    blocks = [short for short in parts if short.rpartition(".")[2].isdigit()] or list(parts)[:10]
    for pattern in patterns:
        if not any(fits(short, pattern) for short in parts):
            raise RecipeError(
                f"adapt.self_label.layers: '{pattern}' is the name of no part of {type(module).__name__}.{nearest(pattern, blocks)}"
            )
    return [part for short, (_, part) in parts.items() if any(fits(short, pattern) for pattern in patterns)]


@contextmanager
def layer_outputs(
    module: nn.Module, parts: list[nn.Module], layers: Sequence[nn.Module], pool: Pool | None = None
) -> Iterator[list[tuple[Tensor, ...]]]:
    """While it is open, every forward pass appends what the head is given, as `head_inputs` has it, and the (batch, width) outputs
    of some layers, in their order.

    Arguments:
        parts: of the head; without them nothing is appended.
    """
    passes: list[tuple[Tensor, ...]] = []
    mask: list[Tensor | None] = [None]
    given: dict[int, Tensor] = {}

    def begin(_: nn.Module, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        given.clear()
        mask[0] = named.get("decoder_attention_mask", named.get("attention_mask"))

    def take(layer: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        given[id(layer)] = (pool or pooled)(_hidden(layer, output), mask[0])

    def end(*_: Any) -> None:
        idle = [layer for layer in layers if id(layer) not in given]
        if idle:
            raise RecipeError(
                f"adapt.self_label.layers: a {type(idle[0]).__name__} does not run on every input. {_REMEDY}"
            )
        if seen:
            passes.append((seen[-1], *(given[id(layer)] for layer in layers)))

    handles = [module.register_forward_pre_hook(begin, with_kwargs=True)] if parts else []
    handles += [layer.register_forward_hook(take) for layer in layers if parts]
    handles += [module.register_forward_hook(end)] if parts else []
    try:
        with head_inputs(module, parts, pool) as seen:
            yield passes
    finally:
        for handle in handles:
            handle.remove()


def _hidden(layer: nn.Module, output: Any) -> Tensor:
    """The hidden states that a layer gave."""
    parts = tuple(output.values()) if isinstance(output, Mapping) else output
    tensors = [part for part in parts if isinstance(part, Tensor)] if isinstance(parts, (tuple, list)) else [parts]
    if not tensors or not isinstance(tensors[0], Tensor) or tensors[0].dim() < 2:
        raise RecipeError(f"adapt.self_label.layers: a {type(layer).__name__} gives no hidden states. {_REMEDY}")
    return tensors[0]


@contextmanager
def head_inputs(module: nn.Module, parts: list[nn.Module], pool: Pool | None = None) -> Iterator[list[Tensor]]:
    """While it is open, every forward pass appends the (batch, width) input of the part of the head that runs first.

    Without parts nothing is appended.

    Arguments:
        pool: by default `pooled`.
    """
    pool = pool or pooled
    seen: list[Tensor] = []
    if not parts:
        yield seen
        return
    now: dict[str, Any] = {}

    def begin(_: nn.Module, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        now.clear()
        now.update(mask=named.get("decoder_attention_mask", named.get("attention_mask")), open=True)

    def take(_: nn.Module, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        if now.get("open"):
            now["open"] = False
            seen.append(pool(next(v for v in (*arguments, *named.values()) if isinstance(v, Tensor)), now["mask"]))

    handles = [module.register_forward_pre_hook(begin, with_kwargs=True)]
    handles += [part.register_forward_pre_hook(take, with_kwargs=True) for part in parts]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def pooled(given: Tensor, mask: Tensor | None) -> Tensor:
    """(batch, width) float32 of (batch, width), (batch, positions, width) or (batch, width, height, width).

    Positions are averaged over those that the mask names (all without one), images of features over their pixels.
    """
    if given.dim() == 3:
        if mask is None or mask.shape != given.shape[:2]:
            return given.float().mean(dim=1)
        share = mask.to(given.dtype) / mask.sum(dim=1, keepdim=True)
        return (given * share[..., None]).sum(dim=1).float()
    return given.float().flatten(2).mean(dim=2) if given.dim() > 3 else given.float()
