"""Build lm-4: a small Llama, an expert of each of four kinds of text, whole and as a LoRA adapter, and their data.

Five stages (splits, base, experts, adapters, save) run in order. What a stage writes appears under its final name only
when complete, and a stage whose output is there is skipped; a training that was cut off goes on where it last wrote.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import sys
import time
from collections.abc import Callable
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from lm_model import (
    SIZES,
    Size,
    Stream,
    make_tokenizer,
    measure,
    new_model,
    token_lines,
    train,
    training_seed,
)
from lm_text import DOMAINS, Document, Splits, passages, read_domains, rows, thin
from stages import begin_with, digest, publish, read_record, write_record

transformers_logging.disable_progress_bar()


class Build:
    """One build: its folders, settings, and the stages."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.out, self.work, self.options = options.out, options.out / "work", options
        self.size: Size = SIZES[options.size]
        self.started = time.monotonic()

    def log(self, line: str) -> None:
        """Print a line with the time since the start."""
        print(f"[{time.monotonic() - self.started:6.1f} s] {line}", flush=True)

    @cached_property
    def domains(self) -> dict[str, Splits]:
        """All documents by domain and split."""
        given = self.options
        return read_domains(given.verse, given.news, given.code, self.size.problems, given.seed)

    @cached_property
    def mixture(self) -> dict[str, list[Document]]:
        """What the base sees of each domain."""
        return {domain: thin(splits["train"], self.size.thin) for domain, splits in self.domains.items()}

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The vocabulary, made from the base's mixture."""
        texts = [document.text for documents in self.mixture.values() for document in documents]
        return make_tokenizer(texts, self.size)

    def check_settings(self) -> None:
        """Refuse to go on with a folder that other settings or data began."""
        texts = {
            domain: {
                split: sum(len(document.text) for document in documents)
                for split, documents in splits.items()
            }
            for domain, splits in self.domains.items()
        }
        settings = {
            "seed": self.options.seed,
            "numbers": dataclasses.asdict(self.size),
            "characters": texts,
            "sources": {name: digest(getattr(self.options, name)) for name in ("verse", "news")},
        }
        begin_with(settings, self.work / "settings.json", self.out)

    def run(self) -> None:
        """Go through all stages."""
        self.check_settings()
        self.splits()
        self.train_base()
        for domain in DOMAINS:
            self.train_expert(domain)
        for domain in DOMAINS:
            self.train_adapter(domain)
        self.save()

    def passages(self, domain: str, split: str) -> list[Document]:
        """A split's passages, evenly over its documents."""

        def lengths(document: Document) -> list[int]:
            return [len(line) for line in token_lines(document, self.tokenizer)]

        pieces = list(passages(self.domains[domain][split], lengths, self.size.context - 1))
        most = getattr(self.size, split)
        return [pieces[i * len(pieces) // most] for i in range(most)] if len(pieces) > most else pieces

    def splits(self) -> None:
        """Write each domain's adapt, select and test files; answers are in the last two alone."""
        for domain in DOMAINS:

            def fill(folder: Path, domain: str = domain) -> None:
                for split in ("adapt", "select", "test"):
                    lines = rows(self.passages(domain, split), labelled=split != "adapt")
                    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in lines)
                    (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")

            self.stage(f"data {domain}", self.out / "data" / domain, fill)

    def stage(self, name: str, folder: Path, fill: Callable[[Path], object]) -> None:
        """Run a stage unless its folder is there."""
        if folder.is_dir():
            self.log(f"{name}: there")
            return
        publish(folder, fill)
        self.log(f"{name}: written")

    def streams(self, documents: dict[str, list[Document]]) -> list[Stream]:
        """The tokens to train on."""
        return [Stream(texts, self.tokenizer, self.size.context) for texts in documents.values()]

    def fit(
        self, model: nn.Module, documents: dict[str, list[Document]], steps: int, rate: float, name: str
    ) -> None:
        """Train a model on these documents."""
        cut = self.work / f"{name}.pt"
        seed = training_seed(self.options.seed, name)
        train(
            model,
            self.streams(documents),
            steps,
            rate,
            self.size,
            seed,
            cut,
            lambda line: self.log(f"{name}: {line}"),
        )

    def train_base(self) -> None:
        """Train the base on the thin mixture."""

        def fill(folder: Path) -> None:
            training_seed(self.options.seed, "weights")
            model = new_model(self.size, self.tokenizer)
            self.fit(model, self.mixture, self.size.base_steps, self.size.base_rate, "base")
            model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)

        self.stage("base", self.out / "base", fill)

    def load(self, name: str) -> LlamaForCausalLM:
        """A written model."""
        return LlamaForCausalLM.from_pretrained(self.out / name, dtype=torch.float32)

    def train_expert(self, domain: str) -> None:
        """Fine-tune all of the base's weights on one domain."""

        def fill(folder: Path) -> None:
            model = self.load("base")
            documents = {domain: self.domains[domain]["train"]}
            self.fit(model, documents, self.size.steps, self.size.rate, f"expert-{domain}")
            model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)

        self.stage(f"expert {domain}", self.out / "experts" / domain, fill)

    def train_adapter(self, domain: str) -> None:
        """Fine-tune a LoRA adapter of the base's linear layers on one domain."""

        def fill(folder: Path) -> None:
            training_seed(self.options.seed, "adapter weights", domain)
            settings = LoraConfig(
                r=self.size.rank,
                lora_alpha=2 * self.size.rank,
                target_modules="all-linear",
                task_type="CAUSAL_LM",
            )
            model = get_peft_model(self.load("base"), settings)
            documents = {domain: self.domains[domain]["train"]}
            self.fit(model, documents, self.size.lora_steps, self.size.lora_rate, f"adapter-{domain}")
            model.save_pretrained(folder)

        self.stage(f"adapter {domain}", self.out / "adapters" / domain, fill)

    def scores(self, model: nn.Module) -> dict[str, dict[str, float]]:
        """A model's scores on every domain's select split: a look at the zoo; test data are for reports."""
        return {
            domain: {
                key: round(value, 3)
                for key, value in measure(model, self.passages(domain, "select"), self.tokenizer).items()
            }
            for domain in DOMAINS
        }

    def models(self) -> dict[str, LlamaForCausalLM]:
        """The base, the experts, both ways, and the average of the whole experts."""
        base = self.load("base")
        experts = {domain: self.load(f"experts/{domain}") for domain in DOMAINS}
        adapted = {
            f"adapter {domain}": PeftModel.from_pretrained(
                self.load("base"), self.out / "adapters" / domain
            ).merge_and_unload()
            for domain in DOMAINS
        }
        average = copy.deepcopy(base)
        states = [expert.state_dict() for expert in experts.values()]
        average.load_state_dict(
            {name: torch.stack([state[name] for state in states]).mean(0) for name in states[0]}
        )
        return {
            "base": base,
            **{f"expert {domain}": expert for domain, expert in experts.items()},
            **adapted,
            "average": average,
        }

    def save(self) -> None:
        """Measure everything once and write the manifest."""
        path = self.out / "manifest.json"
        files = sorted(
            p
            for part in ("base", "experts", "adapters", "data")
            for p in (self.out / part).rglob("*")
            if p.is_file()
        )
        listing = {p.relative_to(self.out).as_posix(): digest(p) for p in files}
        if read_record(path).get("files") == listing:
            self.log("save: there")
            return
        scores = {}
        for name, model in self.models().items():
            scores[name] = self.scores(model)
            self.log(f"{name}: {scores[name]}")
        manifest: dict[str, Any] = {
            "name": "lm-4",
            **read_record(self.work / "settings.json"),
            "made_with": {
                package: version(package) for package in ("torch", "transformers", "tokenizers", "peft")
            },
            "parameters": sum(parameter.numel() for parameter in self.load("base").parameters()),
            "select_scores": scores,
            "files": listing,
        }
        write_record(path, manifest)


def main() -> int:
    """Read the command line and build."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--verse", type=Path, required=True, help="plays in one text file (`tinyshakespeare`)"
    )
    parser.add_argument(
        "--news",
        type=Path,
        required=True,
        help="a table with tabs and a header, articles in its last column (AG News)",
    )
    parser.add_argument(
        "--code", type=Path, help="a folder of Python files (default: the running Python's standard library)"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", choices=sorted(SIZES), default="full")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    Build(options).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
