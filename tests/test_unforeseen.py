"""Networks, batches and labels that nobody planned for: told in a sentence, or taken as they are meant."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import adarank
from adarank.adapt.agreement import mean_signal, signals
from adarank.adapt.choice import best_step, choose_best
from adarank.adapt.objectives import divergences, entropy
from adarank.cli.main import main
from adarank.errors import AdaptationError, CheckpointError, DataError, RecipeError, itemise
from adarank.models.text import tokenizer_of
from adarank.recipe.reader import load_recipe
from adarank.workflow.merge import merge
from text_zoo import ADAPT, make_zoo, recipe


@pytest.fixture
def problem() -> tuple[nn.Module, dict[str, nn.Module], dict[str, list[Tensor]]]:
    torch.manual_seed(0)
    base = nn.Linear(6, 4)
    experts = {task: nn.Linear(6, 4) for task in "ab"}
    for own in experts.values():
        own.load_state_dict({n: t + 0.3 * torch.randn_like(t) for n, t in base.state_dict().items()})
    return base, experts, {task: [torch.randn(8, 6) for _ in range(6)] for task in experts}


def test_a_network_that_gives_no_numbers_agrees_with_nobody() -> None:
    expert = torch.tensor([[2.0, 0.0]] * 9 + [[0.0, 2.0]])
    start, broken = signals(expert.flip(-1), expert), signals(torch.full((10, 2), math.nan), expert)
    assert (start.agreement, broken.agreement) == (0.0, 0.0)
    assert mean_signal({"a": broken}, "agreement") == -math.inf
    judged = {0: {"a": start}, 5: {"a": broken}}
    assert best_step(judged, "agreement", 0.0) == 0
    assert choose_best(judged, "agreement", 9.0).step == 0
    half = signals(torch.cat([expert[:5], torch.full((5, 2), math.nan)]), expert)
    assert half.agreement == 0.5


def test_classes_that_a_head_masks_count_nothing() -> None:
    masked, expert = (torch.randn(4, 5).requires_grad_(own) for own in (True, False))
    hidden = masked.masked_fill(torch.tensor([0, 0, 1, 0, 1]).bool(), -math.inf)
    other = expert.masked_fill(torch.tensor([0, 0, 1, 0, 1]).bool(), -math.inf)
    seen = [0, 1, 3]
    assert torch.allclose(divergences(hidden, other), divergences(masked[:, seen], expert[:, seen]))
    assert torch.allclose(entropy(hidden), entropy(masked[:, seen]))
    (divergences(hidden, other).sum() + entropy(hidden)).backward()
    assert masked.grad is not None
    assert bool(masked.grad.isfinite().all())


def test_experts_of_one_output_have_no_classes_to_agree_on(tmp_path: Path) -> None:
    own = nn.Linear(4, 1)
    with pytest.raises(AdaptationError, match="no classes to agree on"):
        adarank.adapt(nn.Linear(4, 1), {"a": own}, {"a": [torch.randn(3, 4)]})
    zoo = make_zoo(tmp_path)
    file = zoo / "models" / "mood" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "problem_type": "regression"}))
    with pytest.raises(DataError, match=r"task 'mood': .* no classifier of one class per input \(regression\)"):
        merge(load_recipe(recipe(zoo, **ADAPT)), tmp_path / "out")


@pytest.mark.parametrize("withheld", ["null", "NaN", '""', "-1"])
def test_a_withheld_label_stops_no_adaptation(tmp_path: Path, withheld: str) -> None:
    zoo = make_zoo(tmp_path)
    lines = [f'{{"text": "good {"red " * (i % 7)}{i}", "label": {withheld if i % 3 else i % 2}}}' for i in range(40)]
    (zoo / "data" / "mood.jsonl").write_text("\n".join(lines))
    models = [{"model": f"models/{t}", "task": {"name": t, "data": f"data/{t}.{e}"}}
              for t, e in (("mood", "jsonl"), ("colour", "tsv"))]  # fmt: skip
    path = recipe(zoo, **{**ADAPT, "adapt": {"steps": 1}}, models=models)
    merge(load_recipe(path), tmp_path / "out")
    with pytest.raises(DataError, match="rows carry no labels"):
        adarank.evaluate_recipe(path)


def test_judging_looks_at_no_more_than_asked_evenly_spread(problem: Any) -> None:
    base, experts, batches = problem
    asked: list[int] = []

    def forward(module: nn.Module, batch: Tensor) -> Tensor:
        asked.extend(i for i, own in enumerate(batches["a"]) if own is batch and not torch.is_grad_enabled())
        return module(batch)

    settings = adarank.AdaptSettings(steps=0, check_inputs=24, objective="entropy")
    found = adarank.adapt(base, experts, batches, settings=settings, forward=forward)
    assert set(asked) == {0, 2, 4}
    assert found.history.judged[0]["a"].inputs == 24


def test_batches_may_come_from_loaders_and_generators_in_any_float_dtype(problem: Any) -> None:
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
def test_logits_are_found_in_what_a_network_gives_or_asked_for(kind: str) -> None:
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


@pytest.mark.parametrize("setting", ["patience", "tolerance", "repair", "retreat"])
def test_settings_that_mean_nothing_to_surgery_are_refused(tmp_path: Path, setting: str) -> None:
    zoo = make_zoo(tmp_path)
    path = recipe(zoo, merge_method="surgery", adapt={setting: 1})
    with pytest.raises(RecipeError, match=setting):
        load_recipe(path)


def test_modules_are_judged_as_often_as_masks_where_inputs_are_few(tmp_path: Path) -> None:
    zoo = make_zoo(tmp_path)
    for task in ("mood", "colour"):
        file = zoo / "data" / f"{task}.tsv"
        file.write_text("".join(file.read_text().splitlines(keepends=True)[:12]))
    adapt = {"steps": 12, "batch_size": 4, "check_every": "auto"}
    path = recipe(zoo, merge_method="wemoe", adapt=adapt, data={"adapt": 0.2, "select": 0.2, "test": 0.6})
    record = merge(load_recipe(path), tmp_path / "out")
    assert list(record["adaptation"]["judged"])[:3] == ["0", "5", "10"]


def test_what_a_long_list_leaves_out_is_counted() -> None:
    told = itemise("Wrong:", [f"name {n}" for n in range(25)], "Mend them.", 20).splitlines()
    assert told[:2] == ["Wrong:", "  name 0"]
    assert told[20:] == ["  name 19", "  … and 5 more like these", "Mend them."]
    assert itemise("Wrong:", ["a"] * 20, most=20).count("a") == 20
    assert "more" not in itemise("Wrong:", ["a"] * 20, most=20)


def test_a_folder_without_a_tokenizer_is_refused_and_one_of_bytes_taken(tmp_path: Path) -> None:
    """Some versions of transformers make a tokenizer that knows no word where there is none."""
    folder = make_zoo(tmp_path) / "models" / "mood"
    assert tokenizer_of(folder)("good")["input_ids"] != tokenizer_of(folder)("bad")["input_ids"]
    for file in folder.glob("token*"):
        file.unlink()
    with pytest.raises(CheckpointError, match=r"no usable tokenizer.*Copy the tokenizer's files"):
        tokenizer_of(folder)
    transformers.ByT5Tokenizer().save_pretrained(tmp_path / "bytes")
    assert tokenizer_of(tmp_path / "bytes")("ab")["input_ids"][:2] == [ord("a") + 3, ord("b") + 3]
