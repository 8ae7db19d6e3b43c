"""The blocks of a network, which run one after another, and each of them run alone.

A block is a module of a numbered list (`encoder.layer.3`): the outermost such, or those inside of it where they are all that
it is made of. To run one alone, the network is called as always; blocks before it give at once what they gave when they were
run, and the pass ends behind it. So whatever a network does between its blocks (embeddings, masks, positions) is done by the
network itself, of any architecture, and nothing is differentiated but the one block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from adarank.errors import RecipeError
from adarank.models.predict import Forward

Given = Any
"""What a block gave: a tensor, or a tuple whose first tensor are the hidden states."""
Holding = Callable[[nn.Module], AbstractContextManager[None]]
"""Around what runs a module: has its weights in memory."""
_REMEDY = "Use by: model, which adapts the whole network at a time."


class _Over(Exception):
    """Ends a pass whose rest is not needed."""


@dataclass(frozen=True)
class Chain:
    """The blocks of one network, in the order in which they run.

    Attributes:
        module: the network; `forward`: how it is called, (module, batch) -> logits.
        paths: the blocks' names in it.
    """

    module: nn.Module
    forward: Forward
    paths: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def block(self, place: int) -> nn.Module:
        """The block at a place."""
        return self.module.get_submodule(self.paths[place])

    def needed(self, place: int) -> list[int]:
        """The blocks whose results the network needs to call the block at a place: of every list, the last one before it."""
        last = {path.rpartition(".")[0]: number for number, path in enumerate(self.paths[:place])}
        return sorted(last.values())

    def mask(self, place: int, batch: Any) -> Tensor | None:
        """Of a batch the mask of the positions that the block at a place runs over; None if nothing is padded."""
        if not isinstance(batch, Mapping):
            return None
        of_decoder = "decoder" in self.paths[place].split(".") and "decoder_attention_mask" in batch
        mask: Tensor | None = batch.get("decoder_attention_mask" if of_decoder else "attention_mask")
        return mask.flatten(0, -2) if mask is not None and mask.dim() > 2 else mask  # of several texts to an input

    def run(self, place: int, batch: Any, given: Mapping[int, Given]) -> Given:
        """What the block at a place gives for a batch, with a graph where gradients are enabled.

        Arguments:
            given: what the blocks in `needed(place)` gave.
        """
        caught: list[Given] = []
        block = self.block(place)
        plain = block.forward

        def last(*arguments: Any, **named: Any) -> None:
            caught.append(plain(*arguments, **named))
            raise _Over

        with self._given(place, given), _replaced(block, last):
            try:
                self.forward(self.module, batch)
            except _Over:
                return caught[0]
        raise RecipeError(f"{self.paths[place]}: the network does not run this block on every input. {_REMEDY}")

    def logits(self, batch: Any, given: Mapping[int, Given], place: int | None = None) -> Tensor:
        """The network's predictions, with a graph where gradients are enabled.

        Arguments:
            given: what the blocks in `needed(place)` gave.
            place: the first block that is run; by default none is.
        """
        with self._given(len(self) if place is None else place, given):
            return self.forward(self.module, batch)

    @contextmanager
    def _given(self, place: int, given: Mapping[int, Given]) -> Iterator[None]:
        """While it is open, blocks before a place give what the last of their list gave, without being run."""
        of_list = {self.paths[number].rpartition(".")[0]: given[number] for number in self.needed(place)}
        plain = [self.block(number) for number in range(place)]
        try:
            for block, path in zip(plain, self.paths, strict=False):
                block.forward = _constant(of_list[path.rpartition(".")[0]])
            yield
        finally:
            for block in plain:
                block.__dict__.pop("forward", None)


def _constant(value: Given) -> Callable[..., Given]:
    return lambda *arguments, **named: value


@contextmanager
def _replaced(block: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    block.forward = forward
    try:
        yield
    finally:
        block.__dict__.pop("forward", None)


def hidden(given: Given) -> Tensor:
    """The hidden states among what a block gave: the first tensor."""
    if isinstance(given, Tensor):
        return given
    return next(hidden(part) for part in given if isinstance(part, (Tensor, tuple, list)))


def on_cpu(given: Given) -> Given:
    """A copy of what a block gave, as tensors and tuples of them alone, without a graph. What else a tuple holds is None."""
    if isinstance(given, Tensor):
        return given.detach().to("cpu", copy=True)
    return tuple(map(on_cpu, given)) if isinstance(given, (tuple, list)) else None


def put(given: Given, device: torch.device) -> Given:
    """What `on_cpu` gave, on a device."""
    if isinstance(given, Tensor):
        return given.to(device)
    return tuple(put(part, device) for part in given) if isinstance(given, tuple) else given


@torch.no_grad()
def find_chain(
    module: nn.Module,
    forward: Forward,
    batch: Any,
    merged: Sequence[Tensor],
    holding: Holding = lambda part: nullcontext(),
) -> Chain:
    """The blocks of a network that hold tensors that are merged, as they run on a batch.

    Arguments:
        merged: the network's parameters and buffers that are merged.
        holding: around whatever runs a numbered module, whose weights need not be in memory otherwise.

    Raises:
        RecipeError: there are none, one runs several times in a pass, or run one by one they give other predictions.
    """
    calls = _Calls(holding)
    with calls.watching(numbered(module, merged)):
        logits = forward(module, batch)
    chain = Chain(module, forward, tuple(calls.blocks()))
    if not chain.paths:
        raise RecipeError(
            f"adapt.by: {type(module).__name__} has no blocks: no module of a numbered list holds a merged tensor. {_REMEDY}"
        )
    repeated = [path for path in chain.paths if calls.counts[path] != 1]
    if repeated:
        raise RecipeError(f"adapt.by: '{repeated[0]}' runs {calls.counts[repeated[0]]} times in a pass. {_REMEDY}")
    given: dict[int, Given] = {}
    try:
        for place in range(len(chain)):
            of_lists = {n: put(given[n], logits.device) for n in chain.needed(place)}
            with holding(chain.block(place)):
                given[place] = on_cpu(chain.run(place, batch, of_lists))
        again = chain.logits(batch, {n: put(given[n], logits.device) for n in chain.needed(len(chain))})
    except (
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
    ) as error:  # what is around blocks takes them apart
        raise RecipeError(f"adapt.by: the blocks of {type(module).__name__} cannot be run one by one ({error}). {_REMEDY}") from None  # fmt: skip
    if again.shape != logits.shape or not torch.allclose(again, logits, rtol=1e-4, atol=1e-5):
        raise RecipeError(
            f"adapt.by: the blocks of {type(module).__name__}, run one by one, do not give its predictions. {_REMEDY}"
        )
    return chain


def numbered(module: nn.Module, merged: Sequence[Tensor]) -> dict[str, nn.Module]:
    """Path -> module of numbered lists that holds tensors that are merged: blocks are among these."""
    ids = {id(tensor) for tensor in merged}
    return {
        path: part
        for path, part in module.named_modules()
        if path.rpartition(".")[2].isdigit() and any(id(tensor) in ids for tensor in tensors_of(part))
    }


@dataclass
class _Calls:
    """Which numbered modules ran in a pass, and what they gave.

    Attributes:
        holding: around the outermost of them, while they run.
        counts: path -> how often the module ran, in the order in which modules first began.
    """

    holding: Holding
    counts: dict[str, int] = field(default_factory=dict)
    _parts: Mapping[str, nn.Module] = field(default_factory=dict)
    _given: dict[str, Given] = field(default_factory=dict)
    _depth: int = 0
    _held: ExitStack = field(default_factory=ExitStack)

    @contextmanager
    def watching(self, parts: Mapping[str, nn.Module]) -> Iterator[None]:
        """While it is open, calls are counted."""
        self._parts = parts
        handles = []
        for path, part in self._parts.items():
            handles += [part.register_forward_pre_hook(self._begin(path)), part.register_forward_hook(self._end(path))]
        try:
            with self._held:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def blocks(self) -> list[str]:
        """The paths of the blocks, in the order in which they began."""
        order = {path: number for number, path in enumerate(self.counts)}
        chosen = [finer for path in self._inside("") for finer in self._refined(path)]
        return sorted(chosen, key=lambda path: order[path])

    def _inside(self, path: str) -> list[str]:
        """The outermost numbered modules that ran inside of one."""
        within = [
            other for other in self.counts if other != path and f"{other}.".startswith(f"{path}." if path else "")
        ]
        return [one for one in within if not any(one != other and one.startswith(f"{other}.") for other in within)]

    def _refined(self, path: str) -> list[str]:
        """The numbered modules inside of one, where these are all that it is made of; else itself."""
        inner = self._inside(path)
        held = {id(tensor) for part in inner for tensor in tensors_of(self._parts[part])}
        whole = all(id(tensor) in held for tensor in tensors_of(self._parts[path]))
        once = all(self.counts[part] == 1 for part in inner)
        alike = (
            len({_form(self._given[part]) for part in inner}) == 1
        )  # what one gives can stand for another's, not so in T5
        if not inner or not (whole and once and alike) or not _same(self._given[path], self._given[inner[-1]]):
            return [path]
        return [finer for part in inner for finer in self._refined(part)]

    def _begin(self, path: str) -> Any:
        def hook(part: nn.Module, arguments: Any) -> None:
            self.counts[path] = self.counts.get(path, 0) + 1
            if not self._depth:
                self._held.enter_context(self.holding(part))
            self._depth += 1

        return hook

    def _end(self, path: str) -> Any:
        def hook(part: nn.Module, arguments: Any, output: Any) -> None:
            self._given[path] = output
            self._depth -= 1
            if not self._depth:
                self._held.close()

        return hook


def _form(given: Given) -> str:
    """What a caller can take of it: a tensor, or a tuple of so many."""
    return f"{type(given).__name__} {len(given) if isinstance(given, (tuple, list)) else ''}"


def _same(one: Given, other: Given) -> bool:
    """Whether both have the same hidden states."""
    return all(isinstance(each, (Tensor, tuple, list)) for each in (one, other)) and hidden(one) is hidden(other)


def tensors_of(part: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers of a module."""
    yield from part.parameters()
    yield from part.buffers()


def positions(given: Tensor, mask: Tensor | None) -> Tensor:
    """(n, width) the vectors that count of what layers or blocks are given or give.

    Arguments:
        given: (…, width).
        mask: (batch, positions), 0 where an input is padded; None if nothing is.
    """
    leading = given.shape[:-1]
    if mask is not None and mask.dim() == 2:
        kept = mask.bool()
        if leading == kept.shape:
            return given[kept]
        if leading == (kept.numel(),):
            return given[kept.flatten()]
        if leading == kept.T.shape:
            return given[kept.T]
    return given.reshape(-1, given.shape[-1])
