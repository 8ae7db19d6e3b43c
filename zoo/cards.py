"""The two cards that go with the zoo, written from its manifest and the table of tasks."""

from __future__ import annotations

from typing import Any

from images import SIDE
from tasks import BASE_POLICY, TASKS


def percent(value: float) -> str:
    """An accuracy as a percentage with one decimal."""
    return f"{100 * value:.1f}"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def accuracy_table(manifest: dict[str, Any]) -> str:
    """Per-task accuracies of base, experts and the two plain merges."""
    found = manifest["accuracy"]
    columns = [
        ("base, select", found["base"]["select"]),
        ("expert, select", found["experts"]["select"]),
        ("base, test", found["base"]["test_final_report"]),
        ("expert, test", found["experts"]["test_final_report"]),
        ("weight average, validation", found["merged_validation"]["weight_average"]),
        ("task arithmetic 0.3, validation", found["merged_validation"]["task_arithmetic_0.3"]),
    ]
    rows = [[t.name, *(percent(scores[t.name]) for _, scores in columns)] for t in TASKS]
    rows.append(["**mean**", *(percent(sum(s.values()) / len(s)) for _, s in columns)])
    return table(["task", *(title for title, _ in columns)], rows)


def model_card(manifest: dict[str, Any]) -> str:
    """The models: what they are, how they were trained, what they score, what not to use them for."""
    size, where = manifest["settings"], manifest["trained_on"]
    return f"""# demo-8: one base and eight experts for trying out model merging

Small Vision Transformers ({size["layers"]} layers, width {size["hidden"]}, {size["heads"]} heads, patches of
{size["patch"]}x{size["patch"]} on {SIDE}x{SIDE} RGB images), stored as bfloat16 safetensors in the Hugging Face
layout.

- `base/`: the body alone (`ViTModel`, no pooling layer).
- `experts/<task>/`: `ViTForImageClassification`, the body fine-tuned from the base, and the task's head.

A task's head was trained with the base and then fixed: the expert's body moved, its head did not. So a merged
body together with an expert's head classifies that task.

## Accuracy (%)

{accuracy_table(manifest)}

{manifest["accuracy_note"].capitalize()}. *Validation* is held out from the training images, *select* and
*test* are splits of the sets' own test images (DATA_CARD.md). Test serves this table and nothing
else. The two merges are there to show the zoo's difficulty; nothing was chosen by them.

The base knows all the images' features and little of their names, so the experts, whose heads are fixed, turn
features that all tasks share. Their task vectors interfere: at the coefficient 0.3, usual for eight tasks of large
pre-trained models, their sum is worse than the base.

## Training

Size `{manifest["size"]}`, seed {manifest["seed"]}, on {where["device"]}; torch {where["torch"]},
transformers {where["transformers"]}. All numbers are in `manifest.json` under `settings`.

- **Base**: {size["base_steps"]} AdamW steps (peak rate {size["base_rate"]}, warm-up and cosine decay), each on
  {size["base_named"]} images with their names, {size["base_paired"]} that are shown in two views, of which each is to
  be told from all the others' (contrast at temperature {size["heat"]}), and {size["base_masked"]} with
  {size["mask"]:.0%} of their patches hidden, which are to be filled in. All train images are seen, {size["labelled"]}
  of each class with their label. Augmentation: rotation, scale, shear, shift, brightness, contrast, tint,
  saturation, inversion ({BASE_POLICY.invert:.0%}); left-right flips for cifar10 only.
- **Experts**: {size["steps"]} AdamW steps of batch {size["batch"]} (peak rate {size["rate"]}, warm-up and cosine
  decay, weight decay {size["weight_decay"]}) on all labels, the head frozen, with milder augmentation per task.

## Use and limits

For testing and demonstrating model merging. The models are far too small and trained on far too few images to
be relied on for any recognition task, traffic signs included. The training sets' own terms (DATA_CARD.md)
apply to what is done with the models.
"""


def data_card(manifest: dict[str, Any]) -> str:
    """The data: sources, terms, counts, splits."""
    splits = manifest["splits"]
    rows = []
    for task in TASKS:
        found = splits[task.name]
        shape = "32x32x3" if task.colour else "28x28"
        counts = [str(found[key]) for key in ("classes", "source_train", "adapt", "select", "test")]
        rows.append([task.name, task.title, shape, *counts, task.source, task.terms])
    head = ["task", "what", "shape", "classes", "train", "adapt", "select", "test", "source", "its terms"]
    notes = "\n".join(f"- `{t.name}`: {t.note}" for t in TASKS if t.note)
    dropped = sum(found["duplicates_dropped"] for found in splits.values())
    unused = sum(
        s["source_test"] - s["duplicates_dropped"] - s["adapt"] - s["select"] - s["test"]
        for s in splits.values()
    )
    return f"""# The data of demo-8

{table(head, rows)}

`data/<task>/` holds three disjoint parts of the set's own test images, split by a seeded shuffle (seed
{manifest["seed"]}); the train images are not included.

- `adapt.npz`: `image` only, no labels, for methods that adapt to unlabelled inputs.
- `select.npz`: `image` and `label`, for choosing settings.
- `test.npz`: `image` and `label`, for the final figure only.
- `classes.txt`: the class names, one a line, in label order.

Images are uint8 as in the source (gray ones 28x28, to be converted to RGB and resized to {SIDE}x{SIDE} by the
preprocessor of the models). {dropped} test images equal to a train image byte for byte were dropped and
{unused} were left out to keep the files small. All files together have {manifest["data_bytes"]:,} bytes.

Training used the train images alone: the last tenth of a seeded shuffle for validation, the rest to train on.

## Notes

{notes}
- Where a source states no terms, none are granted here either: the images stay under the terms of those who
  made them.
"""
