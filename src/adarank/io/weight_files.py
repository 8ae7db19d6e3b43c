"""Which files of a folder hold a model's weights."""

from __future__ import annotations

from pathlib import Path, PureWindowsPath

from adarank.errors import CheckpointError, itemise
from adarank.io.distributed import METADATA, is_distributed
from adarank.io.files import read_json
from adarank.io.hub import local_path
from adarank.io.pickled import LEGACY
from adarank.io.quantised import DEQUANTISE, quantised_file


def weight_files(path: Path) -> list[Path]:
    """The weights files of a checkpoint, safetensors before legacy formats."""
    if not path.exists():
        raise CheckpointError(f"{path}: no such checkpoint. Give a folder in Hugging Face layout or a weights file.")
    if path.is_file():
        if kind := quantised_file(path):
            raise CheckpointError(f"{path}: quantised ({kind}). {DEQUANTISE}")
        if path.suffix not in (*LEGACY, ".safetensors"):
            raise CheckpointError(f"{path}: not a weights file. Give .safetensors, .bin, .pt or .pth, or the folder.")
        return [path]
    if not path.is_dir():
        raise CheckpointError(
            f"{path}: neither a file nor a folder. Give a folder in Hugging Face layout or a weights file."
        )
    if is_distributed(path):
        return [path / METADATA]
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        if (path / f"{stem}.{suffix}.index.json").exists():
            return _shards(path / f"{stem}.{suffix}.index.json")
        if (path / f"{stem}.{suffix}").exists():
            return [path / f"{stem}.{suffix}"]
    if (path / "adapter_config.json").exists():
        raise CheckpointError(
            f"{path}: an adapter (adapter_config.json) without the model that it changes. Give 'MODEL+ADAPTER', or the model as base_model of a recipe."
        )
    kinds = {kind for file in path.iterdir() if (kind := quantised_file(file))}
    if kinds:
        raise CheckpointError(f"{path}: quantised ({', '.join(sorted(kinds))}). {DEQUANTISE}")
    files = sorted(f for f in path.iterdir() if f.suffix in (".safetensors", *LEGACY) and f.name != "training_args.bin")
    if len(files) == 1:
        return files
    if not files:
        inside = sorted(
            f.parent.name
            for f in (*path.glob("*/model.safetensors"), *path.glob("*/pytorch_model.bin"), *path.glob(f"*/{METADATA}"))
        )
        if inside:
            raise CheckpointError(f"{path}: no weights, but in folders inside: {', '.join(inside)}. Give that folder.")
        raise CheckpointError(
            f"{path}: no weights. Needed: model.safetensors, its sharded form with model.safetensors.index.json, or pytorch_model.bin."
        )
    names = ", ".join(f.name for f in files)
    raise CheckpointError(
        f"{path}: several weights files and no index ({names}). Give one of the files instead of the folder."
    )


def weight_map_of(index: Path) -> dict[str, str]:
    """Tensor -> the file of its folder that holds it, as an index of shards says.

    Raises:
        CheckpointError: it says no such thing, or leads out of the folder.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(f, str) for f in weight_map.values()):
        raise CheckpointError(f"{index}: no 'weight_map' in the shard index. Download it again.")
    outside = sorted({name for name in weight_map.values() if leads_out(name)})
    if outside:
        names = ", ".join(map(repr, outside[:3]))
        raise CheckpointError(f"{index}: names files outside of its folder ({names}). Download it again.")
    return weight_map


def _shards(index: Path) -> list[Path]:
    weight_map = weight_map_of(index)
    shards = [index.parent / name for name in sorted(set(weight_map.values()))]
    lost = [str(shard) for shard in shards if not local_path(shard).is_file()]
    if lost:
        raise CheckpointError(
            itemise(f"{index}: {len(lost)} of {len(shards)} shard(s) missing:", lost, "Download them.")
        )
    return shards


def leads_out(name: str) -> bool:
    """True if a name that a file gives of another one beside it leads out of their folder."""
    parts = name.replace("\\", "/").split("/")
    return ".." in parts or name == "" or parts[0] == "" or PureWindowsPath(name).drive != "" or "\0" in name
