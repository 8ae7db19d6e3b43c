"""Text classifiers: any architecture of `AutoModelForSequenceClassification`, one or two sentences."""

from __future__ import annotations

import os
import sys
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from adarank.data.read import Table
from adarank.data.spec import TaskSpec
from adarank.data.task import Batch
from adarank.errors import CheckpointError, DataError
from adarank.io.checkpoint import Checkpoint
from adarank.io.files import read_json
from adarank.io.side_files import tokenizer_files
from adarank.models.family import Family
from adarank.models.loading import LOCALLY, loading


class TextExamples:
    """Tokenised inputs, padded when a batch is formed."""

    def __init__(self, tokenizer: Any, encoded: dict[str, list[list[int]]]) -> None:
        self._tokenizer, self._encoded = tokenizer, encoded
        self.lengths: Sequence[int] = [len(ids) for ids in encoded["input_ids"]]

    def batch(self, rows: Sequence[int]) -> Batch:
        """The inputs of these rows, as the model takes them."""
        features = {key: [values[row] for row in rows] for key, values in self._encoded.items()}
        padded: Batch = self._tokenizer.pad(features, return_tensors="pt")
        return dict(padded)

    def content(self) -> bytes:
        """Bytes that identify the inputs, for the task's fingerprint."""
        return repr(sorted(self._encoded.items())).encode()


class TextClassifiers(Family):
    """The family of `AutoModelForSequenceClassification`."""

    kind = "text-classification"
    architectures: tuple[str, ...] = ("ForSequenceClassification",)
    keep_embeddings = True
    paths = False
    token_budget, cpu_token_budget = 8192, 1024
    # BERT and its kin; DistilBERT; GPT-2
    mlps: tuple[tuple[str, str], ...] = (
        ("intermediate.dense", "output.dense"),
        ("ffn.lin1", "ffn.lin2"),
        ("mlp.c_fc", "mlp.c_proj"),
    )
    expanded: tuple[str, ...] = ()

    def auto_class(self) -> Any:
        """The class of `transformers` that loads these models."""
        from transformers import AutoModelForSequenceClassification

        return AutoModelForSequenceClassification

    def load(self, expert: Checkpoint) -> nn.Module:
        """The network of a folder, ready to be filled with weights."""
        module = super().load(expert)
        config: Any = module.config
        if config.pad_token_id is None:  # models without padding, such as GPT-2, find an input's end by this id
            config.pad_token_id = tokenizer_of(expert.processor_folder).pad_token_id
        return module

    def check_folder(self, folder: Path) -> None:
        """Raise a `CheckpointError` if there is no file of a tokenizer."""
        if not tokenizer_files(folder.iterdir()):
            raise CheckpointError(
                f"{folder}: no usable tokenizer (it has no file of one). Copy the tokenizer's files beside the weights."
            )

    def columns(self, spec: TaskSpec) -> list[str]:
        """The columns of the data that hold inputs."""
        return [spec.columns.text, *([spec.columns.text_pair] if spec.columns.text_pair else [])]

    def key(self, value: Any) -> Hashable:
        """What makes two inputs the same one."""
        return str(value)

    def encode(self, table: Table, spec: TaskSpec, folder: Path) -> tuple[TextExamples, list[str]]:
        """The inputs of a table as the model takes them, and notes about them."""
        texts = [[str(value) for value in table[column]] for column in self.columns(spec)]
        check_text(spec.name or "", texts)
        tokenizer = tokenizer_of(folder)
        most, whose = min((spec.max_length, ""), (positions(folder, tokenizer), ", which is the model's own,"))
        encoded = tokenizer(*texts, truncation=True, max_length=most)
        cut = sum(len(ids) >= most for ids in encoded["input_ids"])
        if not encoded["input_ids"]:
            raise DataError(f"task '{spec.name}': no inputs.")
        notes = (
            [f"{cut} of {len(texts[0])} inputs reach the limit of {most} tokens{whose} and are cut there"]
            if cut
            else []
        )
        return TextExamples(tokenizer, dict(encoded)), notes

    def logits(self, module: nn.Module, batch: Batch) -> Tensor:
        """(inputs, classes) float32: what the network gives for a batch."""
        out: Tensor = module(**batch).logits
        return out.float()


def check_text(task: str, columns: Sequence[Sequence[str]]) -> None:
    """A `DataError` that names the first row whose text no tokenizer can read."""
    for texts in columns:
        for row, text in enumerate(texts, start=1):
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise DataError(
                    f"task '{task}', row {row}: the text is no Unicode ({error.reason} at character {error.start}: half of a surrogate pair). Save the file as UTF-8."
                ) from None


# they number positions from the padding's id on, and have so many fewer
AFTER_PADDING = ("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "longformer", "mpnet", "data2vec-text")


def positions(folder: Path, tokenizer: Any) -> int:
    """How many tokens the model has positions for."""
    file = folder / "config.json"
    config = read_json(file)
    key = next((key for key in ("max_position_embeddings", "n_positions") if config.get(key)), None)
    positions = _length(file, key, config[key]) if key else sys.maxsize
    if key and config.get("model_type") in AFTER_PADDING:
        padding = config.get("pad_token_id")
        before = 2 if padding is None else _length(file, "pad_token_id", padding, least=0) + 1
        positions = _length(file, f"{key} without the {before} positions up to the padding's", positions - before)
    return min(positions, _length(folder / "tokenizer_config.json", "model_max_length", tokenizer.model_max_length))


def _length(file: Path, key: str, value: Any, least: int = 1) -> int:
    """A setting that counts tokens; some tokenizers give theirs as a float without end."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= least:
        raise CheckpointError(f"{file}: {key} is {str(value)[:40]!r}. Give a whole number from {least} on.")
    return int(min(value, sys.maxsize))


def tokenizer_of(folder: Path) -> Any:
    """The tokenizer beside a model's weights, with a token to pad by."""
    tokenizer = stored_tokenizer(folder)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def stored_tokenizer(folder: Path) -> Any:
    """The tokenizer beside a model's weights as its files have it.

    Raises:
        CheckpointError: none of its files is there, or they cannot be used.
    """
    from transformers import AutoTokenizer

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with loading(folder, "no usable tokenizer", "Copy the tokenizer's files beside the weights."):
        tokenizer = AutoTokenizer.from_pretrained(str(folder), **LOCALLY)
    # without any of its files some versions make a tokenizer that knows no word; tokenizers of bytes have no files
    files = {*tokenizer.vocab_files_names.values(), *(("tokenizer.json",) if tokenizer.vocab_files_names else ())}
    if files and not any((folder / file).exists() for file in files):
        raise CheckpointError(
            f"{folder}: no usable tokenizer (none of {', '.join(sorted(files))} is there). Copy the tokenizer's files beside the weights."
        )
    return tokenizer
