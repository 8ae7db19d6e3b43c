"""A merge that cannot be done is one sentence, and leaves nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import adarank
from adarank.adapt import problem as adapt_problem
from adarank.cli.main import main
from adarank.recipe.reader import load_recipe
from make import fill_disk
from text_zoo import ADAPT, make_zoo, recipe


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_zoo(tmp_path_factory.mktemp("zoo"))


def damage_shape(folder: Path) -> None:
    path = folder / "models" / "mood" / "model.safetensors"
    state = load_file(path)
    name = next(n for n in state if "query.weight" in n)
    save_file({**state, name: state[name][:, :8].contiguous()}, path)


def damage_nan(folder: Path) -> None:
    path = folder / "models" / "colour" / "model.safetensors"
    state = load_file(path)
    name = next(n for n in state if "query.weight" in n)
    state[name][0, 0] = float("nan")
    save_file(state, path)


def damage_truncate(folder: Path) -> None:
    path = folder / "models" / "mood" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


class Runs:
    """Pickles to a call: loading it would run code."""

    def __reduce__(self) -> tuple:
        return (print, ("code ran",))


def damage_pickle(folder: Path) -> None:
    path = folder / "models" / "mood" / "model.safetensors"
    path.unlink()
    torch.save({"weight": Runs()}, path.with_name("pytorch_model.bin"))


def damage_column(folder: Path) -> None:
    path = folder / "data" / "mood.tsv"
    path.write_text(path.read_text().replace("label\ttext", "label\tsentence", 1))


def damage_key(folder: Path) -> None:
    with (folder / "recipe.yaml").open("a") as handle:
        handle.write("merge_metod: cart\n")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (damage_shape, ["query.weight", "(16, 16)", "(16, 8)", "cannot be merged"]),
        (damage_nan, ["query.weight", "1 NaN", "models/colour"]),
        (damage_truncate, ["model.safetensors", "not a whole safetensors file"]),
        (damage_pickle, ["pytorch_model.bin", "run code", "convert"]),
        (damage_column, ["mood.tsv", "'text'", "'sentence'"]),
        (damage_key, ["merge_metod", "merge_method"]),
    ],
)
def test_each_mistake_is_one_sentence_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: object, words: list[str]
) -> None:
    folder = make_zoo(tmp_path / "zoo")
    path = recipe(folder, **{**ADAPT, "adapt": {"steps": 1}})
    damage(folder)  # type: ignore[operator]
    before = sorted(p.name for p in tmp_path.iterdir())
    assert main(["merge", str(path), str(tmp_path / "out")]) == 1
    shown = capsys.readouterr()
    assert all(word in shown.err for word in words), shown.err
    assert "Traceback" not in shown.err
    assert "code ran" not in shown.out
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_an_existing_output_is_refused_without_force(
    zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = str(recipe(zoo)), tmp_path / "out"
    assert main(["merge", path, str(out)]) == 0
    kept = (out / "model.safetensors").read_bytes()
    assert main(["merge", path, str(out)]) == 1
    assert "--force" in capsys.readouterr().err
    assert main(["merge", path, str(out), "--force"]) == 0
    assert (out / "model.safetensors").read_bytes() == kept


def test_a_deleted_tail_of_the_disk_leaves_nothing(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A disk that fills up while tensors are written."""
    fill_disk(monkeypatch, 10_000)
    assert main(["merge", str(recipe(zoo)), str(tmp_path / "out")]) == 1
    assert "disk is full" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_loss_that_is_not_finite_at_once_leaves_nothing(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapt_problem, "objective", lambda view, *_: view.logits.sum() * float("nan"))
    with pytest.raises(adarank.AdaRankError, match=r"task 'mood' is nan at step 1"):
        adarank.merge_recipe(load_recipe(recipe(zoo, **ADAPT)), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_objective_of_an_unknown_task_is_refused_at_once(zoo: Path) -> None:
    path = recipe(zoo, "stranger.yaml", **{**ADAPT, "adapt": {"objectives": {"mod": "entropy"}}})
    with pytest.raises(adarank.AdaRankError, match=r"adapt\.objectives: unknown task 'mod'. Did you mean 'mood'"):
        load_recipe(path)
