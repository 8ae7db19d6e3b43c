"""The last hidden representation: what a task's head is given, of any architecture."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from adarank.errors import RecipeError
from adarank.models.tied import TaskModels

Pool = Callable[[Tensor, Tensor | None], Tensor]
"""(what a head is given, attention mask or None) -> (batch, width)."""


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
