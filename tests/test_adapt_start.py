"""The start that adaptation finds without labels."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from adarank import merge_recipe
from adarank.adapt import origin_choice
from adarank.adapt.agreement import Signals
from adarank.adapt.history import History
from adarank.adapt.loop import adapt
from adarank.adapt.methods import AdaRank, CARTpp
from adarank.adapt.settings import AdaptSettings
from adarank.adapt.start_search import RANKS, SCALES, Grid, climb, find_start, grid_of
from adarank.cli.main import main
from adarank.errors import RecipeError
from adarank.recipe.reader import load_recipe
from adarank.settings import parse
from adarank.spectral.mask_file import MaskFile
from make import agreeing
from test_adamerging import Killed
from test_adapt_keeps import SETTINGS, Judged
from test_adapt_loop import Problem, assert_same
from text_zoo import ADAPT, TASKS, make_zoo, recipe

USUAL = (0.08, 1.0)


@given(st.randoms(use_true_random=False))
def test_a_climb_ends_where_no_neighbour_is_better(random) -> None:
    grid = grid_of("auto", "auto", USUAL)
    values = {(r, s): random.randint(0, 5) for r in RANKS for s in SCALES}
    tried = climb(grid, lambda rank, scale: values[rank, scale])
    assert len({(own.rank, own.scale) for own in tried}) == len(tried)  # none twice
    assert (tried[0].rank, tried[0].scale) == USUAL
    best = max(tried, key=lambda own: own.value)
    at = RANKS.index(best.rank), SCALES.index(best.scale)
    assert all(values[RANKS[i], SCALES[j]] <= best.value for i, j in grid.neighbours(at))


@given(st.integers(0, len(RANKS) - 1), st.integers(0, len(SCALES) - 1))
def test_one_hill_is_climbed_to_its_top(i: int, j: int) -> None:
    tried = climb(
        grid_of("auto", "auto", USUAL), lambda rank, scale: -abs(RANKS.index(rank) - i) - abs(SCALES.index(scale) - j)
    )
    best = max(tried, key=lambda own: own.value)
    assert (best.rank, best.scale) == (RANKS[i], SCALES[j])


@pytest.mark.parametrize(
    ("rank", "scale", "shape"),
    [(0.3, 0.5, (1, 1)), ("auto", 0.5, (len(RANKS), 1)), (0.3, "auto", (1, len(SCALES)))],
)
def test_what_is_given_is_not_looked_for(rank: float | str, scale: float | str, shape: tuple[int, int]) -> None:
    grid = grid_of(rank, scale, USUAL)
    assert (len(grid.ranks), len(grid.scales)) == shape
    assert grid.open == (max(shape) > 1)
    tried = climb(grid, lambda *_: 0.0)
    assert rank == "auto" or {own.rank for own in tried} == {rank}
    assert scale == "auto" or {own.scale for own in tried} == {scale}


def liking(live, rank: float, scale: float):
    """A judge that agrees most at one start, whatever the networks hold."""
    wanted_lam, share = scale, rank

    def judge(step: int) -> dict[str, Signals]:
        off = abs(float(live.lam.mean()) - wanted_lam) + abs(live.kept_share() - share)
        return {"a": Signals(agreeing(1 / (1 + off), 10_000), off, 0.0, 0.1, 0.5, 0.5)}

    return judge


def test_the_live_weights_are_left_at_the_best_start() -> None:
    problem, other = Problem(), Problem()
    grid = Grid((0.25, 0.5, 1.0), (0.2, 0.4, 0.8), (1, 1))
    tried = find_start(problem.live, grid, liking(problem.live, 1.0, 0.2))
    problem.live.write()
    best = max(tried, key=lambda own: own.value)
    assert (best.rank, best.scale) == (1.0, 0.2)
    other.live.reset(0.2, 1.0)
    other.live.write()
    assert torch.equal(problem.live.lam, other.live.lam)
    assert torch.equal(problem.live.logits, other.live.logits)
    for own, wanted in zip(problem.net.parameters(), other.net.parameters(), strict=True):
        assert torch.equal(own, wanted)


def test_a_quick_check_chooses_the_start_and_the_judge_judges_it() -> None:
    """Two that like different starts: that of the quick check is taken, and step 0 is what the judge says of it."""
    own = Problem()
    grid = Grid((0.25, 0.5, 1.0), (0.2, 0.4, 0.8), (1, 1))
    judge, quick_check = liking(own.live, 0.25, 0.8), liking(own.live, 1.0, 0.2)
    settings = SETTINGS.model_copy(update={"steps": 0})
    history = adapt(own.live, own.losses, settings, judge=judge, grid=grid, quick_check=quick_check)
    best = max(history.starts, key=lambda each: each.value)
    assert (best.rank, best.scale) == (1.0, 0.2)
    assert history.judged == {0: judge(0)}
    assert judge(0)["a"].agreement < best.value


def test_a_stopped_run_keeps_the_start_that_it_found(tmp_path: Path) -> None:
    grid = Grid((0.25, 0.5, 1.0), (0.1, 0.4), (0, 0))

    def go(settings: AdaptSettings, state: Path | None = None) -> tuple[Judged, History]:
        torch.manual_seed(0)
        own = Judged()
        return own, adapt(own.live, own.losses, settings, state, judge=own.judge, memory=own.memory, grid=grid)

    whole, history = go(SETTINGS)
    assert len(history.starts) > 1
    go(SETTINGS.model_copy(update={"steps": 6}), tmp_path / "state.pt")
    again, taken_up = go(SETTINGS, tmp_path / "state.pt")
    assert taken_up.starts == history.starts
    assert taken_up.judged == history.judged
    assert_same(whole, again)


def test_a_start_may_be_a_share_or_auto_and_nothing_else() -> None:
    for bad in (0, 1.5, "none", True, None):
        with pytest.raises(RecipeError, match=r"rank: .*(share|number).*auto"):
            parse(AdaRank, {"rank": bad}, "parameters")
    with pytest.raises(RecipeError, match=r"lambda: .*number or auto"):
        parse(AdaRank, {"lambda": "most"}, "parameters")
    assert parse(AdaRank, {}, "parameters").rank == "auto"


def _experts_apart(folder: Path, factor: float) -> None:
    """Experts whose bodies differ from the base by so many times as much."""
    make_zoo(folder)
    base = load_file(folder / "models" / "base" / "model.safetensors")
    for task in TASKS:
        file = folder / "models" / task / "model.safetensors"
        tensors = {name: (name.removeprefix("bert."), tensor) for name, tensor in load_file(file).items()}
        moved = {n: base[of] + factor * (t - base[of]) if of in base else t for n, (of, t) in tensors.items()}
        save_file(moved, file, metadata={"format": "pt"})


@pytest.mark.parametrize(("apart", "about"), [(1.0, "average"), (10.0, "pretrained")])
@pytest.mark.parametrize("by", ["model", "block"])
def test_task_vectors_are_counted_from_what_is_nearer(
    tmp_path: Path, capsys: Any, apart: float, about: str, by: str
) -> None:
    """The agreement is that of starts that are the base and the average; the merge is that of the origin named outright."""
    _experts_apart(tmp_path, apart)
    adapt = {"steps": 2, "learn_heads": False, "by": by}
    agreement = {}
    for origin in ("average", "pretrained"):
        itself = {"origin": origin, "rank": 1.0, "lambda": 0.0}
        path = recipe(tmp_path, f"at-{origin}.yaml", merge_method="adarank", parameters=itself, adapt=adapt)
        judged = merge_recipe(load_recipe(path), tmp_path / f"at-{origin}")["adaptation"]["judged"]["0"]
        agreement[origin] = sum(signals["agreement"] for signals in judged.values()) / len(judged)
    assert about == max(agreement, key=lambda origin: agreement[origin])
    out, named = tmp_path / "out", tmp_path / "named"
    assert main(["merge", str(recipe(tmp_path, merge_method="adarank", parameters={}, adapt=adapt)), str(out)]) == 0
    assert f"about the {'base' if about == 'pretrained' else 'average'}:" in capsys.readouterr().out
    report = json.loads((out / "adarank.json").read_text())["adaptation"]
    assert report["origins"] == pytest.approx(agreement, abs=1e-4)
    path = recipe(tmp_path, "named.yaml", merge_method="adarank", parameters={"origin": about}, adapt=adapt)
    assert "origins" not in merge_recipe(load_recipe(path), named)["adaptation"]
    assert (out / "model.safetensors").read_bytes() == (named / "model.safetensors").read_bytes()
    assert MaskFile.load(out / "masks.safetensors").origin == about


@pytest.mark.parametrize(("by", "steps"), [("model", 8), ("block", 4)])
def test_a_run_that_goes_on_keeps_its_origin(tmp_path: Path, monkeypatch: Any, by: str, steps: int) -> None:
    """Killed behind a saved state; without what was chosen it is refused."""
    make_zoo(tmp_path)
    adapt = {"steps": steps, "check_every": 2, "by": by, "keep": "last"}
    path = recipe(tmp_path, merge_method="adarank", parameters={}, adapt=adapt)
    chosen = []

    def other(*args: Any, **more: Any) -> dict[str, float]:
        chosen.append(1)
        return {"average": 0.1, "pretrained": 0.9}

    monkeypatch.setattr(origin_choice, "compare_origins", other)

    def killing(history: History, of: int) -> None:
        if history.step == 5:
            raise Killed

    with pytest.raises(Killed):
        merge_recipe(load_recipe(path), tmp_path / "out", progress=killing)
    state = tmp_path / ".out.state"
    assert (state / "state.pt").exists()
    (file,) = [*state.rglob("origin*.pt")]
    monkeypatch.undo()
    whole = file.read_bytes()
    file.write_bytes(b"")
    with pytest.raises(RecipeError, match=r"it says which origin .* is about\. Delete .* to start anew"):
        merge_recipe(load_recipe(path), tmp_path / "out")
    file.write_bytes(whole)
    report = merge_recipe(load_recipe(path), tmp_path / "out")["adaptation"]
    assert report["resumed_from"] == [4]
    assert report["origins"] == {"average": 0.1, "pretrained": 0.9}
    assert len(chosen) == 1
    path = recipe(tmp_path, "named.yaml", merge_method="adarank", parameters={"origin": "pretrained"}, adapt=adapt)
    merge_recipe(load_recipe(path), tmp_path / "named")
    one, same = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "named"))
    assert all(torch.equal(tensor, same[name]) for name, tensor in one.items())
    assert MaskFile.load(tmp_path / "out" / "masks.safetensors").origin == "pretrained"


def test_numbers_without_an_origin_are_about_the_average() -> None:
    assert AdaRank().origin == "auto"
    assert {parse(AdaRank, given, "parameters").origin for given in ({"rank": 0.1}, {"lambda": 1.0})} == {"average"}
    assert parse(AdaRank, {"rank": "auto", "lambda": "auto"}, "parameters").origin == "auto"
    assert parse(AdaRank, {"basis": "tsv_m", "origin": "auto"}, "parameters").origin == "pretrained"
    for method, numbers in ((AdaRank, {"rank": 0.1}), (AdaRank, {"lambda": 1.0}), (CARTpp, {})):
        with pytest.raises(RecipeError, match="origin: a rank and λ are of one origin"):
            parse(method, {**numbers, "origin": "auto"}, "parameters")


def test_a_start_that_is_adapted_and_stopped_keeps_its_state(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    zoo = make_zoo(tmp_path)
    start = {"merge_method": "adarank", "parameters": ADAPT["parameters"], "adapt": ADAPT["adapt"]}
    path = recipe(zoo, merge_method="surgery", parameters={"start": start}, adapt={"steps": 4})
    from adarank.adapt.live_weights import LiveWeights

    real, taken = LiveWeights.pull_back, []

    def stopping(self: LiveWeights) -> None:
        taken.append(1)
        if len(taken) == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        real(self)

    monkeypatch.setattr(LiveWeights, "pull_back", stopping)
    assert main(["merge", str(path), str(tmp_path / "out")]) != 0
    assert (tmp_path / ".out.state" / "start" / "state.pt").exists()
    assert main(["merge", str(path), str(tmp_path / "out")]) == 0
    steps = ADAPT["adapt"]["steps"]
    assert steps <= len(taken) < 2 * steps + 40  # it went on, and did not begin again
    assert not (tmp_path / ".out.state").exists()
