"""adarank beside mergekit: the same recipe file, unchanged, merged by both, compared tensor by tensor.

    python benchmarks/mergekit_compare.py --mergekit-bin VENV/bin/mergekit-yaml [--record records/peers/mergekit.json]
    python benchmarks/mergekit_compare.py --mergekit-bin VENV/bin/mergekit-yaml --values tests/test_mergekit_values.py

VENV is an environment of its own with torch and mergekit in it. The models are small Llamas made here: a base and
three experts, which are the base plus seeded noise. The second form prints mergekit's merges of the tiny models that
a test holds expected values of.

Two differences are meant: a recipe without tasks merges every float tensor, embeddings included, as mergekit does, but
adarank keeps integer buffers from the base; and adarank's arithmetic is float32 whatever the inputs' dtype, with one
cast at the end, where mergekit's task arithmetic works in the inputs' own dtype.
"""

from __future__ import annotations

import argparse
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from adarank import pipeline
from adarank.checkpoint import Checkpoint
from adarank.errors import AdaRankError
from adarank.recipe import load_recipe
from adarank.record import machine, versions
from adarank.writer import write_json

EXPERTS = ("code", "chat", "maths")
NOISE = 0.02
GRADIENT = [0.0, 0.25, 1.0]
FILTERED = [{"filter": "mlp", "value": 0.9}, {"filter": "self_attn", "value": [0.1, 0.7]}, {"value": 0.4}]
SHAPE = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 4,
         "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}  # fmt: skip


def recipe(method: str, weights: list[Any], parameters: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """A recipe in mergekit's dialect; a weight of None gives the model no parameters."""
    models = [{"model": f"./{name}", **({} if w is None else {"parameters": {"weight": w}})}
              for name, w in zip(EXPERTS, weights, strict=True)]  # fmt: skip
    needs_base = {} if method == "linear" else {"base_model": "./base"}
    return {"merge_method": method, **needs_base, "models": models, "parameters": parameters or {}, **more}


def agreeing() -> dict[str, dict[str, Any]]:
    """Recipes on which both must come to the same numbers."""
    plain = [0.2, 0.5, 1.0]
    linear, ta = "linear", "task_arithmetic"
    return {
        "linear": recipe(linear, plain),
        "linear, one weight for all": recipe(linear, [None] * 3, {"weight": 0.7}),
        "linear, negative weight": recipe(linear, [1.0, -0.4, 0.8]),
        "linear, not normalised": recipe(linear, plain, {"normalize": False}),
        "linear, gradient": recipe(linear, [GRADIENT, [1.0, 0.0], 0.5]),
        "linear, gradient, not normalised": recipe(linear, [GRADIENT, [1.0, 0.0], 0.5], {"normalize": False}),
        "linear, filters": recipe(linear, [FILTERED, 0.5, 1.0]),
        "linear, filters for all": recipe(linear, [None, None, 0.3], {"weight": FILTERED}),
        "linear, filters, not normalised": recipe(linear, [FILTERED, 0.5, 1.0], {"normalize": False}),
        "task_arithmetic": recipe(ta, plain),
        "task_arithmetic, lambda": recipe(ta, plain, {"lambda": 0.4}),
        "task_arithmetic, normalised": recipe(ta, plain, {"normalize": True}),
        "task_arithmetic, normalised, lambda": recipe(ta, plain, {"normalize": True, "lambda": 1.5}),
        "task_arithmetic, weights that sum to 0": recipe(ta, [1.0, -0.5, -0.5], {"normalize": True}),
        "task_arithmetic, gradient": recipe(ta, [GRADIENT, [1.0, 0.0], 0.5], {"lambda": 0.8}),
        "task_arithmetic, filters": recipe(ta, [FILTERED, 0.5, 1.0], {"lambda": 0.8}),
        "task_arithmetic, filters, normalised": recipe(ta, [FILTERED, 0.5, 1.0], {"normalize": True}),
        "task_arithmetic, base among the models": _with_base(recipe(ta, plain)),
        "task_arithmetic, dtype float32": recipe(ta, plain, dtype="float32"),
        "task_arithmetic, float32 written as bfloat16": recipe(ta, plain, dtype="float32", out_dtype="bfloat16"),
        "linear, float32 written as bfloat16": recipe(linear, plain, dtype="float32", out_dtype="bfloat16"),
    }


def dialect() -> dict[str, dict[str, Any]]:
    """Rarer forms of mergekit's dialect: whether each side takes them, and whether they then agree."""
    plain = [0.2, 0.5, 1.0]
    linear, ta = "linear", "task_arithmetic"
    return {
        "weight missing": recipe(linear, [None, 0.5, 1.0]),
        "weights missing, task_arithmetic": recipe(ta, [None] * 3),
        "number written 1e-1, which YAML reads as text": recipe(ta, ["1e-1", 0.5, 1.0]),
        "gradient with a number written 1e-1": recipe(ta, [["1e-1", 1.0], 0.5, 1.0]),
        "lambda written 5e-1": recipe(ta, plain, {"lambda": "5e-1"}),
        "filters that leave tensors to the global weight": recipe(
            ta, [[{"filter": "mlp", "value": 0.9}], 0.5, 1.0], {"weight": 0.4}
        ),
        "filters that leave tensors without weight": recipe(ta, [[{"filter": "mlp", "value": 0.9}], 0.5, 1.0]),
        "filter '*'": recipe(ta, [[{"filter": "mlp", "value": 0.9}, {"filter": "*", "value": 0.1}], 0.5, 1.0]),
        "one condition, not in a list": recipe(ta, [{"filter": "*", "value": 0.9}, 0.5, 1.0]),
        "filters that end in a bare number": recipe(ta, [[{"filter": "mlp", "value": 0.9}, 0.1], 0.5, 1.0]),
        "lambda as gradient": recipe(ta, plain, {"lambda": [0.2, 1.0]}),
        "lambda by filter": recipe(ta, plain, {"lambda": [{"filter": "mlp", "value": 0.5}, {"value": 1.0}]}),
        "normalize by filter": recipe(ta, plain, {"normalize": [{"filter": "mlp", "value": True}, {"value": False}]}),
        "int8_mask": recipe(ta, plain, {"int8_mask": True}),
        "rescale and density": recipe(ta, plain, {"rescale": False, "density": 0.5}),
        "unknown parameter": recipe(ta, plain, {"wieght": 2.0}),
        "weight: true": recipe(ta, [True, 0.5, 1.0]),
        "empty parameters": {**recipe(ta, plain), "parameters": None},
        "linear with a base_model": recipe(linear, plain, base_model="./base"),
        "linear with a base_model and a global weight": recipe(linear, plain, {"weight": 0.4}, base_model="./base"),
        "linear, base listed": _with_base(recipe(linear, plain), 0.3),
        "linear, weights that sum to 0": recipe(linear, [1.0, -0.5, -0.5]),
        "task_arithmetic, base listed with a weight": _with_base(recipe(ta, plain), 0.3),
        "the same expert twice": recipe(ta, plain) | {"models": [{"model": "./code", "parameters": {"weight": 0.5}}] * 2},
        "dtype bf16": recipe(ta, plain, dtype="bf16"),
        "tokenizer_source base": recipe(ta, plain, tokenizer_source="base"),
        "a model as a mapping": recipe(ta, plain)
        | {"models": [{"model": {"model": {"path": "./code"}}, "parameters": {"weight": 0.5}}]},
        "one layer, gradient": recipe(ta, [GRADIENT, [1.0, 0.0], 0.5])
        | {"base_model": "./one-layer/base",
           "models": [{"model": f"./one-layer/{n}", "parameters": {"weight": GRADIENT}} for n in EXPERTS]},
    }  # fmt: skip


def _with_base(values: dict[str, Any], weight: float | None = None) -> dict[str, Any]:
    entry = {"model": "./base", **({} if weight is None else {"parameters": {"weight": weight}})}
    return {**values, "models": [entry, *values["models"]]}


def make_models(folder: Path, dtype: torch.dtype, seed: int, layers: int) -> None:
    """base, code, chat and maths: a seeded random Llama and three noisy copies."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{**SHAPE, "num_hidden_layers": layers}))
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name in ("base", *EXPERTS):
        scale = 0.0 if name == "base" else NOISE
        noisy = {key: tensor + scale * torch.randn(tensor.shape) for key, tensor in start.items()}
        model.load_state_dict(noisy)
        model.to(dtype).save_pretrained(folder / name)
        model.to(torch.float32)


def mergekit(binary: Path, file: Path, out: Path) -> str | None:
    """Run mergekit's command in the recipe's folder, as its relative paths need. The error's last line, if any."""
    command = [str(binary.absolute()), str(file.absolute()), str(out.absolute()), "--quiet"]
    done = subprocess.run(command, cwd=file.parent, capture_output=True, text=True, check=False)
    lines = [line.strip() for line in done.stderr.splitlines() if "Error" in line]
    return None if done.returncode == 0 else (lines or [f"exit status {done.returncode}"])[-1]


def adarank(file: Path, out: Path) -> str | None:
    try:
        pipeline.merge(load_recipe(file), out)
    except AdaRankError as error:
        return " ".join(str(error).split())
    return None


def difference(ours: Checkpoint, theirs: Checkpoint) -> dict[str, Any]:
    """Largest difference of any tensor, relative to that tensor's largest value, and how many values differ at all."""
    worst, where, unequal, total = 0.0, "", 0, 0
    for name in theirs.tensors:
        a, b = ours.read(name), theirs.read(name)
        relative = float(_worst(a, b))
        if not relative <= worst:
            worst, where = relative, name
        unequal += int((a != b).sum())
        total += a.numel()
    same = set(ours.tensors) == set(theirs.tensors)
    dtypes = all(ours.tensors[n].dtype == theirs.tensors[n].dtype for n in theirs.tensors)
    return {"max_relative_difference": worst, "in": where, "values_unequal": unequal, "values": total,
            "same_names": same, "same_dtypes": dtypes}  # fmt: skip


def _worst(ours: Tensor, theirs: Tensor) -> Tensor:
    return (ours.double() - theirs.double()).abs().max() / theirs.double().abs().max().clamp(min=1e-30)


def compare(folder: Path, name: str, values: dict[str, Any], binary: Path) -> dict[str, Any]:
    """Both merges of one recipe file and what came of it."""
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        ours, theirs = Path(temporary) / "adarank", Path(temporary) / "mergekit"
        errors = {"adarank": adarank(file, ours), "mergekit": mergekit(binary, file, theirs)}
        refused = {side: error for side, error in errors.items() if error}
        found = {"refused": refused} if refused else difference(Checkpoint(ours), Checkpoint(theirs))
    print(f"  {name:52s} {found.get('max_relative_difference', found.get('refused'))}", flush=True)
    return {"name": name, "recipe": values, **found}


def rounding(folder: Path, values: dict[str, Any], binary: Path) -> dict[str, Any]:
    """How far each side's bfloat16 merge is from mergekit's float32 merge of the same bfloat16 models."""
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        exact, theirs, ours = (Path(temporary) / name for name in ("exact", "mergekit", "adarank"))
        file = folder / "recipe.yaml"
        file.write_text(yaml.safe_dump({**values, "dtype": "float32"}, sort_keys=False))
        mergekit(binary, file, exact)
        file.write_text(yaml.safe_dump(values, sort_keys=False))
        mergekit(binary, file, theirs)
        adarank(file, ours)
        sides = {"adarank": Checkpoint(ours), "mergekit": Checkpoint(theirs)}
        return {side: _rounding(merged, Checkpoint(exact)) for side, merged in sides.items()}


def _rounding(merged: Checkpoint, exact: Checkpoint) -> dict[str, float]:
    pairs = [(merged.read(name).double(), exact.read(name)) for name in exact.tensors]
    missed = sum(int((ours != theirs.bfloat16().double()).sum()) for ours, theirs in pairs)
    total = sum(ours.numel() for ours, _ in pairs)
    worst = max(float(_worst(ours, theirs)) for ours, theirs in pairs)
    return {"max_relative_error": worst, "share_not_the_nearest_bfloat16": missed / total}


def package_versions(binary: Path) -> dict[str, str]:
    """Versions in mergekit's environment."""
    code = "import importlib.metadata as m; print(*[p + ' ' + m.version(p) for p in ('mergekit','torch','transformers')], sep='\\n')"
    listed = subprocess.run(
        [str(binary.absolute().parent / "python"), "-c", code], capture_output=True, text=True, check=True
    )
    return dict(line.split() for line in listed.stdout.splitlines())


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    binary, seed = arguments.mergekit_bin, arguments.seed
    record: dict[str, Any] = {
        "what": "the same recipe file merged by adarank and by mergekit's command line",
        "command": "python benchmarks/mergekit_compare.py --mergekit-bin VENV/bin/mergekit-yaml",
        "settings": {"model": SHAPE, "experts": len(EXPERTS), "noise": NOISE},
        "seed": seed,
        "versions": versions(),
        "mergekit_environment": package_versions(binary),
        "machine": machine(),
    }
    with tempfile.TemporaryDirectory() as temporary:
        for dtype in (torch.float32, torch.bfloat16):
            label = str(dtype).removeprefix("torch.")
            folder = Path(temporary) / label
            make_models(folder, dtype, seed, SHAPE["num_hidden_layers"])
            make_models(folder / "one-layer", dtype, seed, 1)
            print(label, flush=True)
            record[label] = _summary([compare(folder, n, r, binary) for n, r in agreeing().items()])
        names = ("linear", "task_arithmetic", "task_arithmetic, normalised, lambda")
        record["bfloat16_rounding"] = {n: rounding(folder, agreeing()[n], binary) for n in names}
        print("dialect", flush=True)
        record["dialect"] = [compare(Path(temporary) / "float32", n, r, binary) for n, r in dialect().items()]
    return record


def _summary(recipes: list[dict[str, Any]]) -> dict[str, Any]:
    found = torch.tensor([r.get("max_relative_difference", float("inf")) for r in recipes], dtype=torch.float64)
    spread = {"min": float(found.min()), "median": float(found.median()), "max": float(found.max())}
    return {"max_relative_difference": spread, "refused": sum("refused" in r for r in recipes), "recipes": recipes}


def print_values(test: Path, binary: Path) -> None:
    """mergekit's numbers for the models and recipes of a test, in the form that the test holds them."""
    module = runpy.run_path(str(test))
    with tempfile.TemporaryDirectory() as temporary:
        module["write_models"](Path(temporary))
        for name, values in module["RECIPES"].items():
            file = Path(temporary) / "recipe.yaml"
            file.write_text(yaml.safe_dump(values, sort_keys=False))
            error = mergekit(binary, file, Path(temporary) / name)
            print(f'    "{name}": {error or module["picked"](Checkpoint(Path(temporary) / name))},')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mergekit-bin", type=Path, required=True, help="mergekit-yaml of mergekit's environment")
    parser.add_argument("--record", type=Path, default=Path("records/peers/mergekit.json"))
    parser.add_argument("--values", type=Path, help="print expected values for this test file instead")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.values:
        print_values(arguments.values, arguments.mergekit_bin)
        return
    record = run(arguments)
    arguments.record.parent.mkdir(parents=True, exist_ok=True)
    write_json(arguments.record, record)


if __name__ == "__main__":
    sys.exit(main())
