"""The chat template of a merge: which one is written, where, and what it makes of a chat."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from adarank.errors import AdaRankError, RecipeError
from adarank.workflow.merge import merge
from token_zoo import WORDS, model

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}, {"role": "user", "content": "Bye"}]
KIND = {"role": "system", "content": "Be kind."}
MARKED = "{% for m in messages %}MARK{{ m['content'] }}{% endfor %}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, template in {"start": "1", "a": "2", "b": "3", "c": "3", "without": ""}.items():
        model(tmp_path / name, template=f"template {template}" if template else "")
    return tmp_path


def merged(folder: Path, template: str, experts: tuple[str, ...] = ("a",), **keys: Any) -> dict[str, Any]:
    models = [{"model": str(folder / name), "parameters": {"weight": 0.5}} for name in experts]
    recipe = {"merge_method": "task_arithmetic", "base_model": str(folder / "start"), "models": models}
    return merge({**recipe, "chat_template": template, **keys}, folder / "out")


@pytest.mark.parametrize(("experts", "number"), [
    (("a", "b", "c"), "3"), (("a", "b"), "1"), (("without", "b", "c"), "3"), (("without",), "1"),
])  # fmt: skip
def test_auto_takes_what_most_models_have_else_the_first(experts: tuple[str, ...], number: str, folder: Path) -> None:
    merged(folder, "auto", experts)
    assert AutoTokenizer.from_pretrained(folder / "out").chat_template == f"template {number}"


def test_auto_reads_templates_in_the_tokenizers_settings(folder: Path) -> None:
    for name in ("a", "b"):
        (folder / name / "chat_template.jinja").unlink()
        settings = json.loads((folder / name / "tokenizer_config.json").read_text())
        listed = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "stored"}]
        settings["chat_template"] = "stored" if name == "a" else listed
        (folder / name / "tokenizer_config.json").write_text(json.dumps(settings))
    merged(folder, "auto", ("a", "b"))
    assert (folder / "out" / "chat_template.jinja").read_text() == "stored"


def test_auto_without_any_template_writes_none(tmp_path: Path) -> None:
    for name in ("start", "a"):
        model(tmp_path / name)
    notes = merged(tmp_path, "auto")["plan"]["notes"]
    assert "chat_template: no model has one, and none is written." in notes
    assert not (tmp_path / "out" / "chat_template.jinja").exists()


@pytest.mark.parametrize("keys", [{}, {"tokenizer": {"pad_to_multiple_of": 8}}, {"tokenizer": {"tokens": {"new": {"source": {"kind": "zero"}}}}}])  # fmt: skip
def test_a_text_replaces_every_other_template(keys: dict[str, Any], folder: Path) -> None:
    settings = json.loads((folder / "start" / "tokenizer_config.json").read_text())
    (folder / "start" / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": "older"}))
    merged(folder, MARKED, **keys)
    out = AutoTokenizer.from_pretrained(folder / "out")
    assert out.apply_chat_template(CHAT, tokenize=False) == "MARKHiMARKYoMARKBye"
    assert "chat_template" not in json.loads((folder / "out" / "tokenizer_config.json").read_text())
    assert (folder / "start" / "chat_template.jinja").read_text() == "template 1"


FORMATS = {
    "chatml": "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYo<|im_end|>\n"
    "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n",
    "llama3": "<BOS><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nYo<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<BOS>[INST] Be kind.\n\nHi [/INST] Yo<EOS>[INST] Bye [/INST]",
    "alpaca": "Be kind.\n\n### Instruction:\nHi\n\n### Response:\nYo\n\n### Instruction:\nBye\n\n### Response:\n",
    "exaone": "[|system|]Be kind.[|endofturn|]\n[|user|]Hi\n[|assistant|]Yo[|endofturn|]\n[|user|]Bye\n[|assistant|]",
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_a_known_name_gives_that_format(name: str, folder: Path) -> None:
    merged(folder, name)
    out = AutoTokenizer.from_pretrained(folder / "out")
    out.bos_token, out.eos_token = "<BOS>", "<EOS>"
    assert out.apply_chat_template([KIND, *CHAT], tokenize=False, add_generation_prompt=True) == FORMATS[name]


def test_a_format_whose_tokens_are_not_there_is_noted(tmp_path: Path) -> None:
    for name in ("start", "a"):
        model(tmp_path / name, WORDS, added=["<|im_end|>"])
    (note,) = merged(tmp_path, "chatml")["plan"]["notes"]
    assert "chatml writes <|im_start|>, which" in note


@pytest.mark.parametrize(("template", "text"), [
    ("chatlm", "Did you mean 'chatml'"), ("hello", "no known format and no Jinja template"), ("{% for m in messages %}", "no valid Jinja template"),
])  # fmt: skip
def test_what_is_no_template_is_refused(template: str, text: str, folder: Path) -> None:
    with pytest.raises(RecipeError, match=text):
        merged(folder, template)


def test_a_template_without_a_tokenizer_is_refused(folder: Path) -> None:
    for file in [*(folder / "start").glob("tokenizer*"), folder / "start" / "chat_template.jinja"]:
        file.unlink()
    with pytest.raises(AdaRankError, match="has no tokenizer, and a template belongs to one"):
        merged(folder, "chatml")


def test_networks_for_each_task_keep_their_templates(folder: Path) -> None:
    with pytest.raises(RecipeError, match="'emr' writes a network for each task"):
        merged(folder, "chatml", merge_method="emr", max_shard_size="5GB")
