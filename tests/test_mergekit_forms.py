"""The forms in which mergekit's recipes are written: its examples, its guides, LazyMergekit's and its web page's.

Each runs unchanged on small local models, and gives mergekit's numbers where both are deterministic. These are of mergekit
0.1.5 (torch 2.13.0); `python benchmarks/mergekit_compare.py --venv VENV --values tests/test_mergekit_forms.py` prints them anew.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from adarank.io.checkpoint import Checkpoint
from adarank.recipe.reader import load_recipe
from adarank.workflow.merge import merge
from mergekit_zoo import FILES, picked, write_models

GRADIENTS = """
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5 # fallback for rest of tensors"""
# Those of a single merge that mergekit-yaml reads, with its numbers.
FORMS = {
    "example of two experts": """
models:
  - model: ./a
    parameters:
      density: 0.5
      weight: 0.5
  - model: ./b
    parameters:
      density: 0.5
      weight: 0.5
merge_method: ties
base_model: ./base
parameters:
  normalize: false
  int8_mask: true
dtype: float32
""",
    "example of slerp by slice": f"""
slices:
  - sources:
      - model: ./a
        layer_range: [0, 3]
      - model: ./b
        layer_range: [0, 3]
merge_method: slerp
base_model: ./a
parameters:{GRADIENTS}
dtype: float32
""",
    "example of linear": FILES["linear"],
    "example of more layers": """
slices:
  - sources:
    - model: ./a
      layer_range: [0, 2]
  - sources:
    - model: ./b
      layer_range: [1, 3]
merge_method: passthrough
dtype: float32
""",
    "example of ties": FILES["ties"],
    "base of slerp second": f"""
slices:
  - sources:
      - model: ./a
        layer_range: [0, 3]
      - model: ./b
        layer_range: [0, 3]
merge_method: slerp
base_model: ./b
parameters:{GRADIENTS}
dtype: float32
""",
    "new layers that change nothing": """
slices:
- sources:
  - model: ./a
    layer_range: [0, 3]
- sources:
  - model: ./a
    layer_range: [2, 3]
    parameters:
      scale:
      - filter: o_proj
        value: 0.0
      - filter: down_proj
        value: 0.0
      - value: 1.0
merge_method: passthrough
dtype: float32
""",
    "one model": """
models:
  - model: ./a
    parameters:
      scale: [0.5, 1.5]
merge_method: passthrough
dtype: float32
""",
    "evolved slices": """
base_model: ./base
dtype: float32
merge_method: task_arithmetic
parameters:
  int8_mask: 1.0
  normalize: 0.0
slices:
- sources:
  - layer_range: [0, 2]
    model: ./base
  - layer_range: [0, 2]
    model: ./a
    parameters:
      weight: 0.35
  - layer_range: [1, 3]
    model: ./b
    parameters:
      weight: [0.2, 0.7]
- sources:
  - layer_range: [2, 3]
    model: ./base
  - layer_range: [2, 3]
    model: ./a
    parameters:
      weight: 1.2
  - layer_range: [0, 1]
    model: ./c
    parameters:
      weight: [0.2, 0.7]
""",
    "settings of slices": """
slices:
  - sources:
      - model: ./a
        layer_range: [0, 2]
      - model: ./b
        layer_range: [1, 3]
        parameters:
          weight: [{filter: layers.1., value: 0.9}]
    parameters:
      weight: [{filter: mlp, value: 0.3}]
  - sources:
      - model: ./b
        layer_range: [1, 3]
      - model: ./c
        layer_range: [0, 2]
    parameters:
      weight: [0.25, 0.75]
      normalize: [false, true]
parameters:
  weight: 0.5
merge_method: linear
dtype: float32
""",
    "bases of slices": """
slices:
  - sources:
      - model: ./a
        layer_range: [0, 1]
      - model: ./b
        layer_range: [0, 1]
    base_model: ./b
    parameters: {t: 0.2}
  - sources:
      - model: ./c
        layer_range: [0, 2]
      - model: ./a
        layer_range: [1, 3]
base_model: ./a
parameters: {t: [0.3, 0.9]}
merge_method: slerp
dtype: float32
""",
    "models with ranges of a module": """
modules:
  default:
    slices:
    - sources:
      - layer_range: [0, 3]
        model: ./base
      - layer_range: [0, 3]
        model: ./a
        parameters:
          density: 0.6
          weight: 0.5
      - layer_range: [0, 3]
        model: ./b
        parameters:
          density: 0.55
          weight: 0.5
merge_method: ties
base_model: ./base
parameters:
  normalize: [true, false]
  int8_mask: 1.0
dtype: float32
out_dtype: float32
""",
    "one model and its base": """
merge_method: task_arithmetic
base_model: ./base
models:
  - model: ./base
  - model: ./a
    parameters:
      weight: 1.0
dtype: float32
""",
    "layers from the middle": """
slices:
  - sources:
    - model: ./b
      layer_range: [1, 3]
    - model: ./c
      layer_range: [0, 2]
  - sources:
    - model: ./b
      layer_range: [0, 2]
merge_method: linear
parameters: {weight: [1, 3]}
dtype: float32
""",
}  # fmt: skip
RECIPES: dict[str, dict[str, Any]] = {name: yaml.safe_load(text) for name, text in FORMS.items()}
EXPECTED: dict[str, list[float]] = {
    "example of two experts": [-0.01266, -1.423567, -1.170534, -1.829007, 0.412086, 0.952205],
    "example of slerp by slice": [1.233644, 1.880056, -1.03476, -1.205891, -0.319077, 1.725287],
    "example of linear": [-0.079138, -1.029611, -0.229469, -0.639156, -0.616718, -0.24464],
    "example of more layers": [0.187144, -2.012917, -0.693216, -3.262301, 0.203728, 2.75907],
    "example of ties": [0.187144, -1.434694, -0.645414, -2.542878, -0.750336, -0.256071],
    "base of slerp second": [1.233644, -2.012917, -1.25155, -1.06206, -0.319077, 1.725287],
    "new layers that change nothing": [0.187144, -2.012917, -0.693216, -1.205891, -0.750336, -0.256071],
    "one model": [0.093572, -1.006458, -0.693216, -1.808836, -0.375168, -0.128036],
    "evolved slices": [0.708067, -1.98374, -0.805577, -0.972767, -1.586719, -1.603098],
    "settings of slices": [0.944887, 0.307508, -0.750744, -0.812225, -0.159506, 0.183767],
    "bases of slices": [1.606427, 1.158369, -0.641538, -0.449036, -1.101297, -1.112665],
    "one model and its base": [0.187144, -2.012917, -0.693216, -1.205891, -0.750336, -0.256071],
    "layers from the middle": [0.010932, 0.136093, 0.237442, 1.03597, 0.203728, 2.75907],
    "models with ranges of a module": [-1.135682, 0.578147, -0.239295, -1.773251, 0.412086, -0.029253],
}
# Where mergekit draws random numbers, or writes no numbers that are its alone.
RANDOM = {
    "of a notebook": """
models:
  - model: ./base
    # No parameters necessary for base model
  - model: ./a
    parameters:
      density: 0.53
      weight: 0.4
  - model: ./b
    parameters:
      density: 0.53
      weight: 0.3
merge_method: dare_ties
base_model: ./base
parameters:
  int8_mask: true
dtype: bfloat16
random_seed: 0
""",
    "of a page": """
models:
  - model: ./a
    parameters: {weight: 0.3, density: 0.5}
  - model: ./b
    parameters: {weight: 0.7, density: 0.5}
merge_method: della_linear
base_model: ./base
parameters:
  epsilon: 0.05
  lambda: 1
dtype: bfloat16
out_dtype: bfloat16
tokenizer_source: base
""",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("forms")
    write_models(made)
    return made


def merged(text: str, name: str, folder: Path) -> Path:
    file, out = folder / f"{name}.yaml", folder / f"{name} merged"
    file.write_text(text)
    merge(load_recipe(file), out)
    return out


@pytest.mark.parametrize("name", FORMS)
def test_a_form_runs_unchanged_to_mergekits_numbers(name: str, folder: Path) -> None:
    assert picked(Checkpoint(merged(FORMS[name], name, folder))) == pytest.approx(EXPECTED[name], abs=1e-5)


@pytest.mark.parametrize("name", RANDOM)
def test_a_form_with_random_numbers_runs_unchanged(name: str, folder: Path) -> None:
    state = load_file(merged(RANDOM[name], name, folder) / "model.safetensors")
    assert set(state) == set(Checkpoint(folder / "base").tensors)
