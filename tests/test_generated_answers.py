"""The experts' own answers: as greedy decoding token by token gives them, kept through interruptions, adapted on."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

import adarank
from adarank.adapt.settings import AdaptSettings
from adarank.adapt.top_logits import TopLogits
from adarank.models.generation import CausalModels
from adarank.models.prompts import Prompts
from adarank.recipe.job import open_job
from adarank.recipe.reader import load_recipe
from adarank.workflow import answers as answering
from adarank.workflow.answers import with_answers
from adarank.workflow.build_networks import build_models
from adarank.workflow.load_tasks import load_tasks
from adarank.workflow.problem import expert_predictions
from lm_zoo import ADAPT, TASKS, make_zoo, recipe
from lora_zoo import train

ASKED: dict[str, Any] = {"answers": "generate", "max_new_tokens": 4}


@pytest.fixture(scope="module", params=["llama", "t5", "bart"])
def zoo(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_zoo(tmp_path_factory.mktemp("lm"), request.param, rows=40)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_zoo(tmp_path_factory.mktemp("llama"), rows=60)


def answered(path: Path, state: Path) -> dict[str, Prompts]:
    job = open_job(load_recipe(path))
    data = with_answers(job, load_tasks(job), {"of": "these"}, state, lambda text: None)
    return {task: of.examples for task, of in data.items()}  # type: ignore[misc]


@torch.no_grad()
def greedy(folder: Path, text: str, most: int) -> list[int]:
    """One token after another, without a cache and without padding."""
    tokens = AutoTokenizer.from_pretrained(folder)
    ids, given = tokens(text, return_tensors="pt").input_ids, list[int]()
    encoded = (folder / "config.json").read_text().count("is_encoder_decoder") and json.loads((folder / "config.json").read_text())["is_encoder_decoder"]  # fmt: skip
    auto: Any = AutoModelForSeq2SeqLM if encoded else AutoModelForCausalLM
    net = auto.from_pretrained(folder).float().eval()
    start = [net.config.decoder_start_token_id] if encoded else []
    while len(given) < most and 2 not in given:
        past = torch.tensor([[*start, *given]], dtype=torch.long)
        out = net(input_ids=ids, decoder_input_ids=past) if encoded else net(input_ids=torch.cat([ids, past], dim=1))
        given.append(int(out.logits[0, -1].argmax()))
    return given


def test_answers_are_those_of_greedy_decoding(zoo: Path, tmp_path: Path) -> None:
    examples = answered(recipe(zoo, "asked.yaml", ASKED, **ADAPT), tmp_path)["verse"]
    rows = load_tasks(open_job(load_recipe(zoo / "asked.yaml")))["verse"].splits.rows
    for row in (*rows["adapt"][:6], *rows["select"][:3]):
        assert list(examples.passages[row].answer) == greedy(zoo / "models" / "verse", examples.texts[row], 4)


def test_models_are_adapted_on_answers(zoo: Path) -> None:
    adarank.merge_recipe(recipe(zoo, "adapted.yaml", ASKED, **ADAPT), zoo / "adapted")
    record = json.loads((zoo / "adapted" / "adarank.json").read_text())["adaptation"]
    start, kept = record["judged"]["0"], record["judged"][str(record["step_kept"])]
    assert sum(kept[t]["agreement"] for t in TASKS) >= sum(start[t]["agreement"] for t in TASKS)
    assert any("prompts answered by the expert" in note for note in record["notes"])
    assert all(start[t]["inputs"] <= 4 * 12 for t in TASKS)  # tokens of the select split's answers
    assert not list(zoo.glob(".adapted.state"))


BLOCKS = {
    "llama": ["model.layers.0", "model.layers.1"],
    "t5": ["encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1"],
    "bart": ["model.encoder.layers.0", "model.decoder.layers.0"],
}


def test_blocks_of_any_kind_are_adapted(zoo: Path) -> None:
    """Those of T5 give each other more than hidden states, and hold a list of layers that are no blocks."""
    path = recipe(zoo, "blocks.yaml", ASKED, **{**ADAPT, "adapt": {"by": "block", "steps": 2, "batch_size": 4}})
    blocks = adarank.merge_recipe(path, zoo / "blocks")["adaptation"]["blocks"]
    kind = json.loads((zoo / "models" / "base" / "config.json").read_text())["model_type"]
    assert [block["block"] for block in blocks] == BLOCKS[kind]
    assert sum(blocks[0]["after"].values()) <= sum(blocks[0]["before"].values())
    assert all(value > 0 for block in blocks for value in block["before"].values())


def weights(out: Path) -> dict[str, Tensor]:
    return load_file(out / "model.safetensors")


def test_an_interrupted_run_generates_what_is_left(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, calls = recipe(llama, "cut.yaml", ASKED, **ADAPT), []
    generate = answering.answered

    def stopping(*given: Any) -> Any:
        calls.append(given[3])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(*given)

    adarank.merge_recipe(path, llama / "whole")
    monkeypatch.setattr(answering, "answered", stopping)
    with pytest.raises(KeyboardInterrupt):
        adarank.merge_recipe(path, llama / "cut")
    (torn,) = sorted((llama / ".cut.state").rglob("answers/*/1.pt"))
    torn.write_bytes(torn.read_bytes()[:100])  # as a full disk or a lost machine may leave it
    adarank.merge_recipe(path, llama / "cut")
    assert calls.count(calls[0]) == 1  # it was kept whole
    assert calls.count(calls[1]) == 2
    assert len(calls) == 6 + 2  # three batches for each of two tasks, one of them thrice
    one, other = weights(llama / "whole"), weights(llama / "cut")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_predictions_are_kept_expert_by_expert(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = open_job(load_recipe(recipe(llama, "kept.yaml", **ADAPT)))
    data, models, settings = load_tasks(job), build_models(job), AdaptSettings(self_label={"top_logits": 5})
    logits, passes = CausalModels.logits, []

    def counted(self: CausalModels, module: Any, batch: Any) -> Tensor:
        passes.append(len(batch["input_ids"]))
        return logits(self, module, batch)

    monkeypatch.setattr(CausalModels, "logits", counted)
    first = expert_predictions(job, models, data, settings, ["these"], tmp_path)
    assert sum(passes) == 36 * len(TASKS)  # the adapt and select rows of each task
    one, _ = sorted(tmp_path.rglob("experts.pt"))
    one.write_bytes(one.read_bytes()[:99])
    again = expert_predictions(job, models, data, settings, ["these"], tmp_path)
    assert sum(passes) == 36 * (len(TASKS) + 1)
    for task in TASKS:
        row = data[task].splits.rows["select"][:1]
        kept, made = again[task].logits[row], first[task].logits[row]
        assert isinstance(kept, TopLogits)
        assert isinstance(made, TopLogits)
        assert torch.equal(kept.values, made.values)
        assert torch.equal(kept.classes, made.classes)
        assert torch.equal(kept.rest, made.rest)


def test_only_answers_count(llama: Path, tmp_path: Path) -> None:
    examples = answered(recipe(llama, "asked.yaml", ASKED, **ADAPT), tmp_path)["news"]
    job = open_job(load_recipe(recipe(llama, "asked.yaml", ASKED, **ADAPT)))
    row = load_tasks(job)["news"].splits.rows["adapt"][0]
    net = AutoModelForCausalLM.from_pretrained(llama / "models" / "news").float().eval()
    prompt = AutoTokenizer.from_pretrained(llama / "models" / "news")(examples.texts[row]).input_ids
    with torch.no_grad():
        whole = net(input_ids=torch.tensor([[*prompt, *examples.passages[row].answer]])).logits[0]
        assert job.family is not None
        seen = job.family.logits(net, examples.batch([row]))
    torch.testing.assert_close(seen, whole[len(prompt) - 1 : -1])
    assert seen.argmax(-1).tolist() == list(examples.passages[row].answer)


def test_a_long_prompt_loses_its_start(llama: Path, tmp_path: Path) -> None:
    path = recipe(llama, "long.yaml", {**ASKED, "max_length": 8}, **ADAPT)
    examples = answered(path, tmp_path)["verse"]
    for row in load_tasks(open_job(load_recipe(path)))["verse"].splits.rows["adapt"]:
        assert examples.passages[row].prompt == examples.prompts[row][-4:]


def test_statistics_are_taken_of_prompts_with_answers(llama: Path) -> None:
    adarank.merge_recipe(recipe(llama, "regmean.yaml", ASKED, merge_method="regmean"), llama / "regmean")
    adarank.merge_recipe(recipe(llama, "text.yaml", merge_method="regmean"), llama / "text")
    one, other = weights(llama / "regmean"), weights(llama / "text")
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])


def test_answers_of_other_experts_are_not_taken_up(llama: Path, tmp_path: Path) -> None:
    path = recipe(llama, "asked.yaml", ASKED, **ADAPT)
    job = open_job(load_recipe(path))
    for inputs in ({"of": "these"}, {"of": "others"}, {"of": "these"}):
        with_answers(job, load_tasks(job), inputs, tmp_path, lambda text: None)
    assert len(list(tmp_path.glob("answers/*"))) == 2 * len(TASKS)


def make_adapters(folder: Path) -> None:
    """adapters/TASK over models/base, and whole/TASK, what peft merges it into."""
    load: Any = AutoModelForCausalLM.from_pretrained
    for seed, task in enumerate(TASKS):
        wrapped = get_peft_model(load(folder / "models" / "base"), LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj", "down_proj"]))  # fmt: skip
        train(wrapped, seed, 0.3)
        wrapped.save_pretrained(folder / "adapters" / task)
        merged: Any = PeftModel.from_pretrained(load(folder / "models" / "base"), str(folder / "adapters" / task))
        merged.merge_and_unload().save_pretrained(folder / "whole" / task)
        AutoTokenizer.from_pretrained(folder / "models" / "base").save_pretrained(folder / "whole" / task)


def test_adapters_are_adapted_as_what_they_merge_into(llama: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        make_adapters(llama)
    merged = []
    for kind in ("adapters", "whole"):
        models = [{"model": f"{kind}/{t}", "task": {"name": t, "data": f"data/{t}.jsonl", "kind": "text-generation", **ASKED}} for t in TASKS]  # fmt: skip
        adarank.merge_recipe(recipe(llama, f"{kind}.yaml", models=models, **ADAPT), llama / f"{kind}-out")
        merged.append(weights(llama / f"{kind}-out"))
    for name, tensor in merged[0].items():
        torch.testing.assert_close(tensor, merged[1][name], atol=1e-4, rtol=1e-3)
