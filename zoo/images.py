"""Read the image sets, split them, and bring images to the shape the models take."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from stages import seed_for
from tasks import Size, Task

SIDE = 28
PREPROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"height": SIDE, "width": SIDE},
    "resample": 2,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


@dataclass(frozen=True)
class TaskImages:
    """One task's training data on the device: uint8 images (n, 3, SIDE, SIDE) and int64 labels."""

    train: Tensor
    train_labels: Tensor
    validation: Tensor
    validation_labels: Tensor
    class_names: tuple[str, ...]


def resize(images: np.ndarray) -> np.ndarray:
    """Images as the shipped preprocessor resizes them: uint8 (n, 3, SIDE, SIDE)."""
    if images.shape[1:3] != (SIDE, SIDE):
        small = [Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BILINEAR) for image in images]
        images = np.stack([np.asarray(image) for image in small])
    if images.ndim == 3:  # gray: resizing first and repeating after gives the same and is quicker
        return np.repeat(images[:, None], 3, axis=1)
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2))


def to_input(images: Tensor) -> Tensor:
    """uint8 pixels as model inputs from -1 to 1, as the shipped preprocessor scales them."""
    return images.float() / 127.5 - 1


def load_training(task: Task, data: Path, size: Size, seed: int, device: torch.device) -> TaskImages:
    """The train part of one task; the last tenth of a seeded shuffle is its validation set."""
    with np.load(data / f"{task.name}.npz") as file:
        images, labels = file["train_x"], file["train_y"]
        names = tuple(str(name) for name in file["class_names"])
    order = np.random.default_rng(seed_for(seed, "train", task.name)).permutation(len(images))
    if size.train_limit:
        order = order[: size.train_limit]
    pixels = torch.from_numpy(resize(images[order])).to(device)
    targets = torch.from_numpy(labels[order]).to(device)
    kept = len(order) - len(order) // 10
    return TaskImages(pixels[:kept], targets[:kept], pixels[kept:], targets[kept:], names)


def write_splits(task: Task, data: Path, folder: Path, size: Size, seed: int) -> dict[str, int]:
    """Split one task's test part into `folder`; returns the counts for the data card."""
    with np.load(data / f"{task.name}.npz") as file:
        train, images, labels, names = file["train_x"], file["test_x"], file["test_y"], file["class_names"]
    known = {image.tobytes() for image in train}
    fresh = np.array([i for i, image in enumerate(images) if image.tobytes() not in known])
    order = np.random.default_rng(seed_for(seed, "test", task.name)).permutation(fresh)
    first, second = size.adapt, size.adapt + size.select
    last = second + (size.test_colour if task.colour else size.test_gray)
    adapt, select, test = order[:first], order[first:second], order[second:last]
    np.savez_compressed(folder / "adapt.npz", image=images[adapt])
    np.savez_compressed(folder / "select.npz", image=images[select], label=labels[select])
    np.savez_compressed(folder / "test.npz", image=images[test], label=labels[test])
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    return {
        "source_train": len(train),
        "source_test": len(images),
        "duplicates_dropped": len(images) - len(fresh),
        "adapt": len(adapt),
        "select": len(select),
        "test": len(test),
        "classes": len(names),
    }


def load_split(path: Path, device: torch.device) -> tuple[Tensor, Tensor]:
    """Images and labels of a written split, prepared as the model takes them."""
    with np.load(path) as file:
        images, labels = file["image"], file["label"]
    return torch.from_numpy(resize(images)).to(device), torch.from_numpy(labels).to(device)
