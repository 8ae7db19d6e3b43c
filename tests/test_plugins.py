"""Methods, bases and objectives of other packages; and names that nobody has.

`plugin/` is such a package. It is "installed" as pip would: its modules and its metadata in a folder of `sys.path`.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import adarank
import text_zoo
from adarank.adapt.methods import AdaRank
from adarank.adapt.objectives import SelfLabel, View, objective
from adarank.cli.main import main
from adarank.errors import AdaRankError, RecipeError
from adarank.io.checkpoint import Checkpoint
from adarank.io.plugins import Registry
from adarank.method import Context, MergeMethod, Result
from adarank.methods.linear.average import WeightAverage
from adarank.methods.task_aware.emr import EMR
from adarank.recipe import catalogue
from adarank.recipe.registry import METHODS
from adarank.spectral.bases import BASES
from adarank.spectral.mask_file import MaskFile
from make import close
from text_zoo import TASKS, recipe

PLUGIN = Path(__file__).parent / "plugin"


def install(folder: Path, name: str, points: Mapping[str, Mapping[str, str]]) -> Path:
    """The metadata of an installed package with entry points: group -> name -> value."""
    metadata = folder / f"{name.replace('-', '_')}-0.1.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1\n")
    lines = [
        f"[{group}]\n" + "".join(f"{key} = {value}\n" for key, value in named.items())
        for group, named in points.items()
    ]
    (metadata / "entry_points.txt").write_text("\n".join(lines))
    return folder


@pytest.fixture
def toys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The package of `plugin/`, installed for one test."""
    tomllib = pytest.importorskip("tomllib")  # of Python 3.11
    project = tomllib.loads((PLUGIN / "pyproject.toml").read_text())["project"]
    folder = install(tmp_path / "site", project["name"], project["entry-points"])
    for file in (PLUGIN / "src").glob("*.py"):
        shutil.copyfile(file, folder / file.name)
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    sys.modules.pop("adarank_toys", None)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_zoo.make_zoo(tmp_path_factory.mktemp("zoo"))


def body(folder: Path) -> dict[str, Tensor]:
    """A model's tensors, heads not among them, under their names in the base."""
    model = Checkpoint(folder)
    return {n.removeprefix("bert."): model.read(n).double() for n in model.tensors if not n.startswith("classifier")}


# A method


def test_another_packages_method_merges_by_a_recipe(toys: Path, zoo: Path, tmp_path: Path) -> None:
    file = recipe(zoo, merge_method="part_way", parameters={"share": 0.25}, select={"scale": ["embeddings.*"]})
    assert main(["merge", str(file), str(tmp_path / "out")]) == 0
    base, experts = body(zoo / "models" / "base"), [body(zoo / "models" / task) for task in TASKS]
    wanted = {name: 0.75 * base[name] + 0.25 * sum(expert[name] for expert in experts) / len(experts) for name in base}
    close(body(tmp_path / "out"), wanted)
    assert json.loads((tmp_path / "out" / "adarank.json").read_text())["settings"]["parameters"] == {"share": 0.25}


def test_another_packages_method_is_planned_listed_and_searched(
    toys: Path, zoo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, best = str(recipe(zoo, "toy.yaml", merge_method="part_way")), zoo / "toy.best.yaml"
    assert main(["plan", file, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["merge_method"] == "part_way"
    assert main(["methods", "part_way"]) == 0
    assert "W = W₀ + a mean_t τ_t" in capsys.readouterr().out
    assert list(catalogue.catalogue())[-1] == "part_way"
    assert main(["search", file, str(best), "--over", "share=0.2,0.9", "--json"]) == 0
    assert {point["settings"]["share"] for point in json.loads(capsys.readouterr().out)["points"]} == {0.2, 0.9}
    assert "did you mean 'part_way'" in refusal(lambda: adarank.load_recipe(recipe(zoo, merge_method="part_wy")))


def test_another_packages_method_is_a_start_of_surgery(toys: Path, zoo: Path, tmp_path: Path) -> None:
    start = {"merge_method": "part_way", "parameters": {"share": 1.0}}
    adapt = {"steps": 1, "batch_size": 4, "check_inputs": 8}
    file = recipe(zoo, merge_method="surgery", parameters={"start": start, "rank": 2}, adapt=adapt)
    record = adarank.merge_recipe(file, tmp_path / "out")
    assert record["adaptation"]["start"]["settings"]["parameters"] == {"share": 1.0}
    adarank.merge_recipe(recipe(zoo, merge_method="part_way", parameters={"share": 1.0}), tmp_path / "start")
    bundle, merged = adarank.load_bundle(tmp_path / "out"), Checkpoint(tmp_path / "start")
    assert all(torch.equal(tensor, merged.read(name)) for name, tensor in bundle.tensors("mood"))


# A basis and objectives


def test_another_packages_basis_and_objectives_adapt(toys: Path, zoo: Path, tmp_path: Path) -> None:
    adapt = {
        "steps": 2,
        "batch_size": 4,
        "check_inputs": 8,
        "keep": "last",
        "objective": {"confidence": 1, "nearness": 0.5},
    }
    parameters = {"basis": "halves", "rank": 1.0, "lambda": 2.0}
    record = adarank.merge_recipe(
        recipe(zoo, merge_method="adarank", parameters=parameters, adapt=adapt), tmp_path / "out"
    )
    assert len(record["adaptation"]["losses"]["mood"]) == 2
    assert MaskFile.load(tmp_path / "out" / "masks.safetensors").basis == "halves"
    masks = str(tmp_path / "out" / "masks.safetensors")
    adarank.merge_recipe(recipe(zoo, merge_method="masked", parameters={"masks": masks}), tmp_path / "again")
    close(body(tmp_path / "again"), body(tmp_path / "out"))


def test_another_packages_objectives_are_what_they_say(toys: Path) -> None:
    logits, expert = torch.randn(5, 3), torch.randn(5, 3)
    loss = objective(View(logits, expert), {"confidence": 2.0, "nearness": 0.5}, SelfLabel())
    by_hand = -2 * logits.softmax(-1).max(-1).values.mean() + 0.5 * ((logits - expert) ** 2).mean()
    torch.testing.assert_close(loss, by_hand)


def test_the_basis_of_another_package_halves_every_matrix(toys: Path) -> None:
    delta = torch.randn(4, 6)
    (spectrum,) = BASES["halves"].spectra({"a": delta}, "w")
    torch.testing.assert_close((spectrum.u * spectrum.s) @ spectrum.v.T, delta / 2)


# Packages that are broken


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("lost", "no_such_module:Thing", "cannot be imported"),
        ("lost", "adarank.methods:NoSuchThing", "cannot be imported"),
        ("part", "adarank.errors:itemise", "is no class that derives from"),
        ("part", "adarank.methods.base:Method", "does not say its name"),
        ("part", "adarank.methods:CART", "calls itself 'cart'"),
        ("cart", "adarank.methods:CART", "several are installed"),
    ],
)
def test_a_broken_package_is_refused_by_its_name(
    name: str, value: str, why: str, zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = install(tmp_path / "site", "some-package", {"adarank.methods": {name: value}})
    monkeypatch.syspath_prepend(str(folder))
    message = refusal(lambda: adarank.load_recipe(recipe(zoo, merge_method=name)))
    assert why in message
    assert "package 'some-package'" in message
    assert adarank.load_recipe(recipe(zoo, merge_method="average")).method().name == "average"


def test_two_packages_with_one_name_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("first-package", "second-package"):
        install(tmp_path / "site", package, {"adarank.bases": {"mine": f"{package}:BASIS"}})
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    with pytest.raises(RecipeError, match=r"'first-package', package 'second-package'"):
        _ = BASES["mine"]


def test_a_package_is_not_imported_before_its_name_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path / "site", "some-package", {"adarank.methods": {"mine": "module_of_some_package:Mine"}})
    (tmp_path / "site" / "module_of_some_package.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert "mine" in METHODS
    assert METHODS["cart"].name == "cart"
    assert "module_of_some_package" not in sys.modules
    with pytest.raises(RecipeError, match="RuntimeError: imported"):
        _ = METHODS["mine"]


def test_a_registry_has_its_own_things_first() -> None:
    registry: Registry[int] = Registry("adarank.no_such_group", "number", {"two": 2, "one": 1}, lambda name, given: "")
    assert dict(registry) == {"two": 2, "one": 1}
    assert list(registry) == ["two", "one"]
    with pytest.raises(RecipeError, match=r"here: unknown number 'on'\. Did you mean 'one'"):
        registry.named("on", "here: unknown number")


# Classes from Python


class Half(WeightAverage):
    """Half of the average. Needs no data."""

    name: ClassVar[str] = "half"

    def merge_matrix(self, name: str, origin: Tensor, deltas: Mapping[str, Tensor]) -> Tensor:
        return origin / 2


class OwnEMR(EMR):
    """EMR under another name."""

    name: ClassVar[str] = "own_emr"


class Learned(AdaRank):
    """AdaRank under another name."""

    name: ClassVar[str] = "learned"


def test_classes_and_instances_stand_for_methods() -> None:
    base, one, two = ({"w": torch.full((2, 2), value)} for value in (0.0, 1.0, 3.0))
    for method in (Half, Half()):
        assert torch.equal(adarank.merge(base, {"a": one, "b": two}, method)["w"], torch.ones(2, 2))
    each = adarank.merge_each(base, {"a": one, "b": two}, OwnEMR)
    for task, wanted in adarank.merge_each(base, {"a": one, "b": two}, "emr").items():
        close(each[task], wanted)


class FirstOf(MergeMethod):
    """The first expert, by the contract alone."""

    name: ClassVar[str] = "first_of"
    formula: ClassVar[str] = "W = W_1"
    source: ClassVar[str] = "adarank's tests"

    @classmethod
    def needs_base(cls) -> bool:
        return False

    def run(self, context: Context) -> Result:
        first = next(iter(context.network.experts.values()))
        return Result((name, first.read(name)) for name in context.network.tensors)


class Curious(FirstOf):
    """Asks for what only a recipe gives."""

    name: ClassVar[str] = "curious"

    def run(self, context: Context) -> Result:
        return Result(context.models().shared.items())


def test_the_contract_alone_makes_a_method() -> None:
    one, two = ({"w": torch.full((2, 2), value)} for value in (1.0, 3.0))
    assert torch.equal(adarank.merge(None, {"a": one, "b": two}, FirstOf)["w"], one["w"])
    entry = catalogue.entry_of(FirstOf)
    assert (entry.needs, entry.formula) == ("experts; no data", "W = W_1")
    with pytest.raises(RecipeError, match="asks for networks, which only a recipe gives"):
        adarank.merge(None, {"a": one, "b": two}, Curious)


def test_a_class_from_outside_adapts() -> None:
    torch.manual_seed(0)
    base, experts = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), {}
    for task in "ab":
        experts[task] = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    batches = {task: [torch.randn(4, 3)] for task in experts}
    learned, wanted = (
        adarank.adapt(base, experts, batches, method, {"rank": 1.0, "lambda": 0.3}, {"steps": 2})
        for method in (Learned, "adarank")
    )
    assert all(torch.equal(learned.state[name], wanted.state[name]) for name in wanted.state)


def test_what_is_no_method_is_refused() -> None:
    state = {"w": torch.ones(2, 2)}
    for method, why in ((int, "is no class"), (Half(), "was given with its settings")):
        with pytest.raises(RecipeError, match=why):
            adarank.merge(state, {"a": state}, method, {"share": 1})  # type: ignore[arg-type]


# Names that nobody has


def test_the_nearest_of_all_names_is_suggested_everywhere(zoo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = {"w": torch.ones(2, 2)}
    said = [
        refusal(lambda: adarank.merge(state, {"a": state}, "adarnk")),
        refusal(lambda: adarank.merge_each(state, {"a": state}, "adarnk")),
        refusal(lambda: adarank.adapt(nn.Linear(2, 2), {}, {}, "adarnk")),
        refusal(lambda: adarank.load_recipe(recipe(zoo, merge_method="adarnk"))),
        refusal(
            lambda: adarank.load_recipe(
                recipe(zoo, merge_method="surgery", parameters={"start": {"merge_method": "adarnk"}})
            )
        ),
    ]
    for command in (["methods", "adarnk"], ["plan", str(recipe(zoo, "typo.yaml", merge_method="adarnk"))]):
        assert main(command) == 1
        said.append(capsys.readouterr().err.lower())
    assert main(["search", str(zoo / "typo.yaml"), str(zoo / "b.yaml"), "--over", "rank=0.1,0.2"]) == 1
    said.append(capsys.readouterr().err.lower())
    assert all("did you mean 'adarank'" in text for text in said), said


@pytest.mark.parametrize(
    ("changes", "nearest"),
    [
        ({"parameters": {"basis": "tsvm"}}, "tsv_m"),
        ({"adapt": {"objective": "entrpy"}}, "entropy"),
        ({"adapt": {"objectives": {"mood": {"infomx": 1}}}}, "infomax"),
    ],
)
def test_the_nearest_basis_and_objective_are_suggested(changes: dict[str, Any], nearest: str, zoo: Path) -> None:
    said = refusal(lambda: adarank.load_recipe(recipe(zoo, merge_method="adarank", **changes)))
    assert f"did you mean '{nearest}'" in said


def refusal(call: Any) -> str:
    with pytest.raises(AdaRankError) as caught:
        call()
    return str(caught.value) if "package" in str(caught.value) else str(caught.value).lower()
