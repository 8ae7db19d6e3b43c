"""Inputs that are not one network: the error says in a sentence what they are, counts what differs, and shows a little."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import adarank
from adarank.alignment.align import align
from adarank.cli.main import main
from adarank.errors import MismatchError, itemise
from adarank.io.checkpoint import Checkpoint
from make import State, family, network, randn, save
from text_zoo import recipe

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 6, "num_hidden_layers": 40}
PHI = {"model_type": "phi", "architectures": ["PhiForCausalLM"], "hidden_size": 6, "num_hidden_layers": 40}


def model(parts: str, width: int = 6, layers: int = 40) -> State:
    return {f"model.layers.{i}.{part}.weight": randn(i, width, width) for i in range(layers) for part in parts}


def message(folder: Path, own: State, config: dict[str, Any] | None, base: dict[str, Any] | None = LLAMA) -> str:
    start = Checkpoint(save(folder / "start", model("abc"), base), "start")
    experts = {"a": Checkpoint(save(folder / "a", own, config), "a"), "b": start}
    with pytest.raises(MismatchError) as caught:
        align(start, experts)
    return str(caught.value)


def test_another_architecture_is_named_in_the_first_line(tmp_path: Path) -> None:
    first, second, *lines, last = message(tmp_path, model("abd"), PHI).splitlines()
    assert first == "a is a phi (PhiForCausalLM), the base a llama (LlamaForCausalLM)."
    assert second == "80 tensor(s) cannot be merged: 40 missing from experts, 40 missing from the base."
    assert len(lines) == 7
    assert any("missing from the base" in line for line in lines)
    assert any("missing from expert 'a'" in line for line in lines)
    assert lines[-1] == "  … and 74 more like these"
    assert "select" not in last


@pytest.mark.parametrize("config", [None, {}, LLAMA])
def test_one_architecture_or_an_unknown_one_is_counted_alone(tmp_path: Path, config: dict[str, Any] | None) -> None:
    lines = message(tmp_path, model("abd"), config).splitlines()
    assert lines[0] == "80 tensor(s) cannot be merged: 40 missing from experts, 40 missing from the base."
    assert len(lines) == 23
    assert lines[-2] == "  … and 60 more like these"
    assert "select: keep" in lines[-1]


def test_another_size_is_told_by_its_configuration(tmp_path: Path) -> None:
    larger = {**LLAMA, "hidden_size": 8, "num_hidden_layers": 41}
    lines = message(tmp_path, model("abc", 8, 41), larger).splitlines()
    assert lines[0] == (
        "a is of another size: hidden_size 8 where the base has 6 and num_hidden_layers 41 where the base has 40."
    )
    assert "120 of other shapes" in lines[1]
    assert len(lines) == 10


def test_a_tower_of_the_base_is_no_other_architecture(tmp_path: Path) -> None:
    base = {"model_type": "llava", "text_config": LLAMA}
    assert message(tmp_path, model("abd"), LLAMA, base).startswith("80 tensor(s)")


def test_without_a_base_the_first_expert_is_compared_with(tmp_path: Path) -> None:
    one, other = (Checkpoint(save(tmp_path / n, model(p), c), n) for n, p, c in (("x", "ab", LLAMA), ("y", "ac", PHI)))
    with pytest.raises(MismatchError, match=r"^y is a phi \(PhiForCausalLM\), x a llama \(LlamaForCausalLM\)\.\n80 "):
        align(None, {"x": one, "y": other})


def test_a_tensor_that_many_experts_have_is_one_line() -> None:
    base, experts = family(3)
    for own in experts.values():
        own["extra.weight"] = randn(0, 2, 2)
    with pytest.raises(MismatchError, match="1 missing from the base") as caught:
        network(base, experts)
    (line,) = [line for line in str(caught.value).splitlines() if "extra.weight" in line]
    assert all(f"expert '{task}'" in line for task in experts)


def test_a_likely_head_is_said_to_need_a_task() -> None:
    base, experts = family(2)
    experts["task0"]["classifier.weight"] = randn(0, 2, 6)
    with pytest.raises(
        MismatchError, match=r"'classifier\.weight' is the head of a task, give the model its task: kind"
    ):
        network(base, experts)


def test_a_plan_names_a_few_of_many_tensors_that_are_not_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    buffers = {f"model.layers.{i}.rotary_emb.inv_freq": randn(0, 2) for i in range(40)}
    save(tmp_path / "start", model("ab"))
    save(tmp_path / "a", {**model("ab"), **buffers})
    path = recipe(tmp_path, merge_method="task_arithmetic", base_model="start", models=[{"model": "a"}])
    assert main(["plan", str(path)]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "not used" in line]
    assert line.split("a: ")[1].startswith("model.layers.0.rotary_emb.inv_freq and 39 more (computed")


def test_every_list_in_an_error_is_bounded(tmp_path: Path) -> None:
    lines = itemise("Wrong:", [f"name {number}" for number in range(1000)], "Mend them.").splitlines()
    assert len(lines) == 23
    assert "980 more" in lines[-2]
    assert len(itemise("Wrong:", ["a"] * 1000, most=None).splitlines()) == 1001
    with pytest.raises(adarank.AdaRankError) as caught:
        adarank.merge_recipe(
            {"merge_method": "linear", "models": [{"model": f"none/{i}"} for i in range(90)]}, tmp_path / "o"
        )
    assert len(str(caught.value).splitlines()) < 25


def test_what_a_long_list_leaves_out_is_counted() -> None:
    told = itemise("Wrong:", [f"name {n}" for n in range(25)], "Mend them.", 20).splitlines()
    assert told[:2] == ["Wrong:", "  name 0"]
    assert told[20:] == ["  name 19", "  … and 5 more like these", "Mend them."]
    assert itemise("Wrong:", ["a"] * 20, most=20).count("a") == 20
    assert "more" not in itemise("Wrong:", ["a"] * 20, most=20)
