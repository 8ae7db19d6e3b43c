"""Scores of generating models, counted token by token from what they predict, one batch in memory at a time.

    loss              -Σ log p(token | all before it) / tokens, in nats
    perplexity        exp(loss)
    token_accuracy    share of tokens that are the most probable one, in per cent
    exact_match       share of prompts whose greedy answer is the reference, spaces around both aside, in per cent
    choice_accuracy   share of prompts whose right option has the least summed loss of all options, in per cent

Tokens are those of the reference answers, or all of running text. Sums are over the whole split, so that each token
counts once, whatever passage it stands in.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from adarank.data.labels import Answer
from adarank.data.metrics import CHOICE_ACCURACY, EXACT_MATCH, LOSS, PERPLEXITY
from adarank.data.spec import Split
from adarank.data.task import TaskData
from adarank.errors import DataError
from adarank.io.progress import advance
from adarank.models.generation import GeneratingModels
from adarank.models.greedy import greedy_answers
from adarank.models.prompts import Passage, Prompts

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class TextLoss:
    """What a model gives the counted tokens of a passage.

    Attributes:
        tokens: how many there are.
        loss: their summed loss, in nats.
        right: how many of them are the most probable token.
    """

    tokens: int
    loss: float
    right: int


def score_text(family: GeneratingModels, module: nn.Module, data: TaskData, split: Split) -> float:
    """A model's score on one split of a task, by the task's metric.

    Raises:
        DataError: answers are missing, or the model's predictions are not finite.
    """
    prompts, answers = _references(data, split)
    if data.metric == CHOICE_ACCURACY:
        return _choice_accuracy(family, module, prompts, answers, data.name)
    if data.metric == EXACT_MATCH:
        return _exact_match(family, module, prompts, answers, data.name)
    passages = {row: family.scored(prompts, row, answer.text) for row, answer in answers.items()}
    losses = list(passage_losses(family, module, prompts, passages).values())
    tokens = sum(each.tokens for each in losses)
    mean = sum(each.loss for each in losses) / tokens
    if not math.isfinite(mean):
        raise DataError(f"task '{data.name}': the model's predictions are not finite, so that they have no {data.metric}.")  # fmt: skip
    if data.metric == LOSS:
        return mean
    if data.metric == PERPLEXITY:
        return math.exp(mean) if mean < 700 else math.inf
    return 100 * sum(each.right for each in losses) / tokens


@torch.no_grad()
def passage_losses(
    family: GeneratingModels, module: nn.Module, prompts: Prompts, passages: Mapping[K, Passage]
) -> dict[K, TextLoss]:
    """Of each passage the loss of the tokens that count, in batches of like length."""
    losses: dict[K, TextLoss] = {}
    for keys, logits, counted in _predicted(family, module, prompts, passages):
        each = functional.cross_entropy(logits, counted, reduction="none").double()
        right = logits.argmax(dim=-1) == counted
        sizes = [len(passages[key].answer) for key in keys]
        for key, loss, hits in zip(keys, each.split(sizes), right.split(sizes), strict=True):
            losses[key] = TextLoss(len(loss), float(loss.sum()), int(hits.sum()))
        advance(len(keys))
    return losses


def parts_of_loss(family: GeneratingModels, module: nn.Module, data: TaskData, split: Split) -> Iterator[Tensor]:
    """Scalars with their graphs, one for each batch of a split, which add up to the mean loss per token that counts."""
    prompts, answers = _references(data, split)
    passages = {row: family.scored(prompts, row, answer.text) for row, answer in answers.items()}
    tokens = sum(len(passage.answer) for passage in passages.values())
    for _, logits, counted in _predicted(family, module, prompts, passages):
        yield functional.cross_entropy(logits, counted, reduction="sum") / tokens


def _predicted(
    family: GeneratingModels, module: nn.Module, prompts: Prompts, passages: Mapping[K, Passage]
) -> Iterator[tuple[list[K], Tensor, Tensor]]:
    """(keys of passages, what the model predicts for their tokens that count, these tokens), in batches of like length."""
    device = next(module.parameters()).device
    for keys in _batches(passages, family.token_budget):
        formed = prompts.form(prompts.tokenizer, [passages[key] for key in keys])
        batch = {name: tensor.to(device) for name, tensor in formed.items()}
        yield keys, family.logits(module, batch), family.counted(batch)


def _references(data: TaskData, split: Split) -> tuple[Prompts, dict[int, Answer]]:
    """A task's prompts, and the answer of each row of a split."""
    rows = data.filled(split)
    answers = {row: label for row, label in zip(rows, data.targets(rows), strict=True) if isinstance(label, Answer)}
    assert isinstance(data.examples, Prompts)  # as this family encodes them
    return data.examples, answers


def _choice_accuracy(
    family: GeneratingModels, module: nn.Module, prompts: Prompts, answers: Mapping[int, Answer], task: str
) -> float:
    without = [row for row, answer in answers.items() if not answer.options]
    if without:
        raise DataError(f"task '{task}': {len(without)} rows have no options to choose from, and metric is {CHOICE_ACCURACY}. Name their column as columns: choices.")  # fmt: skip
    passages = {
        (row, option): family.scored(prompts, row, option)
        for row, answer in answers.items()
        for option in answer.options
    }
    losses = passage_losses(family, module, prompts, passages)
    right = sum(
        min(answer.options, key=lambda option: losses[row, option].loss) == answer.text
        for row, answer in answers.items()
    )
    return 100 * right / len(answers)


def _exact_match(
    family: GeneratingModels, module: nn.Module, prompts: Prompts, answers: Mapping[int, Answer], task: str
) -> float:
    without = [row for row, answer in answers.items() if answer.text is None]
    if without:
        raise DataError(f"task '{task}': {len(without)} rows have no answer to compare with, and metric is {EXACT_MATCH}. Name the answers' column as columns: answer.")  # fmt: skip
    given = {row: ids for part in greedy_answers(family, module, prompts, list(answers)) for row, ids in part.items()}
    right = sum(prompts.before_stop(given[row]) == str(answer.text).strip() for row, answer in answers.items())
    return 100 * right / len(answers)


def _batches(passages: Mapping[K, Passage], budget: int) -> Iterator[list[K]]:
    """Keys of passages, longest first, each batch at most `budget` padded tokens."""
    order = sorted(passages, key=lambda key: -passages[key].length)
    while order:
        count = max(1, budget // max(1, passages[order[0]].length))
        yield order[:count]
        order = order[count:]
