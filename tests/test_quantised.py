"""Quantised inputs: refused by name before anything is read, or made floats exactly; codes never merge."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import adarank
from adarank.errors import CheckpointError, RecipeError
from adarank.io.checkpoint import Checkpoint
from adarank.io.dequantise import Dequantised
from adarank.recipe.reader import load_recipe
from adarank.workflow.inspect import inspect_checkpoint
from make import State, close, identical, near, randn, save, save_bin

SHAPES = {"model.layers.0.q_proj.weight": (16, 32), "model.layers.0.up_proj.weight": (24, 16)}
NORM = "model.norm.weight"


def floats(seed: int) -> State:
    return {
        **{name: randn(seed + i, *shape) for i, (name, shape) in enumerate(SHAPES.items())},
        NORM: randn(seed + 9, 16),
    }


def each(state: State, make: Callable[[str, torch.Tensor], State]) -> State:
    """The state with each of its matrices replaced by what a quantiser stores."""
    return {
        n: t for name, own in state.items() for n, t in (make(name, own) if own.dim() == 2 else {name: own}).items()
    }


def stem(name: str) -> str:
    return name.removesuffix("weight")


def int8(name: str, w: torch.Tensor) -> State:
    scale = w.abs().amax(1, keepdim=True) / 127
    return {name: (w / scale).round().to(torch.int8), name + "_scale": scale}


def groups(name: str, w: torch.Tensor) -> State:
    """Codes about a zero point, a scale for every 8 entries of a row."""
    parts = w.reshape(w.shape[0], -1, 8)
    low, high = parts.amin(-1), parts.amax(-1)
    scale = (high - low) / 255
    zero = (-128 - low / scale).round()
    codes = (parts / scale[..., None] + zero[..., None]).round().clamp(-128, 127)
    return {
        name: codes.reshape(w.shape).to(torch.int8),
        name + "_scale": scale,
        name + "_zero_point": zero.to(torch.int8),
    }


def llm_int8(name: str, w: torch.Tensor) -> State:
    most = w.abs().amax(1)
    codes = (127 * w / most[:, None]).round().to(torch.int8)
    return {name: codes, stem(name) + "SCB": most, stem(name) + "weight_format": torch.tensor(0, dtype=torch.uint8)}


def fp8(name: str, w: torch.Tensor) -> State:
    return {
        name: (w * 4).to(torch.float8_e4m3fn),
        name + "_scale": torch.tensor([0.25]),
        stem(name) + "input_scale": torch.ones(1),
    }


def plain_fp8(name: str, w: torch.Tensor) -> State:
    return {name: w.to(torch.float8_e5m2)}


def blocks(name: str, w: torch.Tensor) -> State:
    """A scale for every block of 16×12, which does not divide the sides."""
    scale = randn(3, -(-w.shape[0] // 16), -(-w.shape[1] // 12)).abs() + 0.5
    whole = torch.kron(scale, torch.ones(16, 12))[: w.shape[0], : w.shape[1]]
    return {name: (w / whole).to(torch.float8_e4m3fn), name + "_scale_inv": scale}


def nf4(name: str, w: torch.Tensor) -> State:
    packed = torch.zeros(w.numel() // 2, 1, dtype=torch.uint8)
    return {name: packed, name + ".absmax": torch.ones(w.numel() // 64), name + ".quant_map": torch.ones(16)}


def gptq(name: str, w: torch.Tensor) -> State:
    rows, columns = w.shape
    return {stem(name) + "qweight": torch.zeros(columns // 8, rows, dtype=torch.int32),
            stem(name) + "scales": torch.ones(1, rows), stem(name) + "g_idx": torch.zeros(columns, dtype=torch.int32)}  # fmt: skip


def awq(name: str, w: torch.Tensor) -> State:
    kept = gptq(name, w)
    del kept[stem(name) + "g_idx"]
    return {**kept, stem(name) + "qzeros": torch.zeros(1, 4, dtype=torch.int32)}


def packed(name: str, w: torch.Tensor) -> State:
    return {
        name + "_packed": torch.zeros(w.shape[0], w.shape[1] // 8, dtype=torch.int32),
        name + "_scale": torch.ones(w.shape[0], 1),
    }


def hqq(name: str, w: torch.Tensor) -> State:
    return {
        stem(name) + "W_q": torch.zeros(w.shape, dtype=torch.uint8),
        stem(name) + "scale": torch.ones(w.shape[0], 1),
    }


def quanto(name: str, w: torch.Tensor) -> State:
    return {name + "._data": torch.zeros(w.shape, dtype=torch.int8), name + "._scale": torch.ones(w.shape[0], 1)}


KINDS = {
    "gptq": gptq,
    "awq": awq,
    "bitsandbytes": nf4,
    "compressed-tensors": packed,
    "hqq": hqq,
    "quanto": quanto,
    "fp8": fp8,
}
EXACT = {
    "compressed-tensors": int8,
    "by groups": groups,
    "bitsandbytes": llm_int8,
    "fbgemm_fp8": fp8,
    "none": plain_fp8,
    "fp8": blocks,
}


def zoo(folder: Path, make: Any, config: Any = None, names: tuple[str, ...] = ("start", "a", "b")) -> Path:
    """Three models, of which `names` are quantised; returns a recipe."""
    start = floats(0)
    for seed, name in enumerate(("start", "a", "b")):
        own = near(start, seed, 0.1 if seed else 0.0)
        quantised = name in names
        save(folder / name, each(own, make) if quantised else own, config if quantised else None)
    path = folder / "recipe.yaml"
    models = [{"model": name, "parameters": {"weight": 0.5}} for name in ("a", "b")]
    path.write_text(
        json.dumps({"merge_method": "task_arithmetic", "base_model": "start", "models": models, "device": "cpu"})
    )
    return path


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("told_by", ["config", "tensors"])
def test_quantised_inputs_are_refused_by_name(tmp_path: Path, kind: str, told_by: str) -> None:
    config = {"model_type": "llama", "quantization_config": {"quant_method": kind}} if told_by == "config" else None
    path = zoo(tmp_path, KINDS[kind], config)
    with pytest.raises(CheckpointError, match="De-quantise them first") as caught:
        adarank.open_job(load_recipe(path))
    for name in ("start", "a", "b"):
        assert f"{name}: quantised ({kind}" in str(caught.value) or f"{name}: quantised ({kind} or gptq)" in str(
            caught.value
        )


@pytest.mark.parametrize("kind", KINDS)
def test_one_quantised_expert_is_named_and_nothing_is_written(tmp_path: Path, kind: str) -> None:
    config = {"quantization_config": {"quant_method": kind}}
    path = zoo(tmp_path, KINDS[kind], config, ("a",))
    with pytest.raises(CheckpointError, match=rf"^a: quantised \({kind}\)\. De-quantise it first"):
        adarank.merge_recipe(load_recipe(path), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("config", "name"), [
    ({"quantization_config": {"load_in_4bit": True}}, "bitsandbytes"),
    ({"compression_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
    ({"quantization": {"group_size": 64, "bits": 4}}, "mlx"), ({"quantization_config": {"quant_algo": "FP8"}}, "FP8"),
    ({"text_config": {"quantization_config": {"quant_method": "awq"}}}, "awq"),
])  # fmt: skip
def test_every_place_of_a_configuration_is_looked_at(tmp_path: Path, config: dict[str, Any], name: str) -> None:
    with pytest.raises(CheckpointError, match=rf"^a: quantised \({name}\)"):
        adarank.open_job(load_recipe(zoo(tmp_path, nf4, config, ("a",))))


@pytest.mark.parametrize(("file", "name"), [("quantize_config.json", "gptq"), ("quant_config.json", "awq")])
def test_a_quantisers_own_file_names_it(tmp_path: Path, file: str, name: str) -> None:
    path = zoo(tmp_path, awq, None, ("a",))
    (tmp_path / "a" / file).write_text("{}")
    with pytest.raises(CheckpointError, match=rf"^a: quantised \({name}\)"):
        adarank.open_job(load_recipe(path))


@pytest.mark.parametrize(("file", "name"), [("model.Q4_K_M.gguf", "GGUF"), ("qmodel.pt", "HQQ")])
@pytest.mark.parametrize("whole", [True, False])
def test_formats_of_quantised_weights_are_named(tmp_path: Path, file: str, name: str, whole: bool) -> None:
    (tmp_path / file).write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(CheckpointError, match=rf"quantised \({name}\)\. De-quantise it first"):
        Checkpoint(tmp_path if whole else tmp_path / file)


def test_codes_in_memory_are_refused_too() -> None:
    start = floats(0)
    with pytest.raises(CheckpointError, match=r"expert 'a': quantised \(int8 weights"):
        adarank.merge(start, {"a": each(start, int8), "b": start}, "task_arithmetic")


@pytest.mark.filterwarnings("ignore")  # of PyTorch, on its own quantised tensors
@pytest.mark.parametrize("dtype", [torch.complex64, torch.qint8])
def test_a_bin_of_other_dtypes_is_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    odd = (
        torch.quantize_per_tensor(torch.ones(2, 2), 0.1, 0, dtype)
        if dtype == torch.qint8
        else torch.ones(2, dtype=dtype)
    )
    with pytest.raises(CheckpointError, match=rf"'w' has dtype {str(dtype).removeprefix('torch.')}"):
        Checkpoint(save_bin(tmp_path / "a", {"w": odd}))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_codes_can_be_looked_at(tmp_path: Path, dtype: torch.dtype) -> None:
    """`inspect` lists what is there; a value that is no number is one in 8 bits too."""
    row = inspect_checkpoint(save(tmp_path / "a", {"w": torch.full((2, 2), 0.5).to(dtype)}))[0]
    assert (row.dtype, row.norm) == (str(dtype).removeprefix("torch."), 1.0)
    with pytest.raises(CheckpointError, match="1 NaN or infinite"):
        inspect_checkpoint(save(tmp_path / "b", {"w": torch.tensor([0.5, float("nan")]).to(dtype)}))


# Turned into floats


def values(name: str, own: State) -> torch.Tensor:
    """A weight by the formula of whoever wrote it, entry by entry in float64."""
    codes, rows = own[name].double(), own[name].shape[0]
    if stem(name) + "SCB" in own:
        return torch.stack([codes[r] * own[stem(name) + "SCB"][r].double() / 127 for r in range(rows)])
    zero = own.get(name + "_zero_point", torch.zeros(1)).double()
    scale = own.get(name + "_scale", own.get(name + "_scale_inv", torch.ones(1))).double()
    out = torch.empty_like(codes)
    for r in range(rows):
        for c in range(codes.shape[1]):
            block = (r // 16, c // 12) if name + "_scale_inv" in own else (r, c // 8)
            at = (
                tuple(min(i, side - 1) for i, side in zip(block, scale.shape, strict=True))
                if scale.dim() == 2
                else (0,)
            )
            out[r, c] = (codes[r, c] - (zero[at] if zero.dim() == 2 else 0)) * scale[at]
    return out


@pytest.mark.parametrize("kind", EXACT)
def test_codes_become_the_floats_that_they_stand_for(tmp_path: Path, kind: str) -> None:
    config = {"dtype": "bfloat16", "quantization_config": {"quant_method": kind, "weight_block_size": [16, 12]}}
    own = each(floats(4), EXACT[kind])
    read = Dequantised(Checkpoint(save(tmp_path / "a", own, config)))
    assert set(read.tensors) == {*SHAPES, NORM}
    assert "quantization_config" not in read.config
    assert identical(read.read(NORM), own[NORM])
    for name in SHAPES:
        assert read.tensors[name].dtype == torch.bfloat16
        torch.testing.assert_close(read.read(name).double(), values(name, own), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize("names", [("a",), ("start", "a", "b")])
def test_a_merge_of_codes_is_the_merge_of_their_floats(tmp_path: Path, kind: str, names: tuple[str, ...]) -> None:
    config = {"model_type": "llama", "quantization_config": {"quant_method": kind, "weight_block_size": [16, 12]}}
    path = zoo(tmp_path, EXACT[kind], config, names)
    text = json.dumps({**json.loads(path.read_text()), "dequantize": True})
    path.write_text(text)
    record = adarank.merge_recipe(load_recipe(path), tmp_path / "out")
    read = {name: load_file(tmp_path / name / "model.safetensors") for name in ("start", "a", "b")}
    exact = {
        n: {k: values(k, own) if k in SHAPES and n in names else own[k].double() for k in (*SHAPES, NORM)}
        for n, own in read.items()
    }
    wanted = {
        k: exact["start"][k] + 0.5 * (exact["a"][k] + exact["b"][k] - 2 * exact["start"][k]) for k in (*SHAPES, NORM)
    }
    close(load_file(tmp_path / "out" / "model.safetensors"), wanted)
    if "start" in names:
        assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    if kind != "none":
        assert any("scales" in name for name in record["plan"]["dropped"]["a"])


@pytest.mark.parametrize("kind", ["gptq", "awq", "bitsandbytes", "compressed-tensors", "hqq", "quanto"])
def test_packed_codes_stay_refused_with_the_reason(tmp_path: Path, kind: str) -> None:
    path = zoo(tmp_path, KINDS[kind], {"quantization_config": {"quant_method": kind}}, ("a",))
    path.write_text(json.dumps({**json.loads(path.read_text()), "dequantize": True}))
    with pytest.raises(CheckpointError, match=rf"a: quantised \({kind}\)\. dequantize: true does int8 and fp8 alone"):
        adarank.open_job(load_recipe(path))


def test_scales_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    own = each(floats(0), int8)
    name = next(iter(SHAPES))
    own[name + "_scale"] = torch.ones(5, 1)
    with pytest.raises(CheckpointError, match=rf"{name}: \(16, 32\) with {name}_scale: \(5, 1\)"):
        Dequantised(Checkpoint(save(tmp_path / "a", own)))
    turned = each(floats(0), llm_int8)
    turned[stem(name) + "weight_format"] = torch.tensor(2, dtype=torch.uint8)
    with pytest.raises(CheckpointError, match="order for one kind of GPU"):
        Dequantised(Checkpoint(save(tmp_path / "b", turned)))


def test_networks_are_not_loaded_from_codes(tmp_path: Path) -> None:
    path = zoo(tmp_path, int8, {"model_type": "bert"}, ("a",))
    models = [{"model": name, "task": {"kind": "text-classification"}} for name in ("a", "b")]
    path.write_text(json.dumps({**json.loads(path.read_text()), "models": models, "dequantize": True}))
    with pytest.raises(RecipeError, match="models without tasks"):
        adarank.open_job(load_recipe(path))
