"""What the catalogue says of the methods is what they do, and each row of the papers has a recipe that is one."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

import text_zoo
from adarank.adapt import PRESETS
from adarank.cli.main import main
from adarank.io.checkpoint import Checkpoint
from adarank.methods import METHODS, CalibratedMethod
from adarank.recipe.catalogue import catalogue
from adarank.recipe.job import open_job
from adarank.recipe.papers import ROWS, SETTINGS
from adarank.recipe.plan import peak_bytes
from adarank.recipe.reader import load_recipe, parse_recipe
from adarank.workflow.merge import merge

TOLD = {"slerp": {"t": 0.5}, "nuslerp": {}, "nearswap": {"t": 0.5}}
STREAMED = [
    name
    for name, kind in METHODS.items()
    if name != "masked" and not issubclass(kind, CalibratedMethod) and getattr(kind, "origin", None) == "pretrained"
]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_zoo.make_zoo(tmp_path_factory.mktemp("zoo"))


def changes(name: str) -> dict:
    own = {"merge_method": name, "parameters": TOLD.get(name, {})}
    one = {"models": [{"model": "models/mood"}], "select": {"head": ["classifier.*"]}}
    return own | one if name in ("slerp", "nearswap", "arcee_fusion") else own


@pytest.mark.parametrize("name", STREAMED)
def test_the_base_is_read_as_often_as_the_catalogue_says(
    name: str, zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: Counter[tuple[str, str]] = Counter()
    whole = Checkpoint.read

    def counted(self: Checkpoint, tensor: str) -> torch.Tensor:
        reads[self.folder.name, tensor] += 1
        return whole(self, tensor)

    monkeypatch.setattr(Checkpoint, "read", counted)
    merge(load_recipe(text_zoo.recipe(zoo, f"{name}.yaml", **changes(name))), tmp_path / "out")
    (seen,) = {count for (folder, tensor), count in reads.items() if folder == "base" and "query.weight" in tensor}
    said = catalogue()[name].reads
    assert said.removeprefix("the checkpoints ") == ("once" if seen == 1 else f"{seen} times")


@pytest.mark.parametrize("name", STREAMED)
def test_copies_named_by_the_catalogue_are_those_of_the_plan(name: str, zoo: Path) -> None:
    job = open_job(load_recipe(text_zoo.recipe(zoo, f"{name}.yaml", **changes(name))))
    copies, rest = catalogue()[name].memory.split(" ", 1)
    net = job.network
    copies = int(copies) - (job.method.origin_kind(net) == "pretrained")  # which is the base's own float32 tensor
    if METHODS[name].model_construct().by_entry:
        largest = max(net.tensors[merged].numel for merged in net.merged())
        assert rest == "float32 copies of a block of 2¹⁸ entries"
        assert (peak_bytes(job) - job.process_bytes) == 4 * copies * largest
        return
    assert rest.startswith("float32 copies of the largest tensor")
    matrices = [net.tensors[merged] for merged in net.merged() if net.choices[merged].action == "decompose"]
    held = [copies * info.numel + job.method.solving(info.shape) for info in matrices]
    assert (peak_bytes(job) - job.process_bytes) == 4 * max(held)
    assert rest.endswith("largest tensor") == (max(held) == copies * max(info.numel for info in matrices))


@pytest.mark.parametrize("row", [row for row in ROWS if row.recipe], ids=lambda row: row.name)
def test_every_row_of_the_papers_has_a_recipe_that_is_taken(row: object, tmp_path: Path) -> None:
    models = [{"model": f"models/{task}", "task": {"name": task, "data": f"{task}.tsv"}} for task in ("a", "b")]
    recipe = parse_recipe({**row.recipe, "base_model": "base", "models": models}, tmp_path)  # type: ignore[attr-defined]
    assert recipe.merge_method in catalogue()


def test_figures_are_percentages_and_hints_name_presets() -> None:
    assert len({row.name for row in ROWS}) == len(ROWS)
    for row in ROWS:
        assert set(row.figures) <= set(SETTINGS)
        assert all(45 < value < 95 for value in row.figures.values())
        named = [word for word in row.hint.replace(",", "").split() if word.startswith(("vit-", "roberta-", "gpt2-"))]
        assert set(named) <= set(PRESETS)


def test_the_command_line_shows_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "--papers", "--json"]) == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)] == [row.name for row in ROWS]
    assert main(["methods", "cart", "--papers"]) == 0
    shown = capsys.readouterr().out
    assert "84.7" in shown
    assert "87.9" not in shown
    assert main(["methods", "emr"]) == 0
    shown = capsys.readouterr().out
    assert "2 times" in shown
    assert "10 float32 copies" in shown
