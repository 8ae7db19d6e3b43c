"""Models that generate text: any architecture of `AutoModelForCausalLM` and `AutoModelForSeq2SeqLM`.

They predict the next token, from a vocabulary that all of a merge share. So a task has no head: embeddings, the layer of
output and all between are one body, and what is written is one ordinary model.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adarank.data.labels import Answer, Label, Problem
from adarank.data.read import Table
from adarank.data.spec import TaskSpec
from adarank.data.task import Batch, Examples
from adarank.errors import DataError
from adarank.io.checkpoint import Checkpoint
from adarank.io.parsing import parse_json
from adarank.models.family import Family
from adarank.models.prompts import Ids, Passage, Prompts, closing_answer, input_key, rendered
from adarank.models.text import TextClassifiers, check_text, positions, tokenizer_of

COUNTED = "counted"
"""Key of a causal model's batch: (inputs, positions), which tokens are predicted."""
IGNORED = -100  # transformers' mark of a token that no prediction is wanted for


class GeneratingModels(Family):
    """What the two families share."""

    keep_embeddings = False
    paths = False
    token_budget = cpu_token_budget = 2048  # each token has a prediction over the whole vocabulary
    mlps: tuple[tuple[str, str], ...] = ()  # what routes whole inputs is none for them
    expanded: tuple[str, ...] = ()
    generates = True

    def load(self, expert: Checkpoint) -> nn.Module:
        """The network of a folder, ready to be filled with weights. It keeps nothing of the past between calls."""
        module = super().load(expert)
        config: Any = module.config
        config.use_cache = False
        return module

    def without_effect(self, spec: TaskSpec) -> list[str]:
        """What a task says that is of classifiers, in sentences."""
        given = [f"columns.{key}" for key in ("text_pair", "label") if key in spec.columns.model_fields_set]
        return [f"{', '.join(given)}: of classifiers, and this is {self.kind}. Name the answers' column as columns: answer."] if given else []  # fmt: skip

    def check_folder(self, folder: Path) -> None:
        """Raise a `CheckpointError` if there is no file of a tokenizer."""
        TextClassifiers().check_folder(folder)

    def columns(self, spec: TaskSpec) -> list[str]:
        """The column that holds inputs."""
        return [spec.columns.text]

    def label_columns(self, spec: TaskSpec) -> list[str]:
        """The columns that hold answers, and what they are chosen from."""
        return [name for name in (spec.columns.answer, spec.columns.choices) if name]

    def problem(self, config: Mapping[str, Any]) -> Problem:
        """Text is generated."""
        return "generation"

    def key(self, value: Any) -> Hashable:
        """What makes two inputs the same one."""
        return input_key(value)

    def labels(self, table: Table, spec: TaskSpec, config: Mapping[str, Any], task: str) -> list[Label | None]:
        """Of each row the answer that it is scored by; None where it is withheld.

        Raises:
            DataError: options are no list, or the answer is none of them.
        """
        answer, choices = spec.columns.answer, spec.columns.choices
        if answer is None:
            if choices is not None:
                raise DataError(f"task '{task}': columns.choices is given without columns.answer. Name the column of the right option.")  # fmt: skip
            return [self._unnamed(value, spec) for value in table[spec.columns.text]]
        if answer not in table or (choices is not None and choices not in table):
            return [None] * len(table[spec.columns.text])
        if choices is None:
            return [None if _withheld(value) else Answer(str(value)) for value in table[answer]]
        return [
            None if _withheld(value) else _chosen(value, _options(given), f"task '{task}': row {row}")
            for row, (value, given) in enumerate(zip(table[answer], table[choices], strict=True), start=1)
        ]

    def encode(self, table: Table, spec: TaskSpec, folder: Path) -> tuple[Examples, list[str]]:
        """The inputs of a table as tokens, and notes about them.

        Raises:
            DataError: a row is no text, or too short to predict anything of.
        """
        task, tokenizer = spec.name or "", tokenizer_of(folder)
        pairs = [
            rendered(value, tokenizer, f"task '{task}': row {row}")
            for row, value in enumerate(table[spec.columns.text], start=1)
        ]
        texts = [text for text, _ in pairs]
        check_text(task, [texts])
        prompts = [self._prompt(tokenizer, text, special) for text, special in pairs]
        most, whose = min((spec.max_length, ""), (positions(folder, tokenizer), ", which is the model's own,"))
        passages = [self._passage(prompt, most) for prompt in prompts]
        short = [row for row, passage in enumerate(passages, start=1) if not self._predicts(passage)]
        if short:
            raise DataError(f"task '{task}': {len(short)} rows are too short to predict a token of, such as row {short[0]}. Take them out.")  # fmt: skip
        cut = sum(len(prompt) > most for prompt in prompts)
        notes = [f"{cut} of {len(texts)} inputs are longer than {most} tokens{whose} and are cut there"] if cut else []
        special = tuple(special for _, special in pairs)
        return Prompts(tokenizer, tuple(texts), special, tuple(prompts), tuple(passages), most, spec.max_new_tokens, spec.stop, self.form, self._generates_answers(spec)), notes  # fmt: skip

    def with_answers(self, prompts: Prompts, answers: Mapping[int, Ids]) -> Prompts:
        """The same rows, those that have an answer with it as what counts."""
        passages = [
            self._joined(prompts, row, answers[row]) if row in answers else passage
            for row, passage in enumerate(prompts.passages)
        ]
        return replace(prompts, passages=tuple(passages), lacks_answers=False)

    def scored(self, prompts: Prompts, row: int, answer: str | None) -> Passage:
        """A row with the answer that it is scored by; running text, of which no answer is known, as it is.

        Raises:
            DataError: the answer has no tokens.
        """
        if answer is None:
            return prompts.passages[row]
        passage = self._answered(prompts, row, answer)
        if not passage.answer:
            raise DataError(f"The answer {answer!r} to {prompts.texts[row]!r:.80} has no tokens, so that it cannot be scored. Take the row out.")  # fmt: skip
        return passage

    @abstractmethod
    def to_answer(self, prompts: Prompts, rows: Sequence[int]) -> Batch:
        """The prompts of some rows as one batch, to be answered by the model."""

    @abstractmethod
    def answer_begins(self, batch: Batch) -> int:
        """At which position of what the model generates its answers begin."""

    @abstractmethod
    def form(self, tokenizer: Any, passages: Sequence[Passage]) -> Batch:
        """Passages as one batch, padded to the longest."""

    @abstractmethod
    def counted(self, batch: Batch) -> Tensor:
        """(predictions,) the tokens that count, in the order of `logits`."""

    def _prompt(self, tokenizer: Any, text: str, special: bool) -> Ids:
        """A text's tokens, without one that ends it."""
        ids = tokenizer(text, add_special_tokens=special)["input_ids"]
        return tuple(ids[:-1] if special and ids and ids[-1] in (tokenizer.eos_token_id, tokenizer.sep_token_id) else ids)  # fmt: skip

    def _generates_answers(self, spec: TaskSpec) -> bool:
        """Whether the experts' answers are what is adapted on."""
        return spec.answers == "generate"

    @abstractmethod
    def _joined(self, prompts: Prompts, row: int, answer: Ids) -> Passage:
        """A prompt, as a model was given it, with a model's answer."""

    @abstractmethod
    def _unnamed(self, value: Any, spec: TaskSpec) -> Answer | None:
        """What a row is scored by, where the recipe names no column of answers."""

    @abstractmethod
    def _passage(self, prompt: Ids, most: int) -> Passage:
        """What is adapted on while no answer is known."""

    def _predicts(self, passage: Passage) -> bool:
        """Whether there is anything to predict in a row."""
        return bool(passage.answer)

    @abstractmethod
    def _answered(self, prompts: Prompts, row: int, answer: str) -> Passage:
        """A prompt with an answer."""


class CausalModels(GeneratingModels):
    """The family of `AutoModelForCausalLM`."""

    kind = "text-generation"
    architectures = ("ForCausalLM", "LMHeadModel")

    def auto_class(self) -> Any:
        """The class of `transformers` that loads these models."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM

    def to_answer(self, prompts: Prompts, rows: Sequence[int]) -> Batch:
        """The prompts of some rows, padded at the start, so that answers begin at one position. Long ones lose their start."""
        return _masked([_last(prompts, row)[::-1] for row in rows], prompts.tokenizer, backwards=True)

    def answer_begins(self, batch: Batch) -> int:
        """Behind the prompts."""
        return batch["input_ids"].shape[1]

    def form(self, tokenizer: Any, passages: Sequence[Passage]) -> Batch:
        """Passages as one batch, padded at the end."""
        longest = max(passage.length for passage in passages)
        ids = torch.full((len(passages), longest), tokenizer.pad_token_id or 0)
        mask, counted = torch.zeros_like(ids), torch.zeros(ids.shape, dtype=torch.bool)
        for row, passage in enumerate(passages):
            ids[row, : passage.length] = torch.tensor([*passage.prompt, *passage.answer])
            mask[row, : passage.length] = 1
            counted[row, len(passage.prompt) : passage.length] = True
        return {"input_ids": ids, "attention_mask": mask, COUNTED: counted}

    def counted(self, batch: Batch) -> Tensor:
        """(predictions,) the tokens that count, input by input."""
        return batch["input_ids"][batch[COUNTED]]

    def logits(self, module: nn.Module, batch: Batch) -> Tensor:
        """(predictions, vocabulary) float32: of each token that counts what was predicted there, input by input."""
        out = module(**{key: value for key, value in batch.items() if key != COUNTED}).logits
        predicted: Tensor = out[:, :-1][batch[COUNTED][:, 1:]]
        return predicted.float()

    def _joined(self, prompts: Prompts, row: int, answer: Ids) -> Passage:
        return Passage(_last(prompts, row), answer)

    def _unnamed(self, value: Any, spec: TaskSpec) -> Answer | None:
        answer = closing_answer(value)
        return None if answer is None and self._generates_answers(spec) else Answer(answer)

    def _passage(self, prompt: Ids, most: int) -> Passage:
        return Passage(prompt[:1], prompt[1:most])

    def _answered(self, prompts: Prompts, row: int, answer: str) -> Passage:
        """The text goes on with the answer, tokenised as one, as lm-evaluation-harness does it; long prompts lose their start."""
        prompt, tokenizer = prompts.prompts[row], prompts.tokenizer
        whole = self._prompt(tokenizer, prompts.texts[row] + answer, special=prompts.special[row])
        ids = whole[len(prompt) :] or tuple(tokenizer(answer, add_special_tokens=False)["input_ids"])
        ids = ids[: prompts.most - 1]
        return Passage(prompt[-(prompts.most - len(ids)) :], ids)


class SequenceModels(GeneratingModels):
    """The family of `AutoModelForSeq2SeqLM`: an encoder reads the prompt, a decoder gives the answer."""

    kind = "text2text-generation"
    architectures = (
        *("T5ForConditionalGeneration", "BartForConditionalGeneration", "PegasusForConditionalGeneration"),
        *("PegasusXForConditionalGeneration", "BlenderbotForConditionalGeneration", "LEDForConditionalGeneration"),
        *("BlenderbotSmallForConditionalGeneration", "M2M100ForConditionalGeneration", "MvpForConditionalGeneration"),
        *("NllbMoeForConditionalGeneration", "ProphetNetForConditionalGeneration", "FSMTForConditionalGeneration"),
        *("SwitchTransformersForConditionalGeneration", "T5GemmaForConditionalGeneration", "MarianMTModel"),
    )

    def auto_class(self) -> Any:
        """The class of `transformers` that loads these models."""
        from transformers import AutoModelForSeq2SeqLM

        return AutoModelForSeq2SeqLM

    def to_answer(self, prompts: Prompts, rows: Sequence[int]) -> Batch:
        """The prompts of some rows, for the encoder."""
        return _masked([prompts.passages[row].prompt for row in rows], prompts.tokenizer)

    def answer_begins(self, batch: Batch) -> int:
        """Behind the token that the decoder starts from."""
        return 1

    def form(self, tokenizer: Any, passages: Sequence[Passage]) -> Batch:
        """Passages as one batch: prompts for the encoder, and the decoder's answers as `labels`, which it is given one late."""
        labels = _padded([passage.answer for passage in passages], IGNORED)
        encoded = _masked([passage.prompt for passage in passages], tokenizer)
        return {**encoded, "labels": labels, "decoder_attention_mask": (labels != IGNORED).long()}

    def counted(self, batch: Batch) -> Tensor:
        """(predictions,) the tokens that count, input by input."""
        return batch["labels"][batch["labels"] != IGNORED]

    def logits(self, module: nn.Module, batch: Batch) -> Tensor:
        """(predictions, vocabulary) float32: of each token that counts what was predicted there, input by input."""
        predicted: Tensor = module(**batch).logits[batch["labels"] != IGNORED]
        return predicted.float()

    def _prompt(self, tokenizer: Any, text: str, special: bool) -> Ids:
        """A text's tokens, its end among them: encoders were trained with it."""
        return tuple(tokenizer(text, add_special_tokens=special)["input_ids"])

    def _generates_answers(self, spec: TaskSpec) -> bool:
        return True

    def _joined(self, prompts: Prompts, row: int, answer: Ids) -> Passage:
        return Passage(prompts.passages[row].prompt, answer)

    def _unnamed(self, value: Any, spec: TaskSpec) -> Answer | None:
        answer = closing_answer(value)
        return None if answer is None else Answer(answer)

    def _passage(self, prompt: Ids, most: int) -> Passage:
        return Passage(prompt[:most], ())

    def _predicts(self, passage: Passage) -> bool:
        return bool(passage.prompt)

    def _answered(self, prompts: Prompts, row: int, answer: str) -> Passage:
        ids = prompts.tokenizer(text_target=answer)["input_ids"]
        return Passage(prompts.passages[row].prompt, tuple(ids[: prompts.most]))


def _last(prompts: Prompts, row: int) -> Ids:
    """The end of a prompt, as much as leaves room for an answer."""
    return prompts.prompts[row][-max(1, prompts.most - prompts.new_tokens) :]


def _padded(rows: Sequence[Ids], filler: int) -> Tensor:
    """(rows, longest) of rows of numbers, padded at the end."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[filler] * (longest - len(row))] for row in rows])


def _masked(rows: Sequence[Ids], tokenizer: Any, backwards: bool = False) -> Batch:
    """Tokens of several inputs, and which of them are padding.

    Arguments:
        backwards: inputs are given and read from their end, so that padding comes first.
    """
    batch = {
        "input_ids": _padded(rows, tokenizer.pad_token_id or 0),
        "attention_mask": _padded([(1,) * len(row) for row in rows], 0),
    }
    return {name: tensor.flip(1) for name, tensor in batch.items()} if backwards else batch


def _withheld(value: Any) -> bool:
    return value is None or value != value or str(value) == ""


def _options(given: Any) -> tuple[str, ...]:
    """A cell's options: a list, or a JSON list as text; empty if it is none."""
    if isinstance(given, str):
        try:
            given = parse_json(given)
        except ValueError:
            return ()
    plain = given.tolist() if hasattr(given, "tolist") else given
    return tuple(map(str, plain)) if isinstance(plain, (list, tuple)) else ()


def _chosen(value: Any, options: tuple[str, ...], where: str) -> Answer:
    """The option that is right: as text, or by its number, counted from 0."""
    if not options:
        raise DataError(f"{where} has no options: a list, or a JSON list as text, was needed.")
    if str(value) in options:
        return Answer(str(value), options)
    number = int(value) if str(value).isdecimal() else -1
    if not 0 <= number < len(options):
        raise DataError(f"{where} has answer {value!r}, which is none of its options {list(options)} nor the number of one.")  # fmt: skip
    return Answer(options[number], options)
