"""The checkpoints that a recipe names, opened: models, and adapters over the models that they change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from adarank.alignment.adapters import with_adapter
from adarank.errors import AdaRankError, CheckpointError, Problems, itemise
from adarank.io.adapted import Adapted
from adarank.io.adapter import Adapter, is_adapter
from adarank.io.checkpoint import Checkpoint, check_any
from adarank.io.dequantise import Dequantised
from adarank.io.hub import resolve, resolve_without_download, split_adapter
from adarank.io.quantised import quantisation, refuse_quantised
from adarank.recipe.draft import Draft


def open_checkpoints(
    draft: Draft, problems: Problems, stages: Mapping[str, Checkpoint | None]
) -> tuple[Checkpoint | None, dict[str, Checkpoint]]:
    """Those of the recipe's base and experts that can be read and are not quantised, or turned into floats.

    A folder of an adapter alone is an adapter of the base. A model under several adapters is opened once, so that what
    an adapter over the base adds to it is known as factors. For a recipe that will not run nothing is downloaded.

    Arguments:
        problems: what is wrong with the others is noted there.
        stages: name -> what an earlier stage of the recipe gives, which models may be called by; None of a stage that is wrong.
    """
    opener = _Opener(draft, stages)
    base = opener.base()
    given = {task: opener.opened(entry.model) for task, entry in draft.recipe.experts.items()}
    with problems.noted():
        texts = opener.problems
        if texts:
            heading = f"{len(texts)} checkpoints cannot be read:"
            raise CheckpointError(texts[0] if len(texts) == 1 else itemise(heading, texts))
    experts = {task: expert for task, expert in given.items() if expert is not None}
    if "dequantize" not in draft.left_out:
        with problems.noted():
            refuse_quantised([*([base] if base else []), *experts.values()])
    floats = {task: expert for task, expert in experts.items() if quantisation(expert) is None}
    return base if base and quantisation(base) is None else None, floats


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

    def __init__(self, draft: Draft, stages: Mapping[str, Checkpoint | None]) -> None:
        self._recipe, self._stages = draft.recipe, stages
        self._find = resolve if draft.sound and draft.downloads else resolve_without_download
        self._models: dict[Path, Checkpoint] = {}
        self._base: Checkpoint | None = None
        self.problems: list[str] = []

    def base(self) -> Checkpoint | None:
        """The recipe's base; None if it names none, or it cannot be read."""
        if self._recipe.base_model is not None:
            self._base = self.opened(self._recipe.base_model)
        return self._base

    def opened(self, reference: str) -> Checkpoint | None:
        """A model of the recipe; None if it cannot be read."""
        try:
            model, adapter = split_adapter(reference, self._recipe.folder)
            if adapter is not None:
                under, over = self._model(model), self._find(adapter, self._recipe.folder, True)
                return with_adapter(under, Adapter(over), reference) if under and over else None
            place = None if model in self._stages else self._find(model, self._recipe.folder)
            return self._over_base(place, reference) if place is not None and is_adapter(place) else self._model(model)
        except AdaRankError as error:
            self.problems.append(str(error))
            return None

    def _over_base(self, place: Path, reference: str) -> Checkpoint | None:
        """An adapter that is named without a model: of the recipe's base."""
        adapter = Adapter(place)
        if self._base is not None:
            return with_adapter(self._base, adapter, reference)
        if self._recipe.base_model is not None:
            if self.problems:
                raise CheckpointError(f"{reference}: an adapter of the base, which cannot be read.")
            return None  # the base will not be here, and that is no fault of this recipe
        named = adapter.config.base or "MODEL"
        raise CheckpointError(
            f"{reference}: an adapter, and the recipe names no base_model that it changes. Give base_model, or '{named}+{reference}'."
        )

    def _model(self, reference: str) -> Checkpoint | None:
        """A model, opened once; None if nothing can be known of it: it is to be downloaded, or of a stage, and will not be."""
        if reference in self._stages:
            return self._stages[reference]
        place = self._find(reference, self._recipe.folder)
        if place is None:
            return None
        if place.resolve() not in self._models:
            checkpoint = Checkpoint(place, reference)
            check_any(checkpoint)
            quantised = self._recipe.dequantize and quantisation(checkpoint)
            self._models[place.resolve()] = Dequantised(checkpoint) if quantised else checkpoint
        return self._models[place.resolve()]
