"""Folders that torch.distributed.checkpoint wrote are read as what was saved, without running code, by tensors and their parts."""

from __future__ import annotations

import os
import pickle
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

import adarank
import text_zoo
from adarank.cli.main import main
from adarank.errors import CheckpointError
from adarank.io.checkpoint import Checkpoint

pytestmark = pytest.mark.filterwarnings("ignore")  # of PyTorch, about a save without process groups
SHARDED = """
import os, sys, torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, Replicate, distribute_tensor
dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
whole = {"rows": torch.arange(35.).reshape(5, 7), "columns": torch.arange(12.).reshape(3, 4).bfloat16(), "all": torch.arange(3)}
places = {"rows": Shard(0), "columns": Shard(1), "all": Replicate()}
state = {name: distribute_tensor(tensor, mesh, [places[name]]) for name, tensor in whole.items()}
dcp.save({"model": state}, checkpoint_id=sys.argv[1])
dist.barrier()
os._exit(0)  # gloo's threads may end the interpreter badly as it shuts down
"""


def state_of(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "model.a.weight": torch.randn(6, 5, generator=generator),
        "model.turned.weight": torch.randn(4, 3, generator=generator).T,
        "model.view.bias": torch.randn(9, generator=generator)[2:6],
        "half": torch.randn(7, generator=generator).bfloat16(),
        "count": torch.tensor(3),
    }


def saved(state: Any, folder: Path) -> Path:
    dcp.save(state, checkpoint_id=str(folder))
    return folder


def all_of(folder: Path) -> dict[str, Tensor]:
    read = Checkpoint(folder)
    return {name: read.read(name) for name in read.tensors}


def same(read: Checkpoint, state: dict[str, Tensor]) -> bool:
    return set(read.tensors) == set(state) and all(
        torch.equal(read.read(n), t) and read.read(n).dtype == t.dtype == read.tensors[n].dtype
        for n, t in state.items()
    )


def test_a_state_dict_is_read_as_it_was_saved(tmp_path: Path) -> None:
    read = Checkpoint(saved(state_of(), tmp_path / "plain"))
    assert same(read, state_of())
    assert not read.unused
    assert not read.in_place
    assert set(read.sha256()) == {".metadata", "__0_0.distcp"}


def test_of_a_training_state_the_model_alone_is_read(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    optimiser = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimiser.step()
    whole = {"model": state_of(), "optim": optimiser.state_dict(), "step": 7}
    read = Checkpoint(saved(whole, tmp_path / "training"))
    assert same(read, state_of())
    assert {key.split(":")[0] for key in read.unused} == {"optim", "step"}


def test_merges_of_it_are_those_of_safetensors(tmp_path: Path) -> None:
    for number, name in enumerate(("base", "one", "two")):
        saved(state_of(number), tmp_path / name)
        adarank.convert(tmp_path / name, tmp_path / f"dense-{name}")
        assert same(Checkpoint(tmp_path / f"dense-{name}"), state_of(number))
    outputs = []
    for prefix in ("", "dense-"):
        models = [{"model": str(tmp_path / f"{prefix}{name}")} for name in ("one", "two")]
        given = {"merge_method": "task_arithmetic", "base_model": str(tmp_path / f"{prefix}base"), "models": models}
        adarank.merge_recipe(given, tmp_path / f"{prefix}out")
        outputs.append(tmp_path / f"{prefix}out")
    assert same(Checkpoint(outputs[0]), all_of(outputs[1]))


def network_of(recipe: Path) -> dict[str, Tensor]:
    job = adarank.open_job(adarank.load_recipe(recipe))
    assert job.family is not None
    return job.family.load(job.experts["mood"]).state_dict()


def test_networks_are_loaded_from_it(tmp_path: Path) -> None:
    recipe = text_zoo.recipe(text_zoo.make_zoo(tmp_path), merge_method="average")
    wanted, folder = network_of(recipe), tmp_path / "models" / "mood"
    state = {name: tensor.clone() for name, tensor in all_of(folder).items()}
    (folder / "model.safetensors").unlink()
    saved(state, folder)
    loaded = network_of(recipe)
    assert set(loaded) == set(wanted)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in wanted.items())


def test_shards_of_several_processes_are_put_together(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    command = [sys.executable, "-c", SHARDED, str(tmp_path / "sharded")]
    started = [subprocess.Popen(command, env={**os.environ, **place, "RANK": str(rank)}) for rank in range(2)]
    assert [process.wait() for process in started] == [0, 0]
    whole = {"rows": torch.arange(35.0).reshape(5, 7), "columns": torch.arange(12.0).reshape(3, 4).bfloat16()}
    assert same(Checkpoint(tmp_path / "sharded"), {**whole, "all": torch.arange(3)})
    (tmp_path / "sharded" / "__1_0.distcp").unlink()
    with pytest.raises(CheckpointError, match=r"'?rows: __1_0.distcp lacks it.*of every rank"):
        Checkpoint(tmp_path / "sharded")


class Runs:
    def __reduce__(self) -> Any:
        return os.mkdir, ("ran",)


def test_what_a_pickle_asks_to_run_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = saved(state_of(), tmp_path / "hostile")
    (folder / ".metadata").write_bytes(pickle.dumps(Runs()))
    with pytest.raises(CheckpointError, match="no 'state_dict_metadata'"):
        Checkpoint(folder)
    assert not Path("ran").exists()


@pytest.mark.parametrize("damage", ["cut", "bits", "metadata", "another"])
def test_a_damaged_checkpoint_is_refused_in_a_sentence(tmp_path: Path, damage: str) -> None:
    folder = saved(state_of(), tmp_path / "damaged")
    parts = folder / "__0_0.distcp"
    content = parts.read_bytes()
    if damage == "cut":
        parts.write_bytes(content[:-200])
    elif damage == "bits":
        place = content.index(state_of()["model.a.weight"].numpy().tobytes())
        parts.write_bytes(content[:place] + b"\x01" + content[place + 1 :])
    elif damage == "metadata":
        (folder / ".metadata").write_bytes((folder / ".metadata").read_bytes()[:-30])
    else:
        other = saved({"x": torch.zeros(1000)}, tmp_path / "other")
        shutil.copy(other / "__0_0.distcp", parts)
    with pytest.raises(CheckpointError, match=r"damaged|lacks it"):
        all_of(folder)


def test_convert_says_what_it_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = saved({"model": state_of(), "step": 7}, tmp_path / "training")
    (folder / "config.json").write_text('{"architectures": ["Tiny"]}')
    assert main(["convert", str(folder), str(tmp_path / "out")]) == 0
    assert "Tiny, 5 tensors" in " ".join(capsys.readouterr().out.split())
    assert Checkpoint(tmp_path / "out").config == {"architectures": ["Tiny"]}
    assert "step" in (tmp_path / "out" / "adarank.json").read_text()
