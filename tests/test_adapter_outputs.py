"""Outputs that are LoRA adapters: `peft` loads them, and what it makes of base and adapter has the stated error."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn

import adarank
from adarank.cli.main import main
from adarank.errors import AdaRankError, RecipeError
from lora_zoo import KINDS, Kind, bert, gpt2, llama, make_model, resnet, save_adapter, save_base

MODELS: dict[str, Callable[[], nn.Module]] = {"llama": llama, "bert": bert, "gpt2": gpt2, "resnet": resnet}
EXPERTS = ("a", "b")


def save_expert(kind: Kind, folder: Path, seed: int, tables: bool = True) -> None:
    """A copy of the base with every float parameter and statistic moved."""
    model = make_model(kind)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and (tables or not any(part in name for part in ("embed", "wte", "wpe"))):
                tensor.add_(0.05 * torch.rand_like(tensor))
    model.save_pretrained(folder)


def merge(folder: Path, out: str, models: tuple[str, ...] = EXPERTS, **changes: Any) -> dict[str, Any]:
    values = {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "models": [{"model": m} for m in models],
        "device": "cpu",
        **changes,
    }
    file = folder / f"{out}.yaml"
    file.write_text(json.dumps(values))
    return adarank.merge_recipe(file, folder / out)


def loaded(kind: Kind, adapter: Path, unloaded: bool = True) -> Any:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        wrapped: Any = PeftModel.from_pretrained(make_model(kind), str(adapter))
    assert not [str(each.message) for each in said if "keys" in str(each.message)]  # missing or unexpected ones
    return wrapped.merge_and_unload() if unloaded else wrapped


def error(one: Tensor, other: Tensor, base: Tensor) -> float:
    return float((one - other).double().norm() / (other - base).double().norm())


@pytest.mark.parametrize("rank", [3, 64])
@pytest.mark.parametrize("name", MODELS)
def test_peft_loads_it_and_the_error_is_as_stated(name: str, rank: int, tmp_path: Path) -> None:
    kind = Kind({}, MODELS[name])
    save_base(kind, tmp_path / "base")
    for seed, expert in enumerate(EXPERTS):
        save_expert(kind, tmp_path / expert, seed, tables=name != "gpt2")
    select = {"select": {"keep": ["transformer.wte.weight"]}} if name == "gpt2" else {}
    whole = load_file(tmp_path / "whole" / "model.safetensors") if merge(tmp_path, "whole", **select) else {}
    record = merge(tmp_path, "adapter", output={"lora": {"rank": rank}}, **select)["lora"]
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    state, base = loaded(kind, tmp_path / "adapter").state_dict(), load_file(tmp_path / "base" / "model.safetensors")
    changed = [n for n in whole if whole[n].is_floating_point() and not torch.equal(whole[n], base[n])]
    assert set(record["relative_errors"]) == set(changed)
    for tensor in changed:
        assert error(state[tensor], whole[tensor], base[tensor]) == pytest.approx(
            record["relative_errors"][tensor], rel=1e-2, abs=1e-4
        )
    lost = sum(float((state[n] - whole[n]).double().square().sum()) for n in changed)
    total = sum(float((whole[n] - base[n]).double().square().sum()) for n in changed)
    assert (lost / total) ** 0.5 == pytest.approx(record["relative_error"], rel=1e-2, abs=1e-4)
    assert record["relative_error"] < 1e-4 if rank == 64 else record["relative_error"] > 0.05
    assert all(torch.equal(state[n], base[n]) for n in base if n not in changed and n in state)


def test_it_is_the_best_of_its_rank(tmp_path: Path) -> None:
    kind = Kind({}, llama)
    save_base(kind, tmp_path / "base")
    save_expert(kind, tmp_path / "a", 1)
    record = merge(tmp_path, "adapter", ("a",), output={"lora": {"rank": 2}}, parameters={"lambda": 1.0})["lora"]
    base, expert = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "a"))
    name = "model.layers.0.mlp.down_proj.weight"
    s = torch.linalg.svdvals((expert[name] - base[name]).double())
    assert record["relative_errors"][name] == pytest.approx(
        float((s[2:].square().sum() / s.square().sum()).sqrt()), rel=1e-3
    )


@pytest.mark.parametrize("method", ["task_arithmetic", "cart", "tsv_m", "ties"])
def test_merged_adapters_are_an_adapter_again(method: str, tmp_path: Path) -> None:
    """Exact at the summed rank where a method stays within the adapters' directions; ties leaves them."""
    kind = KINDS["lora"]
    save_base(kind, tmp_path / "base")
    for seed, name in enumerate(("a", "b", "c")):
        save_adapter(kind, tmp_path / name, seed)
    settings = {"parameters": {"density": 0.5}} if method == "ties" else {}
    record = merge(tmp_path, "out", ("a", "b", "c"), merge_method=method, output={"lora": {"rank": 12}}, **settings)[
        "lora"
    ]
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert all(
        module.rpartition(".")[2] in KINDS["lora"].settings["target_modules"] for module in config["target_modules"]
    )
    assert record["relative_error"] > 0.01 if method == "ties" else record["relative_error"] < 2e-6
    again = merge(tmp_path, "again", ("out",), parameters={"lambda": 1.0})
    whole = merge(tmp_path, "whole", ("a", "b", "c"), merge_method=method, **settings)
    assert again["seed"] == whole["seed"]
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("again", "whole"))
    if method != "ties":
        assert all(torch.allclose(first[n], second[n], atol=2e-6) for n in second)


def test_outputs_compute_what_the_merged_model_does(tmp_path: Path) -> None:
    kind = Kind({}, llama)
    save_base(kind, tmp_path / "base")
    for seed, expert in enumerate(EXPERTS):
        save_expert(kind, tmp_path / expert, seed)
    merge(tmp_path, "whole")
    merge(tmp_path, "adapter", output={"lora": {"rank": 64}})
    tokens = torch.arange(12).reshape(1, 12)
    with torch.no_grad():
        one = loaded(kind, tmp_path / "adapter", unloaded=False)(tokens).logits
        other = type(make_model(kind)).from_pretrained(tmp_path / "whole").eval()(tokens).logits
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_a_tied_table_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    kind = Kind({}, gpt2)
    save_base(kind, tmp_path / "base")
    save_expert(kind, tmp_path / "a", 1)
    with pytest.raises(RecipeError, match=r"(?s)transformer.wte.weight: the table.*select: keep"):
        merge(tmp_path, "out", ("a",), output={"lora": {"rank": 2}})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("changes", "text"), [
    ({"merge_method": "emr"}, "a network for each task"), ({"merge_method": "average", "base_model": None}, "names no base_model"),
    ({"merge_method": "linear"}, "merges base_model as one"), ({"output": {"lora": {"rank": 0}}}, "rank"), ({"output": {"lora": {}}}, "rank"),
    ({"output": {"lore": {"rank": 2}}}, "Did you mean 'lora'"),
])  # fmt: skip
def test_what_can_be_no_adapter_is_refused(changes: dict[str, Any], text: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=text):
        merge(tmp_path, "out", **{"output": {"lora": {"rank": 2}}, **changes})


def test_a_merge_that_changes_nothing_is_no_adapter(tmp_path: Path) -> None:
    kind = Kind({}, llama)
    save_base(kind, tmp_path / "base")
    save_base(kind, tmp_path / "a")
    with pytest.raises(AdaRankError, match="the merged model is the base"):
        merge(tmp_path, "out", ("a",), output={"lora": {"rank": 2}})
    assert not (tmp_path / "out").exists()


def test_the_command_line_prints_what_is_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kind = Kind({}, llama)
    save_base(kind, tmp_path / "base")
    save_expert(kind, tmp_path / "a", 1)
    values = {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "models": [{"model": "a"}],
        "output": {"lora": {"rank": 2}},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(values))
    assert main(["merge", str(tmp_path / "recipe.yaml"), str(tmp_path / "out")]) == 0
    lora = json.loads((tmp_path / "out" / "adarank.json").read_text())["lora"]
    assert f"adapter of rank 2: {lora['relative_error']:.2%} of the merged task vector is lost" in " ".join(
        capsys.readouterr().out.split()
    )
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert lora["bytes"] == sum(tensor.nbytes for tensor in stored.values())
