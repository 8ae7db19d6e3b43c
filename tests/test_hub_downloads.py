"""What is brought from the hub, by a fake of its client: one set of weights and what goes along with it."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.utils import filter_repo_objects

from adarank.errors import CheckpointError
from adarank.io.hub import resolve
from adarank.io.hub_files import used_files

BESIDE = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
          "README.md"]  # fmt: skip
CLUTTER = ["modeling_x.py", "training_args.bin", "optimizer.pt", "optimizer.bin", "scheduler.pt", "trainer_state.json",
           "rng_state_0.pth", "openvino/openvino_model.bin", "onnx/model.onnx", "onnx/config.json", "tf_model.h5", ".gitattributes"]  # fmt: skip
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
WEIGHTS: dict[str, tuple[list[str], list[str]]] = {
    "both formats": (["model.safetensors", "pytorch_model.bin"], ["model.safetensors"]),
    "shards of both": (
        [*SHARDS, "pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json", "consolidated.safetensors"],
        SHARDS,
    ),
    "legacy alone": (["pytorch_model.bin", "other.bin"], ["pytorch_model.bin"]),
    "one of another name": (["weights.safetensors", "pytorch_model.bin"], ["weights.safetensors"]),
    "an adapter": (["adapter_model.safetensors", "adapter_config.json"], ["adapter_model.safetensors", "adapter_config.json"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("folder", ["", "sub", "deep/er"])
def test_one_set_of_weights_is_used_and_no_clutter(kind: str, folder: str) -> None:
    weights, wanted = WEIGHTS[kind]
    place = f"{folder}/" if folder else ""
    names = [place + name for name in [*CLUTTER, *weights, *BESIDE]]
    others = ["elsewhere/model.safetensors", *(["model.safetensors", "config.json"] if folder else [])]
    assert sorted(used_files([*names, *others], folder)) == sorted(place + name for name in [*wanted, *BESIDE])


def test_an_adapters_files_are_used_without_the_model_beside_it() -> None:
    adapter = ["adapter_model.safetensors", "adapter_config.json"]
    names = [*CLUTTER, *SHARDS, *adapter, *BESIDE, "adapter_model.bin", "checkpoint-9/adapter_model.safetensors"]
    assert sorted(used_files(names, adapter=True)) == sorted([*adapter, *BESIDE])
    assert not set(adapter[:1]) & set(used_files(names))


def test_modules_of_sentence_encoders_are_used() -> None:
    modules = ["1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors"]
    names = ["modules.json", "config.json", "model.safetensors", *modules]
    clutter = ["2_Dense/pytorch_model.bin", "onnx/model.onnx"]
    assert sorted(used_files([*names, *clutter])) == sorted(names)
    assert not set(modules) & set(used_files([name for name in names if name != "modules.json"]))


class Hub:
    """A repository: its list of files, and downloads as the client makes them."""

    def __init__(self, names: list[str], root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names, self.root, self.revisions = names, root, set[str | None]()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda _, name, revision: self.listed(revision))
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.download)

    def listed(self, revision: str | None) -> list[str]:
        self.revisions.add(revision)
        return self.names

    def download(self, name: str, revision: str | None, allow_patterns: list[str]) -> str:
        assert name == "org/name"
        self.revisions.add(revision)
        for file in filter_repo_objects(self.names, allow_patterns=allow_patterns):
            (self.root / file).parent.mkdir(parents=True, exist_ok=True)
            (self.root / file).write_text("")
        return str(self.root)

    def brought(self) -> list[str]:
        return sorted(file.relative_to(self.root).as_posix() for file in self.root.rglob("*") if file.is_file())


NAMES = [*CLUTTER, *BESIDE, "model.safetensors", "pytorch_model.bin", "sub/config.json", "sub/model[1].safetensors"]


def test_templates_are_brought_and_second_weights_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(NAMES, tmp_path, monkeypatch)
    assert resolve("org/name@v2") == tmp_path
    assert hub.brought() == sorted([*BESIDE, "model.safetensors"])
    assert hub.revisions == {"v2"}


def test_of_an_adapter_its_files_are_brought_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = ["adapter_model.safetensors", "adapter_config.json"]
    hub = Hub([*NAMES, *adapter], tmp_path, monkeypatch)
    assert resolve("org/name@v2", adapter=True) == tmp_path
    assert hub.brought() == sorted([*BESIDE, *adapter])


def test_a_folder_of_a_repository_is_brought_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(NAMES, tmp_path, monkeypatch)
    assert resolve("org/name/sub@refs/pr/1") == tmp_path / "sub"
    assert hub.brought() == ["sub/config.json", "sub/model[1].safetensors"]
    assert hub.revisions == {"refs/pr/1"}
    with pytest.raises(CheckpointError, match="has no folder 'missing'"):
        resolve("org/name/missing")


def test_a_cache_serves_where_the_hub_lists_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(NAMES, tmp_path, monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve("org/name") == tmp_path
    assert {"chat_template.jinja", "model.safetensors"} <= set(hub.brought())
    assert not any(name.endswith(".py") for name in hub.brought())
