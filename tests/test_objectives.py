"""Objectives: their values against numpy, their slopes, and what they leave out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from adarank.adapt import AdaptSettings
from adarank.adapt.objectives import (
    OBJECTIVES,
    SelfLabel,
    View,
    divergences,
    entropy,
    feature_distance,
    filtered_entropy,
    infomax,
    objective,
    running_mean,
    self_label,
)
from adarank.adapt.top_logits import TopLogits
from adarank.errors import RecipeError
from adarank.settings import parse
from make import randn

SHAPES = st.tuples(st.integers(1, 6), st.integers(2, 5), st.integers(0, 10**6))


def softmax(x: np.ndarray) -> np.ndarray:
    powers = np.exp(x - x.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def pair(shape: tuple[int, int, int], spread: float = 2.0) -> tuple[Tensor, Tensor]:
    rows, classes, seed = shape
    return (spread * randn(seed + i, rows, classes, dtype=torch.float64) for i in (0, 1))  # type: ignore[return-value]


def slope(loss: Tensor, at: Tensor) -> Tensor:
    return torch.autograd.grad(loss, at)[0]


@given(SHAPES)
def test_entropy_is_numpys(shape: tuple[int, int, int]) -> None:
    logits, _ = pair(shape)
    p = softmax(logits.numpy())
    assert float(entropy(logits)) == pytest.approx(np.mean([-sum(q * math.log(q) for q in row) for row in p]))


@given(SHAPES, st.sampled_from([0.5, 1.0, 3.0]), st.sampled_from([0.0, 0.5, 0.8]))
def test_soft_self_labels_are_numpys(shape: tuple[int, int, int], temperature: float, confidence: float) -> None:
    logits, expert = pair(shape)
    p, q = softmax(logits.numpy() / temperature), softmax(expert.numpy() / temperature)
    sure = softmax(expert.numpy()).max(axis=1) >= confidence
    wanted = [temperature**2 * float(np.sum(b * np.log(b / a))) for a, b, use in zip(p, q, sure, strict=True) if use]
    found = self_label(logits, expert, temperature, confidence=confidence)
    assert float(found) == pytest.approx(np.mean(wanted) if wanted else 0.0, abs=1e-12)


@given(SHAPES)
def test_hard_self_labels_are_the_log_loss_of_the_experts_class(shape: tuple[int, int, int]) -> None:
    logits, expert = pair(shape)
    p = softmax(logits.numpy())
    wanted = np.mean([-math.log(row[label]) for row, label in zip(p, expert.numpy().argmax(axis=1), strict=True)])
    assert float(self_label(logits, expert, hard=True)) == pytest.approx(wanted)


def test_a_step_down_self_label_moves_towards_the_expert() -> None:
    logits, expert = torch.zeros(1, 2, requires_grad=True), torch.tensor([[3.0, 0.0]])
    for hard in (False, True):
        down = -slope(self_label(logits, expert, hard=hard), logits)
        assert down[0, 0] > 0 > down[0, 1]


def test_inputs_where_the_expert_is_unsure_have_no_slope() -> None:
    logits, expert = randn(1, 3, 2).requires_grad_(), torch.tensor([[4.0, 0.0], [0.1, 0.0], [0.0, 4.0]])
    found = slope(self_label(logits, expert, confidence=0.9), logits)
    assert found[1].abs().max() == 0
    assert (found[[0, 2]].abs().amax(dim=1) > 0).all()
    assert slope(self_label(logits, expert, confidence=0.99), logits).abs().max() == 0


@given(SHAPES, st.booleans(), st.sampled_from([0.5, 0.9]))
def test_infomax_is_numpys_and_its_slope_that_of_the_whole_mean(
    shape: tuple[int, int, int], has_past: bool, momentum: float
) -> None:
    """The slope: autograd through the running mean, with the second term made up for this batch's small share."""
    logits, _ = pair(shape)
    past = torch.softmax(randn(5, shape[1], dtype=torch.float64), 0) if has_past else None
    logits.requires_grad_()
    own = logits.softmax(dim=-1).mean(dim=0)
    mixed = momentum * past + (1 - momentum) * own if past is not None else own
    wanted = entropy(logits) - -(mixed * mixed.log()).sum() / (1 - momentum if past is not None else 1)
    mean = running_mean(logits, past, momentum)
    m = mixed.detach().numpy()
    p = softmax(logits.detach().numpy())
    found = infomax(logits, mean)
    assert float(found.detach()) == pytest.approx(float(-(p * np.log(p)).sum(axis=1).mean() + (m * np.log(m)).sum()))
    torch.testing.assert_close(slope(found, logits), slope(wanted, logits))
    assert not mean.requires_grad


def test_infomax_is_least_for_sure_predictions_of_every_class() -> None:
    uniform, one = 50 * torch.eye(4), 50 * torch.eye(4)[[0, 0, 0, 0]]
    value = {k: float(infomax(v, running_mean(v, None, 0.9))) for k, v in {"all": uniform, "one": one}.items()}
    assert value["all"] == pytest.approx(-math.log(4), abs=1e-5)
    assert value["one"] == pytest.approx(0, abs=1e-5)
    assert entropy(uniform) == pytest.approx(float(entropy(one)))  # which entropy cannot tell apart


def test_infomax_pushes_away_from_the_class_that_took_over() -> None:
    logits = torch.zeros(2, 2, requires_grad=True)
    down = -slope(infomax(logits, torch.tensor([0.9, 0.1])), logits)
    assert (down[:, 1] > down[:, 0]).all()


@given(SHAPES, st.sampled_from([0.4, 0.9]), st.sampled_from([0.7, 1.0]))
def test_filtered_entropy_is_numpys(shape: tuple[int, int, int], margin: float, redundancy: float) -> None:
    logits, _ = pair(shape, 3.0)
    p = softmax(logits.numpy())
    m = p.mean(axis=0)
    limit = margin * math.log(shape[1])
    wanted = []
    for row in p:
        h = -float(np.sum(row * np.log(row)))
        cosine = min(1.0, float(row @ m) / math.sqrt(float(row @ row) * float(m @ m)))
        if h < limit and cosine <= redundancy:
            wanted.append(math.exp(limit - h) * h)
    found = filtered_entropy(logits, running_mean(logits, None, 0.9), margin, redundancy)
    assert float(found) == pytest.approx(np.mean(wanted) if wanted else 0.0)


def test_filtered_entropy_leaves_out_unsure_and_redundant() -> None:
    logits = torch.tensor([[4.0, 0.0], [0.2, 0.0], [0.0, 4.0]], requires_grad=True)
    found = slope(filtered_entropy(logits, torch.tensor([0.95, 0.05])), logits)
    assert (found.abs().amax(dim=1) > 0).tolist() == [False, False, True]


def test_feature_distance_is_a_share_of_the_experts_size() -> None:
    expert = randn(1, 4, 3, dtype=torch.float64)
    assert float(feature_distance(expert, expert)) == 0
    assert float(feature_distance(torch.zeros_like(expert), expert)) == pytest.approx(1)
    own = randn(2, 4, 3, dtype=torch.float64)
    wanted = np.sum((own.numpy() - expert.numpy()) ** 2) / np.sum(expert.numpy() ** 2)
    assert float(feature_distance(own, expert)) == pytest.approx(float(wanted))


def test_features_of_several_layers_count_alike() -> None:
    own, expert = (randn(seed, 4, 5, dtype=torch.float64) for seed in (1, 2))
    each = [feature_distance(own[:, part], expert[:, part]) for part in (slice(2), slice(2, 5))]
    assert float(feature_distance(own, expert, (2, 3))) == pytest.approx(float(sum(each)) / 2)
    assert torch.equal(feature_distance(own, expert, (5,)), feature_distance(own, expert))
    assert float(feature_distance(expert, expert, (2, 3))) == 0


def test_running_means_forget_by_their_momentum() -> None:
    first, second = randn(1, 5, 3, dtype=torch.float64), randn(2, 4, 3, dtype=torch.float64)
    found = running_mean(second, running_mean(first, None, 0.7), 0.7)
    wanted = 0.7 * softmax(first.numpy()).mean(axis=0) + 0.3 * softmax(second.numpy()).mean(axis=0)
    np.testing.assert_allclose(found.numpy(), wanted)


def test_a_mixture_is_the_weighted_sum() -> None:
    logits, expert = pair((4, 3, 7))
    features = randn(3, 4, 2, dtype=torch.float64)
    view = View(logits, expert, running_mean(logits, None, 0.9), features, features + 1)
    one = {name: float(objective(view, {name: 1.0}, SelfLabel())) for name in OBJECTIVES}
    weights = {name: 0.5 + i for i, name in enumerate(OBJECTIVES)}
    found = float(objective(view, weights, SelfLabel()))
    assert found == pytest.approx(sum(weights[name] * one[name] for name in OBJECTIVES))


@pytest.mark.parametrize(("values", "words"), [
    ({"objective": "entropi"}, ["objective", "Did you mean 'entropy'"]),
    ({"objective": {"self-label": 1.0, "entrop": 1.0}}, ["Did you mean 'entropy'"]),
    ({"objective": {"entropy": -1}}, ["weight of 'entropy'", "above 0", "-1"]),
    ({"objective": {"entropy": True}}, ["weight of 'entropy'"]),
    ({"objective": {}}, ["objective", "needed"]),
    ({"objectives": {"cola": "infomx"}}, ["task 'cola'", "Did you mean 'infomax'"]),
    ({"self_label": {"temprature": 2}}, ["temprature", "Did you mean 'temperature'"]),
    ({"self_label": {"hard": True, "temperature": 2.0}}, ["hard labels"]),
    ({"self_label": {"confidence": 1.0}}, ["confidence"]),
    ({"keep": "first"}, ["keep"]),
    ({"check_every": 0}, ["check_every"]), ({"tolerance": -1}, ["tolerance"]),
])  # fmt: skip
def test_what_is_no_objective_is_answered_with_a_sentence(values: dict, words: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        parse(AdaptSettings, values, "adapt")
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_tasks_own_objective_goes_before_that_of_all() -> None:
    settings = AdaptSettings(objective={"self-label": 1.0, "entropy": 0.1}, objectives={"cola": "infomax"})
    assert settings.weights("cola") == {"infomax": 1.0}
    assert settings.weights("sst2") == {"self-label": 1.0, "entropy": 0.1}
    assert AdaptSettings().weights("sst2") == {"self-label": 1.0}


def test_classes_that_a_head_masks_count_nothing() -> None:
    masked, expert = (torch.randn(4, 5).requires_grad_(own) for own in (True, False))
    hidden = masked.masked_fill(torch.tensor([0, 0, 1, 0, 1]).bool(), -math.inf)
    other = expert.masked_fill(torch.tensor([0, 0, 1, 0, 1]).bool(), -math.inf)
    seen = [0, 1, 3]
    assert torch.allclose(divergences(hidden, other), divergences(masked[:, seen], expert[:, seen]))
    assert torch.allclose(entropy(hidden), entropy(masked[:, seen]))
    (divergences(hidden, other).sum() + entropy(hidden)).backward()
    assert masked.grad is not None
    assert bool(masked.grad.isfinite().all())


def of_the_largest(shape: tuple[int, int, int], kept: int) -> tuple[Tensor, Tensor, TopLogits]:
    """A model's logits, an expert's, and the largest of these."""
    logits, expert = (each.float() for each in pair(shape))
    return logits, expert, TopLogits.of(expert, kept)


@given(SHAPES, st.integers(1, 6))
def test_all_classes_but_the_largest_are_one(shape: tuple[int, int, int], kept: int) -> None:
    logits, expert, largest = of_the_largest(shape, kept)
    p, q = softmax(logits.double().numpy()), softmax(expert.double().numpy())
    each = []
    for one, other in zip(p, q, strict=True):
        top = np.argsort(-other)[:kept]
        outcomes = [(one[c], other[c]) for c in top]
        if kept < len(other):
            outcomes.append((1 - one[top].sum(), 1 - other[top].sum()))
        each.append(sum(b * math.log(b / a) for a, b in outcomes))
    here, there = largest.beside(logits)
    assert float(self_label(here, there)) == pytest.approx(np.mean(each), rel=1e-3, abs=1e-5)
    assert float(self_label(here, there)) <= float(self_label(logits, expert)) + 1e-5
    assert largest.mass == pytest.approx(np.sort(q, axis=1)[:, -kept:].sum(axis=1).mean(), rel=1e-5)


@given(SHAPES, st.integers(1, 4))
def test_the_rest_pulls_none_of_its_classes(shape: tuple[int, int, int], kept: int) -> None:
    """The slope is p - q where q is known; what is left of q is shared out as p has it."""
    logits, expert, largest = of_the_largest(shape, kept)
    logits.requires_grad_(True)
    here, there = largest.beside(logits)
    p, q = logits.detach().double().softmax(-1), expert.double().softmax(-1)
    known = torch.zeros_like(q, dtype=torch.bool).scatter(1, largest.classes.long(), True)
    left = (q * ~known).sum(-1, keepdim=True) / (p * ~known).sum(-1, keepdim=True).clamp_min(1e-300)
    wanted = (p - torch.where(known, q, left * p)) / len(p)
    torch.testing.assert_close(slope(self_label(here, there), logits).double(), wanted, atol=1e-5, rtol=1e-3)


def test_the_rest_is_no_class_to_be_sure_of() -> None:
    expert = torch.tensor([[0.5, 0.4, 0.3, 0.2, 0.1]])  # all others together are more probable than the best
    here, there = TopLogits.of(expert, 2).beside(expert)
    assert int(there.argmax()) == 2
    assert float(self_label(here, there, hard=True, rest=True)) == pytest.approx(-float(expert.log_softmax(-1)[0, 0]))
    sure = float(expert.softmax(-1)[0, 0])
    assert float(self_label(here, there - 1, confidence=sure + 0.01, rest=True)) == 0.0
