"""A tiny CLIP with fine-tuned image towers, made in a folder: base, experts in any of the forms they are stored in, data, recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import yaml

from image_zoo import processor

CLASSES = {"digits": ("zero", "one"), "shapes": ("red square", "blue circle", "dog")}
WORDS = "a photo of zero one red square blue circle dog drawing the .".split()  # noqa: SIM905 (a list of words)
FORMS = ("CLIPVisionModel", "CLIPVisionModelWithProjection", "CLIPModel")
_TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def make_zoo(folder: Path, form: str = "CLIPVisionModel", projected: bool = False) -> Path:
    """Write models/ and data/, the data as npz; returns `folder`.

    Arguments:
        form: the class that experts are saved as.
        projected: fine-tuning moved the projection too.
    """
    torch.manual_seed(0)
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    text = {**_TOWER, "vocab_size": len(vocabulary), "max_position_embeddings": 12, "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0, "projection_dim": 8}  # fmt: skip
    vision = {**_TOWER, "image_size": 16, "patch_size": 8, "projection_dim": 8}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    base = transformers.CLIPModel(config).eval()
    _stir(base, 0.2)
    base.save_pretrained(folder / "models" / "base")
    transformers.BertTokenizerFast(vocab=vocabulary, model_max_length=12).save_pretrained(folder / "models" / "base")
    processor().save_pretrained(folder / "models" / "base")
    for number, (task, classes) in enumerate(CLASSES.items(), start=1):
        expert = transformers.CLIPModel(config).eval()
        expert.load_state_dict(base.state_dict())
        _stir(expert.vision_model, 0.1)
        if projected:
            _stir(expert.visual_projection, 0.1)
        _as(form, expert, config).save_pretrained(folder / "models" / task)
        rng = np.random.default_rng(number)
        (folder / "data").mkdir(exist_ok=True)
        images = rng.integers(0, 256, (60, 16, 16, 3), dtype=np.uint8)
        np.savez(folder / "data" / f"{task}.npz", image=images, label=rng.integers(0, len(classes), 60))
    return folder


def recipe(folder: Path, name: str = "recipe.yaml", tasks: dict[str, dict[str, Any]] | None = None, **changes: Any) -> Path:  # fmt: skip
    """A recipe over the zoo, with keys replaced or (None) removed, and keys of all tasks or (by task) of one."""
    models = []
    for task, classes in CLASSES.items():
        own = {"name": task, "data": f"data/{task}.npz", "classes": list(classes), **(tasks or {}).get(task, {})}
        models.append({"model": f"models/{task}", "task": {key: value for key, value in own.items() if value is not None}})  # fmt: skip
    values = {"merge_method": "cart", "base_model": "models/base", "models": models, "device": "cpu", **changes}
    path = folder / name
    path.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None}))
    return path


def whole(folder: Path, model: str, vision: dict[str, torch.Tensor] | None = None) -> Any:
    """A whole CLIP: the base's with the image tower of another model, or with these tensors in place of its own."""
    found = transformers.CLIPModel.from_pretrained(folder / "models" / "base").eval()
    if vision is None and model != "base":
        tower = transformers.CLIPVisionModelWithProjection.from_pretrained(folder / "models" / model)
        vision = {f"vision_model.{name}": own for name, own in tower.vision_model.state_dict().items()}
    found.load_state_dict({**found.state_dict(), **(vision or {})})
    return found


def _as(form: str, expert: Any, config: Any) -> Any:
    """What of a CLIP is saved as another class."""
    if form == "CLIPModel":
        return expert
    with torch.random.fork_rng():  # the same towers in any form
        made = getattr(transformers, form)(config.vision_config)
    if form == "CLIPVisionModel":
        getattr(made, "vision_model", made).load_state_dict(expert.vision_model.state_dict())  # by version
        return made
    made.vision_model.load_state_dict(expert.vision_model.state_dict())
    made.visual_projection.load_state_dict(expert.visual_projection.state_dict())
    return made


@torch.no_grad()
def _stir(model: torch.nn.Module, spread: float) -> None:
    for tensor in model.parameters():
        tensor.add_(spread * torch.randn_like(tensor))
