"""Equal shapes of other tokens, or of another function, are refused or told of. Tokenizer files by their own libraries."""

from __future__ import annotations

import base64
import json
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import adarank
from adarank.cli.main import main
from adarank.errors import CheckpointError, MismatchError
from adarank.io.vocabulary import read_vocabulary
from adarank.models.compatibility import compare_vocabularies
from make import save
from text_zoo import ADAPT, make_zoo, recipe

WORDS = ["<unk>", *(f"w{i}" for i in range(15))]
ROWS = len(WORDS)


def fast(folder: Path, words: Sequence[str], kind: str = "WordLevel", added: Sequence[str] = ()) -> Path:
    """A tokenizer as `transformers` saves it."""
    ids = {word: row for row, word in enumerate(words)}
    made = {
        "WordLevel": lambda: models.WordLevel(ids, unk_token="<unk>"),
        "WordPiece": lambda: models.WordPiece(ids, unk_token="<unk>"),
        "BPE": lambda: models.BPE(ids, []),
        "Unigram": lambda: models.Unigram([(word, -1.0) for word in words], unk_id=0),
    }
    inner = Tokenizer(made[kind]())
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    outer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
    if added:
        outer.add_tokens(list(added))
    folder.mkdir(parents=True, exist_ok=True)
    outer.save_pretrained(folder)
    return folder


def vocab_txt(folder: Path, words: Sequence[str], added: Sequence[str] = ()) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("".join(word + "\n" for word in words), encoding="utf-8")
    _added(folder, words, added)
    return folder


def vocab_json(folder: Path, words: Sequence[str], added: Sequence[str] = ()) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: row for row, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    decoder = {str(len(words) + i): {"content": token} for i, token in enumerate(added)}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
    return folder


def _added(folder: Path, words: Sequence[str], added: Sequence[str]) -> None:
    (folder / "added_tokens.json").write_text(json.dumps({token: len(words) + i for i, token in enumerate(added)}))


def message(*fields: tuple[int, bytes]) -> bytes:
    """A protobuf message of fields that have a length, none of 128 bytes or more."""
    return b"".join(bytes([number << 3 | 2, len(content)]) + content for number, content in fields)


def sentencepiece(folder: Path, words: Sequence[str], added: Sequence[str] = ()) -> Path:
    """By the published schema: pieces are field 1, each with its text, a score (a float) and a type (a number)."""
    folder.mkdir(parents=True, exist_ok=True)
    pieces = [(1, message((1, word.encode())) + b"\x15\x00\x00\x80\xbf\x18\x01") for word in words]
    (folder / "tokenizer.model").write_bytes(message(*pieces, (2, b"\x08\x02")))
    _added(folder, words, added)
    return folder


def tiktoken(folder: Path, words: Sequence[str], added: Sequence[str] = ()) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [base64.b64encode(word.encode()) + b" %d" % row for row, word in enumerate(words)]
    (folder / "tokenizer.model").write_bytes(b"\n".join(lines) + b"\n")
    _added(folder, words, added)
    return folder


FORMS: dict[str, Callable[..., Path]] = {
    **{kind: lambda folder, words, added=(), kind=kind: fast(folder, words, kind, added) for kind in ("WordLevel", "WordPiece", "BPE", "Unigram")},
    "vocab.txt": vocab_txt, "vocab.json": vocab_json, "sentencepiece": sentencepiece, "tiktoken": tiktoken,
}  # fmt: skip


def compared(folders: Mapping[str, Path], rows: int = ROWS) -> tuple[list[str], list[str]]:
    return compare_vocabularies(folders, rows)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_each_token_its_id(tmp_path: Path, form: str) -> None:
    vocabulary = read_vocabulary(FORMS[form](tmp_path, WORDS, added=["<one>", "<two>"]))
    assert vocabulary is not None
    assert vocabulary.ids == {word: row for row, word in enumerate([*WORDS, "<one>", "<two>"])}


@pytest.mark.parametrize("kind", ["WordLevel", "WordPiece", "BPE", "Unigram"])
def test_a_tokenizers_own_ids_are_read(tmp_path: Path, kind: str) -> None:
    folder = fast(tmp_path, WORDS, kind, ["<x>"])
    vocabulary = read_vocabulary(folder)
    assert vocabulary is not None
    assert vocabulary.ids == PreTrainedTokenizerFast.from_pretrained(folder).get_vocab()


@given(st.lists(st.text(st.characters(exclude_categories=("Cs", "Cc", "Zl", "Zp")), min_size=1, max_size=9), min_size=1, max_size=20, unique=True))  # fmt: skip
def test_any_tokens_survive_sentencepiece_and_lines(tmp_path_factory: pytest.TempPathFactory, words: list[str]) -> None:
    folder = tmp_path_factory.mktemp("words")
    for form in (sentencepiece, vocab_txt, vocab_json):
        vocabulary = read_vocabulary(form(folder / form.__name__, words))
        assert vocabulary is not None
        assert list(vocabulary.ids) == words


@pytest.mark.parametrize("form", FORMS)
def test_other_ids_of_the_same_tokens_are_refused_by_name(tmp_path: Path, form: str) -> None:
    turned = [WORDS[0], *WORDS[4:], *WORDS[1:4]]
    folders = {"the base": FORMS[form](tmp_path / "base", WORDS), "expert 'b'": FORMS[form](tmp_path / "b", WORDS), "expert 'a'": FORMS[form](tmp_path / "a", turned)}  # fmt: skip
    problems, _ = compared(folders)
    assert len(problems) == 1
    assert "'w4' is 5 in the base, 2 in expert 'a'" in problems[0] or "'w4' is 5 in the base, 1 in expert 'a'" in problems[0]  # fmt: skip
    assert "and 12 more" in problems[0]
    del folders["expert 'a'"]
    assert compared(folders) == ([], [])


def test_vocabularies_of_other_forms_compare_by_token(tmp_path: Path) -> None:
    forms = [fast(tmp_path / "a", WORDS), vocab_txt(tmp_path / "b", WORDS), vocab_json(tmp_path / "c", WORDS)]
    assert compared({str(i): folder for i, folder in enumerate(forms)}) == ([], [])
    problems, _ = compared({"x": forms[0], "y": vocab_txt(tmp_path / "d", WORDS[::-1])})
    assert "in x" in problems[0]
    problems, notes = compared({"x": forms[0], "y": sentencepiece(tmp_path / "e", WORDS)})
    assert not problems
    assert "were not compared: their files are of different kinds (x has tokenizer.json, y has tokenizer.model)" in notes[0]  # fmt: skip


def test_another_token_on_a_row_is_refused_unless_reserved(tmp_path: Path) -> None:
    base = [*WORDS[:-2], "[unused1]", "<|reserved_special_token_0|>"]
    chat = [*WORDS[:-2], "<|im_start|>", "<|reserved_special_token_0|>"]
    other = [*WORDS[:-2], "<tool>", "<|im_end|>"]
    folders = {name: vocab_txt(tmp_path / name, words) for name, words in (("base", base), ("chat", chat), ("tool", other))}  # fmt: skip
    problems, notes = compared({name: folders[name] for name in ("base", "chat")})
    assert not problems
    assert "chat has 1 token(s) that models before it have not: '<|im_start|>' (14)" in notes[0]
    problems, _ = compared(folders)  # two experts gave one row two meanings
    assert "14 is '<|im_start|>' in chat, '<tool>' in tool" in problems[0]


def test_added_tokens_and_rows_beyond_the_table_count_as_such(tmp_path: Path) -> None:
    base = vocab_txt(tmp_path / "base", WORDS, added=["<x>", "<y>"])
    turned = vocab_txt(tmp_path / "a", WORDS, added=["<y>", "<x>"])
    problems, _ = compared({"base": base, "a": turned}, ROWS + 2)
    assert "'<y>' is 17 in base, 16 in a" in problems[0]
    assert compared({"base": base, "a": turned}, ROWS) == ([], [])
    assert compared({"base": base, "a": turned}, 0) == ([], [])


def test_other_merges_and_preparation_of_text_are_told(tmp_path: Path) -> None:
    ids = {token: row for row, token in enumerate(["a", "b", "c", "ab", "bc"])}
    settings: list[tuple[list[tuple[str, str]], Any]] = [
        ([("a", "b"), ("b", "c")], None), ([("b", "c"), ("a", "b")], None), ([("a", "b"), ("b", "c")], normalizers.Lowercase()),
    ]  # fmt: skip
    for number, (merges, normaliser) in enumerate(settings):
        inner = Tokenizer(models.BPE(ids, merges))
        if normaliser is not None:
            inner.normalizer = normaliser
        (tmp_path / str(number)).mkdir()
        inner.save(str(tmp_path / str(number) / "tokenizer.json"))
    for number, part in ((1, "(merges)"), (2, "(normalizer)")):
        problems, notes = compared({"the base": tmp_path / "0", "expert 'a'": tmp_path / str(number)}, 5)
        assert not problems
        assert f"Tokenizers of the base and expert 'a' split text differently {part}" in notes[0]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b"{}"), ("tokenizer.json", b'{"model": {"vocab": 3}}'), ("tokenizer.json", b'{"model": {"vocab": {"a": "b"}}}'),
        ("tokenizer.json", b'{"model": {"vocab": {"a": 0, "a": 1}}}'), ("tokenizer.json", b'{"a":' * 50_000), ("tokenizer.json", b"\xff"),
        ("tokenizer.json", b'{"model": {"vocab": [[]]}}'), ("tokenizer.json", b'{"model": {"vocab": [[0.5, 1]]}}'), ("tokenizer.json", b'{"model": {"vocab": {}}, "added_tokens": [{"content": "a", "id": 1e400}]}'), ("tokenizer.json", b'{"model": {"vocab": {}}, "added_tokens": [3]}'),
        ("vocab.json", b"[1]"), ("vocab.json", b'{"a": true}'), ("vocab.txt", b"\xff\xfe"),
        ("tokenizer.model", b""), ("tokenizer.model", b"version https://git-lfs.github.com/spec/v1\n"), ("spiece.model", b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01"),
        ("tokenizer.model", b"\x0a\x05\x0a\x09ab"), ("tokenizer.model", b"\x80"), ("tokenizer.model", b"!! 1\n"), ("tokenizer.model", b"\x80\x04\x95\x0e.pickle"),
    ],
)  # fmt: skip
def test_a_damaged_vocabulary_is_a_sentence(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{name}: "):
        read_vocabulary(tmp_path)


def test_a_damaged_list_of_added_tokens_is_a_sentence(tmp_path: Path) -> None:
    vocab_txt(tmp_path, WORDS)
    for name, content in (("added_tokens.json", '{"a": "b"}'), ("tokenizer_config.json", '{"added_tokens_decoder": {"x": 3}}')):  # fmt: skip
        before = (tmp_path / name).read_text() if (tmp_path / name).exists() else "{}"
        (tmp_path / name).write_text(content)
        with pytest.raises(CheckpointError, match=name):
            read_vocabulary(tmp_path)
        (tmp_path / name).write_text(before)


def test_folders_without_a_vocabulary_are_left_out(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / name).mkdir()
    assert read_vocabulary(tmp_path / "a") is None
    assert compared({name: tmp_path / name for name in "abc"}) == ([], [])
    vocab_txt(tmp_path / "a", WORDS)
    vocab_txt(tmp_path / "c", WORDS[::-1])
    problems, _ = compared({name: tmp_path / name for name in "abc"})
    assert len(problems) == 1


# Merges


def language_models(folder: Path, words: Mapping[str, Sequence[str]]) -> Path:
    """Models of one shape with an embedding table, and a recipe."""
    for number, (name, listed) in enumerate(words.items()):
        state = {"model.embed_tokens.weight": torch.randn(ROWS, 4), "model.layers.0.mlp.up_proj.weight": torch.randn(4, 4)}  # fmt: skip
        save(folder / name, {key: value + number for key, value in state.items()}, {"model_type": "none"})
        fast(folder / name, listed)
    models = [{"model": name} for name in words if name != "base"]
    return recipe(folder, merge_method="task_arithmetic", base_model="base", models=models, parameters={"weight": 0.5})


@pytest.mark.parametrize("command", ["plan", "merge"])
def test_a_merge_of_other_vocabularies_is_refused(tmp_path: Path, command: str, capsys: Any) -> None:
    turned = [WORDS[0], *WORDS[4:], *WORDS[1:4]]
    path = language_models(tmp_path, {"base": WORDS, "a": turned, "b": WORDS})
    out = [] if command == "plan" else [str(tmp_path / "out")]
    assert main([command, str(path), *out]) == 1
    text = " ".join(capsys.readouterr().err.split())
    assert "Vocabularies differ" in text
    assert "'w4' is 5 in the base, 2 in expert 'a'" in text or "'w4' is 5 in the base, 1 in expert 'a'" in text
    assert "expert 'b'" not in text
    assert not (tmp_path / "out").exists()


def test_experts_without_a_base_are_compared_too(tmp_path: Path) -> None:
    path = language_models(tmp_path, {"base": WORDS, "a": WORDS[::-1], "b": WORDS})
    values = {"merge_method": "average", "models": [{"model": str(tmp_path / name)} for name in "ab"], "device": "cpu"}
    with pytest.raises(MismatchError, match="in expert 'a'"):
        adarank.open_job(adarank.load_recipe(values))
    assert path.exists()


def test_tables_that_are_kept_need_the_same_tokens_too(tmp_path: Path) -> None:
    """Text tasks keep the base's table, and encode with the expert's tokenizer: its ids would be other tokens."""
    folder = make_zoo(tmp_path)
    file = folder / "models" / "mood" / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["good"], vocabulary["bad"] = vocabulary["bad"], vocabulary["good"]
    file.write_text(json.dumps(content))
    for call in (adarank.evaluate_recipe, lambda path: adarank.open_job(adarank.load_recipe(path))):
        with pytest.raises(MismatchError, match=r"'(good|bad)' is \d+ in the base, \d+ in expert 'mood'"):
            call(recipe(folder))


def test_comparing_opens_no_connection_and_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = language_models(tmp_path, {"base": WORDS, "a": WORDS, "b": WORDS})
    for name in "ab":
        (tmp_path / name / "tokenization_own.py").write_text("raise SystemExit('it ran')")
        config = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["tokenization_own.Own", None]}}
        (tmp_path / name / "tokenizer_config.json").write_text(json.dumps(config))
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "tokenization_own.Own"}, "rope_theta": 1}))  # fmt: skip
    monkeypatch.setattr(socket, "socket", None)
    assert adarank.open_job(adarank.load_recipe(path)).notes == ()


def test_a_network_with_a_table_of_another_shape_is_not_run(tmp_path: Path) -> None:
    zoo = make_zoo(tmp_path)
    file = zoo / "models" / "base" / "model.safetensors"
    state = load_file(file)
    name = "embeddings.word_embeddings.weight"
    save_file({**state, name: state[name][:-3].contiguous()}, file, {"format": "pt"})
    path = recipe(zoo, **{**ADAPT, "select": {"keep": name}})
    with pytest.raises(
        adarank.AdaRankError, match=r"word_embeddings.weight: \(\d+, 16\) is kept from the base, and the model"
    ):
        adarank.merge_recipe(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
