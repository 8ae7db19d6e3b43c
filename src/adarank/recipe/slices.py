"""A recipe's slices, opened: each is aligned and has its method; together they are one network of the output's layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import accumulate
from typing import Any

from adarank.alignment.align import Called, align
from adarank.alignment.layers import Span
from adarank.alignment.mismatch import other_kinds
from adarank.alignment.selection import Select, unmatched
from adarank.alignment.slices import Layout, Piece, joined, stack_of
from adarank.alignment.task_vectors import AlignedCheckpoints
from adarank.errors import MismatchError, RecipeError, itemise
from adarank.io.checkpoint import Checkpoint
from adarank.io.hub import same_model
from adarank.method.sliced import Sliced, SlicePart
from adarank.models.layer_settings import differing, with_layers
from adarank.recipe.checks import check
from adarank.recipe.schema import ModelEntry, Recipe, Slice


@dataclass(frozen=True)
class Slices:
    """What a recipe's slices are once its models are open.

    Attributes:
        network: the whole output.
        method: the slices' methods as one.
        config: of the output.
        rows: of each slice, the output's layers and each model's that they come from, as a plan shows them.
    """

    network: AlignedCheckpoints
    method: Sliced
    config: Mapping[str, Any]
    rows: tuple[Mapping[str, Any], ...]


def sliced(recipe: Recipe, opened: Mapping[str, Checkpoint]) -> Recipe:
    """The recipe, with one slice in place of models of which some layers alone are asked for.

    Arguments:
        opened: reference -> model.

    Raises:
        RecipeError: the slice is no merge of its own.
    """
    entries = [entry for entry in recipe.models if entry.layer_range is not None]
    if all(entry.layer_range == (0, stack_of(opened[entry.model]).count) for entry in entries):
        return recipe
    changed = recipe.model_copy(update={"slices": (Slice(sources=recipe.models),), "models": ()})
    check(changed, "recipe")
    return changed


def open_slices(recipe: Recipe, root: Checkpoint, opened: Mapping[str, Checkpoint]) -> Slices:
    """Align every slice.

    Arguments:
        root: the model that gives the output its names and its configuration.
        opened: reference -> model.

    Raises:
        RecipeError: a model has not the layers that are asked of it, or settings do not fit.
        MismatchError: layers are not of one architecture and size.
    """
    pieces = _pieces(recipe)
    _check_layers(recipe, opened)
    layout = Layout(root)
    _check_fit(recipe, layout, root, opened, pieces)
    called = [[layout.called(opened[source.model], piece) for source, piece in zip(of.sources, at, strict=True)]
              for of, at in zip(recipe.slices, pieces, strict=True)]  # fmt: skip
    selects = _selects(recipe.select, [{n for of in each for n in of.values()} for each in called])
    parts = [
        _open_part(part, of.sources, opened, names, select, _span(at[0]))
        for part, of, names, select, at in zip(recipe.parts(), recipe.slices, called, selects, pieces, strict=True)
    ]
    base = opened[recipe.base_model] if recipe.base_model else None
    whole = joined([part.network for part in parts], base, {t: opened[e.model] for t, e in recipe.experts.items()})
    return Slices(whole, Sliced(parts=tuple(parts)), _config(recipe, root, opened), tuple(_rows(recipe, pieces)))


def _pieces(recipe: Recipe) -> list[list[Piece]]:
    """Of each slice, where its sources' layers go."""
    lengths = [_layers(each.sources[0]) for each in recipe.slices]
    starts = [0, *accumulate(len(layers) for layers in lengths)]
    last = len(recipe.slices) - 1
    return [
        [Piece(layers.start, layers.stop, at, n == 0, n == last) for layers in map(_layers, each.sources)]
        for n, (each, at) in enumerate(zip(recipe.slices, starts, strict=False))
    ]


def _layers(source: ModelEntry) -> range:
    assert source.layer_range is not None  # the recipe was checked
    return range(*source.layer_range)


def _span(piece: Piece) -> Span:
    return Span(piece.at, piece.at + piece.stop - piece.start - 1)


def _check_layers(recipe: Recipe, opened: Mapping[str, Checkpoint]) -> None:
    problems = []
    for number, each in enumerate(recipe.slices):
        for source in each.sources:
            layers, count = _layers(source), stack_of(opened[source.model]).count
            if layers.stop > count:
                problems.append(
                    f"slices.{number}: layers {layers.start} to {layers.stop - 1} of {source.model} were asked for, and it has {count}."
                )
    if problems:
        raise RecipeError(itemise("slices: there are no such layers.", problems, "Layers are counted from 0; layer_range ends before its second number."))  # fmt: skip


def _check_fit(
    recipe: Recipe,
    layout: Layout,
    root: Checkpoint,
    opened: Mapping[str, Checkpoint],
    pieces: Sequence[Sequence[Piece]],
) -> None:
    """Whether all layers are of one architecture and size, and those that are merged with one another of one kind."""
    taken: dict[str, list[Piece]] = {}
    kinds = []
    for number, (each, at) in enumerate(zip(recipe.slices, pieces, strict=True)):
        for source, piece in zip(each.sources, at, strict=True):
            taken.setdefault(source.model, []).append(piece)
        of_layers = differing([(opened[source.model].config, _layers(source)) for source in each.sources])
        kinds += [f"slices.{number}: {text}" for text in of_layers]
    problems = [text for model, of in taken.items() for text in layout.problems(opened[model], of, recipe.select.keep)]
    if problems or kinds:
        others = other_kinds(root, [opened[model] for model in taken], root.label) if problems else []
        what = f"{len(problems)} tensor(s)" if problems else f"{len(kinds)} setting(s)"
        heading = "\n".join([*others, f"slices: {what} of the models' layers do not fit together."])
        raise MismatchError(itemise(heading, [*kinds, *problems], "Layers are put together of models of one architecture and size, and merged with layers of their kind.", 6))  # fmt: skip


def _selects(select: Select, names: Sequence[set[str]]) -> list[Select]:
    """For each slice the patterns that match any of its tensors."""
    missed = unmatched(select, [name for each in names for name in each])
    if missed:
        raise RecipeError(itemise("The recipe's patterns do not fit the models.", missed, "Correct or remove them."))
    groups = select.model_dump()
    return [
        Select(**{action: [p for p in patterns if any(fnmatchcase(name, p) for name in each)] for action, patterns in groups.items()})
        for each in names
    ]  # fmt: skip


def _open_part(
    part: Recipe,
    sources: Sequence[ModelEntry],
    opened: Mapping[str, Checkpoint],
    names: Sequence[Mapping[str, str]],
    select: Select,
    span: Span,
) -> SlicePart:
    """One slice, aligned, with its method."""
    at_base = next((n for n, source in enumerate(sources) if same_model(source.model, part.base_model, part.folder)), None)  # fmt: skip
    at_experts = dict(zip(part.experts, (n for n in range(len(sources)) if n != at_base), strict=True))
    base = None if at_base is None else opened[sources[at_base].model]
    called = Called(None if at_base is None else names[at_base], {task: names[n] for task, n in at_experts.items()})
    experts = {task: opened[sources[n].model] for task, n in at_experts.items()}
    network = align(base, experts, select, called=called)
    seen = {task: dict(member.names) for task, member in network.experts.items()}
    method = part.method(network.merged(), Span(span.first, span.last, seen))
    method.check(network)
    return SlicePart(network, method)


def _config(recipe: Recipe, root: Checkpoint, opened: Mapping[str, Checkpoint]) -> dict[str, Any]:
    """The root's, with the layers of each slice's base, or of its first model."""
    taken = []
    for each, part in zip(recipe.slices, recipe.parts(), strict=True):
        of = next((s for s in each.sources if same_model(s.model, part.base_model, part.folder)), each.sources[0])
        taken.append((opened[of.model].config, _layers(of)))
    return with_layers(root.config, taken)


def _rows(recipe: Recipe, pieces: Sequence[Sequence[Piece]]) -> list[dict[str, Any]]:
    return [
        {
            "layers": [at[0].at, at[0].at + at[0].stop - at[0].start],
            "of": [{"model": s.model, "layers": [p.start, p.stop]} for s, p in zip(each.sources, at, strict=True)],
        }
        for each, at in zip(recipe.slices, pieces, strict=True)
    ]
