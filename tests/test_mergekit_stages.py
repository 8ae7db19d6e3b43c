"""Recipes of several stages, which mergekit-multi reads: the same merges as in files of their own."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from adarank.recipe.reader import load_recipe
from adarank.workflow.merge import merge
from mergekit_zoo import write_models
from test_mergekit_forms import GRADIENTS

STAGES = {
    "example of two stages": f"""
slices:
  - sources:
      - model: ./a
        layer_range: [0, 3]
      - model: ./b
        layer_range: [0, 3]
merge_method: slerp
base_model: ./a
parameters:{GRADIENTS}
dtype: float16
name: gradient-slerp
---
models:
  - model: gradient-slerp
    parameters:
      density: [1, 0.7, 0.1] # density gradient
      weight: 1.0
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
dtype: float16
name: gradient-slerp-ties
""",
    "guide to stages": """
name: first-merge
merge_method: linear
models:
  - model: ./a
  - model: ./b
parameters:
  weight: 0.5
---
name: second-merge
merge_method: slerp
base_model: first-merge  # the merge before
models:
  - model: ./c
parameters:
  t: 0.5
---
# the last has no name
merge_method: dare_ties
base_model: ./base
models:
  - model: second-merge
    parameters:
      density: 0.6
      weight: 0.5
  - model: ./b
    parameters:
      density: 0.8
      weight: 0.5
""",
    "layers of stages": """
name: core
merge_method: nuslerp
models:
  - model: ./a
    parameters:
      weight: 0.4
  - model: ./b
    parameters:
      weight: 0.6
---
name: blend
merge_method: nuslerp
models:
  - model: ./c
    parameters:
      weight: 0.6
  - model: ./a
    parameters:
      weight: 0.4
---
merge_method: passthrough
slices:
- sources:
  - model: ./a
    layer_range: [0, 1]
- sources:
  - model: core
    layer_range: [1, 3]
- sources:
  - model: blend
    layer_range: [1, 3]
dtype: float32
""",
}


@pytest.mark.parametrize("name", STAGES)
def test_stages_are_the_merges_one_after_another(name: str, tmp_path: Path) -> None:
    write_models(tmp_path)
    file, merged = tmp_path / "stages.yaml", tmp_path / "merged"
    file.write_text(STAGES[name])
    merge(load_recipe(file), merged)
    for document in STAGES[name].split("---"):
        file = tmp_path / "stage.yaml"
        file.write_text(document)
        last = tmp_path / yaml.safe_load(document).get("name", "last")
        merge(load_recipe(file), last)
    found, wanted = (load_file(out / "model.safetensors") for out in (merged, last))
    assert found.keys() == wanted.keys()
    assert all(found[key].equal(tensor) and found[key].dtype == tensor.dtype for key, tensor in wanted.items())
