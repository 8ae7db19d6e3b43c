"""Bundles: what is written is what is read, whole or not at all; sizes, damage, tasks, and the way from recipe to network."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import adarank
import image_zoo
import text_zoo
from adarank.cli.main import main
from adarank.errors import CheckpointError, OutputError
from adarank.io.bits import pack, unpack
from adarank.io.bundle import About, BundleFolder, Names, finish, key, write_parts
from adarank.io.checkpoint import Checkpoint
from adarank.io.writer import BUNDLE
from adarank.methods import METHODS
from adarank.recipe.reader import load_recipe
from adarank.workflow.search import Axis, search
from make import FLOATS, identical, randn, read_all, same
from test_end_to_end import KILLED

NAMES = [name for name, kind in METHODS.items() if kind.in_use]
TASKS = text_zoo.TASKS
BATCH = {"input_ids": torch.tensor([[2, 6, 7, 8, 3]]), "attention_mask": torch.ones(1, 5, dtype=torch.long)}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_zoo.make_zoo(tmp_path_factory.mktemp("bundles"))


def merged(zoo: Path, out: Path, **changes: Any) -> Path:
    path = text_zoo.recipe(zoo, f"{changes.get('merge_method', 'emr')}.yaml", **{"merge_method": "emr", **changes})
    adarank.merge_recipe(load_recipe(path), out)
    return out


@pytest.fixture(scope="module")
def emr(zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return merged(zoo, tmp_path_factory.mktemp("emr") / "bundle")


@given(st.lists(st.booleans(), max_size=40), st.booleans())
def test_bits_are_packed_eight_a_byte_and_come_back(bits: list[bool], folded: bool) -> None:
    mask = torch.tensor(bits, dtype=torch.bool)
    shape = (2, len(bits) // 2) if folded and len(bits) % 2 == 0 else (len(bits),)
    packed = pack(mask.reshape(shape))
    padded = bits + [False] * (-len(bits) % 8)
    wanted = [sum(bit << (7 - i) for i, bit in enumerate(padded[at : at + 8])) for at in range(0, len(padded), 8)]
    assert packed.tolist() == wanted
    assert torch.equal(unpack(packed, shape), mask.reshape(shape))


def test_bits_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match="2 bytes for 7 bits"):
        unpack(torch.zeros(2, dtype=torch.uint8), (7,))


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64, torch.uint8, torch.int64, torch.bool])
def test_parts_of_every_dtype_come_back(tmp_path: Path, dtype: torch.dtype) -> None:
    shapes = {"w": (3, 5), "odd: name": (7,), "none": (0, 2), "": ()}
    values = {
        part: {n: randn(i, *shape).mul(3).to(dtype) for i, (n, shape) in enumerate(shapes.items())} for part in "abc"
    }
    layouts = {part: {key(part, n): (t.shape, dtype) for n, t in own.items()} for part, own in values.items()}
    owners = {"a": None, "b": "one", "c": "two"}
    pieces = ((owners[part], key(part, n), values[part][n]) for n in shapes for part in values)
    write_parts(tmp_path, layouts["a"], {"one": layouts["b"], "two": layouts["c"]}, pieces)  # type: ignore[arg-type]
    names = {task: Names("x.", {"odd: name": None}) for task in ("one", "two")}
    about = About("emr", {"rank": None}, None, {n: (shape, dtype) for n, shape in shapes.items() if n}, names)
    finish(tmp_path, about)
    found = BundleFolder(tmp_path)
    assert found.about == about
    files = {"a": found.shared(), "b": found.parts_of("one"), "c": found.parts_of("two")}
    for part, own in values.items():
        for name, tensor in own.items():
            assert identical(files[part].of(name)[part], tensor)


def test_parts_that_do_not_follow_the_layout_are_refused(tmp_path: Path) -> None:
    layout = {"a:w": ((2,), torch.float32), "a:v": ((2,), torch.float32)}
    with pytest.raises(OutputError, match="expected tensor 'a:w'"):
        write_parts(tmp_path, layout, {}, iter([(None, "a:v", torch.zeros(2))]))
    with pytest.raises(OutputError, match="'a:v' was never written"):
        write_parts(tmp_path, layout, {}, iter([(None, "a:w", torch.zeros(2))]))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
@pytest.mark.parametrize("bare_base", [True, False])
def test_a_bundle_of_text_models_is_each_tasks_network(
    tmp_path: Path, name: str, architecture: str, bare_base: bool
) -> None:
    """Python's `merge_each`, the bundle's tensors, its module and the extracted checkpoint are one and the same."""
    folder = text_zoo.make_zoo(tmp_path / "zoo", architecture, bare_base)
    out = merged(folder, tmp_path / "out", merge_method=name)
    job = adarank.open_job(load_recipe(folder / f"{name}.yaml"))
    states = {task: read_all(Checkpoint(folder / "models" / task)) for task in ("base", *TASKS)}
    keep = {"keep": tuple(n for n, choice in job.network.choices.items() if choice.action == "keep")}
    parted = adarank.merge_each(states["base"], {t: states[t] for t in TASKS}, name, select=adarank.Select(**keep))
    bundle = adarank.load_bundle(out)
    bundle.check()
    assert bundle.tasks == tuple(TASKS)
    for task, classes in TASKS.items():
        tensors = dict(bundle.tensors(task))
        assert tensors.keys() == job.network.tensors.keys()
        assert all(identical(tensors[n], tensor) for n, tensor in parted[task].items())
        module = adarank.from_bundle(out, task)
        adarank.extract(out, task, tmp_path / task)
        assert Checkpoint(tmp_path / task).tensors.keys() == Checkpoint(folder / "models" / task).tensors.keys()
        alone = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / task).eval()
        transformers.AutoTokenizer.from_pretrained(tmp_path / task)
        assert module(**BATCH).logits.shape == (1, classes)
        torch.testing.assert_close(module(**BATCH).logits, alone(**BATCH).logits)
        for n, tensor in job.network.head(task).items():
            assert identical(load_file(tmp_path / task / "model.safetensors")[n], tensor)


@pytest.mark.parametrize("architecture", ["vit", "resnet"])
@pytest.mark.parametrize("name", ["emr", "cart_indexing"])
def test_a_bundle_of_image_models_is_each_tasks_network(tmp_path: Path, architecture: str, name: str) -> None:
    zoo = image_zoo.make_zoo(tmp_path / "zoo", architecture)
    kept = {"keep": ["*.running_*"]} if architecture == "resnet" else None
    exact = {"rank": 1.0} if name == "cart_indexing" else {}
    path = image_zoo.recipe(zoo, merge_method=name, parameters=exact, select=kept)
    adarank.merge_recipe(load_recipe(path), tmp_path / "out")
    image = torch.rand(2, 3, image_zoo.SIZE, image_zoo.SIZE)
    for task in image_zoo.TASKS:
        module = adarank.from_bundle(tmp_path / "out", task)
        adarank.extract(tmp_path / "out", task, tmp_path / task)
        alone = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / task).eval()
        transformers.AutoImageProcessor.from_pretrained(tmp_path / task)  # only the experts' folders have it
        torch.testing.assert_close(module(image).logits, alone(image).logits)
        if name == "cart_indexing" and architecture == "vit":
            expert = transformers.AutoModelForImageClassification.from_pretrained(zoo / "models" / task).eval()
            torch.testing.assert_close(module(image).logits, expert(image).logits, atol=1e-4, rtol=1e-3)
    scores = adarank.evaluate_recipe(load_recipe(path), [tmp_path / "out"])
    assert len(scores.rows) == 3


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("asked", [None, "bfloat16", "float16"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_dtypes_are_the_bases_unless_asked(tmp_path: Path, name: str, asked: str | None, stored: torch.dtype) -> None:
    """Tensors come out in the base's dtype; computed parts are float32. What is asked for holds for both."""
    zoo = text_zoo.make_zoo(tmp_path / "zoo", dtype=stored)
    out = merged(zoo, tmp_path / "out", merge_method=name, out_dtype=asked)
    wanted = getattr(torch, asked) if asked else stored
    bundle = adarank.load_bundle(out)
    for task in TASKS:
        tensors = dict(bundle.tensors(task))
        assert {t.dtype for t in tensors.values() if t.is_floating_point()} == {wanted}
        parts = load_file(out / "shared.safetensors") | load_file(out / "tasks" / task / "own.safetensors")
        computed = [t.dtype for n, t in parts.items() if n.split(":")[0] in ("sum", "unified", "u", "s", "v")]
        assert set(computed) <= {getattr(torch, asked) if asked else torch.float32}
        near = dict(
            adarank.load_bundle(merged(zoo, tmp_path / "exact", merge_method=name, out_dtype="float32")).tensors(task)
        )
        for n, tensor in tensors.items():
            torch.testing.assert_close(tensor.double(), near[n].double(), atol=0.05, rtol=0.05)
        (tmp_path / "exact").rename(tmp_path / f"exact-{task}")


@pytest.mark.parametrize("name", NAMES)
def test_the_size_report_is_what_is_on_disk(zoo: Path, tmp_path: Path, name: str) -> None:
    out = merged(zoo, tmp_path / "out", merge_method=name)
    sizes = adarank.load_bundle(out).sizes
    assert sizes["bundle"] == sum(f.stat().st_size for f in out.rglob("*.safetensors"))
    assert sizes["bundle"] == sizes["shared"] + sum(sizes["tasks"].values())
    experts = [Checkpoint(zoo / "models" / task) for task in TASKS]
    assert sizes["experts"] == sum(info.nbytes for expert in experts for info in expert.tensors.values())
    record = json.loads((out / "adarank.json").read_text())
    assert record["bundle"] == sizes
    headers = sum(8 + int.from_bytes(f.read_bytes()[:8], "little") for f in out.rglob("*.safetensors"))
    heads = sum(i.nbytes for f in out.rglob("head.safetensors") for i in Checkpoint(f).tensors.values())
    assert record["plan"]["output_bytes"] == sizes["bundle"] - headers - heads


def test_a_bundle_scores_each_task_by_its_own_weights(zoo: Path, tmp_path: Path, capsys: Any) -> None:
    out = merged(zoo, tmp_path / "out", merge_method="tsv_c", parameters={"rank": 1.0})
    table = adarank.evaluate_recipe(load_recipe(zoo / "tsv_c.yaml"), [out])
    assert table.rows[str(out)] == table.rows["experts"]
    assert table.bundles == {str(out): "tsv_c"}
    assert main(["evaluate", str(zoo / "tsv_c.yaml"), str(out)]) == 0
    assert "Task-aware: each task has weights of its own" in capsys.readouterr().out


def test_a_bundle_of_other_tasks_is_refused(zoo: Path, emr: Path) -> None:
    models = [{"model": "models/mood", "task": {"name": "other", "data": "data/mood.tsv"}}]
    path = text_zoo.recipe(zoo, "others.yaml", models=models)
    with pytest.raises(adarank.AdaRankError, match="has no task 'other' of this recipe"):
        adarank.evaluate_recipe(load_recipe(path), [emr])


def test_the_command_line_from_recipe_to_checkpoint(
    zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = str(text_zoo.recipe(zoo, "cli.yaml", merge_method="emr")), str(tmp_path / "out")

    def shown(*arguments: str) -> str:
        assert main(list(arguments)) == 0
        return capsys.readouterr().out

    assert "Task-aware" in shown("plan", path)
    assert "of 2 whole experts" in shown("merge", path, out)
    report = json.loads(shown("inspect", out, "--json"))
    assert report["kind"] == "emr"
    assert report["bytes"] == adarank.load_bundle(out).sizes
    text = shown("inspect", out)
    assert all(task in text for task in TASKS)
    assert f"{100 * report['bytes']['bundle'] / report['bytes']['experts']:.0f}%" in text
    shown("extract", out, str(tmp_path / "mood"), "--task", "mood")
    assert (tmp_path / "mood" / "model.safetensors").exists()
    assert main(["extract", out, str(tmp_path / "mood"), "--task", "mood"]) == 1
    assert "--force" in capsys.readouterr().err
    shown("extract", out, str(tmp_path / "mood"), "--task", "mood", "--force")
    assert main(["extract", out, str(tmp_path / "x"), "--task", "moon"]) == 1
    assert "no task 'moon' in this bundle. Did you mean 'mood'?" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped": (lambda b: flip(b / "tasks/mood/own.safetensors"), r"mood/own.safetensors: has SHA-256 .* was needed"),
    "shared": (lambda b: flip(b / "shared.safetensors"), r"shared.safetensors: has SHA-256"),
    "head": (lambda b: flip(b / "tasks/mood/head.safetensors"), r"head.safetensors: has SHA-256"),
    "cut": (lambda b: (b / "shared.safetensors").write_bytes(b"short"), r"has 5 bytes, and \d+ were needed"),
    "missing": (lambda b: (b / "tasks/colour/own.safetensors").unlink(), r"colour/own.safetensors: is missing"),
    "format": (
        lambda b: edit(b / BUNDLE, format="adarank-bundle-7"),
        "format 'adarank-bundle-7', and this adarank reads",
    ),
    "kind": (
        lambda b: edit(b / BUNDLE, kind="emt"),
        "kind 'emt', which this adarank does not know. Did you mean 'emr'",
    ),
    "json": (lambda b: (b / BUNDLE).write_text("{"), r"bundle.json: damaged \(JSONDecodeError"),
    "keys": (lambda b: edit(b / BUNDLE, tensors=3), r"bundle.json: damaged"),
    "path": (lambda b: edit(b / BUNDLE, tasks={"../x": {"prefix": "", "renamed": {}}}), "'../x' names no task"),
    "no bundle": (lambda b: (b / BUNDLE).unlink(), "not a bundle"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_one_sentence(zoo: Path, tmp_path: Path, damage: str) -> None:
    out = merged(zoo, tmp_path / "out")
    break_it, words = DAMAGE[damage]
    break_it(out)
    with pytest.raises(CheckpointError, match=words) as caught:
        adarank.from_bundle(out, "mood")
    assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match=words):
        adarank.extract(out, "mood", tmp_path / "mood")
    assert not (tmp_path / "mood").exists()


def test_all_missing_files_are_named_at_once(zoo: Path, tmp_path: Path) -> None:
    out = merged(zoo, tmp_path / "out")
    for task in TASKS:
        (out / "tasks" / task / "own.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"2 files[\s\S]*colour/own[\s\S]*mood/own"):
        adarank.load_bundle(out)


def test_a_task_is_loaded_from_its_own_files_and_the_shared_ones(zoo: Path, tmp_path: Path) -> None:
    out = merged(zoo, tmp_path / "out")
    flip(out / "tasks" / "colour" / "own.safetensors")
    adarank.from_bundle(out, "mood")
    with pytest.raises(CheckpointError, match="colour"):
        adarank.load_bundle(out).check()


def test_one_loader_serves_bundles_too(emr: Path) -> None:
    first, second = (load(emr, "mood").state_dict() for load in (adarank.load_task, adarank.from_bundle))
    assert same(first, second)


@pytest.mark.parametrize("stop", [9, 60])
def test_a_kill_while_writing_leaves_no_bundle(zoo: Path, tmp_path: Path, stop: int) -> None:
    path, out = text_zoo.recipe(zoo, "killed.yaml", merge_method="emr"), tmp_path / "out"
    arguments = [sys.executable, "-c", KILLED, str(path), str(out), str(stop), "free"]
    assert subprocess.run(arguments, capture_output=True, check=False).returncode == -9
    assert not out.exists()
    adarank.merge_recipe(load_recipe(path), out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    adarank.load_bundle(out).check()


@pytest.mark.parametrize("name", NAMES)
def test_a_bundle_written_twice_has_the_same_bytes(zoo: Path, tmp_path: Path, name: str) -> None:
    one, two = (merged(zoo, tmp_path / run, merge_method=name) for run in ("one", "two"))
    files = sorted(f.relative_to(one) for f in one.rglob("*") if f.is_file() and f.name != "adarank.json")
    assert len(files) > 8
    assert all((one / file).read_bytes() == (two / file).read_bytes() for file in files)


def test_force_replaces_a_bundle(zoo: Path, tmp_path: Path) -> None:
    out = merged(zoo, tmp_path / "out")
    with pytest.raises(OutputError, match="already exists"):
        merged(zoo, out)
    adarank.merge_recipe(load_recipe(zoo / "emr.yaml"), out, force=True)


def test_models_without_tasks_make_a_bundle_too(zoo: Path, tmp_path: Path) -> None:
    """As mergekit's recipes: no data, no heads; the network is what config.json says."""
    models = [{"model": f"models/{name}"} for name in ("mood", "mood2")]
    if not (zoo / "models" / "mood2").exists():
        (zoo / "models" / "mood2").symlink_to(zoo / "models" / "mood")
    out = merged(zoo, tmp_path / "out", models=models, base_model="models/mood")
    expert = transformers.AutoModelForSequenceClassification.from_pretrained(zoo / "models" / "mood").eval()
    torch.testing.assert_close(adarank.from_bundle(out, "mood2")(**BATCH).logits, expert(**BATCH).logits)


def test_search_tunes_tall_masks_task_by_task(zoo: Path, tmp_path: Path) -> None:
    path = text_zoo.recipe(zoo, "tall.yaml", merge_method="tall_masks")
    ranked, record = search(path, zoo / "tall.best.yaml", [Axis("lambda_mask", (0.2, 1.0, 3.0))])
    grid, own = record["points"][:3], record["points"][3]
    assert own["scores"] == {task: max(point["scores"][task] for point in grid) for task in TASKS}
    for task in TASKS:
        chosen = own["settings"]["lambda_mask"][task]
        assert next(p for p in grid if p["settings"]["lambda_mask"] == chosen)["scores"][task] == own["scores"][task]
    assert ranked[0].mean == max(point.mean for point in ranked)
    settings = text_zoo.recipe(zoo, "tall.own.yaml", merge_method="tall_masks", parameters=own["settings"])
    adarank.merge_recipe(load_recipe(settings), tmp_path / "out")
    (scored,) = [
        s
        for r, s in adarank.evaluate_recipe(load_recipe(settings), [tmp_path / "out"], "select").rows.items()
        if "out" in r
    ]
    assert scored == own["scores"]
