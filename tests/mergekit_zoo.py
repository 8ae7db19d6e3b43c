"""The recipe file of every method that mergekit has and adarank has too, and tiny models to merge by it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from adarank.io.checkpoint import Checkpoint

HIDDEN, FFN, VOCABULARY, LAYERS = 4, 6, 5, 3
MODELS = ("base", "a", "b", "c")
CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN, "intermediate_size": FFN,
    "num_hidden_layers": LAYERS, "num_attention_heads": 1, "num_key_value_heads": 1, "vocab_size": VOCABULARY,
    "tie_word_embeddings": False,
}  # fmt: skip
# An embedding, a matrix of the first, the middle and the last layer, a norm, and the head.
SHOWN = (
    "model.embed_tokens.weight",
    "model.layers.0.mlp.up_proj.weight",
    "model.layers.1.self_attn.q_proj.weight",
    "model.layers.2.mlp.down_proj.weight",
    "model.norm.weight",
    "lm_head.weight",
)


def entries(*weights: Any) -> list[dict[str, Any]]:
    return [{"model": f"./{n}", "parameters": {"weight": w}} for n, w in zip(MODELS[1:], weights, strict=True)]


SWITCH = [{"filter": "mlp", "value": [True, False]}, {"filter": "self_attn", "value": False}, {"value": True}]
FILTERS = [{"filter": "mlp", "value": 0.9}, {"filter": "self_attn", "value": [0.1, 0.7]}, {"value": 0.4}]
TA: dict[str, Any] = {"merge_method": "task_arithmetic", "base_model": "./base"}
FILES = {
    "linear": """
models:
  - model: ./a
    parameters:
      weight: 1.0
  - model: ./b
    parameters:
      weight: 0.3
  - model: ./c
    parameters:
      weight: 0.5
merge_method: linear
dtype: float32
""",
    "slerp": """
models:
  - model: ./base
  - model: ./a
merge_method: slerp
base_model: ./base
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5 # fallback for rest of tensors
dtype: float32
""",
    "nuslerp": """
models:
  - model: ./a
    parameters:
      weight: 0.5
  - model: ./b
    parameters:
      weight: 0.3
merge_method: nuslerp
base_model: ./base
parameters:
  nuslerp_row_wise: false
  nuslerp_flatten: false
dtype: float32
""",
    "task_arithmetic": """
models:
  - model: ./a
    parameters:
      weight: 0.6
  - model: ./b
    parameters:
      weight: 0.25
merge_method: task_arithmetic
base_model: ./base
parameters:
  lambda: 0.8
dtype: float32
""",
    "ties": """
models:
  - model: ./base
    # no parameters necessary for base model
  - model: ./a
    parameters:
      density: [1, 0.7, 0.1] # density gradient
      weight: 1.0
  - model: ./b
    parameters:
      density: 0.5
      weight: [0, 0.3, 0.7, 1] # weight gradient
  - model: ./c
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: ./base
parameters:
  normalize: true
  int8_mask: true
dtype: float32
""",
    "dare_linear": """
models:
  - model: ./a
    parameters:
      weight: 0.4
      density: 1.0
  - model: ./b
    parameters:
      weight: 0.7
merge_method: dare_linear
base_model: ./base
parameters:
  int8_mask: true
dtype: float32
""",
    "dare_ties": """
models:
  - model: ./base
  - model: ./a
    parameters:
      density: 1.0
      weight: 0.4
  - model: ./b
    parameters:
      density: 1.0
      weight: 0.3
  - model: ./c
    parameters:
      density: 1.0
      weight: 0.3
merge_method: dare_ties
base_model: ./base
parameters:
  int8_mask: true
  normalize: true
dtype: float32
out_dtype: float32
""",
    "breadcrumbs": """
models:
  - model: ./a
    parameters:
      density: 0.6
      gamma: 0.1
      weight: 0.5
  - model: ./b
    parameters:
      density: 0.4
      gamma: 0.05
      weight: 1.0
merge_method: breadcrumbs
base_model: ./base
dtype: float32
""",
    "breadcrumbs_ties": """
models:
  - model: ./a
    parameters: {weight: 0.5}
  - model: ./b
    parameters: {weight: 1.0}
  - model: ./c
    parameters: {weight: 0.25}
merge_method: breadcrumbs_ties
base_model: ./base
parameters:
  density: 0.7
  gamma: 0.1
  lambda: 1.2
dtype: float32
""",
    "della": """
models:
  - model: ./a
    parameters:
      weight: 0.5
  - model: ./b
    parameters:
      weight: 0.8
merge_method: della
base_model: ./base
parameters:
  density: 1.0
  epsilon: 0.05
  lambda: 1.1
dtype: float32
""",
    "della_linear": """
models:
  - model: ./a
    parameters:
      weight: 0.5
  - model: ./b
    parameters:
      weight: 0.8
merge_method: della_linear
base_model: ./base
parameters:
  density: 1.0
  epsilon: 0.05
dtype: float32
""",
    "model_stock": """
models:
  - model: ./a
  - model: ./b
  - model: ./c
base_model: ./base
merge_method: model_stock
parameters:
  filter_wise: false
dtype: float32
""",
    "sce": """
models:
  - model: ./a
  - model: ./b
  - model: ./c
merge_method: sce
base_model: ./base
parameters:
  select_topk: 0.5
dtype: float32
""",
    "karcher": """
models:
  - model: ./a
  - model: ./b
  - model: ./c
merge_method: karcher
parameters:
  max_iter: 20
  tol: 1.0e-6
dtype: float32
""",
    "multislerp": """
models:
  - model: ./a
    parameters:
      weight: 0.3
  - model: ./b
    parameters:
      weight: [0.2, 1.0]
  - model: ./c
    parameters:
      weight: 0.5
merge_method: multislerp
base_model: ./base
parameters:
  normalize_weights: true
  eps: 1e-8
dtype: float32
""",
    "nearswap": """
models:
  - model: ./a
merge_method: nearswap
base_model: ./base
parameters:
  t:
    - filter: mlp
      value: [0.1, 0.5]
    - value: 0.2
dtype: float32
""",
    "arcee_fusion": """
models:
  - model: ./a
merge_method: arcee_fusion
base_model: ./base
dtype: float32
""",
    "ram": """
models:
  - model: ./a
  - model: ./b
  - model: ./c
merge_method: ram
base_model: ./base
parameters:
  epsilon: 0.7
dtype: float32
""",
    "ramplus_tl": """
models:
  - model: ./a
  - model: ./b
  - model: ./c
merge_method: ramplus_tl
base_model: ./base
parameters:
  epsilon: [0.4, 0.8]
  r: 0.3
  alpha: 2.0
dtype: float32
""",
}
FILES["passthrough"] = """
slices:
  - sources:
      - model: ./a
        layer_range: [0, 2]
  - sources:
      - model: ./a
        layer_range: [1, 3]
        parameters:
          scale:
            - filter: o_proj
              value: 0.0
            - filter: down_proj
              value: 0.5
            - value: 1.0
merge_method: passthrough
dtype: float32
"""
RECIPES: dict[str, dict[str, Any]] = {
    **{name: yaml.safe_load(text) for name, text in FILES.items()},
    "linear-weights": {"merge_method": "linear", "models": entries(0.2, 0.5, 1.0)},
    "linear-sum": {"merge_method": "linear", "models": entries(0.2, 0.5, 1.0), "parameters": {"normalize": False}},
    "linear-gradient": {"merge_method": "linear", "models": entries([0.0, 0.25, 1.0], [1.0, 0.0], 0.5)},
    "linear-filters": {"merge_method": "linear", "models": entries(FILTERS, 0.5, 1.0)},
    "ta": {**TA, "models": entries(0.2, 0.5, 1.0)},
    "ta-lambda": {**TA, "models": entries(0.2, 0.5, 1.0), "parameters": {"lambda": 0.4}},
    "ta-normalised": {**TA, "models": entries(0.2, 0.5, 1.0), "parameters": {"normalize": True, "lambda": 1.5}},
    "ta-filters": {**TA, "models": entries(FILTERS, 0.5, 1.0), "parameters": {"lambda": 0.8}},
    "ta-gradient": {**TA, "models": entries([0.0, 0.25, 1.0], [1.0, 0.0], 0.5)},
    "ta-switch": {**TA, "models": entries(0.2, 0.5, 1.0), "parameters": {"normalize": [False, True, False]}},
    "linear-switch": {"merge_method": "linear", "models": entries(0.2, 0.5, 1.0), "parameters": {"normalize": SWITCH}},
    "ties-switch": {"merge_method": "ties", "base_model": "./base", "models": entries(0.2, 0.5, 1.0),
                    "parameters": {"density": [0.3, 0.9], "rescale": [False, True], "normalize": SWITCH}},
    "stock-switch": {"merge_method": "model_stock", "base_model": "./base", "models": [{"model": f"./{n}"} for n in "abc"],
                     "parameters": {"filter_wise": [True, False]}},
    "nuslerp-switch": {"merge_method": "nuslerp", "base_model": "./base", "models": entries(0.2, 0.5, 1.0)[:2],
                       "parameters": {"nuslerp_flatten": SWITCH, "nuslerp_row_wise": [True, False]}},
    "multislerp-switch": {"merge_method": "multislerp", "models": entries(0.2, 0.5, 1.0),
                          "parameters": {"normalize_weights": [False, True], "eps": 0.01}},
}  # fmt: skip


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
    """Numbers between -1 and 1, exact in float32 and the same on every machine, whose differences hardly repeat."""
    index = torch.arange(torch.Size(shape).numel())
    return (((index + 3) ** 2 * (2749 * number + 5171) + position * 9377) % 65521 / 32768 - 1).reshape(shape)


def write_models(folder: Path) -> None:
    for number, name in enumerate(MODELS):
        (folder / name).mkdir()
        state = {n: value(number, i, shape).float() for i, (n, shape) in enumerate(shapes().items())}
        save_file(state, folder / name / "model.safetensors", metadata={"format": "pt"})
        (folder / name / "config.json").write_text(json.dumps(CONFIG))


def picked(merged: Checkpoint) -> list[float]:
    """A number for each tensor shown that every entry and its place have a part in: mean_i i·x_i."""
    flat = [merged.read(name).double().flatten() for name in SHOWN]
    return [round(float((torch.arange(1, x.numel() + 1) * x).mean()), 6) for x in flat]
