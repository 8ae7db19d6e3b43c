"""Tiny image classifiers of several architectures, made in a folder: base, experts with heads and processors, data, recipe."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import yaml
from numpy.typing import NDArray
from PIL import Image

TASKS = {"digits": 2, "shapes": 3}
SIZE = 16
_ATTENTION = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "image_size": SIZE, "patch_size": 8}  # fmt: skip
_SMALL: Mapping[str, Mapping[str, Any]] = {
    "vit": _ATTENTION,
    "deit": _ATTENTION,
    "dinov2": {**_ATTENTION, "mlp_ratio": 2},
    "convnext": {"num_stages": 2, "hidden_sizes": [8, 16], "depths": [1, 1], "patch_size": 4},
    "resnet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
    "swin": {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2, "patch_size": 4, "image_size": SIZE},
}  # fmt: skip
HEADS = {
    "vit": "ViTForImageClassification",
    "deit": "DeiTForImageClassification",
    "dinov2": "Dinov2ForImageClassification",
    "convnext": "ConvNextForImageClassification",
    "resnet": "ResNetForImageClassification",
    "swin": "SwinForImageClassification",
}
ADAPT: Mapping[str, Any] = {
    "merge_method": "adarank",
    "parameters": {"rank": 0.25, "lambda": 1.0},
    "adapt": {"steps": 8, "batch_size": 4, "lr_masks": 0.05, "lr_lambda": 0.02, "check_every": 2},
}


def make_zoo(
    folder: Path, architecture: str = "vit", bare_base: bool = True, channels: int = 3, head: str | None = None
) -> Path:
    """Write models/ and data/, the data as npz; returns `folder`.

    Arguments:
        bare_base: the base is a body alone, so its tensors lack the prefix that the experts' have.
        head: the experts' class, where it is not the usual one.
    """
    torch.manual_seed(0)
    base = _model(architecture, 5, channels, None)
    body = getattr(base, base.base_model_prefix)
    _stir(base, 0.1)
    (body if bare_base else base).save_pretrained(folder / "models" / "base")
    for number, (task, classes) in enumerate(TASKS.items(), start=1):
        expert = _model(architecture, classes, channels, head, task)
        getattr(expert, expert.base_model_prefix).load_state_dict(body.state_dict(), strict=False)
        _stir(expert, 0.05)
        expert.save_pretrained(folder / "models" / task)
        processor(channels).save_pretrained(folder / "models" / task)
        shape = (60, SIZE, SIZE) if channels == 1 else (60, SIZE, SIZE, channels)
        rng = np.random.default_rng(number)
        (folder / "data").mkdir(exist_ok=True)
        images = rng.integers(0, 256, shape, dtype=np.uint8)
        np.savez(folder / "data" / f"{task}.npz", image=images, label=rng.integers(0, classes, 60))
    return folder


def processor(channels: int = 3, **changes: Any) -> Any:
    """A processor whose settings are no class's defaults."""
    settings = {
        "size": {"height": SIZE, "width": SIZE},
        "image_mean": [0.3, 0.4, 0.6][:channels],
        "image_std": [0.2, 0.3, 0.5][:channels],
        **changes,
    }
    return transformers.ViTImageProcessor(**settings)


def recipe(folder: Path, name: str = "recipe.yaml", **changes: Any) -> Path:
    """A recipe over the zoo, with keys replaced or (None) removed."""
    values: dict[str, Any] = {
        "merge_method": "cart",
        "base_model": "models/base",
        "models": [expert(task) for task in TASKS],
        "device": "cpu",
        **changes,
    }
    path = folder / name
    path.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None}))
    return path


def expert(task: str, **changes: Any) -> dict[str, Any]:
    """One entry of a recipe's models."""
    given = {"name": task, "kind": "image-classification", "data": f"data/{task}.npz", **changes}
    return {"model": f"models/{task}", "task": {key: value for key, value in given.items() if value is not None}}


def pictures(count: int, seed: int = 0, shape: tuple[int, ...] = (12, 20, 3)) -> list[NDArray[np.uint8]]:
    """Noise images, none of them square, so that height and width cannot be taken for each other."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, shape, dtype=np.uint8) for _ in range(count)]


def image_folder(path: Path, images: list[NDArray[np.uint8]], classes: list[str]) -> Path:
    """PNGs, one sub-folder a class; names keep the images' order within a class."""
    for number, (image, label) in enumerate(zip(images, classes, strict=True)):
        (path / label).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path / label / f"{number:03d}.png")
    return path


def _model(architecture: str, classes: int, channels: int, head: str | None, task: str = "base") -> Any:
    labels = {i: f"{task}-{i}" for i in range(classes)}
    named = {"id2label": labels, "label2id": {v: k for k, v in labels.items()}, "num_channels": channels}
    kind = getattr(transformers, head or HEADS[architecture])
    return kind(transformers.AutoConfig.for_model(architecture, **_SMALL[architecture], **named)).eval()


@torch.no_grad()
def _stir(model: Any, spread: float) -> None:
    """Move every float, tensors that start at zero or one too; variances stay positive."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point():
            noise = spread * torch.randn_like(tensor)
            tensor.add_(noise.abs() if "running_var" in name else noise)
