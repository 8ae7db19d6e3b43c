"""Texts as inputs: the tokenizer beside the weights, and the number of tokens that a model can take."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers

from adarank.data.spec import TaskSpec
from adarank.errors import CheckpointError
from adarank.models.text import TextClassifiers, tokenizer_of
from text_zoo import make_zoo


def test_a_folder_needs_a_tokenizer_and_bytes_count_as_one(tmp_path: Path) -> None:
    """Some versions of transformers make a tokenizer that knows no word where there is none."""
    folder = make_zoo(tmp_path) / "models" / "mood"
    assert tokenizer_of(folder)("good")["input_ids"] != tokenizer_of(folder)("bad")["input_ids"]
    for file in folder.glob("token*"):
        file.unlink()
    with pytest.raises(CheckpointError, match=r"no usable tokenizer.*Copy the tokenizer's files"):
        tokenizer_of(folder)
    transformers.ByT5Tokenizer().save_pretrained(tmp_path / "bytes")
    assert tokenizer_of(tmp_path / "bytes")("ab")["input_ids"][:2] == [ord("a") + 3, ord("b") + 3]


@pytest.mark.parametrize(("architecture", "most"), [("bert", 12), ("roberta", 15), ("gpt2", 12)])
def test_inputs_are_cut_to_the_models_own_positions(tmp_path: Path, architecture: str, most: int) -> None:
    """RoBERTa numbers positions after its padding's id, 0 here: of 16 it can use 15."""
    folder = make_zoo(tmp_path, architecture) / "models" / "mood"
    values = json.loads((folder / "config.json").read_text())
    values["n_positions" if architecture == "gpt2" else "max_position_embeddings"] = (
        16 if architecture == "roberta" else 12
    )
    (folder / "config.json").write_text(json.dumps(values))
    table = {"text": ["good " * 40, "bad"]}
    examples, notes = TextClassifiers().encode(table, TaskSpec(name="mood", data="x.tsv"), folder)
    assert examples.lengths[0] == most
    assert notes == [f"1 of 2 inputs reach the limit of {most} tokens, which is the model's own, and are cut there"]
