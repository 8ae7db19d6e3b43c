"""Methods from statistics, from a recipe: text and image models, records, plans, search, resuming, refusals."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn

import adarank
import image_zoo
import text_zoo
from adarank.calibration import gather as statistics
from adarank.cli.main import main
from adarank.errors import AdaRankError
from adarank.io.writer import RECORD
from adarank.methods import METHODS, CalibratedMethod
from adarank.recipe.reader import load_recipe
from adarank.workflow import calibrate
from adarank.workflow.build_networks import build_models
from adarank.workflow.load_tasks import load_tasks
from adarank.workflow.search import parse_axis, search

NAMES = [name for name, kind in METHODS.items() if issubclass(kind, CalibratedMethod)]
FEW: Mapping[str, Any] = {"examples": 12}
# What merges tensors without statistics as the method does; the average for all others.
REST: Mapping[str, Any] = {
    "featcal": {"merge_method": "task_arithmetic", "parameters": {"lambda": 0.3}},
    "esm": {"merge_method": "iso_c"},
}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_zoo.make_zoo(tmp_path_factory.mktemp("zoo"))


def merge(path: Path, out: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    record = adarank.merge_recipe(load_recipe(path), out)
    return record, load_file(out / "model.safetensors")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("architecture", ["bert", "gpt2", "vit", "convnext"])
def test_every_architecture_merges_and_loads(tmp_path: Path, architecture: str, name: str) -> None:
    made = text_zoo if architecture in ("bert", "gpt2") else image_zoo
    folder = made.make_zoo(tmp_path, architecture)
    record, found = merge(made.recipe(folder, merge_method=name, parameters=FEW), tmp_path / "out")
    _, rest = merge(made.recipe(folder, **REST.get(name, {"merge_method": "average"})), tmp_path / "rest")
    measured = record["statistics"]
    assert measured["inputs"] == dict.fromkeys(made.TASKS, 12)
    assert measured["labels_read"] is False
    assert measured["protocol"] == "disjoint"
    moved = [key for key, own in found.items() if not torch.equal(own, rest[key])]
    assert 0 < len(moved) <= measured["tensors_with_statistics"]
    assert any("norm" in key.lower() or "ln_" in key for key in moved) == (name in ("fisher", "featcal"))
    assert json.loads((tmp_path / "out" / RECORD).read_text())["statistics"] == measured
    for task, classes in made.TASKS.items():
        model = adarank.load_task(tmp_path / "out", task)
        assert model.config.num_labels == classes
    assert not (tmp_path / ".out.state").exists()


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_regmean_from_a_recipe_solves_its_normal_equations(tmp_path: Path, architecture: str) -> None:
    """Inputs one by one through experts loaded by `transformers`, their layers' inputs taken by hooks of the test."""
    folder = text_zoo.make_zoo(tmp_path, architecture)
    given = load_recipe(text_zoo.recipe(folder, merge_method="regmean", parameters={**FEW, "batch_size": 5}))
    record = adarank.merge_recipe(given, tmp_path / "out")
    job = adarank.open_job(given)
    data = load_tasks(job)
    assert isinstance(job.method, CalibratedMethod)
    rows = job.method.sampled(data)
    sums: dict[str, list[Any]] = {}
    for task in text_zoo.TASKS:
        expert = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "models" / task).eval()
        body = getattr(expert, expert.base_model_prefix)
        given_to = hooked(body)
        for row in rows[task]:
            batch = data[task].examples.batch([row])
            with torch.no_grad():
                body(**batch)
        for name, vectors in given_to.items():
            x = torch.cat(vectors).double()
            gram = x.T @ x / len(x)
            gram = 0.95 * gram + 0.05 * gram.diagonal().diag()
            weight = body.get_submodule(name).weight.detach().double()
            weight = weight if architecture == "gpt2" else weight.T
            sums.setdefault(name, []).append((gram, gram @ weight))
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name, parts in sums.items():
        wanted = np.linalg.solve(sum(g for g, _ in parts).numpy(), sum(r for _, r in parts).numpy())
        own = found[f"{name}.weight"].double()
        own = own if architecture == "gpt2" else own.T
        torch.testing.assert_close(own, torch.from_numpy(wanted), rtol=1e-3, atol=1e-4)
    assert record["statistics"]["tensors_with_statistics"] == len(sums)


def hooked(body: nn.Module) -> dict[str, list[Tensor]]:
    """Layer -> the vectors that it is given, filled in by forward passes of inputs without padding."""
    seen: dict[str, list[Tensor]] = {}
    for name, part in body.named_modules():
        if isinstance(part, nn.Linear) or type(part).__name__ == "Conv1D":
            part.register_forward_pre_hook(
                lambda _, args, name=name: seen.setdefault(name, []).append(args[0].flatten(0, -2))
            )
    return seen


@pytest.mark.parametrize("name", NAMES)
def test_seed_and_number_of_examples_decide_batches_do_not(zoo: Path, tmp_path: Path, name: str) -> None:
    def result(run: str, **changes: Any) -> dict[str, Tensor]:
        path = text_zoo.recipe(zoo, f"{name}-{run}.yaml", merge_method=name, **{"parameters": FEW, **changes})
        return merge(path, tmp_path / run)[1]

    def gap(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
        # beside the tensor's largest value: from so few inputs RegMean's solutions are large, and so is their rounding
        def apart(a: Tensor, b: Tensor) -> float:
            return float((a - b).abs().max() / a.abs().max().clamp_min(1))

        return max(apart(one[key].float(), other[key].float()) for key in one)

    first = result("first")
    assert gap(first, result("again")) == 0
    assert gap(first, result("seed", seed=1)) > 1e-5
    assert gap(first, result("more", parameters={"examples": 20})) > 1e-5
    if name != "fisher":
        assert gap(first, result("batches", parameters={**FEW, "batch_size": 5})) < 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_only_adapt_inputs_are_looked_at(zoo: Path, name: str) -> None:
    job = adarank.open_job(load_recipe(text_zoo.recipe(zoo, merge_method=name, parameters={"examples": 1000})))
    data = load_tasks(job)
    assert isinstance(job.method, CalibratedMethod)
    rows = job.method.sampled(data)
    for task, own in data.items():
        assert rows[task] == own.splits.rows["adapt"]
    fewer = job.method.model_copy(update={"examples": 7}).sampled(data)
    assert all(len(own) == 7 and set(own) < set(rows[task]) for task, own in fewer.items())


def test_empirical_fisher_reads_labels_and_says_so(zoo: Path, tmp_path: Path, capsys) -> None:
    plain = text_zoo.recipe(zoo, "plain.yaml", merge_method="fisher", parameters={**FEW, "kind": True})
    assert load_recipe(plain).method(["w"]).model_dump()["kind"] == "true"  # as YAML reads `kind: true`
    path = text_zoo.recipe(zoo, "labels.yaml", merge_method="fisher", parameters={**FEW, "kind": "empirical"})
    record, _ = merge(path, tmp_path / "out")
    assert record["statistics"]["labels_read"] is True
    assert main(["plan", str(path)]) == 0
    assert "statistics of 12 adapt inputs per task, their labels are read" in capsys.readouterr().out
    assert main(["methods", "fisher"]) == 0
    assert "reads labels of adapt inputs" in " ".join(capsys.readouterr().out.split())


def test_missing_labels_are_one_error_that_names_every_task(tmp_path: Path, capsys) -> None:
    folder = text_zoo.make_zoo(tmp_path)
    for file in (folder / "data").glob("*.tsv"):
        lines = file.read_text().splitlines()
        file.write_text("\n".join(["text", *(line.split("\t")[1] for line in lines[1:])]))
    path = text_zoo.recipe(folder, merge_method="fisher", parameters={**FEW, "kind": "empirical"})
    for command in (["plan", str(path)], ["merge", str(path), str(tmp_path / "out")]):
        assert main(command) == 1
        shown = capsys.readouterr().err
        assert all(f"task '{task}': 12 of the 12 adapt inputs carry no label" in shown for task in text_zoo.TASKS)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / ".out.state").exists()
    true = text_zoo.recipe(folder, merge_method="fisher", parameters=FEW)
    assert merge(true, tmp_path / "out")[0]["statistics"]["labels_read"] is False


@pytest.mark.parametrize("name", NAMES)
def test_tasks_without_inputs_are_named(zoo: Path, tmp_path: Path, name: str) -> None:
    bare = [{"model": f"models/{task}"} for task in text_zoo.TASKS]
    with pytest.raises(AdaRankError, match=r"(?s)'mood' has no task with data.*takes statistics.*'colour'"):
        load_recipe(text_zoo.recipe(zoo, "bare.yaml", merge_method=name, models=bare))
    path = text_zoo.recipe(zoo, "empty.yaml", merge_method=name, data={"adapt": 0})
    with pytest.raises(AdaRankError, match=r"(?s)'mood': no rows to take statistics of.*'colour': no rows"):
        merge(path, tmp_path / "out")


@pytest.mark.parametrize("name", NAMES)
def test_a_merge_that_was_cut_off_takes_up_what_was_measured(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path = text_zoo.recipe(zoo, f"cut-{name}.yaml", merge_method=name, parameters=FEW)
    _, whole = merge(path, tmp_path / "whole")
    notes: list[str] = []

    def stopping(text: str) -> None:
        notes.append(text)
        if " on " in text and sum(" on " in note for note in notes) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        adarank.merge_recipe(load_recipe(path), tmp_path / "out", note=stopping)
    assert not (tmp_path / "out").exists()
    first = next(note for note in notes if " on " in note)
    again: list[str] = []
    adarank.merge_recipe(load_recipe(path), tmp_path / "out", note=again.append)
    assert first not in again
    assert any(" on " in note for note in again)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(own, found[key]) for key, own in whole.items())
    assert not (tmp_path / ".out.state").exists()


def test_damaged_statistics_are_taken_anew(tmp_path: Path) -> None:
    store = statistics.Store(tmp_path)
    store.keep("a", {"w": torch.ones(3)})
    for file in tmp_path.iterdir():
        file.write_bytes(b"no statistics")
    assert statistics.Store(tmp_path).part("a") is None
    assert statistics.Store(tmp_path).part("b") is None


def test_statistics_that_are_not_finite_leave_nothing(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = text_zoo.recipe(zoo, "nan.yaml", merge_method="regmean", parameters=FEW)
    monkeypatch.setattr(
        statistics.Grams, "means", lambda self: {name: torch.tensor([[torch.nan]]) for name in self.calls}
    )
    with pytest.raises(AdaRankError, match=r"statistics of task 'mood'.*NaN"):
        merge(path, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_transductive_merge_is_marked_wherever_it_is_scored(zoo: Path, tmp_path: Path, capsys) -> None:
    given = {"merge_method": "regmean", "parameters": FEW}
    path = text_zoo.recipe(zoo, "seen.yaml", data={"protocol": "transductive"}, **given)
    assert merge(path, tmp_path / "seen")[0]["statistics"]["protocol"] == "transductive"
    merge(text_zoo.recipe(zoo, "fair.yaml", **given), tmp_path / "fair")
    merge(text_zoo.recipe(zoo, "other.yaml", data={"split_seed": 3}, **given), tmp_path / "other")
    fair = load_recipe(text_zoo.recipe(zoo, "fair.yaml", **given))
    rows = adarank.evaluate_recipe(fair, [tmp_path / name for name in ("seen", "fair", "other")]).rows
    assert f"{tmp_path / 'fair'}" in rows
    assert f"{tmp_path / 'seen'} [transductive]" in rows
    assert any("informed by other splits" in row for row in rows)


def test_the_command_line_tells_what_was_looked_at(zoo: Path, tmp_path: Path, capsys) -> None:
    path = text_zoo.recipe(zoo, "shown.yaml", merge_method="regmean", parameters={"examples": 2, "off_diagonal": 1.0})
    assert main(["plan", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "statistics of 2 adapt inputs per task, no label is read" in shown
    assert "inputs of mood: " in shown
    assert main(["merge", str(path), str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"statistics of 2 adapt inputs per task, no label is read, in \d", shown)
    assert re.search(r"\d+ tensors are not determined in all directions by so few inputs", shown)
    record = json.loads((tmp_path / "out" / RECORD).read_text())["statistics"]
    assert all(re.fullmatch(r"\d+ of (16|24)", part) for part in record["undetermined"].values())


def test_a_search_measures_once_where_statistics_serve_again(zoo: Path, monkeypatch) -> None:
    path = text_zoo.recipe(zoo, "grid.yaml", merge_method="regmean", parameters=FEW)
    kept: list[str] = []
    keep = statistics.Store.keep
    monkeypatch.setattr(
        statistics.Store, "keep", lambda self, key, tensors: (kept.append(key), keep(self, key, tensors))[1]
    )
    best = zoo / "grid.best.yaml"
    ranked, _ = search(path, best, [parse_axis("off_diagonal=0.5,0.9,1.0")])
    assert len(ranked) == 3
    assert kept == list(text_zoo.TASKS)
    assert set(yaml.safe_load(best.read_text())["parameters"]) == {"examples", "off_diagonal"}


@pytest.mark.parametrize("name", ["regmean", "regmean++"])
def test_passes_that_end_early_measure_what_whole_ones_do(zoo: Path, monkeypatch, name: str) -> None:
    job = adarank.open_job(load_recipe(text_zoo.recipe(zoo, merge_method=name, parameters=FEW)))
    assert job.method is not None
    data = load_tasks(job)

    def found() -> dict[str, Tensor]:
        known, _ = calibrate.with_statistics(job.method, job, lambda: build_models(job), data)
        return {n: known.statistics.read(n, "mood") for n in sorted(known.statistics.names)}

    early = found()
    grams = statistics.Grams
    stops: list[Collection[str]] = []
    monkeypatch.setattr(
        statistics, "Grams", lambda stop=(), *dtype: (stops.append(stop), grams((), *dtype))[1]
    )  # ends no pass early
    whole = found()
    assert any(stops) == (name == "regmean++")  # the passes of regmean are whole ones
    assert early.keys() == whole.keys()
    assert all(torch.equal(own, whole[key]) for key, own in early.items())


def test_the_plan_counts_networks_and_statistics(zoo: Path) -> None:
    def peak(**changes: Any) -> int:
        from adarank.recipe.plan import peak_bytes

        return peak_bytes(adarank.open_job(load_recipe(text_zoo.recipe(zoo, "peak.yaml", **changes))))

    plain = peak(merge_method="average")
    assert all(peak(merge_method=name) > plain for name in NAMES)
