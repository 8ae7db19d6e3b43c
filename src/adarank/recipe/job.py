"""A recipe with its opened, aligned checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from adarank.alignment.align import align
from adarank.alignment.selection import matching
from adarank.alignment.task_vectors import AlignedCheckpoints
from adarank.errors import Problems, RecipeError
from adarank.io import processes
from adarank.io.checkpoint import Checkpoint
from adarank.io.hub import same_model
from adarank.io.progress import stage
from adarank.io.sentence import check_modules
from adarank.io.vocabulary import VocabularyReader
from adarank.io.writer import layout_bytes
from adarank.method import MergeMethod, Outline
from adarank.models import Family
from adarank.models.compatibility import check_apart, check_compatible
from adarank.recipe.chat_templates import ChatTemplate, choose_template
from adarank.recipe.draft import METHOD, Draft, with_models
from adarank.recipe.lora_output import adapter_bytes, slots_of
from adarank.recipe.opening import adapter_notes, open_checkpoints
from adarank.recipe.schema import Recipe
from adarank.recipe.slices import Slices, open_slices, sliced
from adarank.recipe.task_kinds import check_bodies, family_of_tasks
from adarank.recipe.tokenizers import OutputTokenizer, Tokens, settle_tokens

# Measured on Linux with PyTorch 2 for processors (`benchmarks/merge_memory.py`).
PROCESS_BYTES = 200 * 10**6
NETWORKS_BYTES = 140 * 10**6


@dataclass(frozen=True)
class Job:
    """A validated recipe with its opened, aligned checkpoints.

    Attributes:
        folders: task -> folder of its expert.
        family: the kind of model, if the recipe's models have tasks.
        method: the method with all its settings, checked against the network.
        notes: how the models differ where that stops no merge, in sentences.
        tokenizer: what is written where the recipe names a tokenizer; else the root's files are.
        chat_template: what is written as such; None where it is the tokenizer's.
        slices: where the layers come from, if not from whole models.
        memory: the budget in bytes of anonymous memory; None if there is none.
    """

    recipe: Recipe
    base: Checkpoint | None
    experts: dict[str, Checkpoint]
    network: AlignedCheckpoints
    family: Family | None
    method: MergeMethod
    notes: tuple[str, ...] = ()
    tokenizer: OutputTokenizer | None = None
    chat_template: ChatTemplate | None = None
    slices: Slices | None = None
    memory: int | None = None

    @property
    def config(self) -> Mapping[str, Any]:
        """The output's configuration, but for its dtype."""
        return self.slices.config if self.slices else self.root.config

    @property
    def networks(self) -> list[AlignedCheckpoints]:
        """The network, slice by slice if it has slices."""
        return [part.network for part in self.slices.method.parts] if self.slices else [self.network]

    @property
    def root(self) -> Checkpoint:
        """The base, or the first expert when there is none."""
        return self.base or next(iter(self.experts.values()))

    def layout(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """The output's tensors: name -> (shape, dtype). Floats take the recipe's dtype, by default the base's."""
        floats = self.recipe.output_dtype()
        return {
            name: (info.shape, floats if floats is not None and info.dtype.is_floating_point else info.dtype)
            for name, info in self.network.tensors.items()
        }

    def outline(self) -> Outline:
        """What headers tell of the merge."""
        made = self.recipe.dequantize or not all(expert.in_one_folder for expert in self.experts.values())
        room = None if self.memory is None else max(0, self.memory - self.process_bytes)
        return Outline(self.network, self.layout(), self.recipe.output_dtype(), self.family, made, room)

    @property
    def process_bytes(self) -> int:
        """What the process itself holds: Python, PyTorch, buffers of reading and writing; `transformers` where networks run."""
        runs = self.family is not None and (bool(self.method.data) or self.recipe.heads == "learn")
        return PROCESS_BYTES + NETWORKS_BYTES * runs

    def output_bytes(self) -> int:
        """Size of the output's tensors, heads not among them; of an adapter the most that it can be."""
        if self.recipe.output.lora is not None:
            return adapter_bytes(self.network, self.recipe.output.lora.rank)
        shared, of_tasks = self.method.output_layouts(self.outline())
        return layout_bytes(shared) + sum(layout_bytes(layout) for layout in of_tasks.values())

    def inputs(self) -> dict[str, dict[str, str]]:
        """SHA-256 of every input file, by checkpoint. Of several processes each hashes its share."""
        return self.joined_hashes(self.hashed_share())

    def hashed_share(self) -> list[dict[str, str]]:
        """SHA-256 of the input files that are this process's to hash."""
        mine = processes.share(list(self._checkpoints.values()))
        with stage("Hashing the inputs", sum(file.stat().st_size for each in mine for file in each.files)):
            return [checkpoint.sha256() for checkpoint in mine]

    def joined_hashes(self, mine: list[dict[str, str]]) -> dict[str, dict[str, str]]:
        """What `inputs` gives, of every process's `hashed_share`."""
        return dict(zip(self._checkpoints, processes.whole(mine), strict=True))

    @property
    def _checkpoints(self) -> dict[str, Checkpoint]:
        return {**({"base": self.base} if self.base else {}), **self.experts}


def open_job(recipe: Recipe, stages: Mapping[str, Checkpoint] | None = None) -> Job:
    """Open and align everything that a recipe names. Reads headers, integers, and tables that may be tied.

    Arguments:
        recipe: what `load_recipe` returns.
        stages: name -> what an earlier stage of the recipe gave. A recipe of one stage needs none.

    Returns:
        The recipe with its opened checkpoints, its method, and what happens to each tensor (`job.network.choices`).

    Raises:
        AdaRankError: what cannot be opened or does not fit, all at once.

    Example:
        job = adarank.open_job(adarank.load_recipe("recipe.yaml"))
        for name, choice in job.network.choices.items():
            print(name, choice.action, choice.reason)
    """
    problems = Problems()
    opened = open_draft(Draft.of(recipe), problems, stages)
    problems.refuse()
    assert opened.job is not None
    return opened.job


@dataclass(frozen=True)
class Opened:
    """What could be opened of a recipe.

    Attributes:
        job: all of it; None if something is wrong.
        recipe: with all its models, those that could not be opened too.
        sound: nothing is wrong with the recipe itself.
        experts: task -> expert, of those that could be opened.
        family: the kind of model, as far as it could be told.
    """

    job: Job | None
    recipe: Recipe
    sound: bool
    experts: Mapping[str, Checkpoint]
    family: Family | None


def open_draft(draft: Draft, problems: Problems, stages: Mapping[str, Checkpoint | None] | None = None) -> Opened:
    """Open and align what a recipe names. What is wrong is noted, and all is checked that it leaves possible.

    Arguments:
        stages: as for `open_job`; None for a stage of which nothing is known, as something is wrong with it.
    """
    before = len(problems.errors)
    if draft.recipe.stages and stages is None:
        text = f"recipe: it has {len(draft.recipe.stages) + 1} stages, and only plan and merge take several. Give each a file of its own, and name its folder in the next."
        problems.errors.append(RecipeError(text))
        return Opened(None, draft.recipe, False, {}, None)
    base, experts = open_checkpoints(draft, problems, stages or {})
    recipe = with_models(draft.recipe, experts, with_base=base is not None)
    opening = _Opening(draft, recipe, base, experts, problems)
    job = opening.job()
    sound = draft.sound and len(problems.errors) == before
    if not sound and not draft.left_out & {METHOD, "parameters", "models", "slices", "adapt"}:
        _check_settings(draft.recipe, problems)
    return Opened(job if sound else None, draft.recipe, draft.sound, opening.experts, opening.family)


def _check_settings(recipe: Recipe, problems: Problems) -> None:
    """Note what is wrong with the method's settings, where that has not been said: they fit no models, or any."""
    said = "\n".join(map(str, problems.errors))
    here = Problems()
    for each in recipe.parts() or (recipe,):
        with here.noted():
            each.method()
    problems.errors += [error for error in here.errors if str(error).split("\n")[-1].strip() not in said]


class _Opening:
    """The checks of opened models, in order. Each runs on what those before it left."""

    def __init__(
        self,
        draft: Draft,
        recipe: Recipe,
        base: Checkpoint | None,
        experts: Mapping[str, Checkpoint],
        problems: Problems,
    ) -> None:
        self.draft, self.problems = draft, problems
        self.base, self.experts = base, dict(experts)
        self.whole = len(experts) == len(draft.recipe.experts) and (base is None) == (draft.recipe.base_model is None)
        self.recipe = draft.recipe if self.whole else recipe
        self.family: Family | None = None
        self.reader = VocabularyReader()
        self.of_adapters = adapter_notes(base, self.experts)

    def job(self) -> Job | None:
        """The job, if nothing is wrong."""
        if not self.experts:
            return None
        tokens = self._tokens()
        if tokens is None:  # their tables may be of several sizes, for all that is known
            with self.problems.noted():
                self.family = family_of_tasks(self.recipe, self.experts)
            return None
        self.base, self.experts = tokens.base, tokens.experts
        if tokens.aligned and self.recipe.output.lora is not None:
            text = "output.lora: an adapter changes tables as its base has them, and rows of tokens would be brought together. Give models of one vocabulary, or remove output."
            self.problems.errors.append(RecipeError(text))
        template = self._chat_template(tokens)
        if self.recipe.slices or any(entry.layer_range is not None for entry in self.recipe.models):
            if not self._takes_slices():
                return None
            if self.recipe.slices:
                return self._sliced(tokens, template)
        network, notes = self._network(), [*self.of_adapters, *_notes(tokens, template)]
        with self.problems.noted():
            if network is None:
                check_apart(self.base, self.experts, tokens.aligned)
            else:
                notes += check_compatible(network, self.base, self.experts, tokens.aligned, self.reader)
        if network is None or not self.whole or not self.draft.sound:
            return None
        with self.problems.noted():
            method = _method(self.recipe, network, self.family)
            return Job(
                self.recipe, self.base, self.experts, network, self.family, method, tuple(notes), tokens.tokenizer, template
            )  # fmt: skip
        return None

    def _tokens(self) -> Tokens | None:
        """The models with rows by token, where the recipe asks for it; None if something is wrong or missing."""
        if not self._sources_are_there():
            return None
        with self.problems.noted():
            return settle_tokens(self.recipe, self.base, self.experts, self.reader)
        return None

    def _sources_are_there(self) -> bool:
        """False if the tokenizer or rows are of models that could not be opened, so that nothing can be said of them."""
        given, settings = self.draft.recipe, self.draft.recipe.tokenizer_settings
        if self.whole or settings is None:
            return True
        if settings.source == "union" or settings.tokens or "tokenizer" in self.draft.left_out:
            return False
        if settings.source == "base":
            return self.base is not None or given.base_model is None
        lost = [entry.model for task, entry in given.experts.items() if task not in self.experts]
        lost += [given.base_model] if given.base_model is not None and self.base is None else []
        return not any(same_model(settings.source, model, given.folder) for model in lost)

    def _chat_template(self, tokens: Tokens) -> ChatTemplate | None:
        """The chat template that the recipe asks for."""
        if self.recipe.chat_template is None or not self.whole:
            return None
        models = [*([tokens.base] if tokens.base else []), *tokens.experts.values()]
        written = tokens.tokenizer.source if tokens.tokenizer else models[0]
        with self.problems.noted():
            return choose_template(self.recipe.chat_template, models, written, tokens.output_tokens)
        return None

    def _named(self) -> dict[str, Checkpoint]:
        """Reference -> model."""
        named = {entry.model: self.experts[task] for task, entry in self.recipe.experts.items()}
        return named | ({self.recipe.base_model: self.base} if self.recipe.base_model and self.base else {})

    def _takes_slices(self) -> bool:
        """Write layers that models give as slices; False if nothing can be said of them, or what is wrong was noted."""
        if not self.whole or not self.draft.sound:
            return False
        known = len(self.problems.errors)
        with self.problems.noted():
            self.recipe = sliced(self.recipe, self._named())
        return len(self.problems.errors) == known

    def _sliced(self, tokens: Tokens, template: ChatTemplate | None) -> Job | None:
        """The job of a recipe of slices."""
        named = self._named()
        with self.problems.noted():
            check_modules({checkpoint.label: checkpoint.modules for checkpoint in named.values()})
            slices = open_slices(self.recipe, self.base or next(iter(self.experts.values())), named)
            _note_unused(slices.network, self.base, self.experts)
            notes = [*self.of_adapters, *_notes(tokens, template)]
            notes += check_compatible(slices.network, self.base, self.experts, tokens.aligned, self.reader)
            return Job(
                self.recipe, self.base, self.experts, slices.network, None, slices.method, tuple(notes), tokens.tokenizer, template, slices
            )  # fmt: skip
        return None

    def _network(self) -> AlignedCheckpoints | None:
        """The models, aligned; None if they do not align, or if what is missing would be taken for their fault."""
        recipe, known = self.recipe, len(self.problems.errors)
        with self.problems.noted():
            self.family = family_of_tasks(recipe, self.experts)
        if self.family is not None and recipe.dequantize:
            text = "dequantize: true is for models without tasks: networks are loaded from their files. De-quantise the models first."
            self.problems.errors.append(RecipeError(text))
        base_lost = self.base is None and self.draft.recipe.base_model is not None
        task_lost = self.family is None and "models" in self.draft.left_out
        if base_lost or task_lost or "select" in self.draft.left_out or len(self.problems.errors) > known:
            return None
        kept: dict[str, str] = {}
        members = [*([self.base] if self.base else []), *self.experts.values()]
        with self.problems.noted():
            if self.family is not None:
                self.experts, kept = self.family.complete(self.base, self.experts, recipe.tasks, recipe.folder)
            else:
                check_modules({checkpoint.label: checkpoint.modules for checkpoint in members})
        if len(self.problems.errors) > known:
            return None
        with self.problems.noted():
            network = self._aligned(kept)
            check_bodies(recipe, self.experts, network)
            return network
        return None

    def _aligned(self, kept: Mapping[str, str]) -> AlignedCheckpoints:
        """The models' tensors, paired."""
        family, select = self.family, self.recipe.select
        if not self.whole:  # a pattern may be meant for a model that is not here
            select = matching(select, [n for c in (self.base, *self.experts.values()) if c for n in c.tensors])
        keep_embeddings = bool(family and family.keep_embeddings) and self.recipe.kind.keeps_embeddings
        network = align(
            self.base,
            self.experts,
            select,
            keep_embeddings,
            family is not None and not (family.generates or family.headless),
            kept,
            kernels=self.recipe.kind.decomposes_kernels(self.recipe.given()),
        )
        _note_unused(network, self.base, self.experts)
        return network


def _method(recipe: Recipe, network: AlignedCheckpoints, family: Family | None) -> MergeMethod:
    """The recipe's method, checked against the network, as is the form of its output: before anything is computed."""
    method = recipe.method(network.merged(), text=bool(family and not family.paths))
    method.check(network)
    if recipe.output.lora is not None:
        slots_of(network)
    return method


def _notes(tokens: Tokens, template: ChatTemplate | None) -> list[str]:
    return [*tokens.notes, *(template.notes if template else ())]


def _note_unused(network: AlignedCheckpoints, base: Checkpoint | None, experts: Mapping[str, Checkpoint]) -> None:
    """What is in the files and not among their tensors, with what alignment does not use."""
    for task, member in network.experts.items():
        member.dropped.update(experts[task].unused)
    if base is not None and network.base is not None:
        network.base.dropped.update(base.unused)
