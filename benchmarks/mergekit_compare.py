"""adarank beside mergekit: the same recipe file, unchanged, merged by both, compared tensor by tensor.

    python benchmarks/mergekit_compare.py --venv VENV [--records FILE]
    python benchmarks/mergekit_compare.py --venv VENV --values tests/mergekit_zoo.py

VENV is an environment of its own; it is made, with torch and mergekit from the registry, if it is not there yet.
mergekit's command `mergekit-yaml` is called there once for every recipe, all calls in one process, because loading it
takes longer than the merges. The models are small Llamas made here: a base and three experts, which are the base plus
seeded noise. The second form prints mergekit's merges of the tiny models that a test holds expected values of.

`dare_*` and `della*` drop at random, each tool from numbers of its own, so their recipes here drop nothing. Those of
`ties` and `breadcrumbs*` agree because seeded noise has hardly two equal magnitudes at a threshold: mergekit's
sort is not stable, and which of two equals is kept is its accident. Those of `arcee_fusion` agree on tensors of up to
10⁶ entries: of larger ones mergekit takes quartiles of a random sample.

Two differences are meant: a recipe without tasks merges every float tensor, embeddings included, as mergekit does, but
adarank keeps integer buffers from the base; and adarank's arithmetic is float32 whatever the inputs' dtype, with one
cast at the end, where mergekit's task arithmetic works in the inputs' own dtype.
"""

from __future__ import annotations

import argparse
import json
import runpy
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from adarank.cli.threads import wait_passively

wait_passively()  # before PyTorch is loaded

import torch
import yaml
from mergekit_recipes import ADAPTERS, EXPERTS, agreeing, dialect, forms, selecting
from peers import environment, head, largest, last_line, relative
from records import FOLDER, Records
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from adarank.errors import AdaRankError
from adarank.io.checkpoint import Checkpoint
from adarank.recipe.reader import load_recipe
from adarank.workflow.merge import merge

REQUIREMENTS = ("torch==2.13.0", "mergekit==0.1.5")
NOISE = 0.02
_QUIETLY = ("--no-write-model-card", "--lora-merge-cache", "lora-cache")
DRIVER = """
import json, sys, torch
from mergekit.scripts.multimerge import main as main_of_stages
from mergekit.scripts.run_yaml import main
torch.set_num_threads(1)
errors = []
for call in json.loads(sys.argv[1]):
    try:
        (main_of_stages if "--intermediate-dir" in call else main)(call, standalone_mode=False)
        errors.append(None)
    except Exception as error:
        errors.append(type(error).__name__ + ": " + " ".join(str(error).split()))
print(json.dumps(errors))
"""
SHAPE = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 4,
         "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}  # fmt: skip


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
    for name in ADAPTERS:
        _make_adapter(folder / name, layers)


def _make_adapter(folder: Path, layers: int) -> None:
    """A LoRA of rank 4, α = 8, over two matrices of every layer."""
    width, rank = SHAPE["hidden_size"], 4
    shapes = {"q_proj": (width, width), "o_proj": (width, width)}
    factors = {
        f"base_model.model.model.layers.{layer}.self_attn.{module}.lora_{part}.weight": 0.05 * torch.randn(shape)
        for layer in range(layers)
        for module, (out, into) in shapes.items()
        for part, shape in (("A", (rank, into)), ("B", (out, rank)))
    }
    folder.mkdir()
    save_file(factors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank, "target_modules": list(shapes)}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "../base"}))


def write_recipes(folder: Path, recipes: Mapping[str, Any]) -> dict[str, Path]:
    """A recipe file each, beside the models that it names; a list is one of several stages."""
    files = {name: folder / f"recipe-{number}.yaml" for number, name in enumerate(recipes)}
    for name, file in files.items():
        documents = recipes[name] if isinstance(recipes[name], list) else [recipes[name]]
        file.write_text(yaml.safe_dump_all(documents, sort_keys=False))
    return files


def mergekit(
    python: Path, files: Mapping[str, Path], out: str, options: Sequence[str] = ("--no-copy-tokenizer",)
) -> dict[str, str | None]:
    """Call mergekit's command on every recipe, in the recipes' folder, as their relative paths need.

    Each result lies beside its recipe, in a folder of the recipe's name and the suffix `out`; returned are the errors.
    """
    folder = next(iter(files.values())).parent
    calls = [[*_call(file, out), "--quiet", *_QUIETLY, *options] for file in files.values()]
    errors = last_line([str(python), "-c", DRIVER, json.dumps(calls)], folder)
    return dict(zip(files, errors, strict=True))


def _call(file: Path, out: str) -> list[str]:
    """What is given to mergekit's command for a recipe, or to its command for several stages."""
    written = file.with_suffix(out).name
    if len(list(yaml.safe_load_all(file.read_text()))) == 1:
        return [file.name, written]
    return [file.name, "--out-path", written, "--intermediate-dir", str(file.with_suffix(".stages"))]


def adarank(file: Path, out: Path) -> str | None:
    try:
        merge(load_recipe(file), out)
    except AdaRankError as error:
        return " ".join(str(error).split())
    return None


def difference(ours: Checkpoint, theirs: Checkpoint) -> dict[str, Any]:
    """Largest difference of any tensor, relative to that tensor's largest value, and how many values differ at all."""
    a, b = ({name: merged.read(name) for name in theirs.tensors} for merged in (ours, theirs))
    worst, where = largest(a, b)
    same = set(ours.tensors) == set(theirs.tensors)
    dtypes = all(ours.tensors[n].dtype == theirs.tensors[n].dtype for n in theirs.tensors)
    written = ", ".join(sorted({str(info.dtype).removeprefix("torch.") for info in ours.tensors.values()}))
    return {"max_relative_difference": worst, "in": where, "output_dtype": written,
            "values_unequal": sum(int((a[name] != b[name]).sum()) for name in b),
            "values": sum(tensor.numel() for tensor in b.values()),
            "same_names": same, "same_dtypes": dtypes}  # fmt: skip


def compare(folder: Path, recipes: Mapping[str, Any], python: Path) -> list[dict[str, Any]]:
    """Both merges of every recipe file and what came of them."""
    files = write_recipes(folder, recipes)
    errors = mergekit(python, files, ".mergekit")
    return [_compare(name, values, files[name], errors[name]) for name, values in recipes.items()]


def _compare(name: str, values: Any, file: Path, error: str | None) -> dict[str, Any]:
    ours, theirs = file.with_suffix(".adarank"), file.with_suffix(".mergekit")
    refused = {side: e for side, e in {"adarank": adarank(file, ours), "mergekit": error}.items() if e}
    shown = {side: error.replace(f"{file.parent}/", "")[:240] for side, error in refused.items()}
    found = {"refused": shown} if refused else difference(Checkpoint(ours), Checkpoint(theirs))
    for folder in (ours, theirs):
        shutil.rmtree(folder, ignore_errors=True)
    print(f"  {name:52s} {found.get('max_relative_difference', found.get('refused'))}", flush=True)
    return {"name": name, "recipe": values, **found}


def rounding(folder: Path, recipes: Mapping[str, dict[str, Any]], python: Path) -> dict[str, dict[str, Any]]:
    """How far each side's bfloat16 merge is from mergekit's float32 merge of the same bfloat16 models."""
    exact = {f"{name}, exact": {**values, "dtype": "float32"} for name, values in recipes.items()}
    files = write_recipes(folder, {**recipes, **exact})
    mergekit(python, files, ".mergekit")
    found: dict[str, dict[str, Any]] = {}
    for name in recipes:
        adarank(files[name], files[name].with_suffix(".adarank"))
        wanted = Checkpoint(files[f"{name}, exact"].with_suffix(".mergekit"))
        sides = {side: Checkpoint(files[name].with_suffix(f".{side}")) for side in ("adarank", "mergekit")}
        found[name] = {side: _rounding(merged, wanted) for side, merged in sides.items()}
        if recipes[name]["merge_method"] == "task_arithmetic":
            off = _in_their_dtype(recipes[name], folder, sides["mergekit"])
            found[name]["mergekit"]["values_off_with_its_rounding_emulated"] = off
    return found


def _rounding(merged: Checkpoint, exact: Checkpoint) -> dict[str, float]:
    pairs = [(merged.read(name).double(), exact.read(name)) for name in exact.tensors]
    missed = sum(int((ours != theirs.bfloat16().double()).sum()) for ours, theirs in pairs)
    total = sum(ours.numel() for ours, _ in pairs)
    worst = max(relative(ours, theirs) for ours, theirs in pairs)
    return {"max_relative_error": worst, "share_not_the_nearest_bfloat16": missed / total}


def _in_their_dtype(values: Mapping[str, Any], folder: Path, merged: Checkpoint) -> int:
    """How many values of mergekit's task arithmetic are not bf16(W₀ + bf16(λ · bf16(Σ_t bf16(w_t · bf16(W_t - W₀))) / Σ w))."""
    settings, wrong = values["parameters"], 0
    weights = torch.tensor([model["parameters"]["weight"] for model in values["models"]], dtype=torch.bfloat16)
    base, experts = Checkpoint(folder / "base"), [Checkpoint(folder / name) for name in EXPERTS]
    for name in merged.tensors:
        start = base.read(name)
        shaped = weights.reshape(-1, *[1] * start.dim())
        total = (torch.stack([own.read(name) - start for own in experts]) * shaped).sum(0)
        if settings.get("normalize"):
            total = total / shaped.sum(0)
        wrong += int((merged.read(name) != start + total * settings.get("lambda", 1.0)).sum())
    return wrong


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    python, seed = environment(arguments.venv, REQUIREMENTS), arguments.seed
    record = head(
        "mergekit",
        "the same recipe file merged by adarank and by mergekit's command line",
        "python benchmarks/mergekit_compare.py --venv VENV",
        {"model": SHAPE, "experts": len(EXPERTS), "noise": NOISE}, seed, python, ("mergekit", "torch"),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        for dtype in (torch.float32, torch.bfloat16):
            label = str(dtype).removeprefix("torch.")
            folder = Path(temporary) / label
            make_models(folder, dtype, seed, SHAPE["num_hidden_layers"])
            make_models(folder / "one-layer", dtype, seed, 1)
            print(label, flush=True)
            record[label] = _summary(compare(folder, agreeing(), python))
            record[f"{label}_selecting"] = _summary(compare(folder, selecting(), python))
        for part in ("", "_selecting"):
            without_recipes(record[f"bfloat16{part}"]["recipes"], record[f"float32{part}"]["recipes"])
        names = ("linear", "task_arithmetic", "task_arithmetic, normalised, lambda")
        record["bfloat16_rounding"] = rounding(folder, {name: agreeing()[name] for name in names}, python)
        print("dialect", flush=True)
        record["dialect"] = compare(Path(temporary) / "float32", dialect(), python)
        print("forms", flush=True)
        record["forms"] = compare(Path(temporary) / "float32", forms(), python)
    return record


def without_recipes(results: list[dict[str, Any]], others: list[dict[str, Any]]) -> None:
    """Take the recipes out of results, in place, where the others' results of the same names have them already."""
    stand = {other["name"]: other["recipe"] for other in others}
    for result in results:
        if stand.get(result["name"]) == result["recipe"]:
            del result["recipe"]


def _summary(recipes: list[dict[str, Any]]) -> dict[str, Any]:
    """The recipes' results, with the spread of their differences for each dtype that was written."""
    found: dict[str, list[float]] = {}
    for result in recipes:
        if "refused" not in result:
            found.setdefault(result["output_dtype"], []).append(result["max_relative_difference"])
    spread = {name: {"min": min(v), "median": median(v), "max": max(v), "count": len(v)} for name, v in found.items()}
    refused = sum("refused" in result for result in recipes)
    return {"max_relative_difference_by_output_dtype": spread, "refused": refused, "recipes": recipes}


def print_values(zoo: Path, python: Path) -> None:
    """mergekit's numbers for the models and recipes of a file, in the form that the test holds them."""
    sys.path.insert(0, str(zoo.parent))  # what tests share
    module = runpy.run_path(str(zoo))
    with tempfile.TemporaryDirectory() as temporary:
        module["write_models"](Path(temporary))
        files = write_recipes(Path(temporary), module["RECIPES"])
        errors = mergekit(python, files, ".mergekit")
        for name, file in files.items():
            print(f'    "{name}": {errors[name] or module["picked"](Checkpoint(file.with_suffix(".mergekit")))},')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, required=True, help="mergekit's environment; made if it is not there")
    parser.add_argument("--records", type=Path, metavar="FILE", default=FOLDER / "peers.jsonl")
    parser.add_argument(
        "--values", type=Path, help="print expected values for the models and recipes of this file instead"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.values:
        print_values(arguments.values, environment(arguments.venv, REQUIREMENTS))
        return
    Records(arguments.records).write(run(arguments))


if __name__ == "__main__":
    sys.exit(main())
