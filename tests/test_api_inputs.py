"""What the Python interface takes: batches, settings, recipes and networks in the forms that users have them in."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

import adarank
from adarank.errors import DataError, RecipeError
from text_zoo import make_zoo, recipe


def test_batches_may_be_loaders_or_generators_of_any_float(problem: Any) -> None:
    base, experts, batches = problem

    def stream(own: list[Tensor]) -> Iterator[Tensor]:
        yield from own

    settings = {"steps": 3}
    plain = adarank.adapt(base, experts, batches, settings=settings)
    loaders = {task: torch.utils.data.DataLoader(torch.cat(own), batch_size=8) for task, own in batches.items()}
    for other in ({t: stream(own) for t, own in batches.items()}, loaders):
        found = adarank.adapt(base, experts, other, settings=settings)
        assert all(torch.equal(found.state[name], own) for name, own in plain.state.items())
    wide = adarank.adapt(base, experts, {t: [x.double() for x in own] for t, own in batches.items()}, settings=settings)
    assert all(torch.equal(wide.state[name], own) for name, own in plain.state.items())
    with torch.no_grad():
        again = adarank.adapt(base, experts, batches, settings=settings)
    assert all(torch.equal(again.state[name], own) for name, own in plain.state.items())
    assert all(own.grad is None for module in plain.modules.values() for own in module.parameters())


@pytest.mark.parametrize(("what", "text"), [("batches", "'c' is no expert"), ("held_out", "'c' is no expert")])
def test_batches_of_nobody_are_refused(problem: Any, what: str, text: str) -> None:
    base, experts, batches = problem
    given = {"batches": batches, "held_out": batches, what: {**batches, "c": batches["a"]}}
    with pytest.raises(DataError, match=f"{what}: {text}"):
        adarank.adapt(base, experts, **given)


class Wrapped(nn.Linear):
    """Gives what many networks give: logits among other things."""

    kind = "tuple"

    def forward(self, x: Tensor) -> Any:
        out = super().forward(x)
        return {"tuple": (out, x), "dict": {"logits": out}, "pair": {"other": out}}[self.kind]


@pytest.mark.parametrize("kind", ["tuple", "dict", "pair"])
def test_logits_are_taken_from_what_a_network_gives(kind: str) -> None:
    torch.manual_seed(0)
    base, own = Wrapped(4, 3), Wrapped(4, 3)
    base.kind = own.kind = kind
    call = lambda: adarank.adapt(base, {"a": own}, {"a": [torch.randn(5, 4)]}, settings={"steps": 1})  # noqa: E731
    if kind == "pair":
        with pytest.raises(DataError, match="a dict where logits"):
            call()
    else:
        assert call().history.step == 1


def test_what_is_kept_is_not_the_callers_own(problem: Any) -> None:
    base, experts, _ = problem
    merged = adarank.merge(base, experts, "average", select=adarank.Select(keep="bias"))
    merged["bias"].add_(1)
    assert not torch.equal(merged["bias"], base.bias)
    with pytest.raises(RecipeError, match="nothing is left to merge"):
        adarank.adapt(base, experts, {t: [torch.randn(2, 6)] for t in experts}, select=adarank.Select(keep="*"))


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_zoo(tmp_path_factory.mktemp("zoo"))


def test_a_recipe_may_be_given_by_its_file(zoo: Path, tmp_path: Path) -> None:
    adarank.merge_recipe(str(recipe(zoo)), str(tmp_path / "out"))
    table = adarank.evaluate_recipe(str(recipe(zoo)), [str(tmp_path / "out")])
    assert str(tmp_path / "out") in table.rows
    shutil.rmtree(tmp_path / "out")


def test_a_recipe_may_be_a_mapping(zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every kind of method, from Python alone: paths count from the working folder."""
    monkeypatch.chdir(zoo)
    written = yaml.safe_load(recipe(zoo).read_text())
    once, again = tmp_path / "once", tmp_path / "again"
    adarank.merge_recipe(written, once)
    adarank.merge_recipe(adarank.load_recipe(written), again)
    assert (once / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()
    assert str(once) in adarank.evaluate_recipe(written, [once]).rows
    few = {"steps": 2, "batch_size": 2}
    for method, own in (("regmean", {}), ("multitask", {"parameters": few}), ("surgery", {"adapt": few})):
        record = adarank.merge_recipe({**written, "merge_method": method, **own}, tmp_path / method)
        assert record["recipe"]["merge_method"] == method
    with pytest.raises(adarank.AdaRankError, match="merge_method"):
        adarank.load_recipe({**written, "merge_metod": "cart"})


def test_a_loose_tensor_is_no_batches_and_settings_a_mapping() -> None:
    base, own = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
    x = torch.randn(8, 4)
    with pytest.raises(DataError, match="of 'a' there is one Tensor"):
        adarank.adapt(base, {"a": own}, {"a": x})
    with pytest.raises(RecipeError, match=r"stps: unknown key\. Did you mean 'steps'"):
        adarank.adapt(base, {"a": own}, {"a": [x]}, settings={"stps": 1})
    assert adarank.adapt(base, {"a": own}, {"a": [x]}, settings={"steps": 1}).history.step == 1
