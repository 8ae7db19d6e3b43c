"""Recipes as they stand in model cards, with mergekit's numbers.

These are of mergekit 0.1.5 (torch 2.13.0); `python benchmarks/mergekit_compare.py --venv VENV --values tests/test_mergekit_cards.py`
prints them anew.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from adarank.io.checkpoint import Checkpoint
from mergekit_zoo import picked, write_models
from test_mergekit_forms import merged

CARDS = {
    "layers of one model, more than once": """
dtype: float32
merge_method: passthrough
slices:
- sources:
  - layer_range: [0, 2]
    model: ./a
- sources:
  - layer_range: [1,3]
    model: ./a
- sources:
  - layer_range: [0,1]
    model: ./a
""",
    "model_stock by slice": """
slices:
  - sources:
      - model: ./base
        layer_range: [0, 3]
      - model: ./a
        layer_range: [0, 3]
      - model: ./b
        layer_range: [0, 3]
merge_method: model_stock
base_model: ./base
dtype: float32
""",
    "fusion with weights": """
dtype: float32
out_dtype: float32
merge_method: arcee_fusion
base_model: ./base
models:
    - model: ./base
      parameters:
        weight:
          - filter: mlp
            value: [1, 2]
          - value: 1
    - model: ./a
      parameters:
        weight:
          - filter: lm_head
            value: 1
          - value: [1, 0.5]
""",
    "nearswap over the layers": """
merge_method: nearswap
dtype: float32
out_dtype: float32
base_model: ./base
models:
  - model: ./a
parameters:
  t: [0.1, 0.3, 0.5, 0.3, 0.1]
""",
    "base listed with its settings": """
models:
    - model: ./a
      parameters:
        density: 0.3
        weight: 0.5
    - model: ./base
      parameters:
        density: 0.7
        weight: 0.5

merge_method: ties
base_model: ./base
parameters:
    normalize: true
    int8_mask: true
dtype: float32
""",
    "models as mappings": """
base_model:
  model:
    path: ./base
dtype: float32
merge_method: task_arithmetic
slices:
- sources:
  - layer_range: [0, 3]
    model:
      model:
        path: ./a
    parameters:
      weight: 0.75
  - layer_range: [0, 3]
    model:
      model:
        path: ./base
""",
    "slerp of models": """
models:
  - model: ./a
  - model: ./b
merge_method: slerp
base_model: ./a
parameters:
  t: 0.5
dtype: float32
""",
    "weights in lists": """
models:
  - model: ./a
    parameters:
      weight: [0.5]
  - model: ./b
    parameters:
      weight: [0.7]
base_model: ./base
merge_method: multislerp
parameters:
  normalize_weights: false
  eps: 1e-8
dtype: float32
""",
}
RECIPES: dict[str, dict[str, Any]] = {name: yaml.safe_load(text) for name, text in CARDS.items()}
EXPECTED: dict[str, list[float]] = {
    "layers of one model, more than once": [0.187144, -2.012917, -0.693216, 1.092838, -0.750336, -0.256071],
    "model_stock by slice": [0.887923, -0.988815, -0.79041, -0.983221, -0.170918, 1.605043],
    "fusion with weights": [0.520166, -3.686881, -2.259939, -4.436824, -0.131409, 2.227528],
    "nearswap over the layers": [0.892859, -2.772044, 0.103443, -0.165476, 1.144914, 2.248852],
    "base listed with its settings": [1.262384, -3.896907, -1.598961, -3.656288, -0.131409, -0.603775],
    "models as mappings": [0.308159, -2.340474, -0.534106, -1.033563, -0.239023, 0.364828],
    "slerp of models": [1.233644, -0.089743, -1.181432, -1.623658, -0.319077, 1.725287],
    "weights in lists": [1.289683, 1.298703, -1.280407, -1.321624, -0.50303, 1.192481],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("cards")
    write_models(made)
    return made


@pytest.mark.parametrize("name", CARDS)
def test_a_cards_recipe_runs_unchanged_to_mergekits_numbers(name: str, folder: Path) -> None:
    assert picked(Checkpoint(merged(CARDS[name], name, folder))) == pytest.approx(EXPECTED[name], abs=1e-5)
