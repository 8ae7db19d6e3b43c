"""Tiny models that generate text, made in a folder: base, experts, adapters of the base, prompts, recipe."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import adarank
from adarank.recipe.job import open_job
from adarank.recipe.reader import load_recipe
from adarank.workflow.load_tasks import load_tasks

WORDS = "the a cat dog sees likes red blue big small and runs sleeps here there now".split()  # noqa: SIM905
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
TASKS = ("verse", "news")
CHAT = "{% for m in messages %}<s>{{ m['role'] }} {{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}<s>assistant {% endif %}"
_SIZES = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_LLAMA = {
    **_SIZES, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "intermediate_size": 24, "max_position_embeddings": 48,
}  # fmt: skip
_T5 = {
    **_SIZES, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0,
    "tie_word_embeddings": False,
}  # fmt: skip
_BART = {
    **_SIZES, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 48,
    "decoder_start_token_id": 2, "forced_eos_token_id": None,
}  # fmt: skip


def network(architecture: str = "llama", **changes: Any) -> Any:
    """A model with weights as the generator of PyTorch gives them, so large that it is sure of some tokens."""
    if architecture == "llama":
        made: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**_LLAMA, **changes}))
    elif architecture == "t5":
        made = transformers.T5ForConditionalGeneration(transformers.T5Config(**{**_T5, **changes}))
    else:
        made = transformers.BartForConditionalGeneration(transformers.BartConfig(**{**_BART, **changes}))
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.mul_(10 if architecture == "llama" else 3)
    return made.eval()


def tokenizer(chat: bool = True) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words, which puts <s> before a text."""
    words = Tokenizer(models.WordLevel({token: i for i, token in enumerate([*SPECIAL, *WORDS, "user", "assistant"])}, unk_token="<unk>"))  # fmt: skip
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    if chat:
        made.chat_template = CHAT
    return made


def sentence(rng: random.Random, words: int) -> str:
    return " ".join(rng.choices(WORDS, k=words))


def make_zoo(folder: Path, architecture: str = "llama", chat: bool = True, rows: int = 60, **changes: Any) -> Path:
    """models/, and data/ with running text of each task: `text`; returns `folder`."""
    torch.manual_seed(0)
    base, tokens = network(architecture, **changes), tokenizer(chat)
    save(base, tokens, folder / "models" / "base")
    for task in TASKS:
        expert = network(architecture, **changes)
        expert.load_state_dict({k: v + 0.3 * v.std().nan_to_num(0.1) * torch.randn_like(v) for k, v in base.state_dict().items()})  # fmt: skip
        if changes.get("tie_word_embeddings", architecture != "t5" and architecture != "llama"):
            expert.tie_weights()
        save(expert, tokens, folder / "models" / task)
        rng = random.Random(task)
        texts = list({sentence(rng, rng.randint(4, 12)): None for _ in range(rows)})
        write(folder / "data" / f"{task}.jsonl", [{"text": text} for text in texts])
    return folder


def save(model: Any, tokens: PreTrainedTokenizerFast, folder: Path) -> None:
    model.save_pretrained(folder)
    tokens.save_pretrained(folder)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


ADAPT: dict[str, Any] = {
    "merge_method": "adarank",
    "parameters": {"rank": 0.25, "lambda": 1.0},
    "adapt": {"steps": 10, "batch_size": 4, "lr_masks": 0.05, "lr_lambda": 0.02, "check_every": 5},
}


def recipe(folder: Path, name: str = "recipe.yaml", task: dict[str, Any] | None = None, **changes: Any) -> Path:
    """A recipe over the zoo, with keys replaced or (None) removed; `task` is added to each task."""
    models = [{"model": f"models/{t}", "task": {"name": t, "data": f"data/{t}.jsonl", **(task or {})}} for t in TASKS]
    values: dict[str, Any] = {"merge_method": "cart", "base_model": "models/base", "models": models, "device": "cpu", **changes}  # fmt: skip
    path = folder / name
    path.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None}))
    return path


def model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).float().eval()


def texts(zoo: Path, task: str, split: str) -> Iterator[Tensor]:
    """The tokens of a split's rows, as the tokenizer gives them."""
    rows = [json.loads(line)["text"] for line in (zoo / "data" / f"{task}.jsonl").read_text().splitlines()]
    tokens = AutoTokenizer.from_pretrained(zoo / "models" / "base")
    data = load_tasks(open_job(load_recipe(recipe(zoo))))
    return (tokens(rows[row], return_tensors="pt").input_ids for row in data[task].splits.rows[split])


def evaluated(path: Path, *outputs: Path) -> dict[str, dict[str, float]]:
    return adarank.evaluate_recipe(path, outputs).rows
