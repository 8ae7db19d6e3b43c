"""Whose tokenizer a merge comes with: every form of mergekit's keys for it. Tokenizers are read by `transformers`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from adarank.errors import AdaRankError, MismatchError, RecipeError
from adarank.workflow.merge import merge
from make import save

WORDS = ["<unk>", "w1", "w2", "w3"]
TABLE = "model.embed_tokens.weight"


def model(folder: Path, words: Sequence[str] = WORDS, template: str = "", rows: int | None = None) -> None:
    """A table of a row for each word, a matrix, and a tokenizer as `transformers` saves it."""
    state = {TABLE: torch.randn(rows or len(words), 3), "model.layers.0.mlp.up_proj.weight": torch.randn(3, 3)}
    save(folder, state, {"vocab_size": rows or len(words)})
    inner = Tokenizer(models.WordLevel({word: row for row, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>").save_pretrained(folder)
    if template:
        (folder / "chat_template.jinja").write_text(template)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model(tmp_path / "start", template="of the start")
    model(tmp_path / "a")
    model(tmp_path / "b", template="of b")
    model(tmp_path / "grown", [*WORDS, "<begin>", "<end>"])
    model(tmp_path / "swapped", ["<unk>", "w2", "w1", "w3"])
    return tmp_path


def merged(folder: Path, experts: Sequence[str] = ("a", "b"), **keys: Any) -> Path:
    models = [{"model": str(folder / name)} for name in experts]
    recipe = {"merge_method": "task_arithmetic", "base_model": str(folder / "start"), "models": models}
    keys = json.loads(json.dumps(keys).replace("FOLDER", str(folder)))
    merge({**recipe, "parameters": {"weight": 0.5}, **keys}, folder / "out", force=True)
    return folder / "out"


FORMS: list[tuple[dict[str, Any], str | None]] = [
    ({"tokenizer_source": "base"}, "start"), ({"tokenizer": {"source": "base"}}, "start"), ({"tokenizer": {}}, "start"),
    ({"tokenizer_source": "union"}, "start"), ({"tokenizer": {"source": "union"}}, "start"),
    ({"tokenizer_source": "FOLDER/start"}, "start"), ({"tokenizer": {"source": "FOLDER/b/"}}, "b"),
    ({"tokenizer_source": "FOLDER/b"}, "b"), ({"tokenizer": {"source": "FOLDER/a", "tokens": {}}}, "a"),
]  # fmt: skip


@pytest.mark.parametrize(("keys", "source"), FORMS)
def test_equal_vocabularies_merge_with_the_named_tokenizer(keys: dict[str, Any], source: str, folder: Path) -> None:
    plain = load_file(merged(folder) / "model.safetensors")
    out = merged(folder, **keys)
    found = load_file(out / "model.safetensors")
    assert set(found) == set(plain)
    assert all(torch.equal(found[name], plain[name]) for name in plain)
    assert AutoTokenizer.from_pretrained(out).get_vocab() == {word: row for row, word in enumerate(WORDS)}
    template, written = folder / source / "chat_template.jinja", out / "chat_template.jinja"
    assert written.exists() == template.exists()
    assert not template.exists() or written.read_text() == template.read_text()


@pytest.mark.parametrize("keys", [{"tokenizer": {}}, {"tokenizer_source": "union"}, {"tokenizer_source": "base"}, {"tokenizer": {"source": "FOLDER/grown"}}])  # fmt: skip
def test_tokens_that_would_resize_a_table_are_named(keys: dict[str, Any], folder: Path) -> None:
    """Where rows are not brought together: each task's network has its expert's tokenizer."""
    with pytest.raises(
        MismatchError, match=r"expert 'grown' has 2 token\(s\) that the base has not: '<begin>'; '<end>'"
    ):
        merged(folder, ["b", "grown"], merge_method="emr", parameters={}, **keys)
    assert not (folder / "out").exists()


@pytest.mark.parametrize("keys", [{"tokenizer": {}}, {"tokenizer_source": "base"}])
def test_tokens_with_other_ids_are_named(keys: dict[str, Any], folder: Path) -> None:
    with pytest.raises(MismatchError, match=r"'w[12]'"):
        merged(folder, ["b", "swapped"], merge_method="emr", parameters={}, **keys)


def test_a_union_is_the_tokenizer_that_has_all_tokens(folder: Path) -> None:
    """Tables padded beyond their tokens: added tokens need no new rows."""
    for name in ("start", "a"):
        model(folder / name, rows=6)
    assert "<end>" in AutoTokenizer.from_pretrained(merged(folder, ["a", "grown"], tokenizer={})).get_vocab()


@pytest.mark.parametrize(("keys", "text"), [
    ({"tokenizer_source": "elsewhere"}, "'elsewhere' is none of the recipe's models"),
    ({"tokenizer": {"sorce": "base"}}, "Did you mean 'source'"),
    ({"tokenizer": {"pad_to_multiple_of": -8}}, "pad_to_multiple_of: Input should be greater than or equal to 0"),
    ({"tokenizer": {"tokens": {"x": {"sorce": "a"}}}}, "Did you mean 'source'"),
    ({"tokenizer": {}, "tokenizer_source": "base"}, "beside tokenizer_source"),
])  # fmt: skip
def test_what_is_no_source_is_refused(keys: dict[str, Any], text: str, folder: Path) -> None:
    with pytest.raises(RecipeError, match=text):
        merged(folder, **keys)


def test_a_named_source_without_a_tokenizer_is_refused(folder: Path) -> None:
    for file in (folder / "a").glob("tokenizer*"):
        file.unlink()
    with pytest.raises(AdaRankError, match="has no tokenizer"):
        merged(folder, tokenizer_source="FOLDER/a")


def test_equal_pieces_need_no_reading_of_tokenizers(tmp_path: Path) -> None:
    """A tokenizer's model alone, which not every environment can load: equal bytes are one vocabulary."""
    for name in ("start", "a", "b"):
        save(tmp_path / name, {TABLE: torch.randn(2, 3)}, {"vocab_size": 2})
        (tmp_path / name / "tokenizer.model").write_bytes(b"YQ== 0\nYg== 1\n")
    out = merged(tmp_path, tokenizer_source="base")
    assert load_file(out / "model.safetensors")[TABLE].shape == (2, 3)
    assert (out / "tokenizer.model").read_bytes() == b"YQ== 0\nYg== 1\n"
