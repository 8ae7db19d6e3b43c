"""Settings of surgery, WEMoE and Twin-Merging: what each takes, what is refused, what `plan` and the tables show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from adarank.cli.main import main
from adarank.errors import RecipeError
from adarank.modular import MODULAR
from adarank.modular.base import settled
from adarank.recipe.job import open_job
from adarank.recipe.reader import load_recipe
from adarank.workflow.merge import merge
from modular_zoo import METHODS, of, write
from text_zoo import make_zoo, recipe


@pytest.mark.parametrize("setting", ["tolerance", "lr_masks", "self_label"])
def test_settings_that_mean_nothing_to_surgery_are_refused(tmp_path: Path, setting: str) -> None:
    zoo = make_zoo(tmp_path)
    path = recipe(zoo, merge_method="surgery", adapt={setting: {} if setting == "self_label" else 1})
    with pytest.raises(RecipeError, match=setting):
        load_recipe(path)


def test_modules_are_judged_as_often_as_masks_of_few_inputs(tmp_path: Path) -> None:
    zoo = make_zoo(tmp_path)
    for task in ("mood", "colour"):
        file = zoo / "data" / f"{task}.tsv"
        file.write_text("".join(file.read_text().splitlines(keepends=True)[:12]))
    adapt = {"steps": 12, "batch_size": 4, "check_every": "auto"}
    path = recipe(zoo, merge_method="wemoe", adapt=adapt, data={"adapt": 0.2, "select": 0.2, "test": 0.6})
    record = merge(load_recipe(path), tmp_path / "out")
    assert list(record["adaptation"]["judged"])[:3] == ["0", "5", "10"]


@pytest.mark.parametrize("method", METHODS)
def test_the_plan_knows_the_size(method: str, images: Path, tmp_path: Path) -> None:
    recipe = load_recipe(write(images, **METHODS[method]))
    planned = open_job(recipe).output_bytes()
    merge(recipe, tmp_path / "out")
    files = [tmp_path / "out" / "shared.safetensors", *tmp_path.glob("out/tasks/*/own.safetensors")]
    assert planned == sum(t.numel() * t.element_size() for f in files for t in load_file(f).values())


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (of("surgery", rank=0), "rank"),
        (of("surgery", start={"merge_method": "emr"}), "'emr' gives no single merged model"),
        (of("surgery", start={"merge_method": "multitask"}), "'multitask' gives no single merged model"),
        (of("surgery", start={"merge_method": "cartt"}), "cart"),
        (of("surgery", start={"merge_method": "cart", "adapt": {"steps": 3}}), "start: adapt: 'cart' does not adapt"),
        (of("surgery", start={"merge_method": "adarank", "adapt": {"stepz": 3}}), "stepz"),
        (of("surgery", adapt={"objective": "entropy"}), "objective.*nothing to 'surgery'"),
        (
            of("wemoe", adapt={"learn_heads": True, "lr_masks": 0.1}),
            "learn_heads, lr_masks.*nothing to 'wemoe'",
        ),
        (of("wemoe", adapt={"objectives": {"moot": "entropy"}}), "unknown task 'moot'"),
        (of("wemoe", adapt={"preset": "roberta-7-ta"}), "preset"),
        (of("twin_merging", rank=1.5), "rank"),
        ({**METHODS["wemoe"], "base_model": None}, "base_model"),
        ({**METHODS["wemoe"], "models": [{"model": "models/mood"}]}, "adapts on its inputs"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(text: Path, changes: dict[str, Any], match: str) -> None:
    with pytest.raises(RecipeError, match=match):
        load_recipe(write(text, **changes))


@pytest.mark.parametrize("name", ["surgery", "wemoe", "twin_merging"])
def test_the_papers_preset_keeps_a_modular_methods_own_steps(name: str) -> None:
    plain, paper = (settled(MODULAR[name], {}, {}, preset)[1] for preset in (None, "paper"))
    assert paper.steps == plain.steps == MODULAR[name].defaults["steps"]
    assert (paper.keep, paper.schedule) == ("last", "constant")


@pytest.mark.parametrize("method", METHODS)
def test_the_command_line_shows_it(method: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = str(write(text, **METHODS[method])), tmp_path / "out"
    for command in (["plan", path], ["merge", path, str(out)], ["inspect", str(out)], ["evaluate", path, str(out)]):
        assert main(command) == 0
    shown = capsys.readouterr().out
    assert "must know" in shown
    assert "% of the" in shown
    assert "components" not in shown
    assert main(["methods", method]) == 0
    page = capsys.readouterr().out
    assert "unlabelled inputs" in page
    assert "adapt.steps" in page
    assert "lr_masks" not in page


def test_a_starts_list_over_the_layers_is_that_of_its_method(text: Path, tmp_path: Path) -> None:
    ties = {"merge_method": "ties", "parameters": {"density": [0.2, 0.9]}}
    merge(load_recipe(write(text, **ties)), tmp_path / "ties")
    merge(load_recipe(write(text, **of("surgery", start=ties))), tmp_path / "out")
    merge(load_recipe(write(text, **of("surgery", start={"merge_method": "ties"}))), tmp_path / "plain")
    wanted, body, plain = (load_file(tmp_path / name) for name in ("ties/model.safetensors", "out/shared.safetensors", "plain/shared.safetensors"))  # fmt: skip
    of_body = {name: next(tensor for key, tensor in body.items() if key.endswith(name)) for name in wanted}
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in of_body.items())
    assert any(not torch.equal(tensor, plain[name]) for name, tensor in body.items())
