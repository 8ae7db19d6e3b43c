"""Figures that run networks, against losses computed here: the experts' own folders, weights put in by hand, cross-entropy."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

import adarank
from adarank.analysis.figure import Row
from adarank.analysis.rank_sweep import cut
from adarank.errors import AdaRankError
from adarank.spectral.svd import decompose
from adarank.workflow.analyse import Options, analyse
from adarank.workflow.load_tasks import load_tasks
from make import randn
from text_zoo import make_zoo, recipe

TASKS = {"mood": 2, "colour": 3, "size": 2}
Weights = dict[str, Tensor]


def models_of(tasks: Any) -> list[dict[str, Any]]:
    return [{"model": f"models/{task}", "task": {"name": task, "data": f"data/{task}.tsv"}} for task in tasks]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_zoo(tmp_path_factory.mktemp("losses"), tasks=TASKS)
    recipe(folder, models=models_of(TASKS))
    return folder


class Oracle:
    """Losses by weights: of the experts' own modules in float64, on the test rows."""

    def __init__(self, zoo: Path) -> None:
        read = {name: load_file(zoo / "models" / name / "model.safetensors") for name in ("base", *TASKS)}
        names = set(read["base"])
        bodies = {m: {n.removeprefix("bert."): t.double() for n, t in of.items()} for m, of in read.items()}
        self.bodies = {model: {n: t for n, t in of.items() if n in names} for model, of in bodies.items()}
        job = adarank.open_job(adarank.load_recipe(zoo / "recipe.yaml"))
        self.merged = [n for n, c in job.network.choices.items() if c.action in ("decompose", "scale")]
        self.matrices = [n for n, c in job.network.choices.items() if c.action == "decompose"]
        self.modules, self.inputs = {}, {}
        for task, data in load_tasks(job).items():
            folder = zoo / "models" / task
            module = transformers.AutoModelForSequenceClassification.from_pretrained(folder).double().eval()
            with (zoo / "data" / f"{task}.tsv").open() as file:
                table = list(csv.DictReader(file, delimiter="\t"))
            chosen = [table[row] for row in data.splits.rows["test"]]
            tokens = transformers.AutoTokenizer.from_pretrained(folder)
            batch = tokens([row["text"] for row in chosen], padding=True, truncation=True, return_tensors="pt")
            self.modules[task] = module
            self.inputs[task] = (batch, torch.tensor([int(row["label"]) for row in chosen]))

    def mean(self) -> Weights:
        return {n: torch.stack([self.bodies[task][n] for task in TASKS]).mean(0) for n in self.bodies["base"]}

    def origin(self, kind: str) -> Weights:
        return dict(self.bodies["base"]) if kind == "pretrained" else self.mean()

    @torch.no_grad()
    def loss(self, task: str, weights: Mapping[str, Tensor]) -> float:
        self.modules[task].bert.load_state_dict(dict(weights), strict=False)
        batch, labels = self.inputs[task]
        return float(torch.nn.functional.cross_entropy(self.modules[task](**batch).logits, labels))


@pytest.fixture(scope="module")
def oracle(zoo: Path) -> Oracle:
    return Oracle(zoo)


def rows_of(zoo: Path, figure: str, out: Path, settings: dict[str, Any], file: str = "recipe.yaml") -> list[Row]:
    return list(analyse(figure, zoo / file, out, settings, Options(image="none")).rows)


def component(delta: Tensor, number: int) -> Tensor:
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    return s[number] * torch.outer(u[:, number], vh[number])


def without(oracle: Oracle, task: str, kind: str, lam: float) -> Weights:
    """origin + λ Σ of the other experts' task vectors."""
    origin = oracle.origin(kind)
    return {
        n: w + (lam * sum(oracle.bodies[o][n] - w for o in TASKS if o != task) if n in oracle.merged else 0)
        for n, w in origin.items()
    }


@pytest.mark.parametrize("kind", ["pretrained", "average"])
def test_components_are_the_brute_forces(kind: str, zoo: Path, oracle: Oracle, tmp_path: Path) -> None:
    """Every matrix's r-th component at once, by torch.linalg.svd, in networks of their own."""
    rows = rows_of(zoo, "components", tmp_path / "c", {"top": 0.2, "lambda": 0.4, "origin": kind})
    exact = [row for row in rows if row["kind"] == "exact"]
    assert {(row["task"], row["component"]) for row in exact} == {(t, r) for t in TASKS for r in (1, 2, 3)}
    for row in exact:
        merge = without(oracle, row["task"], kind, 0.4)
        origin, expert = oracle.origin(kind), oracle.bodies[row["task"]]
        moved = {
            n: w + 0.4 * component(expert[n] - origin[n], row["component"] - 1) if n in oracle.matrices else w
            for n, w in merge.items()
        }
        changes = {task: oracle.loss(task, moved) - oracle.loss(task, merge) for task in TASKS}
        for task in TASKS:
            assert row[f"on {task}"] == pytest.approx(changes[task], abs=2e-6)
        assert row["own"] == pytest.approx(changes[row["task"]], abs=2e-6)
        assert row["net"] == pytest.approx(sum(changes.values()), abs=4e-6)


def test_first_order_is_the_slope_of_the_loss(zoo: Path, oracle: Oracle, tmp_path: Path) -> None:
    """Of single components by central differences in float64, and their sums over matrices."""
    rows = rows_of(zoo, "components", tmp_path / "c", {"of": ["colour"]})
    each = [row for row in rows if row["kind"] == "first order, each matrix"]
    assert len(each) == 16 * len(oracle.matrices)
    merge, expert, step = without(oracle, "colour", "pretrained", 0.3), oracle.bodies["colour"], 1e-3
    for row in each[:: len(each) // 9]:
        name = row["tensor"]
        part = 0.3 * component(expert[name] - oracle.bodies["base"][name], row["component"] - 1)
        for task in TASKS:
            up, down = (oracle.loss(task, {**merge, name: merge[name] + sign * step * part}) for sign in (1, -1))
            assert row[f"on {task}"] == pytest.approx((up - down) / (2 * step), abs=1e-6)
    for row in (row for row in rows if row["kind"] == "first order"):
        parts = [other["net"] for other in each if other["component"] == row["component"]]
        assert row["net"] == pytest.approx(sum(parts))
    (losses,) = (row for row in rows if row["kind"] == "merge")
    assert losses["on mood"] == pytest.approx(oracle.loss("mood", merge), abs=1e-6)


def test_single_matrices_have_single_components(zoo: Path, oracle: Oracle, tmp_path: Path) -> None:
    name = oracle.matrices[3]
    rows = rows_of(zoo, "components", tmp_path / "c", {"of": "mood", "matrices": f"*{name[5:]}", "top": 0.1})
    (row,) = (row for row in rows if row["kind"] == "exact")
    merge = without(oracle, "mood", "pretrained", 0.3)
    part = component(oracle.bodies["mood"][name] - oracle.bodies["base"][name], 0)
    moved = {**merge, name: merge[name] + 0.3 * part}
    assert row["on size"] == pytest.approx(oracle.loss("size", moved) - oracle.loss("size", merge), abs=1e-6)


@pytest.mark.parametrize(("method", "name", "lam"), [("TA", "svd_k", "ta"), ("CART", "cart", "cart")])
def test_a_merged_point_is_the_methods_merge(method: str, name: str, lam: str, zoo: Path, tmp_path: Path) -> None:
    settings = {"shares": [0.3, 1.0], lam: 0.7, "ways": ["merged"], "orders": ["top"]}
    rows = [row for row in rows_of(zoo, "rank-sweep", tmp_path / "s", settings) if row["method"] == method]
    assert len(rows) == 2 * len(TASKS)
    for share in (0.3, 1.0):
        made = {"models": models_of(TASKS), "merge_method": name, "parameters": {"rank": share, "lambda": 0.7}}
        file = recipe(zoo, f"{name}.yaml", **made)
        adarank.merge_recipe(file, tmp_path / f"{name}-{share}")
        scores = adarank.evaluate_recipe(file, [tmp_path / f"{name}-{share}"]).rows[str(tmp_path / f"{name}-{share}")]
        assert {row["task"]: row["score"] for row in rows if row["share"] == share} == scores


def test_a_routed_point_about_the_average_is_cart_indexing(zoo: Path, tmp_path: Path) -> None:
    settings = {"shares": [0.0, 0.3, 1.0], "ways": ["routed"], "orders": ["top"]}
    rows = [row for row in rows_of(zoo, "rank-sweep", tmp_path / "s", settings) if row["method"] == "CART"]
    file = recipe(zoo, "indexing.yaml", models=models_of(TASKS), merge_method="cart_indexing", parameters={"rank": 0.3})
    adarank.merge_recipe(file, tmp_path / "bundle")
    scores = adarank.evaluate_recipe(file, [tmp_path / "bundle"]).rows
    assert {row["task"]: row["score"] for row in rows if row["share"] == 0.3} == scores[str(tmp_path / "bundle")]
    assert {row["task"]: row["score"] for row in rows if row["share"] == 1.0} == scores["experts"]


def test_ends_of_a_sweep_are_base_and_average(zoo: Path, oracle: Oracle, tmp_path: Path) -> None:
    """Reversed or not; about the base other tensors than matrices move at every rank."""
    rows = rows_of(zoo, "rank-sweep", tmp_path / "s", {"shares": [0, 1], "ways": ["merged"], "cart": 1.5})
    base = oracle.bodies["base"]
    others = {
        n: w + (0.3 * sum(oracle.bodies[t][n] - w for t in TASKS) if n in oracle.merged else 0) for n, w in base.items()
    }
    whole = {n: others[n] if n in oracle.merged else w for n, w in base.items()}
    ends = {
        ("TA", 0.0): {n: base[n] if n in oracle.matrices else w for n, w in others.items()},
        ("TA", 1.0): whole,
        ("CART", 0.0): {n: w if n in oracle.merged else base[n] for n, w in oracle.mean().items()},
    }
    ends["CART", 1.0] = ends["CART", 0.0]
    assert len(rows) == 8 * len(TASKS)
    for row in rows:
        assert row["loss"] == pytest.approx(oracle.loss(row["task"], ends[row["method"], row["share"]]), abs=1e-5)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (7, 7)])
def test_strongest_and_weakest_components_make_the_whole(shape: tuple[int, int]) -> None:
    matrix = randn(3, *shape)
    spectrum, rank = decompose(matrix), min(shape)
    u, s, vh = np.linalg.svd(matrix.numpy(), full_matrices=False)
    for count in range(rank + 1):
        top, rest = cut(spectrum, count / rank), cut(spectrum, 1 - count / rank, "reversed")
        assert torch.allclose(top + rest, matrix, atol=1e-5)
        assert np.allclose(top.numpy(), (u[:, :count] * s[:count]) @ vh[:count], atol=1e-5)


def test_a_subset_is_merged_as_a_recipe_of_its_own(zoo: Path, tmp_path: Path) -> None:
    methods = {"average": {}, "task_arithmetic": {"lambda": 0.5}, "cart": {"rank": 0.25}}
    rows = rows_of(zoo, "task-count", tmp_path / "n", {"methods": methods})
    subsets = [subset for count in (1, 2, 3) for subset in combinations(TASKS, count)]
    assert {row["subset"] for row in rows} == {" ".join(subset) for subset in subsets}
    assert len(rows) == 3 * sum(map(len, subsets))
    for name, parameters in methods.items():
        subset = ("mood", "size")
        file = recipe(zoo, "subset.yaml", models=models_of(subset), merge_method=name, parameters=parameters)
        adarank.merge_recipe(file, tmp_path / name)
        scores = adarank.evaluate_recipe(file, [tmp_path / name]).rows[str(tmp_path / name)]
        here = [row for row in rows if row["method"] == name and row["subset"] == "mood size"]
        assert {row["task"]: row["score"] for row in here} == scores


def test_task_counts_have_mean_and_standard_error(zoo: Path, tmp_path: Path) -> None:
    from adarank.analysis.task_count import statistics

    rows = rows_of(zoo, "task-count", tmp_path / "n", {"methods": {"average": {}}, "counts": [2, 3]})
    pairs = [[r["score"] for r in rows if r["subset"] == " ".join(s)] for s in combinations(TASKS, 2)]
    means = np.mean(pairs, axis=1)
    curve = statistics(rows)
    assert curve[2] == pytest.approx((means.mean(), means.std(ddof=1) / math.sqrt(3)))
    assert curve[3][1] == 0
    few = rows_of(zoo, "task-count", tmp_path / "few", {"methods": {"average": {}}, "counts": [2], "most": 2})
    assert len({row["subset"] for row in few}) == 2


def test_the_plane_is_that_of_principal_components(zoo: Path, oracle: Oracle, tmp_path: Path) -> None:
    """Places of experts, base and paths, and losses on the grid, from whole flattened weights."""
    settings = {"points": 3, "shares": [0.25, 1.0], "cart": [2.0], "ta": [0.3]}
    rows = rows_of(zoo, "landscape", tmp_path / "l", settings)
    mean = oracle.mean()

    def flat(weights: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([(weights[n] - mean[n]).flatten() for n in oracle.merged])

    vectors = torch.stack([flat(oracle.bodies[task]) for task in TASKS])
    directions = torch.linalg.svd(vectors, full_matrices=False).Vh[:2]
    experts = {row["task"]: (row["x"], row["y"]) for row in rows if row["kind"] == "expert"}
    signs = torch.sign(torch.tensor(experts["mood"]).double() / (directions @ flat(oracle.bodies["mood"])))
    directions = directions * signs[:, None]
    for task in TASKS:
        assert experts[task] == pytest.approx((directions @ flat(oracle.bodies[task])).tolist(), abs=1e-4)
    (base,) = (row for row in rows if row["kind"] == "base")
    assert (base["x"], base["y"]) == pytest.approx((directions @ flat(oracle.bodies["base"])).tolist(), abs=1e-4)
    for method, name, lam in (("TA", "svd_k", 0.3), ("CART", "cart", 2.0)):
        for share in (0.25, 1.0):
            bodies = {m: {n: t.float() for n, t in of.items() if n in oracle.merged} for m, of in oracle.bodies.items()}
            made = adarank.merge(bodies.pop("base"), bodies, name, {"rank": share, "lambda": lam})
            expected = (directions @ flat({n: t.double() for n, t in made.items()})).tolist()
            here = [r for r in rows if r["kind"] == "path" and (r["method"], r["share"]) == (method, share)]
            assert len(here) == len(TASKS)
            assert all((row["x"], row["y"]) == pytest.approx(expected, abs=1e-3) for row in here)
    grid = [row for row in rows if row["kind"] == "grid"]
    assert len(grid) == 9 * len(TASKS)
    for row in grid[::4]:
        moved = dict(mean)
        shift = row["x"] * directions[0] + row["y"] * directions[1]
        for n, part in zip(oracle.merged, shift.split([mean[n].numel() for n in oracle.merged]), strict=True):
            moved[n] = mean[n] + part.reshape(mean[n].shape)
        weights = {n: moved[n] if n in oracle.merged else w for n, w in oracle.bodies["base"].items()}
        assert row["loss"] == pytest.approx(oracle.loss(row["task"], weights), abs=1e-5)


@pytest.mark.parametrize(
    ("figure", "settings", "said"),
    [
        ("components", {"of": ["mod"]}, "Did you mean 'mood'?"),
        ("components", {"matrices": ["nothing*"]}, "fits nothing"),
        ("rank-sweep", {"shares": [2]}, "from 0 to 1"),
        ("task-count", {"methods": {"adarank": {}}}, "'adarank' reads"),
        ("task-count", {"methods": {"crt": {}}}, "Did you mean 'cart'?"),
        ("task-count", {"counts": [4]}, "and there are 3"),
    ],
)
def test_what_figures_cannot_do_is_said(
    figure: str, settings: dict[str, Any], said: str, zoo: Path, tmp_path: Path
) -> None:
    with pytest.raises(AdaRankError) as caught:
        rows_of(zoo, figure, tmp_path / "x", settings)
    assert said in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_two_experts_span_no_plane(zoo: Path, tmp_path: Path) -> None:
    recipe(zoo, "two.yaml", models=models_of(("mood", "size")))
    with pytest.raises(AdaRankError, match="takes 3 experts or more, and the recipe has 2"):
        rows_of(zoo, "landscape", tmp_path / "x", {}, "two.yaml")
