"""Numbers that mergekit 0.1.5 (torch 2.13.0) computed, from the same recipes and models.

`python benchmarks/mergekit_compare.py --mergekit-python … --values tests/test_mergekit_values.py` prints them anew.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from adarank import pipeline
from adarank.checkpoint import Checkpoint
from adarank.recipe import load_recipe

HIDDEN, FFN, VOCABULARY, LAYERS = 4, 6, 5, 3
MODELS = ("base", "a", "b", "c")
CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN, "intermediate_size": FFN,
    "num_hidden_layers": LAYERS, "num_attention_heads": 1, "num_key_value_heads": 1, "vocab_size": VOCABULARY,
    "tie_word_embeddings": False,
}  # fmt: skip
# An embedding, a matrix of the first, the middle and the last layer, a norm, and the head: one value of each.
PICKED = {
    "model.embed_tokens.weight": 7,
    "model.layers.0.mlp.up_proj.weight": 3,
    "model.layers.1.self_attn.q_proj.weight": 5,
    "model.layers.2.mlp.down_proj.weight": 11,
    "model.norm.weight": 2,
    "lm_head.weight": 19,
}


def entries(*weights: Any) -> list[dict[str, Any]]:
    return [{"model": f"./{n}", "parameters": {"weight": w}} for n, w in zip(MODELS[1:], weights, strict=True)]


FILTERS = [{"filter": "mlp", "value": 0.9}, {"filter": "self_attn", "value": [0.1, 0.7]}, {"value": 0.4}]
TA: dict[str, Any] = {"merge_method": "task_arithmetic", "base_model": "./base"}
RECIPES: dict[str, dict[str, Any]] = {
    "linear": {"merge_method": "linear", "models": entries(0.2, 0.5, 1.0)},
    "linear-sum": {"merge_method": "linear", "models": entries(0.2, 0.5, 1.0), "parameters": {"normalize": False}},
    "linear-gradient": {"merge_method": "linear", "models": entries([0.0, 0.25, 1.0], [1.0, 0.0], 0.5)},
    "linear-filters": {"merge_method": "linear", "models": entries(FILTERS, 0.5, 1.0)},
    "ta": {**TA, "models": entries(0.2, 0.5, 1.0)},
    "ta-lambda": {**TA, "models": entries(0.2, 0.5, 1.0), "parameters": {"lambda": 0.4}},
    "ta-normalised": {**TA, "models": entries(0.2, 0.5, 1.0), "parameters": {"normalize": True, "lambda": 1.5}},
    "ta-filters": {**TA, "models": entries(FILTERS, 0.5, 1.0), "parameters": {"lambda": 0.8}},
    "ta-gradient": {**TA, "models": entries([0.0, 0.25, 1.0], [1.0, 0.0], 0.5)},
}
EXPECTED = {
    "linear": [0.7720588, 0.7389706, 0.6507353, -0.1323529, -0.0661765, -0.2573529],
    "linear-sum": [1.3125, 1.25625, 1.10625, -0.225, -0.1125, -0.4375],
    "linear-gradient": [0.7291667, 0.6875, 0.6, -0.3333333, 0.4166667, 0.2083333],
    "linear-filters": [0.7236842, 0.578125, 0.6217105, -0.2395833, 0.0131579, -0.1973684],
    "ta": [1.3125, 1.3875, 0.975, 0.3, -0.375, -0.35],
    "ta-lambda": [0.525, 0.4425, 0.5025001, -0.33, 0.075, -0.215],
    "ta-normalised": [1.1580882, 1.2022059, 0.8823529, 0.1764705, -0.2867647, -0.3235294],
    "ta-filters": [1.1, 1.2825, 0.8475, 0.23, -0.175, -0.235],
    "ta-gradient": [1.09375, 1.125, 0.703125, -0.125, 0.4375, 0.375],
}


def shapes() -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        start = f"model.layers.{layer}"
        found |= {f"{start}.self_attn.{part}_proj.weight": (HIDDEN, HIDDEN) for part in "qkvo"}
        found |= {f"{start}.mlp.{part}_proj.weight": (FFN, HIDDEN) for part in ("up", "gate")}
        found[f"{start}.mlp.down_proj.weight"] = (HIDDEN, FFN)
        found |= {f"{start}.{part}_layernorm.weight": (HIDDEN,) for part in ("input", "post_attention")}
    return {**found, "model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}


def value(number: int, position: int, shape: tuple[int, ...]) -> Tensor:
    """Sixteenths between -1 and 1 that no two models or tensors share: the same on every machine."""
    index = torch.arange(torch.Size(shape).numel())
    return (((index * 7 + position * 5 + number * (index % 5 + 3)) % 33 - 16) / 16).reshape(shape)


def write_models(folder: Path) -> None:
    for number, name in enumerate(MODELS):
        (folder / name).mkdir()
        state = {n: value(number, i, shape).float() for i, (n, shape) in enumerate(shapes().items())}
        save_file(state, folder / name / "model.safetensors", metadata={"format": "pt"})
        (folder / name / "config.json").write_text(json.dumps(CONFIG))


def picked(merged: Checkpoint) -> list[float]:
    return [round(float(merged.read(name).flatten()[index]), 7) for name, index in PICKED.items()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("mergekit")
    write_models(made)
    return made


@pytest.mark.parametrize("name", RECIPES)
def test_same_numbers_as_mergekit(name: str, folder: Path) -> None:
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(RECIPES[name]))
    pipeline.merge(load_recipe(file), folder / name)
    assert picked(Checkpoint(folder / name)) == pytest.approx(EXPECTED[name], abs=1e-6)
