"""Inputs of generating models: running text, or prompts and what answers them, as tokens.

A passage is what a model reads at once and the tokens of it that count: those that it is to predict one after another, each
from all before it. Of running text every token counts but the first; of a prompt with an answer those of the answer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from adarank.data.task import Batch
from adarank.errors import DataError

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Passage:
    """What is read before the first token that counts, and the tokens that count."""

    prompt: Ids
    answer: Ids

    @property
    def length(self) -> int:
        """How many tokens it has."""
        return len(self.prompt) + len(self.answer)


@dataclass(frozen=True)
class Prompts:
    """A task's inputs without their answers. As `Examples` they are what the models predict when no answer is known.

    Attributes:
        tokenizer: of the task's expert.
        texts: of each row what stands before its answer, as text.
        special: of each row whether its special tokens are not in the text: templates write them.
        prompts: the rows as tokens, uncut.
        passages: of each row what is adapted on and measured without labels.
        most: how many tokens a passage has at most.
        lacks_answers: answers to the adapt and select rows have yet to be generated; their passages are none.
        max_new_tokens, stop: where generated answers end.
        form: brings passages to one batch, as the family's `logits` takes it.
    """

    tokenizer: Any
    texts: tuple[str, ...]
    special: tuple[bool, ...]
    prompts: tuple[Ids, ...]
    passages: tuple[Passage, ...]
    most: int
    max_new_tokens: int
    stop: tuple[str, ...]
    form: Callable[[Any, Sequence[Passage]], Batch]
    lacks_answers: bool = False

    @cached_property
    def lengths(self) -> Sequence[int]:
        """Tokens of each row."""
        return [passage.length for passage in self.passages]

    @cached_property
    def predictions(self) -> Sequence[int]:
        """How many predictions a model gives for each row: as many as tokens count."""
        return [len(passage.answer) for passage in self.passages]

    def batch(self, rows: Sequence[int]) -> Batch:
        """These rows' passages, padded to the longest of them."""
        return self.form(self.tokenizer, [self.passages[row] for row in rows])

    @property
    def new_tokens(self) -> int:
        """How many tokens an answer has at most, so that a prompt of one fits before it."""
        return max(1, min(self.max_new_tokens, self.most - 1))

    def text_of(self, answer: Ids) -> str:
        """An answer as text."""
        return str(self.tokenizer.decode(answer, skip_special_tokens=True))

    def before_stop(self, answer: Ids) -> str:
        """An answer as text, without what stopped it, and without space around it."""
        text = self.text_of(answer)
        return min((text.split(stop, 1)[0] for stop in self.stop), key=len, default=text).strip()

    def content(self) -> bytes:
        """Bytes that identify the inputs, for the task's fingerprint."""
        return repr([(passage.prompt, passage.answer) for passage in self.passages]).encode()


def is_chat(value: Any) -> bool:
    """True if a cell holds messages, each with a role and a content."""
    return isinstance(value, (list, tuple)) and all(isinstance(m, Mapping) and {"role", "content"} <= m.keys() for m in value)  # fmt: skip


def closing_answer(value: Any) -> str | None:
    """The last message of a conversation, if it is the assistant's: the answer to those before it."""
    if is_chat(value) and value and value[-1]["role"] == "assistant":
        return str(value[-1]["content"])
    return None


def input_key(value: Any) -> str:
    """What makes two inputs the same one."""
    return json.dumps(value, sort_keys=True, default=str) if is_chat(value) else str(value)


def rendered(value: Any, tokenizer: Any, where: str) -> tuple[str, bool]:
    """What a model reads before its answer as text, and whether special tokens have yet to be added to it.

    Messages go through the tokenizer's chat template, up to where the assistant's next message begins.

    Raises:
        DataError: there are messages, and no usable template.
    """
    if not is_chat(value):
        if not isinstance(value, (str, int, float)):
            raise DataError(f"{where}: a {type(value).__name__} where text, or a list of messages with role and content, was needed.")  # fmt: skip
        return str(value), True
    messages = [dict(message) for message in (value[:-1] if closing_answer(value) is not None else value)]
    if not messages:
        raise DataError(f"{where}: no message before the assistant's. Give what it answers.")
    if not tokenizer.chat_template:
        raise DataError(f"{where}: messages, and the expert's tokenizer has no chat template. Copy chat_template.jinja beside its weights, or give text.")  # fmt: skip
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)), False
    except Exception as error:  # templates raise whatever they like
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{where}: the chat template of the expert's tokenizer refuses its messages ({reason}).") from None  # fmt: skip
