"""The Vision Transformer: making it, measuring it, writing and reading its folders."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import ViTConfig, ViTForImageClassification, ViTModel
from transformers.utils import logging as transformers_logging

from images import PREPROCESSOR, SIDE, to_input
from stages import write_json
from tasks import Size

transformers_logging.disable_progress_bar()
transformers_logging.set_verbosity_error()  # reading only the body of an expert is meant

State = dict[str, Tensor]
Head = tuple[Tensor, Tensor]  # weight (classes, hidden) and bias (classes)


def make_config(size: Size, class_names: tuple[str, ...] = ()) -> ViTConfig:
    """The model's configuration, with a task's labels where it has a head."""
    labels: dict[str, object] = {}
    if class_names:
        labels["id2label"] = dict(enumerate(class_names))
        labels["label2id"] = {name: i for i, name in enumerate(class_names)}
    return ViTConfig(
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        intermediate_size=4 * size.hidden,
        image_size=SIDE,
        patch_size=size.patch,
        **labels,
    )


def new_body(size: Size) -> ViTModel:
    """A body with random weights, drawn from torch's global generator."""
    return ViTModel(make_config(size), add_pooling_layer=False)


def load_body(folder: Path, device: torch.device) -> ViTModel:
    """The body of a written base or expert, in float32."""
    body = ViTModel.from_pretrained(folder, add_pooling_layer=False, dtype=torch.float32)
    return body.to(device)


def rounded(tensor: Tensor) -> Tensor:
    """The value a tensor has after being written as bfloat16."""
    return tensor.detach().to(torch.bfloat16).float()


def save_base(body: ViTModel, folder: Path, size: Size) -> None:
    """Write the body alone, under the key names it has inside a classifier."""
    whole = ViTForImageClassification(make_config(size))
    whole.vit.load_state_dict(body.state_dict())
    whole = whole.to(torch.bfloat16)
    state = {key: value for key, value in whole.state_dict().items() if key.startswith("vit.")}
    whole.save_pretrained(folder, state_dict=state)
    # The saver names the class it was given, but this folder has no head.
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["architectures"] = ["ViTModel"]
    write_json(folder / "config.json", config)
    write_json(folder / "preprocessor_config.json", PREPROCESSOR)


def save_expert(body: ViTModel, head: Head, class_names: tuple[str, ...], folder: Path, size: Size) -> None:
    """Write a body and its task's head as an ordinary image classifier."""
    whole = ViTForImageClassification(make_config(size, class_names))
    whole.vit.load_state_dict(body.state_dict())
    whole.classifier.load_state_dict({"weight": head[0], "bias": head[1]})
    whole.to(torch.bfloat16).save_pretrained(folder)
    write_json(folder / "preprocessor_config.json", PREPROCESSOR)


@torch.no_grad()
def accuracy(body: ViTModel, head: Head, images: Tensor, labels: Tensor) -> float:
    """Share of `images` (uint8) that the body and head classify right."""
    body.eval()
    right = 0
    for start in range(0, len(images), 500):
        features = body(to_input(images[start : start + 500])).last_hidden_state[:, 0].float()
        right += int((F.linear(features, *head).argmax(1) == labels[start : start + 500]).sum())
    return right / len(images)
