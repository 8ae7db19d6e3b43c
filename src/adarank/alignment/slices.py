"""Layers of models put into a new order: which stored tensor stands for which of the output's, model by model.

    model.embed_tokens.weight               of the first slice
    model.layers.2.mlp.up_proj.weight   ->  model.layers.7.mlp.up_proj.weight    layer 2 of a model as layer 7 of the output
    model.norm.weight, lm_head.weight       of the last slice

What stands before the layers is distinguished from what comes after them by name, as files do not keep an order. Names are those of
the root: the model that gives the output its configuration.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from adarank.alignment.layers import depth
from adarank.alignment.naming import named_as
from adarank.alignment.selection import computed, is_embedding
from adarank.alignment.task_vectors import AlignedCheckpoints, Member
from adarank.errors import RecipeError
from adarank.io.checkpoint import Source, TensorInfo

_LAYER = re.compile(r"^(.*?)(?<![^.])(\d+)\.")
_OUTPUT = re.compile(r"(^|\.)(embed_out|lm_head|unembed|output_layer)\b")


@dataclass(frozen=True)
class Stack:
    """The layers of a model.

    Attributes:
        prefix: what their tensors' names start with before the number.
    """

    prefix: str
    count: int

    def split(self, name: str) -> tuple[int | None, str]:
        """The layer that a tensor is in, and its name with 0 in the number's place; None and its name outside of layers."""
        match = _LAYER.match(name)
        if match is None or match.group(1) != self.prefix:
            return None, name
        return int(match.group(2)), f"{self.prefix}0.{name[match.end() :]}"


def stack_of(source: Source) -> Stack:
    """The one stack of layers of a model: of several, the one whose number of layers its configuration names.

    Raises:
        RecipeError: it has none, or several.
    """
    counts: dict[str, int] = {}
    for match in filter(None, map(_LAYER.match, source.tensors)):
        counts[match.group(1)] = max(counts.get(match.group(1), 0), int(match.group(2)) + 1)
    known = depth(source.config)
    fitting = [prefix for prefix, count in counts.items() if known in (None, count)]
    if len(fitting) == 1:
        return Stack(fitting[0], counts[fitting[0]])
    listed = ", ".join(f"{count} of {prefix.rstrip('.') or 'no name'}" for prefix, count in counts.items()) or "none"
    says = "" if known is None else f", and its config.json says {known}"
    raise RecipeError(
        f"slices: {source.label} is not one stack of numbered layers ({listed}{says}). "
        "Slices are for models of one stack; list whole models under models."
    )


@dataclass(frozen=True)
class Piece:
    """Where some layers of a model go.

    Attributes:
        start, stop: its layers from start to before stop.
        at: the output's layer that the first of them becomes.
        first, last: what stands before and after the layers is taken too.
    """

    start: int
    stop: int
    at: int
    first: bool
    last: bool


class Layout:
    """The output's names, as those of its root are, and what of a model stands for them."""

    def __init__(self, root: Source) -> None:
        self._root, self._stack = root, stack_of(root)
        self._shapes: dict[str, set[tuple[int, ...]]] = {}
        for name, info in root.tensors.items():
            self._shapes.setdefault(self._stack.split(name)[1], set()).add(info.shape)

    def called(self, source: Source, piece: Piece) -> dict[str, str]:
        """Stored name -> name in the output, of what a piece takes of a model."""
        stack, names = stack_of(source), self._names(source)
        taken = {}
        for stored, info in source.tensors.items():
            layer, _ = stack.split(stored)
            name = names[stored]
            if layer is None and self._taken(info, name, source, piece):
                taken[stored] = name
            elif layer is not None and piece.start <= layer < piece.stop:
                prefix = self._stack.prefix if name.startswith(self._stack.prefix) else stack.prefix
                taken[stored] = f"{prefix}{layer - piece.start + piece.at}.{name.removeprefix(prefix + '0.')}"
        return taken

    def problems(self, source: Source, pieces: Iterable[Piece], kept: Sequence[str] = ()) -> list[str]:
        """How a model's layers, and what else is taken of it, differ from the root's, in sentences.

        Arguments:
            kept: patterns of what stays as it is in the base, whatever the models have there.
        """
        if source is self._root:
            return []
        stack, names, taken = stack_of(source), self._names(source), tuple(pieces)
        texts, known = {}, set()
        for stored, info in source.tensors.items():
            layer, name = stack.split(stored)[0], names[stored]
            known.add(name)
            if layer is None and not any(self._taken(info, name, source, piece) for piece in taken):
                continue
            if name not in self._shapes:
                texts[name] = f"{stored}: {info.shape} in {info.file}, missing from {self._root.label}"
            elif info.shape not in self._shapes[name]:
                listed = " or ".join(map(str, sorted(self._shapes[name])))
                texts[name] = f"{stored}: {info.shape} in {info.file}, {listed} in {self._root.label}"
        for name in self._shapes.keys() - known:
            info = self._example(name)
            if self._stack.split(info.name)[0] is not None or any(
                self._taken(info, name, self._root, p) for p in taken
            ):
                texts[name] = f"{info.name}: {info.shape} in {info.file}, missing from {source.label}"
        return [text for name, text in texts.items() if not any(fnmatchcase(name, pattern) for pattern in kept)]

    def _names(self, source: Source) -> dict[str, str]:
        """Stored name -> name in the root, each layer's as the first's."""
        stack = stack_of(source)
        first = {stored: stack.split(stored)[1] for stored in source.tensors}
        shapes = {first[stored]: info.shape for stored, info in source.tensors.items()}
        root = {name: min(shapes_of) for name, shapes_of in self._shapes.items()}
        naming = named_as(shapes, root, source.label)
        return {stored: naming.names[name] for stored, name in first.items()}

    def _taken(self, info: TensorInfo, name: str, source: Source, piece: Piece) -> bool:
        """Whether a tensor outside of the layers goes with a piece. A tied output layer goes with none but a whole model."""
        output = bool(_OUTPUT.search(name))
        if output and not piece.first and (info.name in source.aliases or source.config.get("tie_word_embeddings")):
            return False
        before = not output and (is_embedding(name) or computed(info) is not None)
        return piece.first if before else piece.last

    def _example(self, name: str) -> TensorInfo:
        return next(info for n, info in self._root.tensors.items() if self._stack.split(n)[1] == name)


def joined(
    parts: Sequence[AlignedCheckpoints], base: Source | None, experts: Mapping[str, Source]
) -> AlignedCheckpoints:
    """Aligned slices as one network: each model with all that is taken of it.

    Arguments:
        parts: of the slices, in their order.
        experts: what the whole network calls its models.
    """
    tensors = {name: info for part in parts for name, info in part.tensors.items()}
    choices = {name: choice for part in parts for name, choice in part.choices.items()}
    root = _whole(base, parts) if base is not None else None
    members = {task: _whole(source, parts) for task, source in experts.items()}
    used = root if root is not None and root.names else None
    return AlignedCheckpoints(used, members, tensors, choices, dict.fromkeys(members, ()))


def _whole(source: Source, parts: Sequence[AlignedCheckpoints]) -> Member:
    """One model's tensors of all slices; what is in none of them is not used."""
    names: dict[str, str] = {}
    dropped: dict[str, str] = {}
    used: set[str] = set()
    for part in parts:
        for member in (*([part.base] if part.base else []), *part.experts.values()):
            if member.source is source:
                names = {**member.names, **names}
                used |= {stored for name, stored in member.names.items() if name in part.tensors}
                dropped |= member.dropped
    rest = dict.fromkeys(source.tensors, "in none of the slices")
    left = {name: why for name, why in {**rest, **dropped}.items() if name not in used}
    return Member(source, names, left)
