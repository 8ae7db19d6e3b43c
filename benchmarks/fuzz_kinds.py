"""The kinds of files that `fuzz.py` changes: tiny inputs of each, and the calls that read them."""

from __future__ import annotations

import io
import json
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from fuzz import Kind, command
from fuzz_mutations import mutated_bytes, mutated_tree, picture
from PIL import Image
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import image_zoo
import text_zoo
from adarank import from_bundle, load_bundle
from adarank.io.writer import write_text
from adarank.outputs.merged import load_task
from adarank.recipe.job import open_job
from adarank.recipe.reader import load_recipe
from adarank.workflow.load_tasks import load_tasks
from adarank.workflow.merge import merge

SHAPES = {"layers.0.w": (6, 4), "layers.1.w": (6, 4), "layers.0.b": (6,), "embed.w": (5, 3)}
METHODS: list[dict[str, Any]] = [
    {"merge_method": "task_arithmetic", "parameters": {"lambda": 0.3}},
    {"merge_method": "linear", "parameters": {"weight": [0.1, 0.9]}, "dtype": "bfloat16"},
    {"merge_method": "cart", "parameters": {"rank": 0.5, "lambda": 1.0}, "select": {"keep": ["embed.*"]}},
    {"merge_method": "ties", "parameters": {"weight": [{"filter": "b", "value": 0.5}, {"value": 1}], "density": 0.5}},
    {"merge_method": "emr", "parameters": {}},
]


def tensors(seed: int) -> dict[str, torch.Tensor]:
    source = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=source) for name, shape in SHAPES.items()}


def plain_zoo(folder: Path, form: str = "safetensors") -> None:
    """Base and two experts without tasks, as whole files, shards or pickles, with a recipe."""
    for number, name in enumerate(("base", "a", "b")):
        target = folder / name
        target.mkdir()
        state = tensors(number)
        (target / "config.json").write_text(
            json.dumps({"model_type": "x", "architectures": ["X"], "n": 2, "labels": {"0": "a"}})
        )
        if form == "shards":
            parts = [{n: t for i, (n, t) in enumerate(state.items()) if i % 2 == part} for part in range(2)]
            for part, own in enumerate(parts):
                save_file(own, target / f"model-{part}.safetensors")
            weight_map = {n: f"model-{part}.safetensors" for part, own in enumerate(parts) for n in own}
            write_text(
                target / "model.safetensors.index.json",
                json.dumps({"metadata": {"total_size": 9}, "weight_map": weight_map}),
            )
        elif form == "bin":
            torch.save(state, target / "pytorch_model.bin")
        else:
            save_file(state, target / "model.safetensors", {"format": "pt"})
    for number, own in enumerate(METHODS):
        values = {**own, "models": [{"model": "a"}, {"model": "b"}], "seed": 3, "device": "cpu"}
        values |= {} if own["merge_method"] == "linear" else {"base_model": "base"}
        (folder / f"recipe{number}.yaml").write_text(yaml.safe_dump(values))


def merging(count: int = len(METHODS)) -> tuple[Callable[[Path], object], ...]:
    return tuple(command("merge", f"recipe{number}.yaml", "../results/out", "--no-report") for number in range(count))


def adapters(folder: Path) -> None:
    """A base and adapters over it, as files of two kinds, with recipes that name them in each way and write one."""
    layers, source = ("layers.0.proj", "layers.1.proj"), torch.Generator().manual_seed(0)
    (folder / "base").mkdir()
    (folder / "base" / "config.json").write_text(json.dumps({"model_type": "x", "architectures": ["X"]}))
    state = {f"{name}.{part}": torch.randn(shape, generator=source) for name in layers for part, shape in (("weight", (6, 4)), ("bias", (6,)))}  # fmt: skip
    save_file(state, folder / "base" / "model.safetensors", {"format": "pt"})
    more: dict[str, dict[str, Any]] = {
        "a": {"rank_pattern": {"layers.1.proj": 1}, "modules_to_save": ["head"]},
        "b": {"use_dora": True, "use_rslora": True, "alpha_pattern": {"proj": 3}},
    }
    for name, settings in more.items():
        (folder / name).mkdir()
        written = {}
        for number, layer in enumerate(layers):
            rank = 1 if "rank_pattern" in settings and number else 2
            parts = {"lora_A": (rank, 4), "lora_B": (6, rank), **({"lora_magnitude_vector": (6,)} if "use_dora" in settings else {})}  # fmt: skip
            written |= {f"base_model.model.{layer}.{part}.weight": torch.randn(shape, generator=source) for part, shape in parts.items()}  # fmt: skip
        if name == "a":
            save_file(written, folder / name / "adapter_model.safetensors")
        else:
            torch.save(written, folder / name / "adapter_model.bin")
        said = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["proj"], "base_model_name_or_path": "base", **settings}  # fmt: skip
        (folder / name / "adapter_config.json").write_text(json.dumps(said))
    methods = [METHODS[0], METHODS[3], {"merge_method": "tsv_m"}, {**METHODS[0], "output": {"lora": {"rank": 2}}}]
    for number, method in enumerate(methods):
        models = [{"model": "base+a" if number % 2 else "a"}, {"model": {"model": "base", "lora": "b"} if number % 2 else "b"}]  # fmt: skip
        values = {**method, "base_model": "base", "models": models, "device": "cpu"}
        (folder / f"recipe{number}.yaml").write_text(yaml.safe_dump(values))


def text_inputs(folder: Path) -> None:
    """Text classifiers with data, recipes that merge, adapt, mask and bundle, and what they write."""
    text_zoo.make_zoo(folder)
    for task in text_zoo.TASKS:
        file = folder / "data" / f"{task}.tsv"
        file.write_text("".join(file.read_text().splitlines(keepends=True)[:24]))
    text_zoo.recipe(folder)
    text_zoo.recipe(
        folder, "adapted.yaml", **{**text_zoo.ADAPT, "adapt": {**text_zoo.ADAPT["adapt"], "steps": 2, "check_every": 1}}
    )
    merge(load_recipe(folder / "adapted.yaml"), folder / "output")
    text_zoo.recipe(folder, "masked.yaml", merge_method="masked", parameters={"masks": "output/masks.safetensors"})
    text_zoo.recipe(folder, "bundled.yaml", merge_method="emr", parameters={})
    merge(load_recipe(folder / "bundled.yaml"), folder / "bundle")


def with_state(folder: Path) -> None:
    """The state of an adaptation that was stopped, with its experts' outputs; and statistics of a merge that was."""
    text_inputs(folder)
    stop_at(folder / "adapted.yaml", folder / "kept" / "out")
    shutil.rmtree(folder / "output")
    shutil.rmtree(folder / "bundle")


def stop_at(recipe: Path, out: Path) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    taken: list[int] = []

    def progress(history: Any, planned: int) -> None:
        taken.append(1)
        if len(taken) == 2:  # the first step's state is saved
            stop()

    out.parent.mkdir()
    try:
        merge(load_recipe(recipe), out, progress=progress)
    except KeyboardInterrupt:
        return
    raise AssertionError("the adaptation was not stopped")


def resumed(root: Path) -> object:
    shutil.copytree(root / "inputs" / "kept", root / "results", dirs_exist_ok=True, symlinks=True)
    return command("merge", "adapted.yaml", "../results/out", "--no-report")(root)


def tables(folder: Path) -> None:
    """One text task in every format."""
    text_inputs(folder)
    rows = [line.split("\t") for line in (folder / "data" / "mood.tsv").read_text().splitlines()][1:]
    (folder / "data" / "mood.csv").write_text("label,text\n" + "".join(f"{label},{text}\n" for label, text in rows))
    (folder / "data" / "mood.jsonl").write_text(
        "".join(json.dumps({"text": t, "label": int(y)}) + "\n" for y, t in rows)
    )
    (folder / "data" / "mood.parquet").write_bytes(
        parquet({"text": [t for _, t in rows], "label": [int(y) for y, _ in rows]})
    )
    for end in ("tsv", "csv", "jsonl", "parquet"):
        models = [{"model": "models/mood", "task": {"name": "mood", "data": f"data/mood.{end}"}}]
        text_zoo.recipe(folder, f"{end}.yaml", models=models)


def parquet(columns: dict[str, Any]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), out)
    return out.getvalue()


def odd_jsonl(rng: random.Random) -> bytes:
    rows = [{"text": "good bad", "label": 1}, {"text": "red blue", "label": 0}, {"text": "one", "label": "mood-1"}]
    lines = (
        [json.dumps(mutated_tree(rng, row)) for row in rows] if rng.random() < 0.8 else ["[" * 90, "{}", "3", "null"]
    )
    return "\n".join(lines).encode()


def odd_parquet(rng: random.Random) -> bytes:
    columns = {"text": ["good bad", "red", "blue", "one"], "label": [0, 1, 0, 1]}
    try:
        made = parquet(mutated_tree(rng, columns))
    except Exception:  # pyarrow's, of columns that make no table
        made = parquet(columns)
    return mutated_bytes(rng, made) if rng.random() < 0.3 else made


def loading(name: str) -> Callable[[Path], object]:
    """Read and encode the tasks of a recipe."""
    return lambda root: load_tasks(open_job(load_recipe(root / "inputs" / name)))


def pictures(folder: Path) -> None:
    """Image tasks as arrays, as folders of files, and as encoded bytes in Parquet."""
    image_zoo.make_zoo(folder)
    rng = np.random.default_rng(0)
    with np.load(folder / "data" / "digits.npz") as arrays:
        np.savez(folder / "data" / "digits.npz", image=arrays["image"][:12], label=arrays["label"][:12])
    images = image_zoo.pictures(6)
    image_zoo.image_folder(folder / "data" / "folder", images, ["digits-0", "digits-1"] * 3)
    Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(folder / "data" / "one.png")
    encoded = (folder / "data" / "one.png").read_bytes()
    (folder / "data" / "digits.parquet").write_bytes(
        parquet({"image": [{"bytes": encoded, "path": None}] * 4, "label": [0, 1, 0, 1]})
    )
    for name, data in (("npz", "data/digits.npz"), ("files", "data/folder"), ("parquet", "data/digits.parquet")):
        image_zoo.recipe(folder, f"{name}.yaml", models=[image_zoo.expert("digits", data=data)])
    image_zoo.recipe(folder)


def picture_table(rng: random.Random) -> bytes:
    cells = [
        {"bytes": picture(rng), "path": None},
        {"bytes": picture(rng), "path": "x.png"},
        {"bytes": None, "path": rng.choice(["../one.png", "", "x\0y", "/dev/zero", "."])},
    ]
    cells += [None] if rng.random() < 0.3 else []
    return parquet({"image": cells, "label": [0] * len(cells)})


def configured(folder: Path) -> None:
    """Image classifiers, a merged output of them, and recipes that read every configuration."""
    image_zoo.make_zoo(folder)
    for task in image_zoo.TASKS:
        with np.load(folder / "data" / f"{task}.npz") as arrays:
            np.savez(folder / "data" / f"{task}.npz", image=arrays["image"][:10], label=arrays["label"][:10])
    image_zoo.recipe(folder)
    merge(load_recipe(folder / "recipe.yaml"), folder / "output")


EVALUATED = command("evaluate", "recipe.yaml")
KINDS = [
    Kind("headers", plain_zoo, ("*/model.safetensors",), (*merging(), command("inspect", "a", "--base", "base"), command("plan", "recipe2.yaml"))),
    Kind("pickles", lambda f: plain_zoo(f, "bin"), ("*/pytorch_model.bin",), (*merging(), command("inspect", "a", "--base", "base"))),
    Kind("indices", lambda f: plain_zoo(f, "shards"), ("*/*.index.json", "*/*.index.json", "a/*.safetensors"), merging()),
    Kind("recipes", plain_zoo, ("recipe*.yaml",), (*merging(), *(command("plan", f"recipe{n}.yaml", "-v") for n in range(5)))),
    Kind("adapters", adapters, ("[ab]/adapter_config.json", "[ab]/adapter_model.*", "base/model.safetensors"), (*merging(4), command("plan", "recipe1.yaml"))),
    Kind("task recipes", text_inputs, ("recipe.yaml", "adapted.yaml", "masked.yaml", "bundled.yaml"), tuple(
        command("plan", f"{name}.yaml") for name in ("recipe", "adapted", "masked", "bundled"))),
    Kind("tables", tables, ("data/mood.*",), tuple(loading(f"{end}.yaml") for end in ("tsv", "csv", "jsonl", "parquet")),
         {"data/mood.jsonl": odd_jsonl, "data/mood.parquet": odd_parquet}),
    Kind("images", pictures, ("data/digits.npz", "data/folder/*/*.png", "data/digits.parquet"),
         tuple(loading(f"{name}.yaml") for name in ("npz", "files", "parquet")),
         {"data/folder/digits-0/000.png": picture, "data/digits.parquet": picture_table}),
    Kind("configs", configured, ("models/*/*.json",), (command("merge", "recipe.yaml", "../results/out", "--no-report"), command("plan", "recipe.yaml"), EVALUATED)),
    Kind("tokenizers", text_inputs, ("models/mood/*.json", "models/base/*.json"), (loading("recipe.yaml"), command("merge", "recipe.yaml", "../results/out", "--no-report"))),
    Kind("masks", text_inputs, ("output/masks.safetensors",), (command("merge", "masked.yaml", "../results/out", "--no-report"), command("inspect", "output"))),
    Kind("states", with_state, ("kept/.out.state/*.pt",), (resumed,)),
    Kind("bundles", text_inputs, ("bundle/bundle.json", "bundle/bundle.json", "bundle/*.safetensors", "bundle/tasks/*/*"), (
        command("extract", "bundle", "../results/out", "--task", "mood"), command("inspect", "bundle"),
        lambda root: [dict(load_bundle(root / "inputs" / "bundle").state(task)) for task in text_zoo.TASKS],
        lambda root: from_bundle(root / "inputs" / "bundle", "mood"))),
    Kind("records", configured, ("output/adarank.json", "output/heads/*/*", "output/config.json"), (
        command("evaluate", "recipe.yaml", "output"), command("inspect", "output"), lambda root: load_task(root / "inputs" / "output", "digits"))),
]  # fmt: skip
