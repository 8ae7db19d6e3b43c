"""Tiny text models with further heads: a class of each word, a span, a choice, a number, several classes, a vector."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertTokenizerFast, PreTrainedTokenizerFast

WORDS = "good bad red blue one two up down in out".split()  # noqa: SIM905 (a list of words)
TAGS = ("O", "B-A", "I-A", "B-B")
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "max_position_embeddings": 48, "initializer_range": 0.3}  # fmt: skip
_CLASSES: Mapping[str, Any] = {
    "token-classification": transformers.BertForTokenClassification,
    "question-answering": transformers.BertForQuestionAnswering,
    "multiple-choice": transformers.BertForMultipleChoice,
    "regression": transformers.BertForSequenceClassification,
    "multi-label": transformers.BertForSequenceClassification,
}
_CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "token-classification": {"id2label": dict(enumerate(TAGS)), "label2id": {tag: i for i, tag in enumerate(TAGS)}},
    "regression": {"num_labels": 1, "problem_type": "regression"},
    "multi-label": {"num_labels": 3, "problem_type": "multi_label_classification"},
}
COLUMNS: Mapping[str, Mapping[str, str]] = {"question-answering": {"text_pair": "context"}}
KINDS = tuple(_CLASSES)


def words(rng: random.Random, least: int = 3, most: int = 8) -> list[str]:
    return rng.choices(WORDS, k=rng.randint(least, most))


def _tokens(rng: random.Random) -> dict[str, Any]:
    text = words(rng)
    return {"text": text, "label": [rng.choice(TAGS) for _ in text]}


def _question(rng: random.Random) -> dict[str, Any]:
    context = words(rng, 5, 12)
    start = rng.randrange(len(context) - 1)
    answer = " ".join(context[start : start + 2])
    return {"text": " ".join(words(rng, 2, 4)), "context": " ".join(context), "label": {"text": [answer]}}


def _choice(rng: random.Random) -> dict[str, Any]:
    count = rng.randint(2, 4)
    options = [" ".join(words(rng, 1, 3)) + f" {WORDS[i]}" for i in range(count)]
    return {"text": " ".join(words(rng)), "choices": options, "label": rng.randrange(count)}


ROWS: Mapping[str, Callable[[random.Random], dict[str, Any]]] = {
    "token-classification": _tokens,
    "question-answering": _question,
    "multiple-choice": _choice,
    "regression": lambda rng: {"text": " ".join(words(rng)), "label": round(rng.random(), 2)},
    "multi-label": lambda rng: {"text": " ".join(words(rng)), "label": [i for i in range(3) if rng.random() < 0.5]},
}


def tokenizer() -> BertTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    return BertTokenizerFast(vocab=vocabulary, model_max_length=48)


def moved(state: Mapping[str, torch.Tensor], size: float = 0.1) -> dict[str, torch.Tensor]:
    """A state some way from another; embeddings stay."""
    return {k: v if "embed" in k else v + size * torch.randn_like(v) for k, v in state.items()}


def make_zoo(folder: Path, kind: str, tasks: tuple[str, ...] = ("a", "b"), rows: int = 60) -> Path:
    """models/base, a body; models/TASK of a kind; data/TASK.jsonl. Returns `folder`."""
    torch.manual_seed(0)
    tokens = tokenizer()
    config = transformers.BertConfig(vocab_size=len(tokens), **SMALL)
    body = transformers.BertModel(config)
    body.save_pretrained(folder / "models" / "base")
    tokens.save_pretrained(folder / "models" / "base")
    for task in tasks:
        expert = _CLASSES[kind](transformers.BertConfig(vocab_size=len(tokens), **SMALL, **_CONFIGS.get(kind, {})))
        expert.bert.load_state_dict(moved(body.state_dict()), strict=False)
        for parameter in expert.base_model.parameters():
            parameter.requires_grad_(False)
        heads = [p for p in expert.parameters() if p.requires_grad]
        with torch.no_grad():  # of a size that makes predictions differ
            [p.copy_(torch.randn_like(p)) for p in heads]
        expert.save_pretrained(folder / "models" / task)
        tokens.save_pretrained(folder / "models" / task)
        write_rows(
            folder / "data" / f"{task}.jsonl", [ROWS[kind](random.Random(f"{task}{row}")) for row in range(rows)]
        )
    return folder


def t5_zoo(folder: Path) -> Path:
    """As `make_zoo`, of T5 with the head of a classifier; its base generates."""
    torch.manual_seed(0)
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokens = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", pad_token="<pad>", unk_token="<unk>", model_max_length=48)  # fmt: skip
    small = {"vocab_size": len(vocabulary), "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}  # fmt: skip
    base = transformers.T5ForConditionalGeneration(transformers.T5Config(**small))
    base.save_pretrained(folder / "models" / "base")
    for task in ("a", "b"):
        expert = transformers.T5ForSequenceClassification(transformers.T5Config(**small, num_labels=2))
        state = {name: value if "shared" in name or "embed" in name else value + 0.2 * torch.randn_like(value) for name, value in base.state_dict().items()}  # fmt: skip
        expert.transformer.load_state_dict({k: v for k, v in state.items() if k != "lm_head.weight"}, strict=False)
        with torch.no_grad():  # of a size that makes predictions differ
            [p.copy_(torch.randn_like(p)) for p in expert.classification_head.parameters()]
        expert.save_pretrained(folder / "models" / task)
        tokens.save_pretrained(folder / "models" / task)
        rng = random.Random(task)
        rows = [{"text": " ".join(words(rng)), "label": rng.randrange(2)} for _ in range(60)]
        write_rows(folder / "data" / f"{task}.jsonl", rows)
    return folder


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def recipe(
    folder: Path, kind: str, name: str = "recipe.yaml", task: Mapping[str, Any] | None = None, **changes: Any
) -> Path:
    """A recipe over the zoo; `task` adds to what it says of each task."""
    values: dict[str, Any] = {
        "merge_method": "task_arithmetic",
        "base_model": "models/base",
        "models": [
            {"model": f"models/{t}", "task": {"name": t, "data": f"data/{t}.jsonl", "max_length": 48, "columns": dict(COLUMNS.get(kind, {})), **(task or {})}}
            for t in ("a", "b")
        ],
        "device": "cpu",
        **changes,
    }  # fmt: skip
    path = folder / name
    path.write_text(yaml.safe_dump(values))
    return path


ADAPT: Mapping[str, Any] = {
    "merge_method": "adarank",
    "parameters": {"rank": 0.5, "lambda": 1.0},
    "adapt": {"steps": 30, "batch_size": 8, "lr_masks": 0.02, "lr_lambda": 0.005, "keep": "last"},
}
