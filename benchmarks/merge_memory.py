"""Peak anonymous memory of merges of a base and three experts, beside what `adarank plan` predicts.

    python benchmarks/merge_memory.py --folder FOLDER [--dtype float32] [--gigabytes 1.1] [--methods task_arithmetic ties …] [--memory 1GB]

By default one method of each kind: elementwise, rank-based, spectral, calibrated, adaptive. Data-free ones merge decoders of about
1.1 GB, those that run networks BERTs with three tasks (`--text-width`, `--text-layers`).

FOLDER gets the inputs (seeded random weights, sharded safetensors) and the merged models; both are deleted after.
Every merge is `adarank.workflow.merge.merge` in a process of its own, whose RssAnon (from /proc/PID/status: what it holds
beside mapped files) is sampled every 20 ms. PyTorch and transformers are in it; `imported` is their share. With `--memory` merges have
that budget; one that cannot keep it says what it needs, and is left out.

Methods with spectra take minutes of SVD over all layers. They are measured on fewer layers of the same shapes, as
the peak depends on the largest tensors and not on how many there are; --all-layers measures them in full.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from adarank.cli.threads import wait_passively

wait_passively()  # before PyTorch is loaded

import torch
from records import FOLDER, Records
from torch import Tensor

from adarank.errors import RecipeError
from adarank.io.record import machine, versions
from adarank.io.writer import Layout, write_checkpoint
from adarank.methods import METHODS as WITHOUT_STEPS
from adarank.methods import CalibratedMethod
from adarank.recipe.job import open_job
from adarank.recipe.reader import parse_recipe
from adarank.recipe.registry import METHODS
from adarank.recipe.schema import DTYPES
from adarank.recipe.sizes import bytes_of
from adarank.spectral.mask_file import MaskFile
from adarank.spectral.masks import top_mask
from adarank.workflow.merge import merge

EXPERTS = ("one", "two", "three")
HIDDEN, VOCABULARY = 1024, 32_000
NOISE = 0.01
SHARD_BYTES = 400 * 10**6
SAMPLE_SECONDS = 0.02
DATA_FREE = {name: kind for name, kind in WITHOUT_STEPS.items() if not issubclass(kind, CalibratedMethod)}
SPECTRAL = tuple(name for name, kind in DATA_FREE.items() if kind.spectral)
MASK_RANK, MASK_LAMBDA = 0.6, 0.3
# Of networks: few inputs and steps, as what they hold does not depend on how many there are.
WITH_DATA: dict[str, dict[str, Any]] = {
    "regmean": {"parameters": {"examples": 8}},
    "regmean++": {"parameters": {"examples": 8}},
    "fisher": {"parameters": {"examples": 2}},
    "adamerging": {},
    "adarank": {"parameters": {"rank": 0.16, "lambda": 1.0}},
}
ADAPT = {"steps": 3, "batch_size": 4, "check_every": 3, "check_inputs": 8, "learn_heads": False}
WORDS = "good bad red blue one two up down in out".split()  # noqa: SIM905 (a list of words)
DEFAULT = ("task_arithmetic", "ties", "cart", "regmean", "adarank")
# What a method must be told, or else does nothing that costs memory.
PARAMETERS: dict[str, dict[str, Any]] = {
    **{name: {"t": 0.5} for name in ("slerp", "nearswap")},
    "sce": {"select_topk": 0.5},
    **{name: {"density": 0.5} for name in ("ties", "dare_linear", "dare_ties", "breadcrumbs", "breadcrumbs_ties")},
    **{name: {"density": 0.5, "epsilon": 0.1} for name in ("della", "della_linear")},
}
TAKES = {"slerp": 1, "nearswap": 1, "arcee_fusion": 1, "nuslerp": 2}  # experts; the others take any number


def layout(layers: int, dtype: torch.dtype, hidden: int) -> Layout:
    """Names, shapes and dtype of a decoder; at hidden size 1024 of GPT-2 medium's widths, with a vocabulary of 32,000."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY * hidden // HIDDEN, hidden)}
    for layer in range(layers):
        start = f"model.layers.{layer}"
        shapes |= {f"{start}.self_attn.{part}_proj.weight": (hidden, hidden) for part in "qkvo"}
        shapes[f"{start}.mlp.up_proj.weight"] = (4 * hidden, hidden)
        shapes[f"{start}.mlp.down_proj.weight"] = (hidden, 4 * hidden)
        shapes[f"{start}.input_layernorm.weight"] = (hidden,)
        shapes[f"{start}.post_attention_layernorm.weight"] = (hidden,)
    return {name: (shape, dtype) for name, shape in {**shapes, "model.norm.weight": (hidden,)}.items()}


def size(of: Layout) -> int:
    return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in of.values())


def layers_for(target: float, dtype: torch.dtype, hidden: int) -> int:
    """How many layers make a model of about `target` bytes."""
    none, one = size(layout(0, dtype, hidden)), size(layout(1, dtype, hidden))
    return round((target - none) / (one - none))


def make_models(folder: Path, of: Layout, seed: int) -> None:
    """A base of seeded noise, and experts that add noise of their own to it."""
    for number, name in enumerate(("base", *EXPERTS)):
        (folder / name).mkdir(parents=True)
        write_checkpoint(folder / name, of, _tensors(of, seed, number), SHARD_BYTES)


def _tensors(of: Layout, seed: int, number: int) -> Iterator[tuple[str, Tensor]]:
    base, expert = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed + number)
    for name, (shape, _) in of.items():
        tensor = torch.randn(shape, generator=base) * 0.02
        if number:
            tensor += torch.randn(shape, generator=expert) * NOISE * 0.02
        yield name, tensor


def make_texts(folder: Path, width: int, layers: int, seed: int) -> None:
    """A BERT and three classifiers over it, with a few made sentences each."""
    import transformers  # imported on use: data-free merges are measured without it

    torch.manual_seed(seed)
    words = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    tokens = transformers.BertTokenizerFast(vocab=words, model_max_length=16)
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 64, intermediate_size=4 * width,
        max_position_embeddings=16,
    )  # fmt: skip
    base = transformers.BertModel(config)
    for name in ("base", *EXPERTS):
        model = base if name == "base" else transformers.BertForSequenceClassification(config)
        if name != "base":
            model.bert.load_state_dict(
                {n: t + 0.01 * torch.randn_like(t) for n, t in base.state_dict().items()}, strict=False
            )
            rows = [f"{number % 2}\t{' '.join(random.Random(number).choices(WORDS, k=8))}" for number in range(60)]
            (folder / f"{name}.tsv").write_text("label\ttext\n" + "\n".join(dict.fromkeys(rows)) + "\n")
        model.save_pretrained(folder / name)
        tokens.save_pretrained(folder / name)


def recipe_of_texts(method: str) -> dict[str, Any]:
    """A recipe of a method that runs networks."""
    models = [{"model": name, "task": {"name": name, "data": f"{name}.tsv"}} for name in EXPERTS]
    adapt = {"adapt": ADAPT} if METHODS[method].takes_steps else {}
    return {
        "merge_method": method,
        "base_model": "base",
        "models": models,
        "device": "cpu",
        **adapt,
        **WITH_DATA[method],
    }


def recipe(folder: Path, method: str) -> dict[str, Any]:
    """A recipe of the method; `masked` gets a masks file that keeps the top components."""
    if method in WITH_DATA:
        return recipe_of_texts(method)
    models = [{"model": name} for name in EXPERTS[: TAKES.get(method)]]
    values = {"merge_method": method, "models": models, "parameters": PARAMETERS.get(method, {})}
    if method != "linear":
        values["base_model"] = "base"
    if method == "masked":
        values["parameters"] = {"masks": str(write_masks(folder))}
    return values


def write_masks(folder: Path) -> Path:
    job = open_job(parse_recipe(recipe(folder, "cart"), folder))
    names = job.network.merged()
    matrices = [name for name in names if job.network.choices[name].action == "decompose"]
    sizes = {name: (min(job.network.tensors[name].shape),) * len(EXPERTS) for name in matrices}
    masks = {name: top_mask(sizes[name], MASK_RANK) for name in matrices}
    lam = {name: torch.full((len(EXPERTS),), MASK_LAMBDA) for name in names}
    path = folder / "masks.safetensors"
    MaskFile("pretrained", EXPERTS, lam, masks, sizes, {}).save(path)
    return path


def anonymous(pid: int | str, field: str = "RssAnon") -> int | None:
    """A size of a process in bytes; None once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None)


def watch(command: list[str]) -> tuple[dict[str, Any], int]:
    """Run a command that prints JSON in its last line; that, and its peak anonymous memory."""
    peak = 0
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    while process.poll() is None:
        peak = max(peak, anonymous(process.pid) or 0)
        time.sleep(SAMPLE_SECONDS)
    output = process.stdout.read() if process.stdout else ""
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit status {process.returncode}")
    return json.loads(output.splitlines()[-1]), peak


def worker(folder: Path, method: str, memory: int | None) -> dict[str, Any]:
    """Merge in this process; what only it can tell."""
    parsed = parse_recipe(recipe(folder, method), folder)
    gc.collect()
    imported = anonymous("self")
    started = time.perf_counter()
    try:
        record = merge(parsed, folder / "out", memory=memory)
    except RecipeError as error:
        return {"refused": str(error)}
    return {
        "factors_in_files": record["plan"]["factors_in_files"],
        "imported": imported,
        "merge_seconds": time.perf_counter() - started,
        "peak_predicted": record["plan"]["peak_bytes"],
        "peak_resident_with_mapped_files": record["peak_resident_bytes"],
    }


def measure(arguments: argparse.Namespace, folder: Path, method: str, layers: int) -> dict[str, Any]:
    """One method, `repeats` times."""
    command = [sys.executable, __file__, "--folder", str(folder), "--threads", str(arguments.threads)]
    command += ["--memory", arguments.memory] if arguments.memory else []
    runs = []
    for _ in range(arguments.repeats):
        of_worker, peak = watch([*command, "--worker", method])
        shutil.rmtree(folder / "out", ignore_errors=True)
        if "refused" in of_worker:
            print(f"{method:16s} {of_worker['refused']}", flush=True)
            return {"layers": layers, **of_worker}
        runs.append({**of_worker, "peak_anonymous": peak})
    peaks, seconds = (sorted(run[key] for run in runs) for key in ("peak_anonymous", "merge_seconds"))
    result = {
        "layers": layers,
        "peak_anonymous": {"min": peaks[0], "median": peaks[len(peaks) // 2], "max": peaks[-1]},
        "seconds": {"min": seconds[0], "median": seconds[len(seconds) // 2], "max": seconds[-1]},
        "peak_predicted": runs[0]["peak_predicted"],
        "predicted_over_measured": round(runs[0]["peak_predicted"] / peaks[-1], 3),
        "factors_in_files": runs[0]["factors_in_files"],
        "imported": runs[0]["imported"],
    }
    print(f"{method:16s} peak {peaks[-1] / 1e6:6.0f} MB, predicted {result['peak_predicted'] / 1e6:6.0f} MB "
          f"({result['predicted_over_measured']:.2f}), {seconds[0]:.1f} s, {layers} layers", flush=True)  # fmt: skip
    return result


def run(arguments: argparse.Namespace) -> None:
    """Every method that is named; the record is written anew after each."""
    dtype = DTYPES[arguments.dtype]
    hidden = arguments.hidden
    full = layers_for(arguments.gigabytes * 1e9, dtype, hidden)
    few = full if arguments.all_layers else min(full, arguments.layers)
    texts = {"text_width": arguments.text_width, "text_layers": arguments.text_layers}
    options = f" --text-width {arguments.text_width} --text-layers {arguments.text_layers}"
    options += " --all-layers" * arguments.all_layers + (f" --memory {arguments.memory}" if arguments.memory else "")
    within = f", within {arguments.memory}" if arguments.memory else ""
    record: dict[str, Any] = {
        "kind": "cost",
        "name": f"merge memory, {arguments.dtype}{within}",
        "what": "peak anonymous memory of merging a base and three experts, PyTorch included, beside what plan predicts",
        "command": f"python benchmarks/merge_memory.py --folder FOLDER --dtype {arguments.dtype} --gigabytes "
        f"{arguments.gigabytes} --hidden {hidden} --layers {arguments.layers} --repeats {arguments.repeats} --threads "
        f"{arguments.threads} --methods {' '.join(arguments.methods)}" + options,
        "settings": {"experts": len(EXPERTS), "hidden": hidden, "layers": full, "bytes_per_model": size(layout(full, dtype, hidden))},
        "note": arguments.note,
        "seed": arguments.seed,
        "versions": versions(),
        "machine": machine(),
        "methods": {},
    }  # fmt: skip
    of_models = {method: few if method in SPECTRAL else full for method in arguments.methods if method not in WITH_DATA}
    for layers in dict.fromkeys(of_models.values()):
        with tempfile.TemporaryDirectory(dir=arguments.folder) as place:
            make_models(Path(place), layout(layers, dtype, hidden), arguments.seed)
            measure_all(
                arguments, Path(place), [m for m, count in of_models.items() if count == layers], layers, record
            )
    if with_data := [method for method in arguments.methods if method in WITH_DATA]:
        name = f"merge memory, networks of {arguments.text_layers} layers of {arguments.text_width}{within}"
        record = {**record, "name": name, "settings": {"experts": len(EXPERTS), **texts}, "methods": {}}
        with tempfile.TemporaryDirectory(dir=arguments.folder) as place:
            make_texts(Path(place), arguments.text_width, arguments.text_layers, arguments.seed)
            measure_all(arguments, Path(place), with_data, arguments.text_layers, record)


def measure_all(
    arguments: argparse.Namespace, folder: Path, methods: list[str], layers: int, record: dict[str, Any]
) -> None:
    """Methods on the models in a folder, into the record, which is written anew after each."""
    for method in methods:
        record["methods"][method] = measure(arguments, folder, method, layers)
        Records(arguments.records).write(record)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for inputs and outputs; about 6 GB")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="as stored")
    parser.add_argument("--gigabytes", type=float, default=1.1, help="size of each model")
    parser.add_argument("--methods", nargs="+", choices=[*DATA_FREE, *WITH_DATA], default=list(DEFAULT))
    parser.add_argument("--hidden", type=int, default=HIDDEN, help="hidden size; a small one to see that all works")
    parser.add_argument("--layers", type=int, default=2, help="for methods with spectra")
    parser.add_argument("--all-layers", action="store_true", help="methods with spectra on all layers, too")
    parser.add_argument("--text-width", type=int, default=384, help="of the BERTs")
    parser.add_argument("--text-layers", type=int, default=12)
    parser.add_argument("--memory", metavar="SIZE", help="a budget, as for adarank merge")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--note", default="", help="kept in the record, such as what else the machine did")
    parser.add_argument("--records", type=Path, metavar="FILE", default=FOLDER / "costs.jsonl")
    parser.add_argument("--worker", choices=[*DATA_FREE, *WITH_DATA], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.worker:
        print(json.dumps(worker(arguments.folder, arguments.worker, bytes_of("--memory", arguments.memory))))
        return
    run(arguments)


if __name__ == "__main__":
    sys.exit(main())
