"""What is written is read back; what is damaged is refused with a sentence."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from adarank.alignment.task_vectors import Member
from adarank.errors import AdaRankError, CheckpointError, OutputError
from adarank.io.checkpoint import Checkpoint, MemorySource, check_finite
from adarank.io.files import MappedFile, open_safetensors
from adarank.io.writer import write_checkpoint
from make import (
    State,
    identical,
    randn,
    read_all,
    same,
    save,
    save_bin,
    save_shards,
    state,
    write_index,
)

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
          torch.int8, torch.uint8, torch.bool]  # fmt: skip


def layout(state: State) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()}


def write(folder: Path, state: State, limit: int = 10**9) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    return write_checkpoint(folder, layout(state), iter(state.items()), limit)


def loaded(files: list[Path]) -> State:
    """By the safetensors library alone."""
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


@st.composite
def states(draw: st.DrawFn) -> State:
    """Any dtypes in any order, scalars and empty tensors included."""
    shapes = st.lists(st.integers(0, 4), max_size=3)
    kinds = draw(st.lists(st.tuples(st.sampled_from(DTYPES), shapes), min_size=1, max_size=6))
    return {
        f"tensor.{i}.ü": randn(i, *shape, dtype=torch.float64).mul(20).to(dtype)
        for i, (dtype, shape) in enumerate(kinds)
    }


@given(states(), st.sampled_from([1, 20, 10**9]))
def test_what_is_written_is_read_back(tmp_path_factory: pytest.TempPathFactory, state: State, limit: int) -> None:
    folder = tmp_path_factory.mktemp("written")
    files = write(folder, state, limit)
    assert same(read_all(Checkpoint(folder)), state)
    assert same(loaded(files), state)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_round_trips_after_a_tensor_of_odd_bytes(tmp_path: Path, dtype: torch.dtype) -> None:
    wanted = {
        "odd": torch.ones(3, dtype=torch.bool),
        "x": (10 * randn(0, 2, 3)).to(dtype),
        "scalar": randn(1).to(dtype),
    }
    files = write(tmp_path / "out", wanted)
    assert same(read_all(Checkpoint(tmp_path / "out")), wanted)
    assert same(loaded(files), wanted)


@pytest.mark.parametrize("limit", [1, 100, 400])
def test_shards_keep_to_their_limit_and_the_index_names_them(tmp_path: Path, limit: int) -> None:
    wanted = state(0)
    files = write(tmp_path, wanted, limit)
    assert len(files) > 1
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in wanted.values())
    assert set(index["weight_map"]) == set(wanted)
    for file in files:
        own = load_file(file)
        assert all(index["weight_map"][name] == file.name for name in own)
        assert len(own) == 1 or sum(t.numel() * t.element_size() for t in own.values()) <= limit


def test_a_sharded_checkpoint_reads_as_a_whole_one(tmp_path: Path) -> None:
    wanted = state(0, torch.bfloat16)
    assert same(read_all(Checkpoint(save_shards(tmp_path / "a", wanted, 3))), wanted)
    assert same(read_all(Checkpoint(save(tmp_path / "b", wanted))), wanted)


def test_tensors_are_cast_to_the_layout(tmp_path: Path) -> None:
    wanted = randn(0, 3, 3)
    write_checkpoint(tmp_path, {"w": ((3, 3), torch.bfloat16)}, iter([("w", wanted)]))
    assert identical(Checkpoint(tmp_path).read("w"), wanted.to(torch.bfloat16))


def test_non_contiguous_tensors_are_written_in_order(tmp_path: Path) -> None:
    wanted = randn(0, 3, 5).T
    write_checkpoint(tmp_path, {"w": ((5, 3), torch.float32)}, iter([("w", wanted)]))
    assert torch.equal(Checkpoint(tmp_path).read("w"), wanted)


def test_an_overflow_in_the_output_dtype_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdaRankError, match="'w'"):
        write_checkpoint(tmp_path, {"w": ((1,), torch.float16)}, iter([("w", torch.tensor([1e6]))]))


@pytest.mark.parametrize("tensors", [[("a", torch.ones(2))], [("b", torch.ones(2)), ("a", torch.ones(2))],
                                     [("a", torch.ones(3)), ("b", torch.ones(2))]])  # fmt: skip
def test_tensors_that_do_not_follow_the_layout_are_refused(tmp_path: Path, tensors: list[tuple[str, Tensor]]) -> None:
    with pytest.raises(OutputError):
        write_checkpoint(tmp_path, dict.fromkeys("ab", ((2,), torch.float32)), iter(tensors))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_legacy_bin_is_read(tmp_path: Path, dtype: torch.dtype, zipped: bool) -> None:
    wanted = state(0, dtype)
    torch.save(wanted, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    assert same(read_all(Checkpoint(tmp_path)), wanted)


@pytest.mark.parametrize("wrapper", ["state_dict", "model_state_dict"])
def test_a_wrapped_state_dict_is_unwrapped(tmp_path: Path, wrapper: str) -> None:
    wanted = state(0)
    torch.save({"epoch": 3, wrapper: wanted}, tmp_path / "weights.pt")
    assert same(read_all(Checkpoint(tmp_path / "weights.pt")), wanted)


class Payload:
    """Runs code when it is unpickled the unsafe way."""

    def __init__(self, flag: Path) -> None:
        self.flag = flag

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.flag),)


def test_a_pickle_with_code_is_refused_without_running_it(tmp_path: Path) -> None:
    folder = save_bin(tmp_path / "evil", {"w": torch.ones(2), "x": Payload(tmp_path / "ran")})
    with pytest.raises(CheckpointError, match="needs to run code") as caught:
        Checkpoint(folder)
    assert not (tmp_path / "ran").exists()
    assert "save_file" in str(caught.value)
    assert str(folder) in str(caught.value)


def test_a_bin_that_is_no_state_dict_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a state dict"):
        Checkpoint(save_bin(tmp_path / "a", {"w": torch.ones(2), "step": 3}))


@given(st.binary(max_size=60), st.sampled_from(["model.safetensors", "pytorch_model.bin", "x.pt"]),
       st.sampled_from([b"", b"PK\x03\x04", b"\x80\x02", (8).to_bytes(8, "little")]))  # fmt: skip
def test_random_bytes_are_refused_as_a_checkpoint_error(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, name: str, start: bytes
) -> None:
    file = tmp_path_factory.mktemp("noise") / name
    file.write_bytes(start + content)
    with pytest.raises(CheckpointError, match=name):
        Checkpoint(file)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_refused(tmp_path: Path, kind: str, share: float) -> None:
    folder = save(tmp_path / "a", state(0)) if kind == "safetensors" else save_bin(tmp_path / "a", state(0))
    (file,) = folder.iterdir()
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    with pytest.raises(CheckpointError, match=file.name):
        Checkpoint(folder)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = save_shards(tmp_path / "a", state(0), 3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match="1 of 3") as caught:
        Checkpoint(folder)
    assert "model-00002-of-00003.safetensors" in str(caught.value)


def test_a_tensor_that_its_shard_lacks_is_named(tmp_path: Path) -> None:
    folder = save_shards(tmp_path / "a", state(0), 2)
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    write_index(folder, {**index, "ghost.weight": "model-00001-of-00002.safetensors"})
    with pytest.raises(CheckpointError, match=r"ghost\.weight: not in model-00001-of-00002\.safetensors"):
        Checkpoint(folder)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    folder = save_shards(tmp_path / "a", state(0), 2)
    shards = sorted(folder.glob("*.safetensors"))
    first = load_file(shards[0])
    save_file({**load_file(shards[1]), **first}, shards[1])
    with pytest.raises(CheckpointError, match="also in") as caught:
        Checkpoint(folder)
    assert all(str(shard) in str(caught.value) for shard in shards)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": 3}', '{"weight_map": {"w": 1}}',
                                     '{"weight_map": {"w": ["a"]}}', "\x00"])  # fmt: skip
def test_a_damaged_index_is_refused(tmp_path: Path, content: str) -> None:
    folder = save_shards(tmp_path / "a", state(0), 2)
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        Checkpoint(folder)


def test_several_weight_files_without_index_are_refused(tmp_path: Path) -> None:
    folder = save_shards(tmp_path / "a", state(0), 2)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match="several weights files and no index"):
        Checkpoint(folder)
    assert Checkpoint(folder / "model-00001-of-00002.safetensors").tensors


@pytest.mark.parametrize("make", [lambda p: p / "none", lambda p: p, lambda p: p / "notes.txt"])
def test_what_holds_no_weights_is_refused(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(CheckpointError, match=str(make(tmp_path))):
        Checkpoint(make(tmp_path))


def test_a_damaged_config_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path / "a", state(0))
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        Checkpoint(folder)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_value_that_is_no_number_is_refused_with_key_and_file(
    tmp_path: Path, dtype: torch.dtype, value: float
) -> None:
    bad = state(0, dtype)
    bad["norm.weight"][3] = value
    source = Checkpoint(save(tmp_path / "a", bad))
    with pytest.raises(CheckpointError, match=r"norm\.weight.* 1 NaN or infinite value") as caught:
        Member(source, {"norm.weight": "norm.weight"}).read("norm.weight")
    assert str(tmp_path / "a" / "model.safetensors") in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64])
def test_finite_values_pass_even_when_their_sum_overflows(dtype: torch.dtype) -> None:
    top = torch.finfo(dtype).max if dtype.is_floating_point else torch.iinfo(dtype).max
    tensor = torch.full((9,), top, dtype=dtype)
    assert check_finite(tensor, "w", "f") is tensor
    assert check_finite(torch.zeros(0, dtype=dtype), "w", "f").numel() == 0


def test_tied_weights_of_a_bin_are_aliases(tmp_path: Path) -> None:
    shared = randn(0, 4, 3)
    tied = {"wte": shared, "other": randn(1, 4, 3), "lm_head": shared, "part": shared[:2]}
    for source in (Checkpoint(save_bin(tmp_path / "a", tied)), MemorySource(tied, "memory")):
        assert source.aliases == {"lm_head": "wte"}
        assert torch.equal(source.read("lm_head"), shared)


def test_hashes_change_with_the_bytes_alone(tmp_path: Path) -> None:
    first = Checkpoint(save(tmp_path / "a", state(0), {"x": 1})).sha256()
    assert first == Checkpoint(save(tmp_path / "b", state(0), {"x": 1})).sha256()
    other = Checkpoint(save(tmp_path / "c", state(1), {"x": 1})).sha256()
    assert first["config.json"] == other["config.json"]
    assert first["model.safetensors"] != other["model.safetensors"]


def resident(file: Path) -> int:
    """Bytes of a file that are resident in this process."""
    total, of_file = 0, False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        first = line.split(maxsplit=1)[0]
        if not first.endswith(":"):
            of_file = line.endswith(str(file))
        elif of_file and first == "Rss:":
            total += 1024 * int(line.split()[1])
    return total


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="Linux tells what is resident")
def test_pages_of_a_file_that_were_read_are_let_go(tmp_path: Path) -> None:
    tensors = {f"t{number}": randn(number, 512, 512) for number in range(12)}  # a megabyte each
    file = tmp_path / "model.safetensors"
    save_file(tensors, file)
    mapped = MappedFile(file, open_safetensors(file), mapped_bytes=2**20)
    kept = mapped.get_tensor("t0")
    assert all(identical(mapped.get_tensor(name), tensor) for name, tensor in tensors.items())
    assert resident(file) < 6 * 2**20  # all of it would be twelve
    assert identical(kept, tensors["t0"])


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": randn(0, 8, 8)}, file)
    mapped = MappedFile(file, open_safetensors(file), mapped_bytes=1)
    before = mapped.get_tensor("a").clone()
    save_file({"a": randn(1, 8, 8)}, tmp_path / "other")
    os.replace(tmp_path / "other", file)
    with pytest.raises(CheckpointError, match="changed while it was read"):
        mapped.get_tensor("a")
    assert identical(before, randn(0, 8, 8))
