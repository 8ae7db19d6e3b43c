"""Classes of words, spans, choices, numbers and several classes: adapted without labels, scored by their metric."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml

import adarank
from adarank.adapt.agreement import summary
from adarank.adapt.objectives import self_label
from adarank.adapt.outcomes import outcomes_of
from adarank.data.answers import answer_score, best_spans, entities, entity_f1
from adarank.data.labels import Problem
from adarank.errors import AdaptationError, DataError, RecipeError
from adarank.recipe.job import open_job
from adarank.recipe.reader import load_recipe
from adarank.workflow.load_tasks import load_tasks
from head_zoo import ADAPT, KINDS, TAGS, make_zoo, recipe, t5_zoo, write_rows
from make import randn


@pytest.mark.parametrize("kind", KINDS)
def test_adaptation_brings_outputs_nearer_to_the_experts(tmp_path: Path, kind: str) -> None:
    """Judged apart from the engine: by the distance of what models of `transformers` give on the test rows."""
    make_zoo(tmp_path, kind)
    adarank.merge_recipe(
        recipe(tmp_path, kind, "start.yaml", merge_method="cart", parameters=ADAPT["parameters"]), tmp_path / "cart"
    )
    adarank.merge_recipe(recipe(tmp_path, kind, "adapted.yaml", **ADAPT), tmp_path / "adapted")
    assert distance(tmp_path, kind, tmp_path / "adapted") < 0.9 * distance(tmp_path, kind, tmp_path / "cart")


def outputs(module: Any, kind: str, row: dict[str, Any]) -> torch.Tensor:
    """What `transformers` gives for one row, as probabilities."""
    tokens = transformers.AutoTokenizer.from_pretrained(module.name_or_path)
    if kind == "multiple-choice":
        pairs = tokens([row["text"]] * len(row["choices"]), row["choices"], padding=True, return_tensors="pt")
        return module(**{key: value[None] for key, value in pairs.items()}).logits.softmax(-1)
    if kind == "question-answering":
        out = module(**tokens(row["text"], row["context"], return_tensors="pt"))
        return torch.stack([out.start_logits, out.end_logits]).softmax(-1)
    if kind == "token-classification":
        return module(**tokens(row["text"], is_split_into_words=True, return_tensors="pt")).logits.softmax(-1)
    logits = module(**tokens(row["text"], return_tensors="pt")).logits
    return logits if kind == "regression" else logits.sigmoid()


def loaded(folder: Path, kind: str) -> Any:
    autos = {
        "token-classification": transformers.AutoModelForTokenClassification,
        "question-answering": transformers.AutoModelForQuestionAnswering,
        "multiple-choice": transformers.AutoModelForMultipleChoice,
    }
    return autos.get(kind, transformers.AutoModelForSequenceClassification).from_pretrained(folder).eval()


@torch.no_grad()
def distance(folder: Path, kind: str, out: Path) -> float:
    total = 0.0
    for task in ("a", "b"):
        adarank.extract(out, task, folder / f"{out.name}-{task}")
        merged, expert = loaded(folder / f"{out.name}-{task}", kind), loaded(folder / "models" / task, kind)
        rows = [json.loads(line) for line in (folder / "data" / f"{task}.jsonl").read_text().splitlines()]
        each = [(outputs(merged, kind, row) - outputs(expert, kind, row)).square().mean() for row in rows[:40]]
        total += float(torch.stack(each).mean())
    return total


@pytest.mark.parametrize("kind", KINDS)
def test_labels_change_nothing_that_is_learned(tmp_path: Path, kind: str) -> None:
    make_zoo(tmp_path, kind)
    short = {**ADAPT, "adapt": {**ADAPT["adapt"], "steps": 6}}
    adarank.merge_recipe(recipe(tmp_path, kind, "labels.yaml", **short), tmp_path / "with")
    for task in ("a", "b"):
        file = tmp_path / "data" / f"{task}.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        write_rows(file, [{key: value for key, value in row.items() if key != "label"} for row in rows])
    adarank.merge_recipe(recipe(tmp_path, kind, "none.yaml", **short), tmp_path / "without")
    assert (tmp_path / "with" / "model.safetensors").read_bytes() == (
        tmp_path / "without" / "model.safetensors"
    ).read_bytes()


OUTPUTS: dict[Problem, torch.Tensor] = {
    "multi_label_classification": randn(0, 6, 3),
    "token_classification": randn(1, 6, 5, 4).index_put((torch.tensor([0, 3]), torch.tensor([4, 2])), torch.tensor(torch.nan)),
    "spans": randn(2, 6, 2, 7).index_put((torch.tensor([1]), torch.tensor([0, 1]), torch.tensor([6])), torch.tensor(-torch.inf)),
    "multiple_choice": randn(3, 6, 4).index_put((torch.tensor([2]), torch.tensor([3])), torch.tensor(-torch.inf)),
    "regression": randn(4, 6, 1),
    "embedding": randn(5, 6, 2, 8),
}  # fmt: skip


@pytest.mark.parametrize("problem", OUTPUTS)
def test_an_expert_agrees_with_itself_and_diverges_not(problem: Problem) -> None:
    expert = OUTPUTS[problem]
    outcomes = outcomes_of(problem, expert)
    same = summary([outcomes.compared(expert, expert)])
    assert same.agreement == 1.0
    assert same.divergence == pytest.approx(0, abs=1e-6)
    other = summary([outcomes.compared(randn(99, *expert.shape), expert)])
    assert other.agreement < 1.0
    assert other.divergence > 0.1


@pytest.mark.parametrize("problem", OUTPUTS)
def test_losses_of_further_outputs_pull_towards_the_expert(problem: Problem) -> None:
    """Gradient descent from elsewhere ends at the expert's probabilities, and no gradient is NaN."""
    expert = OUTPUTS[problem]
    outcomes = outcomes_of(problem, expert)
    here = (expert + randn(9, *expert.shape)).requires_grad_()
    optimizer = torch.optim.Adam([here], lr=0.1)
    for _ in range(300):
        loss = self_label(*outcomes.matched(here, expert))
        optimizer.zero_grad()
        loss.backward()
        assert here.grad is not None
        assert not here.grad.isnan().any()
        optimizer.step()
    assert float(loss.detach()) < 1e-3


def test_divergence_of_numbers_is_a_squared_distance() -> None:
    expert = torch.linspace(-3, 3, 101)[:, None]
    width = float(expert.std(correction=0)) / 2
    for off in (0.1, -0.3):
        apart = summary([outcomes_of("regression", expert).compared(expert + off, expert)]).divergence
        assert apart == pytest.approx(off**2 / (2 * width**2), rel=0.02)


def test_divergence_of_vectors_is_of_their_cosine() -> None:
    expert, here = OUTPUTS["embedding"], randn(11, 6, 2, 8)
    cosine = torch.nn.functional.cosine_similarity(here.double(), expert.double(), dim=-1)
    apart = summary([outcomes_of("embedding", expert).compared(here, expert)]).divergence
    assert apart == pytest.approx(float(-((1 + cosine) / 2).log().mean()), rel=1e-5)


def test_one_number_for_all_inputs_is_refused() -> None:
    with pytest.raises(AdaptationError, match="one number for all inputs"):
        outcomes_of("regression", torch.ones(5, 1))


@pytest.mark.parametrize(("kind", "metric"), [
    ("token-classification", "accuracy"), ("question-answering", "exact_match"), ("multiple-choice", "accuracy"),
])  # fmt: skip
def test_scores_are_those_of_transformers_outputs(tmp_path: Path, kind: str, metric: str) -> None:
    make_zoo(tmp_path, kind)
    path = recipe(tmp_path, kind, task={"metric": metric})
    table = adarank.evaluate_recipe(path, [])
    data = load_tasks(open_job(load_recipe(path)))
    for task in ("a", "b"):
        rows = [json.loads(line) for line in (tmp_path / "data" / f"{task}.jsonl").read_text().splitlines()]
        chosen = [rows[row] for row in data[task].splits.rows["test"]]
        module = loaded(tmp_path / "models" / task, kind)
        right, all_of_them = 0, 0
        for row in chosen:
            hits, count = judged(module, kind, row)
            right, all_of_them = right + hits, all_of_them + count
        assert table.rows["experts"][task] == pytest.approx(100 * right / all_of_them, abs=1e-6)


@torch.no_grad()
def judged(module: Any, kind: str, row: dict[str, Any]) -> tuple[int, int]:
    """How many of a row's predictions are right, and how many there are."""
    given = outputs(module, kind, row)
    if kind == "multiple-choice":
        return int(int(given.argmax()) == row["label"]), 1
    if kind == "token-classification":  # every word of the zoo is one token, after [CLS]
        classes = given[0, 1 : 1 + len(row["text"])].argmax(-1).tolist()
        return sum(TAGS[c] == tag for c, tag in zip(classes, row["label"], strict=True)), len(classes)
    first = len(row["text"].split()) + 2  # [CLS] question [SEP] context [SEP]
    context = row["context"].split()
    begin, end = (part[0, first : first + len(context)].log() for part in given)
    spans = {(a, b): float(begin[a] + end[b]) for a in range(len(context)) for b in range(a, len(context))}
    a, b = max(spans, key=lambda span: spans[span])
    return int(" ".join(context[a : b + 1]) == row["label"]["text"][0]), 1


def test_entities_are_counted_whole() -> None:
    assert list(entities(["B-A", "I-A", "O", "B-A", "B-A", "I-B", "A", "O"])) == [
        ("A", 0, 1), ("A", 3, 3), ("A", 4, 4), ("B", 5, 5), ("A", 6, 6)
    ]  # fmt: skip
    names = ["O", "B-A", "I-A", "B-B"]
    logits = torch.nn.functional.one_hot(torch.tensor([[1, 0, 3, 0]]), 4).float()
    assert entity_f1([(1, 2, 3, 0)], logits, names) == 0.5  # one of two is whole
    assert entity_f1([(0, 0, 3, 0)], logits, names) == pytest.approx(2 / 3)
    logits[0, 3] = torch.nan  # behind the limit
    assert entity_f1([(1, 0, 3, 1)], logits, names) == 1.0


def test_answers_are_compared_as_squad_does() -> None:
    assert answer_score([("The  cat!",)], ["cat"], "exact_match") == 1.0
    assert answer_score([("a red cat", "blue dog")], ["the blue cat"], "f1") == 0.5
    assert answer_score([()], [""], "f1") == 1.0
    assert answer_score([("cat",)], [""], "exact_match") == 0.0


def test_a_span_never_ends_before_it_begins() -> None:
    begin, end = torch.tensor([0.0, 1.0, 5.0]), torch.tensor([9.0, 2.0, 1.0])
    sums = {(a, b): float(begin[a] + end[b]) for a in range(3) for b in range(a, 3)}
    assert best_spans(torch.stack([begin, end])[None]) == [max(sums, key=lambda span: sums[span])]


@pytest.mark.parametrize(("kind", "row", "words"), [
    ("token-classification", {"text": ["red", "one"], "label": ["O"]}, "row 61 has 2 words and 1 labels"),
    ("token-classification", {"text": ["red"], "label": ["B-C"]}, "has label 'B-C'"),
    ("token-classification", {"text": "red", "label": ["O"]}, "no list of words|has 0 words"),
    ("question-answering", {"text": "red", "context": "one", "label": 3}, "row 61 has answer 3"),
    ("question-answering", {"text": "red", "context": " ", "label": "red"}, "1 contexts are empty, such as that of row 61"),
    ("multiple-choice", {"text": "red", "choices": ["one"], "label": 0}, "fewer than two options"),
    ("multiple-choice", {"text": "red", "choices": ["one", "two"], "label": 2}, "row 61 has label 2, which is none of its 2"),
])  # fmt: skip
def test_rows_that_do_not_fit_are_named(tmp_path: Path, kind: str, row: dict[str, Any], words: str) -> None:
    make_zoo(tmp_path, kind)
    with (tmp_path / "data" / "a.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=words):
        adarank.evaluate_recipe(recipe(tmp_path, kind), [])


def test_models_of_another_head_are_refused(tmp_path: Path) -> None:
    make_zoo(tmp_path, "token-classification")
    with pytest.raises(
        RecipeError, match=r"BertForTokenClassification by its config\.json, which is no model of multiple-choice"
    ):
        adarank.evaluate_recipe(recipe(tmp_path, "token-classification", task={"kind": "multiple-choice"}), [])


@pytest.mark.parametrize(("kind", "changes", "words"), [
    ("regression", {"adapt": {"objective": "entropy"}}, "objective 'entropy' is of classes"),
    ("question-answering", {"adapt": {"objective": "infomax"}}, "objective 'infomax' is of classes"),
    ("multi-label", {"adapt": {"learn_heads": True}}, "learn_heads reads its outputs as shares of classes"),
    ("token-classification", {"merge_method": "surgery"}, "'surgery' reads its outputs as shares of classes"),
    ("multiple-choice", {"merge_method": "cart", "heads": "learn"}, "heads: learn reads its outputs as shares of classes"),
])  # fmt: skip
def test_what_needs_one_class_of_an_input_is_refused(
    tmp_path: Path, kind: str, changes: dict[str, Any], words: str
) -> None:
    make_zoo(tmp_path, kind)
    with pytest.raises(DataError, match=words):
        adarank.merge_recipe(recipe(tmp_path, kind, **{"merge_method": "adarank", **changes}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_words_behind_the_limit_are_left_out_and_counted(tmp_path: Path) -> None:
    make_zoo(tmp_path, "token-classification")
    path = recipe(tmp_path, "token-classification", task={"max_length": 6})
    data = load_tasks(open_job(load_recipe(path)))["a"]
    rows = [json.loads(line) for line in (tmp_path / "data" / "a.jsonl").read_text().splitlines()]
    cut = sum(max(0, len(row["text"]) - 4) for row in rows)  # [CLS] and [SEP] are tokens too
    assert any(note.startswith(f"{cut} words stand behind the limit of 6 tokens") for note in data.notes)


def test_t5_classifiers_merge_are_adapted_and_taken_out(tmp_path: Path) -> None:
    t5_zoo(tmp_path)
    record = adarank.merge_recipe(recipe(tmp_path, "t5", **ADAPT), tmp_path / "out")
    judged = list(record["adaptation"]["judged"].values())
    apart = [sum(signals["divergence"] for signals in judgement.values()) for judgement in (judged[0], judged[-1])]
    assert apart[1] < 0.9 * apart[0]
    whole = recipe(tmp_path, "t5", "whole.yaml", parameters={"lambda": 1.0})
    text = yaml.safe_load(whole.read_text())
    whole.write_text(yaml.safe_dump({**text, "models": text["models"][:1]}))
    adarank.merge_recipe(whole, tmp_path / "whole")
    adarank.extract(tmp_path / "whole", "a", tmp_path / "a")
    ids = torch.tensor([[5, 6, 7, 1]])
    with torch.no_grad():
        given, wanted = (transformers.T5ForSequenceClassification.from_pretrained(f).eval()(input_ids=ids).logits for f in (tmp_path / "a", tmp_path / "models" / "a"))  # fmt: skip
    assert torch.allclose(given, wanted, atol=1e-5)
