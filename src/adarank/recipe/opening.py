"""The checkpoints that a recipe names, opened: models, and adapters over the models that they change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from adarank.alignment.adapters import with_adapter
from adarank.errors import AdaRankError, CheckpointError, itemise
from adarank.io.adapted import Adapted
from adarank.io.adapter import Adapter, is_adapter
from adarank.io.checkpoint import Checkpoint, check_any
from adarank.io.dequantise import Dequantised
from adarank.io.hub import resolve, split_adapter
from adarank.io.quantised import quantisation, refuse_quantised
from adarank.recipe.schema import Recipe


def open_checkpoints(
    recipe: Recipe, stages: Mapping[str, Checkpoint]
) -> tuple[Checkpoint | None, dict[str, Checkpoint]]:
    """The recipe's base and experts, which are not quantised, or turned into floats.

    A folder of an adapter alone is an adapter of the base. A model under several adapters is opened once, so that what
    an adapter over the base adds to it is known as factors.

    Arguments:
        stages: name -> what an earlier stage of the recipe gave, which models may be called by.

    Raises:
        CheckpointError: some cannot be read; all are named.
    """
    opener = _Opener(recipe, stages)
    base = opener.base()
    experts = {task: opener.expert(entry.model) for task, entry in recipe.experts.items()}
    if opener.problems:
        heading = f"{len(opener.problems)} checkpoints cannot be read:"
        problems = opener.problems
        raise CheckpointError(problems[0] if len(problems) == 1 else itemise(heading, problems))
    opened = {task: expert for task, expert in experts.items() if expert is not None}
    refuse_quantised([*([base] if base else []), *opened.values()])
    return base, opened


def adapter_notes(base: Checkpoint | None, experts: dict[str, Checkpoint]) -> list[str]:
    """What a user may not expect of the adapters among the models, in sentences."""
    members = {**({"the base": base} if base else {}), **{f"expert '{task}'": each for task, each in experts.items()}}
    return [note for name, each in members.items() if isinstance(each, Adapted) for note in _notes(name, each)]


def _notes(name: str, adapted: Adapted) -> Iterator[str]:
    config, model = adapted.adapter.config, adapted.model
    if config.base and _last(config.base) not in (_last(model.label), _last(str(model.path.resolve()))):
        yield f"{name}: the adapter says that it was trained on '{config.base}', and is put on '{model.label}'. Names and shapes fit."
    if config.decomposed:
        yield f"{name}: a DoRA, whose task vectors are of full rank: they are taken as dense matrices."
    if adapted.tied:
        yield f"{name}: the adapter changes {', '.join(adapted.tied)}, whose weight is the embedding table and the output layer: merged, the change acts on both."


def _last(reference: str) -> str:
    return Path(reference.split("@", 1)[0].rstrip("/")).name.lower()


class _Opener:
    """Opens references, each model once. Attributes: problems, in sentences."""

    def __init__(self, recipe: Recipe, stages: Mapping[str, Checkpoint]) -> None:
        self._recipe, self._stages = recipe, stages
        self._models: dict[Path, Checkpoint] = {}
        self._base: Checkpoint | None = None
        self.problems: list[str] = []

    def base(self) -> Checkpoint | None:
        """The recipe's base; None if it names none, or it cannot be read."""
        if self._recipe.base_model is not None:
            self._base = self._opened(self._recipe.base_model)
        return self._base

    def expert(self, reference: str) -> Checkpoint | None:
        """A model of the recipe; None if it cannot be read."""
        return self._opened(reference)

    def _opened(self, reference: str) -> Checkpoint | None:
        try:
            model, adapter = split_adapter(reference, self._recipe.folder)
            if adapter is not None:
                return with_adapter(self._model(model), Adapter(self._place(adapter, adapter=True)), reference)
            place = None if model in self._stages else self._place(model)
            return self._over_base(place, reference) if place is not None and is_adapter(place) else self._model(model)
        except AdaRankError as error:
            self.problems.append(str(error))
            return None

    def _over_base(self, place: Path, reference: str) -> Checkpoint:
        """An adapter that is named without a model: of the recipe's base."""
        adapter = Adapter(place)
        if self._base is not None:
            return with_adapter(self._base, adapter, reference)
        if self._recipe.base_model is not None and self.problems:
            raise CheckpointError(f"{reference}: an adapter of the base, which cannot be read.")
        named = adapter.config.base or "MODEL"
        raise CheckpointError(
            f"{reference}: an adapter, and the recipe names no base_model that it changes. Give base_model, or '{named}+{reference}'."
        )

    def _place(self, reference: str, adapter: bool = False) -> Path:
        return resolve(reference, self._recipe.folder, adapter)

    def _model(self, reference: str) -> Checkpoint:
        if reference in self._stages:
            return self._stages[reference]
        place = self._place(reference).resolve()
        if place not in self._models:
            checkpoint = Checkpoint(self._place(reference), reference)
            check_any(checkpoint)
            quantised = self._recipe.dequantize and quantisation(checkpoint)
            self._models[place] = Dequantised(checkpoint) if quantised else checkpoint
        return self._models[place]
