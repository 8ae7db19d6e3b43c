"""Models that generate text, merged, adapted on what they read and scored: by plain code of `transformers` in float32."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

import adarank
from adarank.adapt.settings import AdaptSettings
from adarank.cli.main import main
from adarank.errors import AdaRankError, DataError
from adarank.models import kind_of
from adarank.recipe.job import open_job
from adarank.recipe.reader import load_recipe
from adarank.workflow.build_networks import build_models
from adarank.workflow.load_tasks import load_tasks
from adarank.workflow.problem import expert_predictions, problem_of
from lm_zoo import ADAPT, TASKS, WORDS, evaluated, make_zoo, model, recipe, texts, write


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_zoo(tmp_path_factory.mktemp("lm"))


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_zoo(tmp_path_factory.mktemp("t5"), "t5", rows=20)
    for task in TASKS:
        write(folder / "data" / f"{task}.jsonl", questions())
    return folder


@pytest.fixture(scope="module")
def merged(zoo: Path) -> Path:
    adarank.merge_recipe(recipe(zoo, "adapted.yaml", **ADAPT), zoo / "adapted")
    return zoo / "adapted"


@torch.no_grad()
def test_perplexity_is_that_of_transformers_own_loss(zoo: Path, merged: Path) -> None:
    rows = evaluated(recipe(zoo), merged)
    for row, folder in {"base": "models/base", str(merged): "adapted", "experts": "models/verse"}.items():
        net, total, count = model(zoo / folder), 0.0, 0
        for ids in texts(zoo, "verse", "test"):
            total += float(net(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
            count += ids.shape[1] - 1
        assert rows[row]["verse"] == pytest.approx(math.exp(total / count), rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("metric", ["loss", "token_accuracy"])
def test_tokens_are_scored_as_one_by_one(zoo: Path, metric: str) -> None:
    net, losses, right = model(zoo / "models" / "news"), [], []
    for ids in texts(zoo, "news", "test"):
        for place in range(1, ids.shape[1]):
            log_p = net(input_ids=ids[:, :place]).logits[0, -1].log_softmax(-1)
            losses.append(-float(log_p[ids[0, place]]))
            right.append(float(int(log_p.argmax()) == int(ids[0, place])))
    wanted = {"loss": sum(losses) / len(losses), "token_accuracy": 100 * sum(right) / len(right)}[metric]
    rows = evaluated(recipe(zoo, f"{metric}.yaml", {"metric": metric}))
    assert rows["experts"]["news"] == pytest.approx(wanted, rel=1e-5)


def questions() -> list[dict[str, Any]]:
    """Prompts with an answer, and three options."""
    rows = []
    for number in range(24):
        options = [WORDS[(5 * number + k) % len(WORDS)] + (" " + WORDS[k] if k else "") for k in range(3)]
        text = f"{WORDS[number % len(WORDS)]} {WORDS[(7 * number + 3) % len(WORDS)]} "
        rows.append({"text": f"{text}{WORDS[number // 15]} ", "reply": options[number % 3], "options": options})
    return rows


ASKED: dict[str, Any] = {"columns": {"answer": "reply"}}
CHOSEN: dict[str, Any] = {"columns": {"answer": "reply", "choices": "options"}, "metric": "choice_accuracy"}


@pytest.fixture
def asked(zoo: Path) -> Path:
    """The zoo with questions for data."""
    for task in TASKS:
        write(zoo / "data" / f"{task}-asked.jsonl", questions())
    return zoo


def of_questions(zoo: Path, name: str, task: dict[str, Any], **changes: Any) -> Path:
    models = [{"model": f"models/{t}", "task": {"name": t, "data": f"data/{t}-asked.jsonl", **task}} for t in TASKS]
    return recipe(zoo, name, models=models, data={"adapt": 0, "select": 0, "test": 1}, **changes)


def answer_loss(net: Any, tokens: Any, prompt: str, answer: str) -> tuple[float, int]:
    before = len(tokens(prompt).input_ids)
    ids = tokens(prompt + answer, return_tensors="pt").input_ids
    log_p = net(input_ids=ids).logits[0, before - 1 : -1].log_softmax(-1)
    return -float(log_p.gather(1, ids[0, before:, None]).sum()), ids.shape[1] - before


@torch.no_grad()
def test_of_prompts_only_answers_are_scored(asked: Path) -> None:
    net, tokens = model(asked / "models" / "verse"), AutoTokenizer.from_pretrained(asked / "models" / "base")
    losses = [answer_loss(net, tokens, row["text"], row["reply"]) for row in questions()]
    wanted = math.exp(sum(loss for loss, _ in losses) / sum(count for _, count in losses))
    assert evaluated(of_questions(asked, "asked.yaml", ASKED))["experts"]["verse"] == pytest.approx(wanted, rel=1e-5)


@torch.no_grad()
def test_the_option_of_least_loss_is_chosen(asked: Path) -> None:
    net, tokens = model(asked / "models" / "news"), AutoTokenizer.from_pretrained(asked / "models" / "base")
    right = []
    for row in questions():
        losses = {option: answer_loss(net, tokens, row["text"], option)[0] for option in row["options"]}
        right.append(min(losses, key=lambda option: losses[option]) == row["reply"])
    assert 0 < sum(right) < len(right)
    scored = evaluated(of_questions(asked, "chosen.yaml", CHOSEN))["experts"]["news"]
    assert scored == pytest.approx(100 * sum(right) / len(right))


@torch.no_grad()
def greedy(net: Any, ids: Tensor, most: int, end: int = 2) -> list[int]:
    """One token after another, without a cache."""
    given: list[int] = []
    while len(given) < most and end not in given:
        given.append(int(net(input_ids=torch.cat([ids, torch.tensor([given], dtype=torch.long)], dim=1)).logits[0, -1].argmax()))  # fmt: skip
    return given


def test_exact_match_is_of_the_greedy_answer(asked: Path) -> None:
    net, tokens = model(asked / "models" / "verse"), AutoTokenizer.from_pretrained(asked / "models" / "base")
    rows, right = questions(), 0
    for number, row in enumerate(rows):
        ids = greedy(net, tokens(row["text"], return_tensors="pt").input_ids, 3)
        said = tokens.decode(ids, skip_special_tokens=True)
        row["reply"] = said if number % 3 and said else f"{said} not"
        right += row["reply"] == said
    assert 0 < right < len(rows)
    write(asked / "data" / "verse-asked.jsonl", rows)
    path = of_questions(asked, "exact.yaml", {**ASKED, "metric": "exact_match", "max_new_tokens": 3})
    assert evaluated(path)["experts"]["verse"] == pytest.approx(100 * right / len(rows))


def test_an_answer_ends_at_the_stop_text(asked: Path) -> None:
    net, tokens = model(asked / "models" / "verse"), AutoTokenizer.from_pretrained(asked / "models" / "base")
    rows = questions()
    said = [tokens.decode(greedy(net, tokens(row["text"], return_tensors="pt").input_ids, 4), skip_special_tokens=True) for row in rows]  # fmt: skip
    stop = max(WORDS, key=lambda word: sum(f" {word}" in f" {text}" for text in said))
    for row, text in zip(rows, said, strict=True):
        row["reply"] = text.split(stop)[0].strip() or "nothing"
    write(asked / "data" / "verse-asked.jsonl", rows)
    path = of_questions(asked, "stop.yaml", {**ASKED, "metric": "exact_match", "max_new_tokens": 4, "stop": stop})
    wanted = sum(text.split(stop)[0].strip() != "" for text in said)
    assert any(stop in text for text in said)
    assert evaluated(path)["experts"]["verse"] == pytest.approx(100 * wanted / len(rows))


def test_messages_go_through_the_chat_template(asked: Path) -> None:
    rows = [{"text": [{"role": "user", "content": row["text"].strip()}, {"role": "assistant", "content": row["reply"]}]} for row in questions()]  # fmt: skip
    plain = [{"text": f"<s>user {row['text'].strip()}</s><s>assistant ", "reply": row["reply"]} for row in questions()]
    scores = []
    for name, written, task in (("chat", rows, {}), ("plain", plain, ASKED)):
        for each in TASKS:
            write(asked / "data" / f"{each}-asked.jsonl", written)
        if name == "plain":  # its text has <s> already, so that none is put before it
            tokens = AutoTokenizer.from_pretrained(asked / "models" / "base")
            net = model(asked / "models" / "news")
            with torch.no_grad():
                losses = []
                for row in plain:
                    ids = tokens(row["text"] + row["reply"], add_special_tokens=False, return_tensors="pt").input_ids
                    before = len(tokens(row["text"], add_special_tokens=False).input_ids)
                    log_p = net(input_ids=ids).logits[0, before - 1 : -1].log_softmax(-1)
                    losses.append((-float(log_p.gather(1, ids[0, before:, None]).sum()), ids.shape[1] - before))
            scores.append(math.exp(sum(loss for loss, _ in losses) / sum(n for _, n in losses)))
        else:
            scores.append(evaluated(of_questions(asked, f"{name}.yaml", task))["experts"]["news"])
    assert scores[0] == pytest.approx(scores[1], rel=1e-5)


def plain_kl(zoo: Path, rows: list[int], top: int) -> float:
    """KL from the expert's predictions to the base's over all tokens of the rows but the first; of the k + 1 outcomes."""
    data = load_tasks(open_job(load_recipe(recipe(zoo))))["verse"]
    base, expert = model(zoo / "models" / "base"), model(zoo / "models" / "verse")
    parts = []
    for row in rows:
        ids = torch.tensor([data.examples.batch([row])["input_ids"][0].tolist()])
        p, q = (net(input_ids=ids).logits[0, :-1].double().softmax(-1) for net in (base, expert))
        best = q.argsort(dim=-1, descending=True)[:, :top]
        p, q = (torch.cat([x.gather(1, best), 1 - x.gather(1, best).sum(1, keepdim=True)], 1)[:, : 64 if top < 64 else top] for x in (p, q))  # fmt: skip
        parts.append((q * (q.clamp_min(1e-300).log() - p.clamp_min(1e-300).log())).sum(-1) if top < 64 else (q * (q.log() - p.log())).sum(-1))  # fmt: skip
    return float(torch.cat(parts).mean())


@pytest.mark.parametrize("top", [64, 8])
def test_the_loss_is_the_divergence_over_all_tokens(zoo: Path, top: int) -> None:
    job = open_job(load_recipe(recipe(zoo, "loss.yaml", **ADAPT)))
    data, models = load_tasks(job), build_models(job)
    settings = AdaptSettings(batch_size=4, self_label={"top_logits": top})
    problem = problem_of(job, models, data, settings, expert_predictions(job, models, data, settings))
    with torch.no_grad():
        rows = list(data["verse"].adapt_rows(3, 4))
        assert float(problem.losses()["verse"](3)) == pytest.approx(plain_kl(zoo, rows, top), rel=2e-4)
        judged = list(data["verse"].splits.rows["select"])
        signals = problem.judge()(0)["verse"]
        assert signals.divergence == pytest.approx(plain_kl(zoo, judged, top), rel=2e-4)
        base, expert = model(zoo / "models" / "base"), model(zoo / "models" / "verse")
        same = [
            base(input_ids=ids).logits[0, :-1].argmax(-1) == expert(input_ids=ids).logits[0, :-1].argmax(-1)
            for ids in texts(zoo, "verse", "select")
        ]
    assert signals.agreement == pytest.approx(float(torch.cat(same).double().mean()))
    assert signals.inputs == len(torch.cat(same))


def test_entropy_is_over_the_tokens_predictions(zoo: Path) -> None:
    settings = {**ADAPT, "adapt": {**ADAPT["adapt"], "objective": "entropy"}}
    job = open_job(load_recipe(recipe(zoo, "entropy.yaml", **settings)))
    data, models = load_tasks(job), build_models(job)
    problem = problem_of(job, models, data, AdaptSettings(batch_size=4, objective="entropy"), {})
    base, rows = model(zoo / "models" / "base"), data["news"].adapt_rows(0, 4)
    with torch.no_grad():
        parts = []
        for row in rows:
            p = base(input_ids=data["news"].examples.batch([row])["input_ids"]).logits[0, :-1].softmax(-1)
            parts.append(torch.distributions.Categorical(p).entropy())
        assert float(problem.losses()["news"](0)) == pytest.approx(float(torch.cat(parts).mean()), rel=1e-5)


def test_adaptation_comes_nearer_to_the_experts(zoo: Path, merged: Path) -> None:
    record = json.loads((merged / "adarank.json").read_text())["adaptation"]
    start, kept = record["judged"]["0"], record["judged"][str(record["step_kept"])]
    assert record["step_kept"] > 0
    assert sum(kept[t]["agreement"] for t in TASKS) > sum(start[t]["agreement"] for t in TASKS)
    assert not (merged / "heads").exists()


def test_one_body_is_merged_output_layer_and_all(zoo: Path, merged: Path) -> None:
    choices = open_job(load_recipe(recipe(zoo))).network.choices
    assert choices["lm_head.weight"].action == "decompose"
    assert choices["model.embed_tokens.weight"].action == "scale"
    base, out = (load_file(zoo / name / "model.safetensors") for name in ("models/base", "adapted"))
    assert base.keys() == out.keys()
    assert all(not torch.equal(base[name], out[name]) for name in base if base[name].dim() > 1)


def test_the_output_is_an_ordinary_folder(merged: Path) -> None:
    net, tokens = model(merged), AutoTokenizer.from_pretrained(merged)
    ids = tokens("the cat sees", return_tensors="pt").input_ids
    assert net.generate(ids, max_new_tokens=3, do_sample=False).shape[1] <= 7
    assert tokens.chat_template


def test_text2text_answers_are_scored(t5: Path) -> None:
    path = recipe(t5, "scored.yaml", ASKED, data={"adapt": 0, "select": 0, "test": 1})
    net = AutoModelForSeq2SeqLM.from_pretrained(t5 / "models" / "verse").float().eval()
    tokens = AutoTokenizer.from_pretrained(t5 / "models" / "base")
    total, count = 0.0, 0
    with torch.no_grad():
        for row in questions():
            labels = tokens(text_target=row["reply"], return_tensors="pt").input_ids
            loss = net(input_ids=tokens(row["text"], return_tensors="pt").input_ids, labels=labels).loss
            total, count = total + float(loss) * labels.shape[1], count + labels.shape[1]
    assert evaluated(path)["experts"]["verse"] == pytest.approx(math.exp(total / count), rel=1e-5)


def test_text2text_models_merge_without_data(t5: Path) -> None:
    adarank.merge_recipe(recipe(t5, merge_method="tsv_m"), t5 / "tsv")
    assert AutoModelForSeq2SeqLM.from_pretrained(t5 / "tsv", output_loading_info=True)[1]["missing_keys"] == set()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("LlamaForCausalLM", "text-generation"),
        ("GPT2LMHeadModel", "text-generation"),
        ("T5ForConditionalGeneration", "text2text-generation"),
        ("MarianMTModel", "text2text-generation"),
        ("LlavaForConditionalGeneration", None),
        ("LlamaForSequenceClassification", "text-classification"),
    ],
)
def test_kinds_of_generating_models(name: str, kind: str | None) -> None:
    assert kind_of({"architectures": [name], "model_type": "of-the-future"}) == kind


def refused(path: Path) -> str:
    with pytest.raises(AdaRankError) as error:
        adarank.merge_recipe(path, path.parent / "refused")
    assert not (path.parent / "refused").exists()
    return " ".join(str(error.value).split())


@pytest.mark.parametrize(
    ("task", "changes", "sentence"),
    [
        ({}, {"merge_method": "fisher"}, "'fisher' reads one prediction of each input"),
        ({}, {"merge_method": "surgery"}, "'surgery' reads one prediction of each input"),
        ({}, {"heads": "learn"}, "heads: learn is for classifiers"),
        ({}, {**ADAPT, "adapt": {"learn_heads": True}}, "learn_heads is for classifiers"),
        (
            {"kind": "text2text-generation"},
            {},
            "is a LlamaForCausalLM by its config.json, which is no model of text2text",
        ),
        ({"columns": {"label": "reply"}}, {}, "columns.label: of classifiers"),
        ({"metric": "accuracy"}, ADAPT, "metric 'accuracy' is not for generation"),
        ({"columns": {"choices": "options"}}, ADAPT, "columns.choices is given without columns.answer"),
    ],
)
def test_what_is_of_classifiers_is_refused(
    zoo: Path, task: dict[str, Any], changes: dict[str, Any], sentence: str
) -> None:
    assert sentence in refused(recipe(zoo, "refused.yaml", task, **changes))


def test_texts_too_short_to_predict_of_are_refused(zoo: Path) -> None:
    write(zoo / "data" / "short.jsonl", [{"text": "the cat"}, {"text": ""}])
    path = recipe(zoo, "short.yaml", {"data": "data/short.jsonl"}, **ADAPT)
    assert "1 rows are too short to predict a token of, such as row 2" in refused(path)


def test_long_inputs_are_cut_and_counted(zoo: Path) -> None:
    job = open_job(load_recipe(recipe(zoo, "cut.yaml", {"max_length": 6})))
    data = load_tasks(job)["verse"]
    assert max(data.examples.lengths) == 6
    assert any("longer than 6 tokens and are cut there" in text for text in data.notes)


def test_messages_without_a_template_are_refused(tmp_path: Path) -> None:
    folder = make_zoo(tmp_path, chat=False, rows=20)
    for task in TASKS:
        write(folder / "data" / f"{task}.jsonl", [{"text": [{"role": "user", "content": "the cat"}]}] * 3)
    assert "row 1: messages, and the expert's tokenizer has no chat template" in refused(recipe(folder, **ADAPT))


def test_an_answer_without_tokens_is_refused(zoo: Path) -> None:
    write(zoo / "data" / "blank.jsonl", [{"text": "the cat", "reply": " "}, {"text": "a dog", "reply": "sees"}])
    path = recipe(zoo, "blank.yaml", {**ASKED, "data": "data/blank.jsonl"}, data={"adapt": 0, "select": 0, "test": 1})
    with pytest.raises(DataError, match="The answer ' ' to 'the cat' has no tokens"):
        adarank.evaluate_recipe(path)


@pytest.mark.parametrize("metric", ["exact_match", "choice_accuracy"])
def test_a_metric_of_answers_needs_answers(zoo: Path, metric: str) -> None:
    with pytest.raises(DataError, match=r"columns: answer|columns: choices"):
        adarank.evaluate_recipe(recipe(zoo, "needs.yaml", {"metric": metric}))


def test_every_command_knows_generating_models(zoo: Path, merged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(recipe(zoo, "adapted.yaml", **ADAPT))
    for command in (
        ["plan", path],
        ["evaluate", path, str(merged)],
        ["inspect", str(merged)],
        ["report", str(merged)],
        ["verify", str(merged), "--from", str(zoo)],
    ):
        assert main(command) == 0, capsys.readouterr().err
    shown = capsys.readouterr().out
    assert "perplexities, less is better" in shown
