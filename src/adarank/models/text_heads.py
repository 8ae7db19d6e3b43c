"""Heads on text models that give more than one class of an input: a class of each word, a span of the context, a choice.

token-classification   any architecture of `AutoModelForTokenClassification`     (inputs, words, classes), NaN where no word is
question-answering     any architecture of `AutoModelForQuestionAnswering`       (inputs, 2, tokens), -∞ where no answer can be
multiple-choice        any architecture of `AutoModelForMultipleChoice`          (inputs, options), -∞ where no option is
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from adarank.data.answers import best_spans
from adarank.data.labels import Label, Problem, word_labels
from adarank.data.read import Table
from adarank.data.spec import TaskSpec
from adarank.data.task import Batch
from adarank.errors import DataError
from adarank.io.parsing import parse_json
from adarank.models.text import TextClassifiers, check_text, positions, tokenizer_of

FIRST = "first_tokens"  # key of a batch: (inputs, words), where each word's first token is; -1 where there is no word
CONTEXT = "context_tokens"  # (inputs, tokens), which may be part of an answer
OPTIONS = "options"  # (inputs, options), which there are


def listed(value: Any) -> list[Any] | None:
    """A cell that is a list, or a JSON list as text; None if it is neither."""
    if isinstance(value, str):
        try:
            value = parse_json(value)
        except ValueError:
            return None
    plain = value.tolist() if hasattr(value, "tolist") else value
    return list(plain) if isinstance(plain, (list, tuple)) else None


def padded(tokenizer: Any, encoded: Mapping[str, Sequence[Any]], rows: Sequence[int]) -> dict[str, Tensor]:
    """Rows of encoded inputs as a batch, padded to the longest."""
    batch: Any = tokenizer.pad(
        {key: [values[row] for row in rows] for key, values in encoded.items()}, return_tensors="pt"
    )
    return dict(batch)


class WordExamples:
    """Words, tokenised, with the place of the first token of each.

    Attributes:
        first: of each row the places of its words' first tokens, without words that were cut.
    """

    def __init__(self, tokenizer: Any, words: Sequence[Sequence[str]], most: int) -> None:
        encoded = tokenizer([list(row) for row in words], is_split_into_words=True, truncation=True, max_length=most)
        self.first = [_first_tokens(encoded.word_ids(row)) for row in range(len(words))]
        self._tokenizer, self._encoded = tokenizer, dict(encoded)
        self._words = max(map(len, words))
        self.lengths: Sequence[int] = [len(ids) for ids in encoded["input_ids"]]

    def batch(self, rows: Sequence[int]) -> Batch:
        """The inputs of these rows, and where their words are."""
        first = torch.full((len(rows), self._words), -1)
        for place, row in enumerate(rows):
            first[place, : len(self.first[row])] = torch.tensor(self.first[row])
        return {**padded(self._tokenizer, self._encoded, rows), FIRST: first}

    def content(self) -> bytes:
        """Bytes that identify the inputs, for the task's fingerprint."""
        return repr((sorted(self._encoded.items()), self.first)).encode()


def _first_tokens(words: Sequence[int | None]) -> list[int]:
    """Places of the first token of each word."""
    places: dict[int, int] = {}
    for place, word in enumerate(words):
        if word is not None:
            places.setdefault(word, place)
    return [places[word] for word in sorted(places)]


class TokenClassifiers(TextClassifiers):
    """The family of `AutoModelForTokenClassification`: inputs are lists of words, labels lists of as many classes."""

    kind = "token-classification"
    architectures = ("ForTokenClassification",)
    by_class = True

    def auto_class(self) -> Any:
        """The class of `transformers` that loads these models."""
        from transformers import AutoModelForTokenClassification

        return AutoModelForTokenClassification

    def problem(self, config: Mapping[str, Any]) -> Problem:
        """A class of each word."""
        return "token_classification"

    def columns(self, spec: TaskSpec) -> list[str]:
        """The column of words."""
        return [spec.columns.text]

    def key(self, value: Any) -> Hashable:
        """What makes two inputs the same one."""
        return tuple(map(str, listed(value) or [value]))

    def labels(self, table: Table, spec: TaskSpec, config: Mapping[str, Any], task: str) -> list[Label | None]:
        """Of each row the classes of its words, -1 where a word has none.

        Raises:
            DataError: a label is none that the expert knows, or there are not as many as words.
        """
        if spec.columns.label not in table:
            return [None] * len(table[spec.columns.text])
        return [
            None if value is None else word_labels(listed(value), len(listed(words) or ()), config, task, row)
            for row, (value, words) in enumerate(zip(table[spec.columns.label], table[spec.columns.text], strict=True), start=1)
        ]  # fmt: skip

    def encode(self, table: Table, spec: TaskSpec, folder: Path) -> tuple[Any, list[str]]:
        """The words of a table as the model takes them, and notes about them.

        Raises:
            DataError: a row is no list of words.
        """
        rows = [listed(value) for value in table[spec.columns.text]]
        wrong = [number for number, words in enumerate(rows, start=1) if not words]
        if wrong:
            raise DataError(f"task '{spec.name}', row {wrong[0]}: no list of words. Give a list, or a JSON list as text, in column '{spec.columns.text}'.")  # fmt: skip
        words = [[str(word) for word in row or ()] for row in rows]
        check_text(spec.name or "", [[" ".join(row) for row in words]])
        tokenizer = tokenizer_of(folder)
        _refuse_slow(tokenizer, folder, "where words begin")
        most = min(spec.max_length, positions(folder, tokenizer))
        examples = WordExamples(tokenizer, words, most)
        cut = sum(len(row) - len(first) for row, first in zip(words, examples.first, strict=True))
        notes = [f"{cut} words stand behind the limit of {most} tokens and are left out"] if cut else []
        return examples, notes

    def logits(self, module: nn.Module, batch: Batch) -> Tensor:
        """(inputs, words, classes) float32, NaN where there is no word."""
        first = batch[FIRST]
        of_tokens: Tensor = module(**_without(batch, FIRST)).logits.float()
        of_words = of_tokens.gather(1, first.clamp_min(0)[..., None].expand(-1, -1, of_tokens.shape[-1]))
        return of_words.masked_fill((first < 0)[..., None], torch.nan)


class SpanExamples:
    """Questions and contexts, tokenised, with the places of the contexts' tokens in the text."""

    def __init__(self, tokenizer: Any, questions: Sequence[str], contexts: Sequence[str], most: int) -> None:
        encoded = tokenizer(
            list(questions), list(contexts), truncation="only_second", max_length=most, return_offsets_mapping=True
        )
        offsets = encoded.pop("offset_mapping")
        self._contexts, self._tokenizer = contexts, tokenizer
        parts = [encoded.sequence_ids(row) for row in range(len(contexts))]
        # of each row and token the characters of the context; None where no answer can be
        self._places = [[tuple(place) if part == 1 else None for place, part in zip(*row, strict=True)] for row in zip(offsets, parts, strict=True)]  # fmt: skip
        self._encoded = dict(encoded)
        self.lengths: Sequence[int] = [len(ids) for ids in encoded["input_ids"]]
        self._longest = max(self.lengths)

    def batch(self, rows: Sequence[int]) -> Batch:
        """The inputs of these rows, and which of their tokens may be part of an answer."""
        context = torch.zeros((len(rows), self._longest), dtype=torch.bool)
        for place, row in enumerate(rows):
            context[place, : self.lengths[row]] = torch.tensor([where is not None for where in self._places[row]])
        return {**padded(self._tokenizer, self._encoded, rows), CONTEXT: context}

    def content(self) -> bytes:
        """Bytes that identify the inputs, for the task's fingerprint."""
        return repr(sorted(self._encoded.items())).encode()

    def answers(self, rows: Sequence[int], outputs: Tensor) -> list[str]:
        """The texts of the best spans.

        Arguments:
            outputs: (rows, 2, tokens).
        """
        return [self._text(row, *span) for row, span in zip(rows, best_spans(outputs), strict=True)]

    def _text(self, row: int, first: int, last: int) -> str:
        places = self._places[row]
        begin, end = (places[at] if at < len(places) else None for at in (first, last))
        return "" if begin is None or end is None else self._contexts[row][begin[0] : end[1]]


class QuestionAnswering(TextClassifiers):
    """The family of `AutoModelForQuestionAnswering`: `text` asks, `text_pair` is the context that holds the answer."""

    kind = "question-answering"
    architectures = ("ForQuestionAnswering",)
    by_class = True

    def auto_class(self) -> Any:
        """The class of `transformers` that loads these models."""
        from transformers import AutoModelForQuestionAnswering

        return AutoModelForQuestionAnswering

    def problem(self, config: Mapping[str, Any]) -> Problem:
        """A span of the context."""
        return "spans"

    def class_names(self, config: Mapping[str, Any], task: str) -> tuple[str, ...]:
        """None: an answer is no class."""
        return ()

    def columns(self, spec: TaskSpec) -> list[str]:
        """The columns of questions and contexts."""
        return [spec.columns.text, spec.columns.text_pair or "context"]

    def labels(self, table: Table, spec: TaskSpec, config: Mapping[str, Any], task: str) -> list[Label | None]:
        """Of each row its right answers: a text, a list of texts, or `{"text": [...]}` as SQuAD has them.

        Raises:
            DataError: a cell holds none.
        """
        if spec.columns.label not in table:
            return [None] * len(table[spec.columns.text])
        return [_right_answers(value, task, row) for row, value in enumerate(table[spec.columns.label], start=1)]

    def encode(self, table: Table, spec: TaskSpec, folder: Path) -> tuple[Any, list[str]]:
        """Questions and contexts as the model takes them, and notes about them.

        Raises:
            DataError: a question leaves no room for its context.
        """
        questions, contexts = ([str(value) for value in table[column]] for column in self.columns(spec))
        check_text(spec.name or "", [questions, contexts])
        tokenizer = tokenizer_of(folder)
        _refuse_slow(tokenizer, folder, "where answers stand")
        most = min(spec.max_length, positions(folder, tokenizer))
        room = most - tokenizer.num_special_tokens_to_add(pair=True)
        long = [row for row, text in enumerate(questions, start=1) if len(tokenizer.tokenize(text)) >= room]
        if long:
            raise DataError(f"task '{spec.name}': {len(long)} questions leave no room for a context in {most} tokens, such as row {long[0]}. Raise max_length.")  # fmt: skip
        empty = [row for row, text in enumerate(contexts, start=1) if not tokenizer.tokenize(text)]
        if empty:
            raise DataError(f"task '{spec.name}': {len(empty)} contexts are empty, such as that of row {empty[0]}. Take these rows out.")  # fmt: skip
        examples = SpanExamples(tokenizer, questions, contexts, most)
        cut = sum(length >= most for length in examples.lengths)
        notes = [f"{cut} of {len(questions)} contexts reach the limit of {most} tokens and are cut there, with answers that stand behind it"] if cut else []  # fmt: skip
        return examples, notes

    def logits(self, module: nn.Module, batch: Batch) -> Tensor:
        """(inputs, 2, tokens) float32: of each token that the answer begins there, and that it ends there."""
        context = batch[CONTEXT]
        out = module(**_without(batch, CONTEXT))
        both = torch.stack([out.start_logits, out.end_logits], dim=1).float()
        wide = functional.pad(both, (0, context.shape[1] - both.shape[-1]))
        return wide.masked_fill(~context[:, None], -torch.inf)


class ChoiceExamples:
    """Prompts with the options of each, tokenised as pairs."""

    def __init__(self, tokenizer: Any, prompts: Sequence[str], options: Sequence[Sequence[str]], most: int) -> None:
        self._counts = [len(row) for row in options]
        self._starts = [sum(self._counts[:row]) for row in range(len(options))]
        pairs = [(prompt, option) for prompt, row in zip(prompts, options, strict=True) for option in row]
        encoded = tokenizer([a for a, _ in pairs], [b for _, b in pairs], truncation=True, max_length=most)
        self._tokenizer, self._encoded, self._most = tokenizer, dict(encoded), max(self._counts)
        lengths = [len(ids) for ids in encoded["input_ids"]]
        self.lengths: Sequence[int] = [
            sum(lengths[start : start + count]) for start, count in zip(self._starts, self._counts, strict=True)
        ]
        self.cut = sum(length >= most for length in lengths)

    def batch(self, rows: Sequence[int]) -> Batch:
        """(rows, options, tokens) of each key; rows with fewer options than the task's most repeat their first."""
        places = [self._starts[row] + (at if at < self._counts[row] else 0) for row in rows for at in range(self._most)]
        there = torch.tensor([[at < self._counts[row] for at in range(self._most)] for row in rows])
        flat = padded(self._tokenizer, self._encoded, places)
        return {**{key: value.view(len(rows), self._most, -1) for key, value in flat.items()}, OPTIONS: there}

    def content(self) -> bytes:
        """Bytes that identify the inputs, for the task's fingerprint."""
        return repr((sorted(self._encoded.items()), self._counts)).encode()


class MultipleChoice(TextClassifiers):
    """The family of `AutoModelForMultipleChoice`: `text` is the prompt, `choices` the column of its options."""

    kind = "multiple-choice"
    architectures = ("ForMultipleChoice",)
    by_class = True

    def auto_class(self) -> Any:
        """The class of `transformers` that loads these models."""
        from transformers import AutoModelForMultipleChoice

        return AutoModelForMultipleChoice

    def problem(self, config: Mapping[str, Any]) -> Problem:
        """One of an input's options."""
        return "multiple_choice"

    def class_names(self, config: Mapping[str, Any], task: str) -> tuple[str, ...]:
        """None: each input has options of its own."""
        return ()

    def without_effect(self, spec: TaskSpec) -> list[str]:
        """Settings of generating models but for the options."""
        columns = spec.columns.model_copy(update={"choices": None})
        return super().without_effect(spec.model_copy(update={"columns": columns}))

    def columns(self, spec: TaskSpec) -> list[str]:
        """The columns of prompts and options."""
        return [spec.columns.text, spec.columns.choices or "choices"]

    def key(self, value: Any) -> Hashable:
        """What makes two inputs the same one."""
        return str(value.tolist() if hasattr(value, "tolist") else value)

    def labels(self, table: Table, spec: TaskSpec, config: Mapping[str, Any], task: str) -> list[Label | None]:
        """Of each row the number of its right option, counted from 0; cells may hold the option itself.

        Raises:
            DataError: it is none of the row's options.
        """
        prompts, options = self.columns(spec)
        if spec.columns.label not in table:
            return [None] * len(table[prompts])
        return [
            _right_option(value, listed(given) or [], f"task '{task}': row {row}")
            for row, (value, given) in enumerate(zip(table[spec.columns.label], table[options], strict=True), start=1)
        ]

    def encode(self, table: Table, spec: TaskSpec, folder: Path) -> tuple[Any, list[str]]:
        """Prompts and options as the model takes them, and notes about them.

        Raises:
            DataError: a row has not two options.
        """
        prompts, options = self.columns(spec)
        rows = [[str(option) for option in listed(value) or ()] for value in table[options]]
        few = [number for number, row in enumerate(rows, start=1) if len(row) < 2]
        if few:
            raise DataError(f"task '{spec.name}', row {few[0]}: fewer than two options. Give a list, or a JSON list as text, in column '{options}'.")  # fmt: skip
        texts = [str(value) for value in table[prompts]]
        check_text(spec.name or "", [texts, [" ".join(row) for row in rows]])
        tokenizer = tokenizer_of(folder)
        most = min(spec.max_length, positions(folder, tokenizer))
        examples = ChoiceExamples(tokenizer, texts, rows, most)
        notes = [f"{examples.cut} of {sum(map(len, rows))} options reach the limit of {most} tokens and are cut there"] if examples.cut else []  # fmt: skip
        return examples, notes

    def logits(self, module: nn.Module, batch: Batch) -> Tensor:
        """(inputs, options) float32, -∞ where an input has fewer."""
        given: Tensor = module(**_without(batch, OPTIONS)).logits.float()
        return given.masked_fill(~batch[OPTIONS], -torch.inf)


def _without(batch: Batch, key: str) -> dict[str, Tensor]:
    return {name: value for name, value in batch.items() if name != key}


def _refuse_slow(tokenizer: Any, folder: Path, what: str) -> None:
    if not tokenizer.is_fast:
        raise DataError(f"{folder}: its tokenizer does not tell {what}. Save it as tokenizer.json (a fast tokenizer).")


def _right_answers(value: Any, task: str, row: int) -> tuple[str, ...] | None:
    if isinstance(value, str) and value.lstrip().startswith(("{", "[")):
        with suppress(ValueError):  # a text that begins with a bracket
            value = parse_json(value)
    given = value.get("text") if isinstance(value, Mapping) else value
    if given is None or given != given:
        return None
    texts = [given] if isinstance(given, str) else listed(given)
    if texts is None or not all(isinstance(text, str) for text in texts):
        raise DataError(f"task '{task}': row {row} has answer {value!r}. Give a text, a list of texts, or {{\"text\": [...]}}.")  # fmt: skip
    return tuple(texts)


def _right_option(value: Any, options: list[Any], where: str) -> int | None:
    if value is None or value != value or str(value).strip() in ("", "-1"):
        return None
    texts = [str(option) for option in options]
    if str(value) in texts and not isinstance(value, int):
        return texts.index(str(value))
    number = int(value) if str(value).strip().isdecimal() else -1
    if not 0 <= number < len(options):
        raise DataError(f"{where} has label {value!r}, which is none of its {len(options)} options nor the number of one, counted from 0.")  # fmt: skip
    return number
