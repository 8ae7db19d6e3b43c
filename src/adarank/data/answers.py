"""Scores of outputs with more than one class of an input: entities in words, spans as answers, similarities of vectors.

entity_f1   an entity is right where its class and all of its words are (CoNLL-2003; tags as IOB2, or IO where none begins)
f1          of an answer's words with those of the right answer that it has most of; exact_match where they are the same.
            Both as SQuAD 1.1 and 2.0 count them: case, punctuation and articles count nothing.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional

LONGEST_ANSWER = 30  # tokens, as the scripts of SQuAD have it


def words_with_labels(labels: Sequence[Sequence[int]], outputs: Tensor) -> tuple[list[int], Tensor]:
    """Labels and (words, classes) logits of the words that have both.

    Arguments:
        labels: of each input the classes of its words; -1 of words without one.
        outputs: (inputs, words, classes), NaN where no word is.
    """
    counted = _counted(labels, outputs)
    flat = [label for row, there in zip(labels, counted.tolist(), strict=True) for label, of_word in zip(row, there, strict=False) if of_word]  # fmt: skip
    return flat, outputs[counted]


def entity_f1(labels: Sequence[Sequence[int]], outputs: Tensor, names: Sequence[str]) -> float:
    """Micro F1 of entities, 0 to 1. Arguments as for `words_with_labels`; `names` are those of the classes.

    Example:
        outputs = torch.tensor([[[0.0, 9.0], [9.0, 0.0]]])
        assert entity_f1([(1, 0)], outputs, ["O", "B-PER"]) == 1.0
    """
    counted, predicted = _counted(labels, outputs), outputs.nan_to_num(-torch.inf).argmax(dim=-1)
    right = given = wanted = 0
    for row, there, classes in zip(labels, counted.tolist(), predicted.tolist(), strict=True):
        places = [at for at, of_word in enumerate(there) if of_word]
        mine = set(entities([names[classes[at]] for at in places]))
        theirs = set(entities([names[row[at]] for at in places]))
        right, given, wanted = right + len(mine & theirs), given + len(mine), wanted + len(theirs)
    return 2 * right / (given + wanted) if given + wanted else 1.0


def entities(tags: Sequence[str]) -> Iterator[tuple[str, int, int]]:
    """(class, first word, last word) of each entity: `B-X` begins one, `I-X` goes on with one of its class or begins one."""
    open_class, first = "", 0
    for at, tag in enumerate([*tags, "O"]):
        prefix, _, kind = tag.partition("-") if tag[:2] in ("B-", "I-") else ("", "", "" if tag == "O" else tag)
        if open_class and (kind != open_class or prefix == "B"):
            yield open_class, first, at - 1
            open_class = ""
        if kind and not open_class:
            open_class, first = kind, at


def best_spans(outputs: Tensor) -> list[tuple[int, int]]:
    """(first, last) token of the likeliest span of each input, of at most `LONGEST_ANSWER` tokens.

    Arguments:
        outputs: (inputs, 2, tokens): where answers begin and end.
    """
    sums = outputs[:, 0, :, None] + outputs[:, 1, None, :]
    allowed = torch.ones(sums.shape[1:], dtype=torch.bool).triu().tril(LONGEST_ANSWER - 1)
    best = sums.masked_fill(~allowed, -torch.inf).flatten(1).argmax(dim=1).tolist()
    return [divmod(place, outputs.shape[-1]) for place in best]


def answer_score(answers: Sequence[Sequence[str]], given: Sequence[str], metric: str) -> float:
    """Mean F1 or share of exact matches, 0 to 1.

    Arguments:
        answers: of each input its right answers; none where the right answer is that there is none.
        metric: `f1` or `exact_match`.
    """
    each = _shared_words if metric == "f1" else lambda a, b: float(a == b)
    scores = [max(each(_words(text), _words(one)) for one in right or ("",)) for right, text in zip(answers, given, strict=True)]  # fmt: skip
    return sum(scores) / len(scores)


def cosines(outputs: Tensor) -> Tensor:
    """(inputs, 1) cosine of the two vectors of each input, (inputs, 2, width)."""
    return functional.cosine_similarity(outputs[:, 0].double(), outputs[:, 1].double(), dim=-1)[:, None]


def _counted(labels: Sequence[Sequence[int]], outputs: Tensor) -> Tensor:
    """(inputs, words) that have a label, and logits."""
    labelled = torch.zeros(outputs.shape[:2], dtype=torch.bool)
    for row, classes in enumerate(labels):
        known = torch.tensor([label >= 0 for label in classes])[: outputs.shape[1]]
        labelled[row, : len(known)] = known
    return labelled & ~outputs.isnan().all(dim=-1)


def _words(text: str) -> list[str]:
    """A text's words without case, punctuation and articles."""
    plain = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def _shared_words(given: list[str], right: list[str]) -> float:
    """F1 of two bags of words; of two empty ones 1."""
    if not given or not right:
        return float(given == right)
    return 2 * sum((Counter(given) & Counter(right)).values()) / (len(given) + len(right))
