"""Adaptation by several processes equals one's to rounding, of whatever is learned; each holds the factors of its share of the tensors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import adarank
from adarank.adapt.factor_files import FactorFiles, has_room
from adarank.adapt.live_weights import Learn, LiveWeights
from adarank.io import processes
from adarank.io.checkpoint import Checkpoint
from adarank.method import Outline
from adarank.recipe.registry import METHODS
from adarank.settings import parse
from adarank.spectral.blocks import build_blocks
from adarank.spectral.mask_file import FILE as MASKS
from adarank.spectral.mask_file import MaskFile
from adarank.spectral.overlap import described
from make import family, generator, network
from process_zoo import Ended, Processes
from text_zoo import make_zoo, recipe

SHARDS = 6000  # bytes: several files
START: dict[str, Any] = {"rank": 0.25, "lambda": 1.0}
RECIPES: dict[str, dict[str, Any]] = {
    "soft": {"merge_method": "adarank", "parameters": START},
    "binary": {"merge_method": "adarank", "parameters": {**START, "mask": "binary"}},
    "halves": {
        "merge_method": "adarank",
        "parameters": {"precision": "bfloat16"},
    },  # and from a start that is searched for
    "iso_cts": {"merge_method": "adarank", "parameters": {"basis": "iso_cts", "lambda": 1.0}},
    "scaled": {"merge_method": "adamerging++"},
    "uphill": {"merge_method": "samerging"},
    "blocks": {"merge_method": "adarank", "adapt": {"by": "block", "keep": "best", "learn_heads": True}},
    "blocks_to_predictions": {"merge_method": "adamerging++", "adapt": {"by": "block"}},
}
STEPS: dict[str, Any] = {"steps": 3, "batch_size": 4, "check_every": 3, "keep": "last", "learn_heads": False}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models and recipes, and what one process makes of them in `one/`. The first one's objective remembers a mean of each task."""
    folder = make_zoo(tmp_path_factory.mktemp("zoo"))
    mean = {"steps": 6, "check_every": 3, "objective": {"self-label": 1, "infomax": 0.1}, "learn_heads": True}
    for name, changes in RECIPES.items():
        steps = {**STEPS, **(mean if name == "soft" else {}), **changes.get("adapt", {})}
        path = recipe(folder, f"{name}.yaml", **{**changes, "adapt": steps}, max_shard_size=SHARDS)
        adarank.merge_recipe(path, folder / "one" / name)
    return folder


@pytest.fixture(scope="module")
def several() -> Iterator[Processes]:
    with Processes() as started:
        yield started


def check_alike(alone: Path, shared: Path) -> None:
    """Both outputs are the same to float32 rounding, and their records tell the same."""
    ones, others = (json.loads((folder / "adarank.json").read_text())["adaptation"] for folder in (alone, shared))
    for task, losses in ones["losses"].items():
        assert others["losses"][task] == pytest.approx(losses, rel=1e-4, abs=1e-5)
    assert others["step_kept"] == ones["step_kept"]
    for start, other in zip(ones["starts"], others["starts"], strict=True):
        assert other == pytest.approx(start, abs=1e-6)
    for block, other in zip(ones.get("blocks", ()), others.get("blocks", ()), strict=True):
        assert (other["block"], other["goal"], other["kept"]) == (block["block"], block["goal"], block["kept"])
        assert other["after"] == pytest.approx(block["after"], rel=1e-3, abs=1e-6)
    tables = [each.get("spectra", {"matrices": {}, "cosines_kept": []}) for each in (ones, others)]
    torch.testing.assert_close(*(torch.tensor(each["cosines_kept"]) for each in tables), rtol=0, atol=2e-4)
    assert tables[0]["matrices"].keys() == tables[1]["matrices"].keys()
    for name, matrix in tables[0]["matrices"].items():
        for key, numbers in matrix.items():
            assert tables[1]["matrices"][name][key] == pytest.approx(numbers, abs=2e-4), key
    masks = [MaskFile.load(folder / MASKS) for folder in (alone, shared)]
    for name, lam in masks[0].lam.items():
        torch.testing.assert_close(masks[1].lam[name], lam, rtol=1e-4, atol=1e-5)
    heads = [
        {file.parent.name: load_file(file) for file in (out / "heads").glob("*/*.safetensors")}
        for out in (alone, shared)
    ]
    assert heads[0].keys() == heads[1].keys() != set()
    for task, head in heads[0].items():
        torch.testing.assert_close(heads[1][task], head, rtol=1e-3, atol=1e-4)
    bodies = [Checkpoint(folder) for folder in (alone, shared)]
    for name in bodies[0].tensors:
        torch.testing.assert_close(bodies[1].read(name), bodies[0].read(name), rtol=1e-4, atol=1e-5)


BLOCKS = ("blocks", "blocks_to_predictions")


@pytest.mark.parametrize(
    ("count", "names"),
    [(2, tuple(name for name in RECIPES if name not in BLOCKS)), (2, BLOCKS), (3, ("soft", "scaled", "blocks"))],
)
def test_processes_adapt_as_one_does_to_rounding(
    zoo: Path, several: Processes, count: int, names: tuple[str, ...]
) -> None:
    outs = {name: zoo / f"by-{count}" / name for name in names}  # with 3, one has no task
    ended = several.run(count, [], zoo, many=[(f"{name}.yaml", str(out)) for name, out in outs.items()])
    assert [process.code for process in ended] == [0] * count, ended
    for name, out in outs.items():
        check_alike(zoo / "one" / name, out)


def test_an_adaptation_killed_while_it_writes_goes_on(zoo: Path, several: Processes, tmp_path: Path) -> None:
    out, command = tmp_path / "out", ["merge", str(zoo / "soft.yaml"), str(tmp_path / "out")]
    assert {process.code for process in several.run(2, command, tmp_path, dies=(1, 2))} == {1, -9}
    assert (tmp_path / ".out.state" / "state.pt").exists()
    assert [process.code for process in several.run(2, command, tmp_path)] == [0, 0]
    check_alike(zoo / "one" / "soft", out)
    assert json.loads((out / "adarank.json").read_text())["adaptation"]["resumed_from"] == [6]


@pytest.mark.parametrize(("victim", "then"), [(0, 2), (1, 1), (1, 3)])
def test_an_adaptation_killed_between_steps_goes_on(
    zoo: Path, several: Processes, tmp_path: Path, victim: int, then: int
) -> None:
    """By as many processes or by others: what is saved is not of a number of them."""
    out, command = tmp_path / "out", ["merge", str(zoo / "soft.yaml"), str(tmp_path / "out")]
    ended = several.run(
        2, command, tmp_path, steps=(victim, 6, "dies")
    )  # at the start, then after each step: the fifth
    assert ended[victim].code == -9
    assert ended[1 - victim].code == 1
    assert f"process {victim} of 2" in ended[1 - victim].said
    assert "ended without a word" in ended[1 - victim].said
    assert not out.exists()
    assert [process.code for process in several.run(then, command, tmp_path)] == [0] * then
    check_alike(zoo / "one" / "soft", out)
    assert json.loads((out / "adarank.json").read_text())["adaptation"]["resumed_from"] == [3]


@pytest.mark.parametrize(("victim", "then"), [(0, 3), (1, 1)])
def test_an_adaptation_killed_in_a_block_goes_on_with_it(
    zoo: Path, several: Processes, tmp_path: Path, victim: int, then: int
) -> None:
    """Other processes take over the streams and factors that were made."""
    name, out = "blocks_to_predictions", tmp_path / "out"
    command = ["merge", str(zoo / f"{name}.yaml"), str(out)]
    # four tensors outside of the blocks, both blocks at the start, five times the first, then twice the second
    ended = several.run(2, command, tmp_path, steps=(victim, 4 + 2 + 5 + 2, "dies"))
    assert (ended[victim].code, ended[1 - victim].code) == (-9, 1)
    assert f"process {victim} of 2" in ended[1 - victim].said
    assert not out.exists()
    assert [process.code for process in several.run(then, command, tmp_path)] == [0] * then
    check_alike(zoo / "one" / name, out)
    assert json.loads((out / "adarank.json").read_text())["adaptation"]["resumed_from"] == [3]


def test_an_adaptation_told_to_stop_keeps_its_last_step(zoo: Path, several: Processes, tmp_path: Path) -> None:
    """As launchers tell processes, one of them first."""
    out, command = tmp_path / "out", ["merge", str(zoo / "soft.yaml"), str(tmp_path / "out")]
    ended = several.run(2, command, tmp_path, steps=(1, 6, "is told to stop"))
    assert ended[0].code == ended[1].code != 0
    assert "Stopped at step 5 of 6" in ended[0].said
    assert not out.exists()
    assert [process.code for process in several.run(2, command, tmp_path)] == [0, 0]
    check_alike(zoo / "one" / "soft", out)
    assert json.loads((out / "adarank.json").read_text())["adaptation"]["resumed_from"] == [5]


def test_an_error_in_a_step_is_said_once(zoo: Path, several: Processes, tmp_path: Path) -> None:
    ended = several.run(2, ["merge", str(zoo / "soft.yaml"), "out"], tmp_path, steps=(1, 3, "fails"))
    assert [process.code for process in ended] == [1, 1]
    assert "process 1 of 2" in ended[0].said
    assert "stopped: a disk that cannot be read" in ended[0].said
    assert ended[1].said == ""
    assert not (tmp_path / "out").exists()


TASKS = 3


def shares(whole: bool = False) -> dict[str, Any]:
    """What this process holds of a network of several matrices, and what comes of it: called in every process."""
    base, experts = family(TASKS)
    net = network(base, experts)
    blocks = build_blocks(net, "average", whole=whole)
    parameters = {name: torch.nn.Parameter(torch.zeros(net.tensors[name].shape)) for name in net.merged()}
    live = LiveWeights(parameters, blocks, Learn(mask="soft"), scale=0.4, rank=0.5)
    live.write()
    weights = {name: parameter.tolist() for name, parameter in parameters.items()}
    for number, parameter in enumerate(parameters.values()):
        if number != 1:  # one tensor takes no part in any output
            noise = torch.randn(TASKS, *parameter.shape, generator=generator(number))
            mine = processes.share(list(range(TASKS)))  # as a process has its tasks' gradients, or none
            parameter.grad = sum(noise[task] for task in mine) if mine else None
    live.pull_back()
    masks = live.mask_file(net.tasks, "average", {})
    held = {
        name: sum(part.numel() for part in (block.origin, block.u, block.v, *block.wholes) if part is not None)
        for name, block in blocks.items()
        if block.here
    }
    plan = parse(METHODS.named("adarank", ""), {"origin": "average", "rank": 1.0}, "adarank")
    layout = {name: (info.shape, info.dtype) for name, info in net.tensors.items()}
    return {
        "held": held, "weights": weights, "lam": live.lam.grad.tolist(), "logits": live.logits.grad.tolist(),
        "gradients": sum(parameter.grad is not None for parameter in parameters.values()),
        "spectra": described(blocks, masks.masks, masks.lam, masks.tasks), "planned": plan.held_bytes(Outline(net, layout)),
    }  # fmt: skip


def of_each(ended: list[Ended]) -> list[dict[str, Any]]:
    assert [process.code for process in ended] == [0] * len(ended), ended
    return [json.loads(process.said) for process in ended]


@pytest.mark.parametrize("count", [2, 3])
def test_each_holds_a_share_of_factors_and_has_all_weights(several: Processes, tmp_path: Path, count: int) -> None:
    alone = shares()
    together = of_each(several.run(count, [], tmp_path, calls=(__file__, "shares")))
    for name, numbers in alone["held"].items():
        assert [each["held"][name] for each in together if name in each["held"]] == [numbers]  # in one process
    totals = [sum(each["held"].values()) for each in together]
    assert max(totals) - min(totals) <= max(alone["held"].values())
    assert sum(each["gradients"] for each in together) == alone["gradients"]
    for each in together:
        assert each["planned"] < alone["planned"]
        assert each["weights"] == alone["weights"]
        for key in ("lam", "logits"):
            torch.testing.assert_close(torch.tensor(each[key]), torch.tensor(alone[key]), rtol=1e-5, atol=1e-6)
        assert each["lam"] == together[0]["lam"]
        assert each["logits"] == together[0]["logits"]
        assert each["spectra"]["matrices"] == alone["spectra"]["matrices"]
        torch.testing.assert_close(torch.tensor(each["spectra"]["cosines"]), torch.tensor(alone["spectra"]["cosines"]))


def mapped() -> dict[str, Any]:
    """Two matrices that are large enough for files, in this folder: what is read from them, and what was made."""
    generators = [generator(number) for number in range(3)]
    states = [{name: torch.randn(132, 128, generator=each) for name in ("a.weight", "b.weight")} for each in generators]
    net = network(states[0], {"one": states[1], "two": states[2]})
    lam, mask = torch.tensor([0.3, 0.7]), torch.linspace(0, 1, 256)
    sums = {}
    for kept in (None, FactorFiles(Path("factors"), False)):
        blocks = build_blocks(net, "average", kept=kept)
        sums[str(kept is None)] = {n: float(b.compose(lam, mask).sum()) for n, b in blocks.items() if b.here}
    return {**sums, "files": len(list(Path("factors").iterdir()))}


def test_processes_map_their_factors_from_files(several: Processes, tmp_path: Path) -> None:
    for _ in range(2):  # made, then found
        first, second = of_each(several.run(2, [], tmp_path, calls=(__file__, "mapped")))
        assert first["True"] == first["False"]
        assert second["True"] == second["False"]
        assert sorted([*first["True"], *second["True"]]) == ["a.weight", "b.weight"]
    assert first["files"] == second["files"] == 2


@pytest.mark.parametrize(
    ("device", "room", "whole"), [("cpu", 10**9, False), ("cuda", 10**9, True), ("cuda", 10, False)]
)
def test_gpus_with_room_hold_all_factors(monkeypatch: pytest.MonkeyPatch, device: str, room: int, whole: bool) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda of: SimpleNamespace(total_memory=room))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    given = parse(METHODS.named("adarank", ""), {}, "adarank"), network(*family(TASKS)), device
    assert has_room(*given) == whole
    monkeypatch.setattr(processes, "gathered", lambda value: [value] * 10**7)  # so many on one GPU
    assert not has_room(*given)


def everywhere() -> dict[str, Any]:
    """The same as `shares` where every process holds all factors."""
    return shares(whole=True)


def test_processes_that_hold_all_factors_add_up_alike(several: Processes, tmp_path: Path) -> None:
    alone = shares()
    for each in of_each(several.run(2, [], tmp_path, calls=(__file__, "everywhere"))):
        assert each["held"] == alone["held"]
        assert each["weights"] == alone["weights"]
        for key in ("lam", "logits"):
            torch.testing.assert_close(torch.tensor(each[key]), torch.tensor(alone[key]), rtol=1e-5, atol=1e-6)
        assert each["spectra"] == alone["spectra"]


def test_items_are_shared_by_their_size(several: Processes, tmp_path: Path) -> None:
    assert processes.balanced([3, 1, 2]) == [0, 0, 0]
    for ranks in of_each(several.run(2, [], tmp_path, calls=(__file__, "balanced"))):
        assert ranks == [0, 1, 1, 1, 0, 1]


def balanced() -> list[int]:
    """Six sizes of which the first is as large as the next three."""
    return processes.balanced([9, 4, 3, 2, 1, 0])
