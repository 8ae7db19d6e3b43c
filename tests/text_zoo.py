"""Tiny text classifiers of several architectures, made in a folder: base, experts with their heads, data, recipe."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from transformers import BertTokenizerFast

WORDS = "good bad red blue one two up down in out".split()  # noqa: SIM905 (a list of words)
TASKS = {"mood": 2, "colour": 3}
_SMALL = {
    "bert": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "max_position_embeddings": 16},
    "roberta": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "max_position_embeddings": 20, "pad_token_id": 0},
    "distilbert": {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 24, "max_position_embeddings": 16},
    "gpt2": {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16, "pad_token_id": 0},
}  # fmt: skip


def make_zoo(
    folder: Path,
    architecture: str = "bert",
    bare_base: bool = True,
    dtype: torch.dtype = torch.float32,
    tasks: Mapping[str, int] = TASKS,
    positions: int = 16,
    **sizes: int,
) -> Path:
    """Write models/, data/ and no recipe yet; returns `folder`."""
    torch.manual_seed(0)
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    tokens = BertTokenizerFast(vocab=vocabulary, model_max_length=positions)
    small = {**_SMALL[architecture], "vocab_size": len(vocabulary), **sizes}
    if positions != 16:
        small["max_position_embeddings"] = positions
    config = transformers.AutoConfig.for_model(architecture, **small)
    body = transformers.AutoModel.from_config(config)
    base: Any = body if bare_base else transformers.AutoModelForSequenceClassification.from_config(config)
    if not bare_base:
        getattr(base, base.base_model_prefix).load_state_dict(body.state_dict(), strict=False)
    _save(base, tokens, folder / "models" / "base", dtype)
    for task, classes in tasks.items():
        labels = {i: f"{task}-{i}" for i in range(classes)}
        own = transformers.AutoConfig.for_model(
            architecture, **small, num_labels=classes, id2label=labels, label2id={v: k for k, v in labels.items()}
        )
        expert = transformers.AutoModelForSequenceClassification.from_config(own)
        state = body.state_dict()
        moved = {k: v + 0.05 * torch.randn_like(v) if v.is_floating_point() and "embed" not in k and "wte" not in k and "wpe" not in k else v
                 for k, v in state.items()}  # fmt: skip
        getattr(expert, expert.base_model_prefix).load_state_dict(moved, strict=False)
        _save(expert, tokens, folder / "models" / task, dtype)
        _data(folder / "data" / f"{task}.tsv", classes)
    return folder


def recipe(folder: Path, name: str = "recipe.yaml", **changes: Any) -> Path:
    """A recipe over the zoo, with keys replaced or (None) removed."""
    values: dict[str, Any] = {
        "merge_method": "cart",
        "base_model": "models/base",
        "models": [{"model": f"models/{task}", "task": {"name": task, "data": f"data/{task}.tsv"}} for task in TASKS],
        "device": "cpu",
        **changes,
    }
    path = folder / name
    path.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None}))
    return path


ADAPT: Mapping[str, Any] = {
    "merge_method": "adarank",
    "parameters": {"rank": 0.25, "lambda": 1.0},
    "adapt": {"steps": 12, "batch_size": 4, "lr_masks": 0.05, "lr_lambda": 0.02, "check_every": 2},
}


def _save(model: Any, tokens: BertTokenizerFast, folder: Path, dtype: torch.dtype) -> None:
    model.to(dtype).save_pretrained(folder)
    tokens.save_pretrained(folder)


def _data(path: Path, classes: int) -> None:
    rng = random.Random(path.name)
    rows = {" ".join(rng.choices(WORDS, k=rng.randint(3, 9))): rng.randrange(classes) for _ in range(90)}
    path.parent.mkdir(exist_ok=True)
    path.write_text("label\ttext\n" + "".join(f"{label}\t{text}\n" for text, label in rows.items()))
