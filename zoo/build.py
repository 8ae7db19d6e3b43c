"""Build demo-8: a small Vision Transformer base, its eight experts, and their data splits.

Four stages (splits, base, experts, save) run in order. What a stage writes appears under its
final name only when complete, and a stage whose output is there is skipped, so a build that
was cut off goes on with the same command.
"""

from __future__ import annotations

import argparse
import dataclasses
import platform
import sys
import time
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import ViTModel

from cards import data_card, model_card
from images import TaskImages, load_split, load_training, write_splits
from model import Head, State, accuracy, load_body, rounded, save_base, save_expert
from stages import begin_with, digest, publish, read_record, write_record
from tasks import SIZES, TASKS, Task
from train import BaseTrainer, train_expert

Scores = dict[str, float]


def mean(scores: Scores) -> float:
    """Mean over the tasks."""
    return sum(scores.values()) / len(scores)


class Build:
    """One build: its folders, settings, and the four stages."""

    def __init__(
        self,
        data: Path,
        out: Path,
        seed: int,
        size_name: str,
        device: torch.device,
        alone: list[str] | None = None,
    ) -> None:
        self.data, self.out, self.work, self.alone = data, out, out / "work", alone
        self.seed, self.size_name, self.size, self.device = seed, size_name, SIZES[size_name], device
        self.started = time.monotonic()

    def log(self, line: str) -> None:
        """Print a line with the time since the start."""
        print(f"[{time.monotonic() - self.started:6.1f} s] {line}", flush=True)

    @cached_property
    def sources(self) -> dict[str, str]:
        """SHA-256 of every image set read."""
        return {task.name: digest(self.data / f"{task.name}.npz") for task in TASKS}

    @cached_property
    def training(self) -> list[TaskImages]:
        """All tasks' training data, on the device."""
        loaded = [load_training(t, self.data, self.size, self.seed, self.device) for t in TASKS]
        self.log(f"loaded {sum(len(d.train) for d in loaded)} train images on {self.device}")
        return loaded

    def check_settings(self) -> None:
        """Refuse to go on with a folder that other settings or data began."""
        settings = {
            "seed": self.seed,
            "size": self.size_name,
            "numbers": dataclasses.asdict(self.size),
            "tasks": [dataclasses.asdict(task) for task in TASKS],
            "sources": self.sources,
        }
        begin_with(settings, self.work / "settings.json", self.out)

    def run(self) -> None:
        """Go through all stages."""
        self.check_settings()
        self.splits()
        self.base()
        self.experts()
        if self.alone is None:
            self.save()

    def splits(self) -> None:
        """Write each task's adapt, select and test files."""
        for task in TASKS:
            folder, record = self.out / "data" / task.name, self.work / f"split-{task.name}.json"
            if folder.is_dir() and record.is_file():
                self.log(f"splits {task.name}: there")
                continue
            counts: dict[str, int] = {}

            def fill(place: Path, task: Task = task, counts: dict[str, int] = counts) -> None:
                counts.update(write_splits(task, self.data, place, self.size, self.seed))

            publish(folder, fill)
            write_record(record, counts)
            self.log(f"splits {task.name}: {counts}")

    def base(self) -> None:
        """Train the base and all heads."""
        folder, heads = self.out / "base", self.work / "heads.safetensors"
        if folder.is_dir() and heads.is_file() and read_record(self.work / "base.json"):
            self.log("base: there")
            return
        # Once the record is gone, a cut between the writes below cannot pass as complete.
        (self.work / "base.json").unlink(missing_ok=True)
        trainer = BaseTrainer(list(TASKS), self.training, self.size, self.seed)
        trainer.train(self.log)
        tensors: State = {}
        for i, task in enumerate(TASKS):
            weight, bias = trainer.head(i)
            tensors |= {f"{task.name}.weight": weight.cpu(), f"{task.name}.bias": bias.cpu()}
        save_file(tensors, heads)
        publish(folder, lambda place: save_base(trainer.body, place, self.size))
        scores = self.validate(load_body(folder, self.device))
        content = {"validation": scores, "sha256": self.base_digest(), "trained_on": self.here()}
        write_record(self.work / "base.json", content)
        self.log(f"base: validation mean {mean(scores):.3f} {rounded_scores(scores)}")

    def here(self) -> dict[str, str]:
        """The device, and the versions of what trains on it."""
        cuda = self.device.type == "cuda"
        packages = ("torch", "transformers", "safetensors", "numpy", "pillow")
        return {
            "device": torch.cuda.get_device_name(self.device) if cuda else "cpu",
            "python": platform.python_version(),
            **{package: version(package) for package in packages},
        }

    def base_digest(self) -> str:
        """Identity of the base and its heads: experts of another one are stale."""
        return digest(self.out / "base" / "model.safetensors") + digest(self.work / "heads.safetensors")

    @cached_property
    def heads(self) -> dict[str, Head]:
        """Every task's fixed head."""
        tensors = load_file(self.work / "heads.safetensors", device=str(self.device))
        return {t.name: (tensors[f"{t.name}.weight"], tensors[f"{t.name}.bias"]) for t in TASKS}

    def validate(self, body: ViTModel) -> Scores:
        """Validation accuracy of one body on every task."""
        return {
            task.name: accuracy(body, self.heads[task.name], data.validation, data.validation_labels)
            for task, data in zip(TASKS, self.training, strict=True)
        }

    def experts(self) -> None:
        """Fine-tune one expert per task from the base as written, or those alone that were asked for."""
        for i, task in enumerate(TASKS):
            if self.alone is not None and task.name not in self.alone:
                continue
            folder, record = self.out / "experts" / task.name, self.work / f"expert-{task.name}.json"
            if folder.is_dir() and read_record(record).get("base") == self.base_digest():
                self.log(f"expert {task.name}: there")
                continue
            record.unlink(missing_ok=True)
            data, head = self.training[i], self.heads[task.name]
            start = load_body(self.out / "base", self.device)
            body = train_expert(start, head, task, data, self.size, self.seed, self.log)

            def fill(place: Path, body: ViTModel = body, head: Head = head, data: TaskImages = data) -> None:
                save_expert(body, head, data.class_names, place, self.size)

            publish(folder, fill)
            body = load_body(folder, self.device)
            score = accuracy(body, head, data.validation, data.validation_labels)
            content = {"base": self.base_digest(), "validation": score, "trained_on": self.here()}
            write_record(record, content)
            self.log(f"expert {task.name}: validation {score:.3f}")

    def merged_scores(self, base: ViTModel, experts: list[ViTModel]) -> dict[str, Scores]:
        """Validation accuracies of two plain merges: a look at the zoo, never a choice."""
        start = {key: value.clone() for key, value in base.state_dict().items()}
        moves = {
            key: torch.stack([expert.state_dict()[key] - value for expert in experts]).sum(0)
            for key, value in start.items()
        }
        found = {}
        for name, scale in (("weight_average", 1 / len(experts)), ("task_arithmetic_0.3", 0.3)):
            base.load_state_dict({key: rounded(value + scale * moves[key]) for key, value in start.items()})
            found[name] = self.validate(base)
            self.log(f"{name}: validation mean {mean(found[name]):.3f} {rounded_scores(found[name])}")
        base.load_state_dict(start)
        return found

    def measure(self) -> dict[str, object]:
        """All accuracies of the written models, in float32 from their bfloat16 weights."""
        base = load_body(self.out / "base", self.device)
        experts = [load_body(self.out / "experts" / task.name, self.device) for task in TASKS]
        found: dict[str, dict[str, Scores]] = {"base": {}, "experts": {}}
        found["base"]["validation"] = self.validate(base)
        found["experts"]["validation"] = {
            t.name: read_record(self.work / f"expert-{t.name}.json")["validation"] for t in TASKS
        }
        for split, title in (("select", "select"), ("test", "test_final_report")):
            found["base"][title], found["experts"][title] = {}, {}
            for task, expert in zip(TASKS, experts, strict=True):
                shown = load_split(self.out / "data" / task.name / f"{split}.npz", self.device)
                head = self.heads[task.name]
                found["base"][title][task.name] = accuracy(base, head, *shown)
                found["experts"][title][task.name] = accuracy(expert, head, *shown)
            for who in ("base", "experts"):
                self.log(f"{who} {title} mean {mean(found[who][title]):.3f}")
                self.log(f"    {rounded_scores(found[who][title])}")
        return {**found, "merged_validation": self.merged_scores(base, experts)}

    def listing(self) -> dict[str, dict[str, object]]:
        """Hash and size of every shipped file but the manifest."""
        paths = [p for part in ("base", "experts", "data") for p in (self.out / part).rglob("*")]
        paths += [self.out / "MODEL_CARD.md", self.out / "DATA_CARD.md"]
        files = sorted((p.relative_to(self.out).as_posix(), p) for p in paths if p.is_file())
        return {name: {"sha256": digest(path), "bytes": path.stat().st_size} for name, path in files}

    def save(self) -> None:
        """Measure everything once and write the cards and the manifest."""
        path = self.out / "manifest.json"
        before = read_record(path).get("files")
        if before and before == self.listing():
            self.log("save: there")
            return
        path.unlink(missing_ok=True)
        manifest: dict[str, Any] = {
            "name": "demo-8",
            "seed": self.seed,
            "size": self.size_name,
            "settings": dataclasses.asdict(self.size),
            "trained_on": read_record(self.work / "base.json")["trained_on"],
            "measured_on": self.here(),
            "sources_sha256": self.sources,
            "splits": {t.name: read_record(self.work / f"split-{t.name}.json") for t in TASKS},
            "accuracy": self.measure(),
        }
        manifest["accuracy_note"] = "float32 arithmetic on the written bfloat16 weights"
        data_files = [entry for entry in (self.out / "data").rglob("*") if entry.is_file()]
        manifest["data_bytes"] = sum(entry.stat().st_size for entry in data_files)
        (self.out / "MODEL_CARD.md").write_text(model_card(manifest), encoding="utf-8")
        (self.out / "DATA_CARD.md").write_text(data_card(manifest), encoding="utf-8")
        manifest["files"] = self.listing()
        write_record(path, manifest)
        largest = max(entry.stat().st_size for entry in data_files)
        total = sum(int(entry["bytes"]) for entry in manifest["files"].values())
        self.log(f"data {manifest['data_bytes'] / 1e6:.2f} MB, largest file {largest / 1e6:.2f} MB")
        self.log(f"save: {len(manifest['files'])} files, {total / 1e6:.2f} MB")


def rounded_scores(scores: Scores) -> str:
    """Scores on one line."""
    return " ".join(f"{name}={value:.3f}" for name, value in scores.items())


def main() -> int:
    """Read the command line and build."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the <task>.npz image sets")
    parser.add_argument("--out", type=Path, required=True, help="folder to build in")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", choices=sorted(SIZES), default="full")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--experts", nargs="*", choices=[task.name for task in TASKS], metavar="TASK",
        help="train these alone and stop, so that several processes can share the work",
    )  # fmt: skip
    options = parser.parse_args()
    name = options.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1 if options.size == "tiny" else 2)
    Build(options.data, options.out, options.seed, options.size, torch.device(name), options.experts).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
