"""What tasks are scored by. Computed by scikit-learn and SciPy where they have it.

    single label    accuracy, f1 (two classes, of class 1), macro_f1, matthews, loss (cross-entropy)
    several labels  micro_f1, macro_f1, exact_match, loss (binary cross-entropy)        a class is predicted where its logit is > 0
    regression      pearson, spearman, loss (mean squared error)
    words           accuracy, entity_f1, macro_f1, loss, of the words that have a label
    spans           f1, exact_match, of the answers' words      multiple choice    accuracy
    vectors         spearman, pearson, of cosines with the similarities of pairs
    generation      perplexity, loss (cross-entropy per token, in nats), token_accuracy, exact_match, choice_accuracy

All are in per cent but loss and perplexity, which are as they are, and of which less is better. Those of generation are
counted token by token: see `models/text_scores.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from adarank.data.answers import cosines, entity_f1, words_with_labels
from adarank.data.labels import Label, Problem
from adarank.errors import DataError

Metric = Literal[
    "accuracy", "f1", "macro_f1", "micro_f1", "exact_match", "matthews", "pearson", "spearman", "loss",
    "perplexity", "token_accuracy", "choice_accuracy", "entity_f1",
]  # fmt: skip
METRICS: tuple[str, ...] = get_args(Metric)
LOSS = "loss"
PERPLEXITY, TOKEN_ACCURACY, CHOICE_ACCURACY = "perplexity", "token_accuracy", "choice_accuracy"
EXACT_MATCH = "exact_match"
ENTITY_F1 = "entity_f1"
_LESS = frozenset({LOSS, "bits_per_byte", "brier_score", "ter", "wer"})  # the last four are of lm-evaluation-harness

_DEFAULTS: dict[Problem, str] = {
    "single_label_classification": "accuracy",
    "multi_label_classification": "micro_f1",
    "regression": "pearson",
    "generation": PERPLEXITY,
    "token_classification": "accuracy",
    "spans": "f1",
    "multiple_choice": "accuracy",
    "embedding": "spearman",
}
_KNOWN: dict[Problem, tuple[str, ...]] = {
    "single_label_classification": ("accuracy", "f1", "macro_f1", "matthews", LOSS),
    "multi_label_classification": ("micro_f1", "macro_f1", EXACT_MATCH, LOSS),
    "regression": ("pearson", "spearman", LOSS),
    "generation": (PERPLEXITY, LOSS, TOKEN_ACCURACY, EXACT_MATCH, CHOICE_ACCURACY),
    "token_classification": ("accuracy", ENTITY_F1, "macro_f1", LOSS),
    "spans": ("f1", EXACT_MATCH),
    "multiple_choice": ("accuracy",),
    "embedding": ("spearman", "pearson"),
}


def less_is_better(metric: str) -> bool:
    """True of losses and perplexities: they are as they are, not in per cent, and the smaller the better."""
    return metric in _LESS or metric.split(" ")[0].endswith(PERPLEXITY)


def chosen_metric(metric: str | None, problem: Problem, classes: int, where: str) -> str:
    """The metric that a task is scored by: the one given, else its problem's own.

    Arguments:
        classes: how many outputs the network has.
        where: what an error begins with, such as `task 'mood'`.

    Raises:
        DataError: the metric given is not for this problem.
    """
    known = _KNOWN[problem]
    if metric is None:
        return _DEFAULTS[problem]
    if metric not in known:
        raise DataError(f"{where}: metric '{metric}' is not for {problem.replace('_', ' ')}. Give {', '.join(known)}.")
    if metric == "f1" and classes != 2 and problem != "spans":
        raise DataError(f"{where}: metric 'f1' is of two classes, and there are {classes}. Give macro_f1.")
    return metric


def has_loss(problem: Problem) -> bool:
    """True if networks of this problem are scored by a loss, too."""
    return LOSS in _KNOWN[problem]


def problem_by_labels(labels: Sequence[Any], outputs: int) -> Problem:
    """What labels and the number of a network's outputs tell of its problem, where no configuration does."""
    if outputs == 1:
        return "regression"
    several = bool(labels) and isinstance(labels[0], (list, tuple))
    return "multi_label_classification" if several else "single_label_classification"


def score(labels: Sequence[Label], logits: Tensor, metric: str, problem: Problem, names: Sequence[str] = ()) -> float:
    """The score of a network's outputs, in per cent but for a loss.

    A correlation with a constant is 0, as that of Matthews is.

    Arguments:
        labels: of each input: its class, the numbers of its classes, its number, the classes of its words, or the similarity of
            its two texts.
        logits: (inputs, outputs); of words (inputs, words, classes), of vectors (inputs, 2, width).
        names: of the classes, where entities are counted by them.

    Raises:
        DataError: an output that the metric takes for a number is not finite.
    """
    if metric == ENTITY_F1:
        return 100 * entity_f1(labels, logits, names)  # type: ignore[arg-type]
    labels, logits, problem = _one_each(labels, logits, problem)
    if (metric == LOSS or problem == "regression") and not bool(torch.isfinite(logits).all()):
        raise DataError(f"{metric}: the network gives values that are not finite, so that they have no {metric}.")
    if metric == LOSS:
        return float(loss(labels, logits.double(), problem))
    if problem == "regression":
        return 100 * _correlation(np.array(labels, dtype=float), logits[:, 0].double().numpy(), metric)
    return 100 * _counted(metric)(*_sides(labels, logits, problem))


def _one_each(labels: Sequence[Label], logits: Tensor, problem: Problem) -> tuple[Sequence[Label], Tensor, Problem]:
    """Words as inputs of one class each, and pairs of vectors as a number each; others as they are."""
    if problem == "token_classification":
        return *words_with_labels(labels, logits), "single_label_classification"  # type: ignore[arg-type]
    return (labels, cosines(logits), "regression") if problem == "embedding" else (labels, logits, problem)


def loss(labels: Sequence[Label], logits: Tensor, problem: Problem) -> Tensor:
    """The mean loss that `transformers` trains such a network by, a scalar with a gradient. Arguments as for `score`."""
    if problem == "regression":
        return functional.mse_loss(logits[:, 0], torch.tensor(labels, dtype=torch.float64).to(logits))
    if problem == "multi_label_classification":
        wanted = torch.from_numpy(indicators(labels, logits.shape[1])).to(logits)
        return functional.binary_cross_entropy_with_logits(logits, wanted)
    return functional.cross_entropy(logits, torch.tensor(labels, device=logits.device))


def predictions(logits: Tensor, problem: Problem) -> Any:
    """What is predicted: the class of each input as a list; of several labels a (inputs, classes) array of 0 and 1."""
    return (logits > 0).int().numpy() if problem == "multi_label_classification" else logits.argmax(dim=-1).tolist()


def indicators(labels: Sequence[Label], classes: int) -> np.ndarray[Any, Any]:
    """(inputs, classes) of 0 and 1 from the numbers of each input's classes."""
    table = np.zeros((len(labels), classes), dtype=int)
    for row, numbers in enumerate(labels):
        table[row, list(numbers)] = 1  # type: ignore[arg-type,index]
    return table


@dataclass(frozen=True)
class ClassScore:
    """One class: how many inputs have it, and precision, recall and F1 in per cent."""

    name: str
    inputs: int
    precision: float
    recall: float
    f1: float


def class_scores(
    labels: Sequence[Label], logits: Tensor, problem: Problem, names: Sequence[str]
) -> tuple[ClassScore, ...]:
    """What a network's outputs come to class by class; nothing where there are no classes of all inputs. Arguments as for `score`.

    Precision of a class that is never predicted, and recall of one that no input has, are 0.

    Arguments:
        names: of the classes, in the order of their numbers.
    """
    labels, logits, problem = _one_each(labels, logits, problem)
    if problem in ("regression", "multiple_choice", "spans"):
        return ()
    from sklearn.metrics import precision_recall_fscore_support

    parts = precision_recall_fscore_support(
        *_sides(labels, logits, problem), labels=range(logits.shape[1]), zero_division=0
    )
    named = [*names, *map(str, range(len(names), logits.shape[1]))]
    return tuple(
        ClassScore(name, int(inputs), *(100 * float(share) for share in shares))
        for name, *shares, inputs in zip(named, *parts, strict=True)
    )


def _sides(labels: Sequence[Label], logits: Tensor, problem: Problem) -> tuple[Any, Any]:
    several = problem == "multi_label_classification"
    return indicators(labels, logits.shape[1]) if several else labels, predictions(logits, problem)


def _counted(metric: str) -> Callable[[Any, Any], float]:
    from sklearn import metrics  # imported on use: it is slow, and merging needs none

    if metric in ("accuracy", EXACT_MATCH):
        return lambda labels, given: float(metrics.accuracy_score(labels, given))
    if metric == "matthews":
        return lambda labels, given: float(metrics.matthews_corrcoef(labels, given))
    average = {"f1": "binary", "macro_f1": "macro", "micro_f1": "micro"}[metric]
    return lambda labels, given: float(metrics.f1_score(labels, given, average=average, zero_division=0))


def _correlation(labels: np.ndarray[Any, Any], given: np.ndarray[Any, Any], metric: str) -> float:
    from scipy import stats  # imported on use: it is slow, and merging needs none

    if len(labels) < 2 or np.ptp(labels) == 0 or np.ptp(given) == 0:
        return 0.0
    return float((stats.pearsonr if metric == "pearson" else stats.spearmanr)(labels, given).statistic)
